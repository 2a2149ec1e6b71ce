"""The training loop. The host waits for the device where it logs, evaluates or saves, and nowhere else."""

import functools
import inspect
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from backbench.common.base.errors import UserError
from backbench.common.base.progress import progress
from backbench.common.base.recipe import Recipe
from backbench.common.engine.device import (
    autocast,
    barrier,
    compiled,
    is_main,
    rank,
    resolve_precision,
    seed_torch,
    to_device,
    world,
)
from backbench.common.engine.loader import (
    STOPPING,
    MicroBatches,
    Positions,
    TrainData,
    end_workers,
    make_loader,
    watched,
)
from backbench.common.engine.optim import make_optimizer, make_schedulers, wrap
from backbench.common.engine.state import Best, Log, read_state, write_state
from backbench.common.engine.streams import StepStreams

Step = Callable[[nn.Module, dict[str, Any], np.random.Generator], dict[str, Tensor]]
Evaluate = Callable[[nn.Module], dict[str, float]]
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
    evaluate: Evaluate | None = None,
    every: int = 0,
    best: str | None = None,
    compile: bool = False,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Train `model` in place and leave `folder/weights.pt`; go on from `folder/resume.pt` where there is one.

    `step(model, batch, rng)` returns a dict of scalar tensors: those named "loss…" are summed and minimised, all are
    logged. `rng` and torch's global generator are keyed by (seed, iteration, micro-batch); batch["progress"] is the
    share of the training that is done. `key` names what is trained: a file with another key is refused. `groups` are
    parameter groups whose "lr" is a factor on the recipe's.

    `evaluate(model)` measures the model in evaluation mode, on process 0, every `every` iterations (0: never before
    the end) and at the end: a line with "eval" in the log. The weights with the largest metric `best` are kept in
    `folder/best.pt` (key, metric, value, iteration, metrics, model); `model` itself ends with the last ones. `compile`
    and `tensorboard` change no recipe: the same numbers to rounding, the same scalars once more.

    Returns the cost: seconds of training, iterations, images, peak memory, whether compiled, and the numbers of
    processes it ran on. Raises UserError when the loss is not finite, and what the pieces raise.
    """
    model.to(device, memory_format=torch.channels_last if recipe.channels_last else torch.contiguous_format)
    done = read_state(folder / "weights.pt", key, device)
    if done is not None:
        model.load_state_dict(done["model"])
        return done["cost"]
    run = _Training(model, step, data, recipe, folder, key, seed, device, groups, workers)
    run.log = Log(folder, tensorboard)
    if compile:
        run.wrapped = compiled(run.wrapped, device)
        run.compiled = True
    run.evaluate, run.every = evaluate, every
    if best is not None and is_main():
        run.best = Best(folder, key, best)
    run.resume()
    try:
        with watched():
            run.loop(desc)
    finally:
        run.log.close()
    return run.finish()


class _Training:
    """One training's state, between its start or resume and its end."""

    log: Log
    evaluate: Evaluate | None = None
    every = 0
    best: Best | None = None
    compiled = False

    def __init__(self, model, step, data, recipe, folder, key, seed, device, groups, workers) -> None:
        self.model, self.step, self.recipe, self.device = model, step, recipe, device
        self.folder, self.key, self.seed = folder, key, seed
        self.precision = resolve_precision(recipe.precision, device)
        micro = recipe.micro_batch or recipe.batch
        total = recipe.batch // micro
        if total % world():
            each, rest = divmod(recipe.batch, world())
            advice = f"a --set batch=… that {world()} divides" if rest else f"--set micro_batch={each}"
            raise UserError(
                f"{world()} processes cannot share {total} micro-batches of {micro} images evenly: {advice} "
                "(batch norm sees the images of a micro-batch)"
            )
        share = total // world()
        self.micros = range(rank() * share, (rank() + 1) * share)
        self.streams = StepStreams(seed, self.micros)
        self.iterations = recipe.length(len(data))
        self.batches = MicroBatches(data, recipe.batch, micro, seed)
        self.workers = getattr(data, "workers", 0) if workers is None else workers
        self.on_device = getattr(data, "on_device", None)
        self.wrapper = wrap(make_optimizer(model, recipe, groups), recipe, device, share)
        self.schedulers = make_schedulers(self.wrapper, recipe, len(data))
        self.wrapped = _distributed(model, device)
        self.iteration, self.processes = 0, [world()]
        self.seconds, self.clock = 0.0, time.monotonic()
        self.names: list[str] = []
        self.rows: np.ndarray | None = None  # logged values (micro-batch, name) since the last log line
        self.pending: list[list[Tensor]] = []  # the same of the latest micro-batches, still on the device
        self.signalled = False

    def resume(self) -> None:
        """Take up the state that an interrupted run left, and cut the log back to it."""
        state = read_state(self.folder / "resume.pt", self.key, self.device)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.wrapper.optimizer.load_state_dict(state["optimizer"])
            for scheduler, saved in zip(self.schedulers, state["schedulers"]):
                scheduler.load_state_dict(saved)
            if state["scaler"]:
                self.wrapper.loss_scaler.load_state_dict(state["scaler"])
            self.iteration, self.seconds, self.names = state["iteration"], state["seconds"], state["names"]
            if state["rows"] is not None and is_main():
                self.rows = state["rows"].cpu().numpy()
            self._count_processes(state["processes"])
        done, total = self.iteration * len(self.micros), self.iterations * len(self.micros)
        # given the model, it would warn that accumulation is bad for batch norm: here a micro-batch is the recipe's
        self.wrapper.initialize_count_status(nn.Identity(), done, total)
        if is_main():
            self.log.open(state["log_bytes"] if state else 0, self.iteration)

    def _count_processes(self, before: list[int]) -> None:
        self.processes = before if before[-1] == world() else [*before, world()]
        if before[-1] != world() and is_main():
            print(
                f"going on with {world()} processes, before it were {before[-1]}: the order of the data, its "
                "augmentation, λ, boxes and permutations stay exactly those of one undisturbed run, sums of gradients "
                "agree to rounding, running batch-norm statistics are those of process 0's micro-batches",
                file=sys.stderr,
            )

    def loop(self, desc: str) -> None:
        """Run the remaining iterations."""
        self.model.train()
        positions = Positions(self.iteration, self.iterations, self.micros)
        batches = make_loader(self.batches, positions, self.workers, pin=self.device.type == "cuda")
        handlers = {s: signal.signal(s, self._on_signal) for s in STOPPING}
        self.clock = saved_at = time.monotonic()
        bar = progress(desc=desc, total=self.iterations, initial=self.iteration, unit="it")
        try:
            while self.iteration < self.iterations:
                for micro in self.micros:
                    self._micro_step(next(batches), micro)
                for scheduler in self.schedulers:
                    scheduler.step()
                self.iteration += 1
                bar.update()
                last = self.iteration == self.iterations
                logging = last or self.iteration % self.recipe.log_every == 0
                if logging:
                    self._log(bar)
                self._tick()
                if self.evaluate and (last or (self.every and self.iteration % self.every == 0)):
                    self._evaluate()
                    self.clock = time.monotonic()
                if not logging and world() > 1:
                    continue  # several processes stop and save together, where they have just agreed on the loss
                if self._should_stop():
                    self.save()
                    barrier()
                    raise SystemExit(REQUEUE)
                if self.clock - saved_at > self.recipe.save_every and not last:
                    self.save()
                    saved_at = time.monotonic()
        finally:
            bar.close()
            end_workers(batches)
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def _micro_step(self, batch: dict[str, Any], micro: int) -> None:
        rng, torch_seed = self.streams.at(self.iteration, micro)
        seed_torch(torch_seed, self.device)
        batch = {k: v if k == "ids" else to_device(v, self.device) for k, v in batch.items()}
        if self.on_device:
            batch = self.on_device(batch, self.device)
        batch["progress"] = self.iteration / self.iterations
        with self.wrapper.optim_context(self.wrapped):
            with autocast(self.precision, self.device):
                values = self.step(self.wrapped, batch, rng)
            first, *others = (v.float() for k, v in values.items() if k.startswith("loss"))
            self.names = list(values)
            self.pending.append([v.detach() for v in values.values()])
            self.wrapper.update_params(sum(others, first), zero_kwargs={"set_to_none": True})

    def _fetch(self) -> np.ndarray:
        """The logged values since the last log line, float32 (micro-batch, name): here the host waits for the device.

        Raises UserError when a loss is not finite.
        """
        if self.pending:
            flat = torch.stack([value.float() for row in self.pending for value in row])
            new = flat.view(len(self.pending), -1).cpu().numpy()
            loss = new[:, [name.startswith("loss") for name in self.names]].sum(1)
            if not np.isfinite(loss).all():
                self._refuse(new, int(np.argmin(np.isfinite(loss))))
            self.rows = new if self.rows is None else np.concatenate([self.rows, new])
            self.pending = []
        return np.empty((0, len(self.names)), np.float32) if self.rows is None else self.rows

    def _refuse(self, new: np.ndarray, row: int) -> None:
        bad = self.iteration + (row - len(new)) // len(self.micros)
        images = [name for micro in self.micros for name in self.batches[(bad, micro)]["ids"]]
        losses = ", ".join(f"{k}={v:.4g}" for k, v in zip(self.names, new[row].tolist()))
        raise UserError(
            f"the loss is not finite at iteration {bad} ({losses}); images of that batch: "
            f"{', '.join(map(str, images))}; "
            "look at their annotations, or lower the rate (--set lr=…) or --set clip_grad=10"
        )

    def _log(self, bar: Any) -> None:
        total, count = self._total()
        self._tick()  # after the wait for the device
        self.rows = None
        if not is_main():
            return
        means = {k: v / count for k, v in zip(self.names, total.tolist())}
        loss = sum(v for k, v in means.items() if k.startswith("loss"))
        line = {
            **self._position(),
            "lr": self.wrapper.optimizer.param_groups[0]["lr"],
            "loss": loss,
            **{k: v for k, v in means.items() if k != "loss"},
            "seconds": round(self.seconds, 2),
        }
        bar.set_postfix_str(f"loss {loss:.3g}", refresh=False)
        self.log.write(line)

    def _position(self) -> dict[str, Any]:
        epoch = round(self.iteration * self.recipe.batch / self.batches.order.images, 4)
        return {"iteration": self.iteration, "epoch": epoch}

    def _total(self) -> tuple[np.ndarray, int]:
        """Sums of the logged values and the micro-batches they are of, over all processes."""
        if world() == 1:
            rows = self._fetch()
            return functools.reduce(np.add, rows), len(rows)
        error: UserError | None = None
        try:
            rows = self._fetch()
        except UserError as raised:
            error, rows = raised, np.full((1, len(self.names)), np.nan, np.float32)
        shared = torch.tensor([*rows.sum(0), len(rows), error is not None], dtype=torch.float64)
        shared = shared.to(self.device)
        distributed.all_reduce(shared)
        *total, count, failed = shared.tolist()
        if failed:
            raise error or UserError("the loss is not finite in another process: see its line")
        return np.array(total), int(count)

    def _evaluate(self) -> None:
        """Log what `evaluate` finds, and keep the best weights.

        It cannot change the training: every step seeds its own streams, and the model goes back to training mode.
        """
        if is_main():
            self.model.eval()
            metrics = {name: float(value) for name, value in self.evaluate(self.model).items()}
            self.model.train()
            self.log.write({**self._position(), "eval": metrics})
            if self.best:
                self.best.offer(self.model, self.iteration, metrics)
        barrier()

    def save(self) -> None:
        """Write the resume state; never one that a loss spoiled."""
        rows = self._fetch()
        if not is_main():
            return
        scaler = getattr(self.wrapper, "loss_scaler", None)
        self.log.flush()
        write_state(
            self.folder / "resume.pt",
            self.key,
            model=self.model.state_dict(),
            optimizer=self.wrapper.optimizer.state_dict(),
            schedulers=[
                {k: s.state_dict()[k] for k in ("last_step", "_global_step", "_last_value")}
                for s in self.schedulers
            ],
            scaler=scaler.state_dict() if scaler else {},
            iteration=self.iteration,
            seconds=self.seconds,
            log_bytes=self.log.length,
            names=self.names,
            rows=torch.from_numpy(rows) if len(rows) else None,
            processes=self.processes,
        )

    def finish(self) -> dict[str, Any]:
        """Write the final weights and remove the resume state."""
        cost = {
            "seconds": round(self.seconds, 2),
            "iterations": self.iterations,
            "images": self.iterations * self.recipe.batch,
            "peak_memory_mb": peak_memory(self.device),
            "compiled": self.compiled,
            "processes": self.processes,
        }
        if is_main():
            write_state(self.folder / "weights.pt", self.key, model=self.model.state_dict(), cost=cost)
            (self.folder / "resume.pt").unlink(missing_ok=True)
        barrier()
        return cost

    def _on_signal(self, *_: Any) -> None:
        self.signalled = True

    def _should_stop(self) -> bool:
        """Whether a signal came, to any process."""
        if world() == 1:
            return self.signalled
        flag = torch.tensor(float(self.signalled), device=self.device)
        distributed.all_reduce(flag)
        return bool(flag)


def _distributed(model: nn.Module, device: torch.device) -> nn.Module:
    if world() == 1:
        return model
    renamed = (
        "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    )  # after torch 2.9
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},
    )


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far in MB: of the GPU where one computes, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (
        1024 if os.uname().sysname == "Linux" else 2**20
    )
