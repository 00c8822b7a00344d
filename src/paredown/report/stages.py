"""The before/after table: one row per exported file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from paredown.records import Badge, Measured, Record
from paredown.report.figures import Svg, bar, whisker
from paredown.report.reading import (
    View,
    entry,
    figure,
    items,
    runtime,
    stage_name,
    stage_of_device,
    stage_title,
    text,
    threads,
)
from paredown.report.wording import difference, digits, interval, mebibytes, megabytes, quantity, times, whole

Speed = Literal["faster", "slower", "same", "unknown"]
HEADS = ("Size on disk", "Parameters", "MACs", "{metric}", "Latency", "Peak memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One figure as it is shown. Badge "" is for what is no figure ("reference")."""

    value: str
    badge: Badge | Literal[""] = ""
    notes: tuple[str, ...] = ()
    warning: str = ""
    chart: Svg | None = None
    how: str = ""
    """Protocol and machine, shown on hover and in the provenance."""


NONE = Cell(value="not tested", badge="not tested")


def cell(
    found: Measured, say: Callable[[float], str], *notes: str, chart: Svg | None = None, warning: str = ""
) -> Cell:
    """A figure in words, marked with its badge."""
    if found.value is None:
        return NONE
    how = ". ".join(p for p in (text(found.protocol, 300), text(found.machine)) if p)
    said = tuple(n for n in notes if n)
    return Cell(value=say(found.value), badge=found.badge, notes=said, chart=chart, how=how, warning=warning)


def stage_rows(run: View) -> list[dict[str, Any]]:
    """One row per exported file, in the order of the journal."""
    once = bool(common_place(run))
    return [
        {
            "name": stage_name(r),
            "title": stage_title(r),
            "file": text(entry(r, "file")),
            "recommended": stage_name(r) == run.recommended,
            "cells": [
                _size(run, r),
                _count(run, r, "parameters"),
                _count(run, r, "macs"),
                metric(run, r),
                latency(run, r, say_place=not once),
                _memory(r),
            ],
        }
        for r in run.stages
    ]


def _size(run: View, record: Record) -> Cell:
    size, packed = figure(record, "bytes"), figure(record, "gzip_bytes")
    sizes = [v for v in (figure(r, "bytes").value for r in run.stages) if v is not None]
    chart = bar(size.value, max(sizes)) if size.value is not None else None
    side = len(items(entry(record, "files"))) - 1
    notes = (
        smaller(run, record),
        mebibytes(size.value) if size.value is not None else "",
        f"{whole(size.value)} B" if size.value is not None else "",
        f"{megabytes(packed.value)} gzipped{_mark(packed)}" if packed.value is not None else "gzipped: not tested",
        f"with {side} side file{'s' if side > 1 else ''}" if side > 0 else "",
    )
    return cell(size, megabytes, *notes, chart=chart)


def smaller(run: View, record: Record) -> str:
    """How many times smaller than the dense file; without metadata where both were measured so."""
    dense = run.stage("dense")
    if dense is record:
        return ""
    for key, note in (("stripped_bytes", "without metadata"), ("bytes", "with metadata")):
        before, after = figure(dense, key), figure(record, key)
        if before.value and after.value:
            return f"{times(before.value / after.value)} smaller, {note}{_mark(before, after)}"
    return "× smaller: not tested"


def _count(run: View, record: Record, key: str) -> Cell:
    found, before = figure(record, key), figure(run.stage("dense"), key)
    share = ""
    if found.value is not None and before.value and run.stage("dense") is not record:
        share = f"{100 * found.value / before.value:.1f} % of dense"
    return cell(found, whole, share)


def metric(run: View, record: Record) -> Cell:
    """The metric with its interval, on one scale for all stages, and the paired change."""
    found, about = figure(record, "metric"), run.metric
    unit = found.unit or about["unit"]
    chart = None
    if found.value is not None:
        chart = whisker(found.value, found.low, found.high, _scale(run), figure(run.stage("dense"), "metric").value)
    spread = interval(found.low, found.high, unit)
    return cell(
        found,
        lambda v: quantity(v, unit),
        (spread or "no interval") + (f", {found.n:,} samples" if isinstance(found.n, int) and found.n > 1 else ""),
        change(run, record),
        chart=chart,
    )


def change(run: View, record: Record) -> str:
    """The paired difference against the dense file in words; says so where it is inside the noise."""
    if record is run.stage("dense"):
        return ""
    found = figure(record, "metric_change")
    if found.value is None:
        return "paired change: not tested"
    unit = found.unit or run.metric["unit"]
    said = f"{difference(found.value, unit)} against dense{_mark(found)}"
    if found.low is None or found.high is None:
        return f"{said}, no interval"
    noise = "; inside the noise" if found.low <= 0 <= found.high else ""
    return f"{said}, interval {interval(found.low, found.high, unit, signed=True)}{noise}"


def _scale(run: View) -> tuple[float, float]:
    """From the lowest to the highest end of all intervals, with a little air."""
    found = [figure(r, "metric") for r in run.stages]
    ends = [v for f in found for v in (f.value, f.low, f.high) if v is not None and f.value is not None]
    low, high = min(ends), max(ends)
    air = 0.05 * (high - low)
    return low - air, high + air


def common_place(run: View) -> str:
    """Threads and runtime of all latencies where they are the same, else ""."""
    places = {_place(r) for r in run.stages if figure(r, "latency_ms").value is not None}
    return places.pop() if len(places) == 1 else ""


def _place(record: Record) -> str:
    count = threads(record)
    return f"{'unknown' if count is None else count} thread{'' if count == 1 else 's'}, {runtime(record)}"


def latency(run: View, record: Record, *, say_place: bool = True) -> Cell:
    """Median with p10–p90, threads and runtime; slower than dense is called so."""
    found = figure(record, "latency_ms")
    ends = (
        f"p10–p90 {digits(found.low)} – {digits(found.high)} ms"
        if found.low is not None and found.high is not None
        else "no spread"
    )
    pace, said = speed(run, record)
    unsteady, beside = _unsteady(found), figure(record, "baseline_latency_ms").value
    if said and beside is not None:
        said += f"; dense beside it {digits(beside)} ms"
    warning = "slower than the dense FP32 file: not recommended on latency grounds" if pace == "slower" else ""
    return cell(
        found, lambda v: f"{digits(v)} ms", ends, _place(record) if say_place else "", said, unsteady, warning=warning
    )


def speed(run: View, record: Record) -> tuple[Speed, str]:
    """Whether a file is faster than the dense one, and in words; a difference inside the spread is no difference."""
    dense = run.stage("dense")
    if dense is record:
        return "unknown", ""
    ratio = figure(record, "speedup")
    if ratio.value is not None:
        said = f"{times(ratio.value)} the speed of dense{_mark(ratio)}"
        if ratio.low is None or ratio.high is None:
            return ("slower" if ratio.value < 1 else "faster"), f"{said}, no interval"
        said += f" ({digits(ratio.low)} to {digits(ratio.high)})"
        if ratio.low <= 1 <= ratio.high:
            return "same", f"{said}: no difference shown"
        return ("slower" if ratio.high < 1 else "faster"), said
    this, before = figure(record, "latency_ms"), figure(dense, "latency_ms")
    if this.value is None or before.value is None or not this.value:
        return "unknown", "speed against dense: not tested"
    said = f"{times(before.value / this.value)} the speed of dense, by medians"
    if (this.low or this.value) <= (before.high or before.value) and (before.low or before.value) <= (
        this.high or this.value
    ):
        return "same", f"{said}: no difference shown"
    return ("slower" if this.value > before.value else "faster"), said


def _memory(record: Record) -> Cell:
    peak, own = figure(record, "peak_memory_bytes"), figure(record, "memory_bytes")
    above = f"{megabytes(own.value)} above the bare runtime{_mark(own)}" if own.value is not None else ""
    return cell(peak, megabytes, mebibytes(peak.value) if peak.value is not None else "", above)


def device_rows(run: View) -> list[dict[str, Any]]:
    """One row per device that ran a bundle: its latency with the spread, and how far its outputs were from the golden ones."""
    rows = []
    for record in run.devices:
        found, error, cosine = (figure(record, k) for k in ("latency_ms", "golden_max_error", "golden_cosine"))
        ends = "no spread"
        if found.low is not None and found.high is not None:
            ends = f"p10–p90 {digits(found.low)} – {digits(found.high)} ms"
        flags = [text(f, 300) for f in items(entry(record, "flags"))]
        near = f"cosine {cosine.value:.6f}, {cosine.n} samples" if cosine.value is not None else ""
        rows.append(
            {
                "title": stage_title(record),
                "file": next(
                    (text(entry(r, "file")) for r in run.stages if stage_name(r) == stage_of_device(run, record)), ""
                ),
                "latency": cell(found, lambda v: f"{digits(v)} ms", ends, *flags, warning=_unsteady(found)),
                "golden": cell(error, digits, near),
            }
        )
    return rows


def _unsteady(found: Measured) -> str:
    return "unsteady: other load or throttling" if "unsteady" in text(found.protocol, 400) else ""


def _mark(*found: Measured) -> str:
    """An estimate is called one wherever it stands."""
    return " (estimated)" if any(f.badge == "estimated" for f in found) else ""


def twin_rows(run: View) -> dict[str, Any] | None:
    """The quantized file beside that of the equal-size dense network; None where there is no twin."""
    twin = run.twin
    ours = run.quantized or run.stage(run.recommended)
    if twin is None or ours is None or ours is twin:
        return None
    both = (ours, twin)
    lines = [
        ("Size on disk", [_size(run, r) for r in both]),
        ("Parameters", [_count(run, r, "parameters") for r in both]),
        ("MACs", [_count(run, r, "macs") for r in both]),
        (run.metric["label"], [metric(run, r) for r in both]),
        ("Latency", [latency(run, r) for r in both]),
    ]
    return {"titles": [stage_title(r) for r in both], "lines": lines, "sentence": _twin_sentence(run, ours, twin)}


def _twin_sentence(run: View, ours: Record, twin: Record) -> str:
    this, other = figure(ours, "metric"), figure(twin, "metric")
    if this.value is None or other.value is None:
        return "Their quality was not compared."
    unit = this.unit or run.metric["unit"]
    lead = f"{run.metric['label']} of the pruned network minus that of the twin: {difference(this.value - other.value, unit)}."
    apart = figure(twin, "change_from_pruned")
    if apart.low is not None and apart.high is not None:
        return f"{lead.removesuffix('.')}, interval {interval(-apart.high, -apart.low, unit, signed=True)}, on the same samples: {_so(run, twin, -apart.high, -apart.low)}"
    changes = figure(ours, "metric_change"), figure(twin, "metric_change")
    if all(c.low is not None and c.high is not None for c in changes):
        this, other = changes  # the same samples for both, so these intervals are the narrower ones
    if this.low is None or this.high is None or other.low is None or other.high is None:
        return f"{lead} No interval was measured: this may be noise."
    if this.low <= other.high and other.low <= this.high:
        return f"{lead} Their intervals against the dense file overlap: by these no difference shows."
    better = (this.low > other.high) == (run.metric["goal"] == "max")
    return f"{lead} Their intervals are apart: {'pruning kept more' if better else 'the smaller dense network does better'}."


def _so(run: View, twin: Record, low: float, high: float) -> str:
    """What the paired interval of "pruned less twin" says; each network was trained once."""
    if low <= 0 <= high:
        return "no difference shows, and each was trained once."
    if (low > 0) == (run.metric["goal"] == "max"):
        return "pruning kept more."
    return f"the smaller dense network does better. It can be shipped in place of the pruned one ({text(entry(twin, 'file'))})."
