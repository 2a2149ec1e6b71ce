"""Mixing at the stages of a network, by forward hooks: no network knows that its features are mixed.

The hooks are put on once and do nothing outside a step that mixes there. They stay on between steps because a compiled
network runs only the hooks it was compiled with: those that come and go with a step it would silently leave out.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from backbench.common.base.errors import UserError
from backbench.common.classify.mixing import Pairing


def plain_network(model: nn.Module) -> nn.Module:
    """The module that holds conv1, bn1, layer1 …: without DDP's, torch.compile's and Classifier's wraps."""
    while inner := next((n for n in ("module", "_orig_mod", "trunk") if n in model._modules), None):
        model = model._modules[inner]
    return model


class StageMixer:
    """Hooks on the named stages of one network; `at` says where the forward passes inside it mix."""

    def __init__(self, stages: Iterable[str]) -> None:
        self.stages = [stage for stage in stages if stage != "image"]
        self.network: nn.Module | None = None
        self.handles: list = []
        self.pairing: Pairing | None = None
        self.kept: Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        """Put the hooks on `model`'s stages, once, and before its first forward pass where it is compiled.

        Raises UserError naming a stage that the network has not.
        """
        network = plain_network(model)
        if network is self.network:
            return
        self.detach()
        for stage in self.stages:
            module = getattr(network, stage, None)
            if module is None:
                raise UserError(
                    f"mix_layers: {type(network).__name__} has no {stage} to mix at; leave it out of mix_layers"
                )
            self.handles.append(module.register_forward_hook(partial(self._hook, stage)))
        self.network = network

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.network = [], None

    @contextmanager
    def at(self, pairing: Pairing) -> Iterator[None]:
        """Forward passes inside mix at `pairing.stage`; then `kept` (1 or N,) is the share of each own label."""
        self.pairing, self.kept = pairing, None
        try:
            yield
        finally:
            self.pairing = None
        if self.kept is None:
            raise RuntimeError(f"the forward pass ran no hook at {pairing.stage}: compiled before `attach`?")

    def _hook(self, stage: str, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        if self.pairing is None or self.pairing.stage != stage:
            return None
        mixed, self.kept = self.pairing.apply(output)
        return mixed
