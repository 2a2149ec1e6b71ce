"""The training loop: the only file that imports mmengine.

From mmengine come the optimiser wrapper (accumulation, gradient synchronisation only where an update follows, loss
scaling, clipping) and the learning-rate schedulers. Its Runner is not used: its checkpoints hold no random state, its
iteration-based resume replays the loader, its worker seeding repeats draws, and it cannot read back its own files.
"""

import inspect
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR, MultiStepLR, OptimWrapper
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from common.engine.device import autocast, is_main, rank, resolve_precision, to_device, world
from common.engine.loader import MicroBatches, Positions, TrainData, make_loader
from common.engine.streams import STEP, stream, torch_seed
from common.errors import UserError
from common.files import write_atomic
from common.progress import progress
from common.recipe import Recipe

Step = Callable[[nn.Module, dict[str, Any], np.random.Generator], dict[str, Tensor]]
REQUEUE = 75  # EX_TEMPFAIL: stopped by a signal, a checkpoint is there, the same command goes on


def train(
    model: nn.Module,
    step: Step,
    data: TrainData,
    recipe: Recipe,
    *,
    folder: Path,
    key: str,
    seed: int,
    device: torch.device,
    groups: list[dict[str, Any]] | None = None,
    workers: int | None = None,
    desc: str = "training",
) -> dict[str, Any]:
    """Train `model` in place and leave `folder/weights.pt`; go on from `folder/resume.pt` where there is one.

    `step(model, batch, rng)` returns a dict of scalar tensors: those named "loss…" are summed and minimised, all are
    logged. `rng` and torch's global generator are keyed by (seed, iteration, micro-batch). `key` names what is trained:
    a file with another key is refused. `groups` are parameter groups whose "lr" is a factor on the recipe's.
    Returns the cost: seconds, iterations, images, peak memory. Raises UserError when the loss is not finite.
    """
    model.to(device, memory_format=torch.channels_last if recipe.channels_last else torch.contiguous_format)
    done = _read_state(folder / "weights.pt", key, device)
    if done is not None:
        model.load_state_dict(done["model"])
        return done["cost"]
    run = _Training(model, step, data, recipe, folder, key, seed, device, groups, workers)
    run.resume()
    run.loop(desc)
    return run.finish()


class _Training:
    """One training's state, between its start or resume and its end."""

    def __init__(self, model, step, data, recipe, folder, key, seed, device, groups, workers) -> None:
        self.model, self.step, self.recipe, self.device = model, step, recipe, device
        self.folder, self.key, self.seed = folder, key, seed
        micro = recipe.micro_batch or recipe.batch
        total = recipe.batch // micro
        if total % world():
            raise UserError(
                f"{world()} processes cannot share {total} micro-batches of {micro} images evenly: "
                f"--set micro_batch=… so that batch / micro_batch is a multiple of {world()}"
            )
        share = total // world()
        self.micros = range(rank() * share, (rank() + 1) * share)
        self.iterations = recipe.length(len(data))
        self.batches = MicroBatches(data, recipe.batch, micro, seed)
        self.workers = getattr(data, "workers", 0) if workers is None else workers
        optimizer = make_optimizer(model, recipe, groups)
        self.wrapper = _wrap(optimizer, recipe, device, share, self.iterations)
        self.wrapper.initialize_count_status(model, 0, self.iterations * share)
        self.schedulers = make_schedulers(self.wrapper, recipe, len(data))
        self.wrapped = model
        if world() > 1:
            options: dict[str, Any] = {"device_ids": [device.index] if device.type == "cuda" else None}
            renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            options["forward_sync_buffers" if renamed else "broadcast_buffers"] = (
                False  # renamed after torch 2.9
            )
            self.wrapped = DistributedDataParallel(model, **options)
        self.iteration, self.seconds, self.log_bytes = 0, 0.0, 0
        self.sums: Tensor | None = None  # of the logged values since the last log line
        self.names: list[str] = []
        self.bad_iteration = torch.full((), -1, device=device)
        self.bad_values: Tensor | None = None
        self.signalled = False

    def resume(self) -> None:
        """Take up the state that an interrupted run left, and cut the log back to it."""
        state = _read_state(self.folder / "resume.pt", self.key, self.device)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.wrapper.optimizer.load_state_dict(state["optimizer"])
            for scheduler, saved in zip(self.schedulers, state["schedulers"]):
                scheduler.load_state_dict(saved)
            if state["scaler"]:
                self.wrapper.loss_scaler.load_state_dict(state["scaler"])
            self.iteration, self.seconds, self.log_bytes = (
                state["iteration"],
                state["seconds"],
                state["log_bytes"],
            )
            self.names, self.sums = state["names"], state["sums"]
            self.wrapper._inner_count = self.iteration * len(self.micros)
        if is_main():
            with (self.folder / "log.jsonl").open("ab") as log:
                log.truncate(self.log_bytes)

    def loop(self, desc: str) -> None:
        """Run the remaining iterations."""
        self.model.train()
        positions = Positions(self.iteration, self.iterations, self.micros)
        batches = iter(make_loader(self.batches, positions, self.workers, pin=self.device.type == "cuda"))
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGUSR1)}
        clock = saved_at = time.monotonic()
        bar = progress(desc=desc, total=self.iterations, initial=self.iteration, unit="it")
        try:
            while self.iteration < self.iterations:
                for micro in self.micros:
                    self._micro_step(next(batches), micro)
                for scheduler in self.schedulers:
                    scheduler.step()
                self.iteration += 1
                now = time.monotonic()
                self.seconds, clock = self.seconds + now - clock, now
                bar.update()
                last = self.iteration == self.iterations
                if self.iteration % self.recipe.log_every == 0 or last:
                    self._log(bar)
                if self._should_stop():
                    self.save()
                    raise SystemExit(REQUEUE)
                if now - saved_at > self.recipe.save_every and not last:
                    self.save()
                    saved_at = time.monotonic()
        finally:
            bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def _micro_step(self, batch: dict[str, Any], micro: int) -> None:
        batch = to_device(batch, self.device)
        torch.manual_seed(torch_seed(STEP, self.seed, self.iteration, micro))
        rng = stream(STEP, self.seed, self.iteration, micro)
        with self.wrapper.optim_context(self.wrapped):
            with autocast(self.recipe, self.device):
                values = self.step(self.wrapped, batch, rng)
            loss = sum(v.float() for k, v in values.items() if k.startswith("loss"))
            self._watch(values, loss)
            self.wrapper.update_params(loss, zero_kwargs={"set_to_none": True})

    def _watch(self, values: dict[str, Tensor], loss: Tensor) -> None:
        """Sum what is logged and remember the first loss that is not finite, without waiting for the device."""
        self.names = list(values)
        row = torch.stack([v.detach().float() for v in values.values()])
        self.sums = row if self.sums is None else self.sums + row
        first_bad = ~torch.isfinite(loss.detach()) & (self.bad_iteration < 0)
        self.bad_values = row if self.bad_values is None else torch.where(first_bad, row, self.bad_values)
        self.bad_iteration = torch.where(first_bad, self.iteration, self.bad_iteration)

    def _check_finite(self) -> None:
        bad = int(self.bad_iteration)
        if bad < 0:
            return
        names = [name for micro in self.micros for name in self.batches[(bad, micro)]["ids"]]
        losses = ", ".join(f"{k}={v:.4g}" for k, v in zip(self.names, self.bad_values.tolist()))
        raise UserError(
            f"the loss is not finite at iteration {bad} ({losses}); images of that batch: "
            f"{', '.join(map(str, names))}; "
            "look at their annotations, or lower the rate (--set lr=…) or --set clip_grad=10"
        )

    def _log(self, bar: Any) -> None:
        self._check_finite()
        count = ((self.iteration - 1) % self.recipe.log_every + 1) * len(self.micros)
        means = {k: v / count for k, v in zip(self.names, self.sums.tolist())}
        self.sums = None
        if not is_main():
            return
        loss = sum(v for k, v in means.items() if k.startswith("loss"))
        line = {
            "iteration": self.iteration,
            "epoch": round(self.iteration * self.recipe.batch / self.batches.order.images, 4),
            "lr": self.wrapper.optimizer.param_groups[0]["lr"],
            "loss": loss,
            **{k: v for k, v in means.items() if k != "loss"},
            "seconds": round(self.seconds, 2),
        }
        bar.set_postfix_str(f"loss {loss:.3g}")
        with (self.folder / "log.jsonl").open("ab") as log:
            log.write(json.dumps(line).encode() + b"\n")
            self.log_bytes = log.tell()

    def save(self) -> None:
        """Write the resume state; never one that a loss spoiled."""
        self._check_finite()
        if not is_main():
            return
        scaler = getattr(self.wrapper, "loss_scaler", None)
        state = {
            "key": self.key,
            "model": self.model.state_dict(),
            "optimizer": self.wrapper.optimizer.state_dict(),
            "schedulers": [
                {k: s.state_dict()[k] for k in ("last_step", "_global_step", "_last_value")}
                for s in self.schedulers
            ],
            "scaler": scaler.state_dict() if scaler else {},
            "iteration": self.iteration,
            "seconds": self.seconds,
            "log_bytes": self.log_bytes,
            "names": self.names,
            "sums": self.sums,
        }
        write_atomic(self.folder / "resume.pt", lambda file: torch.save(state, file))

    def finish(self) -> dict[str, Any]:
        """Write the final weights and remove the resume state."""
        cost = {
            "seconds": round(self.seconds, 2),
            "iterations": self.iterations,
            "images": self.iterations * self.recipe.batch,
            "peak_memory_mb": peak_memory(self.device),
        }
        if is_main():
            state = {"key": self.key, "model": self.model.state_dict(), "cost": cost}
            write_atomic(self.folder / "weights.pt", lambda file: torch.save(state, file))
            (self.folder / "resume.pt").unlink(missing_ok=True)
        if world() > 1:
            distributed.barrier()
        return cost

    def _on_signal(self, *_: Any) -> None:
        self.signalled = True

    def _should_stop(self) -> bool:
        """Whether a signal came; several processes agree on it at logging steps."""
        if world() == 1:
            return self.signalled
        if self.iteration % self.recipe.log_every:
            return False
        flag = torch.tensor(float(self.signalled), device=self.device)
        distributed.all_reduce(flag)
        return bool(flag)


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
    """
    length, warmup = recipe.length(images), recipe.warmup
    if recipe.schedule == "one_cycle":
        warmup = warmup or max(1, int(0.3 * length))
    made: list = []
    if warmup:
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


def _wrap(
    optimizer, recipe: Recipe, device: torch.device, accumulation: int, iterations: int
) -> OptimWrapper:
    clip = {"max_norm": recipe.clip_grad} if recipe.clip_grad else None
    options = {"optimizer": optimizer, "accumulative_counts": accumulation, "clip_grad": clip}
    if resolve_precision(recipe, device) != "fp16":
        return OptimWrapper(**options)
    if device.type != "cuda":
        raise UserError("recipe: precision=fp16 needs a GPU; use bf16 or fp32 (--set precision=fp32)")
    return AmpOptimWrapper(**options, dtype="float16")


def _read_state(path: Path, key: str, device: torch.device) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path}: damaged ({str(error).splitlines()[0][:100]}); delete it, or use --restart"
        ) from None
    if state["key"] != key:
        raise UserError(f"{path}: belongs to another run; choose another output folder, or use --restart")
    return state


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far in MB: of the GPU where one computes, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (
        1024 if os.uname().sysname == "Linux" else 2**20
    )
