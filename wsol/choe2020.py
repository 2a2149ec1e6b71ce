"""The protocol of Choe et al. (CVPR 2020), with the conventions of their code, `wsolevaluation`, behind one name.

From the same score maps as the paper's protocol; where the two differ, this is what `choe2020` means:
- a map is enlarged to 224² by OpenCV's *bicubic*, scaled to [0, 1], and cut down to 256 grey values, value · 255;
- thresholds are 0, .001 … .999; foreground is the grey values *above* int(threshold · 255). So 1,000 thresholds have
  255 answers at most, and every one of them is computed once;
- regions are 8-connected; the largest is that whose outline encloses most (cv2.contourArea, holes filled), of equals
  the first that cv2.findContours lists. "Any contour" counts the outlines of holes too;
- a box is x, y, min(x + width, 223), min(y + height, 223), compared with true boxes in whole pixels (cut down, not
  rounded) by the IoU whose widths are x1 − x0 + 1; IoU *≥* .3, .5, .7 is right;
- the best threshold for the whole data set is taken, on the scored images themselves, for each IoU anew.
Their test images are squeezed to 224² without a crop. Here the frame is what the maps show: the test crop of a
training of ours, the whole image for anyone's maps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from backbench.common.data.decode import threaded
from backbench.common.metrics.localisation import (
    BOX_IOUS,
    GREYS,
    best_centred_box,
    iou,
    pack_right,
    threshold_curve,
)

SIDE = 224
THRESHOLDS = np.arange(0, 1, 0.001)  # as their code makes them
GREY_OF_THRESHOLD = (THRESHOLDS * GREYS).astype(np.int64)


@dataclass(frozen=True)
class Sweep:
    """All boxes of one map: `box` int64 (m, 4) at the m contours of its distinct foregrounds.

    `level` (m,) is the lowest grey value with that foreground, in rising order; `largest` bool (m,), one a level. A map
    without foreground has none.
    """

    level: np.ndarray
    box: np.ndarray
    largest: np.ndarray


def scaled_map(image: np.ndarray) -> np.ndarray:
    """Scores (h, w) → float32 (224, 224) in [0, 1], 0 and 1 among them; a constant map is all 0."""
    image = np.array(image, np.float32)
    if image.shape != (SIDE, SIDE):
        image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    image -= image.min()
    highest = image.max()
    return image / highest if highest > 0 else image


def grey_map(scaled: np.ndarray) -> np.ndarray:
    """Scores in [0, 1] → uint8, cut down."""
    return (scaled * 255).astype(np.uint8)


def sweep(scaled: np.ndarray) -> Sweep:
    """The boxes at every threshold of a map (H, W) of scores in [0, 1].

    Only grey values that occur are visited, each in the window that its foreground covers; while the foreground is one
    region without a hole, that window is its box and nothing is traced.
    """
    grey = grey_map(scaled)
    height, width = grey.shape
    present = np.flatnonzero(np.bincount(grey.ravel(), minlength=256))[:-1]  # none lies above the highest
    splits = np.bincount(grey[_splitting(scaled)], minlength=256)[present] > 0
    windows = zip(*_extents(grey.max(0), present), *_extents(grey.max(1), present))
    levels, boxes, largest, single = [], [], [], True
    for level, (x0, x1, y0, y1), changed in zip(present.tolist(), windows, splits.tolist()):
        first, found = 0, [(x0, y0, x1 - x0, y1 - y0)]
        if changed or not single:
            mask = cv2.threshold(grey[y0:y1, x0:x1], level, 255, cv2.THRESH_BINARY)[1]
            contours = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE, offset=(x0, y0))[0]
            single = len(contours) == 1
            if not single:
                areas = [cv2.contourArea(contour) for contour in contours]
                first, found = areas.index(max(areas)), [cv2.boundingRect(contour) for contour in contours]
        levels += [level] * len(found)
        largest += [number == first for number in range(len(found))]
        boxes += found
    box = np.array(boxes, np.int64).reshape(-1, 4)
    box[:, 2:] = np.minimum(box[:, :2] + box[:, 2:], (width - 1, height - 1))
    return Sweep(np.array(levels, np.int64), box, np.array(largest, bool))


def _splitting(scaled: np.ndarray) -> np.ndarray:
    """bool (H, W): the pixels that change the number of regions or of holes when they sink below the threshold.

    Pixels sink one after the other, lower ones first, of equals the first in reading order; what each does to the
    topology (8-connected regions, 4-connected holes) can be read from which of its 8 neighbours sink later.
    """
    height, width = scaled.shape
    framed = np.full((height + 2, width + 2), -1, np.float32)
    framed[1:-1, 1:-1] = scaled
    code = np.zeros((height, width), np.uint8)
    for bit, (dy, dx) in enumerate(AROUND):
        other = framed[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        later = (other >= scaled) if (dy, dx) > (0, 0) else (other > scaled)
        code |= later.view(np.uint8) << np.uint8(bit)
    return _SPLITS[code]


def _splits(code: int) -> bool:
    """Whether taking a pixel away changes the topology, given which of the neighbours AROUND it stay (bits)."""
    stay = [bool(code >> bit & 1) for bit in range(8)]
    # Yokoi's connectivity number of 8-connected foreground; the neighbours at the sides have even places
    gone = [not s for s in stay]
    return sum(gone[k] - (gone[k] and gone[k + 1] and gone[(k + 2) % 8]) for k in (0, 2, 4, 6)) != 1


AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))  # one round, from the right
_SPLITS = np.array([_splits(code) for code in range(256)])


def _extents(highest: np.ndarray, levels: np.ndarray) -> tuple[list[int], list[int]]:
    """First and one past the last place where `highest` lies above each level."""
    above = highest > levels[:, None]
    return above.argmax(1).tolist(), (len(highest) - above[:, ::-1].argmax(1)).tolist()


def pixel_truths(truths: np.ndarray, side: int) -> np.ndarray:
    """True boxes (k, 4) in a `side` × `side` frame → int64 (k, 4) in one of 224, cut down to whole pixels."""
    # a share times a side misses a whole number by a rounding error, which must not cost a pixel
    return np.floor(np.asarray(truths, np.float64).reshape(-1, 4) * (SIDE / side) + 1e-6).astype(np.int64)


def best_by_grey(found: Sweep, truths: np.ndarray) -> np.ndarray:
    """float64 (2, 255): of the largest and of any contour, the best IoU with a true box at grey values 0 … 254.

    A map without foreground has the box 0, 0, 0, 0, as in their code; without a true box all are 0.
    """
    best = np.zeros((2, GREYS))
    if not len(truths):
        return best
    if not len(found.level):
        return best + iou(np.zeros(4), truths, plus_one=True).max()
    overlap = iou(found.box[:, None], truths[None], plus_one=True).max(1)
    starts = np.flatnonzero(np.diff(found.level, prepend=-1))
    runs = np.diff(np.append(found.level[starts], GREYS))
    best[0] = np.repeat(overlap[found.largest], runs)
    best[1] = np.repeat(np.maximum.reduceat(overlap, starts), runs)
    return best


def right_by_grey(best: np.ndarray) -> np.ndarray:
    """What `common.metrics.localisation` keeps of an image: (…, 2, 255) best IoUs → packed uint8 (…, 4, 32)."""
    right = [best[..., :1, :] >= BOX_IOUS[1], *(best[..., 1:, :] >= wanted for wanted in BOX_IOUS)]
    return pack_right(np.concatenate(right, -2))


def sweep_maps(maps: Sequence[np.ndarray]) -> list[Sweep]:
    """`sweep` of score maps (n, h, w)."""
    return threaded(lambda image: sweep(scaled_map(image)), maps, desc="thresholds")


def box_statistics(sweeps: Sequence[Sweep], truths: Sequence[np.ndarray]) -> np.ndarray:
    """Packed uint8 (n, 4, 32) of maps' sweeps against true boxes from `pixel_truths`."""
    best = [best_by_grey(found, boxes) for found, boxes in zip(sweeps, truths)]
    return right_by_grey(np.array(best).reshape(-1, 2, GREYS))


def curves(right_by_grey: np.ndarray) -> dict[str, Any]:
    """The threshold curves of Choe et al.'s protocol, and where each is highest, by grey value / 255."""
    named = zip(
        ("largest, IoU .5", *(f"any, IoU {wanted:g}" for wanted in BOX_IOUS)),
        np.moveaxis(right_by_grey, 1, 0),
    )
    found = {name: threshold_curve(packed)[0] for name, packed in named}
    return {
        "threshold": (np.arange(GREYS) / GREYS).round(5).tolist(),
        "curves": {name: values.round(6).tolist() for name, values in found.items()},
        "best threshold": {name: int(values.argmax()) / GREYS for name, values in found.items()},
        "chosen": "on the scored images themselves, as the protocol does",
    }


def centred_box_accuracies(
    chosen_on: Sequence[np.ndarray], truths: Sequence[np.ndarray], side: int
) -> list[float]:
    """The share of images that a centred box is right on by Choe et al.'s rules, at IoU .3, .5 and .7."""
    pixels = [pixel_truths(truth, side) for truth in truths]
    shares = []
    for wanted in BOX_IOUS:
        box = pixel_truths(best_centred_box(chosen_on, side, right=wanted), side)[0]
        best = [iou(box, truth, plus_one=True).max(initial=0) for truth in pixels]
        shares.append(float((np.array(best) >= wanted).mean()))
    return shares


def pixel_counts(scaled: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pixels of a map (224, 224) in [0, 1] by score: int64 (2, 1002), of the object and of the background.

    Bins [0, .001), [.001, .002) … [.999, 1), [1, 2), [2, 3), as in their code. `mask`: 1 object, 0 background, any
    other value ignored.
    """
    edges = np.append(THRESHOLDS, (1.0, 2.0))
    places = np.searchsorted(edges, scaled.ravel(), side="right") - 1
    return np.stack([np.bincount(places[(mask == kind).ravel()], minlength=len(edges)) for kind in (1, 0)])


def pixel_average_precision(counts: np.ndarray) -> float:
    """PxAP of summed `pixel_counts` (2, 1002): the area under precision over recall; NaN without an object's pixel."""
    right, wrong = counts[:, ::-1].cumsum(1)
    if not right[-1]:
        return float("nan")
    precision = np.divide(right, right + wrong, out=np.zeros(len(right)), where=right + wrong > 0)
    return float((precision[1:] * np.diff(right / right[-1])).sum())
