"""Faster R-CNN on any Trunk, from torchvision's parts: C4, where layer4 is the head of every region, and FPN.

C4 (Ren et al., 2015; He et al., 2016): stem to layer3 → region proposals → RoIAlign → layer4 → mean → class and box.
It differs from the base code the paper names (jwyang/faster-rcnn.pytorch) in this: the proposal head keeps layer3's
width (there 512), both box losses have their knee at 1/9 (there the second's is 1), anchors are centred on
multiples of the stride (there half a cell further). FPN (Lin et al., 2017): layer1 to layer4 → a pyramid of five
levels → proposals → RoIAlign on the level that fits → two fully connected layers; torchvision's network.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from backbench.common.backbones.resnet import Trunk, normalise
from backbench.common.base.errors import UserError

RATIOS = (0.5, 1.0, 2.0)
STAGES = ("layer1", "layer2", "layer3", "layer4")


class FloatRPNHead(RPNHead):
    """torchvision's proposal head with float32 outputs: boxes decoded in half precision are wrong."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Feature maps → objectness and box deltas of each."""
        logits, deltas = super().forward(x)
        return [v.float() for v in logits], [v.float() for v in deltas]


class FasterRCNN(nn.Module):
    """Faster R-CNN with the neck `c4` or `fpn`.

    `anchors` are side lengths in pixels (× 3 ratios; fpn: one a level), `roi_size` RoIAlign's output. `proposals_*`
    are kept before and after NMS, (training, test). Training: `rpn_batch` anchors and `roi_batch` regions an image,
    a quarter of the regions objects. Test: detections above `score`, NMS at `nms`, the best `top` of an image.
    c4: `head_bn` puts a batch norm behind layer4. fpn: `fpn_width` channels, head layers of `head_width`.
    """

    def __init__(
        self,
        trunk: Trunk,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        neck: str = "c4",
        anchors: Sequence[float] = (128, 256, 512),
        roi_size: int = 7,
        sampling: int = 2,
        rpn_batch: int = 256,
        roi_batch: int = 256,
        proposals_before: tuple[int, int] = (12000, 6000),
        proposals_after: tuple[int, int] = (2000, 300),
        score: float = 0.0,
        nms: float = 0.3,
        top: int = 100,
        head_bn: bool = False,
        fpn_width: int = 256,
        head_width: int = 1024,
    ) -> None:
        super().__init__()
        self.trunk, self.mean, self.std, self.neck = trunk, mean, std, neck
        if neck == "c4":
            width, levels, sides = trunk.channels["layer3"], ["0"], (tuple(anchors),)
            self.multiple, features = trunk.strides["layer3"], trunk.channels["layer4"]
        else:
            width, levels, sides = fpn_width, ["0", "1", "2", "3"], tuple((side,) for side in anchors)
            self.multiple, features = trunk.strides["layer4"], head_width
            inputs = [trunk.channels[stage] for stage in STAGES]
            self.fpn = FeaturePyramidNetwork(inputs, fpn_width, LastLevelMaxPool())
        self.rpn = RegionProposalNetwork(
            AnchorGenerator(sides, (RATIOS,) * len(sides)),
            FloatRPNHead(width, len(sides[0]) * len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=rpn_batch,
            positive_fraction=0.5,
            pre_nms_top_n=dict(zip(("training", "testing"), proposals_before)),
            post_nms_top_n=dict(zip(("training", "testing"), proposals_after)),
            nms_thresh=0.7,
        )
        self.roi = RoIHeads(
            MultiScaleRoIAlign(levels, roi_size, sampling),
            nn.Identity() if neck == "c4" else TwoMLPHead(fpn_width * roi_size**2, head_width),
            FastRCNNPredictor(features, classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=roi_batch,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score,
            nms_thresh=nms,
            detections_per_img=top,
        )
        self.norm = nn.BatchNorm2d(features) if head_bn else nn.Identity()
        nn.init.normal_(self.roi.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.roi.box_predictor.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.roi.box_predictor.cls_score.bias)
        nn.init.zeros_(self.roi.box_predictor.bbox_pred.bias)

    def forward(
        self, images: Tensor, sizes: Tensor | Sequence, targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """uint8 images (N, …), padded at the right and bottom, and their true `sizes` (N, 2) as height, width.

        Training: `targets` of each image, `boxes` (k, 4) in pixels and `labels` (k,) from 1; returns four losses.
        Test: returns for each image `boxes` (k, 4) in pixels, `labels` (k,) from 0, `scores` (k,), best first.
        """
        sizes = [(int(h), int(w)) for h, w in sizes]
        x = self._normalise(images, sizes)
        features = self._features(x)
        proposals, losses = self.rpn(ImageList(x, sizes), features, targets)
        if self.training:
            proposals, _, labels, deltas = self.roi.select_training_samples(proposals, targets)
        regions = self.roi.box_roi_pool(features, proposals, sizes)
        logits, boxes = self.roi.box_predictor(self._describe(regions))
        logits, boxes = logits.float(), boxes.float()
        if self.training:
            loss_class, loss_box = fastrcnn_loss(logits, boxes, labels, deltas)
            return {"loss_class": loss_class, "loss_box": loss_box, **losses}
        need_finite(*features.values(), logits, boxes)
        found = self.roi.postprocess_detections(logits, boxes, proposals, sizes)
        return [{"boxes": b, "scores": s, "labels": k - 1} for b, s, k in zip(*found)]

    def _normalise(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """float32 (N, 3, H, W), H and W multiples of the stride; what lies outside an image is the mean colour, 0.

        Anchors are laid out by height // rows, so that an odd size would squeeze them towards the corner.
        """
        x = normalise(images, self.mean, self.std)
        for i, (h, w) in enumerate(sizes):
            x[i, :, h:] = 0
            x[i, :, :, w:] = 0
        height, width = (math.ceil(side / self.multiple) * self.multiple for side in x.shape[2:])
        if (height, width) == tuple(x.shape[2:]):
            return x
        return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))

    def _features(self, x: Tensor) -> dict[str, Tensor]:
        """The maps that proposals and regions come from, float32: layer3's, or the pyramid's five."""
        if self.neck == "c4":
            return {"0": self.trunk.run(x, stop="layer3").float()}
        maps = self.trunk.features(x, STAGES)
        pyramid = self.fpn({str(k): maps[stage] for k, stage in enumerate(STAGES)})
        return {name: value.float() for name, value in pyramid.items()}

    def _describe(self, regions: Tensor) -> Tensor:
        """Pooled regions (R, C, S, S) → (R, D)."""
        if self.neck == "c4":
            return self.norm(self.trunk.run(regions, "layer4", "layer4")).mean((2, 3))
        return self.roi.box_head(regions)


def need_finite(*outputs: Tensor) -> None:
    """Raises UserError when a network's outputs are not finite: as detections they would vanish without a word."""
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise UserError(
            "the detector's outputs are not finite: its weights are broken; train again with a lower --set lr"
        )


def synchronise_batch_norm(model: nn.Module) -> None:
    """Let every batch norm that trains share its statistics among the processes, in place; the frozen ones stay.

    Parameters and the state dict's keys stay the same. Training then needs a GPU in every process (SyncBatchNorm).
    """
    model.train()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d) and child.training:
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def parameter_groups(model: nn.Module, decay_biases: bool = False) -> list[dict]:
    """Parameter groups in which batch norm's scales and shifts and, unless asked for, biases are not decayed."""
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    norms = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = {id(p) for p in trained if p.ndim <= 1 and (id(p) in norms or not decay_biases)}
    return [
        {"params": [p for p in trained if id(p) not in plain]},
        {"params": [p for p in trained if id(p) in plain], "weight_decay": 0.0},
    ]
