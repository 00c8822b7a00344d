"""Masks in the report: zeros that a dense runtime multiplies by, what they could save, and their cells as pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paredown.records import Record
from paredown.report.figures import Svg
from paredown.report.layers import SMALL, csv_link
from paredown.report.reading import View, entry, items, mapping, number, stage_title, text
from paredown.report.wording import megabytes, whole

WEIGHTS = 240
_MOST_CELLS = 64


def masks_table(run: View) -> dict[str, Any] | None:
    """The masks of the last level that has any: totals with badges, and every masked weight. None where there are none."""
    masked = [r for r in run.stages if mapping(entry(r, "simulated"))]
    if not masked:
        return None
    record = masked[-1]
    found = mapping(entry(record, "simulated"))
    every = [_line(name, mapping(w)) for name, w in mapping(found.get("weights")).items()]
    return {
        "title": stage_title(record),
        "totals": _totals(found, record),
        "lines": every[:WEIGHTS],
        "more": max(0, len(every) - WEIGHTS),
        "csv": csv_link(
            ("weight", "granularity", "kept", "zeros", "bytes"),
            [[line[k] for k in ("name", "granularity", "kept", "zeros", "bytes")] for line in every],
            SMALL,
        ),
    }


def left_out_lines(run: View) -> list[dict[str, str]]:
    """Modules that levels left out altogether."""
    found = [(stage_title(r), [text(m, 200) for m in items(entry(r, "left_out"))[:40]]) for r in run.stages]
    return [{"title": title, "modules": ", ".join(modules)} for title, modules in found if modules]


def _totals(found: Mapping[str, Any], record: Record) -> list[dict[str, str]]:
    rows: list[tuple[str, Any, str, str]] = [
        ("MACs that a dense runtime executes", found.get("macs"), "counted", ""),
        ("Effective MACs, with weights that are not masked", found.get("effective_macs"), "estimated", ""),
        ("Weights as the file holds them", found.get("dense_bytes"), "counted", "B"),
        ("As bitmasks and values", found.get("bitmask_bytes"), "estimated", "B"),
        ("Each weight in its smallest sparse format", found.get("best_bytes"), "estimated", "B"),
        ("gzip of the weights", found.get("gzip_bytes"), "measured", "B"),
    ]
    return [
        {
            "what": what,
            "value": "–"
            if number(value) is None
            else megabytes(number(value) or 0)
            if unit
            else whole(number(value) or 0),
            "badge": "not tested" if number(value) is None else "" if badge == "counted" else badge,
        }
        for what, value, badge, unit in rows
    ]


def _line(name: object, weight: Mapping[str, Any]) -> dict[str, Any]:
    zeros, of, dense, best = (number(weight.get(k)) for k in ("zeros", "of", "dense_bytes", "best_bytes"))
    density = number(weight.get("density"))
    return {
        "name": text(name) or "unnamed",
        "granularity": text(weight.get("granularity"), 40) or "–",
        "kept": "–" if density is None else f"{100 * density:.1f} %",
        "zeros": "–" if zeros is None or of is None else f"{whole(zeros)} of {whole(of)}",
        "bytes": "–" if dense is None or best is None else f"{whole(dense)} → {whole(best)}",
        "picture": cells([text(row, _MOST_CELLS) for row in items(weight.get("picture"))[:_MOST_CELLS]]),
    }


def cells(rows: list[str]) -> Svg | None:
    """Cells as squares, darker where more stays; None where a picture is missing or is no picture.

    >>> cells(["90"]).markup.count("<polyline")
    1
    """
    width = len(rows[0]) if rows else 0
    if not width or any(len(row) != width or not row.isascii() or not row.isdecimal() for row in rows):
        return None
    shapes = []
    for shade in "123456789":
        # One polygon per shade: from a corner out to each stretch and back the same way, which encloses nothing.
        runs = [
            f"{x},{y} {x + n},{y} {x + n},{y + 1} {x},{y + 1} {x},{y} 0,0"
            for y, row in enumerate(rows)
            for x, n in _runs(row, shade)
        ]
        if runs:
            shapes.append(f'<polyline class="is" fill-opacity="{int(shade) / 9:.2g}" points="0,0 {" ".join(runs)}"/>')
    head = f'<svg class="cells" viewBox="0 0 {width} {len(rows)}" width="96" height="96" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
    return Svg(markup=f'{head}<rect class="rail" width="{width}" height="{len(rows)}"/>{"".join(shapes)}</svg>')


def _runs(row: str, shade: str) -> list[tuple[int, int]]:
    """(start, length) of every stretch of one shade."""
    found, start = [], None
    for x, cell in enumerate(f"{row} "):
        if cell == shade and start is None:
            start = x
        elif cell != shade and start is not None:
            found.append((start, x - start))
            start = None
    return found
