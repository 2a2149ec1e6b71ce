"""Curves as one SVG file, for a run's own report."""

from collections.abc import Sequence
from html import escape

import numpy as np

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito's


def curve_svg(
    title: str, across: str, series: Sequence[tuple[str, np.ndarray, np.ndarray]], mark: float | None = None
) -> str:
    """Curves (label, x, y), both in [0, 1], as one SVG text; `mark` is a dashed line at an x."""
    height, left, top, bottom = 320, 44, 40, 40
    width = max(560, left + sum(7 * len(label) + 14 for label, _, _ in series))
    right = width - 10

    def x(value: float) -> float:
        return round(left + (right - left) * float(value), 1)

    def y(value: float) -> float:
        return round(height - bottom - (height - bottom - top) * float(value), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><title>{escape(title)}</title><rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text x="{left}" y="16">{escape(title)}</text>'
    ]
    for tick in np.arange(0, 1.01, 0.2):
        parts.append(f'<path d="M{left} {y(tick)}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{100 * tick:.0f}</text>')
        parts.append(f'<text x="{x(tick)}" y="{height - bottom + 16}" text-anchor="middle">{tick:.1f}</text>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{height - 6}" text-anchor="middle">{escape(across)}</text>'
    )
    if mark is not None:
        parts.append(f'<path d="M{x(mark)} {top}V{height - bottom}" stroke="#555" stroke-dasharray="4 3"/>')
    place = left
    for number, (label, xs, ys) in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x(a)},{y(b)}" for a, b in zip(xs, ys) if np.isfinite(b))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{place}" y="32" fill="{colour}">{escape(label)}</text>')
        place += 7 * len(label) + 14
    return "\n".join([*parts, "</svg>", ""])
