"""The closer look in the report: for whom the result changed, bits and noise per layer, disturbed inputs, the roofline, the lineage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paredown.report.figures import bar, roof, scatter
from paredown.report.layers import LARGE, SMALL, csv_link
from paredown.report.reading import (
    View,
    entry,
    epoch_losses,
    figure,
    items,
    mapping,
    number,
    rows,
    stage_name,
    stage_title,
    text,
)
from paredown.report.wording import difference, digits, interval, large, quantity, whole

LAYERS, SLICES = 120, 40
"""Rows of a table; the CSV has more."""


def bits_table(run: View) -> dict[str, Any] | None:
    """Bits of every weight, what its codes lose, and what 8 bits lose of the values that enter the layer."""
    found = mapping(entry(run.insight, "bits"))
    lines = rows(found.get("layers"))
    if not lines:
        return None
    values = [number(one.get(k)) for one in lines for k in ("weight_db", "input_db")]
    top = max((v for v in values if v is not None), default=1.0)
    shown = [
        {
            "name": text(one.get("name")),
            "kind": text(one.get("kind"), 40),
            "parameters": whole(number(one.get("parameters")) or 0),
            "bits": _bits(one.get("bits")),
            "cells": [_decibels(number(one.get(k)), top) for k in ("weight_db", "input_db")],
        }
        for one in lines[:LAYERS]
    ]
    return {
        "lines": shown,
        "more": max(0, len(lines) - LAYERS),
        "moved": text(found.get("moved"), 40),
        "stage": stage_title(run.quantized) if run.quantized is not None else "the quantized file",
        "csv": _csv(
            ("layer", "kind", "parameters", "bits", "weight_sqnr_db", "input_sqnr_db_at_8_bits"),
            [
                [
                    text(o.get("name")),
                    text(o.get("kind"), 40),
                    *(_plain(o.get(k)) for k in ("parameters", "bits", "weight_db", "input_db")),
                ]
                for o in lines
            ],
        ),
    }


def _bits(value: Any) -> str:
    found = number(value)
    return "float32" if found is None else f"{found:g} bits"


def _decibels(value: float | None, top: float) -> dict[str, Any] | None:
    if value is None:
        return None
    return {"said": f"{value:.1f} dB".replace("-", "−"), "chart": bar(max(value, 0.0), top)}


# ------------------------------------------------------------------------------------------------------------ for whom


def changed_lines(run: View) -> dict[str, Any] | None:
    """For whom the result changed: turns or worst tenth, slices, the samples that changed most."""
    found, unit = mapping(entry(run.insight, "changed")), run.metric["unit"]
    if not found:
        return None
    slices = rows(found.get("slices"))
    most, best = rows(found.get("most")), rows(found.get("best"))
    drawn = [(_pair(p)) for p in items(found.get("scatter"))]
    points = [p for p in drawn if p is not None]
    return {
        "subject": _subject(run),
        "n": whole(number(found.get("n")) or 0),
        "turns": _turns(mapping(found.get("turns"))),
        "worst": _worst(mapping(found.get("worst")), unit),
        "slices": [_slice(one, unit) for one in slices[:SLICES]],
        "more": max(0, len(slices) - SLICES),
        "few": ", ".join(_few(one) for one in rows(found.get("few"))[:SLICES]),
        "given": entry(run.insight, "slices_given") is True,
        "named": found.get("named") is True,
        "hits": found.get("hits") is True,
        "most": [_sample(one, unit) for one in most[:20]],
        "best": [_sample(one, unit) for one in best[:20]],
        "scatter": scatter(points) if len(points) > 1 else None,
        "ends": _ends(points, unit),
        "drawn": _drawn(len(points), number(found.get("n")) or 0),
        "csvs": [
            (
                "slices.csv",
                _csv(
                    ("column", "value", "n", "dense", "now", "change", "low", "high"),
                    [
                        [_plain(o.get(k)) for k in ("column", "value", "n", "dense", "now", "change", "low", "high")]
                        for o in slices
                    ],
                ),
            ),
            (
                "samples.csv",
                _csv(
                    ("id", "dense", "now"), [[_plain(o.get(k)) for k in ("id", "dense", "now")] for o in (*most, *best)]
                ),
            ),
            *([("scatter.csv", _csv(("dense", "now"), [list(p) for p in points]))] if points else []),
        ],
    }


def _few(one: Mapping[str, Any]) -> str:
    """A slice of which nothing can be said, as "site b (3)"."""
    return f"{text(one.get('column'), 80)} {text(one.get('value'), 80)} ({whole(number(one.get('n')) or 0)})"


def _turns(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    titles = {
        "lost": "right before, wrong now",
        "gained": "wrong before, right now",
        "both": "right in both",
        "neither": "wrong in both",
    }
    return [(title, whole(number(given.get(key)) or 0)) for key, title in titles.items()] if given else []


def _worst(given: Mapping[str, Any], unit: str) -> list[tuple[str, str]]:
    if not given:
        return []
    n = whole(number(given.get("n")) or 0)
    titles = {
        "dense": f"dense file, mean of its own worst {n}",
        "now": f"this file, mean of its own worst {n}",
        "of_dense": f"this file, on the worst {n} of the dense one",
    }
    return [(title, _said(given.get(key), unit)) for key, title in titles.items()]


def _slice(one: Mapping[str, Any], unit: str) -> dict[str, Any]:
    change, low, high = (number(one.get(k)) for k in ("change", "low", "high"))
    sure = low is not None and high is not None and (low > 0 or high < 0)
    return {
        "column": text(one.get("column"), 80),
        "value": text(one.get("value"), 80),
        "n": whole(number(one.get("n")) or 0),
        "dense": _said(one.get("dense"), unit),
        "now": _said(one.get("now"), unit),
        "change": "not tested" if change is None else difference(change, unit),
        "interval": interval(low, high, unit, signed=True) or "–",
        "sure": sure,
    }


def _sample(one: Mapping[str, Any], unit: str) -> dict[str, str]:
    return {"id": text(one.get("id"), 80), "dense": _said(one.get("dense"), unit), "now": _said(one.get("now"), unit)}


def bias_lines(run: View) -> dict[str, Any] | None:
    """Predictions against the truth, where the task gives it: mean error with its interval and a scatter per file."""
    found = mapping(entry(run.insight, "bias"))
    files = mapping(found.get("files"))
    out, points = [], []
    for name, one in files.items():
        about = mapping(one)
        pairs = [p for p in (_pair(v) for v in items(about.get("scatter"))) if p is not None]
        low, high, value = (number(about.get(k)) for k in ("low", "high", "value"))
        out.append(
            {
                "name": text(name, 40),
                "value": "not tested" if value is None else difference(value, ""),
                "interval": interval(low, high, "", signed=True) or "–",
                "word": "not told by one sample"
                if low is None or high is None
                else "no bias shown"
                if low <= 0 <= high
                else "biased",
                "ranges": _ranges(about),
                "apart": about.get("apart") is True,
                "scatter": scatter(pairs) if len(pairs) > 1 else None,
                "ends": _ends(pairs, ""),
            }
        )
        points += [[text(name, 40), *p] for p in pairs]
    most = max((number(mapping(v).get("n")) or 0 for v in files.values()), default=0)
    link = csv_link(("file", "target", "prediction"), points, LARGE)
    return {"lines": out, "csv": link, "drawn": _drawn(len(points) // max(1, len(out)), most)} if out else None


def _drawn(drawn: int, every: float) -> str:
    """That not all samples are drawn; "" where they are."""
    return (
        f"Drawn are {whole(drawn)} of the {whole(every)} samples, evenly spread in their order; the largest and the smallest may be others."
        if 0 < drawn < every
        else ""
    )


def _ranges(about: Mapping[str, Any]) -> str:
    """Where predictions and truth lie, by themselves: a network in grams beside targets in kilograms is seen here."""
    ends = [_pair(items(about.get(k))) for k in ("predicted", "truth")]
    if None in ends:
        return ""
    (low, high), (first, last) = (e for e in ends if e is not None)
    return f"predictions from {quantity(low, '')} to {quantity(high, '')}, truth from {quantity(first, '')} to {quantity(last, '')}"


# --------------------------------------------------------------------------------------------------- disturbed, roofline

_STRENGTHS = {
    "noise": "Gaussian noise, {:g} of the inputs' spread",
    "blur": "blur, σ = {:g} pixels",
    "contrast": "contrast × {:g}",
}


def noise_lines(run: View) -> dict[str, Any] | None:
    """The metric of the dense and of the recommended file on disturbed pictures."""
    found = rows(mapping(entry(run.insight, "noise")).get("rows"))
    if not found:
        return None
    unit = run.metric["unit"]
    values = [number(mapping(one.get(k)).get("value")) for one in found for k in ("dense", "now")]
    top = max((abs(v) for v in values if v is not None), default=1.0)
    lines = []
    for one in found:
        kind, strength = text(one.get("kind"), 20), number(one.get("strength")) or 0.0
        cells = []
        for key in ("dense", "now"):
            about = mapping(one.get(key))
            value = number(about.get("value"))
            spread = interval(number(about.get("low")), number(about.get("high")), unit)
            cells.append(
                None
                if value is None
                else {"said": quantity(value, unit), "spread": spread, "chart": bar(abs(value), top)}
            )
        lines.append({"what": _STRENGTHS[kind].format(strength) if kind in _STRENGTHS else "as it is", "cells": cells})
    return {
        "lines": lines,
        "subject": _subject(run),
        "csv": _csv(
            ("kind", "strength", "dense", "dense_low", "dense_high", "now", "now_low", "now_high"),
            [[text(o.get("kind"), 20), _plain(o.get("strength")), *(_plain(mapping(o.get(k)).get(v)) for k in ("dense", "now") for v in ("value", "low", "high"))] for o in found],
        ),
    }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A dense layer under the roof."""

    name: str
    kind: str
    flops: float
    bytes: float
    seconds: float
    """At best: what the slower of the two, products and transport, takes."""
    memory: bool
    """Whether that is the transport."""
    int8_seconds: float | None
    """The same on 8 bits, which are a quarter of the bytes; None where the speed of products of 8 bits is not known."""
    int8_memory: bool

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes


def roofline(run: View) -> dict[str, Any] | None:
    """Every dense layer against this machine's peak and bandwidth: what bounds it, and which share of the time it would take."""
    peak, bandwidth = figure(run.insight, "peak_flops"), figure(run.insight, "bandwidth")
    integers = figure(run.insight, "peak_int8")
    top, speed, fast = float(peak.value or 0), float(bandwidth.value or 0), float(integers.value or 0)
    layers = _layers(run, top, speed, fast) if top > 0 and speed > 0 else []
    if not layers:
        return None
    total, longest = sum(one.seconds for one in layers), max(one.seconds for one in layers)
    waiting = [one for one in layers if one.memory]
    return {
        "lines": [
            {
                "name": one.name,
                "kind": one.kind,
                "flops": large(one.flops),
                "bytes": large(one.bytes),
                "intensity": digits(one.intensity),
                "bound": _bound(one.memory),
                "int8_bound": _bound(one.int8_memory) if one.int8_seconds else "",
                "int8_gain": f"{digits(one.seconds / one.int8_seconds)}×" if one.int8_seconds else "",
                "share": f"{100 * one.seconds / total:.1f} %",
                "chart": bar(one.seconds, longest),
            }
            for one in layers[:LAYERS]
        ],
        "more": max(0, len(layers) - LAYERS),
        "peak": f"{large(top)}FLOP/s",
        "bandwidth": f"{large(speed)}B/s",
        "protocols": [text(peak.protocol, 300), text(bandwidth.protocol, 300)],
        "ridge": digits(top / speed),
        "int8": f"{large(fast)}OP/s" if fast > 0 else "",
        "int8_gain": f"{digits(total / sum(one.int8_seconds or 0 for one in layers))}×" if fast > 0 else "",
        "int8_ridge": digits(fast / speed),
        "int8_protocol": text(integers.protocol, 300),
        "memory_layers": len(waiting),
        "count": len(layers),
        "memory_share": f"{100 * sum(one.seconds for one in waiting) / total:.0f} %",
        "chart": roof(
            [(one.intensity, one.flops / one.seconds, one.memory) for one in layers[:LAYERS]], top, speed, fast
        ),
        "csv": _csv(
            (
                "layer",
                "kind",
                "flops",
                "bytes",
                "flops_per_byte",
                "bound",
                "share_of_time_estimated",
                "int8_bound",
                "int8_gain_estimated",
            ),
            [
                [
                    one.name,
                    one.kind,
                    one.flops,
                    one.bytes,
                    one.intensity,
                    _bound(one.memory),
                    one.seconds / total,
                    *([_bound(one.int8_memory), one.seconds / one.int8_seconds] if one.int8_seconds else ["", ""]),
                ]
                for one in layers
            ],
        ),
    }


def _layers(run: View, top: float, speed: float, fast: float) -> list[_Layer]:
    found = []
    for one in rows(entry(run.insight, "roofline")):
        flops, moved = number(one.get("flops")) or 0, number(one.get("bytes")) or 0
        if flops > 0 and moved > 0:
            name, kind = text(one.get("name")), text(one.get("kind"), 40)
            seconds, memory = max(flops / top, moved / speed), flops / moved < top / speed
            found.append(
                _Layer(
                    name=name, kind=kind, flops=flops, bytes=moved, seconds=seconds, memory=memory,
                    int8_seconds=max(flops / fast, moved / 4 / speed) if fast > 0 else None,
                    int8_memory=fast > 0 and flops / fast < moved / 4 / speed,
                )
            )  # fmt: skip
    return found


def _bound(memory: bool) -> str:
    return "memory" if memory else "compute"


# ------------------------------------------------------------------------------------------------------------- lineage


def lineage(run: View) -> list[dict[str, str]]:
    """From which stage each one came, what was done, and by which plan and file it can be found again."""
    out: list[dict[str, str]] = []
    before = ""
    for record in run.stages:
        name = stage_name(record)
        twin = name.startswith("twin-")
        reached = mapping(entry(record, "reached"))
        known = ("masks", "criterion", "granularity", "allocation", "schedule")
        done = [f"{key} {text(reached[key], 60)}" for key in known if reached.get(key)]
        epochs = len(epoch_losses(record))
        if epochs:
            done.append(f"{epochs} epoch{'s' if epochs > 1 else ''} of training after it")
        scheme = name.removeprefix("twin-")
        if run.quantized is not None and scheme == stage_name(run.quantized):
            static = scheme in ("int8", "w4a8", "w4a4")  # the others round weights alone, or activations by each input
            alone = "weights in 16 bits" if scheme == "fp16" else "weights quantized"
            done.append("weights quantized, activations calibrated" if static else alone)
        source = "trained by itself" if twin else before
        out.append(
            {
                "title": stage_title(record),
                "from": source or "the task's model",
                "done": "; ".join(done) or "exported as it is",
                "plan": text(record.plan_digest, 200)[:12] or "–",
                "file": text(entry(record, "digest"), 200)[:12] or "–",
                "name": text(entry(record, "file")) or "no file",
            }
        )
        if not twin:
            before = stage_title(record)
    return out


def not_looked(run: View) -> list[str]:
    """What of the closer look nobody measured, and what would make it so."""
    if run.insight is None:
        return ["for whom the result changed, noise per layer, disturbed inputs, the roofline: this run is from before"]
    out = []
    if not mapping(entry(run.insight, "changed")):
        out.append("for whom the result changed: evaluate returns no value per sample")
    elif entry(run.insight, "slices_given") is not True:
        out.append("slices of the test data: the task module has no slices()")
    why = text(mapping(entry(run.insight, "bias")).get("why"), 200)
    if mapping(entry(run.insight, "changed")).get("hits") is not True and not mapping(
        mapping(entry(run.insight, "bias")).get("files")
    ):
        out.append(f"bias and scatter against the truth: {why or 'slices() gives no column target'}")
    if not rows(mapping(entry(run.insight, "noise")).get("rows")):
        why = text(mapping(entry(run.insight, "noise")).get("why"), 200)
        out.append(f"the metric on disturbed inputs: {why or 'measure.noise is not set'}")
    return out


def _subject(run: View) -> str:
    name = text(entry(run.insight, "subject"))
    record = run.stage(name)
    return stage_title(record) if record is not None else name


def _said(value: Any, unit: str) -> str:
    found = number(value)
    return "not tested" if found is None else quantity(found, unit)


def _pair(value: Any) -> tuple[float, float] | None:
    found = [number(v) for v in items(value)[:2]]
    if len(found) != 2 or found[0] is None or found[1] is None:
        return None
    return (float(found[0]), float(found[1]))


def _ends(pairs: list[tuple[float, float]], unit: str) -> str:
    ends = [v for pair in pairs for v in pair]
    return f"both axes from {quantity(min(ends), unit)} to {quantity(max(ends), unit)}" if ends else ""


def _plain(value: Any) -> Any:
    found = number(value)
    return text(value, 80) if found is None else found


def _csv(head: tuple[str, ...], lines: list[list[Any]]) -> str:
    return csv_link(head, lines, SMALL)
