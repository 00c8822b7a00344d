"""The verdict strip: was the target met, which file to ship, and the three figures that matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paredown.records import Record
from paredown.report.reading import View, entry, figure, mapping, number, rows, stage_name, stage_title, text
from paredown.report.stages import NONE, Cell, cell, change, latency, metric, smaller, speed
from paredown.report.wording import difference, digits, mebibytes, megabytes, quantity, times

OF_CODES = ("int8", "int8-dynamic", "w4a8")
"""Schemes whose products are sums of 8-bit codes; the others multiply in float."""
_NAMES = {
    "size_bytes": "Size",
    "metric_loss": "Loss of the metric",
    "latency": "Latency",
    "latency_ms": "Latency",
    "parameters": "Parameters",
    "macs": "MACs",
    "peak_ram_bytes": "Peak memory",
}


def verdict_strip(run: View) -> dict[str, Any]:
    """Headline, recommended file, figures of that file, and every bound that was asked for."""
    state, headline = _headline(run)
    best = run.stage(run.recommended)
    bounds = [_bound(b) for b in rows(entry(run.verdict, "bounds"))]
    judged = run.quantized or best
    return {
        "state": state,
        "headline": headline,
        "recommended": run.recommended,
        "file": text(entry(best, "file")),
        "cards": _cards(run, best, bounds if judged is best else []),
        "bounds": bounds,
        "bounds_of": _judged(run),
        "sentence": " ".join(s for s in (_unasked_loss(run, best), _sentence(run, best)) if s),
    }


def _judged(run: View) -> str:
    """Which file the bounds were judged on."""
    if run.quantized is None:
        return "the recommended file"
    return "the INT8 file" if stage_name(run.quantized) == "int8" else f"the {stage_title(run.quantized)} file"


def _headline(run: View) -> tuple[str, str]:
    if run.verdict is None:
        return "open", "Not finished: there is no verdict yet"
    met = entry(run.verdict, "target_met")
    bounds = rows(entry(run.verdict, "bounds"))
    if met is None and not bounds:
        return "open", "No target was set"
    if met is not True or any(b.get("met") is False for b in bounds):
        return (
            ("missed", "Target missed")
            if met is False or any(b.get("met") is False for b in bounds)
            else ("open", "Target not tested")
        )
    badges = {text(b.get("badge")) for b in bounds}
    if "not tested" in badges or any(b.get("met") is None for b in bounds):
        return "open", "Target met in part: not every bound was tested"
    if "estimated" in badges:
        return "open", "Target met by estimate, not by measurement"
    return "met", "Target met"


def _sentence(run: View, best: Record | None) -> str:
    if best is None:
        return ""
    smaller = _smaller_in_codes(run, best)
    if run.recommended == "dense":
        return (
            smaller or "No smaller file made from it may take its place: the dense FP32 file stays the recommended one."
        )
    if smaller:
        return smaller
    pace, _ = speed(run, best)
    if pace == "slower":
        return "It is recommended for its size. It is slower than the dense FP32 file on this machine."
    return _faster_in_float(run, best)


def _unasked_loss(run: View, best: Record | None) -> str:
    """Where no bound was set, a file is recommended whatever it lost: what it lost beyond the noise is said first."""
    change = figure(best, "metric_change")
    if (
        best is None
        or run.verdict is None
        or rows(entry(run.verdict, "bounds"))
        or change.low is None
        or change.high is None
    ):
        return ""
    worse = change.high < 0 if run.metric["goal"] == "max" else change.low > 0
    if not worse or change.value is None:
        return ""
    said = difference(change.value, change.unit or run.metric["unit"])
    return f"No loss was ruled out, and it has one beyond the noise: {said} of {run.metric['name']} (budget.metric_loss sets a limit)."


def _faster_in_float(run: View, best: Record) -> str:
    """Where a float file of the run beats the recommended one in codes, beyond both intervals: what to take where time decides."""
    own = figure(best, "speedup")
    if best is not run.quantized or own.high is None:
        return ""
    rivals = [(r, f) for r in run.stages if r not in (best, run.twin) and (f := figure(r, "speedup")).low is not None]
    rival, found = max(rivals, key=lambda p: p[1].value or 0.0, default=(best, own))
    if found.low is None or found.low <= own.high or found.value is None or own.value is None:
        return ""
    reached = figure(rival, "metric")
    said = f", {run.metric['name']} {quantity(reached.value, reached.unit)}" if reached.value is not None else ""
    why = (
        ""
        if stage_name(best) not in OF_CODES or _sums_codes(best)
        else " This processor has no instructions for sums of 8-bit products: where a device has them, time may decide otherwise."
    )
    return (
        f"It is recommended for its size. {stage_title(rival)} ({text(entry(rival, 'file'))}) is the faster file on this machine: "
        f"{times(found.value)} the speed of dense, this one {times(own.value)}; {megabytes(_bytes(rival))}{said}. Where time decides, take that one.{why}"
    )


def _sums_codes(record: Record) -> bool:
    """Whether the processor that timed a file sums 8-bit products by instructions of its own, or is not known to lack them."""
    return mapping(mapping(record.environment).get("machine")).get("int8_dot") is not False


def _smaller_in_codes(run: View, best: Record) -> str:
    """Why the file in codes, which is smaller and keeps what was asked, is not the recommended one: no clock shows a gain."""
    coded, bounds = run.quantized, rows(entry(run.verdict, "bounds"))
    met = entry(run.verdict, "target_met") is not False and all(b.get("met") for b in bounds)
    if coded is None or coded is best or not met or _bytes(coded) >= _bytes(best):
        return ""
    pace, _ = speed(run, coded)
    if pace == "faster" and run.recommended != "dense":
        return ""
    reason = (
        "is slower than the dense FP32 file on this machine" if pace == "slower" else "is no faster on this machine"
    )
    keeps = " and keeps every bound" if bounds else ""
    judged = _judged(run)
    return f"{judged[:1].upper()}{judged[1:]} is smaller{keeps}, but it {reason}. Where bytes decide, take that one."


def _bytes(record: Record) -> float:
    return figure(record, "bytes").value or 0.0


def _cards(run: View, best: Record | None, bounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Size, metric and latency of the recommended file. `bounds` are those that were judged on this file."""
    by_what = {b["what"]: b for b in bounds}
    wanted: list[tuple[str, str, Callable[[View, Record], Cell]]] = [
        ("Size", "size_bytes", _size_card),
        (run.metric["label"], "metric_loss", _metric_card),
        ("Latency", "latency_ms", latency),
    ]
    return [
        {
            "title": t,
            "cell": NONE if best is None else make(run, best),
            "bound": by_what.get(what) or (by_what.get("latency") if what == "latency_ms" else None),
        }
        for t, what, make in wanted
    ]


def _size_card(run: View, best: Record) -> Cell:
    size = figure(best, "bytes")
    return cell(size, megabytes, mebibytes(size.value) if size.value is not None else "", smaller(run, best))


def _metric_card(run: View, best: Record) -> Cell:
    shown = metric(run, best)
    dense = figure(run.stage("dense"), "metric")
    if best is run.stage("dense") or dense.value is None or shown.badge == "not tested":
        return shown
    before = f"dense {quantity(dense.value, dense.unit or run.metric['unit'])}"
    notes = tuple(n for n in (*shown.notes[:1], before, change(run, best)) if n)
    return Cell(value=shown.value, badge=shown.badge, notes=notes, how=shown.how, chart=shown.chart)


def _bound(given: Mapping[str, Any]) -> dict[str, Any]:
    """One bound in words."""
    what, unit = text(given.get("what")), text(given.get("unit"), 16)
    value, bound, margin = (number(mapping(given).get(k)) for k in ("value", "bound", "margin"))
    badge = text(given.get("badge"))
    badge = badge if badge in ("measured", "estimated") and value is not None else "not tested"
    met = given.get("met")
    share = number(given.get("share"))
    turns = ", timed in turns" if what == "latency" else ""
    of = "" if share is None else f" ({digits(share)} of the dense file{turns})"
    say = _points if what == "metric_loss" else quantity
    high = number(given.get("high"))
    beyond = met is True and high is not None and bound is not None and high > bound
    return {
        "what": what,
        "title": _NAMES.get(what, what.replace("_", " ")),
        "bound": f"≤ {say(bound, unit)}{of}" if bound is not None else "not given",
        "value": Cell(value=say(value, unit), badge=badge) if badge != "not tested" and value is not None else NONE,  # type: ignore[arg-type]
        "margin": say(margin, unit) if margin is not None and badge != "not tested" else "–",
        "met": "not tested" if badge == "not tested" or not isinstance(met, bool) else "met" if met else "missed",
        "beyond": f"held by its mean; the 95 % interval reaches {say(high, unit)}" if beyond else "",  # type: ignore[arg-type]
    }


def _points(value: float, unit: str) -> str:
    return f"{value:.2f} points".replace("-", "−") if unit == "%" else quantity(value, unit)
