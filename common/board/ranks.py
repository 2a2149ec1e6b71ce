"""How stable the order of the backbones is: ranks over draws of what chance could have given."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import rankdata

from common.board.statistics import CONFIDENCE, Sample, finite, spread, strata


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

    A draw is the score under one resampling of the test images, which is the same for every row, plus chance in
    training: independent noise of each row with the spread of its own runs and the t of their number. Rows with one
    run have no such noise: their order speaks of test images only.
    """
    drawn = {}
    for number, (key, rows) in enumerate(samples.items()):
        rng = np.random.default_rng([seed, number])
        found = {row: draw for row, sample in rows.items() if (draw := draws(sample, rng)) is not None}
        sizes = {len(values) for _, values in found.values()}
        if len(found) > 1 and len(sizes) == 1:
            drawn[key] = found
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


def draws(sample: Sample, rng: np.random.Generator) -> tuple[float, np.ndarray] | None:
    """A row's score, and draws of it (R,) about it; None when resampling left too few scores."""
    kept = finite(sample)
    if kept is None:
        return None
    parts = strata(kept)
    value = sum(part.share * part.values.mean() for part in parts)
    values = value + sum(part.share * part.deviations.mean(0) for part in parts)
    several = [part for part in parts if len(part.values) > 1]
    for part, term in zip(several, spread(parts, kept.images).runs):
        shared = part.deviations.var(0, ddof=1).mean()  # is in the resampling already
        noise = np.sqrt(term.weight * max(0.0, term.variance - shared) / term.units)
        values = values + noise * rng.standard_t(term.units - 1, len(values))
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
