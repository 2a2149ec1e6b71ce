"""Training throughput of the detectors with the loader in the loop, against torchvision's with its own recipe.

    python tests/benchmarks/bench_detection_gpu.py [--devkit VOCDEVKIT] [--arch resnet50] [--batches 32 64]
        [--iterations 60] [--rounds 2] [--workers 16] [--json FILE]

Ours is what detection/finetune.py runs: `TrainViews` and `common.engine.train`, bf16. The peer is torchvision's `SSD`
and `FasterRCNN` classes around the same ResNet (the same maps, heads of its own), under the same autocast, fed as
references/detection does: PIL decode, the presets `ssd` and `hflip` of transforms v2, its collate function, its resize
inside the model. Both train on the same JPEG files with the same number of loader processes, images on disk; seconds
from a third of the iterations to the end count. The sides take turns, the fastest round of each counts. Without
--devkit 256 JPEG files of 500 × 375 pixels are drawn.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import nn
from torchvision import tv_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2

from backbench.common.backbones.resnet import Trunk
from backbench.common.data import open_detection
from backbench.common.data.types import DetectionSet
from backbench.common.engine import train
from backbench.detection import data as detection_data
from backbench.detection.build import make_model
from backbench.detection.data import TrainViews
from backbench.detection.faster_rcnn import parameter_groups
from backbench.detection.finetune import STEPS
from backbench.detection.recipes import RECIPES

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Maps(nn.Module):
    """The six maps of our SSD300, as torchvision wants a backbone."""

    def __init__(self, model):
        super().__init__()
        self.trunk, self.extras, self.l2norm = model.trunk, model.extras, model.l2norm
        self.out_channels = [head.in_channels for head in model.heads]

    def forward(self, x):
        taps = self.trunk.features(x, ("layer2", "layer3"))
        maps = [self.l2norm(taps["layer2"]), taps["layer3"]]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return {str(k): m.float() for k, m in enumerate(maps)}


class Body(nn.Module):
    """Stem to layer3 as a backbone."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.out_channels = trunk, trunk.channels["layer3"]

    def forward(self, x):
        return self.trunk.run(x, stop="layer3").float()


class Tail(nn.Module):
    """layer4 and the mean as a box head."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, x):
        return self.trunk.run(x, "layer4", "layer4").mean((2, 3)).float()


class References(torch.utils.data.Dataset):
    """references/detection's way from a file to a sample."""

    def __init__(self, images: DetectionSet, detector: str, draws: int):
        self.images, self.draws = images, draws
        mean = defaultdict(lambda: (123.0, 117.0, 104.0), {tv_tensors.Mask: 0})
        steps = []
        if detector == "ssd300":
            steps = [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=mean), v2.RandomIoUCrop()]
        steps += [v2.RandomHorizontalFlip(p=0.5), v2.PILToTensor(), v2.ToDtype(torch.float, scale=True)]
        steps += [v2.ConvertBoundingBoxFormat("XYXY"), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()]
        self.transform = v2.Compose(steps)

    def __len__(self):
        return self.draws

    def __getitem__(self, draw):
        index = draw % len(self.images)
        image = Image.open(self.images.paths[index]).convert("RGB")
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(self.images.boxes[index]), format="XYXY", canvas_size=image.size[::-1]
        )
        target = {"boxes": boxes, "labels": torch.from_numpy(self.images.labels[index]) + 1}
        return self.transform(image, target)


def ours(images, recipe, detector, args) -> float:
    """Images a second of our training loop."""
    torch.manual_seed(0)
    trunk = Trunk(args.arch)
    if detector == "faster_rcnn":
        trunk.freeze("layer1")
        trunk.freeze_bn()
    model = make_model(trunk, recipe, len(images.classes), MEAN, STD)
    with tempfile.TemporaryDirectory() as folder:
        train(
            model,
            STEPS[detector](recipe),
            TrainViews(images, recipe, MEAN),
            recipe,
            folder=Path(folder),
            key="bench",
            seed=0,
            device=torch.device(args.device),
            groups=parameter_groups(model) if detector == "faster_rcnn" else None,
            workers=args.workers,
        )
        lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["iteration"] >= recipe.iterations // 3)
    done = lines[-1]["iteration"] - first["iteration"]
    return done * recipe.batch / (lines[-1]["seconds"] - first["seconds"])


def theirs(images, recipe, detector, args) -> float:
    """Images a second of torchvision's detector, trained as its references do."""
    torch.manual_seed(0)
    trunk, classes = Trunk(args.arch), len(images.classes) + 1
    if detector == "ssd300":
        maps = Maps(make_model(trunk, recipe, classes - 1, MEAN, STD))
        priors = DefaultBoxGenerator([[2], [2, 3], [2, 3], [2, 3], [2], [2]], steps=[8, 16, 32, 64, 100, 300])
        model = SSD(maps, priors, (300, 300), classes, image_mean=list(MEAN), image_std=list(STD))
    else:
        trunk.freeze("layer1")
        trunk.freeze_bn()
        model = FasterRCNN(
            Body(trunk),
            rpn_anchor_generator=AnchorGenerator((recipe.anchors,), ((0.5, 1.0, 2.0),)),
            rpn_pre_nms_top_n_train=recipe.proposals_before,
            rpn_post_nms_top_n_train=recipe.proposals_after,
            box_roi_pool=MultiScaleRoIAlign(["0"], recipe.roi_size, recipe.sampling),
            box_head=Tail(trunk),
            box_predictor=FastRCNNPredictor(trunk.channels["layer4"], classes),
            box_batch_size_per_image=recipe.roi_batch,
            min_size=recipe.short_side,
            max_size=recipe.long_side,
        )
    device = torch.device(args.device)
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=recipe.lr / 10, momentum=0.9, weight_decay=recipe.weight_decay)
    loader = torch.utils.data.DataLoader(
        References(images, detector, recipe.iterations * recipe.batch),
        batch_size=recipe.batch,
        num_workers=args.workers,
        collate_fn=lambda batch: tuple(zip(*batch)),
        pin_memory=device.type == "cuda",
    )
    start, first = 0.0, recipe.iterations // 3
    for number, (pictures, targets) in enumerate(loader):
        if number == first:
            _wait(device)
            start = time.perf_counter()
        pictures = [picture.to(device, non_blocking=True) for picture in pictures]
        targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in targets]
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            loss = sum(model(pictures, targets).values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    _wait(device)
    return (recipe.iterations - first) * recipe.batch / (time.perf_counter() - start)


def _wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def drawn(folder: Path, count: int = 256) -> DetectionSet:
    """Smoothed noise with 1 to 6 boxes of 20 classes, as JPEG files."""
    rng, paths, boxes = np.random.default_rng(0), [], []
    for k in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (375, 500, 3)).astype(np.uint8))
        paths.append(folder / f"{k:06d}.jpg")
        noise.filter(ImageFilter.GaussianBlur(2)).save(paths[-1], quality=92)
        low = rng.uniform(0, 0.6, (rng.integers(1, 7), 2))
        size = np.array([500, 375] * 2)
        boxes.append((np.hstack([low, low + rng.uniform(0.1, 0.4, low.shape)]) * size).astype(np.float32))
    labels = [rng.integers(0, 20, len(b)) for b in boxes]
    difficult = [np.zeros(len(b), bool) for b in boxes]
    ids, sizes = [p.stem for p in paths], np.tile(np.array([500, 375]), (count, 1))
    return DetectionSet("drawn", [str(c) for c in range(20)], ids, paths, sizes, boxes, labels, difficult)


def main() -> None:
    """Time both sides for each detector and batch, print images a second and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devkit", help="a VOCdevkit; its training images are used")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64], help="of SSD300")
    parser.add_argument("--frcnn-batches", type=int, nargs="+", default=[8, 16], help="of Faster R-CNN C4")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--recipe", default="paper", help="smoke to try the script itself")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    detection_data.IN_MEMORY = 0  # files are read and decoded, as a whole VOC would be
    result = {
        "device": args.device,
        "arch": args.arch,
        "workers": args.workers,
        "iterations": args.iterations,
    }
    if args.device == "cuda":
        result["device"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        images = open_detection(f"voc:{args.devkit}")[0] if args.devkit else drawn(Path(folder))
        result["images"] = len(images)
        for detector, batches in (("ssd300", args.batches), ("faster_rcnn", args.frcnn_batches)):
            for batch in batches:
                recipe = replace(
                    RECIPES[detector][args.recipe],
                    batch=batch,
                    iterations=args.iterations,
                    milestones=(),
                    precision=args.precision,
                    warmup=args.iterations - 1,  # random weights: the rate stays low
                    log_every=max(1, args.iterations // 6),
                )
                best = {ours: 0.0, theirs: 0.0}
                for _ in range(args.rounds):
                    for side in best:
                        best[side] = max(best[side], side(images, recipe, detector, args))
                row = {"ours": best[ours], "torchvision": best[theirs], "ratio": best[ours] / best[theirs]}
                result[f"{detector} batch {batch}"] = row
                print(
                    f"{detector:12} batch {batch:3}   ours {row['ours']:8.1f} img/s   "
                    f"torchvision {row['torchvision']:8.1f} img/s   {row['ratio']:5.2f} ×",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
