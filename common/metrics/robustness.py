"""How a classifier bears attacked, occluded and mixed images, and whether it knows images of other data."""

from collections.abc import Mapping

import numpy as np

from backbench.common.metrics import ood
from backbench.common.metrics.classification import weighted_mean

AT_ONCE = 4_000_000  # numbers of a block of pair weights


def rescore(images: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The scores of one of the four tests, told by its statistics, as fractions (R,); weights (R, n) or None.

    FGSM: `right_attacked` and `right_clean`, bool (n,). Occlusion: `right_centre` and `right_boundary`, bool (n, k),
    at k sizes of the hole from 0 to the whole image: means over the sizes. In-between: `either_mixup` (p, l) and
    `either_cutmix` (p, k), bool: whether one of a pair's two classes was predicted; `first` and `second`, int (p,), the
    pair's images. Out of distribution: see `ood.rescore`.
    """
    if "right_attacked" in images:
        names = {"top-1 attacked": "right_attacked", "top-1 clean": "right_clean"}
        return {name: weighted_mean(images[key], weights) for name, key in names.items()}
    if "right_centre" in images:
        centre, boundary = (images[f"right_{kind}"].mean(1) for kind in ("centre", "boundary"))
        return {
            "top-1 occluded": weighted_mean((centre + boundary) / 2, weights),
            "top-1 centre": weighted_mean(centre, weights),
            "top-1 boundary": weighted_mean(boundary, weights),
            "top-1 clean": weighted_mean(images["right_centre"][:, 0], weights),
        }
    if "either_mixup" in images:
        mixup, cutmix = (images[f"either_{kind}"].mean(1) for kind in ("mixup", "cutmix"))
        values = np.stack([(mixup + cutmix) / 2, mixup, cutmix], 1)
        found = pair_mean(values, images["first"], images["second"], weights)
        return dict(zip(("either class", "either class, Mixup", "either class, CutMix"), found.T))
    return ood.rescore(images, weights)


def pair_mean(
    values: np.ndarray, first: np.ndarray, second: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Means over pairs of images under each row of *image* weights: values (p, c), first, second (p,) → (R, c).

    A pair weighs the product of its images' weights (the pigeonhole bootstrap of Owen, Annals of Applied Statistics
    2007, never too short): pairs that share an image are not independent. A row without a pair left gives NaN.
    """
    if weights is None:
        return np.asarray(values, np.float64).mean(0, keepdims=True)
    weights = np.asarray(weights, np.float64)
    total, found = np.zeros((len(weights), 1)), np.zeros((len(weights), values.shape[1]))
    step = max(1, AT_ONCE // len(weights))
    for start in range(0, len(first), step):
        part = slice(start, start + step)
        both = weights[:, first[part]] * weights[:, second[part]]
        total += both.sum(1, keepdims=True)
        found += both @ values[part]
    return np.divide(found, total, out=np.full(found.shape, np.nan), where=total > 0)
