"""Micro-batches by position: iteration and micro-batch number say which images, with which random streams."""

import errno
import functools
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from backbench.common.base.errors import Interrupted, UserError, with_hidden
from backbench.common.base.processes import die_with
from backbench.common.engine.streams import Order, Streams

STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # what asks a training to save and stop


class TrainData(Protocol):
    """What a task trains on.

    Optional: `workers: int`, its default number of loader processes; `on_device(batch, device) -> batch`, called in
    the training process when the batch has been moved there.
    """

    def __len__(self) -> int:
        """Number of training items: one epoch."""
        ...

    def batch(self, indices: list[int], rngs: Sequence[np.random.Generator]) -> dict[str, Any]:
        """Items as (nested lists of) tensors, and "ids": their names. One stream an item, for all its randomness."""
        ...


class Positions(Sampler):
    """(iteration, micro-batch number) pairs of one process, from any iteration on: set, not replayed."""

    def __init__(self, start: int, stop: int, micros: range) -> None:
        self.start, self.stop, self.micros = start, stop, micros

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.micros)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for iteration in range(self.start, self.stop):
            for micro in self.micros:
                yield iteration, micro


class MicroBatches(Dataset):
    """Maps a position to its micro-batch."""

    def __init__(self, data: TrainData, batch: int, micro_batch: int, seed: int) -> None:
        self.data, self.size, self.micro_batch, self.seed = data, batch, micro_batch, seed
        self.order = Order(len(data), seed)

    def draws(self, iteration: int, micro: int) -> list[tuple[int, int]]:
        """(epoch, index) of a micro-batch's items."""
        return self.order.at(iteration * self.size + micro * self.micro_batch, self.micro_batch)

    def __getitem__(self, position: tuple[int, int]) -> dict[str, Any]:
        draws = self.draws(*position)
        return self.data.batch([index for _, index in draws], Streams(self.seed, draws))


def make_loader(
    batches: MicroBatches, positions: Positions, workers: int, pin: bool
) -> Iterator[dict[str, Any]]:
    """The batches at `positions`, the same for any number of workers. UserError when these cannot be started."""
    if not workers and not pin:
        return map(batches.__getitem__, positions)
    loader = DataLoader(
        batches,
        batch_size=None,
        collate_fn=_as_it_is,
        sampler=positions,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=functools.partial(_init_worker, os.getpid()),
        prefetch_factor=4 if workers else None,
    )
    try:
        return iter(loader)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise UserError(
            f"--workers {workers}: so many loader processes cannot be started ({error.strerror}); give fewer"
        ) from None


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def end_workers(batches: Iterator) -> None:
    """End the processes behind an iterator of `make_loader`: they ignore the signal that Python ends children with."""
    getattr(batches, "_shutdown_workers", lambda: None)()


@contextmanager
def watched() -> Iterator[None]:
    """Raise Interrupted in place of torch's error when a loader process was killed."""
    try:
        yield
    except Exception as error:
        # torch raises it wherever the training is, in the middle of saving too, whose own error then hides it
        pattern = r"DataLoader worker \(pid\S* ([\d, ]+)\) (?:is killed by signal: ([\w ]+))?"
        found = next(filter(None, (re.match(pattern, str(one)) for one in with_hidden(error))), None)
        if not found:
            raise
        raise Interrupted(
            f"a loader process (pid {found[1]}) was ended ({found[2] or 'unexpectedly'}; short of memory, or of shared "
            "memory in /dev/shm?): run the same command again to continue, with fewer --workers if it happens again"
        ) from None


def _init_worker(parent: int, _: int) -> None:
    die_with(parent)
    for (
        number
    ) in STOPPING:  # where a whole group of processes is told to stop, the training needs them to save
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    import cv2

    cv2.setNumThreads(0)
