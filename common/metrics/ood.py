"""Telling images of other data from the test's own by a confidence: the scores of Hendrycks and Gimpel (2017).

In-distribution is the positive class, and a higher confidence speaks for it (paper, section 4.4 and appendix E).
"""

from collections.abc import Mapping

import numpy as np

NAMES = ("TNR@95", "AUROC", "detection accuracy")
TPR = 0.95  # true positive rate at which the true negative rate is read
ROUNDING = 1e-12


def roc(
    inside: np.ndarray,
    outside: np.ndarray,
    weights_inside: np.ndarray | None = None,
    weights_outside: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(true, false) positive rates, each (R, k): k − 1 thresholds, the distinct confidences, from the highest down.

    inside (n,), outside (m,): confidences of in-distribution and of other images; weights (R, n) and (R, m), or None of
    both for ones. An image is accepted when its confidence is at or above the threshold; the first point accepts none.
    A row whose weights of one side sum to 0 is NaN there.
    """
    inside, outside = np.asarray(inside, np.float64), np.asarray(outside, np.float64)
    thresholds = np.append(-np.inf, np.unique(-np.concatenate([inside, outside])))
    return _accepted(inside, weights_inside, thresholds), _accepted(outside, weights_outside, thresholds)


def _accepted(confidence: np.ndarray, weights: np.ndarray | None, thresholds: np.ndarray) -> np.ndarray:
    order = np.argsort(-confidence, kind="stable")
    weights = np.ones((1, len(confidence))) if weights is None else np.asarray(weights, np.float64)
    total = np.cumsum(np.pad(weights[:, order], ((0, 0), (1, 0))), axis=1)
    found = total[:, np.searchsorted(-confidence[order], thresholds, side="right")]
    return np.divide(found, total[:, -1:], out=np.full(found.shape, np.nan), where=total[:, -1:] > 0)


def scores(true_rate: np.ndarray, false_rate: np.ndarray) -> dict[str, np.ndarray]:
    """`NAMES` from the rates that `roc` gives, fractions (R,); NaN where a rate is.

    TNR@95: of the images of other data, the share refused by the highest threshold that accepts 95 % of the test's own.
    AUROC: the probability that an own image has the higher confidence, a tie counting half. Detection accuracy: the
    largest ½ (TPR + TNR).
    """
    rows, at = np.arange(len(true_rate)), (true_rate >= TPR - ROUNDING).argmax(1)
    steps = false_rate[:, 1:] - false_rate[:, :-1]
    return {
        "TNR@95": 1 - false_rate[rows, at] + 0 * true_rate[rows, at],  # NaN of either
        "AUROC": (steps * (true_rate[:, 1:] + true_rate[:, :-1])).sum(1) / 2,
        "detection accuracy": ((true_rate + 1 - false_rate) / 2).max(1),
    }


def rescore(images: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """`NAMES`, the unweighted mean over the sets (paper, Table 12), then "NAME SET" of each; (R,) fractions.

    Per image: `confidence` (n,) and `set` int (n,), 0 for the test's own, k for the k-th of `sets`, the others' names.
    `weights` (R, n): own and other images are resampled together, and each set is normalised by itself.
    """
    confidence, of = np.asarray(images["confidence"]), np.asarray(images["set"])
    found: dict[str, np.ndarray] = {}
    for number, name in enumerate(map(str, images["sets"]), start=1):
        groups = of == 0, of == number
        parts = [None if weights is None else np.asarray(weights)[:, group] for group in groups]
        rates = roc(*(confidence[group] for group in groups), *parts)
        found |= {f"{metric} {name}": value for metric, value in scores(*rates).items()}
    mean = {m: np.mean([v for k, v in found.items() if k.startswith(f"{m} ")], axis=0) for m in NAMES}
    return mean | found
