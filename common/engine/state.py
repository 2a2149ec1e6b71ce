"""What a training leaves in its folder: states to go on from, the best weights, the log."""

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbench.common.base.errors import UserError
from backbench.common.base.files import write_atomic


def read_state(path: Path, key: str, device: torch.device | str, mmap: bool = False) -> dict[str, Any] | None:
    """What `write_state` wrote, or None where there is no file.

    Raises UserError when it is damaged or was written under another key.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:
        raise UserError(
            f"{path}: damaged ({str(error).splitlines()[0][:100]}); delete it, or use --restart"
        ) from None
    if state["key"] != key:
        raise UserError(f"{path}: belongs to another run; choose another output folder, or use --restart")
    return state


def write_state(path: Path, key: str, **state: Any) -> None:
    """Write plain types and tensors under a run's key: whole or not at all."""
    write_atomic(path, lambda file: torch.save({"key": key, **state}, file))


class Best:
    """`folder/best.pt`: the weights with the largest value of a metric, the first of equal ones.

    The file alone says what was best so far, so that a run that was killed between an evaluation and the next
    checkpoint ends with the same one.
    """

    def __init__(self, folder: Path, key: str, metric: str) -> None:
        self.path, self.key, self.metric = folder / "best.pt", key, metric
        state = read_state(self.path, key, "cpu", mmap=True)
        self.value = state["value"] if state else -math.inf

    def offer(self, model: nn.Module, iteration: int, metrics: Mapping[str, float]) -> None:
        """Keep the weights if they are better. Raises UserError when the metric was not measured."""
        if self.metric not in metrics:
            raise UserError(f"best={self.metric}: not measured; choose one of {', '.join(metrics)}")
        value = metrics[self.metric]
        if value > self.value:
            weights = {"model": model.state_dict(), "iteration": iteration, "metrics": dict(metrics)}
            write_state(self.path, self.key, metric=self.metric, value=value, **weights)
            self.value = value


class Log:
    """`folder/log.jsonl`, one line of JSON a report, and the same scalars for TensorBoard if wanted.

    Raises UserError when TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.path, self.length = folder / "log.jsonl", 0
        self.events: Path | None = folder / "tensorboard" if tensorboard else None
        self.writer: Any = None
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "--tensorboard: the package is missing; pip install 'backbench[tensorboard]', or leave it out"
            )

    def open(self, length: int, iteration: int) -> None:
        """Cut back to what was written up to `iteration`; what an interrupted run wrote later is dropped."""
        with self.path.open("ab") as log:
            self.length = min(
                length, log.tell()
            )  # shorter, if the machine died before the log was on its disk
            log.truncate(self.length)
        if self.events:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.events, purge_step=iteration + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line; it has an "iteration"."""
        with self.path.open("ab") as log:
            log.write(json.dumps(line).encode() + b"\n")
            self.length = log.tell()
        if self.writer:
            flat = {**line, **{f"eval/{name}": value for name, value in line.get("eval", {}).items()}}
            for name in flat.keys() - {"iteration", "epoch", "eval"}:
                self.writer.add_scalar(name, flat[name], line["iteration"])

    def flush(self) -> None:
        """Have TensorBoard's events on disk, as log.jsonl is after every line."""
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Write the rest and stop."""
        if self.writer:
            self.writer.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of `folder/log.jsonl`, an unfinished last one left out.

    Lines of training have "loss", "lr" and "seconds"; lines of an evaluation have "eval": its metrics.
    """
    path = folder / "log.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
