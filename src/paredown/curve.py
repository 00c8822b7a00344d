"""Curve: from the records of a sweep to lines with intervals, the Pareto front, the sweet spot and the dense verdict.

A record of a trial: cell = {"kind", "method", "schedule", "amount", "seed", "digest"}; measured "held_out" and "metric" (the
same on test data), "bytes", "parameters", "nonzero_parameters", "macs", "effective_macs", "latency_ms". Choices are made on
held-out data alone; what a choice is worth is said on test data. A second file, in codes, is told by the same names with
"quantized_" before them, against the dense model in float; it takes part in the choice where codes save something.

Intervals are over seeds: bootstrap of the mean, percentiles expanded for small n (Hesterberg 2015, "What teachers should know
about the bootstrap", section 4.4: α' = Φ(√(n/(n-1)) · t_{α, n-1})). Up to 6 seeds all resamples are enumerated, so nothing is drawn;
beyond, 4,000 with seed 0. With 3 seeds it is the range of the seeds; with one there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from paredown.bootstrap import ENUMERATED, Floats, bound, quantile, resamples
from paredown.chord import chord_distances as chord_distances  # noqa: PLC0414  (it is this room's name for it as well)
from paredown.records import Record

Axis = Literal["sparsity", "parameters", "bytes", "macs", "latency"]
AXES: dict[Axis, str] = {
    "sparsity": "nonzero_parameters",
    "parameters": "parameters",
    "bytes": "bytes",
    "macs": "macs",
    "latency": "latency_ms",
}
"""Axis to the figure whose share that left is drawn."""
_IN_TURNS = {"latency_ms": "baseline_latency_ms"}
"""The dense figure that was measured in turns with a trial's own: two files timed at other times, or elsewhere, do not compare."""
_SAVED_BY_CODES = ("bytes", "latency")
"""Axes on which a file in codes is another reduction; on the others it is its float file's."""
CONTROLS = {
    "scratch": "the same shape from scratch",
    "thin": "a uniformly thinner dense network",
    "random": "a random criterion",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over seeds with its 95 % interval; `low` and `high` are None where there is only one seed."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """All seeds of one kind, method, schedule and amount."""

    kind: str
    method: str
    schedule: str
    amount: float | None
    """What remains, as the recipe says it; None for the dense model."""
    seeds: tuple[int, ...]
    """With a result."""
    failed: tuple[Mapping[str, Any], ...] = ()
    """Trials without one: {seed, status, reason, tail}."""
    digests: tuple[str, ...] = ()
    """Cells, in the order of the seeds."""
    removed: Mapping[Axis, float]
    """Axis to the mean share of the dense model that left, in %."""
    absolute: Mapping[Axis, float]
    """Axis to the mean figure."""
    held_out: Mapping[int, float]
    """By seed; empty where the task has no held-out data."""
    test: Mapping[int, float]
    loss: Mapping[int, float]
    """What the metric lost against the dense model of the same seed, on held-out data; positive is worse."""
    effective_macs: float
    steps: float | None
    """Training steps of it alone, mean; those of its base come on top where it has one."""
    not_comparable: str = ""
    same_as: str = ""
    """Another control whose shape and training it has."""
    shapes: frozenset[str] = frozenset()
    """Digests of the shapes of its tensors, over seeds; empty in records from before."""
    codes: str = ""
    """Scheme of a file in codes, as "INT8"; empty in float."""

    @property
    def complete(self) -> bool:
        """Whether every seed has a result: only such a point may be chosen."""
        return not self.failed and bool(self.seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One method and schedule, or one control: its points by what was removed, the dense model first."""

    name: str
    kind: str
    method: str
    schedule: str
    points: tuple[Point, ...]
    codes: str = ""
    """As that of its points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweetSpot:
    """What the rule chose, and why. `point` is None where it chose nothing."""

    rule: Literal["limit", "chord"]
    axis: Axis
    line: str
    point: Point | None
    removed: float | None
    low: float | None
    high: float | None
    """95 % interval of `removed`: the rule applied to resampled seeds."""
    sentence: str

    @property
    def name(self) -> str:
        """Of its line; of the dense network, which stands in every line, where nothing is pruned."""
        return (
            self.line
            if self.point is None or self.point.amount is not None
            else f"the dense network in {self.point.codes}"
        )


# ----------------------------------------------------------------------------------------------------------- intervals


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of the seeds with its two-sided bootstrap interval.

    >>> interval([1.0, 2.0, 6.0])
    Interval(mean=3.0, low=1.0, high=6.0, n=3)
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Interval(mean=mean, low=None, high=None, n=n)
    half = (1 + confidence) / 2
    return Interval(mean=mean, low=0.0 - bound(tuple(-v for v in values), half), high=bound(tuple(values), half), n=n)


def upper_bound(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """One-sided upper bound of the mean over seeds; None for one seed.

    >>> upper_bound([0.1, 0.2, 0.6])
    0.6
    """
    return None if len(values) < 2 else bound(tuple(values), confidence)


# --------------------------------------------------------------------------------------------------------------- lines


def lines(records: Sequence[Record], *, goal: str, failed: Sequence[Mapping[str, Any]] = ()) -> tuple[Line, ...]:
    """The lines of a sweep: those that prune in their order, then the controls; each begins with the dense model.

    Where trials have a second file in codes, each line is followed by theirs. `failed` are the trials without a record, {kind,
    method, schedule, amount, seed, status, reason, tail}; they mark their points. `goal` is "max" or "min" of the metric.
    """
    bases = {int(r.cell["seed"]): r for r in records if r.cell["kind"] == "base"}
    found = _lines(records, failed, bases, goal)
    coded = [(r, told) for r in records if isinstance(told := r.details.get("quantized"), Mapping)]
    if coded:
        without = [{**r.cell, "status": "refused", "reason": told["failed"]} for r, told in coded if "failed" in told]
        files = [_second_file(r) for r, told in coded if "failed" not in told]
        found += _lines(files, [*failed, *without], bases, goal, codes=str(coded[0][1]["scheme"]).upper())
    place = [*CONTROLS].index
    ways = list(dict.fromkeys((line.method, line.schedule) for line in found))  # a line, then its own in codes
    return tuple(
        sorted(found, key=lambda a: (place(a.kind) if a.kind in CONTROLS else -1, ways.index((a.method, a.schedule))))
    )


def _second_file(record: Record) -> Record:
    """A trial as its file in codes has it: what is counted in the graph stays."""
    own = {n.removeprefix("quantized_"): m for n, m in record.measured.items() if n.startswith("quantized_")}
    timed = ("latency_ms", "baseline_latency_ms")
    return replace(record, measured={**{n: m for n, m in record.measured.items() if n not in timed}, **own})


def _lines(
    records: Sequence[Record], failed: Sequence[Mapping[str, Any]], bases: Mapping[int, Record], goal: str, codes: str = ""
) -> list[Line]:  # fmt: skip
    done: dict[_Place, list[Record]] = {}
    lost: dict[_Place, list[Mapping[str, Any]]] = {}
    for record in records:
        done.setdefault(_place(record.cell), []).append(record)
    for told in failed:
        lost.setdefault(_place(told), []).append(told)
    points: dict[tuple[str, str, str], list[Point]] = {}
    dense = None
    for place in dict.fromkeys((*done, *lost)):
        point = _point(place, done.get(place, []), lost.get(place, []), bases, goal, codes)
        if point.kind == "base":
            dense = point
        else:
            points.setdefault(place[:3], []).append(point)
    found, kinds = [], [kind for kind, *_ in points]
    for (kind, method, schedule), own in points.items():
        own.sort(key=lambda p: (p.removed.get("sparsity", math.inf), -(p.amount or 0)))
        way = f"{method} {schedule}"
        name = (f"{CONTROLS[kind]}, as {way}" if kinds.count(kind) > 1 else CONTROLS[kind]) if kind in CONTROLS else way
        name += f", {codes}" if codes else ""
        whole = own if dense is None else [dense, *own]
        found.append(Line(name=name, kind=kind, method=method, schedule=schedule, points=tuple(whole), codes=codes))
    return found


_Place = tuple[str, str, str, float | None]


def _place(cell: Mapping[str, Any]) -> _Place:
    return cell["kind"], cell["method"], cell["schedule"], cell["amount"]


def _point(
    place: _Place, records: list[Record], lost: list[Mapping[str, Any]], bases: Mapping[int, Record], goal: str, codes: str
) -> Point:  # fmt: skip
    records = sorted(records, key=lambda r: int(r.cell["seed"]))
    with_base = [(r, bases[int(r.cell["seed"])]) for r in records if int(r.cell["seed"]) in bases]
    sign = 1.0 if goal == "max" else -1.0
    removed: dict[Axis, float] = {}
    absolute: dict[Axis, float] = {}
    for axis, name in AXES.items():
        pairs = [(_value(r, name), _value(r, _IN_TURNS.get(name, "")) or _value(b, name)) for r, b in with_base]
        if pairs and all(a is not None and b for a, b in pairs):
            removed[axis] = float(np.mean([100 * (1 - (a or 0) / (b or 1)) for a, b in pairs]))
            absolute[axis] = float(np.mean([a for a, _ in pairs if a is not None]))
    kind, method, schedule, amount = place
    steps = [sum(int(e) * int(s) for e, s in t.values()) for r in records if (t := r.details.get("training"))]
    return Point(
        kind=kind, method=method, schedule=schedule, amount=amount, failed=tuple(lost), removed=removed, absolute=absolute, codes=codes,
        seeds=tuple(int(r.cell["seed"]) for r in records), digests=tuple(str(r.cell["digest"]) for r in records),
        held_out=_by_seed(records, "held_out"), test=_by_seed(records, "metric"),
        loss={
            int(r.cell["seed"]): sign * (before - after)
            for r, b in with_base
            if (after := _value(r, "held_out")) is not None and (before := _value(b, "held_out")) is not None
        },
        effective_macs=float(np.mean([_value(r, "effective_macs") or 0 for r in records])) if records else math.nan,
        steps=float(np.mean(steps)) if steps and len(steps) == len(records) else None,
        not_comparable=next((str(w) for r in records if (w := r.details.get("not_comparable"))), ""),
        shapes=frozenset(str(s) for r in records if (s := r.details.get("shapes"))),
        same_as="scratch" if records and all(r.details.get("same_as") == "scratch" for r in records) else "",
    )  # fmt: skip


def _by_seed(records: list[Record], name: str) -> dict[int, float]:
    found = {int(r.cell["seed"]): _value(r, name) for r in records}
    return {seed: value for seed, value in found.items() if value is not None}


def _value(record: Record, name: str) -> float | None:
    found = record.measured.get(name)
    return None if found is None or found.value is None else float(found.value)


def pareto(points: Sequence[Point], axis: Axis, *, goal: str) -> tuple[Point, ...]:
    """The complete points that no other one beats in both: more removed, and the better mean on held-out data.

    Without held-out data the test data stand in: a front chooses nothing. In the order of what was removed.
    """
    sign = 1.0 if goal == "max" else -1.0
    every = [
        (p.removed[axis], sign * quality(p), p) for p in points if p.complete and axis in p.removed and _counts(p, axis)
    ]
    every.sort(key=lambda t: (-t[0], -t[1]))
    front: list[Point] = []
    best = -math.inf
    for _, good, point in every:
        if good > best:
            front.append(point)
            best = good
    return tuple(reversed(front))


def _counts(what: Point | Line, axis: Axis) -> bool:
    """Whether it is a reduction of its own on this axis."""
    return not what.codes or axis in _SAVED_BY_CODES


def quality(point: Point) -> float:
    """Mean over seeds on held-out data, or on test data where there are none."""
    return float(np.mean([*(point.held_out or point.test).values()]))


# ---------------------------------------------------------------------------------------------------------- sweet spot


def sweet_spot(found: Sequence[Line], axis: Axis, *, limit: float | None, unit: str = "") -> SweetSpot:
    """The rule on all lines that prune, on held-out data. Points where a seed has no result, or where nothing left, are not chosen.

    With `limit`: the largest reduction whose one-sided 95 % bound on the loss is at most that; of equal ones the one that loses less.
    Without: the point farthest above the chord of the mean curve, from the dense model to the point with most removed,
    both axes scaled to 0–1; a point below the chord is no sweet spot, and where none lies above it the one with most removed is, if its
    mean loses nothing. With several lines the curve is their joint front, since a
    chord of each line's own would favour the line that collapses.
    """
    rule: Literal["limit", "chord"] = "chord" if limit is None else "limit"
    own: list[tuple[Line, Point]] = []
    dense, seen = None, 0
    for line in found:
        points = [p for p in line.points if p.complete and axis in p.removed and p.loss]
        if line.kind in CONTROLS or not _counts(line, axis):
            continue
        if not line.codes:
            if len(points) < 2 or points[0].kind != "base":
                continue
            dense, *points = points  # in codes it is a choice
        seen += bool(points)
        own += [(line, p) for p in points if p.removed[axis] > 0]
    at = None
    if dense is not None and own:
        points = [dense, *(p for _, p in own)]
        x = np.asarray([p.removed[axis] for p in points])
        loss = np.asarray([[p.loss[seed] for seed in dense.seeds] for p in points])
        at = _chosen(x, loss, limit, joint=seen > 1)
    if at is None:
        nothing = _nothing(seen, found, axis, limit, unit, slower=not own)
        return SweetSpot(rule=rule, axis=axis, line="", point=None, removed=None, low=None, high=None, sentence=nothing)
    low, high = _spread(x, loss, limit, joint=seen > 1)
    line, point = own[at - 1]
    return SweetSpot(
        rule=rule, axis=axis, line=line.name, point=point, removed=float(x[at]), low=low, high=high,
        sentence=_why(line, point, axis, loss[at], (low, high), limit, unit, joint=seen > 1, ends=loss[at].mean() <= 1e-9 and x[at] == x.max()),
    )  # fmt: skip


def _chosen(x: Floats, loss: Floats, limit: float | None, *, joint: bool) -> int | None:
    """Index of the point that the rule takes; `loss` is [points, seeds], the first point is the dense model."""
    means = loss.mean(axis=1)
    if limit is not None:
        order = sorted(range(1, len(x)), key=lambda i: (-round(float(x[i]), 9), means[i]))
        return next((i for i in order if means[i] <= limit + 1e-9 and _within(loss[i], limit)), None)
    if float(np.ptp(means)) == 0.0:
        return int(np.argmax(x))
    curve = _front(x, means) if joint else np.arange(len(x))
    distances = chord_distances(x[curve], -means[curve])
    best = int(np.argmax(distances))
    if distances[best] > 0:
        return int(curve[best])
    last = int(curve[np.argmax(x[curve])])
    return last if means[last] <= 1e-9 else None  # most removed and nothing lost: that lies on the chord, as its end


def _front(x: Floats, means: Floats) -> NDArray[np.int64]:
    """The dense model and every point that no other one beats: as much removed and as little lost, and more of one."""
    kept, least = [], math.inf
    for i in sorted(range(1, len(x)), key=lambda i: (-x[i], means[i])):
        if means[i] < least:
            kept.append(i)
            least = float(means[i])
    return np.asarray([0, *reversed(kept)], dtype=np.int64)


def _within(loss: Floats, limit: float) -> bool:
    most = upper_bound([*map(float, loss)])
    return most is not None and most <= limit + 1e-9


def _spread(x: Floats, loss: Floats, limit: float | None, *, joint: bool) -> tuple[float | None, float | None]:
    """95 % interval of the chosen reduction: the rule on resampled seeds, 0 where it then chooses nothing."""
    n = loss.shape[1]
    if n < 2:
        return None, None
    picks, weights = resamples(n)
    picks, weights = (picks, weights) if n <= ENUMERATED else (picks[:400], np.full(400, 1 / 400))
    took = []
    for row in picks:
        at = _chosen(x, np.repeat(loss, row.astype(int), axis=1), limit, joint=joint)
        took.append(0.0 if at is None else float(x[at]))
    values = np.asarray(took)
    return -quantile(-values, weights, 0.975), quantile(values, weights, 0.975)


def _nothing(seen: int, found: Sequence[Line], axis: Axis, limit: float | None, unit: str, *, slower: bool) -> str:
    prunes = [line for line in found if line.kind not in CONTROLS]
    if not any(p.loss for line in prunes for p in line.points):
        return "Nothing was chosen: the task has no held-out data (choose_batches), and test data choose nothing."
    if not seen:
        return "Nothing was chosen: no point has a result for every seed."
    if slower:
        return f"Nothing was chosen: no point takes anything off {NOUNS[axis]}."
    if limit is not None:
        seeds = max(len(p.seeds) for line in prunes for p in line.points)
        if seeds < 2:
            return f"Nothing was chosen: with one seed there is no bound on the loss to hold against {told_loss(limit, unit)}."
        return f"Nothing was chosen: no reduction has a loss whose one-sided 95 % bound is within {told_loss(limit, unit)}."
    return "Nothing was chosen: no point lies above the chord, so that every reduction costs at least its share."


def _why(
    line: Line, point: Point, axis: Axis, loss: Floats, spread: tuple[float | None, float | None], limit: float | None, unit: str, *, joint: bool, ends: bool,
) -> str:  # fmt: skip
    most = upper_bound([*map(float, loss)])
    name = line.name if point.amount is not None else f"the dense network, {point.codes},"
    of = "nothing pruned" if point.amount is None else f"the recipe's amount {point.amount:g}"
    where = f"{name} with {point.removed[axis]:.1f} % of {NOUNS[axis]} removed ({of})"
    if spread[0] is None or spread[1] is None:
        interval_of = "no interval: one seed"
    elif spread[1] - spread[0] < 0.05:
        interval_of = f"the rule takes it in nearly every resampling of the {loss.size} seeds"
    else:
        interval_of = f"95 % interval {spread[0]:.1f} to {spread[1]:.1f} % over {loss.size} seeds"
    mean = float(loss.mean())
    lost = f"mean {'gain' if mean < 0 else 'loss'} {told_loss(abs(mean), unit)}"
    if limit is None:
        curve = "the joint front of all lines' mean curves" if joint else "the mean curve"
        why = f"the point farthest above the chord of {curve}, both axes scaled to 0–1"
        if ends:
            why = f"the largest reduction, which lost nothing in the mean; none lies above the chord of {curve}"
        return f"{where}: {why}; {interval_of}; {lost} on held-out data."
    return f"{where}: the largest reduction whose one-sided 95 % bound on the loss, {told_loss(most or 0.0, unit)}, is within {told_loss(limit, unit)}; {interval_of}; {lost} on held-out data."


NOUNS: dict[Axis, str] = {
    "sparsity": "the weights",
    "parameters": "the parameters",
    "bytes": "the file's bytes",
    "macs": "the MACs",
    "latency": "the latency",
}
"""Axis to what a reduction takes from."""


def told_loss(value: float, unit: str) -> str:
    """A loss with its unit: points with two decimals, whatever else with three digits that count."""
    return f"{value:.{decimals_of(value, unit, 3)}f} {'points' if unit == '%' else unit}".rstrip()


def decimals_of(value: float, unit: str, count: int) -> int:
    """Decimals that show `count` digits that count; two of a figure in %."""
    if unit == "%":
        return 2
    return min(max(count - 1 - math.floor(math.log10(abs(value))), 0), 12) if value and math.isfinite(value) else 2
