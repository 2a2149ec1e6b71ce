"""Columns: which cells were measured alike, so that their scores may stand below one another."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from backbench.common.base.files import digest
from backbench.common.board.cells import Cell

MODELS = {
    **{"ssd300": "SSD300", "faster_rcnn": "Faster R-CNN", "nic": "NIC", "cam": "CAM"},
    **{"fgsm": "FGSM", "occlusion": "Occlusion", "between": "In-between", "ood": "OOD"},
}
TASKS = {
    "classification": "pretraining",
    "detection": "detection",
    "captioning": "captioning",
    "wsol": "weakly supervised localisation",
    "robustness": "robustness and uncertainty",
}
NO_TRANSFER = ("classification", "robustness")  # tasks that train no head on a backbone
ORDER = (
    *("classification", "ssd300", "faster_rcnn", "detection", "captioning", "wsol"),
    *("fgsm", "occlusion", "between", "ood"),
)


@dataclass(frozen=True)
class Column:
    """What a score was measured with: cells that share it may be compared. `metric` is the primary one."""

    key: str
    task: str
    model: str
    data: str
    recipe: str
    limit: int
    metric: str
    metrics: tuple[str, ...]
    images: int
    label: str  # of the model
    detail: str  # metric, and whatever else tells it from its neighbours, joined by " · "
    notes: tuple[str, ...]


def _frame(cell: Cell) -> dict[str, Any]:
    """What must be equal in a column, recipe fields aside."""
    i, inputs = cell.identity, cell.inputs
    return {
        "task": i.task,
        "data": i.data,
        "model": i.model,
        "recipe": i.recipe,
        "limit": i.limit,
        "fingerprints": [inputs[stage].get("data") for stage in ("train", "predict")],
        "protocol": [stage.get("protocol") for stage in inputs.values()],
        "primary": cell.primary,
    }


def _settings(cell: Cell) -> dict[str, Any]:
    """The recipe's fields by name, without a method in which rows differ by design.

    That is a pretraining's method, and WSOL's with `--method own`, which its recipe's label says.
    """
    found = {
        f"{stage}.{name}": value
        for stage, inputs in cell.inputs.items()
        for name, value in inputs.get("recipe", {}).items()
    }
    if cell.identity.task == "classification" or "method=own" in cell.identity.recipe.split("+"):
        found.pop("train.method", None)
    return found


def place(cells: list[Cell]) -> tuple[dict[str, list[Cell]], list[str]]:
    """Cells by column key, and a line about each that was left out as a duplicate.

    Random weights join the column of their frame whose recipe is nearest: that nothing of them is frozen is a
    deviation, not another experiment.
    """
    columns: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda c: (c.scratch, str(c.folder))):
        key = digest(_frame(cell), _settings(cell))
        if cell.scratch and key not in columns:
            same = [k for k, members in columns.items() if _frame(members[0]) == _frame(cell)]
            key = min(same, key=lambda k: len(deviations(cell, columns[k][0])), default=key)
        columns.setdefault(key, []).append(cell)
    lines = []
    for key, members in columns.items():
        newest: dict[Any, Cell] = {}
        for cell in members:
            i = cell.identity
            name = (i.group, i.backbone, i.arch, cell.pretraining, i.seed)
            old = newest.get(name)
            if old is not None:
                first, second = sorted((old, cell), key=lambda c: c.written)
                cell = second
                lines.append(f"{first.folder}: left out, {second.folder} measures the same and is newer")
            newest[name] = cell
        columns[key] = list(newest.values())
    return columns, lines


def deviations(cell: Cell, other: Cell) -> list[str]:
    """Recipe fields in which a cell differs from another, as "stage.field=value (others value)"."""
    ours, theirs = _settings(cell), _settings(other)
    return [
        f"{name.partition('.')[2]}={ours.get(name)} (others {theirs.get(name)})"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _rank(item: tuple[str, list[Cell]]) -> tuple:
    i = item[1][0].identity
    known = next((ORDER.index(name) for name in (i.model, i.task) if name in ORDER), len(ORDER))
    return known, i.model, i.data, i.recipe, i.limit, item[0]


def make_columns(by_column: dict[str, list[Cell]]) -> tuple[Column, ...]:
    """The columns of cells placed by key, in the board's order, told apart by their details."""
    drafts = []
    for key, members in sorted(by_column.items(), key=_rank):
        first = members[0]
        i = first.identity
        names = dict.fromkeys(name for cell in members for name in cell.metrics)
        label = MODELS.get(i.model, i.model)
        drafts.append(
            Column(
                *(key, i.task, i.model, i.data, i.recipe, i.limit, first.primary, tuple(names)),
                images=max(len(cell.ids) for cell in members),
                label="Pretraining" if i.task == "classification" else label,
                detail="",
                notes=_common_notes(members),
            )
        )
    return tuple(_told_apart(column, drafts) for column in drafts)


def _told_apart(column: Column, all_columns: list[Column]) -> Column:
    """The column with its detail: metric; data and recipe where they differ on the board; limit; else a number."""
    detail = column.metric + (f" · {column.model}" if column.task == "classification" else "")
    for what in ("data", "recipe"):
        if len({getattr(c, what) for c in all_columns}) > 1:
            detail += f" · {getattr(column, what)}"
    if column.limit:
        detail += f" · limit {column.limit}"
    alike = [
        c.key
        for c in all_columns
        if (c.label, c.data, c.recipe, c.limit, c.metric)
        == (column.label, column.data, column.recipe, column.limit, column.metric)
    ]
    if len(alike) > 1:
        detail += f" · variant {alike.index(column.key) + 1}"
    return replace(column, detail=detail)


def _common_notes(members: list[Cell]) -> tuple[str, ...]:
    """What every cell of a column says, and what mixes within it."""
    counts = Counter(note for cell in members for note in dict.fromkeys(cell.notes))
    notes = [note for note, count in counts.items() if count == len(members) > 1]
    for what, values in (
        ("arithmetic of training", {cell.train_precision for cell in members if cell.train_precision}),
        ("arithmetic of evaluation", {cell.eval_precision for cell in members}),
        ("device", {str(cell.device.get("device")) for cell in members}),
    ):
        if len(values) > 1:
            notes.append(f"{what} differs within this column: {', '.join(sorted(values))}")
    return tuple(notes)
