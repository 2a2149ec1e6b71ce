"""What the engine adds to a step: `common.engine.train` against a bare PyTorch loop, on a network of no weight.

    python tests/benchmarks/bench_engine.py [--json FILE] [--device cuda]

Peer: the loop everyone writes (batch, forward, loss, backward, step, zero_grad), with the same fused optimiser and the
same data in memory. The two run in turn; of several rounds the fastest of each counts. Goal: at most 0.3 ms a step.
The engine's figure holds the loader, the random streams of every sample, the schedule, the guard against losses that
are not finite, the log and the progress bar. Checkpoints are off.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import torch
from torch import nn
from torch.nn import functional as F

from backbench.common.base.files import write_json
from backbench.common.base.recipe import Recipe
from backbench.common.engine import hardware, pick_device, train

RECIPE = Recipe(iterations=300, batch=64, lr=0.01, schedule="one_cycle", precision="fp32", save_every=1e9)


class Points:
    """Labelled points, in memory."""

    def __init__(self, count: int = 10_000) -> None:
        self.x, self.y = torch.randn(count, 32), torch.randint(10, (count,))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices, rngs):
        """Points without randomness: the streams are made only if asked for."""
        chosen = torch.tensor(indices)
        return {"x": self.x[chosen], "y": self.y[chosen], "ids": indices}


class JitteredPoints(Points):
    """Each moved by its own stream."""

    def batch(self, indices, rngs):
        """Points with one draw each."""
        made = super().batch(indices, rngs)
        made["x"] = made["x"] + torch.tensor([rng.random() for rng in rngs])[:, None]
        return made


def network() -> nn.Module:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


class Stopwatch:
    """Milliseconds between two steps: the processor's time on a CPU, so that other processes do not count."""

    def __init__(self, device: torch.device) -> None:
        self.now = time.process_time if device.type == "cpu" else time.perf_counter
        self.times: list[float] = []

    def __call__(self) -> None:
        self.times.append(self.now())

    def mean(self) -> float:
        """The mean over all steps but those of the first log line."""
        start = RECIPE.log_every
        return 1000 * (self.times[-1] - self.times[start]) / (len(self.times) - 1 - start)


def bare(data: Points, device: torch.device) -> float:
    """Milliseconds a step of the plain loop."""
    watch = Stopwatch(device)
    model = network().to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    order = torch.randperm(len(data)).tolist()
    for iteration in range(RECIPE.iterations):
        at = iteration * RECIPE.batch % (len(data) - RECIPE.batch)
        chosen = torch.tensor(order[at : at + RECIPE.batch])
        x, y = data.x[chosen].to(device), data.y[chosen].to(device)
        watch()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    loss.item()
    return watch.mean()


def engine(data: Points, device: torch.device) -> float:
    """Milliseconds a step of the engine."""
    watch = Stopwatch(device)

    def step(model, batch, rng):
        watch()
        return {"loss": F.cross_entropy(model(batch["x"]), batch["y"])}

    with tempfile.TemporaryDirectory() as folder:
        options = {"folder": Path(folder), "key": "", "seed": 0, "device": device, "workers": 0}
        train(network(), step, data, RECIPE, **options)
    return watch.mean()


def main() -> None:
    """Run the two in turn and print the difference."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path)
    made.add_argument("--device")
    made.add_argument("--rounds", type=int, default=5)
    args = made.parse_args()
    os.environ["BACKBENCH_QUIET"] = "1"
    torch.set_num_threads(1)
    device, times = pick_device(args.device), {}
    for _ in range(args.rounds + 1):  # the first is to warm up
        for name, run in {
            "bare": lambda: bare(Points(), device),
            "engine": lambda: engine(Points(), device),
            "engine, a stream a sample": lambda: engine(JitteredPoints(), device),
        }.items():
            times.setdefault(name, []).append(run())
    found = {name: min(values[1:]) for name, values in times.items()}
    for name, value in found.items():
        print(f"{name:28} {value:.3f} ms a step of {RECIPE.batch}, + {value - found['bare']:.3f} ms")
    if args.json:
        write_json(args.json, {"ms": found, "hardware": hardware(device)})


if __name__ == "__main__":
    main()
