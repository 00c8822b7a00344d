"""What the first section of a curve's page answers in words, and what a reader must know before relying on it."""

from __future__ import annotations

import numpy as np

from paredown.controls import Comparison
from paredown.curve import CONTROLS, Point
from paredown.report.curve_view import CurveView
from paredown.report.reading import entry, figure, mapping, number
from paredown.report.wording import quantity

_HOLDS = {2: "one time in two", 3: "three times in four", 4: "seven times in eight"}
"""Seeds to how often their range holds the true mean: 1 - 2 / 2^n, where values fall on either side of it alike."""
APART = 3.0
"""Times the limit by which the dense networks of the seeds differ where it is told."""
_OF = {"channels": "channels", "parameters": "parameters", "macs": "MACs", "density": "weights"}
_SCHEDULES = {
    "one-shot": "everything leaves at once, then the recovery",
    "multi-level": "in two levels, a part of the recovery after each",
    "iterative": "in rounds, a part of the recovery after each",
    "gradual": "masks that tighten during the training",
    "lottery": "in rounds, each from the early weights again",
    "rigl": "masks that move during the training, by gradients",
    "set": "masks that move during the training, at random",
    "from-scratch": "chosen on fresh weights, trained as long as base and recovery together",
}


def dense_answer(seen: CurveView) -> str:
    """The answer to "would a smaller dense network have done as well?" in a few words; "" where no control was asked for.

    It stands on the dense controls at the sweet spot that compare, not on the random criterion, which is no dense network.
    """
    dense = [c for c in seen.comparisons if c.control != "random"]
    if not dense:
        return "Not tested." if seen.comparisons else ""
    there = [c for c in dense if _at_spot(seen, c)]
    fair = [c for c in there if c.comparable]
    if not there:
        return (
            "Not tested at the sweet spot." if seen.spot.point is not None else "There is no sweet spot to ask it of."
        )
    if not fair:
        return "Not answered: no dense network here compares."
    if any(c.gain.low is None for c in fair):
        return "Not told: one seed has no interval."
    if any(c.gain.high is not None and c.gain.high < 0 for c in fair):
        return "Yes: a dense one is better."
    if any(c.gain.low is not None and c.gain.low <= 0 for c in fair):
        return "No difference shows."
    kinds = sorted({c.control for c in fair})
    return "No: pruning is better." if len(kinds) > 1 else f"Not {CONTROLS[kinds[0]]}: pruning is better."


def not_tested(seen: CurveView) -> list[str]:
    """What this page says nothing of, for whoever reads its first lines alone."""
    codes = any(line.codes for line in seen.lines)
    found = [] if codes else ["quantized files, such as INT8 (curve.quantized)"]
    if not any("latency" in p.absolute for p in seen.points):
        found.append("latency (curve.latency)")
    if len({r.cell.get("seed") for r in seen.trials}) < 2:
        found.append("other seeds, so that nothing here has an interval (curve.seeds)")
    found += _controls_not_tested(seen)
    if (most := _largest_tried(seen)) is not None:
        found.append(f"more than {most:.1f} % removed, the most that was tried (curve.amounts)")
    if seen.failed:
        found.append(f"{len(seen.failed)} of {number(entry(seen.head, 'cells')) or 0} trials, which have no result")
    return [*found, "other devices and runtimes", "disturbed inputs, and for whom the metric changed (compress)"]


def _largest_tried(seen: CurveView) -> float | None:
    """What the chosen point removes, where a limit chose it and nothing that takes out more was tried; None elsewhere."""
    spot = seen.spot
    if spot.rule != "limit" or spot.point is None or spot.removed is None or spot.point.kind == "base":
        return None
    tried = [p.removed[seen.axis] for p in seen.points if seen.axis in p.removed and p.kind not in CONTROLS]
    amounts = [p.amount for p in seen.points if p.kind not in CONTROLS and p.failed and p.amount is not None]
    if spot.point.amount is not None and any(amount < spot.point.amount for amount in amounts):
        return None  # more was tried, and has no result
    return spot.removed if spot.removed >= max(tried) - 0.05 else None


def _controls_not_tested(seen: CurveView) -> list[str]:
    """Controls without a result, at all or where it matters."""
    kinds = {c.control for c in seen.comparisons}
    missing = [CONTROLS[kind] for kind in ("scratch", "thin", "random") if kind not in kinds]
    chosen = seen.spot.point
    if chosen is None or chosen.kind != "pruned" or not kinds or any(_at_spot(seen, c) for c in seen.comparisons):
        return missing
    return [*missing, f"all controls at the sweet spot, {chosen.amount:g} (sweet-spot in curve.controls.amounts)"]


def _at_spot(seen: CurveView, found: Comparison) -> bool:
    return seen.spot.point is not None and (found.line, found.amount) == (seen.spot.line, seen.spot.point.amount)


def doubts(seen: CurveView) -> list[str]:
    """What makes the figures weaker than they look: few seeds, and held-out data that the dense model knows from its training."""
    found = []
    if few := few_seeds(max((len(p.seeds) for p in seen.points), default=0)):
        found.append(few)
    if apart := _dense_apart(seen):
        found.append(apart)
    if known := _seen_before(seen):
        found.append(known)
    return found


def _dense_apart(seen: CurveView) -> str:
    """That the dense networks of the seeds differ by much more than a pruned one may lose: one that learnt little has little to lose."""
    base = next((p for p in seen.points if p.kind == "base" and not p.codes), None)
    values = [*base.held_out.values()] if base is not None else []
    if not seen.limit or len(values) < 2 or max(values) - min(values) <= APART * seen.limit:
        return ""
    unit = seen.metric["unit"]
    ends = sorted(values, reverse=seen.metric["goal"] == "min")
    return (
        f"The dense networks of the seeds reach from {quantity(ends[0], unit)} to {quantity(ends[-1], unit)} on held-out data, which is far more than what a pruned "
        "one may lose: one that learnt little has little to lose, and makes the mean loss look small. Train the base longer, or leave that seed out (curve.seeds)."
    )


def few_seeds(count: int) -> str:
    """What an interval over so few seeds is worth; "" for five and more, and for one, which has none."""
    if count not in _HOLDS:
        return ""
    return (
        f"{count} seeds: an interval called 95 % is then the range of the seeds, which holds the true mean about {_HOLDS[count]}; "
        "that of five seeds holds it more than nine times in ten (curve.seeds)."
    )


def _seen_before(seen: CurveView) -> str:
    """Where the base came trained and is better on held-out data than on test data, beyond both intervals."""
    sign = 1 if seen.metric["goal"] == "max" else -1
    for record in seen.trials:
        if record.cell["kind"] != "base" or entry(record, "trained_here") is not False:
            continue
        held, test = figure(record, "held_out"), figure(record, "metric")
        if held.value is None or test.value is None or None in (held.low, held.high, test.low, test.high):
            continue
        apart = held.low > test.high if sign > 0 else held.high < test.low  # type: ignore[operator]
        if apart:
            unit = seen.metric["unit"]
            said = (
                f"The dense network came trained, and seems to have been trained on the held-out data: {quantity(held.value, unit)} there, "
                f"{quantity(test.value, unit)} on test data. What is lost on held-out data, by which the choice is made, "
                "is then not what is lost on new data"
            )
            return f"{said}{_lost_twice(seen, sign)}."
    return ""


def _lost_twice(seen: CurveView, sign: int) -> str:
    """Both losses of the chosen point."""
    point, base = seen.spot.point, next((p for p in seen.points if p.kind == "base" and not p.codes), None)
    if point is None or base is None or not point.loss or not point.test or not base.test:
        return ""
    unit = seen.metric["unit"]
    losses = (
        float(np.mean([*point.loss.values()])),
        sign * float(np.mean([*base.test.values()]) - np.mean([*point.test.values()])),
    )
    told = [f"{v:.2f} points".replace("-", "−") if unit == "%" else quantity(v, unit) for v in losses]
    return f" (here {told[0]} and, on test data, {told[1]})"


def amounts_of(seen: CurveView) -> str:
    """What the recipe's amounts are shares of, as "MACs"; "" where the records do not say, or say several things."""
    found = {
        key
        for r in seen.trials
        if r.cell["kind"] == "pruned" and r.cell["schedule"] == "one-shot"
        for key in mapping(mapping(entry(r, "reached")).get("budget"))
    }
    return _OF.get(found.pop(), "") if len(found) == 1 else ""


def told_amount(seen: CurveView, amount: float) -> str:
    """An amount of the recipe in words."""
    of = amounts_of(seen)
    return f"{amount:g} of the {of} remain, by the recipe" if of else f"amount {amount:g} in the recipe"


def schedules(seen: CurveView) -> list[tuple[str, str]]:
    """(schedule, what it does) of the lines that are there, in their order."""
    names = dict.fromkeys(line.schedule for line in seen.lines if line.kind not in CONTROLS)
    return [(name, _SCHEDULES[name]) for name in names if name in _SCHEDULES]


def of_this_file(seen: CurveView, point: Point, seed: int) -> str:
    """What the file of a seed has on test data: the figures above are means over seeds."""
    own = number(point.test.get(seed))
    if own is None or len(point.seeds) < 2:
        return ""
    unit = seen.metric["unit"]
    bases = next((p.test for p in seen.points if p.kind == "base" and not p.codes), {})
    dense = number(bases.get(seed))
    itself = point.kind == "base" and not point.codes
    beside = "" if dense is None or itself else f" (the dense network of this seed {quantity(dense, unit)})"
    return f"{quantity(own, unit)} on test data{beside}; the figures above are means over {len(point.seeds)} seeds"
