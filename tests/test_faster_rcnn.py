"""Faster R-CNN with either neck against torchvision's, and its parameter groups."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN as TorchvisionFasterRCNN
from torchvision.ops import MultiScaleRoIAlign

from backbench.common.backbones.resnet import Trunk, normalise
from backbench.detection.faster_rcnn import FasterRCNN, parameter_groups, synchronise_batch_norm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FRCNN = {"anchors": (32, 64), "roi_size": 5, "rpn_batch": 32, "roi_batch": 16, "top": 20, "score": 0.05}


def half_trunk(seed=0):
    torch.manual_seed(seed)
    return Trunk("resnet18_half")


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

    def test_odd_sizes_keep_the_stride(self):
        """Anchors of a 90 × 101 image stand 16 pixels apart, as in torchvision, which pads; not 90 // 6 = 15."""
        ours, theirs = self.twins()
        theirs.transform.min_size, theirs.transform.max_size = (90,), 101
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (1, 90, 101, 3), dtype=torch.uint8, generator=generator)
        nn.init.normal_(ours.roi.box_predictor.cls_score.weight, std=0.3)
        with torch.no_grad():
            (found,) = ours.eval()(images, [(90, 101)])
            (expected,) = theirs.eval()(list(normalise(images, MEAN, STD)))
        assert len(found["scores"]) > 3
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-3, atol=1e-2)

    def test_pyramid_equals_torchvision(self):
        """fasterrcnn_resnet50_fpn's losses and detections with its weights under our names."""
        torch.manual_seed(0)
        theirs = fasterrcnn_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            num_classes=4,
            min_size=96,
            max_size=128,
            rpn_post_nms_top_n_train=100,
            rpn_post_nms_top_n_test=50,
            box_batch_size_per_image=16,
            box_detections_per_img=20,
        )
        ours = FasterRCNN(
            Trunk("resnet50"),
            3,
            MEAN,
            STD,
            "fpn",
            anchors=(32, 64, 128, 256, 512),
            roi_batch=16,
            proposals_before=(2000, 1000),
            proposals_after=(100, 50),
            score=0.05,
            nms=0.5,
            top=20,
        )
        for module in theirs.modules():  # else activations of an untrained network explode
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.4)
        nn.init.normal_(theirs.roi_heads.box_predictor.cls_score.weight, std=0.2)
        names = {"backbone.body.": "trunk.", "backbone.fpn.": "fpn.", "roi_heads.": "roi."}
        state = {}
        for key, value in theirs.state_dict().items():
            prefix = next((p for p in names if key.startswith(p)), "")
            state[names.get(prefix, "") + key.removeprefix(prefix)] = value
        ours.load_state_dict(state)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2, 96, 120, 3), dtype=torch.uint8, generator=generator)
        floats = list(images.permute(0, 3, 1, 2) / 255)
        with torch.no_grad():
            torch.manual_seed(1)
            theirs.train().transform.eval()
            theirs.backbone.eval(), ours.train().trunk.eval()
            expected = theirs(floats, self.targets())
            torch.manual_seed(1)
            losses = ours(images, [(96, 120)] * 2, self.targets())
            found, wanted = ours.eval()(images, [(96, 120)] * 2), theirs.eval()(floats)
        names = {"loss_class": "loss_classifier", "loss_box": "loss_box_reg"}
        for name, value in losses.items():
            torch.testing.assert_close(value, expected[names.get(name, name)], rtol=1e-3, atol=1e-4)
        for mine, other in zip(found, wanted):
            assert len(mine["scores"]) > 3
            torch.testing.assert_close(mine["scores"], other["scores"], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(mine["boxes"], other["boxes"], rtol=1e-3, atol=2e-2)
            assert torch.equal(mine["labels"], other["labels"] - 1)

    @pytest.mark.parametrize("arch", ["resnet18_half", "resnet34"])
    def test_pyramid_on_any_trunk(self, arch):
        trunk = Trunk(arch)
        trunk.freeze("layer1")
        anchors = (16, 32, 64, 128, 256)
        options = {"roi_batch": 8, "proposals_after": (50, 20), "fpn_width": 32, "head_width": 64}
        model = FasterRCNN(trunk, 3, MEAN, STD, "fpn", anchors=anchors, **options).train()
        assert {name: block[0].in_channels for name, block in model.fpn.inner_blocks.named_children()} == {
            str(k): trunk.channels[f"layer{k + 1}"] for k in range(4)
        }
        images = torch.randint(0, 256, (2, 70, 90, 3), dtype=torch.uint8)
        sum(model(images, [(70, 90)] * 2, self.targets()).values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_batch_norm_behind_layer4(self):
        model = FasterRCNN(half_trunk(), 3, MEAN, STD, head_bn=True, **FRCNN).train()
        images = torch.randint(0, 256, (2, 96, 112, 3), dtype=torch.uint8)
        sum(model(images, [(96, 112)] * 2, self.targets()).values()).backward()
        assert model.norm.weight.grad is not None and model.norm.running_mean.any()

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

    def test_synchronised_batch_norm(self):
        """Shared where it trains, with the same parameters, keys, groups and, in one process, the same numbers."""
        model = FasterRCNN(half_trunk(), 3, MEAN, STD, head_bn=True, **FRCNN)
        model.trunk.freeze("layer1")
        keys = list(model.state_dict())
        plain = copy.deepcopy(model).train()
        before = [[id(p) for p in group["params"]] for group in parameter_groups(model, decay_biases=True)]
        synchronise_batch_norm(model)
        norms = {
            name: type(m)
            for name, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        }
        assert norms["norm"] is norms["trunk.layer4.1.bn2"] is nn.SyncBatchNorm
        assert norms["trunk.bn1"] is norms["trunk.layer1.0.bn1"] is nn.BatchNorm2d
        assert list(model.state_dict()) == keys
        after = [[id(p) for p in group["params"]] for group in parameter_groups(model, decay_biases=True)]
        assert after == before
        assert not model.train().trunk.bn1.training and model.norm.training
        images = torch.randint(0, 256, (2, 96, 112, 3), dtype=torch.uint8)
        losses = []
        for one in (plain, model):
            torch.manual_seed(2)
            losses.append(one(images, [(96, 112)] * 2, self.targets()))
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
        torch.testing.assert_close(plain.state_dict(), model.state_dict(), rtol=0, atol=0)
        plain.load_state_dict(model.state_dict())

    def test_decayed_biases(self):
        model = FasterRCNN(half_trunk(), 3, MEAN, STD, head_bn=True, **FRCNN)
        decayed, plain = parameter_groups(model, decay_biases=True)
        norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        assert {id(p) for p in plain["params"]} == {id(p) for p in norms}
        assert len(decayed["params"]) + len(norms) == len(list(model.parameters()))
