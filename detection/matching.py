"""SSD's side of boxes, for a whole batch at once: priors, matching, hard negatives, the coder."""

import math

import torch
from torch import Tensor

MAPS = (38, 19, 10, 5, 3, 1)
STEPS = (8, 16, 32, 64, 100, 300)
SIZES = (30, 60, 111, 162, 213, 264, 315)  # VOC's; the COCO set starts at 21
RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
VARIANCES = (0.1, 0.1, 0.2, 0.2)


def ssd300_priors() -> Tensor:
    """The 8,732 priors of SSD300 for VOC, float32 (8732, 4) as cx, cy, w, h in shares of the image.

    Order: map, row, column, shape. Clipped to [0, 1] as (cx, cy, w, h), as ssd.pytorch's PriorBox: of the
    10 × 10 map with step 32 the last centre, 1.0133, becomes 1.
    """
    made = []
    for cells, step, size, larger, ratios in zip(MAPS, STEPS, SIZES, SIZES[1:], RATIOS):
        s, between = size / 300, math.sqrt(size * larger) / 300
        shapes = [(s, s), (between, between)]
        for r in ratios:
            root = math.sqrt(r)
            shapes += [(s * root, s / root), (s / root, s * root)]
        centre = [(k + 0.5) * step / 300 for k in range(cells)]
        made += [(x, y, w, h) for y in centre for x in centre for w, h in shapes]
    return torch.tensor(made, dtype=torch.float64).clamp_(0, 1).float()


def corners(boxes: Tensor) -> Tensor:
    """cx, cy, w, h → x0, y0, x1, y1, (..., 4)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def encode(boxes: Tensor, priors: Tensor) -> Tensor:
    """Corner boxes (..., P, 4) relative to the priors (P, 4): SSD's offsets, over their variances."""
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    offsets = torch.cat([(centre - priors[:, :2]) / priors[:, 2:], torch.log(size / priors[:, 2:])], -1)
    return offsets / offsets.new_tensor(VARIANCES)


def decode(offsets: Tensor, priors: Tensor) -> Tensor:
    """The inverse of `encode`, for any leading shape common to both: corner boxes."""
    offsets = offsets * offsets.new_tensor(VARIANCES)
    centre = priors[..., :2] + offsets[..., :2] * priors[..., 2:]
    size = priors[..., 2:] * torch.exp(offsets[..., 2:].clamp(max=math.log(1000 / 16)))
    return corners(torch.cat([centre, size], -1))


def _overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU (N, M, P) of corner boxes (N, M, 4) and (P, 4), value for value torchvision's `box_iou`; 0 for no area.

    Side by side instead of in pairs of coordinates, and in place: a third of the time on a CPU.
    """
    x0, y0, x1, y1 = boxes[..., None].unbind(2)
    u0, v0, u1, v1 = others.T.contiguous()
    inter = torch.minimum(x1, u1).sub_(torch.maximum(x0, u0)).clamp_(min=0)
    inter *= torch.minimum(y1, v1).sub_(torch.maximum(y0, v0)).clamp_(min=0)
    union = ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0)).sub_(inter)
    return inter.div_(union).nan_to_num_(0.0)


def match_priors(
    boxes: Tensor, labels: Tensor, priors: Tensor, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Caffe's matching for a padded batch, without a host sync.

    `boxes` (N, M, 4) corners as shares of the image, `labels` (N, M) int64 from 0, -1 for padding; `priors`
    (P, 4). A prior takes the object it overlaps most when their IoU reaches `threshold`; and every object takes
    the prior that overlaps it most, whatever the IoU; when several objects want one prior the last wins.

    Returns offset targets (N, P, 4) and class targets (N, P) int64: 0 background, 1 + label for a positive.
    """
    n, m = labels.shape
    valid = labels >= 0
    iou = _overlaps(boxes, corners(priors)).masked_fill_(~valid[..., None], -1.0)
    overlap, owner = iou.max(1)
    wanted = iou.argmax(2)
    objects = torch.arange(m, device=labels.device).expand(n, m).masked_fill(~valid, -1)
    forced = torch.full_like(owner, -1).scatter_reduce_(1, wanted, objects, "amax")
    owner = torch.where(forced >= 0, forced, owner)
    positive = (forced >= 0) | (overlap >= threshold)
    classes = torch.where(positive, labels.gather(1, owner) + 1, 0)
    matched = boxes.gather(1, owner[..., None].expand(-1, -1, 4))
    return encode(matched, priors), classes


def hard_negatives(loss: Tensor, positive: Tensor, ratio: float = 3.0) -> Tensor:
    """The mask (N, P) of each image's hardest negatives: `ratio` for every positive, as many as there are.

    `loss` (N, P) is the background's classification loss, `positive` (N, P) bool. Of equal losses the first
    priors are taken, so that the mask does not depend on how a sort breaks ties.
    """
    found = positive.sum(1)
    wanted = torch.minimum((found * ratio).long(), loss.shape[1] - found)
    loss = loss.detach().masked_fill(positive, -torch.inf)
    if loss.is_cuda:  # a sort needs no host sync for its length
        ranked = loss.sort(1, descending=True).values
    else:
        ranked = loss.topk(max(1, int(wanted.max())), 1).values
    edge = ranked.gather(1, (wanted - 1).clamp(min=0)[:, None])
    above = (loss > edge) & (wanted > 0)[:, None]
    ties = (loss == edge) & ~positive
    left = wanted - above.sum(1)
    return above | (ties & (ties.cumsum(1) <= left[:, None]))
