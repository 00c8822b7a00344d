"""Group sparsity training: penalties that make whole units small before they leave. Hooks of the one loop.

- Growing (Wang et al. 2021, "Neural pruning via growing regularization", algorithm 1): λ_u w is added to the gradients of all
  elements that leave with unit u, λ from 0 to `most`. GReg-1: only the units that a criterion has chosen beforehand; their
  knowledge moves to the others while they fade. GReg-2: all units, and the criterion chooses at the end, when the
  curvature of the loss has told them apart.
- Slimming (Liu et al. 2017, "Learning efficient convolutional networks through network slimming"): strength × sign(γ) is added
  to the gradients of the batch-norm scales of all free units.

Where we differ: λ grows with the share of the training instead of by 1e-4 every few steps, so it does not depend on how
many steps there are; and groups are those of `couple`: everything that leaves with a unit, in all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paredown.couple import Coupling
from paredown.errors import UsageError
from paredown.plan import Plan
from paredown.program import Program
from paredown.score.bn_scale import batch_norm_scales
from paredown.train.loop import Hook, Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Growing:
    """Growing L2 on coupled groups, in a training of its own before the removal."""

    epochs: int = 2
    most: float = 1.0
    """λ at the end of the ramp; at 1 and learning rate .01 with momentum .9, the weights halve every 7 steps."""
    ramp: float = 0.8
    """Share of this training over which λ grows from 0; it stays there for the rest."""
    chosen: str = "first"
    """ "first": the criterion chooses before the penalty, which is on those that leave (GReg-1); "last": after it (GReg-2)."""

    def __post_init__(self) -> None:
        rules = [
            ("epochs", self.epochs >= 1, "a number ≥ 1"),
            ("most", self.most > 0, "a number > 0"),
            ("ramp", 0 < self.ramp <= 1, "a share in (0, 1]"),
            ("chosen", self.chosen in ("first", "last"), "first or last"),
        ]
        for name, holds, rule in rules:
            if not holds:
                msg = f"{name} of a growing penalty must be {rule}. Got {getattr(self, name)!r}."
                raise UsageError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slimming:
    """L1 on batch-norm scales, in a training of its own before the removal; use it with criterion "bn_scale"."""

    epochs: int = 2
    strength: float = 1e-4

    def __post_init__(self) -> None:
        if self.epochs < 1 or not self.strength > 0:
            msg = f"slimming must have epochs ≥ 1 and strength > 0. Got {self.epochs!r} and {self.strength!r}."
            raise UsageError(msg)


Regularize = Growing | Slimming


def growing(coupling: Coupling, how: Growing, plan: Plan | None, *, epochs: int | None = None) -> Hook:
    """The hook of a growing penalty: on what `plan` removes, or with None on all free units.

    λ(t) = most × min(1, t / (ramp × T)), T = steps × epochs; gradient of every element e of a group: g_e += λ w_e.
    """
    groups = elements(coupling, plan)
    total = how.epochs if epochs is None else epochs
    known: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def add(training: Training) -> None:
        weight = how.most * min(1.0, training.step / (how.ramp * training.steps * total))
        parameters = dict(training.module.named_parameters(remove_duplicate=False))
        if id(training.module) not in known:
            known.clear()
            known[id(training.module)] = _shares(groups, {n: p.detach() for n, p in parameters.items()})
        for name, share in known[id(training.module)].items():
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.addcmul_(parameters[name], share, value=weight)

    return Hook(name=f"growing {how.most:g} {how.ramp:g} {plan.digest[:12] if plan else 'all'}", after_backward=add)


def slimming(program: Program, coupling: Coupling, how: Slimming) -> Hook:
    """The hook of network slimming: g += strength × sign(γ) for the batch norms of all free units.

    Raises UsageError where no free unit has a batch norm.
    """
    scales = batch_norm_scales(program)
    names = sorted({f.parameter for s in coupling.spaces for f in s.footprints if f.parameter in scales})
    if not names:
        msg = "slimming must find batch norms on the way of free channels. Got none. Use a growing penalty instead."
        raise UsageError(msg)

    @torch.no_grad()
    def add(training: Training) -> None:
        parameters = dict(training.module.named_parameters(remove_duplicate=False))
        for name in names:
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.add_(parameters[name].sign(), alpha=how.strength)

    return Hook(name=f"slimming {how.strength:g}", after_backward=add)


def elements(coupling: Coupling, plan: Plan | None) -> dict[str, list[tuple[int, NDArray[np.int64]]]]:
    """Parameter → (axis, indices) of everything that belongs to the penalised units; with a plan, what it removes."""
    found: dict[str, list[tuple[int, NDArray[np.int64]]]] = {}
    for space in coupling.spaces:
        leaving = np.ones(len(space), dtype=np.bool_)
        if plan is not None:
            leaving[:] = False
            for f in space.footprints:
                kept = plan.keep.get(f.parameter, {}).get(f.axis)
                if kept is not None:
                    leaving |= ~np.isin(f.indices, np.array(kept)).all(axis=1)
        if leaving.any():
            for f in space.footprints:
                found.setdefault(f.parameter, []).append((f.axis, np.unique(f.indices[leaving])))
    return found


def _shares(
    groups: Mapping[str, list[tuple[int, NDArray[np.int64]]]], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """1 where an element is penalised, else 0; buffers (running statistics) are left alone."""
    found = {}
    for name, cuts in groups.items():
        if name not in parameters:
            continue
        share = torch.zeros_like(parameters[name])
        for axis, indices in cuts:
            share.index_fill_(axis, torch.from_numpy(indices).to(share.device), 1.0)
        found[name] = share
    return found
