"""The page of a curve: what was chosen and why, the lines, the dense question, the front, every trial without a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paredown.controls import dense_parts
from paredown.curve import AXES, CONTROLS, Axis, Interval, Line, Point, interval, upper_bound
from paredown.records import Record, write_text
from paredown.report.beside import Beside, found_beside, shown
from paredown.report.criteria import explained
from paredown.report.curve_answers import (
    amounts_of,
    dense_answer,
    doubts,
    not_tested,
    of_this_file,
    schedules,
    told_amount,
)
from paredown.report.curve_document import curve_document
from paredown.report.curve_figures import LINES, POINTS, Dot, Mark, Series, chart, key
from paredown.report.curve_view import CurveView, curve_view, is_curve
from paredown.report.layers import csv_link
from paredown.report.page import _template
from paredown.report.reading import entry, figure, items, mapping, number, text
from paredown.report.wording import difference, digits, heading, large, megabytes, quantity
from paredown.report.wording import interval as said_interval

ROWS = 280
"""Of a table, and of a CSV: all points are in curve.json."""
FLAT = 0.4
"""Below this share of the height of a chart the lines that prune are drawn once more, without the dense controls."""
TITLES: dict[Axis, str] = {
    "sparsity": "weights",
    "parameters": "parameters",
    "bytes": "bytes of the file",
    "macs": "MACs",
    "latency": "latency",
}


def render_curve(records: Sequence[Record], beside: Sequence[Beside] = ()) -> str:
    """The report of a curve as one HTML page: no script, no fetching, under 1 MB however many the trials."""
    told = {**content_of(records), "at": "", "of": "", "folder": "this folder", **shown(beside)}
    return str(_template("curve.html").render(told))


def write_curve_report(folder: Path, records: Sequence[Record], beside: Sequence[Beside] | None = None) -> Path:
    """Write report.html, whole or not at all; returns its path. `beside`: what it links, default: what lies there."""
    path = folder / "report.html"
    write_text(path, render_curve(records, found_beside(folder, records) if beside is None else beside))
    return path


def content_of(records: Sequence[Record]) -> dict[str, Any]:
    """What the sections of a curve name."""
    return _content(curve_view(records))


def _content(seen: CurveView) -> dict[str, Any]:
    """Everything that the template names."""
    cell = mapping(seen.head.cell)
    drawn = _drawn(seen)
    return {
        "name": text(entry(seen.head, "name")) or text(cell.get("task")) or "curve",
        "task": text(cell.get("task")),
        "target": text(cell.get("target")) or "unknown target",
        "metric": {**seen.metric, "label": heading(seen.metric["name"])},
        "spot": _spot(seen),
        "criteria": explained(line.method for line in seen.lines),
        "verdict": dense_parts(seen.spot, seen.comparisons, goal=seen.metric["goal"]),
        "legend": [
            {"name": line.name, "key": key(i, control=line.kind in CONTROLS, codes=bool(line.codes))}
            for i, line in enumerate(drawn[:LINES])
        ],
        "unseen": max(0, len(drawn) - LINES),
        "thinned": any(len(line.points) > POINTS for line in seen.lines),
        "charts": _charts(seen),
        "comparisons": _comparisons(seen),
        "front": _front(seen),
        "points": _points(seen),
        "failed": _failed(seen),
        "seeds": [text(s, 12) for s in items(entry(seen.head, "seeds"))],
        "counts": {"cells": number(entry(seen.head, "cells")) or 0, "done": len(seen.trials)},
        "codes": next((line.codes for line in seen.lines if line.codes), ""),
        "has_held_out": any(p.held_out for p in seen.points),
        "warnings": _warnings(seen),
        "provenance": _provenance(seen),
    }


def _drawn(seen: CurveView) -> tuple[Line, ...]:
    """The lines of the charts: a thinner network that is the same as scratch at every amount would only hide it."""
    alike = {line.kind for line in seen.lines if all(p.same_as for p in line.points if p.kind != "base")}
    if "thin" not in alike:
        return seen.lines
    both = "from scratch: the same shape, which is also the uniformly thinner network"
    named = [
        dataclasses.replace(line, name=f"{both}{f', {line.codes}' if line.codes else ''}")
        if line.kind == "scratch"
        else line
        for line in seen.lines
    ]
    return tuple(line for line in named if line.kind != "thin")


def _spot(seen: CurveView) -> dict[str, Any]:
    """The strip: what to take, what it costs, how sure that is."""
    spot = seen.spot
    dense = next((p for p in seen.points if p.kind == "base"), None)
    found: dict[str, Any] = {"sentence": spot.sentence, "chosen": spot.point is not None, "cards": []}
    found["ship"] = _ship(seen, spot.point or dense)
    found["untested"] = "; ".join(not_tested(seen))
    found["answer"] = dense_answer(seen)
    found |= {"of": amounts_of(seen), "schedules": schedules(seen), "limited": _limit_level(seen) is not None}
    if spot.point is None or spot.removed is None:
        return found
    found["headline"] = f"Take {spot.removed:.1f} % of the {TITLES[seen.axis]} out: {spot.name}"
    found["cards"] = [
        _removed_card(seen, spot.point, spot.removed),
        *_metric_cards(seen, spot.point, dense),
        *_size_cards(seen, spot.point, dense),
        *(_other_file(seen, other) for other in seen.points if _same_trial(other, spot.point)),
    ]
    return found


def _removed_card(seen: CurveView, point: Point, removed: float) -> dict[str, Any]:
    low, high = seen.spot.low, seen.spot.high
    if low is None or high is None:
        spread = "no interval: one seed"
    elif high - low < 0.05:  # an interval of no width would look like certainty
        spread = f"chosen in nearly every resampling of the {len(point.seeds)} seeds"
    else:
        spread = f"95 % interval {low:.1f} to {high:.1f} %"
    amount = "nothing pruned" if point.amount is None else told_amount(seen, point.amount)
    return {"title": f"Removed of the {TITLES[seen.axis]}", "value": f"{removed:.1f} %", "notes": [spread, amount]}


def _metric_cards(seen: CurveView, point: Point, dense: Point | None) -> list[dict[str, Any]]:
    """What it costs on held-out data, which chose, and on test data."""
    unit = seen.metric["unit"]
    loss = interval([*point.loss.values()])
    change = {
        "title": "Change on held-out data",
        "value": difference(-_sign(seen) * loss.mean, unit),
        "notes": [_better_or_worse(loss.mean), *_loss_notes(point, unit)],
    }
    tested = interval([*point.test.values()])
    notes = [_spread(tested, unit)]
    if dense is not None and dense.test:
        whole = float(np.mean([*dense.test.values()]))
        lost = _sign(seen) * (whole - tested.mean)
        notes.append(
            f"dense {quantity(whole, unit)}: {difference(-_sign(seen) * lost, unit)}, {_better_or_worse(lost)}"
        )
    return [
        change,
        {
            "title": f"{heading(seen.metric['name'])} on test data",
            "value": quantity(tested.mean, unit),
            "notes": notes,
        },
    ]


def _size_cards(seen: CurveView, point: Point, dense: Point | None) -> list[dict[str, Any]]:
    """The file, and what else was saved."""
    if "bytes" not in point.absolute:
        return []
    whole = f", dense {megabytes(dense.absolute['bytes'])}" if dense is not None and "bytes" in dense.absolute else ""
    notes = [f"{_fewer(point, 'bytes', 'smaller')}, {point.codes or 'float32'}{whole}"]
    notes += [_fewer(point, axis, said) for axis, said in _SAVED.items() if axis in point.removed]
    if "latency" in point.removed and not _apart(seen, point):
        notes[-1] += ": no difference that shows, the timings of a seed overlap those of its dense file"
    if seen.axis == "sparsity" and point.removed[seen.axis] >= 1 > max(
        point.removed["bytes"], point.removed.get("macs", 0)
    ):
        notes.append("zeros are stored and multiplied like other weights here: what they may save is estimated")
    return [{"title": "File", "value": megabytes(point.absolute["bytes"]), "notes": notes}]


def _apart(seen: CurveView, point: Point) -> bool:
    """Whether for every seed the interval of its speed against the dense file leaves out 1, to the side of the mean."""
    key, less = "quantized_speedup" if point.codes else "speedup", point.removed["latency"] > 0
    found = [figure(r, key) for r in seen.trials if r.cell.get("digest") in point.digests]
    return all(f.value is None or f.low is None or f.high is None or (f.low > 1 if less else f.high < 1) for f in found)


_SAVED: dict[Axis, str] = {"macs": "fewer MACs", "latency": "less latency"}


def _fewer(point: Point, axis: Axis, said: str) -> str:
    """A saving in %; a negative one with its sign, so that it is not taken for one."""
    return f"{point.removed[axis]:.1f} % {said}".replace("-", "−")


def _ship(seen: CurveView, point: Point | None) -> dict[str, str]:
    """Which file of the sweep is meant, and the command that makes it again; where nothing was chosen, what may help."""
    seed, digest, known = (0, "", 0) if point is None else seen.shipped(point)
    why = f", the best of {known} on held-out data" if known > 1 else ""
    record = next((r for r in seen.trials if r.cell.get("digest") == digest), None)
    recipe = text(mapping(entry(seen.head, "recipes")).get(digest), 300)
    if point is None or record is None or not recipe:
        return {}
    made = mapping(entry(record, "quantized")) if point.codes else record.details
    file = f"{recipe.rpartition('/')[0]}/{text(made.get('file'), 100)}"
    again = f"paredown compress {recipe}" if point.kind in ("pruned", "random") else ""
    advice = _advice(seen) if seen.spot.point is None and point.held_out else ""
    own = of_this_file(seen, point, seed)
    return {"file": file, "seed": f"{seed}{why}", "again": again, "advice": advice, "own": own}


def _advice(seen: CurveView) -> str:
    """What may help where nothing was chosen: more seeds where one has no bound, else less to ask."""
    if seen.spot.rule == "limit" and max((len(p.seeds) for p in seen.points), default=0) < 2:
        return "For a choice give two seeds or more (curve.seeds): their spread is what bounds the loss."
    larger = ", or allow a larger loss (curve.limit)" if seen.spot.rule == "limit" else ""
    return f"For a smaller one train longer (recover.epochs), take less out (curve.amounts){larger}."


def _same_trial(other: Point, point: Point) -> bool:
    """Whether it is the other file, in float or in codes, of the same network."""
    where = [(p.kind, p.method, p.schedule, p.amount) for p in (other, point)]
    return where[0] == where[1] and other.codes != point.codes


def _other_file(seen: CurveView, other: Point) -> dict[str, Any]:
    """The card of the same network's other file."""
    title = f"{heading(seen.metric['name'])} of the same in {other.codes or 'float32'}"
    if not other.test:
        return {"title": title, "value": "no file", "notes": ["see “Before you rely on this”"]}
    unit, tested = seen.metric["unit"], interval([*other.test.values()])
    notes = [f"on test data; {_spread(tested, unit)}"]
    if "bytes" in other.absolute:
        notes.append(f"{megabytes(other.absolute['bytes'])}, {other.removed['bytes']:.1f} % smaller than dense float32")
    return {"title": title, "value": quantity(tested.mean, unit), "notes": notes}


def _better_or_worse(loss: float) -> str:
    """Of a change, which a metric that is better when lower leaves open."""
    return "worse than dense" if loss > 0 else "better than dense" if loss < 0 else "as dense"


def _loss_notes(point: Point, unit: str) -> list[str]:
    bound = upper_bound([*point.loss.values()])
    if bound is None:
        return ["no bound: one seed"]
    return [f"one-sided 95 % bound on the loss {f'{bound:.2f} points' if unit == '%' else quantity(bound, unit)}"]


def _sign(seen: CurveView) -> float:
    return 1.0 if seen.metric["goal"] == "max" else -1.0


def _spread(found: Interval, unit: str) -> str:
    said = _interval(found, unit)
    return said if found.low is None else f"{said}, {found.n} seeds"


def _interval(found: Interval, unit: str) -> str:
    return "one seed: no interval" if found.low is None else said_interval(found.low, found.high, unit)


# -------------------------------------------------------------------------------------------------------------- charts


def _charts(seen: CurveView) -> list[dict[str, Any]]:
    """The choice on held-out data, its worth on test data, both closer where controls flatten them, then test data over the other axes."""
    drawn = _drawn(seen)
    near = tuple(line for line in drawn if line.kind not in ("scratch", "thin"))
    wanted: list[tuple[Axis, str, tuple[Line, ...]]] = [(seen.axis, d, drawn) for d in ("held_out", "test")]
    wanted += [(a, d, near) for a, d, _ in wanted if _span(near, d) < FLAT * _span(drawn, d)]
    wanted += [(axis, "test", drawn) for axis in AXES if axis != seen.axis]
    made = [_chart(seen, axis, data, shown) for axis, data, shown in wanted]
    return [m for m in made if m is not None]


def _span(shown: Sequence[Line], data: str) -> float:
    """How far the values of lines reach, over seeds."""
    values = [v for line in shown for p in line.points for v in getattr(p, data).values()]
    return max(values) - min(values) if values else 0.0


def _chart(seen: CurveView, axis: Axis, data: str, shown: Sequence[Line]) -> dict[str, Any] | None:
    unit, name = seen.metric["unit"], seen.metric["name"]
    drawn = _drawn(seen)
    series = [_series(line, axis, data, unit, left_out=line not in shown) for line in drawn]
    if not any(s.dots for s in series):
        return None
    where = "held-out data" if data == "held_out" else "test data"
    spot, mark = seen.spot, None
    values = {} if spot.point is None else getattr(spot.point, data)
    if spot.point is not None and axis in spot.point.removed and values:
        own = axis == seen.axis
        mark = Mark(
            x=spot.point.removed[axis], y=float(np.mean([*values.values()])), low=spot.low if own else None,
            high=spot.high if own else None,
        )  # fmt: skip
    closer = len(shown) < len(drawn)
    title = f"{heading(name)} on {where} over {TITLES[axis]} removed{', without the dense controls' if closer else ''}"
    told = "; ".join(
        f"{s.name}: {', '.join(f'{d.y:.4g} at {d.x:.0f} %' for d in s.dots[:8])}" for s in series[:LINES] if s.dots
    )
    drawing = chart(
        series, x_title=f"{TITLES[axis]} removed, %", y_title=f"{name}, {where}{f', {unit}' if unit else ''}", mark=mark,
        level=_limit_level(seen) if data == "held_out" and axis == seen.axis else None,
        alt=f"{title}. {told}. All numbers are in the CSV and the table.",
    )  # fmt: skip
    return {
        "title": title,
        "svg": drawing,
        "csv": csv_link(*_chart_csv(seen, axis, data, shown if closer else seen.lines)),
        "file": f"curve-{axis}-{data.replace('_', '-')}{'-closer' if closer else ''}.csv",
        "main": axis == seen.axis,
    }


def _limit_level(seen: CurveView) -> float | None:
    """The dense model's mean on held-out data less what the user allows to be lost."""
    dense = next((p for p in seen.points if p.kind == "base" and not p.codes), None)
    if seen.limit is None or dense is None or not dense.held_out:
        return None
    return float(np.mean([*dense.held_out.values()])) - _sign(seen) * seen.limit


def _series(line: Line, axis: Axis, data: str, unit: str, *, left_out: bool = False) -> Series:
    """A line with its dots; with none where it is left out, so that the others keep their colours."""
    dots = []
    for point in () if left_out else line.points:
        values = getattr(point, data)
        if axis not in point.removed or not values:
            continue
        found = interval([*values.values()])
        what = "nothing pruned" if point.amount is None else f"{point.amount:g} remains"
        lost = f", {len(point.failed)} without a result" if point.failed else ""
        told = f"{line.name}, {what}: {quantity(found.mean, unit)} ({_spread(found, unit)}{lost}), {point.removed[axis]:.1f} % removed"
        dots.append(
            Dot(
                x=point.removed[axis],
                y=found.mean,
                low=found.low,
                high=found.high,
                told=told,
                hollow=bool(point.failed),
            )
        )
    dots.sort(key=lambda d: d.x)
    return Series(name=line.name, dots=tuple(dots), control=line.kind in CONTROLS, codes=bool(line.codes))


def _chart_csv(
    seen: CurveView, axis: Axis, data: str, shown: Sequence[Line]
) -> tuple[tuple[str, ...], list[list[Any]]]:
    """Heads and lines of the file behind one chart."""
    name = f"{seen.metric['name']} {data.replace('_', '-')}"
    head = ("line", "remains", f"{axis} removed %", axis, f"{name} mean", "low", "high", "seeds", "without result")
    found: list[list[Any]] = []
    for line in shown:
        for point in line.points:
            values = getattr(point, data)
            if axis in point.removed and values:
                of = interval([*values.values()])
                place = [line.name, point.amount, point.removed[axis], point.absolute[axis]]
                found.append([*place, of.mean, of.low, of.high, of.n, len(point.failed)])
    return head, found[:ROWS]


# -------------------------------------------------------------------------------------------------------------- tables


def _comparisons(seen: CurveView) -> dict[str, Any] | None:
    """Every pruned point against its controls."""
    if not seen.comparisons:
        return None
    unit = seen.metric["unit"]
    lines = []
    for c in seen.comparisons[:ROWS]:
        state = (
            "not comparable"
            if not c.comparable
            else "open"
            if c.gain.low is None
            else "gain"
            if c.gain.low > 0
            else "open"
        )
        state = "loss" if c.comparable and c.gain.high is not None and c.gain.high < 0 else state
        control = CONTROLS[c.control] + (" (that very shape)" if c.same_as else "")
        control = f"the shape of {c.shape_of} from scratch" if c.shape_of else control
        lines.append(
            {
                "line": c.line,
                "amount": f"{c.amount:g}",
                "control": control,
                "gain": difference(c.gain.mean, unit),
                "interval": said_interval(c.gain.low, c.gain.high, unit, signed=True) or "one seed: not available",
                "n": c.gain.n,
                "state": state,
                "word": {"gain": "pruning is better", "loss": "the control is better", "open": "no difference shows"}.get(state, state),
                "why": c.why,
            }
        )  # fmt: skip
    head = ("line", "remains", "control", "gain", "low", "high", "seeds", "comparable", "why not")
    told = [
        [c.line, c.amount, c.control, c.gain.mean, c.gain.low, c.gain.high, c.gain.n, c.comparable, c.why]
        for c in seen.comparisons
    ]
    return {"lines": lines, "csv": csv_link(head, told[:ROWS]), "more": max(0, len(seen.comparisons) - ROWS)}


def _front(seen: CurveView) -> dict[str, Any]:
    """The Pareto front: each point with its recipe and the command that makes it."""
    shown = [_row(seen, p) for p in seen.front[:ROWS]]
    head, told = _rows_csv(seen, seen.front)
    return {"lines": shown, "csv": csv_link(head, told), "more": max(0, len(seen.front) - ROWS)}


def _points(seen: CurveView) -> dict[str, Any]:
    """Every point."""
    head, told = _rows_csv(seen, seen.points)
    return {
        "lines": [_row(seen, p) for p in seen.points[:ROWS]],
        "csv": csv_link(head, told),
        "more": max(0, len(seen.points) - ROWS),
    }


def _row(seen: CurveView, point: Point) -> dict[str, Any]:
    unit = seen.metric["unit"]
    recipe = text(mapping(entry(seen.head, "recipes")).get(seen.shipped(point)[1]), 300)
    runs = point.kind in ("pruned", "random")
    held_out = interval([*point.held_out.values()]) if point.held_out else None
    tested = interval([*point.test.values()]) if point.test else None
    return {
        "name": _name(point),
        "remains": "all" if point.amount is None else f"{point.amount:g}",
        "removed": f"{point.removed[seen.axis]:.1f} %" if seen.axis in point.removed else "",
        "held_out": None if held_out is None else (quantity(held_out.mean, unit), _interval(held_out, unit)),
        "test": None if tested is None else (quantity(tested.mean, unit), _interval(tested, unit)),
        "parameters": large(round(point.absolute["parameters"])) if "parameters" in point.absolute else "",
        "macs": large(round(point.absolute["macs"])) if "macs" in point.absolute else "",
        "bytes": megabytes(point.absolute["bytes"]) if "bytes" in point.absolute else "",
        "latency": f"{digits(point.absolute['latency'])} ms" if "latency" in point.absolute else "",
        "steps": _steps(seen, point),
        "seeds": len(point.seeds),
        "failed": len(point.failed),
        "best": point is seen.spot.point,
        "recipe": recipe,
        "command": f"paredown compress {recipe}" if recipe and runs else "",
    }


def _steps(seen: CurveView, point: Point) -> str:
    """Steps of training; of what is pruned those of its base first, where the sweep trained it."""
    if point.steps is None:
        return ""
    base = next((p.steps for p in seen.points if p.kind == "base"), None)
    before = f"{base:,.0f} + " if base and point.kind in ("pruned", "random") else ""
    return f"{before}{point.steps:,.0f}"


def _name(point: Point) -> str:
    name = "dense" if point.kind == "base" else CONTROLS.get(point.kind, f"{point.method} {point.schedule}")
    return f"{name}, {point.codes}" if point.codes else name


def _rows_csv(seen: CurveView, points: Sequence[Point]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """One line per point: all axes, both metrics with their intervals, the recipe."""
    axes = [a for a in AXES if any(a in p.removed for p in points)]
    head = (
        "point", "remains", *(f"{a} removed %" for a in axes), *axes, "held-out", "held-out low", "held-out high", "test",
        "test low", "test high", "seeds", "without result", "training steps", "recipe",
    )  # fmt: skip
    told: list[list[Any]] = []
    for p in points[:ROWS]:
        figures = [p.removed.get(a) for a in axes] + [p.absolute.get(a) for a in axes]
        for values in (p.held_out, p.test):
            found = interval([*values.values()]) if values else None
            figures += [None] * 3 if found is None else [found.mean, found.low, found.high]
        recipe = text(mapping(entry(seen.head, "recipes")).get(seen.shipped(p)[1]), 300)
        told.append([_name(p), p.amount, *figures, len(p.seeds), len(p.failed), p.steps, recipe])
    return head, told


def _failed(seen: CurveView) -> dict[str, Any] | None:
    """Trials without a result: marked with why, never a number."""
    if not seen.failed:
        return None
    lines = [
        {
            "name": text(f.get("name")),
            "status": text(f.get("status"), 30),
            "reason": text(f.get("reason"), 300),
            "tail": "\n".join(text(t, 300) for t in items(f.get("tail"))[-6:]),
        }
        for f in seen.failed[:60]
    ]
    head = ("trial", "status", "reason")
    told = [[text(f.get(k), 300) for k in ("name", "status", "reason")] for f in seen.failed[:ROWS]]
    return {
        "lines": lines,
        "csv": csv_link(head, told),
        "more": max(0, len(seen.failed) - 60),
        "count": len(seen.failed),
    }


def _warnings(seen: CurveView) -> list[str]:
    found = [text(w, 400) for r in seen.trials if r.cell["kind"] == "base" for w in items(entry(r, "warnings"))]
    found += doubts(seen)
    unsteady = sum("unsteady" in text(figure(r, "latency_ms").protocol, 400) for r in seen.trials)
    if unsteady:
        found.append(
            f"Latency: {unsteady} of {len(seen.trials)} files were timed beside other load, or throttled, twice over. "
            "Their milliseconds, and what was removed of them, are not sure; on a quiet machine another folder (--out) has them anew."
        )
    if seen.failed:
        found.append(f"{len(seen.failed)} trials have no result. Their points are drawn hollow and are not chosen.")
    found += [
        f"{text(r.details['quantized'].get('scheme')).upper()}: no file of {_told_name(r)}: {text(why, 300)} (paredown curve … --retry makes it again)"
        for r in seen.trials
        if (why := mapping(entry(r, "quantized")).get("failed"))
    ]
    pruning = {
        p.steps for line in seen.lines if line.kind == "pruned" for p in line.points if p.kind != "base" and p.steps
    }
    if pruning and max(pruning) > 1.1 * min(pruning):
        found.append(
            f"Recoveries differ in length: {min(pruning):,.0f} to {max(pruning):,.0f} steps (see the table of all points)."
        )
    return list(dict.fromkeys(found))[:20]


def _told_name(record: Record) -> str:
    cell = mapping(record.cell)
    what = [text(cell.get(k)) for k in ("kind", "method", "schedule", "amount") if cell.get(k) not in (None, "")]
    return f"{' '.join(what)}, seed {text(cell.get('seed'), 12)}"


def _provenance(seen: CurveView) -> list[tuple[str, str]]:
    versions = mapping(mapping(seen.head.environment).get("versions"))
    facts = [("recipe", text(mapping(seen.head.cell).get("recipe_digest"), 16))]
    facts += [(text(k), text(v) or "not installed") for k, v in versions.items()]
    first = mapping(seen.trials[0].environment) if seen.trials else {}
    machine = mapping(first.get("machine"))
    memory = number(machine.get("memory_bytes"))
    facts += [("memory", megabytes(memory))] if memory is not None else []
    facts += [(text(k), text(v)) for k, v in machine.items() if not isinstance(v, dict | list) and k != "memory_bytes"]
    return [*facts, ("threads of a trial", text(first.get("threads"))), ("device", text(first.get("device")))]


__all__ = ["curve_document", "is_curve", "render_curve", "write_curve_report"]
