"""Controls: the dense question. What pruning bought over its controls, seed by seed, on test data.

A control stands beside the pruned points of its amount: the same shape from scratch, a uniformly thinner dense network at equal
MACs, a random criterion. It follows one way of pruning; where it is not the point's own, it compares only if its shape does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paredown.curve import CONTROLS, Interval, Line, Point, SweetSpot, decimals_of, interval, told_loss

ALIKE = 0.05
"""Share by which MACs may differ in a comparison."""
EVEN = 0.85
"""Of an interval whose shorter side is at least this share of its longer one "± its longer side" is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A pruned point against a control at the same amount, on test data; `gain` is positive where pruning is better."""

    line: str
    amount: float
    control: str
    gain: Interval
    comparable: bool
    why: str
    """Why not, where it is not."""
    own: bool = True
    """Whether the control follows the point's own way of pruning, has its shape, or is of no way's shape."""
    same_as: str = ""
    """Another control that is the same network."""
    shape_of: str = ""
    """The way of pruning whose shape a control from scratch has, where it is not the point's own."""
    held_out_of_control: float | None
    sentence: str


def compared(found: Sequence[Line], *, goal: str, unit: str = "") -> tuple[Comparison, ...]:
    """Every complete pruned point against every control at its amount, seed by seed, on test data; where a kind has several
    there, against that of its own way."""
    controls: dict[tuple[str, float | None, str], list[Point]] = {}
    for control in (p for line in found if line.kind in CONTROLS for p in line.points if p.kind != "base"):
        controls.setdefault((control.kind, control.amount, control.codes), []).append(control)
    dense = next((p for line in found for p in line.points if p.kind == "base"), None)
    out = []
    for line in found:
        if line.kind != "pruned":
            continue
        for point in line.points:
            for kind in CONTROLS:
                there = [c for c in controls.get((kind, point.amount, point.codes), ()) if c.complete]
                there.sort(key=lambda c: (c.method, c.schedule) != (line.method, line.schedule))
                if point.amount is not None and there and point.complete:
                    out.append(_comparison(line, point, there[0], dense, goal, unit))
    return tuple(out)


def _comparison(line: Line, point: Point, control: Point, dense: Point | None, goal: str, unit: str) -> Comparison:
    sign = 1.0 if goal == "max" else -1.0
    gain = interval([sign * (point.test[s] - control.test[s]) for s in point.seeds if s in control.test])
    # Controls are those of one way of pruning: another way may leave another shape at the same amount.
    of = f"{control.method} {control.schedule}"
    same_shape = len(point.shapes) == 1 and control.shapes == point.shapes
    alike = control.kind == "scratch" and same_shape
    other = (control.method, control.schedule) != (line.method, line.schedule) and not alike
    why = control.not_comparable
    if not why and other and control.kind != "thin":  # thin has equal MACs, and no line's shape
        why = f"it has the shape of {of}" if control.kind == "scratch" else f"it was pruned and trained like {of}"
    if not why:
        why = _other_macs(control.effective_macs, point.effective_macs)
    whole = None if dense is None or dense.steps is None or point.steps is None else dense.steps + point.steps
    if not why and control.kind != "random" and whole and control.steps and control.steps < (1 - ALIKE) * whole:
        why = f"it was trained for {control.steps:,.0f} steps, base and recovery together for {whole:,.0f}"
    held_out = float(np.mean([*control.held_out.values()])) if control.held_out else None
    shape_of = of if other and control.kind == "scratch" else ""
    assert point.amount is not None
    return Comparison(
        line=line.name, amount=point.amount, control=control.kind, gain=gain, comparable=not why, why=why,
        own=not other or control.kind == "thin",
        same_as=control.same_as if same_shape or not other else "", shape_of=shape_of, held_out_of_control=held_out,
        sentence=_verdict(control.kind, gain, why, shape_of, unit),
    )  # fmt: skip


def _other_macs(control: float, pruned: float) -> str:
    """How the MACs of a control differ, where they do; a network of tables that are looked up has none."""
    if pruned == 0:
        return "the pruned model has no MACs, and it has" if control else ""
    apart = control / pruned - 1
    return f"its MACs are {100 * apart:+.0f} % of the pruned model's" if abs(apart) > ALIKE else ""


def _verdict(kind: str, gain: Interval, why: str, shape_of: str, unit: str) -> str:
    """ "pruning bought 1.2 ± 0.4 points over an equal dense model", or that it did not; of what does not compare, no claim."""
    rival = {
        "scratch": f"the {f'shape of {shape_of}' if shape_of else 'same shape'} trained from scratch",
        "thin": "a uniformly thinner dense model at equal MACs",
        "random": "pruning by a random criterion",
    }[kind]
    if why and kind == "thin":
        rival = "a uniformly thinner dense model"  # its MACs may be the reason
    subject = "the criterion" if kind == "random" else "pruning"
    if gain.low is None or gain.high is None:
        how = "with one seed: no interval is available"
        if why:
            said = told_loss(gain.mean, unit).replace("-", "−")
            return f"not comparable ({why}): the difference to {rival} is {said} (positive is in favour of {subject}; {how})."
        better = "better" if gain.mean >= 0 else "worse"
        return f"{subject} was {told_loss(abs(gain.mean), unit)} {better} than {rival}, {how}."
    said, n = _with_interval(gain.mean, gain.low, gain.high, gain.n, unit)
    if why:
        return f"not comparable ({why}): the difference to {rival} is {said} (positive is in favour of {subject}; {n})."
    if gain.low > 0:
        return f"{subject} bought {said} over {rival} ({n})."
    if gain.high < 0:
        said, n = _with_interval(-gain.mean, -gain.high, -gain.low, gain.n, unit)
        return f"{subject} bought nothing: it was {said} worse than {rival} ({n})."
    return f"{subject} did not buy anything that shows over {rival}: {said} ({n})."


def _with_interval(mean: float, low: float, high: float, seeds: int, unit: str) -> tuple[str, str]:
    """(figure, its interval): a bootstrap interval is seldom even, and ± of its longer side reaches where it does not.

    >>> _with_interval(1.2, 0.8, 1.6, 3, "%"), _with_interval(-5.49, -13.91, 5.93, 5, "g")
    (('1.20 ± 0.40 points', '95 % interval over 3 seeds'), ('−5.5 g', '95 % interval −13.9 to 5.9 g over 5 seeds'))
    """
    below, above = mean - low, high - mean
    half, unit_said = max(below, above), "points" if unit == "%" else unit
    decimals = decimals_of(half or mean, unit, 2)
    if min(below, above) >= EVEN * half:
        said = f"{mean:.{decimals}f} ± {half:.{decimals}f} {unit_said}"
        return said.rstrip().replace("-", "−"), f"95 % interval over {seeds} seeds"
    decimals = max(decimals, decimals_of(mean, unit, 2))
    of = f"95 % interval {low:.{decimals}f} to {high:.{decimals}f} {unit_said}".rstrip()
    return f"{mean:.{decimals}f} {unit_said}".rstrip().replace("-", "−"), f"{of} over {seeds} seeds".replace("-", "−")


def dense_verdict(spot: SweetSpot, comparisons: Sequence[Comparison], *, goal: str) -> str:
    """The sentences of `dense_parts`, as one text."""
    return " ".join(text for text, _ in dense_parts(spot, comparisons, goal=goal))


def dense_parts(spot: SweetSpot, comparisons: Sequence[Comparison], *, goal: str) -> tuple[tuple[str, bool], ...]:
    """(sentence, whether what it says compares) at the sweet spot: against the better of the two dense controls, by held-out
    data, a comparable one before one that is not; then the others.

    Where no control stands at its amount, the nearest amount with one is told, and the smallest where nothing was chosen; that is said.
    """
    if not comparisons:
        return (("Not tested: no dense control has a result beside a pruned model.", True),)
    at = spot.point.amount if spot.point is not None else None
    own = [c for c in comparisons if c.amount == at and c.line == spot.line]
    where = f"At the sweet spot ({at:g} remains, {spot.line})" if own else ""
    if not own:
        last = min(
            comparisons, key=lambda c: (False, c.amount) if at is None else (c.line != spot.line, abs(c.amount - at))
        )
        own = [c for c in comparisons if c.amount == last.amount and c.line == last.line]
        why = "nothing was chosen" if at is None else f"no control stands at {at:g}"
        if spot.point is not None and spot.point.kind == "from-scratch":
            why = f"the sweet spot, {at:g} of {spot.line}, is itself trained from scratch"
        if spot.point is not None and spot.point.kind == "base":
            why = "the sweet spot prunes nothing"
        where = f"At {last.amount:g} of {last.line} ({why})"
    sign = 1.0 if goal == "max" else -1.0
    told = [c for c in own if not c.same_as]
    told.sort(
        key=lambda c: (
            c.control == "random",
            not c.comparable,  # a claim that holds before a figure that claims nothing
            -sign * (c.held_out_of_control if c.held_out_of_control is not None else -math.inf),
        )
    )
    first, *others = told
    parts = [(f"{where}, {first.sentence}", first.comparable)]
    if len(told) < len(own):
        parts.append(("A uniformly thinner dense model at equal MACs has that very shape.", True))
    if first.control == "random":
        parts.append(("Not tested: no dense control has a result there.", True))
    return (*parts, *((f"{c.sentence[0].upper()}{c.sentence[1:]}", c.comparable) for c in others))
