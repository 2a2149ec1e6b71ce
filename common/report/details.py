"""What the report shows of one column beyond its scores: curves, classes, precision-recall, captions, thresholds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from backbench.common.base.files import read_json
from backbench.common.board.cells import Cell
from backbench.common.board.columns import Column
from backbench.common.board.leaderboard import Board, Entry, Row, baseline_of
from backbench.common.metrics.captions import per_image, rescore
from backbench.common.report import charts

Rows = Sequence[tuple[int, Row, Entry]]  # number of its colour, row, its cells there


def report_of(cell: Cell) -> dict[str, Any]:
    """A cell's report.json; empty where it did not travel with it."""
    path = cell.folder / "report.json"
    return read_json(path) if path.exists() else {}


def first_cell(entry: Entry) -> Cell:
    """The cell of the lowest seed."""
    return min(entry.cells, key=lambda c: (c.identity.seed, str(c.pretraining)))


def loss_curve(rows: Rows, column: Column) -> Markup | None:
    """Training loss over iterations, of each row's first seed."""
    series = []
    for index, row, entry in rows:
        lines = [line for line in first_cell(entry).log() if "iteration" in line and "loss" in line]
        series.append((row.label, index, [a["iteration"] for a in lines], [a["loss"] for a in lines]))
    return charts.curves(series, f"training loss of {column.label}, logarithmic")


def error_curves(rows: Rows, column: Column) -> list[tuple[str, Markup]]:
    """What was measured while training: a chart a metric, in per cent; top-1 and top-5 as errors, the paper's Figure 2.

    Only runs that evaluated more than once have one.
    """
    found: dict[str, list] = {}
    for index, row, entry in rows:
        lines = [line for line in first_cell(entry).log() if isinstance(line.get("eval"), dict)]
        for name in dict.fromkeys(name for line in lines for name in line["eval"]):
            if name != column.metric and not name.startswith("top-"):
                continue
            kept = [(line.get("epoch", line["iteration"]), line["eval"].get(name)) for line in lines]
            kept = [(x, y) for x, y in kept if y is not None]
            if len(kept) > 1:
                ys = [100 * (1 - y if name.startswith("top-") else y) for _, y in kept]
                found.setdefault(name, []).append((row.label, index, [x for x, _ in kept], ys))
    made = []
    for name, series in found.items():
        title = f"{name} error while training, %" if name.startswith("top-") else f"{name} while training, %"
        chart = charts.curves(series, f"{title}, {column.label}", "epoch", log=False)
        made += [(title, chart)] if chart else []
    return made


def classes(rows: Rows, board: Board) -> list[tuple[str, list[tuple[float | None, float | None]]]]:
    """AP by class and its difference to the baseline, a pair a row (means over its cells), from report.json.

    The classes whose differences are largest come first.
    """
    tables = []
    for _, _, entry in rows:
        found: dict[str, list[float]] = {}
        for cell in entry.cells:
            for name, values in report_of(cell).get("classes", {}).items():
                if isinstance(values, dict) and values.get("AP") is not None:
                    found.setdefault(name, []).append(values["AP"])
        tables.append({name: sum(values) / len(values) for name, values in found.items()})
    names = dict.fromkeys(name for table in tables for name in table)
    by_row = {row.key: table for (_, row, _), table in zip(rows, tables)}
    lines = []
    for name in names:
        pairs = []
        for _, row, _ in rows:
            other = baseline_of(board.rows, row, board.baseline)
            ours, theirs = by_row[row.key].get(name), by_row.get(other.key if other else "", {}).get(name)
            known = ours is not None and theirs is not None and other.key != row.key
            pairs.append((ours, ours - theirs if known else None))
        lines.append((name, pairs))
    return sorted(lines, key=lambda line: -max((abs(d) for _, d in line[1] if d is not None), default=0))


def precision_recall(rows: Rows, column: Column) -> tuple[Markup | None, list[tuple[str, Markup]]]:
    """Precision over recall: the mean over the classes of each row's first seed, and a small picture a class."""
    curves = {row.key: report_of(first_cell(entry)).get("curves", {}) for _, row, entry in rows}
    of_class = {
        key: {n: c["precision"] for n, c in found.items() if "precision" in c}
        for key, found in curves.items()
    }
    mean = [
        (row.label, index, _shares(values), [100 * v for v in values])
        for index, row, _ in rows
        if (found := of_class[row.key]) and (values := np.mean(list(found.values()), 0).tolist())
    ]
    names = dict.fromkeys(name for found in of_class.values() for name in found)
    small = []
    for name in names:
        series = [
            (row.label, index, _shares(values)[::2], values[::2])
            for index, row, _ in rows
            if (values := of_class[row.key].get(name))
        ]
        small.append((name, charts.small_curves(series, f"{name}: precision over recall")))
    title = f"precision over recall of {column.label}, mean of the classes"
    return charts.curves(mean, title, "recall", log=False), small


def _shares(values: Sequence[float]) -> list[float]:
    return np.linspace(0, 1, len(values)).tolist()


def thresholds(rows: Rows, column: Column) -> list[tuple[str, Markup]]:
    """Localisation over the threshold of the maps, of each row's first seed: a chart a rule."""
    found: dict[str, list] = {}
    for index, row, entry in rows:
        report = report_of(first_cell(entry))
        swept = report.get("choe2020", {})
        for name, values in swept.get("curves", {}).items():
            found.setdefault(f"MaxBoxAcc's curve: {name}", []).append(
                (row.label, index, swept["threshold"], values)
            )
        chosen = report.get("threshold", {}).get("curve", {})
        if chosen:
            name = "GT-known Loc on held-out training images, where the threshold was chosen"
            found.setdefault(name, []).append((row.label, index, chosen["threshold"], chosen["GT-known Loc"]))
    made = []
    for name, series in found.items():
        series = [(label, index, xs, [100 * y for y in ys]) for label, index, xs, ys in series]
        chart = charts.curves(
            series, f"{column.label}, {name}", "threshold, share of the map's range", log=False
        )
        made += [(name, chart)] if chart else []
    return made


def drawn_curves(rows: Rows, column: Column) -> list[tuple[str, Markup]]:
    """The "charts" of the cells' report.json, in per cent: a picture a curve, each row the mean over its cells."""
    found: dict[tuple[str, str, str], list] = {}
    for index, row, entry in rows:
        reports = [report_of(cell).get("charts", []) for cell in entry.cells]
        for k, chart in enumerate(reports[0] if all(reports) else []):
            for name in chart["curves"]:
                mean = 100 * np.mean([report[k]["curves"][name] for report in reports], axis=0)
                key = (chart["title"], name, chart["across"])
                found.setdefault(key, []).append((row.label, index, chart["x"], mean.tolist()))
    made = []
    for (title, name, across), series in found.items():
        label = f"{title}, {name}, %"
        picture = charts.curves(series, f"{column.label}: {label}", across, log=False)
        made += [(label, picture)] if picture else []
    return made


def captions(rows: Rows) -> list[tuple[int, Row, dict[str, float]]]:
    """What BLEU and CIDEr are made of, a mean over the row's cells: see `_breakdown`."""
    lines = []
    for index, row, entry in rows:
        parts = [_breakdown(cell.images()) for cell in entry.cells]
        lines.append(
            (index, row, {name: float(np.mean([part[name] for part in parts])) for name in parts[0]})
        )
    return lines


def _breakdown(images: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Precision by order of n-gram, brevity penalty, words a caption by words wanted, CIDEr's quartiles, CIDEr 0."""
    lengths, matches = images["bleu_lengths"], images["bleu_matches"]
    said, wanted = lengths.sum(0)
    guesses = np.maximum(0, lengths[:, :1] - np.arange(matches.shape[1])).sum(0)
    precision = matches.sum(0) / np.maximum(1, guesses)
    cider = per_image(images)["CIDEr"]
    low, middle, high = np.quantile(cider, [0.25, 0.5, 0.75])
    found = {f"{n + 1}-grams right": float(value) for n, value in enumerate(precision)}
    return found | {
        "brevity penalty": float(np.exp(min(0.0, 1 - wanted / max(1, said)))),
        "length, of that wanted": float(said / max(1, wanted)),
        "CIDEr, lower quartile": float(low),
        "median": float(middle),
        "upper quartile": float(high),
        "images of CIDEr 0": float((cider == 0).mean()),
        "CIDEr": float(rescore(images)["CIDEr"][0]),
    }
