"""allocate: scores, cost and a budget become a Plan. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from paredown.allocate.levels import Levels, Protected, levels, protected
from paredown.allocate.meter import Counts, Floats, Meter, Removed
from paredown.allocate.search import TOLERANCE, Found, Gap, lowest, nearest, ranked, uniform
from paredown.budget import Budget
from paredown.couple.space import Coupling
from paredown.errors import InfeasibleError, NothingToDo, UsageError
from paredown.examine.cost import Cost
from paredown.plan import Plan
from paredown.score.nouns import Scores
from paredown.target.tables import named

Allocation = Literal["uniform", "global"]
_SUPPORTED = ("channels", "parameters", "macs")


def allocate(
    coupling: Coupling,
    scores: Scores,
    cost: Cost,
    budget: Budget,
    *,
    target: str = "onnxruntime-x86",
    allocation: Allocation = "uniform",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    floor: float = 0.1,
    align: int | None = None,
    normalize: Literal["mean", "max", "none"] = "mean",
) -> Plan:
    """Choose which units stay so that the budget is hit within 1 % of the dense amount.

    "uniform" keeps one ratio of every space, "global" removes the lowest normalised scores of the whole model. Kept
    channels are a multiple of `align` (default: the target's alignment; 1 turns it off), at least `floor` × units and
    never 0. Budget(channels=r) with "uniform" keeps r of every space, rounded. `include` and `exclude` are patterns
    (fnmatch) on parameter, module and space names; exclude wins. Of equal scores the lower index leaves first.

    `Plan.made_by` says what was asked and reached, and `blocked_by` where the nearest reachable amount is further off.
    A budget that is already met gives a plan that keeps everything, with made_by["already_met"].
    Raises UsageError (patterns, options), NothingToDo (no free unit; with the reasons) and InfeasibleError (the budget
    is out of reach at the floor; `.nearest` is the plan that comes nearest).

    >>> import torch, paredown.program; from torch import nn; from paredown.couple import couple
    >>> from paredown.examine import examine; from paredown.score import score
    >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    >>> program = paredown.program.capture(net, torch.zeros(2, 3, 8, 8))
    >>> coupling = couple(program)
    >>> plan = allocate(coupling, score(program, coupling), examine(program), Budget(channels=0.5))
    >>> len(plan.keep["0.weight"][0])
    8
    """
    given = _checked(coupling, scores, budget, allocation, floor)
    align = named(target).alignment if align is None else align
    if isinstance(align, bool) or not isinstance(align, int) or align < 1:
        msg = f"align must be an integer ≥ 1. Got {align!r}. 1 turns it off."
        raise UsageError(msg)
    guard = protected(coupling, cost, include, exclude)
    meter = Meter(coupling, cost)
    made: dict[str, Any] = {
        "verb": "allocate",
        **_scored(scores, allocation, normalize),
        "budget": dict(given),
        "target": target,
        "align": align,
        "floor": floor,
        "include": list(include),
        "exclude": list(exclude),
        "precedence": "exclude wins over include",
        "protected": list(guard.names),
        "dense": {"parameters": meter.parameters, "macs": meter.macs},
    }
    gap = _gap(coupling, meter, given)
    channels = given.get("channels")
    if _is_met(gap, meter, channels):
        reached = {"parameters": meter.parameters, "macs": meter.macs}
        return Plan(keep={}, made_by={**made, "already_met": True, "reached": reached})
    allowed = [
        np.array([len(s)]) if s.name in guard.names else levels(s, align=align, floor=floor) for s in coupling.spaces
    ]
    if not any(len(a) > 1 for a in allowed):
        raise NothingToDo(_nothing(coupling, guard, exclude))
    comparable = scores.normalized(normalize)
    found = _found(coupling, allowed, meter, gap, comparable, allocation, given)
    removed = [lowest(comparable, s.name, int(len(s) - k)) for s, k in zip(coupling.spaces, found.counts, strict=True)]
    plan = _plan(coupling, cost, meter, removed, {**made, **_blocked(coupling, found)})
    exactly_asked = "channels" in given and allocation == "uniform"
    if not exactly_asked and found.gap > TOLERANCE and (found.counts == [a[0] for a in allowed]).all():
        raise InfeasibleError(_infeasible(given, plan, floor, guard), nearest=plan)
    if not plan.keep:
        reason = (
            f"the smallest step is too large: {plan.made_by.get('blocked_by') or 'alignment and floor leave no room'}"
        )
        msg = f"a plan must remove something. Got {given}, to which keeping all channels is nearest; {reason}."
        raise NothingToDo(msg, nearest=plan)
    return plan


def predict(coupling: Coupling, cost: Cost, plan: Plan) -> tuple[int, int]:
    """Parameters and MACs (one sample) after a plan, exactly, without carrying it out.

    >>> from paredown.couple.space import Coupling
    >>> cost = Cost(macs=8, parameters=4, parameter_bytes=16, activation_bytes=0, peak_activation_bytes=0, by_node=())
    >>> predict(Coupling(spaces=(), pinned=(), unknown_ops={}), cost, Plan(keep={}))
    (0, 8)
    """
    removed = []
    for space in coupling.spaces:
        leaving = np.zeros(len(space), dtype=np.bool_)
        for f in space.footprints:
            kept = plan.keep.get(f.parameter, {}).get(f.axis)
            if kept is not None:
                leaving |= ~np.isin(f.indices, np.array(kept)).all(axis=1)
        removed.append(leaving)
    return Meter(coupling, cost).exact(removed)


# ------------------------------------------------------------------------------------------------------------- inputs


def _scored(scores: Scores, allocation: Allocation, normalize: str) -> dict[str, Any]:
    """Where the ranking comes from, for the plan's provenance."""
    made = {
        "criterion": scores.criterion,
        "criterion_options": dict(scores.options),
        "seed": scores.seed,
        "allocation": allocation,
    }
    return {**made, "normalize": normalize} if allocation == "global" else made


def _checked(
    coupling: Coupling, scores: Scores, budget: Budget, allocation: str, floor: float
) -> dict[str, float | int]:
    given = budget.given()
    other = [n for n in given if n not in _SUPPORTED]
    if other or not given:
        msg = f"a budget for channels must give one of {', '.join(_SUPPORTED)}. Got {', '.join(other) or 'none'}."
        raise UsageError(msg)
    if "channels" in given and len(given) > 1:
        msg = f"budget.channels must stand alone. Got it with {', '.join(n for n in given if n != 'channels')}."
        raise UsageError(msg)
    if allocation not in ("uniform", "global"):
        msg = f"allocation must be 'uniform' or 'global'. Got {allocation!r}."
        raise UsageError(msg)
    if allocation == "global" and isinstance(given.get("channels"), int):
        msg = (
            f"budget.channels must be a fraction with global allocation. Got {given['channels']!r}, which is per space."
        )
        raise UsageError(msg)
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor < 1:
        msg = f"floor must be a fraction in [0, 1). Got {floor!r}. It is the least share of a space that stays."
        raise UsageError(msg)
    for space in coupling.spaces:
        values = scores.by_space.get(space.name)
        if values is None or len(values) != len(space):
            got = "none" if values is None else f"{len(values)}"
            msg = f"scores must fit the coupling: {len(space)} for {space.name}. Got {got}. Score this coupling again."
            raise UsageError(msg)
    return given


def _is_met(gap: Gap, meter: Meter, channels: float | int | None) -> bool:
    if channels is None:
        return float(gap(meter.units)) <= 0
    return isinstance(channels, int) and bool((meter.units <= channels).all())


def _gap(coupling: Coupling, meter: Meter, given: Mapping[str, float | int]) -> Gap:
    """How far above the budget, as a fraction of the dense amount: the worst of those given."""
    width = np.array([s.width for s in coupling.spaces], dtype=np.float64)
    dense = {"parameters": meter.parameters, "macs": meter.macs, "channels": float(width @ meter.units)}
    goals = {n: v / max(dense[n], 1) if isinstance(v, int) else v for n, v in given.items()}

    def gap(counts: NDArray[np.int64]) -> Floats:
        parts = []
        amounts = meter.of(counts) if "channels" not in goals else None
        for name, goal in goals.items():
            if amounts is None:
                parts.append(counts @ width / max(dense["channels"], 1) - goal)
            else:
                parts.append(amounts[..., 0 if name == "parameters" else 1] / max(dense[name], 1) - goal)
        return np.asarray(np.max(parts, axis=0))

    return gap


# ------------------------------------------------------------------------------------------------------------- search


def _found(
    coupling: Coupling,
    allowed: Sequence[Levels],
    meter: Meter,
    gap: Gap,
    comparable: Mapping[str, Floats],
    allocation: Allocation,
    given: Mapping[str, float | int],
) -> Found:
    least: Counts = np.array([a[0] for a in allowed])
    if allocation == "uniform" and "channels" in given:
        share = given["channels"]
        wanted = np.minimum(share, meter.units) if isinstance(share, int) else np.round(share * meter.units, 9)
        counts = nearest(allowed, wanted.astype(np.float64))
        return Found(counts=counts, gap=0.0)
    if float(gap(least)) > 0:  # even the floor is above the budget
        return Found(counts=least, gap=float(gap(least)))
    if allocation == "uniform":
        return uniform(allowed, meter.units, gap)
    return ranked(allowed, meter.units, gap, [comparable[s.name] for s in coupling.spaces])


def _blocked(coupling: Coupling, found: Found) -> dict[str, Any]:
    if found.blocked_by is None:
        return {}
    number, step, change = found.blocked_by
    space = coupling.spaces[number]
    text = f"one step of {space.name} ({step} of {len(space)} units) changes {100 * change:.1f} % of the dense amount"
    return {"blocked_by": text}


# --------------------------------------------------------------------------------------------------------------- plan


def _plan(coupling: Coupling, cost: Cost, meter: Meter, removed: Removed, made: dict[str, Any]) -> Plan:
    """Kept positions of every axis that changes; spaces that share an axis are merged."""
    gone: dict[tuple[str, int], list[NDArray[np.int64]]] = {}
    for space, leaving in zip(coupling.spaces, removed, strict=True):
        if leaving.any():
            for f in space.footprints:
                gone.setdefault((f.parameter, f.axis), []).append(f.indices[leaving].ravel())
    shapes = {**cost.buffer_shapes, **cost.parameter_shapes}
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, axis), parts in gone.items():
        stays = np.ones(shapes[name][axis], dtype=np.bool_)
        stays[np.concatenate(parts)] = False
        keep.setdefault(name, {})[axis] = tuple(np.flatnonzero(stays).tolist())
    parameters, macs = meter.exact(removed)
    widths = [s.width for s in coupling.spaces]
    channels = sum(int((~r).sum()) * w for r, w in zip(removed, widths, strict=True))
    total = sum(len(r) * w for r, w in zip(removed, widths, strict=True))
    made["asked"] = _asked(made["budget"], meter, total)
    made["reached"] = {"parameters": parameters, "macs": macs, "channels": channels, "of_channels": total}
    return Plan(keep=keep, made_by=made)


def _asked(given: Mapping[str, float | int], meter: Meter, channels: int) -> dict[str, int]:
    dense = {"parameters": meter.parameters, "macs": meter.macs, "channels": channels}
    return {n: v if isinstance(v, int) else round(v * dense[n]) for n, v in given.items()}


def _infeasible(given: Mapping[str, float | int], plan: Plan, floor: float, guard: Protected) -> str:
    asked, reached = plan.made_by["asked"], plan.made_by["reached"]
    name = max(given, key=lambda n: reached[n] / max(asked[n], 1))
    because = f"floor={floor} and alignment to {plan.made_by['align']}"
    because += f", {len(guard.names)} protected spaces" if guard.names else ""
    fix = "Lower the floor, exclude less, or ask for more"
    return f"{name} must be reducible to {asked[name]:,}. Got {reached[name]:,} at the least ({because}). {fix}."


def _nothing(coupling: Coupling, guard: Protected, exclude: Sequence[str]) -> str:
    if guard.everything:
        return f"a plan must have something to remove. Got patterns that protect every space: {', '.join(exclude) or 'include'}."
    reasons: Counter[str] = Counter()
    for pin in coupling.pinned:
        reasons[f"{pin.reason} at {pin.where}"] += pin.units
    listed = "; ".join(f"{units} units: {reason}" for reason, units in reasons.most_common(10))
    small = "every space is at its floor or alignment" if coupling.spaces else "no unit is free"
    return f"a plan must have something to remove. Got a model where {small}. {listed or 'It has no prunable layer'}."
