"""SSD's augmentation against its policy written step by step, and Faster R-CNN's views."""

import cv2
import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from backbench.detection import augment


def square_image(box, width=400, height=300):
    """A white box on black."""
    image = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = box
    image[y0:y1, x0:x1] = 255
    return image


def crop_loop(width, height, boxes, rng, options, constrained):
    """SSD's IoU crop try by try: the mode's number, the window, how many boxes stay."""
    while True:
        mode = rng.integers(len(options))
        if options[mode] is None:
            return mode, (0, 0, width, height), len(boxes)
        for _ in range(50):
            w, h = rng.uniform(0.3 * width, width), rng.uniform(0.3 * height, height)
            if not 0.5 <= h / w <= 2:
                continue
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            rect = np.array([int(x), int(y), int(x + w), int(y + h)], float)
            low, high = np.maximum(boxes[:, :2], rect[:2]), np.minimum(boxes[:, 2:], rect[2:])
            inter = (high - low).clip(0).prod(1)
            area = (rect[2:] - rect[:2]).prod()
            iou = inter / ((boxes[:, 2:] - boxes[:, :2]).prod(1) + area - inter)
            if constrained and iou.max() < options[mode]:
                continue
            centre = (boxes[:, :2] + boxes[:, 2:]) / 2
            inside = ((centre > rect[:2]) & (centre < rect[2:])).all(1)
            if inside.any():
                return mode, rect, inside.sum()


class TestAugmentation:
    def test_boxes_follow_the_pixels(self):
        box, kinds = (150, 90, 260, 210), set()
        image, boxes, labels = square_image(box), np.array([box], np.float32), np.array([3])
        for seed in range(60):
            view, seen, kept = augment.ssd_view(
                image, boxes, labels, np.random.default_rng(seed), (0, 0, 0), photometric=False
            )
            assert view.shape == (300, 300, 3) and kept.tolist() == [3]
            x0, y0, x1, y1 = seen[0] * 300
            bright = np.argwhere(view[..., 0] > 127)
            low, high = bright.min(0), bright.max(0) + 1
            assert np.abs([low[1] - x0, low[0] - y0, high[1] - x1, high[0] - y1]).max() <= 1.0
            kinds.add((x1 - x0 > 90, x0 > 150))
        assert len(kinds) > 2

    def test_fill_stays_the_mean_and_photometrics_touch_the_rest(self):
        image = np.full((300, 400, 3), 90, np.uint8)
        boxes, touched = np.array([[100, 100, 200, 200]], np.float32), 0
        for seed in range(40):
            view, _, _ = augment.ssd_view(
                image, boxes, np.array([0]), np.random.default_rng(seed), (10, 200, 30)
            )
            rest = view[(view != (10, 200, 30)).any(2)]
            assert len(rest) and (rest == rest[0]).all()
            touched += tuple(rest[0].tolist()) != (90, 90, 90)
        assert touched > 10

    def test_crop_constraints_hold(self):
        rng, modes = np.random.default_rng(0), {}
        boxes = np.array([[20, 30, 120, 200], [150, 40, 380, 290], [300, 10, 330, 40]], np.float64)
        for _ in range(1500):
            window, keep, overlap = augment.sample_crop(400, 300, boxes, rng)
            modes[overlap] = modes.get(overlap, 0) + 1
            x0, y0, x1, y1 = window
            assert 0 <= x0 < x1 <= 400 and 0 <= y0 < y1 <= 300
            if overlap == augment.KEEP:
                assert window == (0, 0, 400, 300) and keep is None
                continue
            centre = (boxes[:, :2] + boxes[:, 2:]) / 2
            inside = ((centre > [x0, y0]) & (centre < [x1, y1])).all(1)
            assert inside.any() and np.array_equal(keep, inside)
            iou = box_iou(torch.tensor(boxes), torch.tensor([window], dtype=torch.float64))
            assert iou.max() >= overlap
            assert (y1 - y0 + 1) / (x1 - x0) >= 0.5 and (y1 - y0) / (x1 - x0 + 1) <= 2
        assert set(modes) == set(augment.OVERLAPS)

    @pytest.mark.parametrize("policy", ["ssd", "ssd_pytorch"])
    def test_statistics_equal_a_loop(self, policy):
        """Modes taken, crops' area and aspect, boxes that stay: against the policy written try by try."""
        boxes = np.array([[20, 30, 120, 200], [150, 40, 380, 290], [300, 10, 330, 40]], np.float64)
        options = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0) if policy == "ssd" else (None, 0.1, 0.3, 0.7, 0.9, 0.0)
        n, rngs = 1000, (np.random.default_rng(1), np.random.default_rng(2))
        width, height = 400, 300

        def ours(rng):
            window, keep, overlap = augment.sample_crop(width, height, boxes, rng, policy)
            mode = options.index(None if overlap == augment.KEEP else overlap)
            return mode, window, 3 if keep is None else keep.sum()

        def row(mode, window, kept):
            x0, y0, x1, y1 = window
            return mode, (x1 - x0) * (y1 - y0) / (width * height), (y1 - y0) / (x1 - x0), kept

        crops = (
            lambda rng: row(*ours(rng)),
            lambda rng: row(*crop_loop(width, height, boxes, rng, options, policy == "ssd")),
        )
        a, b = (np.array([crop(rng) for _ in range(n)], float) for crop, rng in zip(crops, rngs))
        shares = [np.bincount(x[:, 0].astype(int), minlength=len(options)) / n for x in (a, b)]
        assert np.abs(shares[0] - shares[1]).max() < 4.5 * np.sqrt(2 * 0.15 * 0.85 / n)
        for k in (1, 2, 3):
            error = np.sqrt(a[:, k].var() / n + b[:, k].var() / n)
            assert abs(a[:, k].mean() - b[:, k].mean()) < 4.5 * error

    def test_ssd_pytorch_never_asks_for_overlap(self):
        """Its crops miss the overlap they name; the paper's policy never does (test_crop_constraints_hold)."""
        rng, below = np.random.default_rng(0), 0
        boxes = np.array([[20, 30, 120, 200], [150, 40, 380, 290]], np.float64)
        for _ in range(300):
            window, _, overlap = augment.sample_crop(400, 300, boxes, rng, "ssd_pytorch")
            assert overlap in augment.PYTORCH_OVERLAPS and overlap != 0.5
            iou = box_iou(torch.tensor(boxes), torch.tensor([window], dtype=torch.float64)).max()
            below += overlap > 0 and float(iou) < overlap
        assert below > 60

    def test_pixels_equal_a_plain_reference(self):
        """Distort in float, paste on the canvas, crop, flip, resize: caffe's order, one full-size step at a time."""
        rng = np.random.default_rng(0)
        image = cv2.GaussianBlur(rng.integers(0, 256, (240, 320, 3)).astype(np.uint8), (0, 0), 9)
        image = cv2.normalize(image, None, 20, 235, cv2.NORM_MINMAX)
        boxes, fill = np.array([[60, 50, 220, 190]], np.float64), np.array([120, 110, 100])

        def reference(view, d):
            x = image.astype(np.float32)
            x = np.clip(x + d.brightness, 0, 255)
            if d.contrast_first:
                x = np.clip(x * d.contrast, 0, 255)
            hsv = cv2.cvtColor(x / 255, cv2.COLOR_RGB2HSV)
            hsv[..., 1] = np.clip(hsv[..., 1] * d.saturation, 0, 1)
            hsv[..., 0] = (hsv[..., 0] + d.hue) % 360
            x = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255
            if not d.contrast_first:
                x = np.clip(x * d.contrast, 0, 255)
            x = x[..., d.channels]
            canvas = np.tile(fill.astype(np.float32), (1400, 1800, 1))
            canvas[600:840, 700:1020] = x
            part = canvas[600 + view.top :, 700 + view.left :][: view.height, : view.width]
            part = part[:, ::-1] if view.flip else part
            return cv2.resize(np.ascontiguousarray(part), (300, 300), interpolation=cv2.INTER_LINEAR)

        for seed in range(25):
            got, _, _ = augment.ssd_view(image, boxes, np.array([0]), np.random.default_rng(seed), fill)
            again = np.random.default_rng(seed)
            view = augment.sample_view(320, 240, boxes, again)
            expected = reference(view, augment.sample_distortion(again))
            error = np.abs(got - expected).max(2)
            # the fill's edge is sharp here and blurred over a pixel there; the rest is 8-bit rounding
            assert np.quantile(error, 0.9) <= 6 and error.mean() < 3

    def test_images_without_objects(self):
        none = np.zeros((0, 4), np.float32)
        image = square_image((0, 0, 10, 10))
        for seed in range(10):
            view, seen, kept = augment.ssd_view(
                image, none, np.zeros(0, int), np.random.default_rng(seed), (0, 0, 0)
            )
            assert view.shape == (300, 300, 3) and seen.shape == (0, 4) and len(kept) == 0

    def test_frcnn_view(self):
        assert augment.scaled_size(500, 375, 600, 1000) == (800, 600)
        assert augment.scaled_size(500, 200, 600, 1000) == (1000, 400)
        box, flips = (40, 30, 140, 150), 0
        for seed in range(8):
            view, seen = augment.frcnn_view(
                square_image(box), np.array([box], np.float32), np.random.default_rng(seed), 150, 1000
            )
            bright = np.argwhere(view[..., 0] > 127)
            expected = [*bright.min(0)[::-1], *(bright.max(0) + 1)[::-1]]
            assert view.shape == (150, 200, 3) and np.abs(seen[0] - expected).max() <= 1
            flips += seen[0, 0] > 100
        assert 0 < flips < 8
