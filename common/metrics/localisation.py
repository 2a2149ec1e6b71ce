"""Localisation of one object class an image: IoU, the WSOL scores, and what no image at all can score."""

from collections.abc import Mapping, Sequence

import numpy as np

from common.metrics.classification import weighted_mean

IOU_RIGHT = 0.5  # a box is right when its IoU with a true box is *above* this (paper, appendix B)


def iou(first: np.ndarray, second: np.ndarray, plus_one: bool = False) -> np.ndarray:
    """Intersection over union of boxes (…, 4) x0, y0, x1, y1, broadcast against each other → float64 (…).

    Boxes are half-open: the width is x1 − x0. With `plus_one` corners are pixels that belong to the box and
    the width is x1 − x0 + 1, as in the VOC development kit and in `wsolevaluation`. Two boxes without area
    have IoU 0.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    one = float(plus_one)
    low, high = np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])
    both = np.prod(np.clip(high - low + one, 0, None), -1)
    areas = [np.prod(np.clip(box[..., 2:] - box[..., :2] + one, 0, None), -1) for box in (first, second)]
    union = areas[0] + areas[1] - both
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def best_iou(boxes: np.ndarray, truths: Sequence[np.ndarray], plus_one: bool = False) -> np.ndarray:
    """Each image's largest IoU between its one box and its true boxes: (n, 4), n × (k, 4) → float64 (n,).

    An image without a true box has IoU 0: it counts, and cannot be right.
    """
    counts = [len(truth) for truth in truths]
    owner = np.repeat(np.arange(len(truths)), counts)
    best = np.zeros(len(truths))
    if len(owner):
        overlap = iou(np.asarray(boxes)[owner], np.concatenate([t for t in truths if len(t)]), plus_one)
        np.maximum.at(best, owner, overlap)
    return best


def rescore(images: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """ "Top-1 Loc", "GT-known Loc" and "top-1", as fractions, each (R,); weights (R, n) or None.

    Per image: `rank` of the true class (0: highest score), `iou_top1` and `iou_gt`, the largest IoU of the
    box from the predicted and from the true class's map. Top-1 Loc asks for the right class and IoU > .5
    (paper, appendix B); GT-known Loc for IoU > .5 when the class is told.
    """
    top1 = np.asarray(images["rank"]) == 0
    return {
        "Top-1 Loc": weighted_mean(top1 & (np.asarray(images["iou_top1"]) > IOU_RIGHT), weights),
        "GT-known Loc": weighted_mean(np.asarray(images["iou_gt"]) > IOU_RIGHT, weights),
        "top-1": weighted_mean(top1, weights),
    }


def shuffled_chance(
    labels: np.ndarray,
    truths: Sequence[np.ndarray],
    predicted: np.ndarray,
    boxes_top1: np.ndarray,
    boxes_gt: np.ndarray,
    rng: np.random.Generator,
    rounds: int = 20,
) -> dict[str, float]:
    """The scores when every prediction, class and box together, goes to a random other image.

    labels, predicted: int (n,); boxes: (n, 4); truths: n × (k, 4). Mean over `rounds` permutations.
    """
    scores = []
    for _ in range(rounds):
        order = rng.permutation(len(labels))
        shuffled = {
            "rank": (predicted[order] != labels).astype(np.int64),
            "iou_top1": best_iou(boxes_top1[order], truths),
            "iou_gt": best_iou(boxes_gt[order], truths),
        }
        scores.append(rescore(shuffled))
    return {name: float(np.mean([score[name][0] for score in scores])) for name in scores[0]}


def best_centred_box(truths: Sequence[np.ndarray], side: float, steps: int = 32) -> np.ndarray:
    """The centred box of a `side` × `side` frame that is right (IoU > .5) on most images → float64 (4,).

    Searched over `steps` widths × `steps` heights; the first of equals in mean IoU breaks ties. Choose it on
    boxes that are not scored, or say that it was. Without a single true box it is the whole frame.
    """
    whole = np.array([0.0, 0.0, side, side])
    counts = np.array([len(truth) for truth in truths], np.int64)
    if not counts.sum():
        return whole
    owner = np.repeat(np.arange(len(truths)), counts)
    flat = np.concatenate([truth for truth in truths if len(truth)])
    sizes = side * np.arange(1, steps + 1) / steps
    best, found = (-1.0, -1.0), whole
    for width in sizes:
        low_x, low_y = np.broadcast_arrays((side - width) / 2, (side - sizes) / 2)
        boxes = np.stack([low_x, low_y, side - low_x, side - low_y], -1)
        overlap = np.zeros((len(truths), steps))
        np.maximum.at(overlap, owner, iou(flat[:, None], boxes[None]))
        right, mean = (overlap > IOU_RIGHT).mean(0), overlap.mean(0)
        pick = np.lexsort((-mean, -right))[0]
        if (right[pick], mean[pick]) > best:
            best, found = (right[pick], mean[pick]), boxes[pick]
    return found
