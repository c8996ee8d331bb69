"""Charts as SVG text: lines over time, and histograms. Pure; no script, nothing to load."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 28, 40
COLORS = ("var(--first)", "var(--second)", "var(--third)")


def line_chart(
    title: str,
    unit: str,
    seconds: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    top: float | None = None,
) -> str:
    """Lines over the seconds of a run; `top` fixes the scale, which else fits the highest value."""
    highest = max((max(values, default=0) for values in series.values()), default=0)
    ticks = nice_ticks(top or highest or 1)
    span = (seconds[-1] if seconds else 0) or 1
    time_ticks = nice_ticks(span)
    right = max(span, time_ticks[-1] if time_ticks[-1] <= span * 1.02 else span)

    def x(value: float) -> float:
        return LEFT + value / right * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / ticks[-1] * (HEIGHT - TOP - BOTTOM)

    body = _axis_y(ticks, y, unit)
    for tick in time_ticks:
        if tick <= right:
            body.append(_text(x(tick), HEIGHT - BOTTOM + 16, _duration(tick), "middle"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "time of the run", "middle"))
    for (name, values), color, place in zip(series.items(), COLORS, range(3), strict=False):
        points = " ".join(
            f"{x(at):.1f},{y(value):.1f}" for at, value in zip(seconds, values, strict=True)
        )
        body.append(
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>'
        )
        at = WIDTH - RIGHT - 150 * (len(series) - place)
        body.append(f'<rect x="{at}" y="7" width="12" height="4" fill="{color}"/>')
        body.append(_text(at + 18, 13, name, "start"))
    return _svg(title, body)


def histogram_chart(
    title: str, unit: str, counts: Sequence[int], edges: Sequence[float], color: str = COLORS[0]
) -> str:
    """Bars of counts between edges, as `phi4ray.batch.parts.histogram` makes them."""
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
            f'height="{HEIGHT - BOTTOM - upper:.1f}" fill="{color}">'
            f"<title>{count:,} rows</title></rect>"
        )
    every = math.ceil(len(shown) / 10)
    for at in range(0, len(shown) + 1, every):
        edge = first + at - 1
        label = "0" if edge < 0 else short(edges[edge]) if edge < len(edges) else "∞"
        body.append(_text(LEFT + at * width, HEIGHT - BOTTOM + 16, label, "middle"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, unit, "middle"))
    return _svg(title, body)


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
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 60:.3g} min" if seconds >= 120 else f"{seconds:.3g} s"


def _axis_y(ticks: Sequence[float], y: Callable[[float], float], unit: str) -> list[str]:
    lines = []
    for tick in ticks:
        lines.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            'stroke="var(--grid)"/>'
        )
        lines.append(_text(LEFT - 8, y(tick) + 4, short(tick), "end"))
    lines.append(_text(LEFT - 8, 13, unit, "end"))
    return lines


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, body: Sequence[str]) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">{"".join(body)}</svg></figure>'
    )
