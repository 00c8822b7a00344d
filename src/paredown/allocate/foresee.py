"""What a plan will leave: stored and executed on a dense runtime, and what of it is not zero."""

from __future__ import annotations

from dataclasses import dataclass

from paredown.allocate.meter import rates
from paredown.allocate.verb import predict
from paredown.couple.space import Coupling
from paredown.errors import UsageError
from paredown.examine.cost import Cost
from paredown.plan import Plan
from paredown.records import Badge


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """Parameters and MACs of one sample after a plan."""

    parameters: int
    """Stored by a dense file."""
    macs: int
    """Executed by a dense runtime."""
    nonzero_parameters: int
    """Not masked."""
    effective_macs: int
    """With weights that are not masked; only a runtime that skips zeros would gain the difference."""
    effective_badge: Badge = "estimated"


def foresee(coupling: Coupling, cost: Cost, plan: Plan) -> Foreseen:
    """Parameters and MACs after a plan of kept channels and masks, without carrying it out.

    effective MACs = MACs - Σ masked weights × MACs per weight. Raises UsageError for ranks and dropped modules, whose
    plans carry their own numbers in `made_by`, and for masks that do not fit the model.

    >>> from paredown.couple.space import Coupling
    >>> cost = Cost(macs=8, parameters=4, parameter_bytes=16, activation_bytes=0, peak_activation_bytes=0, by_node=())
    >>> foresee(Coupling(spaces=(), pinned=(), unknown_ops={}), cost, Plan(keep={})).effective_macs
    8
    """
    if plan.ranks or plan.drop_modules:
        msg = "foresee must be given a plan of kept channels and masks. Got ranks or dropped modules: see plan.made_by['reached']."
        raise UsageError(msg)
    parameters, macs = predict(coupling, cost, plan)
    rate = rates(coupling, cost)
    masked = {}
    for name, mask in plan.masks.items():
        shape = cost.parameter_shapes.get(name)
        by_axis = plan.keep.get(name, {})
        wanted = None if shape is None else tuple(len(by_axis.get(a, range(n))) for a, n in enumerate(shape))
        if wanted != mask.shape:
            msg = f"a mask must have the shape that the plan leaves, {wanted}. Got {mask.shape} for {name}."
            raise UsageError(msg)
        size = 1
        for n in mask.shape:
            size *= n
        masked[name] = size - mask.num_kept
    return Foreseen(
        parameters=parameters,
        macs=macs,
        nonzero_parameters=parameters - sum(masked.values()),
        effective_macs=macs - sum(n * rate.get(name, 0) for name, n in masked.items()),
    )
