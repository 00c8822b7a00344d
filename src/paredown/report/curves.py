"""The page of a curve."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from paredown.records import Record, write_text
from paredown.report.curve_document import curve_document, curve_view


def render_curve(records: Sequence[Record]) -> str:
    """The report of a curve as one HTML page."""
    seen = curve_view(records)
    return f"<h1>{html.escape(seen.spot.sentence)}</h1>"


def write_curve_report(folder: Path, records: Sequence[Record]) -> Path:
    """Write report.html, whole or not at all; returns its path."""
    path = folder / "report.html"
    write_text(path, render_curve(records))
    return path


__all__ = ["curve_document", "render_curve", "write_curve_report"]
