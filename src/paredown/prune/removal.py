"""Removal: a plan laid over a trace: which classes leave, what every tensor and size constant becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from paredown.couple.assemble import Axis, parameter_axes, pinned_roots
from paredown.couple.ids import FIXED, compact
from paredown.couple.trace import Trace
from paredown.errors import UsageError
from paredown.plan import Keep, Plan

Bools = NDArray[np.bool_]
Wanted = Mapping[tuple[str, int], tuple[int, ...]]
"""(name of the storage, axis) → kept indices, as a plan asks for them; tied names are one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """The consequences of a plan for one program."""

    trace: Trace
    axes: tuple[Axis, ...]
    gone: Bools
    """By id: whether its class leaves. Shape [ids]."""
    keep: Keep
    """The plan, completed by what follows from it (parameters that only the train graph reads)."""

    def alive(self, ids: Tensor) -> Tensor:
        """Which elements survive; axes along which ids are constant have length 1."""
        small = compact(ids)
        return torch.from_numpy(~self.gone[self.trace.forest.find(np.array(small.numpy(), order="C").ravel())]).reshape(
            small.shape
        )

    def shape(self, ids: Tensor) -> list[int]:
        """The shape after removal. An empty tensor (no prefix tokens) has no ids to tell: as it was."""
        if not ids.numel():
            return list(ids.shape)
        alive = self.alive(ids)
        out = []
        for axis in range(ids.dim()):
            if alive.shape[axis] == ids.shape[axis]:
                out.append(int(alive.movedim(axis, 0).reshape(ids.shape[axis], -1).any(1).sum()))
            else:
                out.append(ids.shape[axis])
        return out

    def positions(self, node: fx.Node, axis: int) -> Tensor:
        """Which positions along an axis of a node's value survive, of a weight or a part of one too. Shape [length], bool."""
        seen = self.trace.parameters.get(node)
        if seen is None or self.trace.storage[seen.name] not in self.trace.weights:
            return self.survivors(self.trace.of(node), axis)
        return self.survivors(self.trace.seen_part(seen, axis), 0)

    def survivors(self, ids: Tensor, axis: int) -> Tensor:
        """Which positions along an axis survive. Shape [length], bool."""
        alive = self.alive(ids)
        if alive.shape[axis] != ids.shape[axis] or not ids.numel():
            return torch.ones(ids.shape[axis], dtype=torch.bool)
        return alive.movedim(axis, 0).reshape(ids.shape[axis], -1).any(1)


def removal(trace: Trace, plan: Plan) -> Removal:
    """Lay a plan over a trace. Raises UsageError where the plan does not fit: unknown names, torn or pinned units."""
    axes = parameter_axes(trace)
    wanted = _by_storage(trace, plan)
    gone = np.zeros(trace.forest.size, dtype=bool)
    for axis in axes:
        removed = _removed(axis, wanted.get((axis.parameter, axis.axis)))
        gone[axis.classes[removed]] = True
    for name, at in wanted.keys() - {(a.parameter, a.axis) for a in axes}:
        msg = f"a plan must name parameter axes that carry channels. Got {name} axis {at}, which is not one of them in this model."
        raise UsageError(msg)
    gone[FIXED] = False
    _refuse_torn(trace, axes, gone, wanted)
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    for axis in axes:
        leaving = gone[axis.classes]
        if leaving.any():
            keep.setdefault(axis.parameter, {})[axis.axis] = tuple(np.flatnonzero(~leaving).tolist())
    return Removal(trace=trace, axes=axes, gone=gone, keep=keep)


def _by_storage(trace: Trace, plan: Plan) -> Wanted:
    wanted = {}
    for name, by_axis in plan.keep.items():
        if name not in trace.storage:
            msg = f"a plan must name parameters of the model. Got {name!r}, which the captured model does not have."
            raise UsageError(msg)
        for axis, kept in by_axis.items():
            wanted[(trace.storage[name], axis)] = kept
    return wanted


def _removed(axis: Axis, kept: tuple[int, ...] | None) -> Bools:
    removed = np.zeros(len(axis.classes), dtype=bool)
    if kept is None:
        return removed
    if kept[-1] >= len(removed):
        msg = f"kept indices must be below the length {len(removed)} of {axis.parameter} axis {axis.axis}. Got {kept[-1]}."
        raise UsageError(msg)
    removed[:] = True
    removed[list(kept)] = False
    return removed


def _refuse_torn(trace: Trace, axes: tuple[Axis, ...], gone: Bools, wanted: Wanted) -> None:
    """Every class must leave whole, and none that is pinned."""
    reasons = pinned_roots(trace, axes)
    for root in np.flatnonzero(gone).tolist():
        if root in reasons:
            reason, where = reasons[root]
            owner = next(a for a in axes if (a.classes == root).any())
            index = int(np.flatnonzero(owner.classes == root)[0])
            msg = f"a plan must leave pinned channels alone. Got the removal of index {index} of {owner.parameter} axis {owner.axis}, pinned: {reason} at {where}."
            raise UsageError(msg)
    for axis in axes:
        leaving, key = gone[axis.classes], (axis.parameter, axis.axis)
        if leaving.all() and len(leaving):
            msg = f"a plan must leave at least one index of every axis. Got none of {axis.parameter} axis {axis.axis}."
            raise UsageError(msg)
        if key not in wanted and axis.parameter not in trace.eval_names:
            continue  # only the train graph reads it: the plan is completed
        torn = np.flatnonzero(leaving != _removed(axis, wanted.get(key)))
        if len(torn):
            msg = f"a plan must remove coupled channels together. Got index {torn[0]} of {axis.parameter} axis {axis.axis} kept while what it is coupled to leaves."
            raise UsageError(msg)


def slice_state(state: Mapping[str, Tensor], storage: Mapping[str, str], keep: Keep) -> dict[str, Tensor]:
    """Every tensor cut to what is kept; tied names share one tensor. Tensors that lose nothing are passed on."""
    made: dict[str, Any] = {}
    out = {}
    for name, tensor in state.items():
        first = storage.get(name, name)
        if first not in made:
            cut = tensor.detach()
            for axis, kept in keep.get(first, {}).items():
                cut = cut.index_select(axis, torch.tensor(kept, device=cut.device))
            made[first] = cut
        out[name] = made[first]
    return out


def own(state: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with what still shares memory with `source` cloned; tied names keep sharing, requires_grad is kept."""
    made: dict[int, Tensor] = {}
    out = {}
    for name, tensor in state.items():
        if id(tensor) not in made:
            shared = tensor.numel() > 0 and tensor.data_ptr() == source[name].data_ptr()
            made[id(tensor)] = (tensor.detach().clone() if shared else tensor.detach()).requires_grad_(
                source[name].requires_grad
            )
        out[name] = made[id(tensor)]
    return out
