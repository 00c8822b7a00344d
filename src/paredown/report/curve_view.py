"""A curve as its records have it: lines, the choice, what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paredown.controls import Comparison, compared, dense_verdict
from paredown.curve import AXES, Axis, Line, Point, SweetSpot, lines, pareto, sweet_spot
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

    def shipped(self, point: Point) -> tuple[int, str, int]:
        """(seed, digest, of how many): the file that stands for a point, the best one on held-out data, so that test data choose nothing;
        the first where there are none, (0, "", 0) where there is no file."""
        if not point.digests:
            return 0, "", 0
        sign = 1.0 if self.metric["goal"] == "max" else -1.0
        known = [(sign * point.held_out[s], -at) for at, s in enumerate(point.seeds) if s in point.held_out]
        at = -max(known)[1] if known else 0
        return point.seeds[at], point.digests[at], len(known)


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
        _refuse_lost(found)
        spot = sweet_spot(found, axis, limit=limit, unit=unit)
        comparisons = compared(found, goal=goal, unit=unit)
        every = {id(p): p for line in found for p in line.points}  # a random choice too, where it wins
        return CurveView(
            head=head, trials=tuple(trials), metric=metric, axis=axis, limit=limit, failed=failed, lines=found, spot=spot,
            comparisons=comparisons, verdict=dense_verdict(spot, comparisons, goal=goal),
            front=pareto([*every.values()], axis, goal=goal),
        )  # fmt: skip
    except RejectedError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        msg = f"every record of a curve must be one of a trial. Got {type(error).__name__}: {text(error)}. Was records.jsonl edited?"
        raise RejectedError(msg) from error


def _refuse_lost(found: Sequence[Line]) -> None:
    """A seed without a record must be told among the failures: else lines of the journal are gone, and means would be of other seeds.

    So must a seed whose figure on held-out data is gone while others have theirs.
    """
    dense = next((p for line in found for p in line.points if p.kind == "base" and not p.codes), None)
    for line in found:
        for point in line.points:
            seeds = {*(dense.seeds if dense else ())}
            lost = sorted((seeds - {*point.seeds}) | (seeds - {*point.loss} if point.loss else set()))
            if point.complete and lost:
                msg = (
                    f"a curve must have a record, or a failure, for every seed. Got none of seed {', '.join(map(str, lost))} for {line.name}, "
                    f"{point.amount:g}. Restore records.jsonl, or run `paredown curve` into the folder again: it writes it anew."
                )
                raise RejectedError(msg)
