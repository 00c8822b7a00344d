"""The facts of a measurement of sensitivities from its records: rows, order, stability, verdict; what the page draws and scripts read."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from paredown.errors import RejectedError
from paredown.ranking import Stability, kendall, rank_intervals, ranks, stability
from paredown.records import Record
from paredown.report.reading import entry, items, mapping, number, text
from paredown.report.wording import difference, digits

STAGE = "sensitivity"
HOLDS = 0.5
"""An order is relied on where 97.5 % of the splits into halves agree by at least this τ."""
SHARE, BITS = 0.5, 4
"""At what a sentence quotes a row, or the nearest to it that was measured."""
Measure = Literal["metric", "distance"]
DISTANCES = {
    "kl": "KL divergence of the class probabilities from the dense network's, mean over samples, in nats",
    "mse": "squared error of the outputs against the dense network's, over their mean square",
}

SAMPLES = {
    "choose_batches": "held-out samples",
    "calibration_batches": "calibration samples (which training may have seen)",
}
"""What was read, by the document's "data": a task need not hold its calibration samples out."""


def is_sensitivity(records: Sequence[Record]) -> bool:
    """Whether records are those of `paredown sensitivity`."""
    return bool(records) and mapping(records[0].cell).get("stage") == STAGE


def sensitivity_document(records: Sequence[Record]) -> dict[str, Any]:
    """Schema 1. "units" and "bits" are null where nothing of the kind was measured.

    {"schema", "name", "task", "target", "metric", "dense", "distance", "num_samples", "data", "verdict", "not_tested",
    "notes", "repair": whether readers were fitted anew, "units", "bits"}; of each table: rows [{name, kind, of, parameters, points [{at, kept, of, metric_loss, distance,
    badge, why}], mean_metric_loss, mean_distance, rank, rank_low, rank_high}], "columns", "ordered_by", "order" (least hurt
    first), "stability" {metric, distance: {tau, low, high, splits, groups} | null, between: τ | null}, "sentence".
    "together": all spaces at one amount, or all layers at one width, beside the sum of what each cost alone: [{kind, at, parts,
    metric_loss, distance: {sum, measured, times} | null, badge, why, sentence}].

    Raises RejectedError where the records are others.
    """
    if not is_sensitivity(records):
        msg = "records must be those of `paredown sensitivity`. Got others."
        raise RejectedError(msg)
    head, metric = records[0], mapping(entry(records[0], "metric"))
    tables = {
        kind: _table(head, [r for r in records[1:] if r.cell.get("kind") == kind], kind) for kind in ("units", "bits")
    }
    together = [_together(head, records, r) for r in records[1:] if text(r.cell.get("kind")).startswith("all ")]
    points = [p for t in tables.values() if t for row in t["rows"] for p in row["points"]]
    lost = sum(p["distance"] is None for p in points)
    bare = sum(p["metric_loss"] is None and p["distance"] is not None for p in points) if metric else 0
    not_tested = [
        *([] if metric else ["the metric: the task has no choose_batches with evaluate(predict, batches)"]),
        *(
            f"{what}: none was measured"
            for kind, what in (("units", "amounts of spaces"), ("bits", "bits"))
            if not tables[kind]
        ),
        *([f"{lost} point{'' if lost == 1 else 's'} without a number (see the tables)"] if lost else []),
        *([f"{bare} point{'' if bare == 1 else 's'} without a metric (see the tables)"] if bare else []),
        *(
            []
            if any(t["distance"] for t in together)
            else ["spaces or layers together: each was hurt alone, and errors need not add up"]
        ),
        "activations of fewer bits, and any training after the damage",
    ]
    return {
        "schema": 1,
        "name": text(entry(head, "name")),
        "task": text(head.cell.get("task")),
        "target": text(head.cell.get("target")),
        "metric": dict(metric) or None,
        "dense": entry(head, "dense"),
        "distance": {"name": entry(head, "distance"), "meaning": DISTANCES.get(text(entry(head, "distance")), "")},
        "num_samples": entry(head, "num_samples"),
        "data": entry(head, "data"),
        "verdict": " ".join(t["sentence"] for t in tables.values() if t),
        "not_tested": not_tested,
        "notes": [text(n, 500) for n in items(entry(head, "notes"))],
        "repair": bool(mapping(entry(head, "units")).get("repair")),
        **tables,
        "together": together,
    }


def sensitivity_csv(records: Sequence[Record]) -> str:
    """Every point, for a spreadsheet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    writer.writerows(csv_lines(sensitivity_document(records)))
    return out.getvalue()


CSV_HEAD = ("kind", "name", "kept", "of", "metric_loss", "distance", "badge", "rank", "why")


def csv_lines(document: Mapping[str, Any]) -> list[list[Any]]:
    """Rows of CSV_HEAD."""
    return [
        [kind, row["name"], p["kept"], p["of"], p["metric_loss"], p["distance"], p["badge"], row["rank"], p["why"]]
        for kind in ("units", "bits")
        if document[kind]
        for row in document[kind]["rows"]
        for p in row["points"]
    ]


# ------------------------------------------------------------------------------------------------------------ together


def _together(head: Record, records: Sequence[Record], record: Record) -> dict[str, Any]:
    """What all cost at once, and the sum of what each cost alone at that amount or width."""
    kind = "bits" if record.cell["kind"] == "all bits" else "units"
    at = record.cell["kept"] if kind == "bits" else round(100 * record.cell["kept"] / record.cell["of"], 1)
    rows: dict[str, dict[str, Any]] = {}
    for one in (r for r in records[1:] if r.cell.get("kind") == kind):
        point, name = _point(head, one, kind), str(one.cell["name"])
        off = abs(100 * point["kept"] / point["of"] - at)
        if point["at"] == at and (name not in rows or off < rows[name]["off"]):
            rows[name] = {**point, "off": off}
    found: dict[str, Any] = {"kind": kind, "at": at, "parts": len(rows), "badge": record.measured["distance"].badge}
    for name in ("metric_loss", "distance"):
        alone, measured = [row[name] for row in rows.values()], number(record.measured[name].value)
        if measured is None or None in alone:
            found[name] = None
            continue
        total = float(sum(alone))
        found[name] = {"sum": total, "measured": measured, "times": measured / total if total > 0 else None}
    found["why"] = text(entry(record, "why"), 300)
    return {**found, "sentence": _added_up(head, found)}


def _added_up(head: Record, found: Mapping[str, Any]) -> str:
    what = f"{found['parts']} layers at {found['at']} bits" if found["kind"] == "bits" else ""
    what = what or f"{found['parts']} spaces at {found['at']:g} %"
    moved, lost = found["distance"], found["metric_loss"]
    if moved is None:
        return f"All {what} at once: not tested{' (' + found['why'].rstrip('.') + ')' if found['why'] else ''}."
    times = "" if moved["times"] is None else f", {digits(moved['times'])} times the sum"
    said = f"All {what}: distances add up to {digits(moved['sum'])} (estimated); together they are {digits(moved['measured'])}{times}"
    if lost is not None:
        unit = text(mapping(entry(head, "metric")).get("unit"))
        said += f". The metric's loss: {difference(lost['sum'], unit)} by the sum (estimated), {difference(lost['measured'], unit)} together"
    return f"{said}."


# --------------------------------------------------------------------------------------------------------------- table


def _table(head: Record, points: Sequence[Record], kind: str) -> dict[str, Any] | None:
    if not points:
        return None
    spaces, sizes = mapping(entry(head, "spaces")), mapping(entry(head, "parameters"))
    rows: dict[str, dict[str, Any]] = {}
    groups: dict[str, list[tuple[list[float], list[float]]]] = {}
    for record in points:
        name = str(record.cell["name"])
        row = rows.setdefault(
            name,
            {
                "name": name,
                "kind": text(mapping(spaces.get(name)).get("kind")) or ("weight" if kind == "units" else "layer"),
                "of": record.cell["of"],
                "parameters": number(sizes.get(name)),
                "points": [],
            },
        )
        row["points"].append(_point(head, record, kind))
        details = mapping(record.details)
        groups.setdefault(name, []).append((items(details.get("metric")), items(details.get("distance"))))
    found = list(rows.values())
    wanted = [float(a) for a in items(entry(head, "amounts"))]
    weights = {}
    for row in found:
        weights[row["name"]] = own = _weights(row["points"], wanted if kind == "units" else [])
        row["continued"] = kind == "units" and len(row["points"]) < len(wanted)
        for measure in ("metric_loss", "distance"):
            values = [p[measure] for p in row["points"]]
            row[f"mean_{measure}"] = None if None in values else float(own @ np.asarray(values, dtype=np.float64))
    table = {
        "rows": found,
        "columns": sorted({p["at"] for row in found for p in row["points"]}, reverse=True),
        **_ordered(found, groups, weights),
    }
    return {**table, "sentence": _sentence(head, table, kind)}


def _weights(points: Sequence[Mapping[str, Any]], wanted: Sequence[float]) -> NDArray[np.float64]:
    """What each point counts in the mean over all amounts; they sum to 1 where a row has a point for each.

    A space of few units comes to some of the amounts only. Its losses are continued to the others along straight lines, from nothing
    lost at 1 and on beyond its last two points: a mean over mild amounts alone would rank it before all others.
    """
    if len(points) >= len(wanted):
        return np.full(len(points), 1 / len(points))
    shares = np.array([1.0, *(p["kept"] / p["of"] for p in points)])
    order = np.argsort(shares)
    x, found = shares[order], np.zeros(len(shares))
    for amount in wanted:
        at = int(np.clip(np.searchsorted(x, amount), 1, len(x) - 1))
        up = (amount - x[at - 1]) / (x[at] - x[at - 1])  # beyond the last point it is negative
        found[order[at - 1]] += 1 - up
        found[order[at]] += up
    return np.asarray(found[1:] / len(wanted))


def _point(head: Record, record: Record, kind: str) -> dict[str, Any]:
    """`at` is the column: the amount that was asked for, in % that remains, which units can only come near to; or the bits."""
    kept, of = record.cell["kept"], record.cell["of"]
    asked = [float(a) for a in items(entry(head, "amounts"))] or [kept / of]
    metric, moved = record.measured["metric_loss"], record.measured["distance"]
    return {
        "at": kept if kind == "bits" else round(100 * min(asked, key=lambda a: abs(a - kept / of)), 1),
        "kept": kept,
        "of": of,
        "metric_loss": number(metric.value),
        "distance": number(moved.value),
        "badge": moved.badge,
        "why": text(entry(record, "why"), 300),
    }


def _ordered(
    rows: list[dict[str, Any]],
    groups: Mapping[str, list[tuple[list[float], list[float]]]],
    weights: Mapping[str, NDArray[np.float64]],
) -> dict[str, Any]:
    """The order, by the metric where it holds, else by the distance where that does; ranks with their intervals."""
    whole = [row for row in rows if row["mean_distance"] is not None]
    told = [(groups[row["name"]], weights[row["name"]]) for row in whole]
    by_group = {m: _by_group(told, i) for i, m in enumerate(("metric", "distance"))}
    found: dict[str, Stability | None] = {m: None if g is None else stability(g) for m, g in by_group.items()}
    has_metric = bool(whole) and all(row["mean_metric_loss"] is not None for row in whole)
    alike = len(whole) > 1 and len({row["mean_metric_loss"] for row in whole}) == 1
    ordered_by: Measure = (
        "metric"
        if has_metric and not alike and (_holds(found["metric"]) or not _holds(found["distance"]))
        else "distance"
    )
    first = "mean_metric_loss" if ordered_by == "metric" else "mean_distance"
    order = sorted(whole, key=lambda row: (row[first], row["mean_distance"]))
    chosen = by_group[ordered_by]
    spread = None if chosen is None else rank_intervals(chosen)
    placed = [*ranks([row[first] for row in whole])] if whole else []
    for row in rows:
        row |= {"rank": None, "rank_low": None, "rank_high": None}
    for i, row in enumerate(whole):
        row["rank"] = float(placed[i])
        if spread is not None:
            row["rank_low"], row["rank_high"] = spread[i]
    between = None
    if has_metric and len(whole) > 2:
        between = kendall(*([row[m] for row in whole] for m in ("mean_metric_loss", "mean_distance")))
    return {
        "ordered_by": ordered_by,
        "order": [row["name"] for row in order],
        "stability": {**{m: _told(s) for m, s in found.items()}, "between": between},
    }


def _by_group(
    rows: Sequence[tuple[list[tuple[list[float], list[float]]], NDArray[np.float64]]], which: int
) -> NDArray[np.float64] | None:
    """[rows, groups of samples]: means over a row's points; None where samples were not told apart."""
    lengths = {len(point[which]) for points, _ in rows for point in points}
    if len(lengths) != 1 or not rows or 0 in lengths:
        return None
    return np.array([weights @ np.array([point[which] for point in points]) for points, weights in rows])


def _holds(found: Stability | None) -> bool:
    return found is not None and found.low >= HOLDS


def _told(found: Stability | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"tau": found.tau, "low": found.low, "high": found.high, "splits": found.splits, "groups": found.groups}


# ------------------------------------------------------------------------------------------------------------ sentence


def _sentence(head: Record, table: Mapping[str, Any], kind: str) -> str:
    """Which to cut first and which to leave alone, what that costs, and whether the order can be relied on."""
    rows = {row["name"]: row for row in table["rows"]}
    order = table["order"]
    if len(order) < 2:
        return _no_order(table, "space" if kind == "units" else "layer")
    first, last = rows[order[0]], rows[order[-1]]
    what = "Cut" if kind == "units" else "Give fewer bits to"
    costs = [_cost(head, row, kind, table["ordered_by"]) for row in (first, last)]
    few = sum(bool(row["continued"]) for row in table["rows"])
    said = (
        f" {few} of {len(rows)} have too few units for every amount: their means are continued along straight lines (estimated)."
        if few
        else ""
    )
    return f"{what} {first['name']} first ({costs[0]}); leave {last['name']} alone ({costs[1]}). {_reliance(head, table, kind)}{said}"


def _no_order(table: Mapping[str, Any], what: str) -> str:
    """Too few rows have all their numbers: how many, and why the first of the others has not."""
    of, order = len(table["rows"]), table["order"]
    if of < 2:
        return f"There is only one {what}: no order."
    lost = next(
        f" ({r['name']}: {p['why'].rstrip('.')})" for r in table["rows"] for p in r["points"] if p["distance"] is None
    )
    return f"Only {len(order)} of {of} {what}s {'has' if len(order) == 1 else 'have'} all {'its' if len(order) == 1 else 'their'} numbers: no order{lost}."


def _cost(head: Record, row: Mapping[str, Any], kind: str, ordered_by: str) -> str:
    """What the order is by comes first: beside an order by distance, equal metrics would look like a mistake."""
    wanted = SHARE * 100 if kind == "units" else BITS
    point = min(row["points"], key=lambda p: abs(p["at"] - wanted))
    where = f"{100 * (1 - point['kept'] / point['of']):.0f} % of it out" if kind == "units" else f"{point['at']} bits"
    metric = mapping(entry(head, "metric"))
    moved = "" if point["distance"] is None else f"outputs move by {digits(point['distance'])}"
    if point["metric_loss"] is None:
        return f"{where}: {moved or 'not tested'}"
    sign = -1.0 if metric.get("goal") == "max" else 1.0
    lost = f"{text(metric.get('name'))} {difference(sign * point['metric_loss'], text(metric.get('unit')))}"
    return f"{where}: {moved}, {lost}" if ordered_by == "distance" and moved else f"{where}: {lost}"


def _reliance(head: Record, table: Mapping[str, Any], kind: str) -> str:
    """The order is by the mean over all amounts, and the one figure that is quoted beside it may say otherwise."""
    found, measure = table["stability"], table["ordered_by"]
    name = text(mapping(entry(head, "metric")).get("name"), 40) if measure == "metric" else "output distance"
    many = len(table["columns"])
    name += f" (mean over {many} {'amounts' if kind == 'units' else 'widths'})" if many > 1 else ""
    mine, count = found[measure], number(entry(head, "num_samples"))
    if mine is None:
        why = "fewer than three of them" if len(table["order"]) < 3 else "samples cannot be told apart, or are too few"
        if len(table["order"]) > 2 and measure == "metric" and found["distance"] is not None:
            why = "evaluate returns one number for all samples, not one for each"
        return f"Order by {name}; whether it is stable was not tested: {why}."
    agree = f"disjoint halves of the {count:,} samples agree by τ = {mine['tau']:.2f} ({mine['low']:.2f} to {mine['high']:.2f})"
    if mine["low"] >= HOLDS:
        other = found["metric"]
        instead = ""
        if measure == "distance" and other is not None:
            instead = f", and not by the metric, whose halves agree by {other['tau']:.2f} ({other['low']:.2f} to {other['high']:.2f}) only"
        return f"The order, by {name}{instead}, holds: {agree}.".replace("-", "−")
    return f"Do not rely on the order by {name}: {agree}.".replace("-", "−")


__all__ = ["CSV_HEAD", "csv_lines", "is_sensitivity", "sensitivity_csv", "sensitivity_document"]
