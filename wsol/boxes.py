"""From score maps to boxes, and true boxes to the frame they are compared in.

The rules (paper section 4.2 and appendix B; where the paper is silent, the rule says so):
- a map is upsampled bilinearly to the frame, then scaled to [0, 1] by its own minimum and maximum;
- foreground is what lies *above* threshold × maximum;
- of the 8-connected foreground regions the one with most pixels counts; of equals the topmost, then leftmost
  (silent);
- the box is the tightest half-open one: x0, y0 inclusive, x1, y1 one past the last pixel;
- a constant map says nothing and a map without foreground has no region: both give the box 0, 0, 0, 0, whose
  IoU with anything is 0 (silent; `wsolevaluation` does the same).
"""

import cv2
import numpy as np


def upsample(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, half-pixel centres: (h, w) → float32 (size, size)."""
    return cv2.resize(np.asarray(image, np.float32), (size, size), interpolation=cv2.INTER_LINEAR)


def largest_region_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The tightest half-open box around the largest 8-connected region of a bool mask (H, W)."""
    mask = mask.view(np.uint8)
    # most maps hold one region; tracing its outline costs a fifth of labelling every pixel
    outlines, nesting = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if not outlines:
        return 0, 0, 0, 0
    regions = np.flatnonzero(nesting[0, :, 3] < 0)  # the other outlines are holes
    if len(regions) == 1:
        left, top, width, height = cv2.boundingRect(outlines[regions[0]])
    else:
        stats = cv2.connectedComponentsWithStats(mask, connectivity=8)[2]
        found = stats[1:].tolist()  # left, top, width, height, pixels of each region
        left, top, width, height, _ = min(found, key=lambda s: (-s[4], s[1], s[0], s[3], s[2]))
    return left, top, left + width, top + height


def boxes_from_maps(maps: np.ndarray, size: int, thresholds: float | np.ndarray) -> np.ndarray:
    """Boxes in a `size` × `size` frame: maps (n, h, w) → float64 (n, 4).

    With an array of t thresholds: (n, t, 4).
    """
    wanted = np.atleast_1d(np.asarray(thresholds, np.float64)).tolist()
    boxes = np.zeros((len(maps), len(wanted), 4))
    for number in np.flatnonzero(maps.min((1, 2)) < maps.max((1, 2))):
        image = upsample(maps[number], size)
        low, high, *_ = cv2.minMaxLoc(image)
        for column, threshold in enumerate(wanted):  # the same as threshold of the maximum after min-max
            boxes[number, column] = largest_region_box(image > low + threshold * (high - low))
    return boxes if np.ndim(thresholds) else boxes[:, 0]


def to_crop(shares: np.ndarray, resize: int, crop: int) -> np.ndarray:
    """True boxes in the pixels of the test crop: shares of the image (k, 4) → float64 (m, 4), m ≤ k.

    The image is squeezed to `resize`² and its central `crop`² is what the network sees: x → x · resize −
    (resize − crop) / 2, clipped to 0 … crop. A box of which nothing is left is dropped, for nothing in the
    crop can find it; an image that loses all of its boxes stays in the score, as a miss.
    """
    boxes = np.asarray(shares, np.float64).reshape(-1, 4) * resize - _offset(resize, crop)
    boxes = boxes.clip(0, crop)
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


def from_crop(boxes: np.ndarray, resize: int, crop: int) -> np.ndarray:
    """Boxes in the pixels of the test crop (…, 4) as shares of the image."""
    return (np.asarray(boxes, np.float64) + _offset(resize, crop)) / resize


def crop_window(resize: int, crop: int) -> np.ndarray:
    """The part of the image that the test crop shows: float64 (4,) x0, y0, x1, y1 in shares."""
    return from_crop(np.array([0, 0, crop, crop]), resize, crop)


def _offset(resize: int, crop: int) -> int:
    return round((resize - crop) / 2)  # as common.data.decode.centre_crop and torchvision
