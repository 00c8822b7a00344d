"""Small SVG charts: the numbers stand beside them, so they are hidden from screen readers and scale freely."""

from __future__ import annotations

import math
from dataclasses import dataclass

ROOF = (52, 10, 440, 190)
"""Left and top margin, width and height of the roofline: what its lines stand in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Svg:
    """Markup made here from numbers only, so that the template need not escape it."""

    markup: str

    def __html__(self) -> str:
        return self.markup


def pair(before: float, after: float | None, top: float) -> Svg:
    """Two bars, before above after, on a scale that ends at `top`."""
    bars = _rect("was", 0, 1, _share(before, top), 5)
    if after is not None:
        bars += _rect("is", 0, 8, _share(after, top), 5)
    return _svg(14, bars)


def bar(value: float, top: float) -> Svg:
    """One bar on a scale that ends at `top`."""
    return _svg(6, _rect("rail", 0, 0, 100, 6) + _rect("is", 0, 0, _share(value, top), 6))


def whisker(
    value: float, low: float | None, high: float | None, scale: tuple[float, float], reference: float | None
) -> Svg:
    """A point with its interval; the thin upright line is the reference."""
    parts = _rect("rail", 0, 6.5, 100, 1)
    if reference is not None:
        parts += _rect("mark", _place(reference, scale) - 0.4, 0, 0.8, 14)
    if low is not None and high is not None:
        left, right = _place(low, scale), _place(high, scale)
        parts += _rect("span", left, 5, max(right - left, 0.8), 4)
    parts += _rect("is", _place(value, scale) - 1, 2, 2, 10)
    return _svg(14, parts)


def line(values: list[float]) -> Svg:
    """A line through values, first to last, from the lowest to the highest."""
    low, high = min(values), max(values)
    step = 100 / max(len(values) - 1, 1)
    points = " ".join(
        f"{i * step:.2f},{2 + 36 * (1 - _share(v - low, high - low) / 100):.2f}" for i, v in enumerate(values)
    )
    return _svg(40, f'<polyline class="line" points="{points}" vector-effect="non-scaling-stroke"/>')


def scatter(points: list[tuple[float, float]]) -> Svg:
    """Dots on equal axes, from the least to the largest of all numbers; on the thin line both are equal."""
    ends = [v for p in points for v in p]
    scale = (min(ends), max(ends))
    dots = "".join(
        f'<circle class="dot-of" cx="{_place(x, scale):.1f}" cy="{100 - _place(y, scale):.1f}" r="1.1"/>'
        for x, y in points
    )
    line = '<path class="even" d="M0 100L100 0"/>'
    return Svg(
        markup=f'<svg class="square" viewBox="-2 -2 104 104" aria-hidden="true" focusable="false">{line}{dots}</svg>'
    )


def roof(points: list[tuple[float, float, bool]], peak: float, bandwidth: float, int8: float = 0.0) -> Svg:
    """A roofline on logarithmic axes: FLOP per byte across, FLOP/s up; dots are layers, the darker ones bound by memory.

    With `int8`, the products per second on 8 bits, a second roof is dashed: a quarter of the bytes, so four times the slope.
    """
    ridge, ridge8 = peak / bandwidth, int8 / (4 * bandwidth)
    across = [p[0] for p in points] + [ridge] + [ridge8] * (int8 > 0)
    x = (math.log10(min(across)) - 0.3, math.log10(max(across)) + 0.3)
    y = (min(math.log10(bandwidth) + x[0], *(math.log10(p[1]) for p in points)), math.log10(max(peak, int8)) + 0.15)
    left, top, width, height = ROOF

    def at(intensity: float, speed: float) -> tuple[float, float]:
        return (
            left + width * _place(math.log10(intensity), x) / 100,
            top + height * (1 - _place(math.log10(speed), y) / 100),
        )

    low, high = 10 ** x[0], 10 ** x[1]

    def line(kind: str, slope: float, corner: float, limit: float) -> str:
        ends = [at(low, slope * low), at(corner, limit), at(high, limit)]
        return f'<path class="{kind}" d="M{"L".join(f"{a:.1f} {b:.1f}" for a, b in ends)}"/>'

    grid = ""
    for tick in decades(*x):
        place, _ = at(tick, 10 ** y[0])
        grid += f'<path class="rule" d="M{place:.1f} {top}v{height}"/><text x="{place:.1f}" y="{top + height + 15}" text-anchor="middle">{tick:g}</text>'
    for tick in decades(*y):
        _, place = at(low, tick)
        grid += f'<path class="rule" d="M{left} {place:.1f}h{width}"/><text x="{left - 6}" y="{place + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
    lines = line("even", bandwidth, ridge, peak) + (line("even dashed", 4 * bandwidth, ridge8, int8) if int8 else "")
    dots = "".join(
        f'<circle class="{"dot-memory" if memory else "dot-of"}" cx="{at(i, s)[0]:.1f}" cy="{at(i, s)[1]:.1f}" r="4"/>'
        for i, s, memory in points
    )
    head = (
        f'<svg class="roof" viewBox="0 0 {left + width + 12} {top + height + 24}" aria-hidden="true" focusable="false">'
    )
    return Svg(markup=f"{head}{grid}{lines}{dots}</svg>")


def decades(low: float, high: float) -> list[float]:
    """Round numbers between 10^low and 10^high: powers of ten, with 2 and 5 times them where fewer than three are there.

    >>> decades(-0.2, 2.3), decades(0.9, 1.9)
    ([1.0, 10.0, 100.0], [10.0, 20.0, 50.0])
    """
    powers = range(math.floor(low), math.ceil(high) + 1)
    for steps in ((1.0,), (1.0, 2.0, 5.0)):
        found = [m * 10.0**k for k in powers for m in steps if low <= math.log10(m) + k <= high]
        if len(found) >= 3:
            break
    return found


def _short(value: float) -> str:
    """A round number with k, M, G or T: "10 G"."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g} {letter}"
    return f"{value:g}"


def _svg(height: int, body: str) -> Svg:
    head = f'<svg viewBox="0 0 100 {height}" height="{height}" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
    return Svg(markup=f"{head}{body}</svg>")


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.2f}" y="{y:g}" width="{max(width, 0):.2f}" height="{height:g}"/>'


def _share(value: float, top: float) -> float:
    """Per cent of `top`, 0 to 100; what is there at all stays visible."""
    if top <= 0 or value <= 0:
        return 0.0
    return min(100.0, max(0.5, 100 * value / top))


def _place(value: float, scale: tuple[float, float]) -> float:
    low, high = scale
    return min(100.0, max(0.0, 100 * (value - low) / (high - low))) if high > low else 50.0
