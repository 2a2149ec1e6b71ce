"""Localisation of one object class an image: IoU, the WSOL scores, and what no image at all can score."""

from collections.abc import Mapping, Sequence

import numpy as np

from backbench.common.metrics.classification import weighted_mean

IOU_RIGHT = 0.5  # a box is right when its IoU with a true box is *above* this (paper, appendix B)
BOX_IOUS = (0.3, 0.5, 0.7)  # what MaxBoxAccV2 averages over; there IoU *at* the value is right
GREYS = 255  # thresholds that tell 256 grey values apart


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
    """The scores as fractions, each (R,); weights (R, n) or None.

    Per image: `rank` of the true class (0: highest score), `iou_top1` and `iou_gt`, the largest IoU of the
    box from the predicted and from the true class's map. "Top-1 Loc" asks for the right class and IoU > .5
    (paper, appendix B); "GT-known Loc" for IoU > .5 when the class is told; "top-1" for the class alone.

    With `num_classes` (any shape, one value) above 5, "Top-5 Loc": the true class is among the five best and the
    box of *its* map has IoU > .5, ILSVRC's rule for five guesses of a class and a box each; and "top-5".

    With `right_by_grey` (n, 4, 32), see `pack_right`, "MaxBoxAcc" and "MaxBoxAccV2" (Choe et al. 2020): the mean over
    the images at the one threshold that is best for them all, of the largest contour at IoU .5; of any contour, the
    mean of that at IoU .3, .5 and .7.
    """
    rank, known = np.asarray(images["rank"]), np.asarray(images["iou_gt"]) > IOU_RIGHT
    top1 = rank == 0
    scores = {
        "Top-1 Loc": weighted_mean(top1 & (np.asarray(images["iou_top1"]) > IOU_RIGHT), weights),
        "GT-known Loc": weighted_mean(known, weights),
        "top-1": weighted_mean(top1, weights),
    }
    if np.max(images.get("num_classes", 0), initial=0) > 5:
        scores["Top-5 Loc"] = weighted_mean((rank < 5) & known, weights)
        scores["top-5"] = weighted_mean(rank < 5, weights)
    if "right_by_grey" in images:
        largest, *any_contour = (
            threshold_curve(images["right_by_grey"][:, row], weights).max(1)
            for row in range(1 + len(BOX_IOUS))
        )
        scores |= {"MaxBoxAcc": largest, "MaxBoxAccV2": np.mean(any_contour, axis=0)}
    return scores


def pack_right(right: np.ndarray) -> np.ndarray:
    """bool (…, 4, 255) → uint8 (…, 4, 32): whether a box is right at each of 255 thresholds.

    Rows: the largest contour at IoU .5, then any contour at .3, .5, .7.
    """
    return np.packbits(right, axis=-1)


def threshold_curve(packed: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Share of images that are right at each threshold: one row's bits uint8 (n, 32) → float64 (R, 255)."""
    right = np.unpackbits(packed, axis=-1, count=GREYS).astype(np.float64)
    weights = np.ones((1, len(right))) if weights is None else np.asarray(weights, np.float64)
    total = weights.sum(1, keepdims=True)
    found = weights @ right
    return np.divide(found, total, out=np.full(found.shape, np.nan), where=total > 0)


def shuffled_chance(
    labels: np.ndarray,
    truths: Sequence[np.ndarray],
    predicted: np.ndarray,
    boxes_top1: np.ndarray,
    boxes_gt: np.ndarray,
    rng: np.random.Generator,
    rounds: int = 20,
    num_classes: int = 0,
) -> dict[str, float]:
    """The scores when every prediction, class and box together, goes to a random other image.

    labels: int (n,); predicted: int (n, k), best first, or (n,); boxes: (n, 4); truths: n × (k, 4). Mean over
    `rounds` permutations.
    """
    predicted, scores = np.asarray(predicted).reshape(len(labels), -1), []
    for _ in range(rounds):
        order = rng.permutation(len(labels))
        hit = predicted[order] == np.asarray(labels)[:, None]
        shuffled = {
            "rank": np.where(hit.any(1), hit.argmax(1), hit.shape[1]),
            "iou_top1": best_iou(boxes_top1[order], truths),
            "iou_gt": best_iou(boxes_gt[order], truths),
            "num_classes": np.array(num_classes),
        }
        scores.append(rescore(shuffled))
    return {name: float(np.mean([score[name][0] for score in scores])) for name in scores[0]}


def best_centred_box(
    truths: Sequence[np.ndarray], side: float, steps: int = 32, right: float = IOU_RIGHT
) -> np.ndarray:
    """The centred box of a `side` × `side` frame whose IoU is above `right` on most images → float64 (4,).

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
        share, mean = (overlap > right).mean(0), overlap.mean(0)
        pick = np.lexsort((-mean, -share))[0]
        if (share[pick], mean[pick]) > best:
            best, found = (share[pick], mean[pick]), boxes[pick]
    return found
