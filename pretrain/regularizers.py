"""Stochastic depth, DropBlock and ShakeDrop, by forward hooks on the residual blocks of any network here.

Every draw comes from torch's global generator, which the engine seeds for each micro-batch: a resumed training draws
what an undisturbed one does.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

from backbench.common.base.errors import UserError
from backbench.common.base.recipe import knob
from backbench.common.classify.feature_mixing import plain_network
from backbench.common.classify.mixing import METHODS, parse_method
from backbench.common.classify.step import ClassifyRecipe
from backbench.common.engine.loop import Step

BLOCK_STAGES = ("layer1", "layer2", "layer3", "layer4")  # a CIFAR network has no layer4


@dataclass(frozen=True, kw_only=True)
class RegularizedRecipe(ClassifyRecipe):
    """A classifier's recipe whose method may also name what acts inside the network."""

    network_methods = True

    stochdepth: float = knob(
        0.25, "drop rate of the last residual branch; that of the l-th of L is l/L of it (linear: I)", "P"
    )
    dropblock_keep: float = knob(0.9, "share of a feature map that DropBlock keeps", "P")
    dropblock_block: int = knob(4, "side of DropBlock's square in feature pixels", "P")
    dropblock_stages: int = knob(
        2, "DropBlock acts on the outputs of the blocks of this many last stages", "I"
    )
    dropblock_schedule: str = knob(
        "linear",
        "linear: from keeping all to dropblock_keep over the training, as DropBlock's paper; constant",
        "I",
        choices=("linear", "constant"),
    )
    shakedrop_keep: float = knob(
        0.5,
        "p_L: chance that ShakeDrop leaves the last branch as it is; the l-th of L: 1 − l/L·(1 − p_L)",
        "X",
    )
    shakedrop_alpha: tuple[float, ...] = knob((-1.0, 1.0), "range of ShakeDrop's factor forward", "X")
    shakedrop_beta: tuple[float, ...] = knob((0.0, 1.0), "range of ShakeDrop's factor backward", "X")

    def check(self) -> None:
        """Refuse what cannot be trained. Raises UserError naming the field."""
        super().check()
        for name, low, high in (("stochdepth", 0, 1), ("dropblock_keep", 0, 1), ("shakedrop_keep", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"recipe: {name}={getattr(self, name)}, it must be from {low} to {high}")
        if self.dropblock_block < 1:
            raise UserError(f"recipe: dropblock_block={self.dropblock_block}, at least 1 pixel is needed")
        if self.dropblock_stages < 1:
            raise UserError(f"recipe: dropblock_stages={self.dropblock_stages}, at least 1 stage is needed")
        for name in ("shakedrop_alpha", "shakedrop_beta"):
            value = getattr(self, name)
            if len(value) != 2 or not value[0] <= value[1]:
                raise UserError(f"recipe: {name} is a range low,high (e.g. --set {name}=0,1)")


def residual_blocks(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """(stage, block, last batch norm of its residual branch) of every block, in the order of the forward pass.

    Raises UserError for a network without residual blocks in layer1, layer2, ….
    """
    network, found = plain_network(model), []
    for stage in BLOCK_STAGES:
        for block in getattr(network, stage, ()):
            norms = [m for m in block.children() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            found += [(stage, block, norms[-1])]  # a shortcut's batch norm lies deeper, in `downsample`
    if not found:
        raise UserError(f"{type(network).__name__}: no residual blocks, nothing to regularise")
    return found


def linear_keep(last: float, number: int, count: int) -> float:
    """Keep probability of branch `number` of 1 … `count`, falling from 1 to `last`."""
    return 1.0 - number / count * (1.0 - last)


def drop_block(features: Tensor, seeds: Tensor, block: int) -> Tensor:
    """Zero squares of `block` pixels whose top left corners are `seeds`, and rescale what is kept (DropBlock, alg. 1).

    Features (N, C, H, W); seeds 0 or 1 (N, C, H − block + 1, W − block + 1). torchvision's `drop_block2d` refuses
    even blocks, and the CutMix paper's is 4.
    """
    dropped = F.max_pool2d(F.pad(seeds, [block - 1] * 4), block, stride=1)
    kept = 1 - dropped
    return features * kept.to(features.dtype) * (kept.numel() / (kept.sum() + 1e-6)).to(features.dtype)


def drop_block_seeds(shape: torch.Size, rate: Tensor, block: int) -> Tensor:
    """Draw seeds for features (N, C, H, W) so that about the share `rate` (a tensor) is dropped, float32."""
    height, width = shape[2:]
    corners = (height - block + 1, width - block + 1)
    gamma = rate * (height * width / (block**2 * corners[0] * corners[1]))
    return (torch.rand((*shape[:2], *corners), device=rate.device) < gamma).float()


class _Shake(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, forward_scale: Tensor, backward_scale: Tensor) -> Tensor:
        ctx.save_for_backward(backward_scale)
        return features * forward_scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.saved_tensors[0], None, None


def shakedrop(features: Tensor, gate: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """A branch (N, …) times b + α − bα, its gradient times b + β − bβ (ShakeDrop, arXiv 1802.02375, equation 6).

    Gate b: 0 or 1, of any shape that broadcasts with α and β (N,).
    """
    shape = (-1,) + (1,) * (features.ndim - 1)
    scales = [(gate + scale - gate * scale).view(shape).to(features.dtype) for scale in (alpha, beta)]
    return _Shake.apply(features, *scales)


class Regularizers:
    """The hooks of one network. Active in training mode only; ShakeDrop multiplies by its expectation otherwise."""

    def __init__(self, scheduled: bool) -> None:
        self.scheduled = scheduled
        self.progress = torch.ones(())  # of the training, in [0, 1]: 1 is the full strength
        self.handles: list = []

    def wrap(self, step: Step) -> Step:
        """`step`, telling a scheduled DropBlock how far the training is: batch["progress"] in [0, 1)."""
        if not self.scheduled:
            return step

        def scheduled(model: nn.Module, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
            if "progress" not in batch:
                raise ValueError(
                    'dropblock_schedule=linear needs batch["progress"], the part of the training done'
                )
            self.progress = torch.full((), batch["progress"], device=batch["images"].device)
            return step(model, batch, rng)

        return scheduled

    def remove(self) -> None:
        """Take the hooks off; `fold` then makes up for ShakeDrop's expectation."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def stochdepth(self, rate: float, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        """Hook of a branch: drop it for some images, rescale it for the others."""
        return stochastic_depth(output, rate, "row") if module.training else None

    def dropblock(
        self, rate: float, side: int, module: nn.Module, inputs: tuple, output: Tensor
    ) -> Tensor | None:
        """Hook of a block: drop squares of its output."""
        if not module.training:
            return None
        side = min(side, *output.shape[2:])
        rates = self.progress.to(output.device, non_blocking=True) * rate
        return drop_block(output, drop_block_seeds(output.shape, rates, side), side)

    def shakedrop(
        self, keep: float, recipe: RegularizedRecipe, module: nn.Module, inputs: tuple, output: Tensor
    ) -> Tensor:
        """Hook of a branch: one gate a micro-batch, α and β of each image, as in the public code [X]."""
        if not module.training:
            return output * expectation(keep, recipe)
        gate = (torch.rand((), device=output.device) < keep).float()
        draw = partial(torch.empty, len(output), device=output.device)
        return shakedrop(
            output, gate, draw().uniform_(*recipe.shakedrop_alpha), draw().uniform_(*recipe.shakedrop_beta)
        )


def install(model: nn.Module, recipe: RegularizedRecipe) -> Regularizers:
    """Put the hooks of `recipe.method` on `model` (before it is wrapped or compiled); nothing to do for other methods.

    Raises UserError for a network without residual blocks.
    """
    names = parse_method(recipe.method)
    made = Regularizers("dropblock" in names and recipe.dropblock_schedule == "linear")
    if not any(METHODS[name].kind == "network" for name in names):
        return made
    blocks = residual_blocks(model)
    last_stages = sorted({stage for stage, _, _ in blocks})[-recipe.dropblock_stages :]
    for number, (stage, block, norm) in enumerate(blocks, 1):
        if "stochdepth" in names:
            rate = 1.0 - linear_keep(1.0 - recipe.stochdepth, number, len(blocks))
            made.handles.append(norm.register_forward_hook(partial(made.stochdepth, rate)))
        if "shakedrop" in names:
            keep = linear_keep(recipe.shakedrop_keep, number, len(blocks))
            made.handles.append(norm.register_forward_hook(partial(made.shakedrop, keep, recipe)))
        if "dropblock" in names and stage in last_stages:
            hook = partial(made.dropblock, 1.0 - recipe.dropblock_keep, recipe.dropblock_block)
            made.handles.append(block.register_forward_hook(hook))
    return made


def expectation(keep: float, recipe: RegularizedRecipe) -> float:
    """E[b + α − bα]: what ShakeDrop multiplies a branch by in the mean."""
    return keep + (1.0 - keep) * sum(recipe.shakedrop_alpha) / 2


@torch.no_grad()
def fold(model: nn.Module, recipe: RegularizedRecipe) -> None:
    """Multiply ShakeDrop's expectation into each branch's last batch norm, so that plain weights need no hooks.

    In place, once on freshly trained or loaded weights, with the hooks removed: then the network computes in eval mode
    what it did with them. Does nothing for other methods.
    """
    if "shakedrop" not in parse_method(recipe.method):
        return
    blocks = residual_blocks(model)
    for number, (_, _, norm) in enumerate(blocks, 1):
        factor = expectation(linear_keep(recipe.shakedrop_keep, number, len(blocks)), recipe)
        norm.weight *= factor
        norm.bias *= factor
