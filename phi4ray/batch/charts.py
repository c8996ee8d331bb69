"""Charts as SVG text: lines over time, and histograms. Pure; no script, nothing to load."""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 256
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 40
COLORS = ("var(--first)", "var(--second)", "var(--third)")
TIMES = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


def line_chart(
    title: str,
    unit: str,
    seconds: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    top: float | None = None,
    across: str | None = None,
) -> str:
    """Lines over the seconds of a run; `top` fixes the scale, which else fits the highest value.

    `across` names what else than seconds goes from left to right.
    """
    highest = max((max(values, default=0) for values in series.values()), default=0)
    ticks = nice_ticks(top or highest or 1)
    span = (seconds[-1] if seconds else 0) or 1
    size, name_of_size = next((size, name) for size, name in TIMES if span >= 2 * size or size == 1)
    label = across or f"{name_of_size} since the start of the run"
    if across:
        size = 1

    def x(value: float) -> float:
        return LEFT + value / span * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / ticks[-1] * (HEIGHT - TOP - BOTTOM)

    body = _axis_y(ticks, y, unit)
    for tick in nice_ticks(span / size):
        if tick * size <= span:
            body.append(_text(x(tick * size), HEIGHT - BOTTOM + 16, f"{tick:g}", "middle"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, label, "middle"))
    for (name, values), color, place in zip(series.items(), COLORS, range(3), strict=False):
        points = " ".join(
            f"{x(at):.1f},{y(value):.1f}" for at, value in zip(seconds, values, strict=True)
        )
        body.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>'
        )
        if len(series) > 1:
            at = WIDTH - RIGHT - 90 * (len(series) - place)
            body.append(f'<rect x="{at}" y="9" width="14" height="4" fill="{color}"/>')
            body.append(_text(at + 20, 15, name, "start"))
    return _svg(title, body)


def histogram_chart(
    title: str,
    unit: str,
    counts: Sequence[int],
    edges: Sequence[float],
    marks: Mapping[str, float | None],
) -> str:
    """Bars of counts between edges, as `phi4ray.batch.parts.histogram` makes them.

    `marks` are values to point out, such as quantiles, each with a line of its own.
    """
    used = [at for at, count in enumerate(counts) if count]
    if not used:
        return _svg(title, [_text(WIDTH / 2, HEIGHT / 2, "no answered rows", "middle")])
    first, last = used[0], used[-1] + 1
    shown = counts[first:last]
    ticks = nice_ticks(max(shown))
    width = (WIDTH - LEFT - RIGHT) / len(shown)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / ticks[-1] * (HEIGHT - TOP - BOTTOM)

    body = _axis_y(ticks, y, "rows")
    for at, count in enumerate(shown):
        left, upper = LEFT + at * width, y(count)
        body.append(
            f'<rect x="{left + 1:.1f}" y="{upper:.1f}" width="{width - 2:.1f}" '
            f'height="{HEIGHT - BOTTOM - upper:.1f}" fill="{COLORS[0]}">'
            f"<title>{count:,} rows</title></rect>"
        )
    every = math.ceil(len(shown) / 10)
    for at in range(0, len(shown) + 1, every):
        edge = first + at - 1
        label = "0" if edge < 0 else _edge(edges[edge]) if edge < len(edges) else "∞"
        body.append(_text(LEFT + at * width, HEIGHT - BOTTOM + 16, label, "middle"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, unit, "middle"))
    # Marks may fall together: each has its own line of text.
    for row, (name, value) in enumerate(marks.items()):
        if value is None:
            continue
        place = LEFT + (_place(value, edges) - first) * width
        upper = 4 + 11 * row
        body.append(
            f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{upper}" y2="{HEIGHT - BOTTOM}" '
            f'stroke="{COLORS[1]}" stroke-dasharray="3 3"/>'
        )
        side, anchor = (4, "start") if place < WIDTH - 80 else (-4, "end")
        body.append(_text(place + side, upper + 8, f"{name} {short(value)}", anchor))
    return _svg(title, body)


def _edge(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:.2g}"


def _place(value: float, edges: Sequence[float]) -> float:
    """Where a value is, in bins from the first one's left; linear within its bin."""
    at = bisect.bisect_left(edges, value)
    low = edges[at - 1] if at else 0.0
    high = edges[at] if at < len(edges) else math.inf
    return at + (value - low) / (high - low)


def quantile(counts: Sequence[int], edges: Sequence[float], share: float) -> float | None:
    """A quantile of a histogram, linear within its bin; None without rows.

    Nothing is known of the last, open bin but its lower edge.
    """
    total, below = sum(counts), 0
    for at, count in enumerate(counts):
        if count and below + count >= share * total:
            low = edges[at - 1] if at else 0.0
            high = edges[at] if at < len(edges) else low
            return low + (high - low) * max(0.0, share * total - below) / count
        below += count
    return None


def nice_ticks(highest: float) -> list[float]:
    """Four to eight round numbers from 0 to at least `highest`."""
    step = 10.0 ** math.floor(math.log10(highest / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if highest / (step * factor) <= 6)
    return [step * at for at in range(math.ceil(highest / step - 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters: 1.5k, 20M, 0.25."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # what three digits round up to it
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _axis_y(ticks: Sequence[float], y: Callable[[float], float], unit: str) -> list[str]:
    lines = []
    for tick in ticks:
        lines.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            'stroke="var(--grid)"/>'
        )
        lines.append(_text(LEFT - 8, y(tick) + 4, short(tick), "end"))
    lines.append(_text(LEFT - 8, 15, unit, "end"))
    return lines


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, body: Sequence[str]) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">{"".join(body)}</svg></figure>'
    )
