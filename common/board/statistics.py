"""Intervals and paired differences from per-image statistics: variance components with a t, no model run again.

A score is a mean over runs (pretraining seeds, fine-tuning seeds) measured on one sample of test images. Its variance
has a part for the runs and a part for the images. The images' part comes from resampling them (a bootstrap whose draws
are the same for every backbone); of that, what differs between runs (seed × image) is already in the spread of the
runs and is taken out, so that nothing counts twice. The interval is estimate ± t · standard error with Satterthwaite's
degrees of freedom, and never shorter than that of the runs alone. A percentile bootstrap over few seeds would be far
too short: 74 % coverage at 3 seeds.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from backbench.common.board.strata import (
    IMAGES,
    LEVELS,
    Rest,
    Sample,
    Stratum,
    components,
    less,
    level,
    names,
    run_by_run,
    strata,
)

CONFIDENCE, POWER = 0.95, 0.8
MOST_SEEDS = 1000  # beyond, "seeds needed" says that seeds alone do not do
RULE_OF_THREE = 3.0  # 95 % upper limit of a share is 3/n when none of n images shows it


class Term(NamedTuple):
    """A stratum of two units or more in an estimate's variance: weight · variance / units.

    `seen` is the variance of its values; `variance` the same less that of the `rest`, not let below what the test
    images make of it.
    """

    weight: float
    variance: float
    seen: float
    units: int
    rest: Rest | None = None


@dataclass(frozen=True)
class Spread:
    """What an estimate's error is made of.

    `runs`: a term a stratum. `image`: the variance that other test images would add, known with `image_df` degrees of
    freedom.
    """

    runs: tuple[Term, ...]
    image: float
    image_df: float

    def candidates(self, units: int | None = None) -> list[tuple[float, float]]:
        """(standard error, degrees of freedom) of everything together, then of each stratum of runs alone (but for what
        seeds give to all pretrainings alike: with two seeds its t is 12.7 wide, whether there is such a part or not).

        An interval takes the widest. Satterthwaite's degrees of freedom alone are not enough: where the runs' spread
        comes out small by luck, they come out large, and an added source of noise could *shorten* the interval (92.4 %
        coverage at 3 seeds where the runs' part is 85 to 95 %; with this rule 94.9 %). A mean square that is taken off
        adds to the noise of the sum, which alone could leave next to no degrees of freedom: never fewer than those of
        the part that has the fewest. `units`: as if every stratum without a rest had so many.
        """
        runs = [t if units is None or t.rest else t._replace(units=units) for t in self.runs]
        squares = [(t.weight * (t.seen if t.rest else t.variance) / t.units, t.units - 1) for t in runs]
        squares += [(t.weight * t.rest.variance / t.units, t.rest.df) for t in runs if t.rest]
        total = sum((t.weight * t.variance / t.units for t in runs), self.image)
        noise = sum((part**2 / df for part, df in squares), self.image**2 / self.image_df)
        df = total**2 / noise if noise > 0 else self.image_df
        df = max(df, min([self.image_df, *(t.units - 1 for t in runs)]) if runs else df)
        alone = [((t.weight * t.seen / t.units) ** 0.5, t.units - 1) for t in runs if not t.rest]
        return [(total**0.5, df), *alone]

    def half_width(self, units: int | None = None, power: float = 0.0) -> float:
        """Half of the 95 % interval; with `power`, the smallest true value that is shown so often."""
        return max(
            float((stdtrit(df, (1 + CONFIDENCE) / 2) + (stdtrit(df, power) if power else 0)) * se)
            for se, df in self.candidates(units)
        )

    def tail(self, value: float) -> float:
        """One-sided p-value of |value|: the largest that a candidate gives."""
        return max(
            (float(stdtr(df, -abs(value) / se)) for se, df in self.candidates() if se > 0), default=0.5
        )

    def units_needed(self, value: float) -> int | None:
        """The fewest units a stratum that show a true `value` with 80 % probability, of as many seeds a pretraining as
        there are; None where none would do."""
        if not self.runs or value == 0:
            return None
        known = range(2, MOST_SEEDS + 1)
        place = bisect_left(known, True, key=lambda k: bool(self.half_width(k, POWER) <= abs(value)))
        return known[place] if place < len(known) else None


@dataclass(frozen=True)
class Score:
    """An estimate with its 95 % interval, value ± `half` cut at the ends of the score's range.

    `parts`: standard deviations by source, where they can be had.
    """

    value: float
    low: float
    high: float
    half: float
    se: float
    df: float
    level: str
    seeds: int
    pretrainings: int
    parts: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """A paired difference to the baseline, with its 95 % interval, value ± `half`.

    `better`: probability that the row is better, of the same t. `p`: two-sided; `p_holm`: adjusted over the columns.
    `detectable`: the smallest true difference that such data show with 80 % probability. `needed`: units (seeds; or
    pretrainings, for a claim about the method) with which that would be the difference observed; None where the runs'
    spread is unknown, or no number of them would do on so few images (or with so few seeds). `blocked`: the runs were
    paired by their labels.
    `parts`: standard deviations of one run's difference by source, where every run has its partner. Correlations are
    those that pairing gave: over images, and over blocked seeds from 3 on. `unpaired_se`: without pairing.
    """

    value: float
    low: float
    high: float
    half: float
    se: float
    df: float
    level: str
    better: float
    p: float
    detectable: float
    blocked: bool
    needed: int | None
    parts: dict[str, float]
    unpaired_se: float
    image_correlation: float | None
    seed_correlation: float | None
    p_holm: float | None = None


def draw_weights(
    n: int, replicates: int, rng: np.random.Generator, cells: int = 8_000_000
) -> Iterator[np.ndarray]:
    """Bootstrap draws of n images as counts: float64 (r, n) blocks, together (replicates, n), each row summing to n.

    A block holds at most `cells` numbers, so that any n fits into memory; equal (n, cells) give equal draws.
    """
    rows = max(1, min(replicates, cells // n))
    for start in range(0, replicates, rows):
        now = min(rows, replicates - start)
        drawn = rng.integers(0, n, (now, n)) + n * np.arange(now)[:, None]
        yield np.bincount(drawn.ravel(), minlength=now * n).reshape(now, n).astype(np.float64)


def spread(parts: Sequence[Stratum], images: int) -> Spread:
    """What Σ share · mean of each stratum is uncertain by.

    A stratum's variance is that of its values, which holds the seed and the seed × image part; it is not let below
    the seed × image part that resampling shows. The images' term is the bootstrap variance of the estimate less each
    stratum's share of seed × image, with n − 1 degrees of freedom. A stratum of one unit has no term: its spread is
    unknown, and the claim is about test images only; nor has one that varies less than its rest.
    """
    correction = images / max(1, images - 1)  # a resample's variance is (n − 1)/n of the unbiased one
    total = sum(part.share * part.deviations.mean(0) for part in parts)
    image = correction * total.var()
    runs = []
    for part in parts:
        k = len(part.values)
        if k < 2:
            continue
        variance, interaction, seen = part.variances(correction)
        if part.rest and variance <= interaction:
            continue
        runs.append(Term(part.share**2, max(variance, interaction), seen, k, part.rest))
        image -= part.share**2 * interaction / k
    df = 1 / (1 / max(1, images - 1) + 1 / max(1, len(total) - 1))
    return Spread(tuple(runs), float(max(0.0, image)), df)


def score(sample: Sample, upper: float = 1.0) -> Score | None:
    """The mean of the runs with its interval, kept within [0, upper]. None when resampling left too few scores.

    Where no resampling moves the score (every image right, or none) the interval reaches 3/n into the range.
    """
    sample = finite(sample)
    if sample is None:
        return None
    parts = strata(sample)
    value = float(sum(part.share * part.values.mean() for part in parts))
    error = spread(parts, sample.images)
    se, df = error.candidates()[0]
    half = _half_width(error, sample.images)
    return Score(
        value=value,
        low=max(0.0, value - half),
        high=min(upper, value + half),
        half=half,
        se=float(se),
        df=float(df),
        level=level(sample),
        seeds=len(sample.values),
        pretrainings=len(set(sample.pretrainings)),
        parts=components(sample),
    )


def _half_width(error: Spread, images: int) -> float:
    return error.half_width() or RULE_OF_THREE / images


def finite(sample: Sample, share: float = 0.95) -> Sample | None:
    """The sample without resamplings that gave NaN in any run; None when less than `share` of them are left."""
    good = np.isfinite(sample.replicates).all(0)
    if not np.isfinite(sample.values).all() or good.mean() < share:
        return None
    return Sample(sample.pretrainings, sample.seeds, sample.values, sample.replicates[:, good], sample.images)


def difference(row: Sample, baseline: Sample) -> Difference | None:
    """`row` less `baseline`, paired by test images and, where both have the same seeds, by seeds too.

    Both must hold scores of the same images under the same resamplings: the caller sees to equal ids (ValueError when
    even the counts differ). None when resampling left too few scores.
    """
    if row.images != baseline.images or row.replicates.shape[1] != baseline.replicates.shape[1]:
        raise ValueError("a paired difference needs the same test images and resamplings")
    good = np.isfinite(row.replicates).all(0) & np.isfinite(baseline.replicates).all(0)
    pair = [
        Sample(s.pretrainings, s.seeds, s.values, s.replicates[:, good], s.images) for s in (row, baseline)
    ]
    if good.mean() < 0.95 or not all(np.isfinite(s.values).all() for s in pair):
        return None
    ours, theirs = map(strata, pair)
    runs = run_by_run(*pair)
    parts = strata(runs) if runs else less(ours, theirs)
    mains = [[part for part in side if not part.rest] for side in (ours, theirs)]
    blocked = names(mains[0]) == names(mains[1])
    value = float(sum(part.share * part.values.mean() for part in parts))
    error = spread(parts, row.images)
    se, df = error.candidates()[0]
    half = _half_width(error, row.images)
    tail = error.tail(value) if error.half_width() else float(np.exp(-row.images * abs(value)) / 2)
    claim = min(map(level, pair), key=LEVELS.index)
    return Difference(
        value=value,
        low=value - half,
        high=value + half,
        half=half,
        se=float(se),
        df=float(df),
        level=claim,
        better=1 - tail if value > 0 else tail,
        p=min(1.0, 2 * tail),
        detectable=max(half, error.half_width(power=POWER)),
        needed=error.units_needed(value) if claim != IMAGES else None,
        parts=components(runs) if runs else {},
        unpaired_se=float(
            np.hypot(*(spread(side, row.images).candidates()[0][0] for side in (ours, theirs)))
        ),
        blocked=blocked and any(len(s.labels) > 1 for s in mains[0]),
        image_correlation=_correlation(
            *(sum(s.share * s.deviations.mean(0) for s in side) for side in (ours, theirs))
        ),
        seed_correlation=_correlation(ours[0].values, theirs[0].values)
        if blocked and len(mains[0]) == 1 and len(ours[0].values) > 2
        else None,
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else None


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics, 1979), in the order given."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty(len(p))
    result[order] = np.minimum(1.0, adjusted)
    return result.tolist()
