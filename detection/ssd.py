"""SSD300 on any Trunk (Liu et al., ECCV 2016; the CutMix paper moves its conv4_3 tap to a ResNet's layer2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms as suppress

from backbench.common.backbones.resnet import Trunk, normalise
from backbench.detection.matching import MAPS, RATIOS, decode, hard_negatives, match_priors, ssd300_priors

EXTRAS = ((256, 512, 2), (128, 256, 2), (128, 256, 1), (128, 256, 1))  # 1×1 width, 3×3 width, stride


class L2Norm(nn.Module):
    """Scale every pixel's feature vector to length 1, times a learned scale a channel (ParseNet)."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same shape, float32: sums of squares do not fit half precision."""
        return F.normalize(x.float(), dim=1, eps=1e-10) * self.weight[:, None, None]


class SSD300(nn.Module):
    """SSD300: 8,732 priors on six maps of a 300 × 300 image.

    `topology` "layer3": layer2 (38) and layer3 (19) of the trunk, layer4 dropped, and four extra maps (10, 5, 3,
    1); "layer4_dilated": layer2 and layer4 with stride 1 and dilation 2 (19), as the SSD authors' ResNet script.
    `l2norm` is the first scale of L2Norm on layer2, 0 leaves it out. `extra_width` scales the width of the extra
    maps, 512 and 256; `extra_bn` gives them batch norm. New weights start as Xavier's,
    the heads', with `head_std`, from a normal distribution of that width.
    """

    def __init__(
        self,
        trunk: Trunk,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        topology: str = "layer3",
        l2norm: float = 20.0,
        extra_width: float = 1.0,
        extra_bn: bool = False,
        head_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.trunk, self.classes, self.mean, self.std = trunk, classes, mean, std
        if topology == "layer3":
            trunk.drop_after("layer3")
        else:
            trunk.unstride("layer4", dilate=True)
        self.taps = ("layer2", "layer3" if topology == "layer3" else "layer4")
        widths = [trunk.channels[tap] for tap in self.taps]
        self.l2norm = L2Norm(widths[0], l2norm) if l2norm else nn.Identity()
        self.extras = nn.ModuleList()
        for squeeze, width, stride in EXTRAS:
            squeeze, width = (max(8, round(w * extra_width)) for w in (squeeze, width))
            self.extras.append(_extra(widths[-1], squeeze, width, stride, extra_bn))
            widths.append(width)
        shapes = [2 + 2 * len(ratios) for ratios in RATIOS]
        self.heads = nn.ModuleList(
            nn.Conv2d(width, k * (4 + classes + 1), 3, padding=1) for width, k in zip(widths, shapes)
        )
        for module in [*self.extras.modules(), *self.heads]:
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if head_std:
            for head in self.heads:
                nn.init.normal_(head.weight, std=head_std)
        self.register_buffer("priors", ssd300_priors(), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images (N, 3 or …, 300, 300) → offsets (N, 8732, 4) and logits (N, 8732, classes + 1), float32."""
        return self.outputs(normalise(images, self.mean, self.std))

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` of images that are normalised already, float32 (N, 3, 300, 300)."""
        taps = self.trunk.features(x, self.taps)
        maps = [self.l2norm(taps[self.taps[0]]), taps[self.taps[1]]]
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        if tuple(m.shape[-1] for m in maps) != MAPS:
            raise ValueError(
                f"SSD300 needs 300 × 300 images, its maps are {[tuple(m.shape[-2:]) for m in maps]}"
            )
        n, values = x.shape[0], 4 + self.classes + 1  # len() would fix the batch of an exported model
        found = [head(m).permute(0, 2, 3, 1).reshape(n, -1, values) for head, m in zip(self.heads, maps)]
        out = torch.cat(found, 1).float()
        return out[..., :4], out[..., 4:]


def _extra(inputs: int, squeeze: int, width: int, stride: int, norm: bool) -> nn.Sequential:
    padding = 1 if stride == 2 else 0
    layers: list[nn.Module] = []
    for conv in (
        nn.Conv2d(inputs, squeeze, 1, bias=not norm),
        nn.Conv2d(squeeze, width, 3, stride, padding, bias=not norm),
    ):
        layers += [conv, *([nn.BatchNorm2d(conv.out_channels)] if norm else []), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def ssd_loss(
    offsets: Tensor,
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    priors: Tensor,
    threshold: float = 0.5,
    negatives: float = 3.0,
) -> dict[str, Tensor]:
    """SSD's loss: smooth L1 of the positives, cross entropy of positives and hard negatives (paper, section 2.2).

    `offsets` (N, P, 4), `logits` (N, P, C + 1); padded truth `boxes` (N, M, 4), `labels` (N, M) as
    `match_priors` takes them. Both sums are over the batch and divided by its number of positives (at least 1).
    """
    with torch.no_grad():
        target, classes = match_priors(boxes, labels, priors, threshold)
    positive = classes > 0
    count = positive.sum().clamp(min=1)
    entropy = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes)
    counted = positive | hard_negatives(entropy, positive, negatives)
    distance = F.smooth_l1_loss(offsets, target, reduction="none").sum(-1)
    zero = distance.new_zeros(())
    return {
        "loss_box": torch.where(positive, distance, zero).sum() / count,
        "loss_class": torch.where(counted, entropy, zero).sum() / count,
        "positives": count,
    }


@torch.no_grad()
def detect(
    offsets: Tensor,
    logits: Tensor,
    priors: Tensor,
    score: float = 0.01,
    nms: float = 0.45,
    top: int = 200,
    candidates: int = 400,
) -> list[dict[str, Tensor]]:
    """Detections of a batch, its images and classes told apart by an offset and not by calls of NMS.

    Of each image and class the best `candidates` above `score` enter NMS (per class, at IoU `nms`), of each image
    the best `top` leave it. Returns for each image `boxes` (k, 4) corners as shares of the image, clipped to it,
    `labels` (k,) from 0 and `scores` (k,), best first.
    """
    n, classes = logits.shape[0], logits.shape[2] - 1
    scores = logits.softmax(-1)[..., 1:]
    image, prior, label = torch.nonzero(scores > score, as_tuple=True)
    scores, row = scores[image, prior, label], image * classes + label
    order = scores.sort(descending=True, stable=True).indices
    order = order[row[order].sort(stable=True).indices]  # by image and class, best first
    counts = torch.bincount(row, minlength=n * classes)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row[order]]
    order = order[place < candidates]
    scores, prior, image, label = scores[order], prior[order], image[order], label[order]
    boxes = decode(offsets[image, prior], priors[prior]).clamp(0, 1)
    keep = _nms_of_rows(boxes, scores, row[order], nms)
    keep = keep[scores[keep].sort(descending=True, stable=True).indices]
    found = []
    for i in range(n):
        mine = keep[image[keep] == i][:top]
        found.append({"boxes": boxes[mine], "labels": label[mine], "scores": scores[mine]})
    return found


def _nms_of_rows(boxes: Tensor, scores: Tensor, row: Tensor, iou: float) -> Tensor:
    """Indices of the boxes that stay when those of one row suppress one another; `row` is sorted.

    One call for the whole batch: rows are moved apart, in double precision, so that the move changes no decision.
    As NMS takes the square of its boxes, a call stops growing at `limit` of them.
    """
    limit = 65_536 if boxes.is_cuda else 512
    shifted, scores = boxes.double() + 2.0 * row[:, None], scores.double()
    sizes, kept, start = torch.unique_consecutive(row, return_counts=True)[1].tolist(), [], 0
    while sizes:
        stop = start + sizes.pop(0)
        while sizes and stop + sizes[0] - start <= limit:
            stop += sizes.pop(0)
        kept.append(start + suppress(shifted[start:stop], scores[start:stop], iou))
        start = stop
    return torch.cat(kept) if kept else row
