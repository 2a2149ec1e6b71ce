"""Top-1 and top-5 accuracy from the rank of each image's true class."""

from collections.abc import Mapping

import numpy as np


def true_rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank of the true class, 0 for the highest logit: logits (n, C), labels int (n,) → int64 (n,).

    Among equal logits the lower class index comes first, as in a stable sort. A NaN in a row ranks the true
    class last.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    own = np.take_along_axis(logits, labels[:, None], 1)
    before = np.arange(logits.shape[1]) < labels[:, None]
    ahead = (logits > own) | ((logits == own) & before)
    rank = ahead.sum(1)
    rank[np.isnan(logits).any(1)] = logits.shape[1] - 1
    return rank


def weighted_mean(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Mean over images under each row of image weights: values (n,), weights (R, n) → float64 (R,).

    None stands for one row of ones. A row whose weights sum to 0, and any row of no images, gives NaN.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones((1, len(values))) if weights is None else np.asarray(weights, np.float64)
    total = weights.sum(1)
    return np.divide(weights @ values, total, out=np.full(len(total), np.nan), where=total > 0)


def rescore(images: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """ "top-1" and, with more than 5 classes, "top-5", as fractions, each (R,).

    `images["rank"]`: int (n,), 0 where the true class has the highest score. `images["num_classes"]`, if
    there, is the number of classes (any shape, one value); without it a rank above 4 shows that there are
    more than 5.
    """
    rank = np.asarray(images["rank"])
    classes = np.max(images["num_classes"], initial=0) if "num_classes" in images else rank.max(initial=0) + 1
    scores = {"top-1": weighted_mean(rank < 1, weights)}
    if classes > 5:
        scores["top-5"] = weighted_mean(rank < 5, weights)
    return scores
