"""Small inline SVG pictures for the report. Colours come from its style sheet: `k0` … `k7` mark backbones."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from backbench.common.board.statistics import Difference, Score

KINDS = 8  # colours in the style sheet (Okabe and Ito's); further rows repeat them dashed
BAR_WIDTH, BAR_HEIGHT = 132, 18


def kind(index: int) -> str:
    """The CSS classes of the index-th backbone."""
    return f"k{index % KINDS}" + (" dashed" if index >= KINDS else "")


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of some numbers with a margin."""
    low, high = min(values), max(values)
    margin = share * (high - low) or 0.01
    return low - margin, high + margin


def score_bar(score: Score, chance: float | None, domain: tuple[float, float], index: int) -> Markup:
    """A score's interval as a bar with its estimate as a dot, and chance as a dashed line."""
    x = _scale(domain, BAR_WIDTH)
    middle = BAR_HEIGHT / 2
    parts = [f'<line class="rail" x1="0" x2="{BAR_WIDTH}" y1="{middle}" y2="{middle}"/>']
    if chance is not None and domain[0] <= chance <= domain[1]:
        parts.append(f'<line class="chance" x1="{x(chance)}" x2="{x(chance)}" y1="1" y2="{BAR_HEIGHT - 1}"/>')
    parts += _interval(x, score, index)
    text = f"{100 * score.value:.1f}, interval {100 * score.low:.1f} to {100 * score.high:.1f}"
    return _svg(BAR_WIDTH, BAR_HEIGHT, parts, text, "bar")


def difference_bar(found: Difference, limit: float, index: int) -> Markup:
    """A difference's interval about a line at 0; `limit` is the largest difference that the bar can show."""
    x = _scale((-limit, limit), BAR_WIDTH)
    middle = BAR_HEIGHT / 2
    parts = [
        f'<line class="rail" x1="0" x2="{BAR_WIDTH}" y1="{middle}" y2="{middle}"/>',
        f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="0" y2="{BAR_HEIGHT}"/>',
        *_interval(x, found, index),
    ]
    text = f"{100 * found.value:+.1f}, interval {100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return _svg(BAR_WIDTH, BAR_HEIGHT, parts, text, "bar")


def _interval(x, found: Score | Difference, index: int) -> list[str]:
    y = BAR_HEIGHT / 2
    return [
        f'<g class="{kind(index)}"><line class="range" x1="{x(found.low)}" x2="{x(found.high)}" y1="{y}" y2="{y}"/>'
        f'<circle class="dot" cx="{x(found.value)}" cy="{y}" r="4"/></g>'
    ]


def _scale(domain: tuple[float, float], width: float, start: float = 0.0):
    low, high = domain
    return lambda value: round(start + width * min(1.0, max(0.0, (value - low) / (high - low))), 2)


def _svg(width: float, height: float, parts: Sequence[str], title: str, name: str) -> Markup:
    head = f'<svg class="{name}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    return Markup(f"{head}<title>{Markup.escape(title)}</title>{''.join(parts)}</svg>")


def runs_bar(values: Sequence[float], score: Score | None, domain: tuple[float, float], index: int) -> Markup:
    """Every run's score as a ring, over the interval of their mean."""
    x = _scale(domain, BAR_WIDTH)
    middle = BAR_HEIGHT / 2
    parts = [f'<line class="rail" x1="0" x2="{BAR_WIDTH}" y1="{middle}" y2="{middle}"/>']
    parts += _interval(x, score, index) if score else []
    parts += [
        f'<g class="{kind(index)}"><circle class="ring" cx="{x(value)}" cy="{middle}" r="5.5"/></g>'
        for value in values
    ]
    text = ", ".join(f"{100 * value:.1f}" for value in values)
    return _svg(BAR_WIDTH, BAR_HEIGHT, parts, f"runs: {text}", "bar")


Series = Sequence[tuple[str, int, Sequence[float], Sequence[float]]]


def curves(series: Series, name: str, x_label: str = "iteration", log: bool = True) -> Markup | None:
    """Curves (label, colour index, x, y). None without a value to show; on a logarithmic y axis it must be positive.

    A legend stands beside them in the page; each curve carries its label as a title.
    """
    series = [
        (label, index, *zip(*kept))
        for label, index, xs, ys in series
        if (
            kept := [
                (x, y) for x, y in zip(xs, ys) if y is not None and math.isfinite(y) and (y > 0 or not log)
            ]
        )
    ]
    if not series:
        return None
    width, height, left, bottom, top = 460, 230, 46, 34, 10
    grown = math.log10 if log else float
    values = [grown(y) for _, _, _, ys in series for y in ys]
    low, high = padded(values)
    low = low if log else max(low, min(0.0, min(values)))
    last = max(max(xs) for _, _, xs, _ in series)
    x = _scale((0, last or 1), width - left - 8, left)
    flipped = _scale((low, high), height - bottom - top)
    parts = []
    for tick in _log_ticks(low, high) if log else _linear_ticks(low, high):
        y = round(height - bottom - flipped(grown(tick)), 1)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{left - 6}" y="{y + 4}">{tick:g}</text>')
    for tick in _ticks(last):
        parts.append(f'<text class="tick middle" x="{x(tick)}" y="{height - bottom + 16}">{tick:g}</text>')
    parts.append(f'<text class="tick middle" x="{(width + left) / 2}" y="{height - 4}">{x_label}</text>')
    for label, index, xs, ys in series:
        points = " ".join(
            f"{round(x(a), 1):g},{round(height - bottom - flipped(grown(b)), 1):g}" for a, b in zip(xs, ys)
        )
        parts.append(
            f'<g class="{kind(index)}"><polyline class="curve" points="{points}">'
            f"<title>{Markup.escape(label)}</title></polyline>{_dots(points) if len(xs) < 4 else ''}</g>"
        )
    return _svg(width, height, parts, name, "chart")


def small_curves(series: Series, title: str) -> Markup:
    """A small unit square of curves, for one class of many: x and y from 0 to 1."""
    side = 104
    x = _scale((0, 1), side)
    parts = [f'<rect class="frame" x="0" y="0" width="{side}" height="{side}"/>']
    for _, index, xs, ys in series:
        points = " ".join(f"{round(x(a), 1):g},{round(side - x(b), 1):g}" for a, b in zip(xs, ys))
        parts.append(f'<g class="{kind(index)}"><polyline class="curve" points="{points}"/></g>')
    return _svg(side, side, parts, title, "square")


def _dots(points: str) -> str:
    """A short curve's points: one alone would not show."""
    places = (point.split(",") for point in points.split())
    return "".join(f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>' for x, y in places)


def _ticks(last: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to `last`."""
    step = 10 ** math.floor(math.log10(last / count)) if last > 0 else 1
    step *= next((m for m in (1, 2, 5, 10) if step * m * count >= last), 10)
    return [step * i for i in range(int(last / step) + 1)]


def _linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next((m for m in (1, 2, 5, 10) if step * m * count >= high - low), 10)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two logarithms; finer where that gives fewer than three."""
    for mantissas in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), range(1, 10), [m / 10 for m in range(10, 100)]):
        ticks = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in mantissas]
        ticks = [t for t in ticks if low <= math.log10(t) <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 7)]
    return [float(f"{10**value:.3g}") for value in (low, high)]
