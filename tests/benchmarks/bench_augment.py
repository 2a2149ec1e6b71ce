"""SSD's augmentation on one core, decode excluded: ours, ssd.pytorch's policy, torchvision v2's recipe.

    python tests/benchmarks/bench_augment.py [--devkit VOCDEVKIT] [--images 70] [--rounds 5] [--json FILE]

Peers. ssd.pytorch: `SSDAugmentation` of amdegroot/ssd.pytorch, written again here from its policy, step after step
on the full-size float image as it does it. torchvision: references/detection's `ssd` preset with transforms v2, on
PIL images and on uint8 tensors; its resize to 300 happens in its model, and is left out here, in its favour.
The sides take turns, a round is one pass over the images, the fastest round of each side counts. Without --devkit
the images are drawn: 500 × 375 smoothed noise with 1 to 6 boxes.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from backbench.common.data import open_detection
from backbench.common.data.decode import read_rgb
from backbench.detection.augment import ssd_view

MEAN = (123, 117, 104)


def ours(image, boxes, labels, rng):
    """detection.augment.ssd_view: uint8 300 × 300."""
    return ssd_view(image, boxes, labels, rng, MEAN)


def ssd_pytorch(image, boxes, labels, rng):
    """ssd.pytorch's SSDAugmentation: float32 300 × 300 less the mean."""
    image = image.astype(np.float32)
    image = pytorch_distort(image, rng)
    image, boxes = pytorch_expand(image, boxes, rng)
    image, boxes, labels = pytorch_crop(image, boxes, labels, rng)
    height, width = image.shape[:2]
    if rng.integers(2):
        image, boxes = image[:, ::-1], boxes.copy()
        boxes[:, 0::2] = width - boxes[:, 2::-2]
    boxes = boxes / [width, height, width, height]
    image = cv2.resize(image, (300, 300)).astype(np.float32)
    image -= np.array(MEAN, np.float32)
    return image.astype(np.float32), boxes, labels


def pytorch_distort(image, rng):
    """Its PhotometricDistort, without clipping."""
    contrast = lambda x: x * rng.uniform(0.5, 1.5) if rng.integers(2) else x  # noqa: E731
    if rng.integers(2):
        image = image + rng.uniform(-32, 32)
    image = image.astype(np.float32)
    first = rng.integers(2)
    if first:
        image = contrast(image).astype(np.float32)
    image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    if rng.integers(2):
        image[:, :, 1] *= rng.uniform(0.5, 1.5)
    if rng.integers(2):
        image[:, :, 0] += rng.uniform(-18, 18)
        image[:, :, 0][image[:, :, 0] > 360.0] -= 360.0
        image[:, :, 0][image[:, :, 0] < 0.0] += 360.0
    image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR)
    if not first:
        image = contrast(image).astype(np.float32)
    if rng.integers(2):
        orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
        image = image[:, :, orders[rng.integers(6)]]
    return image


def pytorch_expand(image, boxes, rng):
    """Its Expand: a mean canvas of 1 to 4 times the sides, with probability ½."""
    if rng.integers(2):
        return image, boxes
    height, width, depth = image.shape
    ratio = rng.uniform(1, 4)
    left, top = rng.uniform(0, width * ratio - width), rng.uniform(0, height * ratio - height)
    canvas = np.zeros((int(height * ratio), int(width * ratio), depth), image.dtype)
    canvas[:, :, :] = MEAN
    canvas[int(top) : int(top + height), int(left) : int(left + width)] = image
    boxes = boxes.copy()
    boxes[:, :2] += (int(left), int(top))
    boxes[:, 2:] += (int(left), int(top))
    return canvas, boxes


def pytorch_crop(image, boxes, labels, rng):
    """Its RandomSampleCrop, whose constraint never fires and whose options miss .5."""
    height, width = image.shape[:2]
    while True:
        mode = (None, 0.1, 0.3, 0.7, 0.9, -np.inf)[rng.integers(6)]
        if mode is None:
            return image, boxes, labels
        for _ in range(50):
            w, h = rng.uniform(0.3 * width, width), rng.uniform(0.3 * height, height)
            if h / w < 0.5 or h / w > 2:
                continue
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            rect = np.array([int(left), int(top), int(left + w), int(top + h)])
            overlap = jaccard(boxes, rect)
            if overlap.min() < mode and np.inf < overlap.max():
                continue
            part = image[rect[1] : rect[3], rect[0] : rect[2], :]
            centres = (boxes[:, :2] + boxes[:, 2:]) / 2.0
            low = (rect[0] < centres[:, 0]) * (rect[1] < centres[:, 1])
            high = (rect[2] > centres[:, 0]) * (rect[3] > centres[:, 1])
            mask = low * high
            if not mask.any():
                continue
            kept = boxes[mask, :].copy()
            kept[:, :2] = np.maximum(kept[:, :2], rect[:2]) - rect[:2]
            kept[:, 2:] = np.minimum(kept[:, 2:], rect[2:]) - rect[:2]
            return part, kept, labels[mask]


def jaccard(boxes, rect):
    """IoU of each box with a rectangle."""
    sides = np.clip(np.minimum(boxes[:, 2:], rect[2:]) - np.maximum(boxes[:, :2], rect[:2]), 0, np.inf)
    inter = sides[:, 0] * sides[:, 1]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return inter / (areas + (rect[2] - rect[0]) * (rect[3] - rect[1]) - inter)


def torchvision_recipe(pil: bool):
    """references/detection/presets.py, `ssd`, with transforms v2."""
    mean = defaultdict(lambda: MEAN, {tv_tensors.Mask: 0})
    steps = [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=mean), v2.RandomIoUCrop()]
    steps += [v2.RandomHorizontalFlip(p=0.5)]
    steps += [v2.PILToTensor()] if pil else []
    steps += [v2.ToDtype(torch.float, scale=True), v2.ConvertBoundingBoxFormat("XYXY")]
    return v2.Compose([*steps, v2.SanitizeBoundingBoxes(), v2.ToPureTensor()])


def load(devkit: str | None, count: int):
    """Decoded images with their boxes (float64) and labels."""
    if devkit:
        images = open_detection(f"voc:{devkit}")[0]
        used = [i for i in range(len(images)) if len(images.labels[i])][:count]
        pictures = [read_rgb(images.paths[i], frame=images.sizes[i]) for i in used]
        return [(p, images.boxes[i].astype(np.float64), images.labels[i]) for p, i in zip(pictures, used)]
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        noise = rng.integers(0, 256, (375, 500, 3)).astype(np.uint8)
        k = rng.integers(1, 7)
        low = rng.uniform(0, 0.6, (k, 2))
        boxes = np.hstack([low, low + rng.uniform(0.05, 0.4, (k, 2))]) * [500, 375, 500, 375]
        made.append((cv2.GaussianBlur(noise, (0, 0), 3), boxes, rng.integers(0, 20, k)))
    return made


def main() -> None:
    """Time the sides in turn and print images a second and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devkit", help="a VOCdevkit; its training images are used")
    parser.add_argument("--images", type=int, default=70)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    data = load(args.devkit, args.images)
    wrapped = [
        (
            Image.fromarray(image),
            tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous()),
            tv_tensors.BoundingBoxes(
                torch.from_numpy(boxes).float(), format="XYXY", canvas_size=image.shape[:2]
            ),
            torch.from_numpy(labels),
        )
        for image, boxes, labels in data
    ]
    recipes = {True: torchvision_recipe(True), False: torchvision_recipe(False)}

    def run_arrays(side):
        for k, (image, boxes, labels) in enumerate(data):
            side(image, boxes, labels, np.random.default_rng(k))

    def run_torchvision(pil):
        torch.manual_seed(0)
        for as_pil, as_tensor, boxes, labels in wrapped:
            recipes[pil](as_pil if pil else as_tensor, {"boxes": boxes, "labels": labels})

    sides = {
        "ours": lambda: run_arrays(ours),
        "ssd.pytorch": lambda: run_arrays(ssd_pytorch),
        "torchvision v2, PIL": lambda: run_torchvision(True),
        "torchvision v2, tensor": lambda: run_torchvision(False),
    }
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(args.rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    rates = {name: len(data) / seconds for name, seconds in best.items()}
    result = {"images": len(data), "rounds": args.rounds, "images_per_second": rates}
    result["ratio"] = {name: rates["ours"] / rate for name, rate in rates.items() if name != "ours"}
    for name, rate in rates.items():
        print(f"{name:24} {rate:7.1f} img/s   ours is {rates['ours'] / rate:5.2f} ×")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
