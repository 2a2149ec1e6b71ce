"""JPEG → training sample at 224 on one core: the official code's PIL-float pipeline, ours from files and caches.

    python tests/benchmarks/bench_pipeline.py [--data DIR | --images DIR] [--count 100] [--rounds 5] [--json FILE]

Peer: the transforms of clovaai/CutMix-PyTorch's train.py, built here from torchvision's: RandomResizedCrop on the PIL
image, flip, ToTensor, Normalize in float; with `colour` its jitter of the float tensor and its lighting too. Ours ends
with what the loader hands on: uint8 crops, random streams and batching included (normalisation is the device's).
--data: JPEGs used as they are, best of about 500 × 375; --images: pictures to be enlarged to 500 × 375 JPEGs; neither:
the embedded world's, enlarged. The variants take turns at every batch of 32; of each batch the round with the least
processor time counts.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T

from backbench.common.classify.crops import CropRecipe, TrainImages
from backbench.common.data.colour import EIGENVALUES, EIGENVECTORS
from backbench.common.data.decode import BACKENDS
from backbench.common.data.layout import EXTENSIONS
from backbench.common.data.scenes import ensure_world
from backbench.common.data.types import ImageSet
from backbench.common.engine.streams import Streams

BATCH = 32


def official(paths: list[Path], colour: bool) -> Callable[[int], None]:
    """The official pipeline on the batch that begins at an index."""
    values, vectors = torch.tensor(EIGENVALUES).float(), torch.tensor(EIGENVECTORS).float()

    def lighting(image: torch.Tensor) -> torch.Tensor:
        weights = torch.empty(3).normal_(0, 0.1) * values
        return image + (vectors @ weights)[:, None, None]

    transform = T.Compose(
        [
            T.RandomResizedCrop(224),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            *([T.ColorJitter(0.4, 0.4, 0.4), lighting] if colour else []),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def run(start: int) -> None:
        batch = []
        for path in paths[start : start + BATCH]:
            with path.open("rb") as file:
                batch.append(transform(Image.open(file).convert("RGB")))
        torch.stack(batch)

    return run


def ours(images: ImageSet, recipe: CropRecipe) -> Callable[[int], None]:
    """TrainImages on the batch that begins at an index, as a loader process makes it."""
    data, epochs = TrainImages(images, recipe), itertools.count()

    def run(start: int) -> None:
        indices, epoch = list(range(start, min(start + BATCH, len(images)))), next(epochs)
        data.batch(indices, Streams(0, [(epoch, index) for index in indices]))

    return run


def pictures(folder: Path) -> list[Path]:
    """Image files below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)


def enlarged(paths: list[Path], folder: Path) -> list[Path]:
    """The pictures as 500 × 375 JPEGs of quality 90."""
    made = []
    for i, path in enumerate(paths):
        made.append(folder / f"{i:04}.jpg")
        with Image.open(path) as image:
            image.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC).save(made[-1], quality=90)
    return made


def main() -> None:
    """Time the variants in turns and print images a second and the ratio to the peer's."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path)
    made.add_argument("--images", type=Path)
    made.add_argument("--count", type=int, default=100)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--json", type=Path)
    args = made.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as scratch:
        if args.data:
            paths = pictures(args.data)[: args.count]
        else:
            source = args.images or ensure_world(size="smoke").imagenet
            paths = enlarged(pictures(source)[: args.count], Path(scratch))
        if not paths:
            raise SystemExit(f"error: no picture below {args.data or args.images}")
        os.environ["BACKBENCH_CACHE"] = scratch
        result = measure(paths, args.rounds)
    for colour, rates in result["images/s"].items():
        for name, rate in rates.items():
            ratio = rate / rates["official, PIL and float"]
            print(f"colour {colour:4}  {name:24} {rate:8.0f} img/s  × {ratio:.2f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(paths: list[Path], rounds: int) -> dict:
    """Images a second of each variant, without and with colour."""
    labels = np.zeros(len(paths), np.int64)
    images = ImageSet("bench", ["one"], [path.name for path in paths], paths, labels)
    base = CropRecipe(epochs=1.0)
    variants: dict[tuple[str, str], Callable[[int], None]] = {}
    for colour in ("none", "code"):
        variants[colour, "official, PIL and float"] = official(paths, colour == "code")
        for cache in ("file", "short"):
            for backend in BACKENDS:
                recipe = replace(base, cache=cache, resize_backend=backend, colour=colour)
                variants[colour, f"ours, {cache}, {backend}"] = ours(images, recipe)
    starts = range(0, len(paths), BATCH)
    best = {name: dict.fromkeys(starts, float("inf")) for name in variants}
    for _, start, (name, run) in itertools.product(range(rounds), starts, variants.items()):
        begun = time.process_time()
        run(start)
        best[name][start] = min(best[name][start], time.process_time() - begun)
    rates: dict[str, dict[str, float]] = {"none": {}, "code": {}}
    for (colour, name), seconds in best.items():
        rates[colour][name] = round(len(paths) / sum(seconds.values()), 1)
    sizes = [Image.open(path).size for path in paths]
    return {
        "images": len(paths),
        "mean size": np.mean(sizes, 0).round().tolist(),
        "rounds": rounds,
        "images/s": rates,
    }


if __name__ == "__main__":
    main()
