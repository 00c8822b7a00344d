"""The facts of a curve as a document: what scripts read, and what `paredown curve` writes as curve.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paredown.controls import Comparison
from paredown.curve import Interval, Point, interval, upper_bound
from paredown.records import Record
from paredown.report.curve_answers import dense_answer, doubts, not_tested
from paredown.report.curve_view import CurveView, curve_view
from paredown.report.reading import entry, mapping, number, text


def curve_document(records: Sequence[Record]) -> dict[str, Any]:
    """A curve as one JSON-ready document, schema 1.

    {"schema", "metric", "axis", "limit", "trials": {"cells", "done", "failed"}, "sweet_spot": {"rule", "line", "amount", "codes", "removed",
    "low", "high", "sentence"}, "dense_answer", "dense_verdict", "not_tested": [...], "doubts": [...], "comparisons": [...], "pareto": [...], "lines": [{"name", "kind", "codes", "points":
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
        "dense_answer": dense_answer(seen) or None,
        "dense_verdict": seen.verdict,
        "not_tested": not_tested(seen),
        "doubts": doubts(seen),
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
