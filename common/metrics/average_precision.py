"""VOC average precision: detections are matched to truth once, then any weighting of images is scored fast.

Conventions (the devkit's VOCevaldet.m is the default): a detection is compared with the object of its image
and class that it overlaps most, difficult ones included (of equals the first); the first detection to claim
an object is right, later ones are wrong; a claim on a difficult object counts neither way. Detections are
ranked by score, equal scores in the order given. A class without (weighted) objects is left out of
the mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

RIGHT, WRONG, IGNORED = 1, 0, -1
RECALLS = np.arange(0, 1.1, 0.1)  # as every VOC evaluator: 0.30000000000000004, not 0.3


@dataclass(frozen=True)
class Convention:
    """How a published evaluator compares boxes.

    `inclusive`: a match needs IoU >= threshold (else >). `plus_one`: sizes are x1 - x0 + 1, of pixel indices.
    `score_digits`, `box_digits`: decimals kept when detections are written to text (None: all).
    `truth_shift`, `found_shift`: what is added to x0, y0, x1, y1 of this project's continuous boxes, where
    the whole image is 0, 0, width, height.
    """

    inclusive: bool = True
    plus_one: bool = False
    score_digits: int | None = None
    box_digits: int | None = None
    truth_shift: tuple[float, float, float, float] = (0, 0, 0, 0)
    found_shift: tuple[float, float, float, float] = (0, 0, 0, 0)


# On continuous boxes the devkit's 1-based pixel indices with +1 sizes are plain areas. The three others read
# text files of 1-based indices, with one decimal for boxes and three for scores, and demand IoU > threshold.
_FILE = (1.0, 1.0, 0.0, 0.0)
PRESETS = {
    "voc-devkit": Convention(),
    "py-faster-rcnn": Convention(False, True, 3, 1, _FILE, _FILE),
    "detectron2": Convention(False, True, 3, 1, _FILE, _FILE),
    # truth less 1 on every side, detections not, no +1: its evaluator puts the two one pixel apart
    "ssd.pytorch": Convention(False, False, 3, 1, (0.0, 0.0, -1.0, -1.0), _FILE),
}


@dataclass
class Boxes:
    """Boxes of many images as flat arrays.

    `image`: int (k,) index of the image. `label`: int (k,) class. `box`: float (k, 4) x0, y0, x1, y1.
    Detections have `score`, float (k,); truth may have `difficult`, bool (k,). `area`, float (k,), is the size where it
    is not that of the box: of an object its region's, of a detection width × height as its file has them.
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    score: np.ndarray | None = None
    difficult: np.ndarray | None = None
    area: np.ndarray | None = None


def match(
    found: Boxes,
    truth: Boxes,
    images: int,
    classes: int,
    iou: float = 0.5,
    convention: Convention = PRESETS["voc-devkit"],
) -> dict[str, np.ndarray]:
    """Match detections to truth: the sufficient statistics of every VOC AP at this threshold.

    Returns, ordered by class and falling score: `image` int32, `label` int16, `score` float32, `mark` int8
    (RIGHT, WRONG or IGNORED), each (detections,); and `positives` int32 (images, classes), the number of
    objects that are not difficult.
    """
    order, score = ranked(found, convention)
    image, label, score = found.image[order], found.label[order], score[order]
    box = np.asarray(found.box, np.float64).reshape(-1, 4)[order] + np.asarray(convention.found_shift)
    if convention.box_digits is not None:
        box = as_printed(box, convention.box_digits)

    group = truth.image.astype(np.int64) * classes + truth.label
    by_group = np.argsort(group, kind="stable")
    true_box = np.asarray(truth.box, np.float64).reshape(-1, 4)[by_group] + np.asarray(convention.truth_shift)
    difficult = np.zeros(len(group), bool) if truth.difficult is None else np.asarray(truth.difficult, bool)
    positives = np.bincount(group[~difficult], minlength=images * classes).reshape(images, classes)

    best, overlap = most_overlapped(
        box, image.astype(np.int64) * classes + label, true_box, group[by_group], convention
    )
    hit = (overlap >= iou) if convention.inclusive else (overlap > iou)
    mark = np.full(len(image), WRONG, np.int8)
    claims = np.flatnonzero(hit)
    excused = difficult[by_group][best[claims]]
    mark[claims[excused]] = IGNORED
    claims = claims[~excused]
    mark[claims[np.unique(best[claims], return_index=True)[1]]] = RIGHT  # the first claim in score order
    return {
        "image": image.astype(np.int32),
        "label": label.astype(np.int16),
        "score": score,
        "mark": mark,
        "positives": positives.astype(np.int32),
    }


def ranked(found: Boxes, convention: Convention = PRESETS["voc-devkit"]) -> tuple[np.ndarray, np.ndarray]:
    """The order of `match`'s rows, by class and falling score, as indices (k,); and the scores it keeps, (k,)."""
    score = np.asarray(found.score, np.float64)
    if convention.score_digits is not None:
        score = as_printed(score, convention.score_digits)
    return np.lexsort((-score, found.label)), score.astype(np.float32)


def as_printed(values: np.ndarray, digits: int) -> np.ndarray:
    """What is read back after printing with so many decimals. Of halves it depends on their binary digits."""
    scaled = values * 10.0**digits
    found = np.rint(scaled) / 10.0**digits
    half = np.abs(scaled - np.floor(scaled) - 0.5) < 1e-6
    found[half] = [float(f"{value:.{digits}f}") for value in values[half].tolist()]
    return found


def most_overlapped(
    box: np.ndarray,
    group: np.ndarray,
    true_box: np.ndarray,
    true_group: np.ndarray,
    convention: Convention = PRESETS["voc-devkit"],
) -> tuple[np.ndarray, np.ndarray]:
    """For each box the truth of its group with the largest IoU (of equals the first), and that IoU.

    `true_group` is sorted. Boxes whose group has no truth get index 0 and IoU -1.
    """
    start = np.searchsorted(true_group, group, "left")
    count = np.searchsorted(true_group, group, "right") - start
    best, overlap = np.zeros(len(box), np.int64), np.full(len(box), -1.0)
    some = np.flatnonzero(count)
    if not len(some):
        return best, overlap
    count, first = count[some], np.cumsum(count[some]) - count[some]
    row = np.repeat(np.arange(len(some)), count)
    column = np.arange(len(row)) - first[row] + start[some][row]
    pair = _iou(box[some][row], true_box[column], 1.0 if convention.plus_one else 0.0)
    overlap[some] = np.maximum.reduceat(pair, first)
    top = np.flatnonzero(pair == overlap[some][row])
    best[some] = column[top[np.unique(row[top], return_index=True)[1]]]
    return best, overlap


def _iou(a: np.ndarray, b: np.ndarray, one: float) -> np.ndarray:
    """IoU of (k, 4) pairs; 0 where the union is empty."""
    w = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0]) + one
    h = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1]) + one
    inter = np.maximum(w, 0.0) * np.maximum(h, 0.0)
    area_a = (a[:, 2] - a[:, 0] + one) * (a[:, 3] - a[:, 1] + one)
    area_b = (b[:, 2] - b[:, 0] + one) * (b[:, 3] - b[:, 1] + one)
    union = area_a + area_b - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def class_ap(stats: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """AP of every class for `weights` (R, images), None being one row of ones.

    Returns `AP` (11-point) and `AP_area`, each (R, classes); NaN where a class has no weighted object.

    Between right detections precision falls and recall stands still, so both APs follow from the right ones
    alone: all that is needed of the wrong ones is their weight between two right ones, a sparse product.
    """
    positives = stats["positives"]
    images, classes = positives.shape
    weights = np.ones((1, images)) if weights is None else np.asarray(weights, np.float64)
    objects = weights @ positives.astype(np.float64)
    bounds = np.searchsorted(stats["label"], np.arange(classes + 1))
    area, eleven = np.full((2, len(weights), classes), np.nan)
    weights = np.ascontiguousarray(weights.T)
    for c in range(classes):
        image, mark = stats["image"][bounds[c] : bounds[c + 1]], stats["mark"][bounds[c] : bounds[c + 1]]
        scored = objects[:, c] > 0
        right = np.flatnonzero(mark == RIGHT)
        if not len(right):
            eleven[scored, c] = area[scored, c] = 0.0
            continue
        wrong = np.flatnonzero(mark[: right[-1]] == WRONG)
        tp = np.cumsum(weights[image[right]], 0)
        between = weight_sums(np.searchsorted(right, wrong), image[wrong], weights, len(right))
        seen = tp + np.cumsum(between, 0)
        precision = np.divide(tp, seen, out=np.zeros_like(tp), where=seen > 0)
        precision = np.maximum.accumulate(precision[::-1], 0)[::-1]
        recall = tp / np.where(scored, objects[:, c], 1.0)
        eleven[scored, c] = _eleven_point(recall, precision)[scored]
        steps = np.diff(recall, axis=0, prepend=0.0) * precision
        area[scored, c] = np.cumsum(steps, 0)[-1][scored]  # cumsum adds in order, as a plain loop does
    return {"AP": eleven, "AP_area": area}


def weight_sums(owner: np.ndarray, image: np.ndarray, weights: np.ndarray, owners: int) -> np.ndarray:
    """The weights (images, R) of the rows' `image`, summed for each `owner` of rows: (owners, R)."""
    if weights.shape[1] == 1:
        return np.bincount(owner, weights[image, 0], owners)[:, None]
    return csr_array((np.ones(len(owner)), (owner, image)), shape=(owners, len(weights))) @ weights


def _eleven_point(recall: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """The mean over RECALLS of the best precision at that recall or above: both (k, R), not rising → (R,)."""
    total, columns = np.zeros(recall.shape[1]), np.arange(recall.shape[1])
    padded = np.concatenate([precision, np.zeros((1, recall.shape[1]))])
    for threshold in RECALLS:
        total += padded[(recall < threshold).sum(0), columns] / 11.0
    return total


def precision_recall(
    stats: Mapping[str, np.ndarray], label: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Recall, precision and score after each detection of a class, best first; those that count neither way left out.

    Recall is NaN where the class has no object.
    """
    mine = (stats["label"] == label) & (stats["mark"] != IGNORED)
    right = np.cumsum(stats["mark"][mine] == RIGHT, dtype=np.float64)
    objects = float(stats["positives"][:, label].sum())
    recall = right / objects if objects else np.full(len(right), np.nan)
    return recall, right / np.arange(1, len(right) + 1), stats["score"][mine]


def rescore(images: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """`mAP` (11-point) and `mAP_area` at the matched IoU, each (R,), for image weights (R, images).

    `images` is what `match` returned. NaN when no class has a weighted object.
    """
    found = class_ap(images, weights)
    return {f"m{name}": mean_of_classes(value) for name, value in found.items()}


def mean_of_classes(value: np.ndarray) -> np.ndarray:
    """The mean of each row (R, C), NaN left out, added in order; NaN of nothing else."""
    valid = ~np.isnan(value)
    total = np.cumsum(np.where(valid, value, 0.0), 1)[:, -1]
    return np.divide(total, valid.sum(1), out=np.full(len(value), np.nan), where=valid.any(1))
