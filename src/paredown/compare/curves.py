"""Curves side by side, from their records alone: every point a row, every common point a difference, paired by seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paredown.compare.counted import counted
from paredown.compare.curve_speeds import APART, MILLISECONDS, Speeds, compared, speeds_of
from paredown.compare.nouns import COUNTED, Difference, RunRow
from paredown.compare.refusals import refuse_other_data, refuse_other_metric, short
from paredown.curve import Line, Point, interval
from paredown.records import Measured, Record
from paredown.report.curve_answers import few_seeds
from paredown.report.curve_view import CurveView, curve_view, is_curve
from paredown.report.page import read_records
from paredown.report.reading import entry, figure, mapping, text
from paredown.report.wording import difference, quantity
from paredown.report.wording import interval as ends_of

_CODED = {"bytes": "quantized_bytes", "gzip_bytes": "quantized_gzip_bytes", "metric": "quantized_metric"}
_Place = tuple[str, str, str, float | None, str]
MOST_MISSING = 12
"""Points of one curve alone that are named."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One folder of `paredown curve`, read."""

    name: str
    folder: Path
    view: CurveView
    trials: Mapping[str, Record]
    """By the digest of their cell."""

    @property
    def points(self) -> dict[_Place, tuple[str, Point]]:
        """(name, point) by kind, method, schedule, amount and codes, which say what a point is."""
        found: dict[_Place, tuple[str, Point]] = {}
        for line in self.view.lines:
            for p in line.points:
                found.setdefault((p.kind, p.method, p.schedule, p.amount, p.codes), (_name(line, p), p))
        return found

    @property
    def chosen(self) -> tuple[str, Point] | None:
        """(name, point) of the sweet spot."""
        return next((found for found in self.points.values() if found[1] is self.view.spot.point), None)

    @property
    def bases(self) -> list[Record]:
        """The trials of the dense network, one for each seed."""
        return [r for r in self.view.trials if r.cell["kind"] == "base"]


def read_curves(folders: Sequence[Path]) -> list[Curve]:
    """The curves, held to one metric and one test set; empty where a folder is of another kind. Raises UsageError, RejectedError."""
    records = [read_records(f) for f in folders]
    if not all(map(is_curve, records)):
        return []
    found = [
        Curve(name=name, folder=folder, view=curve_view(own), trials={text(r.cell.get("digest")): r for r in own[1:]})
        for name, folder, own in zip(short([str(f) for f in folders]), folders, records, strict=True)
    ]
    first = found[0]
    for other in found[1:]:
        names = (first.name, other.name)
        refuse_other_metric(first.view.metric, other.view.metric, names)
        tasks = [text(mapping(c.view.head.cell).get("task")) for c in (first, other)]
        refuse_other_data([_test_data(c) for c in (first, other)], [_samples(c) for c in (first, other)], names, tasks)
    return found


def rows_of(curve: Curve) -> list[RunRow]:
    """One row per point, the dense network first; figures are means over seeds."""
    recipes = mapping(entry(curve.view.head, "recipes"))
    rows = []
    for name, point in curve.points.values():
        _, digest, _ = curve.view.shipped(point)
        record = curve.trials.get(digest)
        made = mapping(entry(record, "quantized")) if point.codes else mapping(getattr(record, "details", None))
        recipe = text(recipes.get(digest), 300)
        rows.append(
            RunRow(
                run=curve.name, stage=name, title=name, file=f"{recipe.rpartition('/')[0]}/{text(made.get('file'))}" if recipe else "",
                recommended=point is curve.view.spot.point,
                figures={
                    "metric": _metric(curve, point), "latency_ms": _latency(curve, point), "speedup": _speeds(curve, point).mean,
                    **{k: _mean(curve, point, k) for k in COUNTED},
                },
            )
        )  # fmt: skip
    return rows


def differences(first: Curve, second: Curve) -> tuple[list[Difference], list[str], list[str]]:
    """(differences, notes, not tested) of two curves: of their sweet spots first, then point by point."""
    found: list[Difference] = []
    notes = [*_notes(first, second)]
    a, b = first.chosen, second.chosen
    pairs = [(a, b)] if a is not None and b is not None and a[0] != b[0] else []
    mine, theirs = first.points, second.points
    pairs += [(mine[place], theirs[place]) for place in mine if place in theirs]
    same = []
    for one, other in pairs:
        assert one is not None and other is not None
        if _same_files(first, one[1], second, other[1]):
            same.append(one[0])
            continue
        found += _exact(first, one, second, other)
        found += _quality(first, one, second, other, notes)
        found += _speed(first, one, second, other, notes)
    if same:
        notes.append(f"the same files in {first.name} and {second.name}: {', '.join(same)}")
    return (
        found,
        list(dict.fromkeys(notes)),
        [*_missing(first, second), *_missing(second, first), *_untimed(first, second, found)],
    )


def _name(line: Line, point: Point) -> str:
    if point.kind == "base":
        return f"dense, {point.codes}" if point.codes else "dense"
    return f"{line.name} {point.amount:g}"


# ------------------------------------------------------------------------------------------------------------ figures


def _records(curve: Curve, point: Point) -> Iterator[Record]:
    return (curve.trials[d] for d in point.digests if d in curve.trials)


def _mean(curve: Curve, point: Point, key: str) -> Measured:
    """A size or a count: exact where all seeds agree, else their mean."""
    read = _CODED.get(key, key) if point.codes else key
    found = [figure(r, read) for r in _records(curve, point)]
    values = [f.value for f in found if f.value is not None]
    if not values or len(values) < len(found):
        return Measured(value=None, unit="", badge="not tested")
    mean = values[0] if len(set(values)) == 1 else round(float(np.mean(values)))
    badge = "estimated" if any(f.badge == "estimated" for f in found) else "measured"
    return Measured(value=mean, unit=found[0].unit, badge=badge, n=len(values), protocol="mean over seeds")  # type: ignore[arg-type]


def _metric(curve: Curve, point: Point) -> Measured:
    unit = curve.view.metric["unit"]
    if not point.test:
        return Measured(value=None, unit=unit, badge="not tested")
    of = interval([*point.test.values()])
    return Measured(
        value=of.mean,
        unit=unit,
        low=of.low,
        high=of.high,
        n=of.n,
        protocol="test data, mean over seeds; bootstrap over seeds",
    )


def _latency(curve: Curve, point: Point) -> Measured:
    value = point.absolute.get("latency")
    if value is None:
        return Measured(value=None, unit="ms", badge="not tested")
    where = "; ".join(_speeds(curve, point).place)
    return Measured(value=value, unit="ms", timing=True, machine=where, protocol="mean over seeds")


def _speeds(curve: Curve, point: Point) -> Speeds:
    return speeds_of([*_records(curve, point)], curve.bases, point.codes)


# --------------------------------------------------------------------------------------------------------- differences


def _exact(first: Curve, one: tuple[str, Point], second: Curve, other: tuple[str, Point]) -> list[Difference]:
    a, b = f"{first.name}/{one[0]}", f"{second.name}/{other[0]}"
    of = [{key: _mean(curve, point, key) for key in COUNTED} for curve, point in ((first, one[1]), (second, other[1]))]
    return counted((a, of[0]), (b, of[1]), "means over seeds, second - first")


def _speed(
    first: Curve, one: tuple[str, Point], second: Curve, other: tuple[str, Point], notes: list[str]
) -> list[Difference]:
    of = [(f"{c.name}/{name}", _speeds(c, p)) for c, (name, p) in ((first, one), (second, other))]
    dense = one[1].kind == other[1].kind == "base" and not one[1].codes and not other[1].codes
    return [] if dense else compared(of[0], of[1], notes)  # a dense file is as fast as itself


def _untimed(first: Curve, second: Curve, found: Iterable[Difference]) -> list[str]:
    """What of speeds nobody measured, or must not be compared."""
    timed = {c.name: any("latency" in p.absolute for _, p in c.points.values()) for c in (first, second)}
    alone = [name for name, known in timed.items() if not known] if any(timed.values()) else []
    lacking = [f"latency of {name}, whose files were not timed (curve.latency)" for name in alone]
    return [*lacking, MILLISECONDS if any(d.what == "latency_ms" for d in found) else APART]


def _quality(
    first: Curve, one: tuple[str, Point], second: Curve, other: tuple[str, Point], notes: list[str]
) -> list[Difference]:
    """The metric on test data, seed by seed: a seed of both curves is one pair."""
    a, b = f"{first.name}/{one[0]}", f"{second.name}/{other[0]}"
    unit, label = first.view.metric["unit"], first.view.metric["name"]
    common = [s for s in one[1].test if s in other[1].test]
    if not one[1].test or not other[1].test:
        return []
    if not common:
        notes.append(f"{label} of {b} against {a} is not compared: they have no seed in common")
        return []
    left = (set(one[1].test) | set(other[1].test)) - set(common)
    if left:
        notes.append(f"paired over the seeds of both ({_listed(common)}); one of them alone has {_listed(left)}")
    gain = interval([other[1].test[s] - one[1].test[s] for s in common])
    change = Measured(
        value=gain.mean, unit=unit, low=gain.low, high=gain.high, n=gain.n, protocol="test data, second - first, paired by seed; bootstrap over seeds",
    )  # fmt: skip
    if gain.low is None or gain.high is None:
        how, better = "one common seed, so no interval", None
    else:
        how = f"paired by {gain.n} seeds, interval {ends_of(gain.low, gain.high, unit, signed=True)}"
        up = gain.low > 0
        apart = up or gain.high < 0
        better = (b if up == (first.view.metric["goal"] == "max") else a) if apart else None
    verdict = f"{better} is better" if better else "not told" if gain.low is None else "not distinguishable"
    said = f"{label} of {b} against {a}: {difference(gain.mean, unit)}, {how}: {verdict}"
    return [Difference(what="metric", first=a, second=b, change=change, better=better, said=said)]


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _same_files(first: Curve, one: Point, second: Curve, other: Point) -> bool:
    """Whether every seed of both has one file in both."""
    mine, theirs = (
        {int(r.cell["seed"]): _digest(r, p) for r in _records(c, p)} for c, p in ((first, one), (second, other))
    )
    common = mine.keys() & theirs.keys()
    return bool(common) and all(mine[s] and mine[s] == theirs[s] for s in common)


def _digest(record: Record, point: Point) -> str:
    return text(mapping(entry(record, "quantized")).get("digest") if point.codes else entry(record, "digest"), 80)


# --------------------------------------------------------------------------------------------- what may not be compared


def _notes(first: Curve, second: Curve) -> Iterator[str]:
    """What stands between the two besides the pruning."""
    networks = [{text(entry(r, "digest"), 80) for r in c.bases} - {""} for c in (first, second)]
    if networks[0] and networks[1] and not networks[0] & networks[1]:
        yield f"{first.name} and {second.name} prune other dense networks: a difference is that of the networks too"
    if not _test_data(first):
        yield "the curves do not say what their test data are (evaluate reads its own)"
    rules = [(c.view.spot.rule, c.view.axis, c.view.limit) for c in (first, second)]
    if rules[0] != rules[1]:
        told = [f"{c.name}: {_rule(c.view)}" for c in (first, second)]
        yield f"the sweet spots were chosen by different rules ({'; '.join(told)})"
    for curve in (first, second):
        if curve.chosen is None:
            yield f"{curve.name} has no sweet spot. {curve.view.spot.sentence}"
        if curve.view.failed:
            yield f"{curve.name}: {len(curve.view.failed)} trials have no result"
    shared = {s for p in first.points.values() for s in p[1].seeds} & {
        s for p in second.points.values() for s in p[1].seeds
    }
    if doubt := few_seeds(len(shared)):
        yield doubt


def _rule(view: CurveView) -> str:
    unit = "points" if view.metric["unit"] == "%" else view.metric["unit"]
    return f"{'farthest from the chord' if view.limit is None else f'limit {quantity(view.limit, unit)}'}, over {view.axis}"


def _missing(curve: Curve, other: Curve) -> list[str]:
    """Points of the other curve that this one lacks."""
    own = curve.points
    lacking = [name for place, (name, _) in other.points.items() if place not in own]
    if not lacking:
        return []
    more = f" and {len(lacking) - MOST_MISSING} more" if len(lacking) > MOST_MISSING else ""
    return [f"in {curve.name}, what {other.name} has: {', '.join(lacking[:MOST_MISSING])}{more}"]


def _test_data(curve: Curve) -> str:
    return next((text(entry(r, "test_data"), 80) for r in curve.bases), "")


def _samples(curve: Curve) -> set[Any]:
    return {figure(r, "metric").n for r in curve.bases} - {None}
