"""Units of spaces: how many of each stay, and so which leave physically."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paredown.allocate.amounts import Amounts
from paredown.allocate.levels import Levels, Protected, floors, levels, protected
from paredown.allocate.measured import Losses, by_knapsack, equal_loss, greedy
from paredown.allocate.meter import Counts, Floats, Meter, Removed
from paredown.allocate.request import FIX, MEASURED, Request
from paredown.allocate.search import TOLERANCE, Found, Gap, lowest, nearest, ranked, uniform, within
from paredown.allocate.sensitivity import Latency
from paredown.couple.space import Coupling
from paredown.errors import InfeasibleError, NothingToDo, UsageError, must_be
from paredown.plan import Plan
from paredown.target.tables import named

_SUPPORTED = ("channels", "parameters", "macs", "size_bytes", "latency_ms")
_FLOOR = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A checked request with what follows from it."""

    request: Request
    given: dict[str, float | int]
    guard: Protected
    amounts: Amounts
    gap: Gap
    align: int
    floor: Any

    @property
    def coupling(self) -> Coupling:
        return self.request.coupling

    @property
    def meter(self) -> Meter:
        return self.amounts.meter


def allocate_units(request: Request) -> Plan:
    """A plan of `keep` for a granularity of channels or heads."""
    task = _task(request)
    meter, made = task.meter, _made(task)
    if _is_met(task):
        reached = {"parameters": meter.parameters, "macs": meter.macs}
        return Plan(keep={}, made_by={**made, "already_met": True, "reached": reached})
    least = floors(request.coupling, request.cost, task.floor)
    allowed = [
        np.array([len(s)]) if s.name in task.guard.names else levels(s, align=task.align, floor=least[s.name])
        for s in request.coupling.spaces
    ]
    if not any(len(a) > 1 for a in allowed):
        raise NothingToDo(_nothing(task))
    losses = None
    if request.allocation in MEASURED:
        losses, made = _losses(task, allowed, made)
        allowed = list(losses.allowed)
    comparable = _comparable(task)
    found = _found(task, allowed, comparable, losses)
    removed = [
        lowest(comparable, s.name, int(len(s) - k)) for s, k in zip(request.coupling.spaces, found.counts, strict=True)
    ]
    if losses is not None:
        made["expected_increase"] = float(losses.total(found.counts))
    plan = _plan(task, removed, {**made, **_blocked(request.coupling, found)})
    exactly_asked = "channels" in task.given and request.allocation == "uniform"
    if not exactly_asked and found.gap > TOLERANCE and (found.counts == [a[0] for a in allowed]).all():
        raise InfeasibleError(_infeasible(task, plan), nearest=plan, advice=FIX)
    if not plan.keep:
        reason = (
            f"the smallest step is too large: {plan.made_by.get('blocked_by') or 'alignment and floor leave no room'}"
        )
        msg = f"a plan must remove something. Got {task.given}, to which keeping all channels is nearest; {reason}."
        raise NothingToDo(msg, nearest=plan)
    return plan


# ------------------------------------------------------------------------------------------------------------- inputs


def _task(request: Request) -> _Task:
    given = _checked(request)
    align = named(request.target).alignment if request.align is None else request.align
    if isinstance(align, bool) or not isinstance(align, int) or align < 1:
        msg = f"align must be an integer ≥ 1. Got {align!r}. 1 turns it off."
        raise UsageError(msg)
    guard = protected(request.coupling, request.cost, request.include, request.exclude)
    heads_only = request.granularity.kind == "head"
    if heads_only:
        others = tuple(s.name for s in request.coupling.spaces if s.kind != "head" and s.name not in guard.names)
        guard = Protected(names=guard.names + others, everything=guard.everything)
    competing = [not heads_only or s.kind == "head" for s in request.coupling.spaces]
    amounts = Amounts.of_model(request.coupling, request.cost, competing, _latency(request))
    return _Task(
        request=request,
        given=given,
        guard=guard,
        amounts=amounts,
        gap=amounts.gap(given),
        align=align,
        floor=_FLOOR if request.floor is None else request.floor,
    )


def _latency(request: Request) -> Latency | None:
    if request.latency is None:
        return None
    must_be("latency", request.latency, Latency, Mapping, fix="Give {space: {kept units: ms}}.")
    table = request.latency if isinstance(request.latency, Latency) else Latency(by_space=request.latency)
    table.check({s.name: len(s) for s in request.coupling.spaces})
    return table


def _checked(request: Request) -> dict[str, float | int]:
    given = request.budget.given()
    other = [n for n in given if n not in _SUPPORTED]
    if other or not given:
        hint = " A density is a matter of masks: score with granularity='element'." if "density" in other else ""
        msg = f"a budget for {request.granularity.kind}s must give one of {', '.join(_SUPPORTED)}. Got {', '.join(other) or 'none'}.{hint}"
        raise UsageError(msg)
    if "latency_ms" in given and request.latency is None:
        msg = (
            "budget.latency_ms must come with a table of milliseconds, latency={space: {kept units: ms}}. Got none. "
            "Or give a budget of macs, and measure the exported file."
        )
        raise UsageError(msg)
    if "channels" in given and len(given) > 1:
        msg = f"budget.channels must stand alone. Got it with {', '.join(n for n in given if n != 'channels')}."
        raise UsageError(msg)
    if request.allocation == "erk":
        msg = "allocation 'erk' must be used with masks: it gives densities to layers. Got granularity channel. Take uniform or global."
        raise UsageError(msg)
    if request.scope is not None or request.leave_out or request.normalize == "size":
        name = "scope" if request.scope is not None else "leave_out" if request.leave_out else "normalize 'size'"
        msg = f"{name} must be used with masks. Got it for {request.granularity.kind}s. Protect layers with exclude."
        raise UsageError(msg)
    if request.allocation != "uniform" and isinstance(given.get("channels"), int):
        msg = (
            f"budget.channels must be a fraction with {request.allocation} allocation. Got {given['channels']!r}, "
            "which is per space."
        )
        raise UsageError(msg)
    for space in request.coupling.spaces:
        values = request.scores.by_space.get(space.name)
        if values is None and request.granularity.kind == "head" and space.kind != "head":
            continue
        if values is None or len(values) != len(space):
            got = "none" if values is None else f"{len(values)}"
            msg = f"scores must fit the coupling: {len(space)} for {space.name}. Got {got}. Score this coupling again."
            raise UsageError(msg)
    return given


def _made(task: _Task) -> dict[str, Any]:
    request = task.request
    return request.provenance(
        **({"normalize": request.normalize or "mean"} if request.allocation == "global" else {}),
        target=request.target,
        align=task.align,
        floor=dict(task.floor) if isinstance(task.floor, Mapping) else task.floor,
        protected=list(task.guard.names),
        dense={"parameters": task.meter.parameters, "macs": task.meter.macs},
    )


def _comparable(task: _Task) -> dict[str, Floats]:
    """Scores across spaces; those of spaces that do not compete are zeros, and never read."""
    how = task.request.normalize or "mean"
    assert how != "size"  # refused: units of a space are equal in size
    found = task.request.scores.normalized(how)
    return {s.name: found.get(s.name, np.zeros(len(s))) for s in task.coupling.spaces}


def _is_met(task: _Task) -> bool:
    channels = task.given.get("channels")
    if channels is None:
        return float(task.gap(task.meter.units)) <= 0
    return isinstance(channels, int) and bool((task.meter.units <= channels).all())


def _losses(task: _Task, allowed: Sequence[Levels], made: dict[str, Any]) -> tuple[Losses, dict[str, Any]]:
    """Losses at the allowed counts; raises where no space that may shrink was measured."""
    names = [s.name for s in task.coupling.spaces]
    seen = task.request.table({s.name: len(s) for s in task.coupling.spaces})
    losses = Losses.of(names, allowed, seen)
    unmeasured = [n for n, a, o in zip(names, allowed, losses.allowed, strict=True) if len(a) > 1 and len(o) == 1]
    if not any(len(a) > 1 for a in losses.allowed):
        msg = (
            "sensitivities must cover what may be removed. Got none at a count that alignment and floor allow. "
            "Measure more amounts, or lower align or floor."
        )
        raise NothingToDo(msg)
    return losses, {**made, "unmeasured": unmeasured} if unmeasured else made


# ------------------------------------------------------------------------------------------------------------- search


def _found(task: _Task, allowed: Sequence[Levels], comparable: Mapping[str, Floats], losses: Losses | None) -> Found:
    gap, units, how = task.gap, task.meter.units, task.request.allocation
    least: Counts = np.array([a[0] for a in allowed])
    if how == "uniform" and "channels" in task.given:
        share = task.given["channels"]
        wanted = np.minimum(share, units) if isinstance(share, int) else np.round(share * units, 9)
        counts = nearest(allowed, wanted.astype(np.float64))
        return Found(counts=counts, gap=0.0)
    if float(gap(least)) > 0:  # even the floor is above the budget
        return Found(counts=least, gap=float(gap(least)))
    if losses is not None:
        if how == "sensitivity":
            return equal_loss(losses, gap)
        return greedy(losses, gap) if how == "greedy" else by_knapsack(losses, gap, uniform(allowed, units, gap).counts)
    if how == "uniform":
        found = uniform(allowed, units, gap)
    else:
        found = ranked(allowed, units, gap, [comparable[s.name] for s in task.coupling.spaces])
    # Bytes and milliseconds are bounds that somebody checks; MACs and parameters are amounts to come near to.
    return within(allowed, found, gap) if {"size_bytes", "latency_ms"} & task.given.keys() else found


def _blocked(coupling: Coupling, found: Found) -> dict[str, Any]:
    if found.blocked_by is None:
        return {}
    number, step, change = found.blocked_by
    space = coupling.spaces[number]
    text = f"one step of {space.name} ({step} of {len(space)} units) changes {100 * change:.1f} % of the dense amount"
    return {"blocked_by": text}


# --------------------------------------------------------------------------------------------------------------- plan


def _plan(task: _Task, removed: Removed, made: dict[str, Any]) -> Plan:
    """Kept positions of every axis that changes; spaces that share an axis are merged."""
    coupling, meter = task.coupling, task.meter
    cost = task.request.cost
    keep = kept_positions(coupling, {**cost.buffer_shapes, **cost.parameter_shapes}, removed)
    parameters, macs = meter.exact(removed)
    widths = task.amounts.width.astype(np.int64).tolist()
    channels = sum(int((~r).sum()) * w for r, w in zip(removed, widths, strict=True))
    total = sum(len(r) * w for r, w in zip(removed, widths, strict=True))
    made["asked"] = _asked(task, total)
    counts = np.array([int((~r).sum()) for r in removed], dtype=np.int64)
    estimated = {n: float(task.amounts.at(n, counts)) for n in ("size_bytes", "latency_ms") if n in task.given}
    made["reached"] = {"parameters": parameters, "macs": macs, "channels": channels, "of_channels": total}
    if estimated:
        made["reached"] |= {n: round(v) if n == "size_bytes" else v for n, v in estimated.items()}
        made["estimated"] = sorted(estimated)
    return Plan(keep=keep, made_by=made)


def kept_positions(
    coupling: Coupling, shapes: Mapping[str, tuple[int, ...]], removed: Removed
) -> dict[str, dict[int, tuple[int, ...]]]:
    """`Plan.keep` for the units of each space that leave (shapes [units]); `shapes` are those of all tensors."""
    gone: dict[tuple[str, int], list[NDArray[np.int64]]] = {}
    for space, leaving in zip(coupling.spaces, removed, strict=True):
        if leaving.any():
            for f in space.footprints:
                gone.setdefault((f.parameter, f.axis), []).append(f.indices[leaving].ravel())
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, axis), parts in gone.items():
        stays = np.ones(shapes[name][axis], dtype=np.bool_)
        stays[np.concatenate(parts)] = False
        keep.setdefault(name, {})[axis] = tuple(np.flatnonzero(stays).tolist())
    return keep


def _asked(task: _Task, channels: int) -> dict[str, int | float]:
    dense = {n: channels if n == "channels" else task.amounts.dense(n) for n in task.given}
    return {n: v if isinstance(v, int) or n == "latency_ms" else round(v * dense[n]) for n, v in task.given.items()}


def _infeasible(task: _Task, plan: Plan) -> str:
    asked, reached = plan.made_by["asked"], plan.made_by["reached"]
    name = max(task.given, key=lambda n: reached[n] / max(asked[n], 1e-9))
    because = f"floor={plan.made_by['floor']} and alignment to {task.align}"
    because += f", {len(task.guard.names)} protected spaces" if task.guard.names else ""
    because += ", counts that were measured" if task.request.allocation in MEASURED else ""
    return f"{name} must be reducible to {asked[name]:,}. Got {reached[name]:,} at the least ({because})."


def _nothing(task: _Task) -> str:
    exclude = task.request.exclude
    if task.guard.everything:
        return f"a plan must have something to remove. Got patterns that protect every space: {', '.join(exclude) or 'include'}."
    reasons: Counter[str] = Counter()
    for pin in task.coupling.pinned:
        reasons[f"{pin.reason} at {pin.where}"] += pin.units
    listed = "; ".join(f"{units} units: {reason}" for reason, units in reasons.most_common(10))
    small = "every space is at its floor or alignment" if task.coupling.spaces else "no unit is free"
    if task.request.granularity.kind == "head" and not any(s.kind == "head" for s in task.coupling.spaces):
        small = "no attention head is free"
    return f"a plan must have something to remove. Got a model where {small}. {listed or 'It has no prunable layer'}."
