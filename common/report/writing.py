"""For a paper: the methods paragraph, written from the cells' recipes and provenance, and the table in LaTeX."""

import re
from collections.abc import Sequence

from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json
from backbench.common.board.cells import Cell
from backbench.common.board.columns import Column
from backbench.common.board.leaderboard import Board, Measure, Row
from backbench.common.board.statistics import CONFIDENCE, POWER
from backbench.common.report.table import (
    baseline_names,
    excludes_zero,
    half_width,
    known_range,
    levels,
    percent,
    signed,
)

SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "τ": r"$\tau$",
    "→": r"$\to$",
}
SPECIAL |= {"·": r"$\cdot$", "²": "$^2$", "≥": r"$\geq$", "≤": r"$\leq$", "λ": r"$\lambda$", "–": "--"}
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''"}  # OT1 prints others
LONG = re.compile(r"(?<=[+_/=,])(?=\w)")  # where a long name may be broken
ROWS_A_TABLE = 16  # with their differences, a page
OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(SPECIAL.get(c, c) for c in text)


def methods_markdown(board: Board) -> str:
    """How the numbers of this board came about, a paragraph a subject, as Markdown."""
    return "\n\n".join(_paragraphs(board)) + "\n"


def methods_latex(board: Board) -> str:
    """`methods_markdown` as LaTeX; long names of recipes and data may be broken."""
    words = (
        r"\allowbreak{}".join(map(escape, LONG.split(word))) if len(word) > 15 else escape(word)
        for text in _paragraphs(board)
        for word in [*text.split(" "), "\n\n"]
    )
    return " ".join(words).replace(" \n\n ", "\n\n").strip() + "\n"


def methods(board: Board, suffix: str) -> str:
    """The methods in the language of a file's suffix, .md or .tex. Raises UserError for another."""
    writers = {".md": methods_markdown, ".tex": methods_latex}
    if suffix not in writers:
        raise UserError(
            f"--methods: a file that ends in {' or '.join(writers)} is needed, not {suffix or 'no suffix'!r}"
        )
    return writers[suffix](board)


def _paragraphs(board: Board) -> list[str]:
    found = [_column(board, column) for column in board.columns]
    compared = [
        row.label for row in board.rows if any(board.primary(row, c).difference for c in board.columns)
    ]
    statistics = (
        f"Intervals are at {100 * CONFIDENCE:.0f} %. The variance of a score has parts for the test images (by "
        f"{board.replicates} bootstrap draws of the images) and for the runs (by their spread, and by what a "
        "fine-tuning seed gives to all pretrainings alike where they took the same seeds; what of the images' part "
        "differs from run to run counts once); the interval is Student's t with Satterthwaite's degrees of "
        "freedom, but never shorter than that of the runs alone. Average precision is resampled by re-weighting the "
        "matches, BLEU and METEOR by their counts, CIDEr as the mean of its values by image at fixed document "
        "frequencies."
    )
    if compared:
        statistics += (
            f" Differences to {board.baseline} ({', '.join(compared)}) are paired by test image and, where both have "
            "the same seeds, by seed; p-values are corrected by Holm's method over the tasks of a row (not over "
            f"the rows), and the smallest detectable difference is at {100 * POWER:.0f} % power."
        )
    claims = levels(board)
    if claims:
        statistics += f" The intervals speak about: {'; '.join(claims)}."
    return [*found, statistics, _software(board)]


def _column(board: Board, column: Column) -> str:
    """How one column was measured."""
    cells = [
        cell for row in board.rows for cell in board.entries[row.key, column.key].cells if not row.scratch
    ]
    cells = cells or [cell for row in board.rows for cell in board.entries[row.key, column.key].cells]
    inputs = cells[0].inputs
    recipe = {**inputs.get("train", {}).get("recipe", {}), **inputs.get("predict", {}).get("recipe", {})}
    archs = ", ".join(sorted({cell.identity.arch for cell in cells}))
    names = ", ".join(dict.fromkeys(cell.identity.group or cell.identity.backbone for cell in cells))
    seeds = _runs(cells)
    if column.task == "classification":
        start = f"{names} ({archs}) were trained on {column.data}"
    else:
        start = f"{column.label} was fine-tuned on {column.data} from {names} ({archs})"
    limit = f", limited to {column.limit} images a part" if column.limit else ""
    skipped = cells[0].skipped_images
    left_out = f"; unreadable images left out: {skipped}" if skipped else ""
    if column.task == "robustness":
        how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in recipe.items())
        return (
            f"{names} ({archs}) were tested as trained: {column.label} on {column.data} by the recipe {column.recipe}"
            f"{limit} ({how}). {seeds} The scores are {', '.join(column.metrics)}, on {column.images} images{left_out}."
        )
    return (
        f"{start} by the recipe {column.recipe}{limit}: {_training(cells, recipe)}. {seeds} The last step was "
        f"scored by {', '.join(column.metrics)} on {column.images} test images{left_out}."
    )


def _training(cells: Sequence[Cell], recipe: dict) -> str:
    """The optimisation in words; what a recipe does not hold is not said."""
    steps = sorted({int(cell.cost.get("iterations", 0)) for cell in cells})
    said = [
        f"{' or '.join(map(str, steps))} iterations"
        + (f" of {recipe['batch']} images" if "batch" in recipe else "")
    ]
    if "optimizer" in recipe:
        said.append(OPTIMIZERS.get(recipe["optimizer"], str(recipe["optimizer"])))
    said += [
        f"{words} {recipe[name]:g}"
        for name, words in (("lr", "learning rate"), ("weight_decay", "weight decay"))
        if name in recipe
    ]
    if recipe.get("optimizer") == "sgd":
        said.append(f"momentum {recipe.get('momentum', 0):g}")
    if recipe.get("schedule"):
        schedule = str(recipe["schedule"]).replace("_", " ")
        at = recipe.get("milestones")
        said.append(
            f"{schedule} schedule" + (f" at {', '.join(map(str, at))} (× {recipe['gamma']:g})" if at else "")
        )
    if recipe.get("warmup"):
        said.append(f"{recipe['warmup']} iterations of warm-up")
    if recipe.get("size"):
        said.append(f"images of {recipe['size']} px")
    if recipe.get("freeze"):
        said.append(f"frozen up to {recipe['freeze']}")
    said.append(" or ".join(sorted({cell.arithmetic for cell in cells})))
    return ", ".join(said)


def _runs(cells: Sequence[Cell]) -> str:
    seeds = sorted({cell.identity.seed for cell in cells})
    pretrainings: dict[str, set] = {}
    for cell in cells:
        pretrainings.setdefault(cell.identity.group or cell.identity.backbone, set()).add(cell.pretraining)
    several = {len(found) for found in pretrainings.values()}
    text = f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    if cells[0].identity.task != "classification":
        counts = " or ".join(map(str, sorted(several)))
        text += f", {counts} pretraining{'s' if several != {1} else ''} a method"
    return text + "."


def _software(board: Board) -> str:
    cells = [cell for entry in board.entries.values() for cell in entry.cells]
    packages: dict[str, set[str]] = {}
    revisions, devices = set(), set()
    for cell in cells:
        path = cell.folder / "provenance.json"
        made = read_json(path) if path.exists() else {}
        for name, version in made.get("packages", {}).items():
            packages.setdefault(name, set()).add(version)
        revisions.add(str(made.get("git", "unknown"))[:12])
        devices.add(str(cell.device.get("device")))
    used = ", ".join(
        f"{name} {' and '.join(sorted(found))}"
        for name, found in sorted(packages.items())
        if found != {"absent"}
    )
    return (
        f"Measured with backbench (revision {', '.join(sorted(revisions))}) on {', '.join(sorted(devices))}; {used}. "
        f"{len(cells)} cells; every input is named by its fingerprint in the cells."
    )


def board_latex(board: Board) -> str:
    """The leaderboard as booktabs tables: score ± half interval, below it the paired difference.

    A table wider than the line is scaled to it; one of more than 16 rows goes on in another.
    """
    rows = board.rows
    parts = [rows[start : start + ROWS_A_TABLE] for start in range(0, len(rows), ROWS_A_TABLE)]
    tables = [_table(board, part, number) for number, part in enumerate(parts)]
    return "% needs \\usepackage{booktabs,graphicx}\n" + "\n".join(tables)


def _table(board: Board, rows: Sequence[Row], number: int) -> str:
    columns = board.columns
    head = " & ".join(["", *(escape(c.label) for c in columns)]) + r" \\"
    detail = " & ".join(["", *(escape(c.detail.replace(" · ", ", ")) for c in columns)]) + r" \\"
    lines = [
        *(r"\begin{table}", r"\centering"),
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        r"\begin{tabular}{l" + "r" * len(columns) + "}",
        *(r"\toprule", head, detail, r"\midrule"),
    ]
    for row in rows:
        measures = [board.primary(row, c) for c in columns]
        lines.append(" & ".join([escape(row.label), *map(_score, measures)]) + r" \\")
        if any(m.difference for m in measures):
            lines.append(" & ".join([r"\quad difference", *map(_difference, measures)]) + r" \\")
    lines.append(r"\midrule")
    for name in ("chance", *baseline_names(board)):
        known = (escape(known_range(board, c, name)) for c in columns)
        lines.append(" & ".join([escape(name), *known]) + r" \\")
    caption = _caption(board) if not number else f"Table continued ({number + 1})."
    lines += [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{caption}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _score(measure: Measure) -> str:
    if measure.score is None:
        return "--" if measure.reason == "not run" else "n/a"
    mark = r"^{\dagger}" if measure.above_chance is False else ""
    return f"${percent(measure.score.value)} \\pm {percent(half_width(measure.score))}{mark}$"


def _difference(measure: Measure) -> str:
    found = measure.difference
    if found is None:
        return "--"
    value = signed(found.value).replace("−", "-")
    number = f"{value} \\pm {percent(half_width(found))}"
    return rf"$\mathbf{{{number}}}$" if excludes_zero(found) else f"${number}$"


def _caption(board: Board) -> str:
    text = (
        f"Scores × 100 ± half of the {100 * CONFIDENCE:.0f} % interval; paired differences to {board.baseline}, bold "
        f"where the interval excludes 0. Claims are about: {'; '.join(levels(board)) or 'nothing yet'}."
    )
    text = escape(text + (f" {board.notes[0]}" if board.machinery else ""))
    marked = any(board.primary(r, c).above_chance is False for r in board.rows for c in board.columns)
    return text + (r" $\dagger$: the interval does not lie above chance." if marked else "")
