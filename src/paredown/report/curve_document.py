"""The facts of a curve from its records: what the page draws and what scripts read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paredown.curve import (
    AXES,
    Axis,
    Comparison,
    Interval,
    Line,
    Point,
    SweetSpot,
    compared,
    dense_verdict,
    interval,
    lines,
    pareto,
    sweet_spot,
    upper_bound,
)
from paredown.errors import RejectedError
from paredown.records import Record
from paredown.report.reading import entry, mapping, number, rows, text


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveView:
    """The records of a sweep, with all that is worked out from them."""

    head: Record
    trials: tuple[Record, ...]
    metric: dict[str, str]
    axis: Axis
    limit: float | None
    failed: tuple[Mapping[str, Any], ...]
    lines: tuple[Line, ...]
    spot: SweetSpot
    comparisons: tuple[Comparison, ...]
    verdict: str
    front: tuple[Point, ...]

    @property
    def points(self) -> tuple[Point, ...]:
        """Every point once, the dense model first."""
        by_id = {id(p): p for line in self.lines for p in line.points}
        return tuple(by_id.values())


def is_curve(records: Sequence[Record]) -> bool:
    """Whether records are those of `paredown curve`."""
    return bool(records) and mapping(records[0].cell).get("stage") == "curve"


def curve_view(records: Sequence[Record]) -> CurveView:
    """Work out lines, sweet spot, comparisons and front. Raises RejectedError where the records are no curve's."""
    if not is_curve(records):
        msg = f"a curve must begin with the record that describes it. Got {len(records)} records of another kind. Run `paredown curve` into this folder first."
        raise RejectedError(msg)
    head, *trials = records
    given = mapping(entry(head, "metric"))
    metric = {
        "name": text(given.get("name"), 60) or "metric",
        "unit": text(given.get("unit"), 16),
        "goal": "min" if given.get("goal") == "min" else "max",
    }
    axis: Axis = next((a for a in AXES if a == entry(head, "axis")), "sparsity")
    limit, failed = number(entry(head, "limit")), tuple(rows(entry(head, "failed")))
    goal, unit = metric["goal"], metric["unit"]
    try:
        found = lines(trials, goal=goal, failed=failed)
    except (KeyError, TypeError, ValueError) as error:
        msg = f"every record of a curve must be one of a trial. Got {type(error).__name__}: {text(error)}. Was records.jsonl edited?"
        raise RejectedError(msg) from error
    spot = sweet_spot(found, axis, limit=limit, unit=unit)
    comparisons = compared(found, goal=goal, unit=unit)
    every = {id(p): p for line in found for p in line.points}  # a random choice too, where it wins
    return CurveView(
        head=head, trials=tuple(trials), metric=metric, axis=axis, limit=limit, failed=failed, lines=found, spot=spot,
        comparisons=comparisons, verdict=dense_verdict(spot, comparisons, goal=goal),
        front=pareto([*every.values()], axis, goal=goal),
    )  # fmt: skip


def curve_document(records: Sequence[Record]) -> dict[str, Any]:
    """A curve as one JSON-ready document, schema 1.

    {"schema", "metric", "axis", "limit", "trials": {"cells", "done", "failed"}, "sweet_spot": {"rule", "line", "amount", "codes", "removed",
    "low", "high", "sentence"}, "dense_verdict", "comparisons": [...], "pareto": [...], "lines": [{"name", "kind", "codes", "points":
    [...]}], "failed": [...]}. "codes" is the scheme of quantized files, else null. Amounts are what remains, "removed" is in % of the dense model; intervals are over seeds, null with one.
    """
    seen = curve_view(records)
    spot = seen.spot
    return {
        "schema": 1,
        "metric": seen.metric,
        "axis": seen.axis,
        "limit": seen.limit,
        "trials": {"cells": number(entry(seen.head, "cells")), "done": len(seen.trials), "failed": len(seen.failed)},
        "sweet_spot": {
            "rule": spot.rule,
            "line": spot.line or None,
            "amount": None if spot.point is None else spot.point.amount,
            "codes": None if spot.point is None else spot.point.codes or None,
            "removed": spot.removed,
            "low": spot.low,
            "high": spot.high,
            "sentence": spot.sentence,
        },
        "dense_verdict": seen.verdict,
        "comparisons": [_comparison(c) for c in seen.comparisons],
        "pareto": [_point(seen, p) for p in seen.front],
        "lines": [
            {
                "name": line.name,
                "kind": line.kind,
                "codes": line.codes or None,
                "points": [_point(seen, p) for p in line.points],
            }
            for line in seen.lines
        ],
        "failed": [dict(f) for f in seen.failed],
    }


def _comparison(found: Comparison) -> dict[str, Any]:
    return {
        "line": found.line,
        "amount": found.amount,
        "control": found.control,
        "gain": _interval(found.gain),
        "comparable": found.comparable,
        "why_not": found.why or None,
        "sentence": found.sentence,
    }


def _point(seen: CurveView, point: Point) -> dict[str, Any]:
    recipes = mapping(entry(seen.head, "recipes"))
    return {
        "kind": point.kind,
        "method": point.method or None,
        "schedule": point.schedule or None,
        "amount": point.amount,
        "codes": point.codes or None,
        "seeds": list(point.seeds),
        "removed": dict(point.removed),
        "absolute": dict(point.absolute),
        "held_out": _over_seeds(point.held_out),
        "test": _over_seeds(point.test),
        "loss": None
        if not point.loss
        else {**(_over_seeds(point.loss) or {}), "upper": upper_bound([*point.loss.values()])},
        "training_steps": point.steps,
        "failed": [dict(f) for f in point.failed],
        "recipes": [text(recipes.get(d), 300) for d in point.digests],
    }


def _over_seeds(values: Mapping[int, float]) -> dict[str, Any] | None:
    return _interval(interval([*values.values()])) if values else None


def _interval(found: Interval) -> dict[str, Any]:
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}
