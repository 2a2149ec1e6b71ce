"""Precision-recall curves: as data, and as one SVG picture with a panel a class."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from backbench.common.metrics.average_precision import precision_recall

AT = np.linspace(0.0, 1.0, 101)
WIDTH, HEIGHT, LEFT, TOP, GAP = 140, 110, 26, 18, 14  # pixels of a panel and its margins
ACROSS, HEAD = 5, 16  # panels in a row; pixels of the heading


def curves(
    stats: Mapping[str, np.ndarray], classes: Sequence[str]
) -> dict[str, dict[str, list[float | None]]]:
    """For each class that has objects the best `precision` at recall 0, .01 … 1 or above, and the `score` that gives
    it (None where no detection reaches that recall: precision 0).
    """
    found = {}
    for c, name in enumerate(classes):
        recall, precision, score = precision_recall(stats, c)
        if not stats["positives"][:, c].any():
            continue
        best = np.maximum.accumulate(precision[::-1])[::-1]
        peak = np.where(precision == best, np.arange(len(best)), len(best))
        peak = np.minimum.accumulate(peak[::-1])[::-1]  # the detection at which that best is had
        at = np.searchsorted(recall, AT, "left")
        reached = at < len(recall)
        values = np.zeros(len(AT))
        values[reached] = best[at[reached]]
        scores: list[float | None] = [None] * len(AT)
        for k, row in zip(np.flatnonzero(reached).tolist(), peak[at[reached]].tolist()):
            scores[k] = round(float(score[row]), 6)
        found[name] = {"precision": values.round(6).tolist(), "score": scores}
    return found


def picture(data: Mapping[str, Mapping[str, Any]], ap: Mapping[str, float | None]) -> str:
    """An SVG of `curves`' panels, best class first, each with its name and AP (a fraction in `ap`)."""
    names = sorted(data, key=lambda name: -(ap.get(name) or 0.0))
    rows = -(-len(names) // ACROSS)
    width = min(len(names), ACROSS) * (WIDTH + LEFT + GAP) + GAP
    width = max(width, 340)
    height = HEAD + rows * (HEIGHT + TOP + 2 * GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="9">',
        "<title>Precision over recall at IoU 0.5, a panel a class</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{GAP}" y="{GAP + 6}" font-size="11" fill="#555">Precision over recall at IoU ≥ 0.5, and AP by 11 '
        "points</text>",
    ]
    for n, name in enumerate(names):
        x = GAP + LEFT + n % ACROSS * (WIDTH + LEFT + GAP)
        y = HEAD + GAP + TOP + n // ACROSS * (HEIGHT + TOP + 2 * GAP)
        parts += _panel(x, y, name, ap.get(name), data[name]["precision"])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(x: int, y: int, name: str, ap: float | None, precision: Sequence[float]) -> list[str]:
    """Axes from 0 to 1 and the curve, ended by a drop where recall ends."""
    points = [(r, p) for r, p in zip(AT, precision) if p > 0]
    if points:
        points.append((points[-1][0], 0.0))
    line = " ".join(f"{x + WIDTH * r:.1f},{y + HEIGHT * (1 - p):.1f}" for r, p in points)
    value = "n/a" if ap is None else f"{100 * ap:.1f}"
    parts = [
        f'<text x="{x}" y="{y - 5}" font-size="11">{escape(name[:22])} <tspan fill="#555">{value}</tspan></text>'
    ]
    for share in (0.0, 0.5, 1.0):
        h, v = y + HEIGHT * (1 - share), x + WIDTH * share
        parts += [
            f'<path d="M{x} {h:g}h{WIDTH}M{v:g} {y}v{HEIGHT}" stroke="#ddd"/>',
            f'<text x="{x - 4}" y="{h + 3:g}" text-anchor="end" fill="#555">{share:g}</text>',
            f'<text x="{v:g}" y="{y + HEIGHT + 11}" text-anchor="middle" fill="#555">{share:g}</text>',
        ]
    return [*parts, f'<polyline points="{line}" fill="none" stroke="#0072b2" stroke-width="1.6"/>']
