"""Detection: matching, mining, priors, both detectors, augmentation, the command lines."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection._utils import SSDMatcher
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD as TorchvisionSSD
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou

from common.backbone import save_backbone
from common.data import open_detection
from common.data.types import DetectionSet
from common.engine.loader import MicroBatches, Positions, make_loader
from common.errors import UserError
from common.metrics.average_precision import Boxes
from common.recipe import override
from common.trunk import Classifier, Trunk, normalise
from detection import augment, evaluate, finetune
from detection.data import TrainViews
from detection.detect import predict
from detection.faster_rcnn import FasterRCNN, parameter_groups
from detection.matching import corners, decode, encode, hard_negatives, match_priors, ssd300_priors
from detection.recipes import RECIPES
from detection.results import image_index, read_results, write_results
from detection.ssd import SSD300, detect, ssd_loss

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMOKE_SSD, SMOKE_FRCNN = RECIPES["ssd300"]["smoke"], RECIPES["faster_rcnn"]["smoke"]


def voc_generator():
    """torchvision's prior generator with VOC's scales."""
    scales = [size / 300 for size in (30, 60, 111, 162, 213, 264, 315)]
    return DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]], scales=scales, steps=[8, 16, 32, 64, 100, 300]
    )


def random_objects(rng, n, most):
    """Padded boxes (n, most, 4) and labels (n, most), -1 behind the last object; the first image has none."""
    corner = rng.uniform(0, 0.7, (n, most, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.02, 0.3, (n, most, 2))], 2).astype(np.float32)
    labels = rng.integers(0, 5, (n, most))
    for i in range(n):
        labels[i, rng.integers(0, most + 1) if i else 0 :] = -1
    return torch.from_numpy(boxes), torch.from_numpy(labels)


class TestPriors:
    def test_count_and_parity_with_torchvision(self):
        priors = ssd300_priors()
        assert priors.shape == (8732, 4)
        maps = [torch.zeros(1, 1, k, k) for k in (38, 19, 10, 5, 3, 1)]
        theirs = voc_generator()(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), maps)[0] / 300
        different = ((corners(priors) - theirs).abs() > 1e-6).any(1)
        assert different.sum() == 114  # centres at 1.0133, which torchvision does not clamp
        assert (
            (theirs[different][:, [0, 2]].mean(1) > 1)
            .logical_or(theirs[different][:, [1, 3]].mean(1) > 1)
            .all()
        )

    def test_coder_inverts(self):
        priors, rng = ssd300_priors(), torch.Generator().manual_seed(0)
        low = torch.rand(8732, 2, generator=rng) * 0.5
        boxes = torch.cat([low, low + 0.01 + torch.rand(8732, 2, generator=rng) * 0.4], 1)
        torch.testing.assert_close(decode(encode(boxes, priors), priors), boxes, atol=1e-5, rtol=1e-4)


class TestMatching:
    @staticmethod
    def loop(boxes, labels, priors, threshold):
        """ssd.pytorch's match for one image, object after object."""
        owner, overlap = torch.zeros(len(priors), dtype=torch.long), torch.full((len(priors),), -1.0)
        classes = torch.zeros(len(priors), dtype=torch.long)
        if len(boxes):
            iou = box_iou(boxes, corners(priors))
            for p in range(len(priors)):
                for t in range(len(boxes)):
                    if iou[t, p] > overlap[p]:
                        owner[p], overlap[p] = t, iou[t, p]
            for t in range(len(boxes)):
                best = int(iou[t].argmax())
                owner[best], overlap[best] = t, 2.0
            for p in range(len(priors)):
                if overlap[p] >= threshold:
                    classes[p] = labels[owner[p]] + 1
        return owner, classes

    def test_equals_the_loop(self):
        rng, priors = np.random.default_rng(0), ssd300_priors()[::37].contiguous()
        boxes, labels = random_objects(rng, 6, 5)
        boxes[3, 1] = boxes[3, 0]  # two objects want one prior
        labels[3, :2] = torch.tensor([1, 4])
        offsets, classes = match_priors(boxes, labels, priors)
        for i in range(6):
            valid = labels[i] >= 0
            owner, expected = self.loop(boxes[i, valid], labels[i, valid], priors, 0.5)
            assert torch.equal(classes[i], expected)
            positive = expected > 0
            assert torch.equal(offsets[i, positive], encode(boxes[i][owner], priors)[positive])
        assert not classes[0].any() and classes[1:].any()

    def test_last_object_wins_a_conflict(self):
        priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]])
        boxes = torch.tensor([[[0.3, 0.3, 0.7, 0.7], [0.3, 0.3, 0.7, 0.65]]])
        assert match_priors(boxes, torch.tensor([[0, 1]]), priors)[1].tolist() == [[2, 0]]

    def test_equals_torchvision(self):
        rng, priors = np.random.default_rng(1), ssd300_priors()
        boxes, labels = random_objects(rng, 8, 6)
        _, classes = match_priors(boxes, labels, priors)
        for i in range(1, 8):
            valid = labels[i] >= 0
            if valid.any():
                owner = SSDMatcher(0.5)(box_iou(boxes[i, valid], corners(priors)))
                assert torch.equal(classes[i], torch.where(owner >= 0, labels[i, valid][owner] + 1, 0))


class TestHardNegatives:
    @staticmethod
    def loop(loss, positive, ratio):
        """A full stable sort an image."""
        mask = torch.zeros_like(positive)
        for i in range(len(loss)):
            free = torch.nonzero(~positive[i])[:, 0]
            order = loss[i, free].sort(descending=True, stable=True).indices
            mask[i, free[order[: int(ratio * positive[i].sum())]]] = True
        return mask

    @pytest.mark.parametrize("ties", [False, True])
    def test_equals_the_loop(self, ties):
        rng = torch.Generator().manual_seed(0)
        for _ in range(20):
            loss = torch.rand(5, 300, generator=rng)
            if ties:
                loss = (loss * 6).round() / 6
            positive = torch.rand(5, 300, generator=rng) < torch.tensor([0.0, 0.01, 0.1, 0.3, 0.9])[:, None]
            expected = self.loop(loss, positive, 3)
            assert torch.equal(hard_negatives(loss, positive), expected)
            assert not expected[0].any() and not (expected & positive).any()


def half_trunk(seed=0):
    torch.manual_seed(seed)
    return Trunk("resnet18_half")


class TestSSD:
    @pytest.mark.parametrize("arch", ["resnet18_half", "resnet50"])
    @pytest.mark.parametrize("topology", ["layer3", "layer4_dilated"])
    def test_topologies(self, arch, topology):
        model = SSD300(Trunk(arch), 4, MEAN, STD, topology, extra_width=0.25).eval()
        with torch.inference_mode():
            offsets, logits = model(torch.zeros(1, 300, 300, 3, dtype=torch.uint8))
        assert offsets.shape == (1, 8732, 4) and logits.shape == (1, 8732, 5)
        assert ("layer4" in model.trunk.channels) == (topology == "layer4_dilated")

    def test_refuses_other_sizes(self):
        with pytest.raises(ValueError, match="300 × 300"):
            SSD300(half_trunk(), 4, MEAN, STD, extra_width=0.25)(
                torch.zeros(2, 330, 330, 3, dtype=torch.uint8)
            )

    def test_order_of_outputs_is_that_of_the_priors(self):
        model = SSD300(half_trunk(), 4, MEAN, STD, extra_width=0.25).eval()
        for k, head in enumerate(model.heads):  # bias: map, shape, value
            shapes = head.out_channels // 9
            nn.init.zeros_(head.weight)
            head.bias.data = torch.arange(shapes * 9.0) + 1000 * k
        with torch.inference_mode():
            offsets, logits = model(torch.zeros(1, 300, 300, 3, dtype=torch.uint8))
        out = torch.cat([offsets, logits], -1)[0]
        assert out[1].tolist() == [9.0 + v for v in range(9)]  # map 0, first cell, second shape
        assert out[4].tolist() == [float(v) for v in range(9)]  # map 0, second cell, first shape
        assert out[38 * 38 * 4 + 5].tolist() == [1000 + 45.0 + v for v in range(9)]

    def test_loss_equals_torchvision(self):
        generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(5)
        boxes, labels = random_objects(rng, 4, 5)
        labels[1, 0] = 2
        offsets = torch.randn(4, 8732, 4, generator=generator)
        logits = torch.randn(4, 8732, 6, generator=generator)
        priors = ssd300_priors()
        ours = ssd_loss(offsets, logits, boxes, labels, priors)
        theirs = TorchvisionSSD(nn.Identity(), voc_generator(), (300, 300), 6, head=nn.Identity())
        targets, matched = [], []
        for i in range(4):
            valid = labels[i] >= 0
            targets.append({"boxes": boxes[i, valid], "labels": labels[i, valid] + 1})
            iou = box_iou(boxes[i, valid], corners(priors))
            matched.append(SSDMatcher(0.5)(iou) if valid.any() else torch.full((8732,), -1))
        outputs = {"bbox_regression": offsets, "cls_logits": logits}
        expected = theirs.compute_loss(targets, outputs, [corners(priors)] * 4, matched)
        torch.testing.assert_close(ours["loss_box"], expected["bbox_regression"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours["loss_class"], expected["classification"], rtol=1e-4, atol=1e-5)

    def test_no_objects_no_nan(self):
        offsets, logits = torch.randn(2, 8732, 4), torch.randn(2, 8732, 3, requires_grad=True)
        losses = ssd_loss(offsets, logits, torch.zeros(2, 1, 4), torch.full((2, 1), -1), ssd300_priors())
        assert losses["loss_box"] == 0 and losses["loss_class"] == 0
        losses["loss_class"].backward()
        assert torch.isfinite(logits.grad).all()

    def test_detect_equals_one_nms_a_class(self):
        generator = torch.Generator().manual_seed(0)
        priors = ssd300_priors().double()
        offsets, logits = (
            torch.randn(3, 8732, 4, generator=generator).double(),  # no equal scores
            3 * torch.randn(3, 8732, 4, generator=generator).double(),
        )
        found = detect(offsets, logits, priors, 0.3, 0.45, 50, 40)
        for i in range(3):
            boxes = decode(offsets[i], priors).clamp(0, 1)
            scores, kept = logits[i].softmax(-1), []
            for c in range(3):
                score, index = scores[:, c + 1].sort(descending=True)
                index = index[score > 0.3][:40]
                keep = batched_nms(boxes[index], scores[index, c + 1], torch.zeros(len(index)), 0.45)
                kept += [(float(scores[k, c + 1]), c, *boxes[k].tolist()) for k in index[keep]]
            kept = sorted(kept, reverse=True)[:50]
            assert found[i]["scores"].tolist() == [k[0] for k in kept]
            assert found[i]["labels"].tolist() == [k[1] for k in kept]
            torch.testing.assert_close(found[i]["boxes"], torch.tensor([k[2:] for k in kept]).double())


FRCNN = {"anchors": (32, 64), "roi_size": 5, "rpn_batch": 32, "roi_batch": 16, "top": 20, "score": 0.05}


class Tail(nn.Module):
    """layer4 and the mean, as torchvision wants a box head."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, x):
        return self.trunk.run(x, "layer4", "layer4").mean((2, 3))


class Body(nn.Module):
    """Stem to layer3, as torchvision wants a backbone."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.out_channels = trunk, trunk.channels["layer3"]

    def forward(self, x):
        return self.trunk.run(x, stop="layer3")


class TestFasterRCNN:
    @staticmethod
    def targets():
        boxes = torch.tensor([[10.0, 12, 60, 70], [40, 30, 90, 80]])
        return [
            {"boxes": boxes, "labels": torch.tensor([1, 3])},
            {"boxes": boxes[:0], "labels": torch.zeros(0).long()},
        ]

    def twins(self):
        """Our model and torchvision's FasterRCNN of the same modules."""
        trunk = half_trunk()
        ours = FasterRCNN(trunk, 3, MEAN, STD, **FRCNN)
        theirs = TorchvisionFasterRCNN(
            Body(trunk),
            rpn_anchor_generator=AnchorGenerator(((32, 64),), ((0.5, 1.0, 2.0),)),
            rpn_head=ours.rpn.head,
            rpn_batch_size_per_image=32,
            rpn_pre_nms_top_n_train=12000,
            rpn_pre_nms_top_n_test=6000,
            rpn_post_nms_top_n_train=2000,
            rpn_post_nms_top_n_test=300,
            box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2),
            box_head=Tail(trunk),
            box_predictor=ours.roi.box_predictor,
            box_batch_size_per_image=16,
            box_score_thresh=0.05,
            box_nms_thresh=0.3,
            box_detections_per_img=20,
            min_size=96,
            max_size=112,
            image_mean=(0, 0, 0),
            image_std=(1, 1, 1),
        )
        theirs.transform.size_divisible = 16
        return ours, theirs

    def test_equals_torchvision(self):
        ours, theirs = self.twins()
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2, 96, 112, 3), dtype=torch.uint8, generator=generator)
        as_float = list(normalise(images, MEAN, STD))
        with torch.no_grad():
            for model, inputs in ((ours, (images, [(96, 112)] * 2)), (theirs, (as_float,))):
                model.train()
                if model is theirs:
                    model.transform.eval()  # else it draws a size from the same generator
                torch.manual_seed(1)
                losses = model(*inputs, self.targets())
                if model is ours:
                    mine = losses
            names = {"loss_class": "loss_classifier", "loss_box": "loss_box_reg"}
            for name, value in mine.items():
                torch.testing.assert_close(value, losses[names.get(name, name)], rtol=1e-4, atol=1e-5)
            nn.init.normal_(ours.roi.box_predictor.cls_score.weight, std=0.3)
            found, expected = ours.eval()(images, [(96, 112)] * 2), theirs.eval()(as_float)
        for a, b in zip(found, expected):
            assert len(a["scores"]) > 3
            torch.testing.assert_close(a["scores"], b["scores"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(a["boxes"], b["boxes"], rtol=1e-3, atol=1e-2)
            assert torch.equal(a["labels"], b["labels"] - 1)

    def test_bottleneck_and_gradients(self):
        model = FasterRCNN(Trunk("resnet50"), 3, MEAN, STD, **FRCNN).train()
        images = torch.randint(0, 256, (2, 64, 80, 3), dtype=torch.uint8)
        targets = [{"boxes": torch.tensor([[5.0, 5, 40, 50]]), "labels": torch.tensor([2])}] * 2
        losses = model(images, [[64, 80], [60, 70]], targets)
        assert set(losses) == {"loss_class", "loss_box", "loss_objectness", "loss_rpn_box_reg"}
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_padding_is_the_mean(self):
        model = FasterRCNN(half_trunk(), 3, MEAN, STD, **FRCNN).eval()
        image = torch.randint(0, 256, (1, 96, 112, 3), dtype=torch.uint8)
        other = image.clone()
        other[:, 80:], other[:, :, 96:] = 7, 200
        with torch.inference_mode():
            a, b = (model(x, [[80, 96]])[0] for x in (image, other))
        assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["scores"], b["scores"])

    def test_no_decay_on_biases(self):
        model = FasterRCNN(half_trunk(), 3, MEAN, STD, **FRCNN)
        model.trunk.freeze("layer1")
        decayed, plain = parameter_groups(model)
        assert plain["weight_decay"] == 0.0 and all(p.ndim > 1 for p in decayed["params"])
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(decayed["params"]) + len(plain["params"]) == len(trained)
        biases = [p for name, p in model.named_parameters() if name.endswith("bias") and p.requires_grad]
        assert {id(p) for p in biases} <= {id(p) for p in plain["params"]}


def square_image(box, width=400, height=300):
    """A white box on black."""
    image = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = box
    image[y0:y1, x0:x1] = 255
    return image


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

    def test_statistics_equal_a_loop(self):
        """Accepted modes, crop area and surviving boxes against the policy written try by try."""
        boxes = np.array([[20, 30, 120, 200], [150, 40, 380, 290], [300, 10, 330, 40]], np.float64)

        def loop(rng):
            while True:
                overlap = augment.OVERLAPS[rng.integers(7)]
                if overlap == augment.KEEP:
                    return 0, 1.0, 3
                for _ in range(50):
                    w, h = rng.uniform(0.3 * 400, 400), rng.uniform(0.3 * 300, 300)
                    if not 0.5 <= h / w <= 2:
                        continue
                    x, y = rng.uniform(0, 400 - w), rng.uniform(0, 300 - h)
                    rect = np.array([int(x), int(y), int(x + w), int(y + h)], float)
                    low, high = np.maximum(boxes[:, :2], rect[:2]), np.minimum(boxes[:, 2:], rect[2:])
                    inter = (high - low).clip(0).prod(1)
                    area = (rect[2:] - rect[:2]).prod()
                    if (inter / ((boxes[:, 2:] - boxes[:, :2]).prod(1) + area - inter)).max() < overlap:
                        continue
                    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
                    inside = ((centre > rect[:2]) & (centre < rect[2:])).all(1)
                    if inside.any():
                        return augment.OVERLAPS.index(overlap), area / 120000, inside.sum()

        def ours(rng):
            window, keep, overlap = augment.sample_crop(400, 300, boxes, rng)
            area = (window[2] - window[0]) * (window[3] - window[1]) / 120000
            return augment.OVERLAPS.index(overlap), area, 3 if keep is None else keep.sum()

        n, rngs = 1000, (np.random.default_rng(1), np.random.default_rng(2))
        a, b = (np.array([f(rng) for _ in range(n)], float) for f, rng in zip((ours, loop), rngs))
        shares = [np.bincount(x[:, 0].astype(int), minlength=7) / n for x in (a, b)]
        assert np.abs(shares[0] - shares[1]).max() < 4.5 * np.sqrt(2 * 0.15 * 0.85 / n)
        for k in (1, 2):
            error = np.sqrt(a[:, k].var() / n + b[:, k].var() / n)
            assert abs(a[:, k].mean() - b[:, k].mean()) < 4.5 * error

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


@pytest.fixture
def devkit(tmp_path):
    """A small VOC-layout folder with two classes of its own."""
    root, rng = tmp_path / "shapes", np.random.default_rng(0)
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    names = [f"{k:06d}" for k in range(10)]
    for k, name in enumerate(names):
        width, height = ((80, 60), (60, 80))[k % 2]
        image, objects = rng.integers(0, 60, (height, width, 3)).astype(np.uint8), []
        for label in ("ball", "cube")[: 1 + k % 2]:
            x, y = rng.integers(0, 30, 2)
            image[y : y + 25, x : x + 25] = (220, 40, 40) if label == "ball" else (40, 40, 220)
            objects.append(
                f"<object><name>{label}</name><difficult>{int(k == 9 and label == 'cube')}</difficult><bndbox>"
                f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 25}</xmax><ymax>{y + 25}</ymax></bndbox></object>"
            )
        cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), image[..., ::-1])
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation>{size}{''.join(objects)}</annotation>"
        )
    (root / "ImageSets/Main/trainval.txt").write_text("\n".join(names[:6]))
    (root / "ImageSets/Main/test.txt").write_text("\n".join(names[6:]))
    return root


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    """A backbone file with statistics that count as trained."""
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_QUIET", "1")
    torch.manual_seed(0)
    model = Classifier(Trunk("resnet18_half"), 3)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    facts = {
        "arch": "resnet18_half",
        "num_classes": 3,
        "method": "cutmix",
        "seed": 5,
        "mean": MEAN,
        "std": STD,
    }
    save_backbone(
        tmp_path / "cutmix.pt", model, **{k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}
    )
    return tmp_path / "cutmix.pt"


class TestLoading:
    @pytest.mark.parametrize("recipe", [SMOKE_SSD, SMOKE_FRCNN])
    def test_equal_for_any_workers(self, devkit, backbone, recipe):
        data = TrainViews(open_detection(f"voc:{devkit}")[0], recipe, MEAN)

        def run(workers):
            batches = MicroBatches(data, 4, 2, seed=3)
            return list(make_loader(batches, Positions(0, 3, range(2)), workers, pin=False))

        def flat(value):
            if isinstance(value, torch.Tensor):
                return [value]
            return [t for v in value for t in flat(v)] if isinstance(value, list) else [torch.tensor(0)]

        for a, b in zip(run(0), run(2), strict=True):
            assert a["ids"] == b["ids"]
            for key in a.keys() - {"ids"}:
                assert all(torch.equal(x, y) for x, y in zip(flat(a[key]), flat(b[key]), strict=True))

    def test_difficult_objects(self, devkit, backbone):
        train_set = open_detection(f"voc:{devkit},train=test,test=trainval")[0]
        rng = np.random.default_rng
        for keep, count in ((True, 2), (False, 1)):
            recipe = replace(SMOKE_FRCNN, keep_difficult=keep)
            batch = TrainViews(train_set, recipe, MEAN).batch([3], [rng(0)])
            assert batch["ids"][0].startswith("000009 (smallest box: ") and len(batch["labels"][0]) == count


class TestResults:
    def test_round_trip(self, tmp_path):
        rng = np.random.default_rng(0)
        low = rng.uniform(0, 50, (20, 2))
        found = Boxes(
            np.sort(rng.integers(0, 3, 20)),
            rng.integers(0, 4, 20),
            np.hstack([low, low + rng.uniform(1, 90, (20, 2))]),
            rng.random(20),
        )
        write_results(tmp_path / "r.json", found, ["a", "b/c", "d"])
        back = read_results(tmp_path / "r.json", ["a", "b/c", "d"], 4)
        assert np.array_equal(back.image, found.image) and np.array_equal(back.label, found.label)
        assert (
            np.abs(back.box - found.box).max() <= 0.0101 and np.abs(back.score - found.score).max() <= 5.1e-7
        )
        first = json.loads((tmp_path / "r.json").read_text())[0]
        assert set(first) == {"image_id", "category_id", "bbox", "score"}
        assert first["category_id"] == found.label[0] + 1

    def test_empty(self, tmp_path):
        nothing = Boxes(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))
        write_results(tmp_path / "r.json", nothing, ["a"])
        assert len(read_results(tmp_path / "r.json", ["a"], 1).image) == 0

    def test_image_numbers(self):
        assert image_index(["000012", "2008_000001"])[12] == 0
        assert image_index(["000012", "2008_000001"])[2008000001] == 1
        assert 1 not in image_index(["a1", "b1"])

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            (
                {"image_id": "x", "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1},
                "detection 1: image or key 'x'",
            ),
            ({"image_id": "a", "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}, "category_id is 1 to 2"),
            ({"image_id": "a", "category_id": 1, "bbox": [0, 0, -1, 1], "score": 1}, "not negative"),
            ({"image_id": "a", "category_id": 1, "bbox": [0, 0, 1], "score": 1}, "detection 1"),
            ({"image_id": "a", "category_id": 1, "bbox": [0, 0, 1, 1]}, "image or key 'score'"),
            (["a"], "detection 1"),
        ],
    )
    def test_bad_entries(self, tmp_path, entry, message):
        (tmp_path / "r.json").write_text(json.dumps([entry]))
        with pytest.raises(UserError, match=message):
            read_results(tmp_path / "r.json", ["a"], 2)


class TestEvaluate:
    def perfect(self, devkit):
        """Truth as COCO results of every test image, difficult objects included."""
        images = open_detection(f"voc:{devkit}")[1]
        return images, [
            {
                "image_id": name,
                "category_id": int(c) + 1,
                "bbox": [*b[:2].tolist(), *(b[2:] - b[:2]).tolist()],
                "score": 0.9,
            }
            for name, boxes, labels in zip(images.ids, images.boxes, images.labels)
            for b, c in zip(boxes, labels)
        ]

    def test_json_and_text_files(self, devkit, backbone, tmp_path, capsys):
        images, entries = self.perfect(devkit)
        entries[0]["bbox"] = [0, 0, 5, 5]  # a miss
        (tmp_path / "found.json").write_text(json.dumps(entries))
        folder = tmp_path / "comp"
        folder.mkdir()
        for c, name in enumerate(images.classes):
            lines = []
            for e in entries:
                x, y, w, h = e["bbox"]
                if e["category_id"] == c + 1:
                    lines.append(f"{e['image_id']} {e['score']} {x + 1} {y + 1} {x + w} {y + h}")
            (folder / f"comp3_det_test_{name}.txt").write_text("\n".join(lines))
        scores = []
        for source in (tmp_path / "found.json", folder):
            arguments = [
                "--devkit",
                str(devkit),
                "--detections",
                str(source),
                "--json",
                str(tmp_path / "s.json"),
            ]
            assert evaluate.main(arguments) == 0
            scores.append(json.loads((tmp_path / "s.json").read_text()))
        assert scores[0] == scores[1]
        assert images.classes == ["ball", "cube"]
        assert scores[0]["AP_11point"]["cube"] == pytest.approx(1)
        assert scores[0]["classes"]["cube"]["objects"] == 1  # one of the two is difficult
        # of four balls three are found, one of the four claims is wrong and all tie: order of the images
        assert scores[0]["AP_area"]["ball"] == pytest.approx(3 / 4 * 3 / 4)
        assert scores[0]["mAP_area"] == pytest.approx((1 + 9 / 16) / 2)
        assert "| ball | " in capsys.readouterr().out

    def test_bad_input(self, devkit, backbone, tmp_path):
        base = ["--devkit", str(devkit), "--detections"]
        with pytest.raises(UserError, match="no such file"):
            evaluate.main([*base, str(tmp_path / "none.json")])
        with pytest.raises(UserError, match="no file comp3_det_test_CLASS"):
            evaluate.main([*base, str(tmp_path)])
        (tmp_path / "comp3_det_test_ball.txt").write_text("000006 0.5 1 2 3\n")
        with pytest.raises(UserError, match=r"line 1: .* is not"):
            evaluate.main([*base, str(tmp_path)])
        (tmp_path / "comp3_det_test_ball.txt").write_text("000001 0.5 1 2 3 4\n")
        with pytest.raises(UserError, match="'000001' is not in the split"):
            evaluate.main([*base, str(tmp_path)])


def finetune_args(devkit, backbone, out, detector, *more):
    return [
        *(
            "--backbone",
            str(backbone),
            "--detector",
            detector,
            "--data",
            f"voc:{devkit}",
            "--recipe",
            "smoke",
        ),
        *("--set", "iterations=2", "--set", "precision=fp32", "--out", str(out), "--device", "cpu", *more),
    ]


class TestFinetune:
    @pytest.mark.parametrize("detector", ["ssd300", "faster_rcnn"])
    def test_writes_its_cell_and_repeats_exactly(self, devkit, backbone, tmp_path, detector, capsys):
        files = {}
        for out in ("a", "b"):
            assert finetune.main(finetune_args(devkit, backbone, tmp_path / out, detector)) == 0
            (cell,) = (tmp_path / out).rglob("cell.json")
            names = ("predictions.json", "images.npz", "report.json")
            files[out] = [(cell.parent / name).read_bytes() for name in names]
        assert files["a"] == files["b"]
        data = json.loads(cell.read_text())
        assert (
            cell.parent.relative_to(tmp_path / "b")
            .as_posix()
            .startswith(f"shapes/detection/{detector}/smoke")
        )
        assert set(data["metrics"]) == set(data["chance"]) == {"mAP", "mAP_area", "AP", "AP50", "AP75"} and data["primary"] == "mAP"
        report = (cell.parent / "report.md").read_text()
        assert "| ball |" in report and "chance" in report
        before = cell.stat().st_mtime_ns
        assert finetune.main(finetune_args(devkit, backbone, tmp_path / "b", detector)) == 0
        assert "finished already" in capsys.readouterr().out and cell.stat().st_mtime_ns == before

    @pytest.mark.parametrize("detector", ["ssd300", "faster_rcnn"])
    def test_killed_and_resumed_is_the_same_to_the_byte(
        self, devkit, backbone, tmp_path, detector, monkeypatch
    ):
        more = ("--set", "iterations=3", "--set", "save_every=0")
        assert finetune.main(finetune_args(devkit, backbone, tmp_path / "a", detector, *more)) == 0
        make, calls = finetune.STEPS[detector], []

        def dies(recipe):
            step = make(recipe)

            def dying(*args):
                calls.append(1)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return step(*args)

            return dying

        with monkeypatch.context() as patch:
            patch.setitem(finetune.STEPS, detector, dies)
            with pytest.raises(KeyboardInterrupt):
                finetune.main(finetune_args(devkit, backbone, tmp_path / "b", detector, *more))
        (resume,) = (tmp_path / "b").rglob("resume.pt")
        assert torch.load(resume)["iteration"] == 2
        assert finetune.main(finetune_args(devkit, backbone, tmp_path / "b", detector, *more)) == 0
        for name in ("predictions.json", "images.npz"):
            files = [next((tmp_path / out).rglob(name)).read_bytes() for out in "ab"]
            assert files[0] == files[1]

    def test_scratch_freezes_nothing(self, devkit, backbone, tmp_path):
        arguments = finetune_args(devkit, "scratch:resnet18_half", tmp_path / "s", "faster_rcnn")
        assert finetune.main([*arguments, "--set", "freeze_bn=true"]) == 0
        (cell,) = (tmp_path / "s").rglob("cell.json")
        assert any("nothing is frozen" in note for note in json.loads(cell.read_text())["notes"])

    def test_recipe_fields(self):
        for recipes in RECIPES.values():
            assert list(recipes) == ["smoke", "tiny", "mini", "paper"]
            for recipe in recipes.values():
                recipe.check()
        for setting in ("expand=0.5", "nms=0", "freeze=layer9", "top=0"):
            with pytest.raises(UserError):
                override(SMOKE_SSD, [setting])
        with pytest.raises(UserError):
            override(SMOKE_FRCNN, ["short_side=2000"])


def test_predictions_do_not_depend_on_the_batch(devkit, backbone):
    images: DetectionSet = open_detection(f"voc:{devkit}")[1]
    torch.manual_seed(0)
    recipe = replace(SMOKE_FRCNN, precision="fp32", score=0.0)
    model = FasterRCNN(half_trunk(), 2, MEAN, STD, anchors=(22, 35), roi_size=5, roi_batch=16, top=5)
    a, b = (predict(model, images, replace(recipe, test_batch=n), torch.device("cpu")) for n in (1, 4))
    assert np.array_equal(a.image, b.image) and np.allclose(a.score, b.score, atol=1e-5)
