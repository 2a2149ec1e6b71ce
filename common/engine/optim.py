"""Optimiser, schedules and their wrapper: the only file that imports mmengine.

From mmengine come the optimiser wrapper (accumulation, gradient synchronisation only where an update follows, loss
scaling, clipping) and the learning-rate schedulers. Its Runner is not used: its checkpoints hold no random state, its
iteration-based resume replays the loader, its worker seeding repeats draws, and it cannot read back its own files.
"""

import warnings
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR, MultiStepLR, OptimWrapper
from torch import nn

from backbench.common.base.errors import UserError
from backbench.common.base.recipe import Recipe
from backbench.common.engine.device import resolve_precision


def make_optimizer(
    model: nn.Module, recipe: Recipe, groups: list[dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimiser over `groups` (their "lr" a factor on the recipe's) or all trainable parameters."""
    groups = groups or [{"params": [p for p in model.parameters() if p.requires_grad]}]
    groups = [
        {**group, "params": list(group["params"]), "lr": group.get("lr", 1.0) * recipe.lr} for group in groups
    ]
    common = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.nesterov, **common)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](groups, **common)


def make_schedulers(optimizer: Any, recipe: Recipe, images: int) -> list:
    """mmengine schedulers by iteration: `step`, `constant`, or `one_cycle`.

    `one_cycle` rises linearly over `warmup` iterations (0: the first 30 %), then falls to zero as half a cosine.
    Raises UserError when there is no time to fall.
    """
    length, warmup = recipe.length(images), recipe.warmup
    if recipe.schedule == "one_cycle":
        warmup = warmup or min(max(1, int(0.3 * length)), length - 1)
        if warmup >= length:
            raise UserError(
                f"recipe: warmup={warmup}, no shorter than the whole training: {length} iterations"
            )
    made: list = []
    if warmup > 1:  # of one iteration, mmengine would never take the rate up
        made.append(LinearLR(optimizer, start_factor=0.001, by_epoch=False, begin=0, end=warmup))
    if recipe.schedule == "one_cycle":
        made.append(
            CosineAnnealingLR(optimizer, T_max=length - warmup, by_epoch=False, begin=warmup, end=length)
        )
    elif recipe.schedule == "step":
        milestones = recipe.milestone_iterations(images)
        made.append(
            MultiStepLR(optimizer, milestones=milestones, gamma=recipe.gamma, by_epoch=False, end=length + 1)
        )
    return made


class _Quiet:
    """mmengine's wrapper without its waits: its clipping asks for the norm, to log it, at every step."""

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self._accumulative_counts == 1 else super().scale_loss(loss)

    def _clip_grad(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, **self.clip_grad_kwargs)


class _Wrapper(_Quiet, OptimWrapper):
    pass


class _AmpWrapper(_Quiet, AmpOptimWrapper):
    optim_context = OptimWrapper.optim_context  # its own would run the backward pass under autocast too


def wrap(
    optimizer: torch.optim.Optimizer, recipe: Recipe, device: torch.device, accumulation: int
) -> OptimWrapper:
    """The optimiser with accumulation, clipping and loss scaling as the recipe and the device need them.

    Raises UserError for fp16 without a GPU.
    """
    clip = {"max_norm": recipe.clip_grad} if recipe.clip_grad else None
    options = {"optimizer": optimizer, "accumulative_counts": accumulation, "clip_grad": clip}
    if resolve_precision(recipe.precision, device) != "fp16":
        return _Wrapper(**options)
    if device.type != "cuda":
        raise UserError("recipe: precision=fp16 needs a GPU; use bf16 or fp32 (--set precision=fp32)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it asks for the loss scaler by its former name
        return _AmpWrapper(**options)
