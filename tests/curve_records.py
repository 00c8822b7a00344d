"""Records of sweeps that never ran, from plain numbers: what the functions of a curve are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paredown.records import Measured, Record

PARAMETERS, MACS = 100_000, 1_000_000


def trial(
    kind: str,
    amount: float | None,
    seed: int,
    held_out: float | None,
    test: float,
    *,
    method: str = "l1",
    schedule: str = "one-shot",
    remains: float | None = None,
    macs: float | None = None,
    steps: int = 100,
    details: Mapping[str, Any] | None = None,
) -> Record:
    """One trial; `remains` is the share of parameters that is left (default: the amount)."""
    share = 1.0 if amount is None else amount if remains is None else remains
    left, unit = round(PARAMETERS * share), "%"
    badge = "measured" if held_out is not None else "not tested"
    base = kind == "base"
    return Record(
        cell={
            "stage": "trial",
            "kind": kind,
            "method": "" if base else method,
            "schedule": "" if base else schedule,
            "amount": amount,
            "seed": seed,
            "digest": f"{kind}-{method}-{schedule}-{amount}-{seed}",
        },
        measured={
            "held_out": Measured(value=held_out, unit=unit, badge=badge),  # type: ignore[arg-type]
            "metric": Measured(value=test, unit=unit),
            "bytes": Measured(value=4 * left + 2_000, unit="B"),
            "parameters": Measured(value=left, unit=""),
            "nonzero_parameters": Measured(value=left, unit=""),
            "macs": Measured(value=round(MACS * share), unit="MAC"),
            "effective_macs": Measured(value=round(MACS * (share if macs is None else macs)), unit="MAC"),
            "seconds": Measured(value=1.0, unit="s", timing=True),
        },
        details={"training": {"recover level 1": [1, steps]}, **(details or {})},
    )


def sweep(
    by_amount: Mapping[float, Sequence[float]],
    dense: Sequence[float],
    *,
    test: Mapping[float, Sequence[float]] | None = None,
    method: str = "l1",
    schedule: str = "one-shot",
) -> list[Record]:
    """Bases and one line: {amount: held-out value per seed}."""
    records = [trial("base", None, seed, value, value, steps=900) for seed, value in enumerate(dense)]
    for amount, values in by_amount.items():
        tested = values if test is None else test[amount]
        records += [
            trial("pruned", amount, seed, value, tested[seed], method=method, schedule=schedule)
            for seed, value in enumerate(values)
        ]
    return records


def head(**details: Any) -> Record:
    """The first record of a sweep's journal."""
    told = {
        "name": "made",
        "metric": {"name": "accuracy", "unit": "%", "goal": "max"},
        "axis": "sparsity",
        "limit": 1.0,
        "seeds": [0, 1, 2],
        "cells": 0,
        "failed": [],
        "recipes": {},
        **details,
    }
    cell = {"stage": "curve", "title": "Curve", "recipe_digest": "abc", "task": "made", "target": "onnxruntime-x86"}
    return Record(cell=cell, details=told, environment={"versions": {"torch": "2.13"}})
