"""Figures of the page about numerics: matplotlib, as SVG in an image of its own, from plain numbers."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paredown.errors import MissingError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, ACCENT, WARN = "#1b2430", "#8793a1", "#0f5fa6", "#9a3412"
COLOURS = {"tensor": WARN, "channel": ACCENT, "group": "#2f7d4f", "token": "#7a4fa3"}
SIZE = (4.0, 3.0)
"""Inches. Narrow, so that the text stays readable where a phone shows it at its own width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A picture as the text of a src, and what it shows in words."""

    source: str
    alt: str


def staircase(about: Mapping[str, Any], low: float, high: float, title: str) -> Image:
    """x̂ over x for one mapping, the levels as dots on the axis, and the range that is asked for."""
    levels = [float(v) for v in about["levels"]]
    step = float(about["scale"])
    figure, axes = _figure()
    middles = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    left, right = min(low, levels[0]) - 2 * step, max(high, levels[-1]) + 2 * step
    x = [left, *[m for m in middles for _ in (0, 1)], right]
    y = [v for v in levels for _ in (0, 1)]
    axes.plot([left, right], [left, right], color=SOFT, linewidth=0.8, linestyle="--")
    axes.plot(x, y, color=ACCENT, linewidth=1.6)
    axes.plot(levels, [left] * len(levels), "|", color=ACCENT, markersize=7)
    axes.axvspan(low, high, color=ACCENT, alpha=0.08, linewidth=0)
    axes.plot([0], [0], "o", color=WARN, markersize=4)
    axes.set_xlabel("x", fontsize=8)
    axes.set_ylabel("x̂ = s · (q − z)", fontsize=8)
    axes.set_title(f"{title}: s = {step:.3g}, z = {about['zero_point']}", fontsize=9)
    alt = f"Staircase of the {title} mapping: {len(levels)} levels from {levels[0]:.3g} to {levels[-1]:.3g}, 0 among them."
    return _image(figure, alt)


def two_zero_points(rows: Sequence[Mapping[str, Any]], codes: Sequence[int], low: float, high: float) -> Image:
    """The error x̂ - x over the range with the right zero point, and with the one that is often told."""
    figure, axes = _figure()
    x = [low + (high - low) * i / 600 for i in range(601)]
    for row, colour, name in zip(rows, (ACCENT, WARN), ("right", "told"), strict=True):
        scale, zero = float(row["scale"]), float(row["zero_point"])
        errors = [scale * (min(max(round(v / scale + zero), codes[0]), codes[1]) - zero) - v for v in x]
        axes.plot(x, errors, color=colour, linewidth=1.2, label=f"{name}: z = {zero:g}")
    axes.set_xlabel("x", fontsize=8)
    axes.set_ylabel("x̂ − x", fontsize=8)
    axes.set_title(f"codes {codes[0]} … {codes[1]}", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    largest = [float(r["largest_error"]) for r in rows]
    alt = f"Error over the range with codes {codes[0]} to {codes[1]}: at most {largest[0]:.3g} with the right zero point, up to {largest[1]:.3g} with the other."
    return _image(figure, alt)


def bits_chart(sqnr_db: Mapping[str, Mapping[str, float | None]], title: str) -> Image:
    """SQNR over bits, one line per granularity, and the slope of 6.02 dB per bit."""
    figure, axes = _figure()
    best = None
    for granularity, by_bits in sqnr_db.items():
        points = sorted((int(b), db) for b, db in by_bits.items() if db is not None)
        if points:
            colour = COLOURS.get(granularity, INK)
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=granularity)
            best = points[-1] if best is None or points[-1][1] > best[1] else best
    if best is not None:
        bits = range(1, best[0] + 1)
        line = [best[1] - 20 * math.log10(2) * (best[0] - b) for b in bits]
        axes.plot(bits, line, color=SOFT, linewidth=0.8, linestyle="--", label="6.02 dB per bit")
    axes.set_xticks(range(1, 9))
    axes.set_xlabel("bits", fontsize=8)
    axes.set_ylabel("SQNR, dB", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    alt = f"SQNR in dB over bits 1 to 8 for {', '.join(sqnr_db)}; the numbers stand in the table."
    return _image(figure, alt)


def histogram_with_grid(about: Mapping[str, Any]) -> Image:
    """How often values occur (logarithmic), and the levels of the grid as lines over them."""
    seen, levels = about["histogram"], [float(v) for v in about["levels"]]
    counts = [int(c) for c in seen["counts"]]
    figure, axes = _figure()
    width = (seen["high"] - seen["low"]) / max(len(counts), 1)
    lefts = [seen["low"] + i * width for i in range(len(counts))]
    axes.bar(lefts, counts, width=width, align="edge", color=ACCENT, alpha=0.5, linewidth=0)
    axes.vlines(levels, 0, 1, transform=axes.get_xaxis_transform(), color=WARN, linewidth=0.7, alpha=0.8)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 2 * max(counts, default=1))
    axes.set_xlabel("value", fontsize=8)
    axes.set_ylabel("values per bin", fontsize=8)
    zeros = f", {seen['zeros']:,} exact zeros not drawn" if seen["zeros"] else ""
    axes.set_title(f"{about['bits']}-bit grid: {len(levels)} levels{zeros}", fontsize=9)
    alt = f"Histogram of {sum(counts):,} values from {seen['low']:.3g} to {seen['high']:.3g} with the {len(levels)} levels of a {about['bits']}-bit grid."
    return _image(figure, alt)


def _figure() -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "the page must have matplotlib for its figures. It is not installed. pip install 'paredown[report]'."
        raise MissingError(msg) from error
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(labelsize=8)
    axes.grid(visible=True, linewidth=0.3, color=SOFT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _image(figure: Figure, alt: str) -> Image:
    from matplotlib import rc_context

    drawn = io.BytesIO()
    # Texts stay texts, and nothing depends on the hour: the same numbers give the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "paredown"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return Image(source=f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode('ascii')}", alt=alt)
