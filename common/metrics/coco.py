"""COCO's average precision: detections are marked once a threshold and size, then any weighting of images is scored.

The rules are those of pycocotools' COCOeval: in each image and class the best hundred detections, best first, claim
the unclaimed object they overlap most, at each IoU threshold anew; a crowd region, and an object outside the size
range, excuses whatever matches nothing else; crowd regions are matched by the share of the detection inside them, and
by any number of detections. Precision is read at 101 recalls. Difficult objects of VOC are crowd regions here: that is
COCO's only way of excusing an object.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from backbench.common.metrics.average_precision import (
    IGNORED,
    RIGHT,
    WRONG,
    Boxes,
    mean_of_classes,
    weight_sums,
)

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100  # detections of one class in one image
SIZES = {"all": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}


def mark(
    found: Boxes,
    truth: Boxes,
    classes: int,
    thresholds: Sequence[float] = THRESHOLDS,
    sizes: Sequence[tuple[float, float]] = (SIZES["all"],),
    most: int = MOST,
) -> np.ndarray:
    """RIGHT, WRONG or IGNORED for each detection, size range and IoU threshold: int8 (k, sizes, thresholds).

    `truth.difficult` are the crowd regions. An object's or a detection's size is its `area` where given, else its
    box's area. Both ends of a range belong to it. Detections beyond the best `most` are IGNORED.
    """
    order, first = _by_group(found, classes)
    group = (found.image.astype(np.int64) * classes + found.label)[order]
    rank = np.arange(len(order)) - first
    box = np.asarray(found.box, np.float64).reshape(-1, 4)[order]
    area = _area(box) if found.area is None else np.asarray(found.area, np.float64)[order]

    true_group = truth.image.astype(np.int64) * classes + truth.label
    by_group = np.argsort(true_group, kind="stable")
    true_group, true_box = true_group[by_group], np.asarray(truth.box, np.float64).reshape(-1, 4)[by_group]
    crowd = np.zeros(len(by_group), bool) if truth.difficult is None else truth.difficult[by_group]
    size = _area(true_box) if truth.area is None else np.asarray(truth.area, np.float64)[by_group]
    ranges = np.asarray(sizes, np.float64).reshape(-1, 2)
    excused = crowd[:, None] | (size[:, None] < ranges[:, 0]) | (size[:, None] > ranges[:, 1])

    far = (area[:, None] < ranges[:, 0]) | (area[:, None] > ranges[:, 1])
    marks = np.full((len(order), len(ranges), len(thresholds)), WRONG, np.int8)
    marks[far] = IGNORED
    marks[rank >= most] = IGNORED
    kept = np.flatnonzero(rank < most)
    least = np.minimum(np.asarray(thresholds, np.float64), 1 - 1e-10)
    rows, columns, overlap = _pairs(box, area, group, kept, true_box, true_group, crowd, float(least.min()))
    _claim(marks, rank, rows, columns, overlap, excused, crowd, least)
    aligned = np.empty_like(marks)
    aligned[order] = marks
    return aligned


def _by_group(found: Boxes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Detections ordered by image, class and falling score (stable), and for each where its group begins."""
    group = found.image.astype(np.int64) * classes + found.label
    order = np.lexsort((-np.asarray(found.score, np.float64), group))
    group = group[order]
    begins = np.flatnonzero(np.diff(group, prepend=-1))
    return order, np.repeat(begins, np.diff(begins, append=len(group)))


def _area(box: np.ndarray) -> np.ndarray:
    return (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])


def _pairs(box, area, group, kept, true_box, true_group, crowd, least):
    """Detections and objects of one image and class that overlap by `least`: rows, columns, IoU; ordered by both."""
    start = np.searchsorted(true_group, group[kept], "left")
    count = np.searchsorted(true_group, group[kept], "right") - start
    rows = np.repeat(kept, count)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(start, count)
    a, b = box[rows], true_box[columns]
    w = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    h = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    inter = np.where((w > 0) & (h > 0), w * h, 0.0)
    union = np.where(crowd[columns], area[rows], area[rows] + _area(b) - inter)
    overlap = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    near = overlap >= least
    return rows[near], columns[near], overlap[near]


def _claim(marks, rank, rows, columns, overlap, excused, crowd, least) -> None:
    """Let every image's r-th detection of a class claim its object, for all ranks r in turn; fills `marks`.

    State is one column a size range and threshold. Of equal overlaps the last object is claimed, as in COCOeval.
    """
    shape = (excused.shape[1], len(least))
    taken = np.zeros((len(excused), *shape), bool)
    by_rank = np.argsort(rank[rows], kind="stable")
    rows, columns, overlap = rows[by_rank], columns[by_rank], overlap[by_rank]
    ends = np.searchsorted(rank[rows], np.arange(rank[rows].max(initial=-1) + 2))
    for low, high in pairwise(ends):
        if low == high:
            continue
        row, column, iou = rows[low:high], columns[low:high], overlap[low:high, None, None]
        free = (crowd[column, None, None] | ~taken[column]) & (iou >= least)
        plain = ~excused[column][:, :, None]
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        won = _last_best(free & plain, iou, starts)
        spared = _last_best(free & ~plain, iou, starts)
        chosen = np.where(won >= 0, won, spared)  # an excused object takes only what no other object does
        d, s, t = np.nonzero(chosen >= 0)
        marks[row[starts][d], s, t] = np.where(won[d, s, t] >= 0, RIGHT, IGNORED)
        taken[column[chosen[d, s, t]], s, t] = True


def _last_best(allowed: np.ndarray, iou: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """In each segment of pairs the last of the allowed with the largest IoU, -1 where none is: (segments, …)."""
    best = np.maximum.reduceat(np.where(allowed, iou, -1.0), starts)
    segment = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(iou)))
    top = allowed & (iou == best[segment])
    return np.maximum.reduceat(np.where(top, np.arange(len(iou))[:, None, None], -1), starts)


def match(
    found: Boxes,
    truth: Boxes,
    images: int,
    classes: int,
    thresholds: Sequence[float] = THRESHOLDS,
    sizes: Sequence[tuple[float, float]] = tuple(SIZES.values()),
    most: int = MOST,
) -> dict[str, np.ndarray]:
    """The statistics of COCO AP: rows ordered by class and falling score, of equal scores by image.

    Returns `image` int32, `label` int16, `score` float64, (detections,), `coco_mark` int8 (detections, sizes,
    thresholds) and `coco_positives` int32 (images, classes, sizes).
    """
    marks = mark(found, truth, classes, thresholds, sizes, most)
    order = np.lexsort((found.image, -np.asarray(found.score, np.float64), found.label))
    return {
        "image": found.image[order].astype(np.int32),
        "label": found.label[order].astype(np.int16),
        "score": np.asarray(found.score, np.float64)[order],
        "coco_mark": marks[order],
        "coco_positives": positives(truth, images, classes, sizes),
    }


def positives(
    truth: Boxes, images: int, classes: int, sizes: Sequence[tuple[float, float]] = (SIZES["all"],)
) -> np.ndarray:
    """Objects that count (no crowd region, within the range): int32 (images, classes, sizes)."""
    group = truth.image.astype(np.int64) * classes + truth.label
    plain = np.ones(len(group), bool) if truth.difficult is None else ~truth.difficult
    size = _area(np.asarray(truth.box, np.float64).reshape(-1, 4)) if truth.area is None else truth.area
    counts = [
        np.bincount(group[plain & (size >= low) & (size <= high)], minlength=images * classes)
        for low, high in sizes
    ]
    return np.stack(counts, -1).reshape(images, classes, len(sizes)).astype(np.int32)


def class_ap(stats: Mapping[str, np.ndarray], weights: np.ndarray | None = None, size: int = 0) -> np.ndarray:
    """AP of every class at every threshold for `weights` (R, images), None being one row of ones.

    Returns float64 (R, classes, thresholds); NaN where a class has no weighted object. `size` is the range's index.

    What does not depend on the threshold, the weight of all detections down to a right one, is summed once.
    """
    counts, marks = stats["coco_positives"][:, :, size], stats["coco_mark"][:, size]
    images, classes = counts.shape
    weights = np.ones((1, images)) if weights is None else np.asarray(weights, np.float64)
    objects = weights @ counts.astype(np.float64)
    bounds = np.searchsorted(stats["label"], np.arange(classes + 1))
    ap = np.full((len(weights), classes, marks.shape[1]), np.nan)
    weights = np.ascontiguousarray(weights.T)
    for c in range(classes):
        scored = objects[:, c] > 0
        ap[scored, c] = 0.0
        mine = slice(bounds[c], bounds[c + 1])
        image, mark_c = stats["image"][mine], marks[mine]
        stops = np.flatnonzero((mark_c == RIGHT).any(1))
        if not len(stops) or not scored.any():
            continue
        seen = _seen(image, stops, weights)
        for t in range(marks.shape[1]):
            right = np.flatnonzero(mark_c[stops, t] == RIGHT)
            if not len(right):
                continue
            ignored = np.flatnonzero(mark_c[: stops[right[-1]], t] == IGNORED)
            total = seen[right]
            if len(ignored):
                total = total - _seen(image, stops[right], weights, ignored)
            tp = np.cumsum(weights[image[stops[right]]], 0)
            ap[scored, c, t] = _interpolated(tp, total, objects[:, c])[scored]
    return ap


def _seen(image, stops, weights, rows=None) -> np.ndarray:
    """The weight of all detections (of `rows`) down to each of `stops`, itself included: (stops, R)."""
    rows = np.arange(stops[-1] + 1) if rows is None else rows
    return np.cumsum(weight_sums(np.searchsorted(stops, rows), image[rows], weights, len(stops)), 0)


def _interpolated(tp: np.ndarray, total: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """The mean over RECALLS of the best precision at that recall or above; `tp`, `total` (k, R) at right detections.

    Between right detections recall stands still: each of them answers the recalls since the one before.
    """
    precision = np.divide(tp, total, out=np.zeros_like(tp), where=total > 0)
    precision = np.maximum.accumulate(precision[::-1], 0)[::-1]
    recall = tp / np.where(objects > 0, objects, 1.0)
    reached = np.minimum((recall * 100).astype(np.int64), 100)
    reached += RECALLS[reached] <= recall  # the product may be rounded either way
    reached += (reached < 101) & (RECALLS[np.minimum(reached, 100)] <= recall)
    return (np.diff(reached, axis=0, prepend=0) * precision).sum(0) / 101.0


def rescore(stats: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """`AP`, `AP50`, `AP75` of the first size range, each (R,), for image weights (R, images); NaN without objects.

    Needs COCO's thresholds (THRESHOLDS) in `stats`.
    """
    ap = class_ap(stats, weights)
    at = {f"AP{round(100 * THRESHOLDS[t])}": mean_of_classes(ap[..., t]) for t in (0, 5)}
    return {"AP": mean_of_classes(ap.reshape(len(ap), -1)), **at}


def strata(stats: Mapping[str, np.ndarray], names: Sequence[str] = tuple(SIZES)) -> dict[str, float]:
    """AP of every size range of `stats`: `AP` of "all", `APs`, `APm`, `APl`; NaN where it has no object."""
    found = {}
    for k, name in enumerate(names):
        ap = class_ap(stats, size=k)
        found["AP" + ("" if name == "all" else name)] = float(mean_of_classes(ap.reshape(1, -1))[0])
    return found
