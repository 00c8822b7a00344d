"""The page of sensitivities: heat maps, rankings with the spread of every rank, and a sentence on what to cut first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paredown.records import Record, write_text
from paredown.report.beside import Beside, found_beside, shown
from paredown.report.figures import Svg, bar, whisker
from paredown.report.layers import csv_link
from paredown.report.page import _template
from paredown.report.reading import mapping, text
from paredown.report.sensitivity_document import (
    CSV_HEAD,
    SAMPLES,
    csv_lines,
    is_sensitivity,
    sensitivity_csv,
    sensitivity_document,
)
from paredown.report.wording import difference, digits, large, quantity, whole

FITTED = "the layers that read it are fitted anew by least squares (prune.reconstruct), "
ROWS = 250
"""Of a table: more would take the page beyond a megabyte. The CSV file beside the page has all."""


def render_sensitivity(records: Sequence[Record], beside: Sequence[Beside] = ()) -> str:
    """The measurement as one HTML page: no script, no fetching, under 1 MB."""
    told = {**content_of(records), "at": "", "of": "", "folder": "THIS FOLDER", **shown(beside)}
    return str(_template("sensitivity.html").render(told))


def write_sensitivity_report(folder: Path, records: Sequence[Record], beside: Sequence[Beside] | None = None) -> Path:
    """Write report.html, whole or not at all; returns its path. `beside`: what it links, default: what lies there."""
    path = folder / "report.html"
    write_text(path, render_sensitivity(records, found_beside(folder, records) if beside is None else beside))
    return path


def content_of(records: Sequence[Record]) -> dict[str, Any]:
    """What the sections of a sensitivity name."""
    document, head = sensitivity_document(records), records[0]
    metric = mapping(document["metric"])
    dense = document["dense"]
    versions = mapping(mapping(head.environment).get("versions"))
    return {
        "name": document["name"] or document["task"] or "sensitivity",
        "task": document["task"],
        "target": document["target"],
        "metric": {"name": text(metric.get("name")), "unit": text(metric.get("unit"))} if metric else None,
        "dense": None if dense is None or not metric else quantity(dense, text(metric.get("unit"))),
        "samples": whole(document["num_samples"] or 0),
        "data": text(document["data"]),
        "kind": SAMPLES.get(text(document["data"]), "samples"),
        "distance": document["distance"],
        "verdict": document["verdict"],
        "parts": [p for p in (_part(document, kind) for kind in ("units", "bits")) if p is not None],
        "together": [_sum_line(document, t) for t in document["together"]],
        "not_tested": document["not_tested"],
        "notes": document["notes"],
        "csv": csv_link(CSV_HEAD, csv_lines(document)),
        "provenance": [
            ("recipe", text(mapping(head.cell).get("recipe_digest"), 16)),
            ("seed", text(mapping(head.environment).get("seed"))),
            ("threads", text(mapping(head.environment).get("threads"))),
            *((text(k), text(v) or "not installed") for k, v in versions.items()),
        ],
    }


def _sum_line(document: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """One row of what the sums foresee: cells are None where nothing was measured."""
    what = f"{found['at']} bits" if found["kind"] == "bits" else f"{found['at']:g} % remain"
    unit = text(mapping(document["metric"]).get("unit"))
    cells: list[str | None] = []
    for name in ("distance", *(("metric_loss",) if document["metric"] else ())):
        known = found[name]
        both = (None, None) if known is None else (known["sum"], known["measured"])
        cells += [None if v is None else digits(v) if name == "distance" else difference(v, unit) for v in both]
    times = None if found["distance"] is None else found["distance"]["times"]
    cells.insert(2, None if times is None else digits(times))
    which = f"all {found['parts']} {'layers' if found['kind'] == 'bits' else 'spaces'}"
    return {"what": f"{which}, {what}", "cells": cells, "why": found["why"]}


def _part(document: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    table = document[kind]
    if table is None:
        return None
    units = kind == "units"
    unit = text(mapping(document["metric"]).get("unit"))
    maps = [_heat(table, "distance", "Output distance", "", units)]
    if document["metric"]:
        name = text(mapping(document["metric"]).get("name"))
        maps.insert(0, _heat(table, "metric_loss", f"Loss of {name}", unit, units))
    return {
        "id": "spaces" if units else "bits",
        "title": "Spaces, by what is cut" if units else "Layers, by bits of the weight",
        "hint": (
            "One coupled space alone keeps less: what the criterion ranks lowest leaves, "
            f"{FITTED if document['repair'] else ''}everything else stays dense."
            if units
            else "The weight of one layer alone is rounded, a scale per output channel; all else, and all activations, stay in float."
        ),
        "columns": [f"{100 - c:g} % out" if units else f"{c} bits" for c in table["columns"]],
        "maps": maps,
        "more": max(0, len(table["rows"]) - ROWS),
        "ranking": _ranking(table, unit, bool(document["metric"])),
        "ordered_by": text(mapping(document["metric"]).get("name"))
        if table["ordered_by"] == "metric"
        else "output distance",
        "stability": _stability(document, table),
        "sentence": table["sentence"],
    }


def _heat(table: Mapping[str, Any], measure: str, title: str, unit: str, units: bool) -> dict[str, Any]:
    """Rows in the order of the network; the darker a cell, the more is lost (square root, so that small ones show)."""
    top = max((p[measure] for row in table["rows"] for p in row["points"] if p[measure] is not None), default=0.0)
    lines = []
    for row in table["rows"][:ROWS]:
        at = {p["at"]: p for p in row["points"]}
        cells = [_cell(at.get(c), measure, top, unit) for c in table["columns"]]
        lines.append({"name": text(row["name"], 80), "note": _size(row, units), "cells": cells})
    return {"title": title, "lines": lines}


def _cell(point: Mapping[str, Any] | None, measure: str, top: float, unit: str) -> dict[str, Any]:
    if point is None:
        return {"said": "–", "heat": 0, "why": "not measured: no such number of units"}
    value = point[measure]
    if value is None:
        return {"said": "", "heat": 0, "why": point["why"] or "not tested"}
    heat = round(100 * math.sqrt(max(value, 0.0) / top)) if top > 0 else 0
    said = f"{value:.2f}".replace("-", "−") if unit == "%" else digits(value, 2)
    return {"said": "0.00" if said == "−0.00" else said, "heat": heat, "why": ""}


def _size(row: Mapping[str, Any], units: bool) -> str:
    size = "" if row["parameters"] is None else f"{large(row['parameters'])} parameters"
    return f"{whole(row['of'])} {row['kind']}s; {size} go with them" if units and size else size


def _ranking(table: Mapping[str, Any], unit: str, metric: bool) -> list[dict[str, Any]]:
    rows = {row["name"]: row for row in table["rows"]}
    count = len(table["order"])
    top = {
        m: max((rows[n][m] or 0.0 for n in table["order"]), default=0.0) for m in ("mean_metric_loss", "mean_distance")
    }
    lines = []
    for place, name in enumerate(table["order"][:ROWS], start=1):
        row = rows[name]
        low, high = row["rank_low"], row["rank_high"]
        chart: Svg | None = None if low is None or count < 2 else whisker(row["rank"], low, high, (1, count), None)
        lines.append(
            {
                "place": place,
                "name": text(name, 80),
                "metric": difference(row["mean_metric_loss"], unit)
                if metric and row["mean_metric_loss"] is not None
                else "",
                "metric_bar": bar(max(row["mean_metric_loss"] or 0.0, 0.0), top["mean_metric_loss"]),
                "distance": digits(row["mean_distance"]),
                "distance_bar": bar(row["mean_distance"], top["mean_distance"]),
                "spread": "" if low is None else f"{low:.0f} to {high:.0f}",
                "chart": chart,
            }
        )
    return lines


def _stability(document: Mapping[str, Any], table: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, τ, interval) of every comparison of orders."""
    found = table["stability"]
    lines = []
    for measure, name in (("metric", text(mapping(document["metric"]).get("name"))), ("distance", "output distance")):
        if measure == "metric" and not document["metric"]:
            continue
        one = found[measure]
        what = f"by {name}, between disjoint halves of the samples"
        spread = (
            ""
            if one is None
            else f"{one['low']:.2f} to {one['high']:.2f} over {one['splits']} splits".replace("-", "−")
        )
        lines.append((what, "" if one is None else f"{one['tau']:.2f}".replace("-", "−"), spread))
    if document["metric"]:
        between = found["between"]
        lines.append(
            (
                "by the metric against by output distance",
                "" if between is None else f"{between:.2f}".replace("-", "−"),
                "all samples",
            )
        )
    return lines


__all__ = [
    "is_sensitivity",
    "render_sensitivity",
    "sensitivity_csv",
    "sensitivity_document",
    "write_sensitivity_report",
]
