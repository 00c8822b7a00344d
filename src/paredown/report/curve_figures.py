"""Charts of a curve: SVG with its own text, lines with intervals, the sweet spot with its own; no script, colours of the page."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from paredown.report.figures import Svg

WIDTH, HEIGHT = 440, 330
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 44
LINES, POINTS = 8, 40
"""Drawn at most, so that the page stays small; the CSV has more."""
_WORDS = (96, 18)
"""Pixels that the words at the sweet spot take in the larger type of small charts."""
_SHAPES = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One point of a line: where, its interval, and what it says when pointed at."""

    x: float
    y: float
    low: float | None
    high: float | None
    told: str
    hollow: bool = False
    """Not every seed has a result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    dots: tuple[Dot, ...]
    control: bool = False
    codes: bool = False
    """Of files in codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """The sweet spot: its place, its interval, and the dot it stands on."""

    x: float
    y: float
    low: float | None
    high: float | None


def chart(
    series: Sequence[Series], *, x_title: str, y_title: str, alt: str, mark: Mark | None = None, level: float | None = None
) -> Svg:  # fmt: skip
    """Lines over what was removed, in %, each dot with its interval over seeds; at `level` what the user allows ends."""
    drawn = [_thinned(s) for s in series[:LINES]]
    dots = [d for s in drawn for d in s.dots]
    if not dots:
        return Svg(markup="")
    x_range = _range([d.x for d in dots] + ([mark.x] if mark else []), 0.04)
    ends = [v for d in dots for v in (d.y, d.low, d.high) if v is not None]
    y_range = _range(ends if level is None else [*ends, level], 0.06)
    frame = _Frame(x=x_range, y=y_range)
    body = [_grid(frame), _titles(x_title, y_title)]
    if level is not None:
        body.append(_level(frame, level))
    if mark is not None:
        body.append(_spot(frame, mark, _ink(frame, drawn)))
    for index, one in enumerate(drawn):
        body.append(_line(frame, one, index, len(drawn)))
    label = html.escape(alt, quote=True)
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return Svg(markup=f"{head}{''.join(body)}</svg>")


def key(index: int, *, control: bool, codes: bool = False) -> Svg:
    """The sign of a line in the legend."""
    mid = _shape(_SHAPES[index % len(_SHAPES)], 14, 7, hollow=False)
    dash = _dash(control=control, codes=codes)
    return Svg(
        markup=f'<svg class="sign" viewBox="0 0 28 14" width="28" height="14" aria-hidden="true"><g class="s{index % LINES}{dash}">'
        f'<path class="run" d="M1 7H27"/>{mid}</g></svg>'
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _thinned(series: Series) -> Series:
    """At most POINTS dots, spread evenly, the first and the last among them."""
    n = len(series.dots)
    if n <= POINTS:
        return series
    picks = sorted({round(i * (n - 1) / (POINTS - 1)) for i in range(POINTS)})
    return replace(series, dots=tuple(series.dots[i] for i in picks))


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    span = high - low or max(abs(high), 1.0) * 0.1
    return low - margin * span, high + margin * span


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within a range, at most `most` + 1.

    >>> ticks(-2.0, 81.0), ticks(97.1, 99.3)
    ([0.0, 20.0, 40.0, 60.0, 80.0], [97.5, 98.0, 98.5, 99.0])
    """
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, math.floor(high / step) + 1)]


def _grid(frame: _Frame) -> str:
    parts = []
    for x in ticks(*frame.x):
        at, _ = frame.at(x, frame.y[0])
        parts.append(f'<path class="rule" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{_said(x)}</text>')
    for y in ticks(*frame.y):
        _, at = frame.at(frame.x[0], y)
        parts.append(f'<path class="rule" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_said(y)}</text>')
    return "".join(parts)


def _said(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _titles(x_title: str, y_title: str) -> str:
    across, up = LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP + (HEIGHT - TOP - BOTTOM) / 2
    return (
        f'<text class="title" x="{across:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_title)}</text>'
        f'<text class="title" transform="translate(13 {up:.0f}) rotate(-90)" text-anchor="middle">{html.escape(y_title)}</text>'
    )


def _level(frame: _Frame, level: float) -> str:
    _, at = frame.at(frame.x[0], level)
    said = f'<text x="{WIDTH - RIGHT - 4}" y="{at - 4:.1f}" text-anchor="end">limit</text>'
    return f'<path class="level" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>{said}'


def _spot(frame: _Frame, mark: Mark, ink: Sequence[tuple[float, float]]) -> str:
    x, y = frame.at(mark.x, mark.y)
    band = ""
    if mark.low is not None and mark.high is not None:
        left, _ = frame.at(max(mark.low, frame.x[0]), mark.y)
        right, _ = frame.at(min(mark.high, frame.x[1]), mark.y)
        width = max(right - left, 2)
        band = f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
    at, up, side = _free_place(x, [*ink, *((x + dx, y + dy) for dx in (-9, 0, 9) for dy in (-9, 0, 9))])
    return (
        f'{band}<path class="spot" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/><circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="9"/>'
        f'<text class="spotted" x="{at:.1f}" y="{up:.1f}" text-anchor="{side}">sweet spot</text>'
    )


def _free_place(x: float, ink: Sequence[tuple[float, float]]) -> tuple[float, float, str]:
    """(x, y, anchor) beside the upright line at `x` where the words cover least; at the bottom and towards the middle if nothing does."""
    sides = [(-1, "end"), (1, "start")] if x > WIDTH / 2 else [(1, "start"), (-1, "end")]
    bottom = HEIGHT - BOTTOM - 8
    places = [(x + 6 * to, float(up), side) for up in range(bottom, TOP + _WORDS[1], -20) for to, side in sides]

    def covers(place: tuple[float, float, str]) -> int:
        at, up, side = place
        left = at - _WORDS[0] if side == "end" else at
        outside = left < LEFT or left + _WORDS[0] > WIDTH - RIGHT
        return 10_000 * outside + sum(
            left - 4 <= a <= left + _WORDS[0] + 4 and up - _WORDS[1] <= b <= up + 5 for a, b in ink
        )

    return min(places, key=covers)


def _ink(frame: _Frame, drawn: Sequence[Series]) -> list[tuple[float, float]]:
    """Where lines and intervals run, every few pixels."""
    found = []
    for one in drawn:
        ends = [frame.at(d.x, d.y) for d in one.dots]
        ways = [*itertools.pairwise(ends), *((e, e) for e in ends[:1])]
        ways += [
            (frame.at(d.x, d.low), frame.at(d.x, d.high)) for d in one.dots if d.low is not None and d.high is not None
        ]
        for (a, b), (c, d) in ways:
            steps = max(1, math.ceil(max(abs(c - a), abs(d - b)) / 4))
            found += [(a + (c - a) * k / steps, b + (d - b) * k / steps) for k in range(steps + 1)]
    return found


def _line(frame: _Frame, series: Series, index: int, count: int) -> str:
    if not series.dots:
        return ""
    shift = 1.6 * (index - (count - 1) / 2)  # intervals of lines at one amount stand beside each other
    places = [frame.at(d.x, d.y) for d in series.dots]
    way = "".join(f"{'M' if i == 0 else 'L'}{x + shift:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
    parts = [f'<path class="run" d="{way}"/>']
    for dot, (x, y) in zip(series.dots, places, strict=True):
        told = f"<title>{html.escape(dot.told)}</title>"
        bar = ""
        if dot.low is not None and dot.high is not None:
            _, bottom = frame.at(dot.x, dot.low)
            _, top = frame.at(dot.x, dot.high)
            at = x + shift
            bar = f'<path class="bar" d="M{at:.1f} {top:.1f}V{bottom:.1f}M{at - 3:.1f} {top:.1f}h6M{at - 3:.1f} {bottom:.1f}h6"/>'
        parts.append(f"<g>{told}{bar}{_shape(_SHAPES[index % len(_SHAPES)], x + shift, y, hollow=dot.hollow)}</g>")
    dash = _dash(control=series.control, codes=series.codes)
    return f'<g class="s{index % LINES}{dash}">{"".join(parts)}</g>'


def _dash(*, control: bool, codes: bool) -> str:
    return (" control" if control else "") + (" codes" if codes else "")


def _shape(kind: str, x: float, y: float, *, hollow: bool) -> str:
    own = "dot-hollow" if hollow else "dot-full"
    if kind == "circle":
        return f'<circle class="{own}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
    ways = {
        "square": f"M{x - 3.3:.1f} {y - 3.3:.1f}h6.6v6.6h-6.6z",
        "triangle": f"M{x:.1f} {y - 4.4:.1f}l4.2 7.4h-8.4z",
        "diamond": f"M{x:.1f} {y - 4.6:.1f}l4.6 4.6l-4.6 4.6l-4.6 -4.6z",
    }
    return f'<path class="{own}" d="{ways[kind]}"/>'
