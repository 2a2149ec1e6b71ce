"""A training step of ResNet-50: ours against the plain ones, in one process, in turn, on synthetic pictures.

    python tests/benchmarks/bench_step.py [--json FILE] [--batch 8 --size 64 --steps 4 --compile]

On a CPU: ours (channels-last, fused optimiser, bf16 where the CPU multiplies it natively) against the plain fp32 step
(NCHW, unfused) everyone starts from. Goal, on a CPU with native bf16: 2 x, at equal loss within tolerance.
On a GPU (found by itself; 224 pixels, batch 256): ours in bf16 against a plain torchvision loop (fp32 NCHW, and bf16
channels-last) and timm's train step (timm.create_model, its loss, its optimizer, channels-last, bf16 autocast), with
each one's peak memory. Goal: 1.1 x timm. Ours is the engine itself, from the uint8 batch in memory on: loader, copy to
the device, normalisation, CutMix, step, log; the peers get float batches that lie on the device already.
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
from torchvision.models import resnet50

from backbench.common.backbones.resnet import Classifier, Trunk
from backbench.common.base.files import write_json
from backbench.common.classify.step import ClassifyRecipe, make_step
from backbench.common.engine import hardware, pick_device, read_log, resolve_precision, train

LR = 0.001  # so small that losses can be compared: a large first step blows up rounding
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pictures:
    """Two batches of random pictures, over and over."""

    def __init__(self, batch: int, size: int) -> None:
        self.images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8)
        self.labels = torch.arange(batch) % 1000

    def __len__(self) -> int:
        return 2 * len(self.images)

    def batch(self, indices, rngs):
        """The same pictures, whatever is asked for: a loader that costs nothing."""
        return {"images": self.images, "labels": self.labels, "ids": indices}


class Bench:
    """What the contenders share: sizes, data and clock."""

    def __init__(self, args, device: torch.device) -> None:
        self.args, self.device = args, device
        torch.manual_seed(0)
        self.data = Pictures(args.batch, args.size)

    def clock(self, step) -> tuple[float, float]:
        """Milliseconds a step after as many to warm up, and the mean loss."""
        for _ in range(self.args.steps):
            step()
        self._wait()
        start = time.perf_counter()
        losses = [step() for _ in range(self.args.steps)]
        loss = float(torch.stack(losses).mean())
        self._wait()
        return 1000 * (time.perf_counter() - start) / self.args.steps, loss

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def floats(self, channels_last: bool) -> torch.Tensor:
        """The pictures as a plain loop has them: normalised, on the device."""
        images = self.data.images.permute(0, 3, 1, 2).to(self.device).float().contiguous()
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))
        images = (images - mean) / std
        return images.to(memory_format=torch.channels_last) if channels_last else images

    def plain(self, model, criterion, optimizer, dtype: torch.dtype | None, channels_last: bool):
        """The loop everyone writes."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = model.to(self.device, memory_format=layout).train()
        optimizer, images = optimizer(model), self.floats(channels_last)
        labels = self.data.labels.to(self.device)

        def step():
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return self.clock(step)

    def torchvision(self, dtype: torch.dtype | None = None, channels_last: bool = False):
        """torchvision's network and an SGD as its documentation makes them."""
        torch.manual_seed(0)
        return self.plain(resnet50(), F.cross_entropy, _sgd, dtype, channels_last)

    def timm(self):
        """timm's network, loss and optimizer, as its train script with --amp --channels-last puts them together."""
        from timm import create_model
        from timm.loss import LabelSmoothingCrossEntropy
        from timm.optim import create_optimizer_v2

        torch.manual_seed(0)

        def optimizer(model):
            return create_optimizer_v2(model, opt="sgd", lr=LR, weight_decay=1e-4, momentum=0.9)

        return self.plain(
            create_model("resnet50"), LabelSmoothingCrossEntropy(), optimizer, torch.bfloat16, True
        )

    def ours(self, method: str = "cutmix"):
        """The engine, from the peer's initial weights; timed between two lines of its log."""
        recipe = ClassifyRecipe(
            iterations=2 * self.args.steps,
            batch=self.args.batch,
            lr=LR,
            method=method,
            size=self.args.size,
            save_every=1e9,
            log_every=self.args.steps,
            schedule="constant",
        )
        torch.manual_seed(0)
        weights, model = resnet50().state_dict(), Classifier(Trunk("resnet50"), 1000)
        model.fc.load_state_dict({name: weights.pop(f"fc.{name}") for name in ("weight", "bias")})
        model.trunk.load_state_dict(weights)
        step = make_step(recipe, 1000, MEAN, STD)
        with tempfile.TemporaryDirectory() as folder:
            options = {"device": self.device, "workers": 0, "compile": self.args.compile}
            train(model, step, self.data, recipe, folder=Path(folder), key="", seed=0, **options)
            first, second = read_log(Path(folder))
        return 1000 * (second["seconds"] - first["seconds"]) / self.args.steps, second["loss"]


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4, foreach=False, fused=False
    )


def contenders(bench: Bench, device: torch.device) -> dict:
    """Name → function that gives (ms a step, mean loss). The first is ours, the second what the goal is against."""
    if device.type == "cpu":
        return {"ours": lambda: bench.ours("baseline"), "plain fp32 NCHW": bench.torchvision}
    return {
        "ours, CutMix": bench.ours,
        "timm bf16 channels-last": bench.timm,
        "ours, baseline": lambda: bench.ours("baseline"),
        "torchvision fp32 NCHW": bench.torchvision,
        "torchvision bf16 channels-last": lambda: bench.torchvision(torch.bfloat16, True),
    }


def main() -> None:
    """Run the contenders in turn; print each one's fastest round and its ratio to the second."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path)
    made.add_argument("--device")
    for name, help in (("batch", "images"), ("size", "pixels"), ("steps", "timed, after as many untimed")):
        made.add_argument(f"--{name}", type=int, help=help)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--compile", action="store_true", help="ours through torch.compile")
    args = made.parse_args()
    device = pick_device(args.device)
    big = device.type == "cuda"
    for name, (gpu, cpu) in {
        "batch": (256, 16),
        "size": (224, 128),
        "steps": (40, 3),
    }.items():
        setattr(args, name, getattr(args, name) or (gpu if big else cpu))
    os.environ["BACKBENCH_QUIET"] = "1"
    torch.backends.cudnn.benchmark = True  # for the peers, as timm sets it; ours inherits it
    bench = Bench(args, device)
    found: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for name, run in contenders(bench, device).items():
            if big:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            ms, loss = run()
            memory = torch.cuda.max_memory_allocated(device) // 2**20 if big else 0
            best = found.setdefault(name, {"ms": ms})
            best.update(ms=min(ms, best["ms"]), loss=loss, peak_memory_mb=memory)
    precision = resolve_precision("auto", device)
    print(f"{hardware(device)}; ours in {precision}{' (no native bf16 on this CPU)' * (precision == 'fp32')}")
    peer = list(found.values())[1]["ms"]
    for name, best in found.items():
        rate, memory = args.batch / best["ms"] * 1000, f", {best['peak_memory_mb']} MB" * big
        print(
            f"{name:31} {best['ms']:9.1f} ms a step, {rate:7.1f} img/s, {peer / best['ms']:.2f} x the second, "
            f"loss {best['loss']:.3f}{memory}"
        )
    if args.json:
        settings = {k: getattr(args, k) for k in ("batch", "size", "steps", "rounds", "compile")}
        write_json(
            args.json,
            {"found": found, "precision": precision, "settings": settings, "hardware": hardware(device)},
        )


if __name__ == "__main__":
    main()
