"""Faster R-CNN with the C4 split (Ren et al., 2015; He et al., 2016): layer4 is the head of every region.

Stem to layer3 → region proposals → RoIAlign → layer4 → mean → class and box, from torchvision's parts. They
differ from the base code the paper names (jwyang/faster-rcnn.pytorch) in this: the proposal head keeps layer3's
width (there 512), both box losses have their knee at 1/9 (there the second's is 1), anchors are centred on
multiples of the stride (there half a cell further).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from common.trunk import Trunk, normalise

RATIOS = (0.5, 1.0, 2.0)


class FloatRPNHead(RPNHead):
    """torchvision's proposal head with float32 outputs: boxes decoded in half precision are wrong."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Feature maps → objectness and box deltas of each."""
        logits, deltas = super().forward(x)
        return [v.float() for v in logits], [v.float() for v in deltas]


class FasterRCNN(nn.Module):
    """Faster R-CNN C4 on any Trunk.

    `anchors` are side lengths in pixels (× 3 ratios), `roi_size` RoIAlign's output. `proposals_*` are kept before
    and after NMS, (training, test). Training: `rpn_batch` anchors and `roi_batch` regions an image, a quarter of
    the regions objects. Test: detections above `score`, NMS at `nms`, the best `top` of an image.
    """

    def __init__(
        self,
        trunk: Trunk,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
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
    ) -> None:
        super().__init__()
        self.trunk, self.mean, self.std = trunk, mean, std
        width = trunk.channels["layer3"]
        self.rpn = RegionProposalNetwork(
            AnchorGenerator((tuple(anchors),), (RATIOS,)),
            FloatRPNHead(width, len(anchors) * len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=rpn_batch,
            positive_fraction=0.5,
            pre_nms_top_n=dict(zip(("training", "testing"), proposals_before)),
            post_nms_top_n=dict(zip(("training", "testing"), proposals_after)),
            nms_thresh=0.7,
        )
        self.roi = RoIHeads(
            MultiScaleRoIAlign(["0"], roi_size, sampling),
            nn.Identity(),
            FastRCNNPredictor(trunk.channels["layer4"], classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=roi_batch,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score,
            nms_thresh=nms,
            detections_per_img=top,
        )
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
        x = normalise(images, self.mean, self.std)
        sizes = [(int(h), int(w)) for h, w in sizes]
        for i, (h, w) in enumerate(sizes):  # padding is the mean colour, exactly
            x[i, :, h:] = 0
            x[i, :, :, w:] = 0
        features = {"0": self.trunk.run(x, stop="layer3").float()}
        proposals, losses = self.rpn(ImageList(x, sizes), features, targets)
        if self.training:
            proposals, _, labels, deltas = self.roi.select_training_samples(proposals, targets)
        regions = self.roi.box_roi_pool(features, proposals, sizes)
        logits, boxes = self.roi.box_predictor(self.trunk.run(regions, "layer4", "layer4").mean((2, 3)))
        logits, boxes = logits.float(), boxes.float()
        if self.training:
            loss_class, loss_box = fastrcnn_loss(logits, boxes, labels, deltas)
            return {"loss_class": loss_class, "loss_box": loss_box, **losses}
        found = self.roi.postprocess_detections(logits, boxes, proposals, sizes)
        return [{"boxes": b, "scores": s, "labels": k - 1} for b, s, k in zip(*found)]


def no_decay_on_biases(model: nn.Module) -> list[dict]:
    """Parameter groups in which biases (and batch norm's scales and shifts, if trained) are not decayed."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for _, p in trained if p.ndim > 1]
    plain = [p for _, p in trained if p.ndim <= 1]
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
