"""From class activation maps to boxes, and the sweep over 1,000 thresholds, against the usual loops on OpenCV.

    python tests/benchmarks/bench_wsol.py [--maps 500] [--sweeps 50] [--rounds 3] [--full] [--run DIR] [--json FILE]
    python tests/benchmarks/bench_wsol.py --train [--batch 256] [--device cuda]

The peers are the image-by-image ways in use, written anew: for boxes, enlarge to 224², scale, threshold, label all
regions, take the largest; for the sweep wsolevaluation's, at each of 1,000 thresholds cv2.threshold, cv2.findContours,
and the boxes of the largest and of every contour. Both get the same 14 × 14 maps, synthetic (1 to 4 bumps) or those of
the true classes in a finished run (--run DIR, its scoremaps.npz), and must agree exactly. Runs are interleaved on one
thread and the least of each is taken; --full takes 50,000 maps to boxes (the sweep stays at --sweeps: its peer would
take hours). --train times a training step of ResNet-50 with layer4 at stride 1, against the plain network's.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
sys.path[0] = str(Path(__file__).resolve().parents[2])

import cv2
import numpy as np

from backbench.common.base.files import write_json
from backbench.wsol.boxes import boxes_from_maps
from backbench.wsol.cam import load_maps
from backbench.wsol.choe2020 import GREY_OF_THRESHOLD, SIDE, THRESHOLDS, Sweep, scaled_map, sweep

THRESHOLD = 0.15


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--maps", type=int, default=500)
    made.add_argument("--sweeps", type=int, default=50)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--full", action="store_true", help="50,000 maps to boxes")
    made.add_argument("--run", type=Path, help="take the maps of a finished run")
    made.add_argument("--train", action="store_true", help="time training at stride 1 instead")
    made.add_argument("--batch", type=int, default=256)
    made.add_argument("--device", default="cuda")
    made.add_argument("--json", type=Path)
    args = made.parse_args()
    cv2.setNumThreads(1)
    figures = train_figures(args.device, args.batch, args.rounds) if args.train else map_figures(args)
    for name, value in figures.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    if args.json:
        write_json(args.json, figures)


def map_figures(args: argparse.Namespace) -> dict[str, float | int | str]:
    """Seconds a map, ours and the peers', and the ratios."""
    count = 50_000 if args.full else args.maps
    if args.run:
        stored = load_maps(args.run / "scoremaps.npz")[0].maps[:, 0].astype(np.float32)
        maps = stored[np.arange(count) % len(stored)]
    else:
        maps = bumps(np.random.default_rng(0), count)
    loop, ours = timed(
        args.rounds, lambda: loop_boxes(maps), lambda: boxes_from_maps(maps, SIDE, THRESHOLD), np.array_equal
    )
    some = [scaled_map(image) for image in maps[: args.sweeps]]
    swept_loop, swept = timed(
        args.rounds, lambda: [loop_sweep(s) for s in some], lambda: [sweep(s) for s in some], same_sweeps
    )
    return {
        "maps": count,
        "boxes, loop, µs a map": 1e6 * loop / count,
        "boxes, ours, µs a map": 1e6 * ours / count,
        "boxes, ratio": loop / ours,
        "sweeps": len(some),
        "sweep, loop, ms a map": 1e3 * swept_loop / len(some),
        "sweep, ours, ms a map": 1e3 * swept / len(some),
        "sweep, ratio": swept_loop / swept,
        "sweep, ours, 50,000 maps, minutes": 50_000 * swept / len(some) / 60,
    }


def timed(rounds: int, peer: Callable, ours: Callable, same: Callable) -> tuple[float, float]:
    """The least seconds of each of two ways that must agree, run in turns."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        results = []
        for way, spent in zip((peer, ours), times):
            start = time.perf_counter()
            results.append(way())
            spent.append(time.perf_counter() - start)
        if not same(*results):
            raise SystemExit("the two ways differ")
    return min(times[0]), min(times[1])


def bumps(rng: np.random.Generator, count: int) -> np.ndarray:
    """float32 (count, 14, 14): one to four Gaussian bumps on a little noise."""
    y, x = np.mgrid[:14, :14]
    maps = 0.05 * rng.random((count, 14, 14))
    for image in maps:
        for _ in range(rng.integers(1, 5)):
            (v, u), wide, high = rng.uniform(0, 13, 2), rng.uniform(1, 4), rng.uniform(0.3, 1)
            image += high * np.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * wide**2))
    return maps.astype(np.float32)


def loop_boxes(maps: np.ndarray) -> np.ndarray:
    """The usual way, image by image: (n, 4) half-open."""
    boxes = np.zeros((len(maps), 4))
    for number, image in enumerate(maps):
        image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR).astype(np.float64)
        image = (image - image.min()) / (image.max() - image.min())
        stats = cv2.connectedComponentsWithStats((image > THRESHOLD).astype(np.uint8), connectivity=8)[2][1:]
        left, top, width, height, _ = stats[np.argmax(stats[:, 4])]
        boxes[number] = left, top, left + width, top + height
    return boxes


def loop_sweep(scaled: np.ndarray) -> tuple[list, list]:
    """wsolevaluation's way: the largest contour's box and every contour's, at 1,000 thresholds."""
    grey = (scaled * 255).astype(np.uint8)
    largest, every = [], []
    for threshold in THRESHOLDS:
        mask = cv2.threshold(grey, int(threshold * np.max(grey)), 255, cv2.THRESH_BINARY)[1]
        contours = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        boxes = []
        for contour in contours:
            x, y, w, h = cv2.boundingRect(contour)
            boxes.append([x, y, min(x + w, SIDE - 1), min(y + h, SIDE - 1)])
        largest.append(boxes[int(np.argmax([cv2.contourArea(contour) for contour in contours]))])
        every.append(sorted(boxes))
    return largest, every


def same_sweeps(loops: list[tuple[list, list]], ours: list[Sweep]) -> bool:
    """Whether every threshold has the same boxes."""
    for (largest, every), found in zip(loops, ours):
        levels = np.unique(found.level)
        for threshold, grey in enumerate(GREY_OF_THRESHOLD):
            now = found.level == levels[np.searchsorted(levels, grey, side="right") - 1]
            if found.box[now & found.largest].tolist() != [largest[threshold]]:
                return False
            if sorted(found.box[now].tolist()) != every[threshold]:
                return False
    return True


def train_figures(device: str, batch: int, rounds: int) -> dict[str, float | int | str]:
    """Images a second of ResNet-50 training steps at 224, bf16, NHWC: layer4 at stride 1, and as it was."""
    import torch
    from torch.nn import functional as F

    from backbench.common.backbones.resnet import Classifier, Trunk
    from backbench.wsol.model import wsol_model

    models = {"stride 2": Classifier(Trunk("resnet50"), 200), "stride 1": wsol_model(Trunk("resnet50"), 200)}
    images = torch.randn(batch, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(200, (batch,), device=device)
    wait = torch.cuda.synchronize if images.is_cuda else (lambda: None)
    steps = {}
    for name, model in models.items():
        model = model.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)

        def step(model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(images.device.type, torch.bfloat16):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

        steps[name] = step
    repeat = 20 if images.is_cuda else 1
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(rounds + 1):  # the first turn warms up
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            for _ in range(repeat):
                step()
            wait()
            if turn:
                best[name] = min(best[name], (time.perf_counter() - start) / repeat)
    rates = {f"{name}, images a second": batch / seconds for name, seconds in best.items()}
    return {"device": torch.cuda.get_device_name() if images.is_cuda else "cpu", "batch": batch, **rates}


if __name__ == "__main__":
    main()
