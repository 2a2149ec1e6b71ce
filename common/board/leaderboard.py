"""The board as pure data: rows are groups of backbones, columns are what they were measured on."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from backbench.common.board.cells import REPLICATES, Cell, Rescored, rescore_cells
from backbench.common.board.columns import NO_TRANSFER, Column, deviations, make_columns, place
from backbench.common.board.paper import METHODS, PaperValue, reference
from backbench.common.board.ranks import Ranks, make_ranks
from backbench.common.board.statistics import Difference, Sample, Score, difference, holm, score

SMALL = ("smoke", "tiny")  # recipes that show the machinery
MACHINERY = (
    "This board shows the machinery, not the science: its {recipes} runs are far too short, and their data too small, "
    "to rank the methods."
)
CIDER_LARGEST = 10.0


@dataclass(frozen=True)
class Row:
    """A group of backbones of one architecture: several pretraining seeds of one method, or one checkpoint."""

    key: str
    group: str
    method: str
    arch: str
    label: str
    scratch: bool


@dataclass(frozen=True)
class Measure:
    """One metric of one entry. `reason` says why there is no score, `unpaired` why no difference.

    `baselines`: what needs no image scores, by name (the mean over the cells), as the best centred box.
    """

    score: Score | None = None
    reason: str = ""
    chance: float | None = None
    above_chance: bool | None = None
    difference: Difference | None = None
    unpaired: str = ""
    paper: PaperValue | None = None
    baselines: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A row's cells in a column, their measures by metric, and what must be said beside them."""

    cells: tuple[Cell, ...] = ()
    measures: dict[str, Measure] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Board:
    """The leaderboard. `entries` by (row key, column key); a missing cell has an entry without cells."""

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    entries: dict[tuple[str, str], Entry]
    ranks: Ranks
    baseline: str
    replicates: int
    seed: int
    machinery: bool  # its runs are too small for science: the first note says so
    notes: tuple[str, ...]

    def primary(self, row: Row, column: Column) -> Measure:
        """The measure that the leaderboard shows."""
        return self.entries[row.key, column.key].measures.get(column.metric, Measure(reason="not run"))


def make_board(
    cells: Iterable[Cell], *, baseline: str = "baseline", replicates: int = REPLICATES, seed: int = 0
) -> Board:
    """Scores with intervals, and paired differences to `baseline` (a group's or a backbone's name).

    Cells share a column when task, data, model, recipe (its name and every field), limit and protocol are equal.
    Of two cells of one identity in one column the newer file counts. Raises UserError for unreadable images.npz.
    """
    by_column, duplicates = place(list(cells))
    kept = [cell for members in by_column.values() for cell in members]
    rescored = dict(zip(map(id, kept), rescore_cells(kept, replicates, seed)))
    rows = _rows(kept, baseline)
    columns = make_columns(by_column)
    entries: dict[tuple[str, str], Entry] = {}
    ranked: dict[str, dict[str, Sample]] = {}
    for column in columns:
        members = by_column[column.key]
        groups = {row.key: [c for c in members if _row_key(c) == row.key] for row in rows}
        samples = {key: _samples(group, column, rescored) for key, group in groups.items()}
        for row in rows:
            reference_row = baseline_of(rows, row, baseline)
            entries[row.key, column.key] = _entry(row, reference_row, column, groups, samples, baseline)
        ranked[column.key] = _comparable(rows, groups, samples, column)
    _adjust(rows, columns, entries)
    small = sorted({column.recipe.split("+")[0] for column in columns} & set(SMALL))
    notes = [MACHINERY.format(recipes=" and ".join(small))] if small else []
    notes += duplicates + _drifted(kept, rescored)
    if rows and not any(baseline in (row.group, row.label) for row in rows):
        names = ", ".join(row.label for row in rows)
        notes.append(f"no row is named {baseline!r}: no differences; --baseline takes one of {names}")
    ranks = make_ranks(ranked, {c.key for c in columns if c.task not in NO_TRANSFER}, seed)
    return Board(rows, columns, entries, ranks, baseline, replicates, seed, bool(small), tuple(notes))


def _row_key(cell: Cell) -> str:
    i = cell.identity
    return f"{i.group or i.backbone}/{i.arch}"


def _rows(cells: list[Cell], baseline: str) -> tuple[Row, ...]:
    """Baseline first, then the paper's methods in its order, then others by name, random weights last."""
    found = {}
    several = len({cell.identity.arch for cell in cells}) > 1
    for cell in cells:
        i = cell.identity
        group = i.group or i.backbone
        label = f"{group} ({i.arch})" if several else group
        found[_row_key(cell)] = Row(_row_key(cell), group, i.method, i.arch, label, cell.scratch)

    def rank(row: Row) -> tuple:
        method = METHODS.index(row.group) if row.group in METHODS else len(METHODS)
        return row.scratch, row.group != baseline, method, row.label

    return tuple(sorted(found.values(), key=rank))


def baseline_of(rows: Iterable[Row], row: Row, name: str) -> Row | None:
    """The row that `row` is compared with: the baseline of its architecture, else the first that is so named."""
    named = [r for r in rows if name in (r.group, r.label)]
    return next((r for r in [*(r for r in named if r.arch == row.arch), *named]), None)


def _samples(group: list[Cell], column: Column, rescored: dict[int, Rescored]) -> dict[str, Sample | str]:
    """Each metric's runs, or why they make no sample."""
    if not group:
        return {}
    if len({tuple(cell.ids) for cell in group}) > 1:
        return dict.fromkeys(column.metrics, "its seeds were scored on different images: run them again")
    found: dict[str, Sample | str] = {}
    for metric in column.metrics:
        if not all(np.isfinite(rescored[id(cell)].point.get(metric, np.nan)) for cell in group):
            found[metric] = _why_missing(metric, group)
            continue
        results = [rescored[id(cell)] for cell in group]
        found[metric] = Sample(
            pretrainings=tuple(cell.pretraining for cell in group),
            seeds=tuple(cell.identity.seed for cell in group),
            values=_array(r.point[metric] for r in results),
            replicates=_array(r.replicates[metric] for r in results),
            images=len(group[0].ids),
        )
    return found


def _array(values: Iterable) -> np.ndarray:
    return np.stack([np.asarray(v, np.float64) for v in values])


def _why_missing(metric: str, group: list[Cell]) -> str:
    if all(cell.metrics.get(metric) is not None for cell in group):
        return "no per-image statistics, so no interval"
    said = [note for cell in group for note in cell.notes if metric.lower() in note.lower()]
    return said[0].removeprefix(f"{metric} n/a: ") if said else "not scored"


def _comparable(
    rows: Iterable[Row],
    groups: dict[str, list[Cell]],
    samples: dict[str, dict[str, Sample | str]],
    column: Column,
) -> dict[str, Sample]:
    """The runs of the primary metric by row, of those that may be ranked: no random weights, the same test images."""
    found = {
        row.key: sample
        for row in rows
        if not row.scratch and isinstance(sample := samples[row.key].get(column.metric), Sample)
    }
    ids = next((groups[key][0].ids for key in found), [])
    return {key: sample for key, sample in found.items() if groups[key][0].ids == ids}


def _entry(
    row: Row,
    baseline_row: Row | None,
    column: Column,
    groups: dict[str, list[Cell]],
    samples: dict[str, dict[str, Sample | str]],
    baseline: str,
) -> Entry:
    group = groups[row.key]
    if not group:
        return Entry()
    unpaired = _why_unpaired(row, baseline_row, groups, baseline)
    measures = {}
    for metric in column.metrics:
        ours = samples[row.key][metric]
        theirs = samples[baseline_row.key].get(metric) if baseline_row else None
        paper = reference(
            *(column.task, column.model, metric, row.method or row.group),
            **{"data": column.data, "arch": row.arch, "recipe": column.recipe},
        )
        chance = _mean(cell.chance.get(metric) for cell in group)
        names = dict.fromkeys(name for cell in group for name in cell.baselines)
        known = {name: _mean(c.baselines.get(name, {}).get(metric) for c in group) for name in names}
        known = {name: value for name, value in known.items() if value is not None}
        if isinstance(ours, str):
            measures[metric] = Measure(None, ours, chance, paper=paper, unpaired=unpaired, baselines=known)
            continue
        measured = score(ours, CIDER_LARGEST if metric == "CIDEr" else 1.0)
        paired, why = None, unpaired
        if not why:
            paired = difference(ours, theirs) if isinstance(theirs, Sample) else None
            why = "" if paired else f"{baseline} has no {metric}"
        measures[metric] = Measure(
            score=measured,
            reason="" if measured else "too few resamplings gave a score",
            chance=chance,
            above_chance=None if measured is None or chance is None else measured.low > chance,
            difference=paired,
            unpaired=why,
            paper=paper,
            baselines=known,
        )
    return Entry(tuple(group), measures, _entry_notes(row, column, group, groups))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _why_unpaired(row: Row, baseline_row: Row | None, groups: dict[str, list[Cell]], baseline: str) -> str:
    """Why a row has no paired difference; empty when it has one."""
    if baseline_row is None:
        return f"no row is named {baseline}"
    if row.key == baseline_row.key:
        return "the baseline itself"
    if row.scratch or baseline_row.scratch:
        return "random weights train by other rules (nothing is frozen): no paired claim"
    if row.arch != baseline_row.arch:
        return f"the baseline is a {baseline_row.arch}, this is a {row.arch}"
    theirs = groups[baseline_row.key]
    if not theirs:
        return f"{baseline} has not run here"
    if len({tuple(cell.ids) for cell in [*groups[row.key], *theirs]}) > 1:
        ours, others = len(groups[row.key][0].ids), len(theirs[0].ids)
        return f"scored on other test images than {baseline} ({ours} and {others})"
    return ""


def _entry_notes(
    row: Row, column: Column, group: list[Cell], groups: dict[str, list[Cell]]
) -> tuple[str, ...]:
    notes = list(dict.fromkeys(n for cell in group for n in cell.notes if n not in column.notes))
    if row.scratch:
        others = [c for key, members in groups.items() if key != row.key for c in members if not c.scratch]
        if others and (changed := deviations(group[0], others[0])):
            notes.append(f"recipe deviates: {', '.join(changed)}")
    return tuple(notes)


def _adjust(
    rows: tuple[Row, ...], columns: tuple[Column, ...], entries: dict[tuple[str, str], Entry]
) -> None:
    """Holm's correction of each row's differences over the columns' primary metrics, in place."""
    for row in rows:
        found = {
            c.key: m.difference
            for c in columns
            if (m := entries[row.key, c.key].measures.get(c.metric)) and m.difference
        }
        for (key, paired), p in zip(found.items(), holm([d.p for d in found.values()])):
            entry = entries[row.key, key]
            metric = next(c.metric for c in columns if c.key == key)
            entry.measures[metric] = replace(entry.measures[metric], difference=replace(paired, p_holm=p))


def _drifted(cells: list[Cell], rescored: dict[int, Rescored]) -> list[str]:
    """Cells whose own numbers are not those that today's metrics give."""
    lines = []
    for cell in cells:
        for metric, value in rescored[id(cell)].point.items():
            said = cell.metrics.get(metric)
            if said is not None and not abs(said - value) <= 1e-6:
                lines.append(
                    f"{cell.folder}: says {metric} {100 * said:.2f}, its images give {100 * value:.2f} with today's "
                    "metrics, which is shown"
                )
    return lines
