"""Intervals and paired differences from per-image statistics: variance components with a t, no model run again.

A score is a mean over runs (pretraining seeds, fine-tuning seeds) measured on one sample of test images. Its variance
has a part for the runs and a part for the images. The images' part comes from resampling them (a bootstrap whose draws
are the same for every backbone); of that, what differs between runs (seed × image) is already in the spread of the
runs and is taken out, so that nothing counts twice. The interval is estimate ± t · standard error with Satterthwaite's
degrees of freedom, and never shorter than that of the runs alone. A percentile bootstrap over few seeds would be far
too short: 74 % coverage at 3 seeds.

Of several pretrainings with the same fine-tuning seeds, the seeds count as drawn anew for each: what one seed would
give to every pretraining alike is not in the interval.
"""

from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

IMAGES, CHECKPOINT, METHOD = "test images only", "this checkpoint", "this method"
LEVELS = (IMAGES, CHECKPOINT, METHOD)  # from the weakest claim to the strongest
CONFIDENCE, POWER = 0.95, 0.8
FEWEST_PRETRAININGS = 3  # for a claim about a method
MOST_SEEDS = 1000  # beyond, "seeds needed" says that seeds alone do not do
RULE_OF_THREE = 3.0  # 95 % upper limit of a share is 3/n when none of n images shows it


@dataclass(frozen=True)
class Sample:
    """The runs of one row in one column, for one metric.

    `pretrainings`, `seeds`: a label a run, (m,). `values`: float (m,), the scores. `replicates`: float (m, R), the
    scores under R resamplings of the `images` test images, the same for every run.
    """

    pretrainings: tuple[Hashable, ...]
    seeds: tuple[int, ...]
    values: np.ndarray
    replicates: np.ndarray
    images: int


@dataclass(frozen=True)
class Stratum:
    """Interchangeable units whose spread is measured: `labels` (k,), `values` (k,), `deviations` (k, R).

    `unit`: what they are, "pretraining" or "seed". Strata of equal units and labels can be paired.
    """

    unit: str
    labels: tuple[Hashable, ...]
    values: np.ndarray
    deviations: np.ndarray  # replicates less values
    share: float  # its weight in the estimate


class Term(NamedTuple):
    """A stratum of two units or more in an estimate's variance: weight · variance / units.

    `seen` is the variance of its values; `variance` the same, not let below what the test images make of it.
    """

    weight: float
    variance: float
    seen: float
    units: int


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
        """(standard error, degrees of freedom) of everything together, then of each stratum of runs alone.

        An interval takes the widest. Satterthwaite's degrees of freedom alone are not enough: where the runs' spread
        comes out small by luck, they come out large, and an added source of noise could *shorten* the interval (92.4 %
        coverage at 3 seeds where the runs' part is 85 to 95 %; with this rule 94.9 %). `units`: as if every stratum
        had so many.
        """
        runs = [term if units is None else term._replace(units=units) for term in self.runs]
        parts = [(t.weight * t.variance / t.units, t.units - 1) for t in runs]
        total = sum((part for part, _ in parts), self.image)
        squares = sum((part**2 / df for part, df in parts), self.image**2 / self.image_df)
        df = total**2 / squares if squares > 0 else self.image_df
        return [(total**0.5, df), *(((t.weight * t.seen / t.units) ** 0.5, t.units - 1) for t in runs)]

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
        """The fewest units a stratum that show a true `value` with 80 % probability; None where none would do."""
        if not self.runs or value == 0:
            return None
        known = range(2, MOST_SEEDS + 1)
        place = bisect_left(known, True, key=lambda k: bool(self.half_width(k, POWER) <= abs(value)))
        return known[place] if place < len(known) else None


@dataclass(frozen=True)
class Score:
    """An estimate with its 95 % interval. `parts`: standard deviations by source, where they can be had."""

    value: float
    low: float
    high: float
    se: float
    df: float
    level: str
    seeds: int
    pretrainings: int
    parts: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """A paired difference to the baseline, with its 95 % interval.

    `better`: probability that the row is better, of the same t. `p`: two-sided; `p_holm`: adjusted over the columns.
    `detectable`: the smallest true difference that such data show with 80 % probability. `needed`: units (seeds; or
    pretrainings, for a claim about the method) with which that would be the difference observed; None where the runs'
    spread is unknown, or no number of runs would do on so few images. `blocked`: the runs were paired seed by seed.
    `parts`: standard deviations of one run's difference by source, where every run has its partner. Correlations are
    those that pairing gave: over images, and over blocked seeds from 3 on. `unpaired_se`: without pairing.
    """

    value: float
    low: float
    high: float
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


def level(sample: Sample) -> str:
    """What a claim from these runs is about.

    METHOD from 3 pretraining seeds on; CHECKPOINT when every pretraining has at least 2 fine-tuning seeds; else
    IMAGES: chance in training is not in the interval.
    """
    counts = _runs_of(sample)
    if len(counts) >= FEWEST_PRETRAININGS:
        return METHOD
    return CHECKPOINT if min(map(len, counts.values())) >= 2 else IMAGES


def _runs_of(sample: Sample) -> dict[Hashable, list[int]]:
    """Indices of the runs of each pretraining."""
    runs: dict[Hashable, list[int]] = {}
    for index, pretraining in enumerate(sample.pretrainings):
        runs.setdefault(pretraining, []).append(index)
    return runs


def strata(sample: Sample) -> list[Stratum]:
    """Units whose spread stands for chance in training: pretrainings from 3 on, else the seeds within each."""
    runs = _runs_of(sample)
    deviations = sample.replicates - sample.values[:, None]
    if len(runs) >= FEWEST_PRETRAININGS:
        values = np.array([sample.values[index].mean() for index in runs.values()])
        means = np.stack([deviations[index].mean(0) for index in runs.values()])
        return [_sorted("pretraining", tuple(runs), values, means, 1.0)]
    return [
        _sorted(
            *("seed", tuple(sample.seeds[i] for i in index)),
            *(sample.values[index], deviations[index], 1 / len(runs)),
        )
        for index in runs.values()
    ]


def _sorted(unit: str, labels: tuple, values: np.ndarray, deviations: np.ndarray, share: float) -> Stratum:
    order = sorted(range(len(labels)), key=lambda i: (str(type(labels[i])), labels[i]))
    return Stratum(unit, tuple(labels[i] for i in order), values[order], deviations[order], share)


def spread(parts: Sequence[Stratum], images: int) -> Spread:
    """What Σ share · mean of each stratum is uncertain by.

    A stratum's variance is that of its values, which holds the seed and the seed × image part; it is not let below
    the seed × image part that resampling shows. The images' term is the bootstrap variance of the estimate less each
    stratum's share of seed × image, with n − 1 degrees of freedom. A stratum of one unit has no term: its spread is
    unknown, and the claim is about test images only.
    """
    correction = images / max(1, images - 1)  # a resample's variance is (n − 1)/n of the unbiased one
    total = sum(part.share * part.deviations.mean(0) for part in parts)
    image = correction * total.var()
    runs = []
    for part in parts:
        k = len(part.values)
        if k < 2:
            continue
        interaction = correction * part.deviations.var(0, ddof=1).mean()
        seen = float(part.values.var(ddof=1))
        runs.append(Term(part.share**2, max(seen, float(interaction)), seen, k))
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


def components(sample: Sample) -> dict[str, float]:
    """Standard deviations of one run's score by source: "test images", "fine-tuning", "pretraining".

    Fine-tuning is pooled within pretrainings; what lies between pretrainings beyond it is pretraining (0 when it
    comes out negative). A source without two units to compare is left out.
    """
    runs = _runs_of(sample)
    deviations = sample.replicates - sample.values[:, None]
    correction = sample.images / max(1, sample.images - 1)
    image = deviations.mean(0).var()
    if len(sample.values) > 1:
        image -= deviations.var(0, ddof=1).mean() / len(sample.values)
    parts = {"test images": float(np.sqrt(max(0.0, correction * image)))}
    counts = np.array([len(index) for index in runs.values()])
    within = 0.0
    if (counts > 1).any():
        squares = sum(((sample.values[i] - sample.values[i].mean()) ** 2).sum() for i in runs.values())
        within = squares / (counts - 1).sum()
        parts["fine-tuning"] = float(np.sqrt(within))
    if len(runs) > 1 and (counts > 1).all():
        between = np.var([sample.values[index].mean() for index in runs.values()], ddof=1)
        parts["pretraining"] = float(np.sqrt(max(0.0, between - within * (1 / counts).mean())))
    return parts


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
    blocked = [(s.unit, s.labels) for s in ours] == [(s.unit, s.labels) for s in theirs]
    if blocked:
        parts = [
            replace(a, values=a.values - b.values, deviations=a.deviations - b.deviations)
            for a, b in zip(ours, theirs)
        ]
    else:
        parts = ours + [replace(part, share=-part.share) for part in theirs]
    value = float(sum(part.share * part.values.mean() for part in parts))
    error = spread(parts, row.images)
    se, df = error.candidates()[0]
    half, tail = _half_width(error, row.images), error.tail(value)
    claim = min(map(level, pair), key=LEVELS.index)
    return Difference(
        value=value,
        low=value - half,
        high=value + half,
        se=float(se),
        df=float(df),
        level=claim,
        better=1 - tail if value > 0 else tail,
        p=min(1.0, 2 * tail),
        detectable=max(half, error.half_width(power=POWER)),
        needed=error.units_needed(value) if claim != IMAGES else None,
        parts=_difference_parts(*pair) if blocked else {},
        unpaired_se=float(
            np.hypot(*(spread(side, row.images).candidates()[0][0] for side in (ours, theirs)))
        ),
        blocked=blocked and any(len(s.labels) > 1 for s in ours),
        image_correlation=_correlation(
            *(sum(s.share * s.deviations.mean(0) for s in side) for side in (ours, theirs))
        ),
        seed_correlation=_correlation(ours[0].values, theirs[0].values)
        if blocked and len(ours) == 1 and len(ours[0].values) > 2
        else None,
    )


def _difference_parts(row: Sample, baseline: Sample) -> dict[str, float]:
    """`components` of the differences run by run; nothing where a run has no partner."""
    ours, theirs = (
        {
            (s.pretrainings[i] if len(set(s.pretrainings)) > 1 else 0, s.seeds[i]): i
            for i in range(len(s.values))
        }
        for s in (row, baseline)
    )
    if ours.keys() != theirs.keys():
        return {}
    a, b = list(ours.values()), [theirs[name] for name in ours]
    return components(
        Sample(
            tuple(row.pretrainings[i] for i in a),
            tuple(row.seeds[i] for i in a),
            row.values[a] - baseline.values[b],
            row.replicates[a] - baseline.replicates[b],
            row.images,
        )
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
