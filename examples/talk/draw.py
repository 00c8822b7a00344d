"""Figures of the pages: lines with intervals as in the report of a curve, matplotlib pictures, boxes in a row."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from paredown.report.curve_figures import Dot, Mark, Series, chart, key
from paredown.report.wording import digits
from talk.page import Figure, Spread
from talk.page import Mark as Where

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawn

Lines = Mapping[str, Sequence[tuple[float, Spread | float]]]


def lines(
    points: Lines,
    *,
    x: str,
    y: str,
    caption: str,
    mark: Where = "measured",
    controls: Sequence[str] = (),
    spot: Mark | None = None,
) -> Figure:
    """A chart of named lines [(x, y or a Spread)]; those in `controls` are dashed."""
    series = [
        Series(name=name, dots=tuple(_dot(name, at, value) for at, value in dots), control=name in controls)
        for name, dots in points.items()
    ]
    alt = f"{y} over {x}: {', '.join(points)}."
    legend = [(key(i, control=s.control).markup, s.name) for i, s in enumerate(series)] if len(series) > 1 else []
    return Figure(
        caption=caption, mark=mark, alt=alt, legend=legend,
        markup=chart(series, x_title=x, y_title=y, alt=alt, mark=spot).markup,
    )  # fmt: skip


def _dot(name: str, at: float, value: Spread | float) -> Dot:
    found = value if isinstance(value, Spread) else Spread(value=value, low=None, high=None)
    return Dot(x=at, y=found.value, low=found.low, high=found.high, told=f"{name}: {digits(found.value)} at {at:g}")


def picture(drawn: Drawn, *, alt: str, caption: str, mark: Where = "counted", wide: bool = False) -> Figure:
    """A matplotlib figure as an SVG image that holds its own text; the same figure gives the same bytes."""
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "paredown"}):
        drawn.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
    return Figure(caption=caption, mark=mark, alt=alt, source=source, wide=wide)


def flow(steps: Sequence[tuple[str, str]], *, caption: str, mark: Where = "") -> Figure:
    """Boxes with (name, what happens in it), one below the other, and arrows between them."""
    tall, gap = 50, 22
    parts = []
    for number, (name, told) in enumerate(steps):
        top = number * (tall + gap) + 1
        parts.append(
            f'<rect x="1" y="{top}" width="398" height="{tall}" rx="8"/>'
            f'<text class="name" x="14" y="{top + 21}">{number + 1}. {html.escape(name)}</text>'
            f'<text x="14" y="{top + 40}">{html.escape(told)}</text>'
        )
        if number:
            parts.append(f'<path d="M200 {top - gap + 2}V{top - 3}M194 {top - 9}L200 {top - 3}L206 {top - 9}"/>')
    high = len(steps) * (tall + gap) - gap + 2
    alt = "Steps: " + "; ".join(f"{name}: {told}" for name, told in steps)
    head = f'<svg class="flow" viewBox="0 0 400 {high}" role="img" aria-label="{html.escape(alt, quote=True)}">'
    return Figure(caption=caption, mark=mark, alt=alt, markup=f"{head}{''.join(parts)}</svg>")
