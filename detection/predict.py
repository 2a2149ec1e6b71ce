"""Detections of a test set, and the files they are kept in."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.data.decode import read_rgb
from common.data.types import DetectionSet
from common.engine import autocast
from common.errors import UserError
from common.files import read_json, write_text
from common.metrics.average_precision import Boxes
from common.progress import progress
from detection.augment import resize, scaled_size
from detection.data import read_ahead
from detection.faster_rcnn import FasterRCNN
from detection.recipes import FasterRCNNRecipe, SSDRecipe
from detection.ssd import SSD300, detect

SIDE = 300


def predict(model: SSD300 | FasterRCNN, images: DetectionSet, recipe, device: torch.device) -> Boxes:
    """Detections of every image, in the images' order, best first, boxes in pixels of the images."""
    model.to(device).eval()
    single = _predict_ssd if isinstance(recipe, SSDRecipe) else _predict_frcnn
    found: list[dict[str, np.ndarray]] = [{}] * len(images)
    with torch.inference_mode(), progress(desc="detecting", total=len(images), unit="img", delay=2) as bar:
        for indices, batch in single(model, images, recipe, device):
            for i, one in zip(indices, batch):
                found[i] = {k: v.float().cpu().numpy() for k, v in one.items()}
            bar.update(len(indices))
    counts = [len(one["scores"]) for one in found]
    return Boxes(
        image=np.repeat(np.arange(len(images)), counts),
        label=np.concatenate([one["labels"] for one in found]).astype(np.int64),
        box=np.concatenate([one["boxes"] for one in found]),
        score=np.concatenate([one["scores"] for one in found]),
    )


Batches = Iterator[tuple[Sequence[int], list[dict[str, Tensor]]]]


def _predict_ssd(model: SSD300, images: DetectionSet, recipe: SSDRecipe, device: torch.device) -> Batches:
    def load(index: int) -> np.ndarray:
        return resize(read_rgb(images.paths[index], frame=images.sizes[index]), SIDE, SIDE)

    order = np.arange(len(images))
    batches = [order[k : k + recipe.test_batch] for k in range(0, len(order), recipe.test_batch)]
    for indices, pictures in read_ahead(batches, load):
        with autocast(recipe, device):
            offsets, logits = model(torch.from_numpy(np.stack(pictures)).to(device))
        settings = (recipe.score, recipe.nms, recipe.top, recipe.candidates)
        found = detect(offsets, logits, model.priors, *settings)
        for i, one in zip(indices, found):
            one["boxes"] = one["boxes"] * torch.tensor([*images.sizes[i]] * 2, device=device)
        yield indices, found


def _predict_frcnn(
    model: FasterRCNN, images: DetectionSet, recipe: FasterRCNNRecipe, device: torch.device
) -> Batches:
    """Only images of one size share a batch: none is padded, so no result depends on its neighbours."""
    sizes = np.array(
        [scaled_size(*size, recipe.short_side, recipe.long_side) for size in images.sizes.tolist()]
    )

    def load(index: int) -> np.ndarray:
        return resize(read_rgb(images.paths[index], frame=images.sizes[index]), *sizes[index].tolist())

    batches = []
    for size in np.unique(sizes, axis=0):
        same = np.flatnonzero((sizes == size).all(1))
        batches += [same[k : k + recipe.test_batch] for k in range(0, len(same), recipe.test_batch)]
    for indices, pictures in read_ahead(batches, load):
        with autocast(recipe, device):
            found = model(torch.from_numpy(np.stack(pictures)).to(device), [p.shape[:2] for p in pictures])
        for i, one in zip(indices, found):
            scale = images.sizes[i] / sizes[i]
            one["boxes"] = one["boxes"] * torch.tensor([*scale] * 2, dtype=torch.float32, device=device)
        yield indices, found


def write_results(path: Path, found: Boxes, ids: Sequence) -> None:
    """Write COCO result JSON, one detection a line, `category_id` 1 + the class's index.

    Boxes are rounded to .01 pixel, scores to six decimals; equal detections give equal bytes.
    """
    low, high = found.box[:, :2], found.box[:, 2:]
    boxes = np.round(np.hstack([low, high - low]).astype(np.float64), 2).tolist()
    scores = np.round(found.score.astype(np.float64), 6).tolist()
    names = [json.dumps(i if isinstance(i, int) else str(i)) for i in ids]
    lines = [
        f'{{"image_id":{names[i]},"category_id":{label + 1},"bbox":[{x},{y},{w},{h}],"score":{score}}}'
        for i, label, (x, y, w, h), score in zip(found.image.tolist(), found.label.tolist(), boxes, scores)
    ]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def read_results(path: Path, ids: Sequence, classes: int) -> Boxes:
    """Read COCO result JSON, in its order. Boxes become x0, y0, x1, y1.

    An `image_id` may also be the number that the id's digits spell. Raises UserError naming the entry for an
    unknown image or category, a box of other than four finite numbers, a negative size, or a missing key.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(
            f"{path}: COCO result JSON is a list of detections, this is a {type(entries).__name__}"
        )
    index = image_index(ids)
    image, label = np.empty(len(entries), np.int64), np.empty(len(entries), np.int64)
    box, score = np.empty((len(entries), 4)), np.empty(len(entries))
    for k, entry in enumerate(entries):
        try:
            image[k] = index[entry["image_id"]]
            label[k] = entry["category_id"] - 1
            box[k], score[k] = entry["bbox"], entry["score"]
        except (KeyError, TypeError, ValueError) as error:
            what = f"image or key {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{path}: detection {k + 1}: {what}; each is "
                '{"image_id", "category_id", "bbox": [x, y, width, height], "score"} of an image of this set'
            ) from None
    bad = ~np.isfinite(np.column_stack([box, score])).all(1) | (box[:, 2:] < 0).any(1)
    bad |= (label < 0) | (label >= classes)
    if bad.any():
        k = int(bad.argmax())
        raise UserError(
            f"{path}: detection {k + 1}: {entries[k]}; category_id is 1 to {classes}, numbers are finite, "
            "width and height not negative"
        )
    box[:, 2:] += box[:, :2]
    return Boxes(image, label, box, score)


def image_index(ids: Sequence) -> dict[str | int, int]:
    """Where an image is, by its id and, where no two ids share it, by the number its digits spell."""
    index: dict[str | int, int] = {}
    numbers = ["".join(c for c in str(i) if c.isdigit()) for i in ids]
    if all(numbers) and len({int(n) for n in numbers}) == len(ids):
        index |= {int(n): k for k, n in enumerate(numbers)}
    return index | {str(i): k for k, i in enumerate(ids)}
