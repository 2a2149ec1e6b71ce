"""Training: loop, loader, random streams, devices."""

from backbench.common.engine.device import (
    autocast,
    barrier,
    from_main,
    hardware,
    is_main,
    pick_device,
    rank,
    resolve_precision,
    to_device,
    world,
)
from backbench.common.engine.loader import TrainData
from backbench.common.engine.loop import REQUEUE, peak_memory, train
from backbench.common.engine.state import read_log
from backbench.common.engine.streams import INIT, SPLIT, stream, torch_seed

__all__ = [
    "INIT",
    "REQUEUE",
    "SPLIT",
    "TrainData",
    "autocast",
    "barrier",
    "from_main",
    "hardware",
    "is_main",
    "peak_memory",
    "pick_device",
    "rank",
    "read_log",
    "resolve_precision",
    "stream",
    "to_device",
    "torch_seed",
    "train",
    "world",
]
