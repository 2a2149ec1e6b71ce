"""One offline HTML file about a folder of cells: the board, its pictures, curves, costs, and where all is from."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from backbench.common.base.files import write_text
from backbench.common.board.cells import Cell
from backbench.common.board.columns import TASKS, Column
from backbench.common.board.leaderboard import Board, Measure, Row
from backbench.common.board.statistics import POWER
from backbench.common.report import charts, details
from backbench.common.report.gallery import DISAGREED, DRAWN, MOST_BOXES, gallery
from backbench.common.report.table import (
    baseline_names,
    board_csv,
    board_markdown,
    excludes_zero,
    half_width,
    known_range,
    levels,
    method_line,
    needed,
    paper_notes,
    percent,
    remarks,
    signed,
    summary,
)
from backbench.common.report.writing import board_latex, methods_latex, methods_markdown


def write_report(cells: list[Cell], board: Board, path: Path | str) -> None:
    """Write the report of a board to `path`. Needs nothing but the cells' folders and their thumbnails.

    `cells` are those the board was made of: what it left out is counted in the page.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "signed": signed, "half": half_width, "kind": charts.kind}
    write_text(path, environment.get_template("report.html").render(context(cells, board)))


def context(cells: list[Cell], board: Board) -> dict[str, Any]:
    """All that the template shows."""
    used = [cell for entry in board.entries.values() for cell in entry.cells]
    notes = paper_notes(board)
    paired = differences(board)
    speak = {place["found"].level for line in paired for place in line["places"] if place["found"]}
    return {
        "board": board,
        "summary": summary(board),
        "banner": board.notes[0] if board.machinery else "",
        "levels": levels(board),
        "method": method_line(board),
        "remarks": [line for line in remarks(board) if not board.machinery or line != board.notes[0]],
        "left_out": len(cells) - len(used),
        "leaderboard": leaderboard(board),
        "feet": [
            (name, [known_range(board, column, name) for column in board.columns])
            for name in ("chance", *baseline_names(board))
        ],
        "ranks": rank_rows(board),
        "differences": paired,
        "mixed_levels": len(speak) > 1,
        "difference_level": next(iter(speak), ""),
        "power": f"{100 * POWER:.0f}",
        "paper": paper_rows(board, notes),
        "paper_notes": notes,
        "sections": [section(board, column, number) for number, column in enumerate(board.columns)],
        "rules": {"disagreed": DISAGREED, "drawn": DRAWN, "boxes": MOST_BOXES},
        "writing": {
            "Methods, Markdown": methods_markdown(board),
            "Methods, LaTeX": methods_latex(board),
            "Table, LaTeX (booktabs)": board_latex(board),
            "Tables, Markdown": board_markdown(board),
            "Every number, CSV": board_csv(board),
        },
        "total_cost": clock(sum(_seconds(cell) for cell in used)),
        "sources": sources(board),
    }


def leaderboard(board: Board) -> list[dict[str, Any]]:
    """Rows of the leaderboard: each measure with its bar, on one scale a column."""
    domains = {column.key: _domain(board, column) for column in board.columns}
    rows = []
    for index, row in enumerate(board.rows):
        places = []
        for column in board.columns:
            measure = board.primary(row, column)
            bar = None
            if measure.score:
                bar = charts.score_bar(measure.score, measure.chance, domains[column.key], index)
            places.append({"measure": measure, "bar": bar, "source": source_id(board, row, column)})
        rows.append({"row": row, "index": index, "places": places})
    return rows


def _domain(board: Board, column: Column) -> tuple[float, float]:
    values = []
    for row in board.rows:
        measure = board.primary(row, column)
        if measure.score:
            values += [measure.score.low, measure.score.high]
            values += [] if measure.chance is None else [measure.chance]
            cells = board.entries[row.key, column.key].cells
            values += [value for cell in cells if (value := cell.metrics.get(column.metric)) is not None]
    return charts.padded(values) if values else (0.0, 1.0)


def differences(board: Board) -> list[dict[str, Any]]:
    """Rows of the paired differences, on one scale a column; rows without any are left out."""
    limits = {}
    for column in board.columns:
        found = [m.difference for row in board.rows if (m := board.primary(row, column)).difference]
        limits[column.key] = 1.06 * max((max(abs(d.low), abs(d.high)) for d in found), default=0.01) or 0.01
    rows = []
    for index, row in enumerate(board.rows):
        places = [_difference(board.primary(row, c), limits[c.key], index) for c in board.columns]
        if any(place["found"] for place in places):
            rows.append({"row": row, "index": index, "places": places})
    return rows


def _difference(measure: Measure, limit: float, index: int) -> dict[str, Any]:
    found = measure.difference
    if found is None:
        return {"found": None, "why": measure.unpaired or measure.reason}
    return {
        "found": found,
        "bar": charts.difference_bar(found, limit, index),
        "decided": excludes_zero(found),
        "p": "< .001" if found.p_holm < 0.001 else f"{found.p_holm:.{3 if found.p_holm < 0.1 else 2}f}",
        "better": "< 1 %"
        if found.better < 0.005
        else f"{100 * found.better:.0f} %".replace("100 %", "> 99 %"),
        "needed": needed(measure),
        "correlation": _correlations(found),
    }


def _correlations(found) -> str:
    parts = [("over images", found.image_correlation), ("over seeds", found.seed_correlation)]
    return ", ".join(f"{value:.2f} {name}".replace("-", "−") for name, value in parts if value is not None)


def rank_rows(board: Board) -> list[dict[str, Any]]:
    """Rows of the ranks: a rank a column and, last, the mean over the transfer tasks; the bottom one Kendall's τ."""
    orders = [*(board.ranks.columns.get(c.key) for c in board.columns), board.ranks.across]
    rows = []
    for index, row in enumerate(board.rows):
        places = [order.ranks.get(row.key) if order else None for order in orders]
        if any(places):
            rows.append({"row": row, "index": index, "places": places})
    return rows


def source_id(board: Board, row: Row, column: Column) -> str:
    """The anchor of where an entry's numbers are from."""
    return f"from-{board.rows.index(row)}-{board.columns.index(column)}"


def sources(board: Board) -> list[dict[str, Any]]:
    """Where every number is from: for each entry how its score came about, and its cells."""
    return [
        {
            "id": source_id(board, row, column),
            "title": f"{column.label}: {row.label}",
            "measure": board.primary(row, column),
            "metric": column.metric,
            "images": column.images,
            "cells": [provenance(cell) for cell in sorted(entry.cells, key=lambda c: str(c.folder))],
        }
        for column in board.columns
        for row in board.rows
        if (entry := board.entries[row.key, column.key]).cells
    ]


def paper_rows(board: Board, notes: list[str]) -> list[dict[str, Any]]:
    """The paper's values beside the measured ones; `marks` number the footnotes that concern a value."""
    rows = []
    for index, row in enumerate(board.rows):
        places = []
        for column in board.columns:
            measure = board.primary(row, column)
            marks = [notes.index(note) + 1 for note in measure.paper.notes] if measure.paper else []
            places.append({"measure": measure, "marks": marks})
        if any(place["measure"].paper for place in places):
            rows.append({"row": row, "index": index, "places": places})
    return rows


def section(board: Board, column: Column, number: int) -> dict[str, Any]:
    """Everything about one column: all metrics, curves, pictures, costs."""
    shown, thumbnails = gallery(board, column, number)
    rows = [
        (index, row, entry)
        for index, row in enumerate(board.rows)
        if (entry := board.entries[row.key, column.key]).cells
    ]
    domain = _domain(board, column)
    found = {
        "column": column,
        "task": TASKS.get(column.task, column.task),
        "number": number,
        "rows": rows,
        "seeds": [
            (i, row, *_by_seed(board, row, column, domain)) for i, row, entry in rows if entry.cells[1:]
        ],
        "curves": [("training loss", chart)] if (chart := details.loss_curve(rows, column)) else [],
        "shown": shown,
        "thumbnails": thumbnails,
        "truth": any(t.truth is not None for t in thumbnails),
        "classes": [],
        "small": [],
        "captions": details.captions(rows) if column.task == "captioning" else [],
        "costs": [(index, row, _costs(entry.cells)) for index, row, entry in rows],
        "baselines": list(
            dict.fromkeys(n for _, _, e in rows for m in e.measures.values() for n in m.baselines)
        ),
    }
    found["curves"] += details.error_curves(rows, column)
    if column.task == "wsol":
        found["curves"] += details.thresholds(rows, column)
    if column.task == "robustness":
        found["curves"] += details.drawn_curves(rows, column)
    if column.task == "detection":
        found["classes"] = details.classes(rows, board)
        mean, found["small"] = details.precision_recall(rows, column)
        found["curves"] += [("precision over recall, mean of the classes, %", mean)] if mean else []
    return found


def _by_seed(board: Board, row: Row, column: Column, domain: tuple[float, float]) -> tuple[Any, list]:
    """A row's runs as a picture on the column's scale, and as (name, value)."""
    cells = board.entries[row.key, column.key].cells
    ordered = sorted(cells, key=lambda c: (str(c.pretraining), c.identity.seed))
    runs = [(f"{c.identity.backbone}, seed {c.identity.seed}", c.metrics[c.primary]) for c in ordered]
    values = [value for _, value in runs if value is not None]
    bar = (
        charts.runs_bar(values, board.primary(row, column).score, domain, board.rows.index(row))
        if values
        else ""
    )
    return bar, runs


def _seconds(cell: Cell) -> float:
    return sum(value for name, value in cell.cost.items() if name.endswith("_s"))


def _costs(cells: tuple[Cell, ...]) -> dict[str, str]:
    """A row's mean costs a cell, in words."""
    mean = {name: sum(c.cost.get(name, 0) for c in cells) / len(cells) for name in cells[0].cost}
    train = mean.get("train_s", 0.0)
    return {
        "training": clock(train),
        "rate": f"{mean.get('images', 0) / train:.0f}" if train else "–",
        "iterations": f"{mean.get('iterations', 0):.0f}",
        "rest": clock(sum(map(_seconds, cells)) / len(cells) - train),
        "memory": f"{mean.get('peak_memory_mb', 0) / 1000:.1f}",
        "device": ", ".join(sorted({f"{c.device.get('device')}, {c.arithmetic}" for c in cells})),
    }


def clock(seconds: float) -> str:
    """Seconds as "45 s", "12:30 min" or "3:05 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def provenance(cell: Cell) -> dict[str, Any]:
    """Where one cell's number is from: identity, keys, inputs, code, packages."""
    path = cell.folder / "provenance.json"
    made = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    i = cell.identity
    recipes = {stage: inputs.get("recipe", {}) for stage, inputs in cell.inputs.items()}
    return {
        "title": str(i.path),
        "score": f"{cell.primary} {percent(cell.metrics[cell.primary], 2)}",
        "facts": [
            ("keys", ", ".join(f"{stage} {key}" for stage, key in cell.keys.items())),
            ("data", ", ".join(f"{s} {v['data']}" for s, v in cell.inputs.items() if v.get("data"))),
            (
                "backbone",
                f"{cell.backbone.get('source', 'none')} {cell.backbone.get('fingerprint', '')}".strip(),
            ),
            ("adoption", "; ".join(cell.backbone.get("report", [])) or "as it is"),
            ("git", f"{made.get('git', 'unknown')}, changes {made.get('git_diff', 'unknown')}"),
            ("code", cell.code),
            ("packages", ", ".join(f"{k} {v}" for k, v in made.get("packages", {}).items())),
            ("device", ", ".join(f"{v}" if k == "device" else f"{v} {k}" for k, v in cell.device.items())),
            ("arithmetic", cell.arithmetic),
        ],
        "recipe": "\n".join(
            f"{stage}: {', '.join(f'{k}={v}' for k, v in fields.items())}"
            for stage, fields in recipes.items()
            if fields
        ),
        "notes": list(cell.notes),
    }
