"""Class activation maps (Zhou et al. 2016), exact: a map's mean plus the bias is the logit."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from backbench.common.backbones.resnet import Classifier
from backbench.common.base.errors import UserError
from backbench.common.base.files import write_npz


def class_maps(features: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """CAMs: features (n, C, h, w), classifier weight (K, C), classes int (n, k) → (n, k, h, w).

    Map c at a place is weight[c] · features there, so for a classifier behind global average pooling its
    mean over the places plus bias[c] equals logit c, whatever the network.
    """
    maps = torch.bmm(weight[classes], features.flatten(2))
    return maps.unflatten(2, features.shape[2:])


def predict(model: Classifier, features: Tensor, labels: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """From layer4's features (n, C, h, w) and true labels (n,): logits, classes, maps.

    logits (n, K); classes int64 (n, 1 + top): the true class, then the `top` predicted ones, best first
    (fewer when there are fewer classes); maps (n, 1 + top, h, w), in that order. All in float32 at least.
    """
    weight, bias = (p if p.dtype == torch.float64 else p.float() for p in (model.fc.weight, model.fc.bias))
    features = features.to(weight.dtype)
    logits = F.linear(features.mean((2, 3)), weight, bias)
    best = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :top]
    classes = torch.cat([labels[:, None], best], 1)
    return logits, classes, class_maps(features, weight, classes)


@dataclass
class ScoreMaps:
    """Maps of n images × k classes, compact: float16 shares of each map's own range.

    `ids` (n,); `classes` int32 (n, k); `maps` float16 (n, k, h, w) in [0, 1]; `low`, `high` float32 (n, k):
    the CAM is low + (high − low) · map. Storing shares keeps 11 bits of the *range*, wherever it lies; a
    constant map is all 0 with low = high.
    """

    ids: np.ndarray
    classes: np.ndarray
    maps: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def save(self, path: Path, **more: np.ndarray) -> None:
        """Write one npz, with further per-image arrays beside the maps."""
        write_npz(path, **vars(self), **more)


def compact(ids: np.ndarray, classes: np.ndarray, maps: np.ndarray) -> ScoreMaps:
    """float32 maps (n, k, h, w) → ScoreMaps. Raises UserError naming the image of a value not finite."""
    bad = ~np.isfinite(maps).all((1, 2, 3))
    if bad.any():
        raise UserError(
            f"image {ids[bad.argmax()]}: its class activation map is not finite; the weights are broken"
        )
    low, high = maps.min((2, 3)), maps.max((2, 3))
    span = (high - low)[:, :, None, None]
    shares = np.divide(maps - low[:, :, None, None], span, out=np.zeros_like(maps), where=span > 0)
    return ScoreMaps(np.asarray(ids), classes.astype(np.int32), shares.astype(np.float16), low, high)


def join(parts: Sequence[ScoreMaps]) -> ScoreMaps:
    """One ScoreMaps of the images of several."""
    return ScoreMaps(*(np.concatenate(arrays) for arrays in zip(*(vars(part).values() for part in parts))))


def load_maps(path: Path) -> tuple[ScoreMaps, dict[str, np.ndarray]]:
    """Read what `ScoreMaps.save` wrote: the maps and the further arrays."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    names = ("ids", "classes", "maps", "low", "high")
    return ScoreMaps(**{name: arrays.pop(name) for name in names}), arrays
