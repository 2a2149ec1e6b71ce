"""The board as terminal text, Markdown, CSV and JSON. Scores are shown × 100, as in the paper (CIDEr 77.6 is .776)."""

import csv
import io
import re
import textwrap
from dataclasses import asdict
from typing import Any

from backbench.common.board.columns import Column
from backbench.common.board.leaderboard import Board, Measure, Row, baseline_of, make_board
from backbench.common.board.statistics import CONFIDENCE, MOST_SEEDS, POWER, Difference, Score
from backbench.common.board.strata import IMAGES, LEVELS

__all__ = ["board_csv", "board_json", "board_markdown", "board_text", "make_board"]

SCHEMA = 2
BREAKS = re.compile(r"(?=\+\w+=)| (?=\(v)")  # before a recipe's setting, and before the table of a source
Table = tuple[str, list[str], list[list[str]]]  # title, head, rows; the first column names the row


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction × 100."""
    return "n/a" if value is None else f"{100 * value:.{digits}f}"


def signed(value: float, digits: int = 1) -> str:
    """A difference × 100, with its sign (a true minus), 0 without one."""
    text = f"{100 * value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def half_width(found: Score | Difference) -> float:
    """Half of a symmetric interval, before a score's was cut at the ends of its range."""
    return found.half


def excludes_zero(found: Difference) -> bool:
    """Whether the interval lies on one side of 0."""
    return found.low > 0 or found.high < 0


def shown_score(measure: Measure) -> str:
    """ "61.2 ± 3.0", with a "?" where the interval does not lie above chance; "n/a" without a score."""
    if measure.score is None:
        return "n/a" if measure.reason != "not run" else "–"
    mark = " ?" if measure.above_chance is False else ""
    return f"{percent(measure.score.value)} ± {percent(half_width(measure.score))}{mark}"


def shown_difference(measure: Measure) -> str:
    """ "+1.9 ± 2.0", with a "*" where the interval excludes 0; "–" without one."""
    found = measure.difference
    if found is None:
        return "–"
    return f"{signed(found.value)} ± {percent(half_width(found))}{' *' if excludes_zero(found) else ''}"


def levels(board: Board) -> list[str]:
    """The claim's level of every score on the board, each once, from the weakest."""
    found = {
        (m.score.level, m.score.seeds, m.score.pretrainings)
        for row in board.rows
        for column in board.columns
        if (m := board.primary(row, column)).score and not row.scratch
    }
    return [
        f"{name} ({_count(seeds, 'run')}, {_count(pretrainings, 'pretraining')})"
        for name, seeds, pretrainings in sorted(found, key=lambda item: (LEVELS.index(item[0]), *item[1:]))
    ]


def summary(board: Board) -> str:
    """One line: how much is on the board."""
    cells = [cell for entry in board.entries.values() for cell in entry.cells]
    recipes = ", ".join(sorted({c.recipe for c in board.columns}))
    data = ", ".join(sorted({c.data for c in board.columns}))
    size = f"{_count(len(board.rows), 'backbone')} × {_count(len(board.columns), 'column')}"
    return f"{_count(len(cells), 'cell')}: {size}; recipe {recipes}; data {data}"


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")


def tables(board: Board, mean_rank: bool = False) -> list[Table]:
    """The board's tables as text cells: scores, differences, what could have been seen, ranks, the paper's values.

    `mean_rank`: one number a row, too: the mean of its ranks over the transfer tasks.
    """
    columns = board.columns
    head = [f"{c.label}\n{c.detail}" for c in columns]

    def rows_of(show, rows: list[Row]) -> list[list[str]]:
        return [[row.label, *(show(board.primary(row, c)) for c in columns)] for row in rows]

    scores = rows_of(shown_score, list(board.rows))
    scores.append(["chance", *(known_range(board, c, "chance") for c in columns)])
    scores += [[name, *(known_range(board, c, name) for c in columns)] for name in baseline_names(board)]
    paired = [r for r in board.rows if any(board.primary(r, c).difference for c in columns)]
    made: list[Table] = [("Scores × 100 ± half of the 95 % interval", head, scores)]
    if paired:
        made.append(
            (
                f"Paired differences to {board.baseline} (* the 95 % interval excludes 0)",
                head,
                rows_of(shown_difference, paired),
            )
        )
        seen = rows_of(lambda m: percent(m.difference.detectable) if m.difference else "–", paired)
        made.append(("Smallest true difference such data would show (80 % power)", head, seen))
        if any(
            board.primary(r, c).difference.needed
            for r in paired
            for c in columns
            if board.primary(r, c).difference
        ):
            made.append(
                ("Runs (pretrainings) a side to show the difference observed", head, rows_of(needed, paired))
            )
    if board.ranks.columns:
        made.append(("Rank among these (share of draws in which it is first)", head, _rank_rows(board)))
    if mean_rank and board.ranks.across:
        made.append(_across_table(board))
    quoted = [r for r in board.rows if any(board.primary(r, c).paper for c in columns)]
    if quoted:
        values = rows_of(lambda m: percent(m.paper.value) if m.paper else "–", quoted)
        values.append(["measured on", *(_paper_source(board, c) for c in columns)])
        made.append((_paper_title(board), [f"{c.label}\n{c.metric}" for c in columns], values))
    return made


def needed(measure: Measure) -> str:
    """Seeds, or pretrainings, needed for the difference observed: "5", "> 1000", "–" where the spread is unknown."""
    found = measure.difference
    if found is None or found.level == IMAGES:
        return "–"
    return f"> {MOST_SEEDS}" if found.needed is None else str(found.needed)


def _rank_rows(board: Board) -> list[list[str]]:
    orders = board.ranks.columns
    ranked = [row for row in board.rows if any(row.key in order.ranks for order in orders.values())]

    def shown(row: Row, column: Column) -> str:
        rank = orders[column.key].ranks.get(row.key) if column.key in orders else None
        return f"{rank.observed:g} ({100 * rank.first:.0f} %)" if rank else "–"

    rows = [[row.label, *(shown(row, c) for c in board.columns)] for row in ranked]
    taus = [f"{orders[c.key].tau:.2f}" if c.key in orders else "–" for c in board.columns]
    return [*rows, ["Kendall τ", *(tau.replace("-", "−") for tau in taus)]]


def _across_table(board: Board) -> Table:
    order = board.ranks.across
    agreement = f"{board.ranks.agreement:.2f}".replace("-", "−")
    title = f"Mean rank over the transfer tasks (Kendall τ between their orders: {agreement})"
    rows = [
        [row.label, f"{r.observed:.2f}", f"{r.low:.2f} to {r.high:.2f}", f"{100 * r.first:.0f} %"]
        for row in board.rows
        if (r := order.ranks.get(row.key))
    ]
    return title, ["mean rank", "95 % of draws", "first"], rows


def baseline_names(board: Board) -> list[str]:
    """What needs no image and is shown beside the scores, as the best centred box."""
    measures = (board.primary(row, c) for c in board.columns for row in board.rows)
    return list(dict.fromkeys(name for m in measures for name in m.baselines))


def known_range(board: Board, column: Column, name: str) -> str:
    """What "chance", or a baseline of that name, scores beside the rows of a column: "2.5 to 2.9"."""
    measures = [board.primary(row, column) for row in board.rows]
    values = [m.chance if name == "chance" else m.baselines.get(name) for m in measures]
    values = [value for value in values if value is not None]
    if not values:
        return "n/a" if name == "chance" else "–"
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low} to {high}"


def _paper_source(board: Board, column: Column) -> str:
    found = [m.paper for row in board.rows if (m := board.primary(row, column)).paper]
    return f"{found[0].data} ({found[0].source})" if found else "–"


def _paper_title(board: Board) -> str:
    same = any(p.comparable for p in _papers(board))
    text = "The paper's values, ResNet-50"
    return text if same else f"{text} on its own data: beside this board, not comparable with it"


def _papers(board: Board) -> list:
    return [
        m.paper for row in board.rows for column in board.columns if (m := board.primary(row, column)).paper
    ]


def method_line(board: Board) -> str:
    """How intervals were made, in one paragraph."""
    return (
        f"Intervals: {100 * CONFIDENCE:.0f} %, estimate ± t · standard error, Satterthwaite's degrees of "
        "freedom, but never shorter than the interval of the runs alone. Test images: "
        f"{board.replicates} bootstrap draws, the same for every backbone of a column, which pairs the differences. "
        "Runs: the spread of seeds (of pretrainings from three on, and what a seed gives to all of them alike) less "
        "what it shares with the images. CIDEr keeps its document frequencies. A rank's draws: the same resampled "
        "images for all rows, and chance in training, paired by seed as the differences are, where there are several "
        "runs; Kendall τ compares a draw's order with the one shown. Claims are about: "
        + ("; ".join(levels(board)) or "nothing yet")
        + "."
    )


def remarks(board: Board) -> list[str]:
    """Everything that must be said beside the numbers, with the columns and rows that it concerns."""
    said: dict[str, list[tuple[str, str]]] = {}
    for column in board.columns:
        for note in column.notes:
            said.setdefault(note, []).append((column.label, ""))
        for row in board.rows:
            entry = board.entries[row.key, column.key]
            lines = list(entry.notes)
            silent = baseline_of(board.rows, row, board.baseline) in (
                None,
                row,
            )  # said once, or needs no word
            silent |= any("no paired claim" in note for note in entry.notes)
            for metric, measure in entry.measures.items():
                if measure.reason and f"{metric} n/a: {measure.reason}" not in (*column.notes, *lines):
                    lines.append(f"{metric} n/a: {measure.reason}")
                if metric == column.metric and measure.unpaired and not silent:
                    lines.append(f"no difference: {measure.unpaired}")
            for line in lines:
                said.setdefault(line, []).append((column.label, row.label))
    return [*board.notes, *(f"{_places(places)}: {note}" for note, places in said.items())]


def _places(places: list[tuple[str, str]]) -> str:
    """Columns and rows of a remark: "SSD300, NIC (scratch)"."""
    by_rows: dict[str, list[str]] = {}
    for column in dict.fromkeys(column for column, _ in places):
        rows = ", ".join(dict.fromkeys(row for c, row in places if c == column and row))
        by_rows.setdefault(rows, []).append(column)
    return "; ".join(", ".join(columns) + (f" ({rows})" if rows else "") for rows, columns in by_rows.items())


def paper_notes(board: Board) -> list[str]:
    """The paper's contradictions that concern a column of this board."""
    measures = [m for entry in board.entries.values() for m in entry.measures.values()]
    return list(dict.fromkeys(note for m in measures if m.paper for note in m.paper.notes))


def board_text(board: Board, mean_rank: bool = False) -> str:
    """The board for a terminal; `mean_rank`: see `tables`."""
    lines = [summary(board)]
    for title, head, rows in tables(board, mean_rank):
        lines += ["", title, *_aligned([["", *head], *rows])]
    lines += ["", *_wrapped(method_line(board))]
    if any(board.primary(r, c).above_chance is False for r in board.rows for c in board.columns):
        lines += _wrapped("?: the interval does not lie above chance.")
    for line in [*remarks(board), *(f"paper: {note}" for note in paper_notes(board))]:
        lines += _wrapped(f"- {line}", "  ")
    return "\n".join(lines)


def _wrapped(text: str, indent: str = "", width: int = 118) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _aligned(rows: list[list[str]]) -> list[str]:
    """Text rows in columns: the first to the left, the others to the right; cells may hold several lines."""
    cells = [[_split(cell) for cell in row] for row in rows]
    widths = [max(len(line) for row in cells for line in row[c]) for c in range(len(rows[0]))]
    lines = []
    for row in cells:
        for i in range(max(map(len, row))):
            parts = [
                (cell[i] if i < len(cell) else "").ljust(w)
                if c == 0
                else (cell[i] if i < len(cell) else "").rjust(w)
                for c, (cell, w) in enumerate(zip(row, widths))
            ]
            lines.append("  ".join(parts).rstrip())
    return lines


def _split(cell: str, width: int = 18) -> list[str]:
    """A cell's lines: a head's detail one part a line, long recipes and sources in several."""
    lines = [part for line in cell.split("\n") for part in line.split(" · ")]
    return [
        part for line in lines for part in (BREAKS.sub("\n", line) if len(line) > width else line).split("\n")
    ]


def board_markdown(board: Board) -> str:
    """The board as Markdown tables."""
    lines = [summary(board) + "."]
    for title, head, rows in tables(board):
        lines += ["", f"**{title}**", ""]
        lines.append(_pipe(["", *(cell.replace("\n", "<br>") for cell in head)]))
        lines.append("|---|" + "---:|" * len(head))
        lines += [_pipe([cell.replace("\n", " ") for cell in row]) for row in rows]
    lines += ["", method_line(board), ""]
    lines += [f"- {line}" for line in remarks(board)]
    lines += [f"- paper: {note}" for note in paper_notes(board)]
    return "\n".join(lines).rstrip() + "\n"


def _pipe(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


FIELDS = (
    *("row", "arch", "task", "model", "data", "recipe", "limit", "metric", "primary", "images", "runs"),
    *("pretrainings", "level", "score", "low", "high", "se", "chance", "above_chance"),
    *("difference", "difference_low", "difference_high", "p", "p_holm", "better", "detectable", "needed"),
    *("image_correlation", "seed_correlation", "rank", "first"),
    *("paper", "paper_source", "paper_comparable", "reason"),
)


def records(board: Board) -> list[dict[str, Any]]:
    """One flat record a row, column and metric, in fractions; None where there is nothing."""
    found = []
    for column in board.columns:
        for row in board.rows:
            for metric, m in board.entries[row.key, column.key].measures.items():
                record = dict.fromkeys(FIELDS)
                record |= {"row": row.label, "arch": row.arch, "metric": metric, "images": column.images}
                record |= {k: getattr(column, k) for k in ("task", "model", "data", "recipe", "limit")}
                record |= {"primary": metric == column.metric, "chance": m.chance, "reason": m.reason}
                record["above_chance"] = m.above_chance
                if m.score:
                    record |= {"score": m.score.value, "runs": m.score.seeds}
                    record |= {k: getattr(m.score, k) for k in ("low", "high", "se", "level", "pretrainings")}
                if d := m.difference:
                    record |= {"difference": d.value, "difference_low": d.low, "difference_high": d.high}
                    record |= {k: getattr(d, k) for k in ("p", "p_holm", "better", "detectable", "needed")}
                    record |= {k: getattr(d, k) for k in ("image_correlation", "seed_correlation")}
                else:
                    record["reason"] = "; ".join(filter(None, [m.reason, m.unpaired]))
                order = board.ranks.columns.get(column.key)
                if metric == column.metric and order and row.key in order.ranks:
                    record |= {"rank": order.ranks[row.key].observed, "first": order.ranks[row.key].first}
                if m.paper:
                    record |= {"paper": m.paper.value, "paper_comparable": m.paper.comparable}
                    record["paper_source"] = f"{m.paper.source}, {m.paper.data}"
                found.append(record)
    return found


def board_csv(board: Board) -> str:
    """One line a row, column and metric, in fractions; empty where there is nothing."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    for record in records(board):
        writer.writerow({k: "" if v is None else v for k, v in record.items()})
    return out.getvalue()


def board_json(board: Board) -> dict[str, Any]:
    """The whole board as plain values, in fractions."""
    return {
        "schema": SCHEMA,
        "baseline": board.baseline,
        "statistics": {
            "replicates": board.replicates,
            "seed": board.seed,
            "confidence": CONFIDENCE,
            "power": POWER,
            "method": method_line(board),
        },
        "rows": [asdict(row) for row in board.rows],
        "columns": [asdict(column) for column in board.columns],
        "entries": [
            {
                "row": row.key,
                "column": column.key,
                "cells": [str(cell.folder) for cell in entry.cells],
                "keys": [dict(cell.keys) for cell in entry.cells],
                "measures": {metric: asdict(measure) for metric, measure in entry.measures.items()},
                "notes": list(entry.notes),
            }
            for row in board.rows
            for column in board.columns
            if (entry := board.entries[row.key, column.key]).cells
        ],
        "ranks": asdict(board.ranks),
        "notes": remarks(board),
        "paper_notes": paper_notes(board),
    }
