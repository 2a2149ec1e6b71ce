"""Training views for detectors: SSD's augmentation with its geometry first, and Faster R-CNN's resize and flip.

SSD's policy (Liu et al., ECCV 2016, section 2.2) is photometric distortion, expansion on a mean canvas, an IoU
crop, a flip and a resize to 300 × 300. Its geometry is one window in the frame of the source image, possibly
reaching outside it; so that is sampled first, the image is resampled once, straight to the small size, and only
the small image is distorted. What lies outside the source is the mean, which the distortion never touches.
Two faults of ssd.pytorch are absent: its IoU constraint never fires, and .5 is missing from its overlaps; the policy
"ssd_pytorch" has them, for those who compare (its colours are still clipped to 0–255, which its own are not).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")

import cv2
import numpy as np

cv2.setNumThreads(0)  # one image at a time: the loader's processes are the parallelism

KEEP, ANY = -1.0, 0.0
OVERLAPS = (KEEP, 0.1, 0.3, 0.5, 0.7, 0.9, ANY)
PYTORCH_OVERLAPS = (KEEP, 0.1, 0.3, 0.7, 0.9, ANY)
TRIES = 50
CHANNEL_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


@dataclass(frozen=True)
class View:
    """What a training view shows: a window in pixels of the source image (whole numbers), perhaps mirrored."""

    left: int
    top: int
    width: int
    height: int
    flip: bool = False
    keep: np.ndarray | None = None  # bool (k,): the boxes that stay; None: all
    overlap: float = KEEP  # the crop's mode, for statistics


@dataclass(frozen=True)
class Distortion:
    """A photometric distortion; values that change nothing by default. Hue in degrees, the rest on 0–255."""

    brightness: float = 0.0
    contrast: float = 1.0
    contrast_first: bool = True
    saturation: float = 1.0
    hue: float = 0.0
    channels: tuple[int, int, int] = (0, 1, 2)


def sample_view(
    width: int,
    height: int,
    boxes: np.ndarray,
    rng: np.random.Generator,
    expand: float = 4.0,
    crop: bool = True,
    policy: str = "ssd",
) -> View:
    """Sample SSD's geometry: with probability ½ a canvas 1 to `expand` times as large, an IoU crop, a flip.

    `boxes` float (k, 4) corners in pixels of the `width` × `height` image. `expand` 1 and `crop` False switch
    those parts off; `policy`: see `sample_crop`.
    """
    left = top = 0
    canvas_w, canvas_h = width, height
    if rng.random() < 0.5 and expand > 1:
        ratio = rng.uniform(1, expand)
        canvas_w, canvas_h = int(width * ratio), int(height * ratio)
        left = int(rng.uniform(0, width * ratio - width))
        top = int(rng.uniform(0, height * ratio - height))
    shifted = boxes + np.array([left, top, left, top], np.float64)
    window, keep, overlap = (0, 0, canvas_w, canvas_h), None, KEEP
    if crop:
        window, keep, overlap = sample_crop(canvas_w, canvas_h, shifted, rng, policy)
    flip = bool(rng.random() < 0.5)
    x0, y0, x1, y1 = window
    return View(x0 - left, y0 - top, x1 - x0, y1 - y0, flip, keep, overlap)


def sample_crop(
    width: int, height: int, boxes: np.ndarray, rng: np.random.Generator, policy: str = "ssd"
) -> tuple[tuple[int, int, int, int], np.ndarray | None, float]:
    """SSD's IoU crop: (window x0, y0, x1, y1; bool (k,) boxes that stay, None all; the overlap asked for).

    An overlap of OVERLAPS is drawn; up to 50 windows of .3 to 1 of each side, aspect ½ to 2, are tried. One is
    taken if some box has at least that IoU with it and some box's centre lies in it; else another overlap is
    drawn. An image without boxes takes the first window of a fit aspect. The policy "ssd_pytorch" draws from its own
    overlaps and then asks for none of them: its test reads `overlap.min() < min_iou and max_iou < overlap.max()`, and
    its max_iou is infinite.
    """
    options = OVERLAPS if policy == "ssd" else PYTORCH_OVERLAPS
    while True:
        overlap = options[rng.integers(len(options))]
        if overlap == KEEP:
            return (0, 0, width, height), None, KEEP
        w, h = rng.uniform(0.3, 1, (2, TRIES)) * [[width], [height]]
        x, y = rng.random((2, TRIES)) * [width - w, height - h]
        windows = np.stack([x, y, x + w, y + h], 1).astype(np.int64)
        good = (h >= 0.5 * w) & (h <= 2 * w)
        good &= (windows[:, 2] > windows[:, 0]) & (windows[:, 3] > windows[:, 1])
        inside = np.zeros((TRIES, 0), bool)
        if len(boxes):
            inside = _centres_inside(boxes, windows)
            good &= inside.any(1)
            if policy == "ssd":
                good &= _iou(windows, boxes).max(1) >= overlap
        if good.any():
            taken = int(good.argmax())
            return tuple(windows[taken].tolist()), inside[taken], overlap


def _centres_inside(boxes: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """bool (t, k): does the centre of box k lie in window t."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centre > windows[:, None, :2]) & (centre < windows[:, None, 2:])).all(2)


def _iou(windows: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU (t, k) of windows (t, 4) and boxes (k, 4)."""
    low = np.maximum(windows[:, None, :2], boxes[:, :2])
    high = np.minimum(windows[:, None, 2:], boxes[:, 2:])
    inter = (high - low).clip(0).prod(2)
    return inter / (
        (windows[:, 2:] - windows[:, :2]).prod(1)[:, None] + (boxes[:, 2:] - boxes[:, :2]).prod(1) - inter
    )


def view_boxes(view: View, boxes: np.ndarray) -> np.ndarray:
    """The boxes that stay in a view, clipped to it, as shares of it: float32 (k', 4)."""
    if view.keep is not None:
        boxes = boxes[view.keep]
    size = np.array([view.width, view.height] * 2, np.float64)
    seen = ((boxes - np.array([view.left, view.top] * 2)) / size).clip(0, 1)
    if view.flip:
        seen = np.stack([1 - seen[:, 2], seen[:, 1], 1 - seen[:, 0], seen[:, 3]], 1)
    return seen.astype(np.float32)


def warp(image: np.ndarray, view: View, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Resample the part of the image that a view shows, once, bilinearly, without the flip.

    Returns the visible part as it lies in the `size` × `size` view, uint8 (h, w, 3), and its corner (x, y) there.
    """
    rows, columns = image.shape[:2]
    scale = np.array([view.width, view.height]) / size
    corner = np.array([view.left, view.top])
    if (corner >= 0).all() and view.left + view.width <= columns and view.top + view.height <= rows:
        part = image[view.top : view.top + view.height, view.left : view.left + view.width]
        return cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR), (0, 0)
    # pixels of the view whose centre falls on the source
    first = np.ceil(-corner / scale - 0.5).clip(0, size).astype(int)
    last = np.ceil((np.array([columns, rows]) - corner) / scale - 0.5).clip(0, size).astype(int)
    shape = np.maximum(last - first, 1)
    offset = (first + 0.5) * scale - 0.5 + corner
    matrix = np.array([[scale[0], 0, offset[0]], [0, scale[1], offset[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    part = cv2.warpAffine(image, matrix, tuple(shape.tolist()), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return part, (int(first[0]), int(first[1]))


def sample_distortion(rng: np.random.Generator) -> Distortion:
    """Sample SSD's photometric distortion: each of its five parts with probability ½ (caffe's data layer)."""
    on = rng.random(6) < 0.5
    return Distortion(
        brightness=rng.uniform(-32, 32) if on[0] else 0.0,
        contrast=rng.uniform(0.5, 1.5) if on[1] else 1.0,
        contrast_first=bool(on[2]),
        saturation=rng.uniform(0.5, 1.5) if on[3] else 1.0,
        hue=rng.uniform(-18, 18) if on[4] else 0.0,
        channels=CHANNEL_ORDERS[rng.integers(6)] if on[5] else (0, 1, 2),
    )


def distort(image: np.ndarray, distortion: Distortion) -> np.ndarray:
    """Apply a distortion to a uint8 RGB image (h, w, 3), clipping to 0–255 after each part as caffe does."""
    d, levels = distortion, np.arange(256, dtype=np.float64)
    table = _clip(levels + d.brightness)
    if d.contrast_first:
        table = _clip(table * d.contrast)
    image = _look_up(image, table)
    if d.saturation != 1.0 or d.hue != 0.0:
        hue = (np.arange(256) + d.hue * 256 / 360) % 256
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
        tables = np.stack([np.rint(hue) % 256, _clip(levels * d.saturation), levels], 1).astype(np.uint8)
        image = cv2.cvtColor(cv2.LUT(hsv, tables[None]), cv2.COLOR_HSV2RGB_FULL)
    if not d.contrast_first:
        image = _look_up(image, _clip(levels * d.contrast))
    return image if d.channels == (0, 1, 2) else cv2.merge([cv2.extractChannel(image, c) for c in d.channels])


def _clip(levels: np.ndarray) -> np.ndarray:
    return np.rint(levels).clip(0, 255)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    return image if np.array_equal(table, np.arange(256)) else cv2.LUT(image, table.astype(np.uint8))


def ssd_view(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    fill: Sequence[int],
    size: int = 300,
    expand: float = 4.0,
    crop: bool = True,
    photometric: bool = True,
    policy: str = "ssd",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One training view by SSD's policy.

    `image` uint8 RGB (H, W, 3); `boxes` (k, 4) corners in its pixels; `fill` the mean colour, 0–255. Returns the
    view, uint8 (size, size, 3), the boxes that stay as shares of it, float32 (k', 4), and their labels.
    """
    view = sample_view(image.shape[1], image.shape[0], boxes, rng, expand, crop, policy)
    part, (x, y) = warp(image, view, size)
    if photometric:
        part = distort(part, sample_distortion(rng))
    h, w = part.shape[:2]
    if view.flip:
        part, x = cv2.flip(part, 1), size - x - w
    if (h, w) != (size, size):
        margins = (y, size - y - h, x, size - x - w)
        part = cv2.copyMakeBorder(part, *margins, cv2.BORDER_CONSTANT, value=tuple(float(v) for v in fill))
    kept = labels if view.keep is None else labels[view.keep]
    return part, view_boxes(view, boxes), kept


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bilinear resize without antialiasing, as both base codes do (cv2.resize)."""
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def scaled_size(width: int, height: int, short: int, longest: int) -> tuple[int, int]:
    """Width and height after scaling so that the short side is `short`, but the long one at most `longest`."""
    scale = min(short / min(width, height), longest / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def frcnn_view(
    image: np.ndarray, boxes: np.ndarray, rng: np.random.Generator | None, short: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Faster R-CNN's view: scaled, and mirrored with probability ½ when there is an `rng`.

    Returns the image uint8 (h, w, 3) and the boxes in its pixels, float32 (k, 4).
    """
    rows, columns = image.shape[:2]
    width, height = scaled_size(columns, rows, short, longest)
    image = resize(image, width, height)
    boxes = (boxes * np.array([width / columns, height / rows] * 2)).astype(np.float32)
    if rng is not None and rng.random() < 0.5:
        image = cv2.flip(image, 1)
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    return image, boxes
