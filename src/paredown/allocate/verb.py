"""allocate: scores, cost and a budget become a Plan. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from paredown.allocate.masks import allocate_masks
from paredown.allocate.meter import Meter
from paredown.allocate.request import Allocation, Floor, LeaveOut, Normalize, Request, Scope
from paredown.allocate.sensitivity import Latency, Sensitivity, Table
from paredown.allocate.structured import allocate_units
from paredown.budget import Budget
from paredown.couple.space import Coupling
from paredown.errors import UsageError, must_be
from paredown.examine.cost import Cost
from paredown.plan import Plan
from paredown.score.nouns import Scores
from paredown.score.patterns import as_patterns


def allocate(
    coupling: Coupling,
    scores: Scores,
    cost: Cost,
    budget: Budget | None = None,
    *,
    target: str = "onnxruntime-x86",
    allocation: Allocation = "uniform",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    floor: Floor | None = None,
    align: int | None = None,
    normalize: Normalize | None = None,
    scope: Scope | None = None,
    leave_out: Sequence[LeaveOut] = (),
    sensitivity: Sensitivity | Table | None = None,
    latency: Latency | Mapping[str, Mapping[int, float]] | None = None,
) -> Plan:
    """Choose what stays so that the budget is hit: units of spaces (Plan.keep), or cells of weights (Plan.masks).

    The granularity is that of the scores. **Channels and heads** ("head": channels outside of attention all stay):
    Budget(macs, parameters, channels, size_bytes, or latency_ms with a `latency` table) within 1 % of the dense amount.
    Kept channels are a multiple of `align` (default: the target's; 1 turns it off) and at least `floor` × units, never
    0. **Masks** (element, N:M, row, column, kernel, blocks): Budget(density=share of the considered weights that stays);
    parameters and macs count what is not zero. N:M needs no budget. `scope` "row" compares inside each output row
    (default: what the criterion wants), `leave_out` protects "first", "last" and "depthwise" layers; by default all
    linear and convolution weights that have scores take part. See allocate.masks for what is exact.

    | allocation | |
    |---|---|
    | uniform | one ratio everywhere |
    | global | the lowest scores of the model, divided by each layer's "mean" or "max", the cell's "size" (for sums), or "none" |
    | erk | masks: density by layer shape (Evci et al. 2020) |
    | sensitivity | every layer gives until it costs one common measured increase |
    | greedy | the least measured increase per saved amount, step after step on the coupled meter |
    | knapsack | the least sum of measured increases, solved exactly where costs add up, then corrected on the meter |

    `normalize` is "mean" by default, "none" for masks. The last three read `sensitivity`: what
    paredown.sensitivity measured, or {name: {kept: increase}}. `floor` is one share, or {pattern: share} (default 0.1 for
    units; 0.01 for masks ranked across layers). `include` and `exclude` are patterns (fnmatch; a text is one) on parameter,
    module and space names; exclude wins. Of equal scores the lower index leaves first.

    `Plan.made_by` says what was asked and reached, and `blocked_by` where the nearest reachable amount is further off.
    A budget that is already met gives a plan that keeps everything, with made_by["already_met"].
    Raises UsageError (patterns, options), NothingToDo (nothing free; with the reasons) and InfeasibleError (the budget
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
    request = Request(
        coupling=coupling,
        scores=scores,
        cost=cost,
        budget=_checked(coupling, scores, cost, budget),
        target=target,
        allocation=allocation,
        include=as_patterns(include),
        exclude=as_patterns(exclude),
        floor=floor,
        align=align,
        normalize=normalize,
        scope=scope,
        leave_out=leave_out,
        sensitivity=sensitivity,
        latency=latency,
    )
    request.check()
    granularity = request.granularity
    if granularity.kind == "layer":
        msg = "allocate must be given scores of units or cells. Got granularity layer: whole modules leave through Plan(drop_modules=…)."
        raise UsageError(msg)
    return allocate_masks(request) if granularity.masked else allocate_units(request)


def _checked(coupling: Coupling, scores: Scores, cost: Cost, budget: Budget | None) -> Budget:
    for name, value, kind in (("coupling", coupling, Coupling), ("scores", scores, Scores), ("cost", cost, Cost)):
        must_be(name, value, kind)
    if budget is None:
        return Budget()
    must_be("budget", budget, Budget, fix="What remains of something, as Budget(macs=0.5).")
    return budget


def predict(coupling: Coupling, cost: Cost, plan: Plan) -> tuple[int, int]:
    """Parameters and MACs (one sample) after a plan, exactly, without carrying it out.

    What a dense runtime stores and executes: masks change neither (see `foresee`).

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
