"""SSD300: priors, matching, mining, topologies, loss, detections."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.detection._utils import SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD as TorchvisionSSD
from torchvision.models.detection.ssd import SSDHead
from torchvision.ops import batched_nms, box_iou

from backbench.common.backbones.resnet import Trunk
from backbench.detection.matching import (
    _overlaps,
    corners,
    decode,
    encode,
    hard_negatives,
    match_priors,
    ssd300_priors,
)
from backbench.detection.ssd import SSD300, detect, ssd_loss

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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

    def test_overlaps_are_torchvisions(self):
        rng, priors = np.random.default_rng(2), corners(ssd300_priors())
        boxes, _ = random_objects(rng, 3, 4)
        boxes[0, 0, 2:] = boxes[0, 0, :2]  # no area, as padding has none
        expected = torch.stack([box_iou(one, priors) for one in boxes])
        assert torch.equal(_overlaps(boxes, priors), expected)

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


class GivenPriors(nn.Module):
    """Our priors where torchvision makes its own, which differ in 114 boxes."""

    def __init__(self, priors):
        super().__init__()
        self.priors = 300 * corners(priors)

    def forward(self, images, features):
        return [self.priors] * len(images.image_sizes)

    def num_anchors_per_location(self):
        return [4, 6, 6, 6, 4, 4]


class Maps(nn.Module):
    """The six maps of our SSD300, as torchvision wants a backbone; images come normalised."""

    def __init__(self, model):
        super().__init__()
        self.trunk, self.extras, self.l2norm, self.deep = (
            model.trunk,
            model.extras,
            model.l2norm,
            model.taps[1],
        )

    def forward(self, x):
        taps = self.trunk.features(x, ("layer2", self.deep))
        maps = [self.l2norm(taps["layer2"]), taps[self.deep]]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        return {str(k): m for k, m in enumerate(maps)}

    def train(self, mode=True):  # batch norm as in the test's own call
        return super().train(False)


def torchvision_twin(model):
    """torchvision's SSD around the same modules, our head's filters sorted into its two heads."""
    shapes, widths = [4, 6, 6, 6, 4, 4], [head.in_channels for head in model.heads]
    head = SSDHead(widths, shapes, model.classes + 1)
    for k, ours in enumerate(model.heads):
        for part, rows in (
            (head.regression_head, slice(0, 4)),
            (head.classification_head, slice(4, None)),
        ):
            weight = ours.weight.view(shapes[k], -1, *ours.weight.shape[1:])[:, rows]
            part.module_list[k].weight.data = weight.flatten(0, 1).clone()
            part.module_list[k].bias.data = ours.bias.view(shapes[k], -1)[:, rows].flatten().clone()
    return TorchvisionSSD(
        Maps(model),
        GivenPriors(model.priors),
        (300, 300),
        model.classes + 1,
        image_mean=list(MEAN),
        image_std=list(STD),
        head=head,
        score_thresh=0.3,
        nms_thresh=0.45,
        detections_per_img=50,
    )


class TestSSD:
    def test_dilated_body_equals_torchvision(self):
        """layer4's map is that of torchvision's resnet50 with its stride replaced by dilation."""
        body = resnet50(weights=None, replace_stride_with_dilation=[False, False, True]).eval()
        model = SSD300(Trunk("resnet50"), 4, MEAN, STD, "layer4_dilated", extra_width=0.25).eval()
        model.trunk.load_state_dict(body.state_dict(), strict=False)
        x, seen = torch.randn(1, 3, 160, 160), []
        body.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with torch.inference_mode():
            body(x)
            ours = model.trunk.features(x, ["layer4"])["layer4"]
        assert ours.shape == (1, 2048, 10, 10)
        torch.testing.assert_close(ours, seen[0])

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

    @pytest.mark.parametrize("topology", ["layer3", "layer4_dilated"])
    def test_equals_torchvision(self, topology):
        """Losses and detections of torchvision's SSD with the same weights, mapped into its heads."""
        torch.manual_seed(0)
        ours = SSD300(half_trunk(), 3, MEAN, STD, topology, extra_width=0.25, head_std=0.01)
        theirs = torchvision_twin(ours)
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(0, 256, (2, 300, 300, 3), dtype=torch.uint8, generator=generator)
        boxes, labels = random_objects(np.random.default_rng(3), 2, 3)
        labels = labels.clamp(max=2)
        labels[0, 0] = 1
        targets = [
            {"boxes": 300 * box[label >= 0], "labels": label[label >= 0] + 1}
            for box, label in zip(boxes, labels)
        ]
        floats = list(images.permute(0, 3, 1, 2) / 255)
        with torch.no_grad():
            ours.trunk.eval(), ours.extras.eval()
            expected = theirs.train()(floats, targets)
            losses = ssd_loss(*ours(images), boxes, labels, ours.priors)
            torch.testing.assert_close(losses["loss_box"], expected["bbox_regression"], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(losses["loss_class"], expected["classification"], rtol=1e-4, atol=1e-4)
            found, wanted = detect(*ours(images), ours.priors, 0.3, 0.45, 50), theirs.eval()(floats)
        for mine, other in zip(found, wanted):
            assert len(mine["scores"]) > 20
            torch.testing.assert_close(mine["scores"], other["scores"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(300 * mine["boxes"], other["boxes"], rtol=1e-3, atol=0.02)
            assert torch.equal(mine["labels"], other["labels"] - 1)

    @pytest.mark.parametrize(("score", "candidates"), [(0.3, 40), (0.02, 400), (0.999, 40)])
    def test_detect_equals_one_nms_a_class(self, score, candidates):
        """Few boxes go through NMS in one call, many in several, and none in none."""
        generator = torch.Generator().manual_seed(0)
        priors = ssd300_priors().double()
        offsets, logits = (
            torch.randn(3, 8732, 4, generator=generator).double(),  # no equal scores
            3 * torch.randn(3, 8732, 4, generator=generator).double(),
        )
        found = detect(offsets, logits, priors, score, 0.45, 50, candidates)
        for i in range(3):
            boxes = decode(offsets[i], priors).clamp(0, 1)
            scores, kept = logits[i].softmax(-1), []
            for c in range(3):
                best, index = scores[:, c + 1].sort(descending=True)
                index = index[best > score][:candidates]
                keep = batched_nms(boxes[index], scores[index, c + 1], torch.zeros(len(index)), 0.45)
                kept += [(float(scores[k, c + 1]), c, *boxes[k].tolist()) for k in index[keep]]
            kept = sorted(kept, reverse=True)[:50]
            assert found[i]["scores"].tolist() == [k[0] for k in kept]
            assert found[i]["labels"].tolist() == [k[1] for k in kept]
            torch.testing.assert_close(
                found[i]["boxes"], torch.tensor([k[2:] for k in kept]).double().view(-1, 4)
            )
