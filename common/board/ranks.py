"""How stable the order of the backbones is: ranks over draws of what chance could have given.

A draw is one other world, the same for every row and column: other test images (a resampling), other pretrainings and
other seeds. Rows whose runs bear the same labels are paired by them, as the differences are: what a seed gave to both
moves neither past the other.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy.stats import rankdata

from backbench.common.base.files import digest
from backbench.common.board.statistics import CONFIDENCE, finite
from backbench.common.board.strata import Sample, Stratum, strata

Noise = Callable[
    [Stratum, int], np.ndarray
]  # (a stratum, its place among its row's) → (units, R), in units of t


@dataclass(frozen=True)
class Rank:
    """A row's rank among the rows of a column: observed, its mean and 95 % range over draws, and how often first."""

    observed: float
    mean: float
    low: float
    high: float
    first: float


@dataclass(frozen=True)
class Order:
    """The order of a column's rows. `tau`: Kendall's τ of a draw's order with the observed one: mean, and the value
    that 95 % of the draws reach."""

    ranks: Mapping[str, Rank]
    tau: float
    tau_low: float


@dataclass(frozen=True)
class Ranks:
    """`columns`: the order by column key. `across`: of the mean rank over the transfer columns that hold the very same
    rows; None with fewer than two. `agreement`: mean Kendall τ between those columns' observed orders."""

    columns: Mapping[str, Order]
    across: Order | None
    agreement: float | None


def make_ranks(samples: Mapping[str, Mapping[str, Sample]], transfer: set[str], seed: int = 0) -> Ranks:
    """Ranks by column (key → row → runs), best first; `transfer`: the columns that the mean rank is over.

    Resamplings that gave NaN in some row are left out for all, rows of which too few are left are not ranked. Rows with
    one run have no noise of training: their order speaks of test images only.
    """
    noise = make_noise(seed)
    drawn = {}
    for key, rows in samples.items():
        kept = _same_draws({row: sample for row, sample in rows.items() if finite(sample)})
        if len(kept) > 1:
            drawn[key] = {row: draws(sample, noise) for row, sample in kept.items()}
    orders, placed = {}, {}
    for key, found in drawn.items():
        observed = _ranks(np.array([value for value, _ in found.values()])[:, None])
        placed[key] = observed, _ranks(np.stack([values for _, values in found.values()]))
        orders[key] = _order(list(found), *placed[key])
    over = [key for key in drawn if key in transfer]
    names = set(max((tuple(drawn[key]) for key in over), key=len, default=()))
    over = [key for key in over if set(drawn[key]) == names]
    if len(over) < 2:
        return Ranks(orders, None, None)
    rows = list(drawn[over[0]])
    size = min(placed[key][1].shape[1] for key in over)
    arranged = [
        [part[[list(drawn[key]).index(row) for row in rows], :size] for part in placed[key]] for key in over
    ]
    across = _order(rows, *(np.mean(parts, 0) for parts in zip(*arranged)))
    pairs = [float(kendall(a[0], b[0])[0]) for a, b in combinations(arranged, 2)]
    return Ranks(orders, across, float(np.mean(pairs)))


def _same_draws(rows: dict[str, Sample]) -> dict[str, Sample]:
    """Samples (of the same test images) less the resamplings that are NaN in any of them."""
    if not rows:
        return {}
    good = np.logical_and.reduce([np.isfinite(sample.replicates).all(0) for sample in rows.values()])
    return {row: replace(sample, replicates=sample.replicates[:, good]) for row, sample in rows.items()}


def make_noise(seed: int) -> Noise:
    """Draws of the units of a stratum: equal for equal (place, unit, labels, R), whatever the row or the column.

    Weighted by the deviations of k units from their mean, a draw has the standard error of that mean and a t of k − 1
    degrees of freedom; so has the difference of two rows that take the same draws, with the standard error of its own.
    """

    @functools.cache
    def make(place: int, unit: str, labels: tuple, replicates: int) -> np.ndarray:
        rng = np.random.default_rng([seed, int(digest("ranks", place, unit, list(map(str, labels))), 16)])
        k = len(labels)
        scale = np.sqrt(rng.chisquare(k - 1, replicates) / (k - 1))
        return rng.standard_normal((k, replicates)) / scale / np.sqrt(k * (k - 1))

    return lambda part, place: make(place, part.unit, part.labels, part.deviations.shape[1])


def draws(sample: Sample, noise: Noise) -> tuple[float, np.ndarray]:
    """A row's score, and draws of it (R,) about it: its resampled images plus chance in training.

    The spread of a stratum's values holds what differs between runs from image to image, which the resampling holds
    too, and that of what seeds give to all pretrainings alike holds the rest: both are taken out of the noise. Where
    there are both pretrainings and such seeds, two heavy tails add up: draws are more cautious than a difference's t.
    """
    parts = strata(sample)
    value = sum(part.share * part.values.mean() for part in parts)
    values = value + sum(part.share * part.deviations.mean(0) for part in parts)
    for place, part in enumerate(parts):
        variance, interaction, seen = part.variances() if len(part.values) > 1 else (0.0, 0.0, 0.0)
        if variance > interaction:
            own = part.share * ((variance - interaction) / seen) ** 0.5
            values = values + own * (part.values - part.values.mean()) @ noise(part, place)
    return float(value), values


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of scores (rows, draws), 1 the highest, equal ones their mean."""
    return rankdata(-values, axis=0)


def kendall(observed: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Kendall's τ (a) of ranks (rows, 1) with each column of (rows, R) → (R,); 1: the same order."""
    pairs = np.array(list(combinations(range(len(observed)), 2)))
    sign = [np.sign(ranks[pairs[:, 0]] - ranks[pairs[:, 1]]) for ranks in (observed, others)]
    return (sign[0] * sign[1]).mean(0)


def _order(rows: list[str], observed: np.ndarray, ranks: np.ndarray) -> Order:
    best = ranks == ranks.min(0)
    first = (best / best.sum(0)).mean(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ranks, [tail, 1 - tail], axis=1)
    taus = kendall(observed, ranks)
    return Order(
        {
            row: Rank(
                float(observed[i, 0]), float(ranks[i].mean()), float(low[i]), float(high[i]), float(first[i])
            )
            for i, row in enumerate(rows)
        },
        float(taus.mean()),
        float(np.quantile(taus, 1 - CONFIDENCE)),
    )
