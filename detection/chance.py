"""Chance of a detector: what its detections score on other images."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from backbench.common.data.types import DetectionSet
from backbench.common.engine import SPLIT, stream
from backbench.common.metrics import coco
from backbench.common.metrics.average_precision import WRONG, Boxes, match, ranked
from backbench.detection.scores import IOU, scores, truth_of

DRAWS = 20


def chance(found: Boxes, images: DetectionSet, draws: int = DRAWS) -> dict[str, float]:
    """The scores when every image's detections, class and box together, go to another image; the mean of `draws`.

    Boxes are scaled to the image they go to. The draws are the same for every detector. Nothing for a single image,
    which has no other, and without an object that counts.
    """
    if len(images) < 2:
        return {}
    drawn = [scores(stats) for stats in shuffled_statistics(found, images, draws)]
    return {
        name: float(np.mean([one[name] for one in drawn]))
        for name, value in drawn[0].items()
        if value is not None
    }


def other_images(images: int, rng: np.random.Generator) -> np.ndarray:
    """For each of two or more images a random other one, each chosen once: int64 (n,), a single cycle."""
    order = rng.permutation(images)
    other = np.empty(images, np.int64)
    other[order] = np.roll(order, 1)
    return other


def shuffled_statistics(found: Boxes, images: DetectionSet, draws: int) -> Iterator[dict[str, np.ndarray]]:
    """`scores.cell_statistics` of each draw.

    The objects move to the detections' image, which gives the same overlaps: so the detections are ordered once, and
    only those whose class has an object there are matched.
    """
    rng, truth, shape = stream(SPLIT, 0), truth_of(images), (len(images), len(images.classes))
    order, score = ranked(found)
    found = Boxes(found.image[order], found.label[order], found.box[order], found.score[order])
    group = found.image.astype(np.int64) * shape[1] + found.label
    fixed = {"image": found.image.astype(np.int32), "label": found.label.astype(np.int16)}
    fixed["score"] = score[order]
    nothing = Boxes(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)))
    unmatched = coco.mark(found, nothing, shape[1])
    for _ in range(draws):
        home = other_images(len(images), rng)
        scale = np.tile(images.sizes[home] / images.sizes, 2)
        moved = replace(truth, image=home[truth.image], box=truth.box * scale[truth.image])
        here = np.zeros(shape[0] * shape[1], bool)
        here[moved.image * shape[1] + moved.label] = True
        rows = np.flatnonzero(here[group])
        part = Boxes(found.image[rows], found.label[rows], found.box[rows], found.score[rows])
        matched = match(part, moved, *shape, IOU)
        mark, coco_mark = np.full(len(group), WRONG, np.int8), unmatched.copy()
        mark[rows], coco_mark[rows] = matched["mark"], coco.mark(part, moved, shape[1])
        yield {**fixed, "mark": mark, "coco_mark": coco_mark, "positives": matched["positives"]}
