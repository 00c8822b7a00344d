"""A sensitivity that `paredown sensitivity` measured, as the table that an allocation reads, where it is of this network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paredown.allocate import Sensitivity
from paredown.errors import UsageError
from paredown.pipeline.folder import RECORDS
from paredown.program import Program
from paredown.records import Record, read
from paredown.score import Scores

STAGE = "sensitivity"


def about_units(program: Program, scores: Scores, *, repair: bool) -> dict[str, Any]:
    """What a table of units depends on besides the data: the network, and what the scores rank lowest."""
    state = hashlib.sha256()
    for by_name in (scores.by_space, scores.by_cell):
        for name, array in sorted(by_name.items()):
            state.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return {
        "network": program.source_digest,
        "criterion": scores.criterion,
        "granularity": scores.granularity,
        "scores": state.hexdigest(),
        "repair": repair,
    }


def order_of(scores: Scores) -> str:
    """A digest of the order in which units, or the cells of each weight, leave: other threads move scores by rounding, and seldom it."""
    order = hashlib.sha256()
    for by_name in (scores.by_space, scores.by_cell):
        for name, array in sorted(by_name.items()):
            order.update(name.encode() + np.argsort(array, axis=None, kind="stable").tobytes())
    return order.hexdigest()


def kept_table(folder: Path, about: Mapping[str, Any], scores: Scores) -> Sensitivity:
    """The output distances of a folder's spaces (or weights), measured on held-out data; nothing is measured again.

    Raises UsageError where the folder holds none, or one of another network, criterion, granularity or repair: `about`
    is what `about_units` says of the network at hand, and of these scores.
    """
    records = _records(folder)
    head, points = records[0], [r for r in records[1:] if r.cell["kind"] == "units"]
    there: Mapping[str, Any] = head.details["units"]
    for key, wanted in about.items():
        if there.get(key) != wanted:
            if key == "scores" and there.get("order") == order_of(scores):
                continue  # the same units leave
            what = {"scores": "the scores of its units", "network": "the network (its weights or its shape)"}.get(
                key, key
            )
            msg = f"prune.sensitivity must fit this run in {what}: {wanted!s:.16}. Got {there.get(key)!s:.16} in {folder}. Measure it with this recipe (its threads too), or leave the key out."
            raise UsageError(msg)
    if not points:
        msg = f"prune.sensitivity must hold amounts of spaces or weights. Got bits alone in {folder}. Measure it with --amounts."
        raise UsageError(msg)
    return _table(head, points)


def kept_bits(folder: Path, network: str) -> tuple[dict[str, dict[int, float | None]], str] | None:
    """(Weight → {bits: distance}, the distance's unit) of a folder, with rounding to the nearest; None where it holds no bits, or another network.

    `network` is the source digest of the one at hand. Raises UsageError where the folder is no measurement of sensitivities.
    """
    records = _records(folder)
    points = [r for r in records[1:] if r.cell["kind"] == "bits"]
    if not points or records[0].details["units"]["network"] != network:
        return None
    found: dict[str, dict[int, float | None]] = {}
    for record in points:
        found.setdefault(record.cell["name"], {})[record.cell["kept"]] = record.measured["distance"].value
    return found, points[0].measured["distance"].unit


def check_kept(folder: Path) -> None:
    """Raise UsageError where a folder is no measurement of sensitivities: before any work, of which network it is shows later."""
    _records(folder)


def _records(folder: Path) -> list[Record]:
    try:
        records = read(folder / RECORDS)
    except (OSError, ValueError, KeyError, TypeError):  # a file of that name is something else
        records = []
    if not records or records[0].cell.get("stage") != STAGE:
        msg = f"prune.sensitivity must be a folder that `paredown sensitivity` finished. Got {folder}. Run it into that folder, or leave the key out."
        raise UsageError(msg)
    return list(records)


def _table(head: Record, points: list[Record]) -> Sensitivity:
    increase: dict[str, dict[int, float | None]] = {}
    missing = {}
    for record in points:
        name, kept = record.cell["name"], record.cell["kept"]
        value = record.measured["distance"].value
        increase.setdefault(name, {})[kept] = None if value is None else float(value)
        if value is None:
            missing[f"{name} @ {kept}"] = str(record.details.get("why", ""))
    return Sensitivity(
        increase=increase,
        of={r.cell["name"]: r.cell["of"] for r in points},
        unit=points[0].measured["distance"].unit,
        dense=0.0,
        granularity=head.details["units"]["granularity"],
        num_samples=points[0].measured["distance"].n or 0,
        missing=missing,
        made_by={"criterion": head.details["units"]["criterion"], "source": head.details["units"]["network"]},
    )
