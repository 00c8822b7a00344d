"""report_json: the same facts for scripts."""

from __future__ import annotations

from typing import Any

from paredown.records import Record
from paredown.report.reading import (
    View,
    entry,
    epoch_losses,
    figure,
    items,
    runtime,
    stage_name,
    stage_of_device,
    stage_title,
    text,
    threads,
    view,
)

_TOLD = (("bytes", "size"), ("metric", "metric"), ("latency_ms", "latency"))


def report_json(records: list[Record]) -> dict[str, Any]:
    """The report as one JSON-ready document, schema 1.

    {"schema": 1, "verdict": {"target_met", "recommended", "not_tested"}, "rows": [{"stage", "file", "bytes", "gzip_bytes",
    "parameters", "macs", "metric": {"name", "unit", "value", "low", "high", "n", "badge"}, "latency_ms": {"median", "p10",
    "p90", "runtime", "threads", "badge"}, "float_nodes"}]}. The first row is the dense FP32 file and the last the
    recommended one, and "devices" is there where a device was imported; where the dense file is the recommended one it stands in both places. Bytes, parameters and MACs are
    exact integers, null where not measured; float_nodes is null where no check ran. Without a verdict "recommended" and
    "target_met" are null and the rows are the stages so far.

    >>> report_json([])
    {'schema': 1, 'verdict': {'target_met': None, 'recommended': None, 'not_tested': []}, 'rows': []}
    """
    run = view(records)
    met = entry(run.verdict, "target_met")
    return {
        "schema": 1,
        "verdict": {
            "target_met": met if isinstance(met, bool) else None,
            "recommended": run.recommended,
            "not_tested": not_tested(run),
        },
        "rows": [_row(run, name, record) for name, record in _ordered(run)],
        **({"devices": [_device(run, record) for record in run.devices]} if run.devices else {}),
    }


def _device(run: View, record: Record) -> dict[str, Any]:
    """One device that was measured with a bundle."""
    latency, error = figure(record, "latency_ms"), figure(record, "golden_max_error")
    return {
        "device": latency.machine,
        "stage": stage_of_device(run, record),
        "latency_ms": {"median": latency.value, "p10": latency.low, "p90": latency.high, "badge": latency.badge},
        "golden_max_error": {"value": error.value, "n": error.n, "badge": error.badge},
        "flags": [text(f, 300) for f in items(entry(record, "flags"))],
    }


def not_tested(run: View) -> list[str]:
    """What the verdict says was not tested, and the figures that the stages lack."""
    told = [text(t, 300) for t in items(entry(run.verdict, "not_tested"))]
    if any(epoch_losses(r) for r in run.records):
        told.append(
            "other seeds: everything was trained once, and intervals are over the test samples alone (paredown curve repeats it)"
        )
    if run.devices:  # a bundle runs on any machine: which of them are phones the reader must judge
        where = f" (measured on: {'; '.join(stage_title(r) for r in run.devices)})"
        told = [t + where if t.startswith("latency on the phone") else t for t in told]
    for record in run.stages:
        lacking = [word for key, word in _TOLD if figure(record, key).value is None]
        if lacking:
            told.append(f"{', '.join(lacking)} of {stage_name(record)}")
    if run.recommended and run.stage(run.recommended) is None:
        told.append(f"everything about {run.recommended}: it has no record")
    return list(dict.fromkeys(told))


def _ordered(run: View) -> list[tuple[str, Record | None]]:
    """Stages as rows: dense first, the recommended one last."""
    if not run.stages:
        return []
    last = run.recommended
    middle = [(stage_name(r), r) for r in run.stages if stage_name(r) not in ("dense", last)]
    order: list[tuple[str, Record | None]] = [("dense", run.stage("dense")), *middle]
    if last is not None and (last != "dense" or len(order) > 1):
        order.append((last, run.stage(last)))
    return order


def _row(run: View, name: str, record: Record | None) -> dict[str, Any]:
    metric, latency = figure(record, "metric"), figure(record, "latency_ms")
    about = run.metric
    floats = entry(record, "float_nodes")
    return {
        "stage": name,
        "file": text(entry(record, "file")) or None,
        "bytes": _exact(record, "bytes"),
        "gzip_bytes": _exact(record, "gzip_bytes"),
        "parameters": _exact(record, "parameters"),
        "macs": _exact(record, "macs"),
        "metric": {
            "name": about["name"],
            "unit": metric.unit or about["unit"],
            "value": metric.value,
            "low": metric.low,
            "high": metric.high,
            "n": metric.n,
            "badge": metric.badge,
        },
        "latency_ms": {
            "median": latency.value,
            "p10": latency.low,
            "p90": latency.high,
            "runtime": runtime(record) if record is not None else None,
            "threads": threads(record) if record is not None else None,
            "badge": latency.badge,
        },
        "float_nodes": None if floats is None else [text(f) for f in items(floats)],
    }


def _exact(record: Record | None, key: str) -> int | None:
    """An integer that was measured; an estimate has no badge in the document, so it is not given."""
    found = figure(record, key)
    return found.value if isinstance(found.value, int) and found.badge == "measured" else None
