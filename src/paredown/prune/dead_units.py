"""Masks turned into removals: units that masks leave without any weight leave physically; the rest is simulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from paredown.couple import Coupling, Space, couple
from paredown.couple.operand import args_of
from paredown.couple.trace import op_name
from paredown.errors import UsageError
from paredown.plan import Mask, Plan
from paredown.program import Program, placeholder_names
from paredown.prune.mask import Bools, fitting

Kept = dict[str, Bools]
"""Parameter (first name of its tensor) → elements that stay, in the indices of the dense model."""


def condensed(program: Program, plan: Plan) -> tuple[Plan, tuple[str, ...]]:
    """The plan with every unit that its masks leave without any weight in `keep`, and what to say about it.

    A unit is dead where all weights that write it are masked in its rows (depthwise kernels only scale it and do not
    count), or all that read it in its columns. A bias or a batch-norm shift of a dead unit goes with it: then the output
    moves (`Proof.own_move`), though no weight that was left is touched. Of a space that is dead as a whole one unit
    stays, the one with most weights left. Masks that remain are *simulated*: a dense runtime multiplies by the zeros.
    Weights with fewer than two axes (biases, scales) neither keep a unit alive nor are they needed to be masked.
    """
    coupling = couple(program)
    first = first_names(program)
    shapes = {n: tuple(program.state[n].shape) for n in first.values()}
    touched = {f.parameter for s in coupling.spaces for f in s.footprints} | {first.get(n, n) for n in plan.masks}
    left = _left(plan, {n: shapes[n] for n in touched if n in shapes}, first)
    masked = {first.get(n, n) for n in plan.masks}
    scaled = depthwise(program)
    gone: dict[tuple[str, int], Bools] = {}
    removed = 0
    for space in coupling.spaces:
        already = _already(space, left)
        dead = _dead(space, left, masked, scaled) & ~already
        if (dead | already).all() and dead.any():
            dead[max(np.flatnonzero(dead), key=lambda u: (_alive(space, left, int(u)), -u))] = False
        removed += int(dead.sum())
        for f in space.footprints:
            if dead.any():
                lost = gone.setdefault((f.parameter, f.axis), np.zeros(shapes[f.parameter][f.axis], dtype=np.bool_))
                lost[f.indices[dead].ravel()] = True
    keep = _keep(plan, gone, shapes, first)
    masks = {}
    for name, mask in plan.masks.items():
        # The mask is in the indices that the plan's own keep leaves: lay it out whole, then cut once.
        whole = Mask.of(left[first.get(name, name)], mask.granularity)
        left_over = whole.only(keep.get(first.get(name, name), {}))
        if left_over is not None:
            masks[name] = left_over
    notes = _notes(removed, masks, coupling, first)
    return (dataclasses.replace(plan, keep=keep, masks=masks) if removed else plan), notes


def first_names(program: Program) -> dict[str, str]:
    """Every name in the state → the first name of the same tensor."""
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(tensor), name) for name, tensor in program.state.items()}


def by_first_name(program: Program, plan: Plan) -> Plan:
    """The plan with each mask under the first name of its tensor; raises UsageError where masks do not fit."""
    first = first_names(program)
    masks: dict[str, Mask] = {}
    for name, mask in plan.masks.items():
        if masks.setdefault(first.get(name, name), mask).digest != mask.digest:
            msg = f"tied weights must have one mask. Got different ones for {first[name]} and {name}."
            raise UsageError(msg)
    return dataclasses.replace(plan, masks=masks)


def depthwise(program: Program) -> set[str]:
    """Kernels with one input channel per group: they scale and filter a channel, they do not make it from others."""
    names = placeholder_names(program.eval_graph)
    first = first_names(program)
    out = set()
    for node in program.eval_graph.graph.nodes:
        if node.op == "call_function" and op_name(node).startswith("conv"):
            weight, groups = args_of(node, "weight", "groups")
            name = names.get(getattr(weight, "name", ""))
            if name is not None and int(groups) > 1 and program.state[name].shape[1] == 1:
                out.add(first[name])
    return out


def _left(plan: Plan, shapes: Mapping[str, tuple[int, ...]], first: Mapping[str, str]) -> Kept:
    """What stays of each parameter, masks and removals together, in dense indices."""
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, axes in plan.keep.items():
        keep.setdefault(first.get(name, name), {}).update(axes)
    masks = {first.get(n, n): m for n, m in plan.masks.items()}
    out: Kept = {}
    for name, shape in shapes.items():
        axes = keep.get(name, {})
        place = np.ix_(*[np.asarray(axes.get(a, range(n)), dtype=np.int64) for a, n in enumerate(shape)])
        full = np.zeros(shape, dtype=np.bool_)
        if name in masks:
            cut = tuple(len(axes[a]) if a in axes else n for a, n in enumerate(shape))
            # A mask of another shape is refused with the parameter's name, as everywhere.
            fitting({name: torch.empty(cut, device="meta")}, {name: masks[name]})
        full[place] = masks[name].kept if name in masks else True
        out[name] = full
    return out


def _already(space: Space, left: Kept) -> Bools:
    """Units that the plan's own `keep` removes: nothing is left of one of their parameters, whatever the masks."""
    out: Bools = np.ones(len(space), dtype=np.bool_)
    for f in space.footprints:
        out &= _empty(left[f.parameter], f.axis)[f.indices].all(axis=1)
    return out


def _dead(space: Space, left: Kept, masked: set[str], scaled: set[str]) -> Bools:
    """Units whose every writing row, or every reading column, is masked."""
    dead: Bools = np.zeros(len(space), dtype=np.bool_)
    for role in ("write", "read"):
        mine = [
            f for f in space.footprints if f.role == role and left[f.parameter].ndim >= 2 and f.parameter not in scaled
        ]
        if mine and all(f.parameter in masked for f in mine):
            sides = [_empty(left[f.parameter], f.axis)[f.indices].all(axis=1) for f in mine]
            dead = dead | np.asarray(sides).all(axis=0)
    return dead


def _empty(kept: Bools, axis: int) -> Bools:
    return np.logical_not(np.moveaxis(kept, axis, 0).reshape(kept.shape[axis], -1).any(axis=1))


def _alive(space: Space, left: Kept, unit: int) -> int:
    return sum(int(np.moveaxis(left[f.parameter], f.axis, 0)[f.indices[unit]].sum()) for f in space.footprints)


def _keep(
    plan: Plan,
    gone: Mapping[tuple[str, int], Bools],
    shapes: Mapping[str, tuple[int, ...]],
    first: Mapping[str, str],
) -> dict[str, dict[int, tuple[int, ...]]]:
    keep: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, axes in plan.keep.items():
        keep.setdefault(first.get(name, name), {}).update({a: tuple(k) for a, k in axes.items()})
    for (name, axis), lost in gone.items():
        before = keep.setdefault(name, {}).get(axis, tuple(range(shapes[name][axis])))
        keep[name][axis] = tuple(i for i in before if not lost[i])
    return keep


def _notes(removed: int, masks: Mapping[str, Mask], coupling: Coupling, first: Mapping[str, str]) -> tuple[str, ...]:
    """What left and what is simulated, with the reason where one is known."""
    notes = [f"removed: {removed:,} units that masks left without weights"] if removed else []
    pinned = {label: p.reason for p in coupling.pinned for label in p.parameters}
    for name, mask in masks.items():
        kept = mask.kept
        # A bias has no rows: its zeros say nothing of the unit that it belongs to.
        rows, columns = (int(_empty(kept, axis).sum()) for axis in (0, 1)) if kept.ndim > 1 else (0, 0)
        because = ""
        if rows or columns:
            why = pinned.get(f"{first.get(name, name)}[{0 if rows else 1}]", "coupled to channels that are not masked")
            because = f"; {rows} whole rows and {columns} whole columns among them: {why}"
        notes.append(f"simulated: {int((~kept).sum()):,} of {kept.size:,} weights of {name} are zeros{because}")
    return tuple(notes)
