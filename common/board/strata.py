"""The runs of a score as units whose spread is chance in training: pretrainings, seeds, what seeds give to all alike.

Where all pretrainings took the same fine-tuning seeds (crossed), what a seed gives to every pretraining alike is a part
of its own: the variance of their mean is (MS_pretraining + MS_seed − MS_rest) / runs, of the mean squares of the
two-way table; MS_pretraining / runs where the seeds differ less than the rest alone would let them. With one
fine-tuning seed, or other seeds for each pretraining, no such part can be told apart, and none is in the interval.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

IMAGES, CHECKPOINT, METHOD = "test images only", "this checkpoint", "this method"
LEVELS = (IMAGES, CHECKPOINT, METHOD)  # from the weakest claim to the strongest
FEWEST_PRETRAININGS = 3  # for a claim about a method


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


class Rest(NamedTuple):
    """Of a variance of seeds' means over pretrainings, what chance in the single runs makes of it, with its degrees of
    freedom; `image`: the share of that which resampling the test images shows."""

    variance: float
    image: float
    df: float


@dataclass(frozen=True)
class Stratum:
    """Interchangeable units whose spread is measured: `labels` (k,), `values` (k,), `deviations` (k, R).

    `unit`: what they are, "pretraining" or "seed". Strata of equal units and labels can be paired. With a `rest` the
    values are what seeds give to all pretrainings alike: deviations from their mean, 0 in the estimate itself.
    """

    unit: str
    labels: tuple[Hashable, ...]
    values: np.ndarray
    deviations: np.ndarray  # replicates less values
    share: float  # its weight in the estimate
    rest: Rest | None = None

    def variances(self, correction: float = 1.0) -> tuple[float, float, float]:
        """Of two units or more: the variance of `values` (less the rest's), the part of it that resampling shows (seed
        × image), and the variance as it stands. `correction`: what makes a resampled variance unbiased."""
        seen = float(self.values.var(ddof=1))
        image = float(self.deviations.var(0, ddof=1).mean())
        rest, image_rest = (self.rest.variance, self.rest.image) if self.rest else (0.0, 0.0)
        return seen - rest, correction * max(0.0, image - image_rest), seen


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
    """Units whose spread stands for chance in training: pretrainings from 3 on, else the seeds within each.

    Crossed with the same seeds, 3 pretrainings or more have a second stratum, of what a seed gives to all of them; two
    have one, of the seeds' means over both.
    """
    runs = _runs_of(sample)
    deviations = sample.replicates - sample.values[:, None]
    crossed = _crossed(sample, runs)
    if len(runs) >= FEWEST_PRETRAININGS:
        values = np.array([sample.values[index].mean() for index in runs.values()])
        means = np.stack([deviations[index].mean(0) for index in runs.values()])
        pretrainings = _sorted("pretraining", tuple(runs), values, means, 1.0)
        return [pretrainings] if crossed is None else [pretrainings, _common(sample, deviations, crossed)]
    if crossed is not None:
        labels = tuple(sample.seeds[i] for i in crossed[0])
        return [_sorted("seed", labels, sample.values[crossed].mean(0), deviations[crossed].mean(0), 1.0)]
    return [
        _sorted(
            *("seed", tuple(sample.seeds[i] for i in index)),
            *(sample.values[index], deviations[index], 1 / len(runs)),
        )
        for index in runs.values()
    ]


def _crossed(sample: Sample, runs: dict[Hashable, list[int]]) -> np.ndarray | None:
    """Indices of the runs, (pretrainings, seeds), where two pretrainings or more took the same seeds, two or more."""
    rows = [sorted(index, key=lambda i: sample.seeds[i]) for index in runs.values()]
    seeds = {tuple(sample.seeds[i] for i in row) for row in rows}
    labels = next(iter(seeds))
    if len(rows) < 2 or len(seeds) > 1 or not len(labels) == len(set(labels)) > 1:
        return None
    return np.array(rows)


def _common(sample: Sample, deviations: np.ndarray, crossed: np.ndarray) -> Stratum:
    """What each seed gives to all pretrainings alike, beside the rest of a two-way table."""
    pretrainings, seeds = crossed.shape
    values, moved = sample.values[crossed], deviations[crossed]
    df = (pretrainings - 1) * (seeds - 1)
    rest = Rest(
        float((_centred(values) ** 2).sum()) / df / pretrainings,
        float((_centred(moved) ** 2).sum((0, 1)).mean()) / df / pretrainings,
        df,
    )
    labels = tuple(sample.seeds[i] for i in crossed[0])
    means = moved.mean(0)
    effects = _sorted("seed", labels, values.mean(0) - values.mean(), means - means.mean(0), 1.0)
    return replace(effects, rest=rest)


def _centred(table: np.ndarray) -> np.ndarray:
    """A table (p, s, …) less its rows' and its columns' means."""
    return table - table.mean(0) - table.mean(1, keepdims=True) + table.mean((0, 1))


def _sorted(unit: str, labels: tuple, values: np.ndarray, deviations: np.ndarray, share: float) -> Stratum:
    order = sorted(range(len(labels)), key=lambda i: (str(type(labels[i])), labels[i]))
    return Stratum(unit, tuple(labels[i] for i in order), values[order], deviations[order], share)


def components(sample: Sample) -> dict[str, float]:
    """Standard deviations of one run's score by source: "test images", "fine-tuning", "pretraining".

    Fine-tuning is pooled within pretrainings; what lies between pretrainings beyond it is pretraining (0 when it
    comes out negative), beyond the rest of a two-way table where the seeds are crossed: what a seed gives to all is not
    between them. A source without two units to compare is left out.
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
        crossed = _crossed(sample, runs)
        if crossed is not None:
            within = (_centred(sample.values[crossed]) ** 2).sum() / (len(runs) - 1) / (counts[0] - 1)
        parts["pretraining"] = float(np.sqrt(max(0.0, between - within * (1 / counts).mean())))
    return parts


def run_by_run(row: Sample, baseline: Sample) -> Sample | None:
    """The differences run by run; None where a run has no partner, or two have the same labels."""
    ours, theirs = (
        {
            (s.pretrainings[i] if len(set(s.pretrainings)) > 1 else 0, s.seeds[i]): i
            for i in range(len(s.values))
        }
        for s in (row, baseline)
    )
    if ours.keys() != theirs.keys() or not len(ours) == len(row.values) == len(baseline.values):
        return None
    a, b = list(ours.values()), [theirs[name] for name in ours]
    return Sample(
        tuple(row.pretrainings[i] for i in a),
        tuple(row.seeds[i] for i in a),
        row.values[a] - baseline.values[b],
        row.replicates[a] - baseline.replicates[b],
        row.images,
    )


def less(ours: list[Stratum], theirs: list[Stratum]) -> list[Stratum]:
    """The strata of a difference: pretrainings or seeds, and apart from them what seeds give to all alike, are paired
    where both sides have the same labels; else each side brings its own."""
    parts = []
    for common in (False, True):
        a, b = ([part for part in side if bool(part.rest) == common] for side in (ours, theirs))
        parts += (
            map(_minus, a, b)
            if names(a) == names(b)
            else [*a, *(replace(part, share=-part.share) for part in b)]
        )
    return parts


def _minus(a: Stratum, b: Stratum) -> Stratum:
    rest = a.rest and Rest(
        a.rest.variance + b.rest.variance, a.rest.image + b.rest.image, min(a.rest.df, b.rest.df)
    )
    return replace(a, values=a.values - b.values, deviations=a.deviations - b.deviations, rest=rest)


def names(parts: Sequence[Stratum]) -> list[tuple]:
    """What must be equal of two lists of strata to pair them: units and labels."""
    return [(part.unit, part.labels) for part in parts]
