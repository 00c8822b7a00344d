"""From ids to spaces: classes of ids become units, equal footprints become spaces, pins become reasons."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from paredown.couple.ids import FIXED, along, varying
from paredown.couple.space import Coupling, Footprint, Indices, Pinned, Role, Space
from paredown.couple.trace import Pin, Trace, numbers, trace
from paredown.errors import RejectedError, must_be
from paredown.program import Program


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One parameter axis with the class of each of its positions. Class 0 never leaves."""

    parameter: str
    axis: int
    classes: Indices
    role: Role


def couple(program: Program, *, strict: bool = False) -> Coupling:
    """Which channels must live or die together, and which may not die and why.

    Runs the exported graph on channel ids: shape ops are executed as they are, ops that mix channels have a rule,
    what has no rule pins. Sound by construction; `prove` checks it all the same. With strict=True an op without a
    rule raises RejectedError.

    >>> import torch; from torch import nn; from paredown.program import capture
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> [(s.name, len(s)) for s in couple(capture(net, torch.zeros(2, 3, 8, 8))).spaces]
    [('0.weight[0]', 8)]
    """
    start = time.perf_counter()
    must_be("program", program, Program, fix="Use paredown.capture(model, inputs).")
    run = trace(program)
    if strict and run.unknown:
        msg = f"every op must have a coupling rule with --strict. Got {dict(run.unknown)}."
        raise RejectedError(msg)
    return assemble(run, start)


def assemble(run: Trace, start: float) -> Coupling:
    """Units, spaces and reasons of a finished run."""
    axes = parameter_axes(run)
    roots = run.forest.roots()
    reasons = pinned_roots(run, axes)
    free = _free_classes(axes, reasons)
    spaces, place = _spaces(run, axes, free)
    return Coupling(
        spaces=spaces,
        pinned=_reasons(axes, reasons),
        unknown_ops=dict(run.unknown),
        products={
            name: tuple(place[numbers(run.forest, v)] for v in vectors) for name, vectors in run.products.items()
        },
        seconds=time.perf_counter() - start if len(roots) else 0.0,
    )


def parameter_axes(run: Trace) -> tuple[Axis, ...]:
    """Every parameter axis that carries channels, with the class of each position."""
    out = []
    for name, by_axis in run.weights.items():
        for axis, ids in sorted(by_axis.items()):
            out.append(Axis(parameter=name, axis=axis, classes=numbers(run.forest, ids), role=run.roles[(name, axis)]))
    for name, raw in run.raw.items():
        if name in run.weights:
            continue
        ids = run.forest.canon(raw)
        axes = varying(ids)
        if not axes and ids.numel() == 1 and ids.dim() == 1:
            axes = [0]
        out += [Axis(parameter=name, axis=a, classes=along(ids, a).numpy().copy(), role="write") for a in axes]
        if not axes and ids.numel():  # one class for the whole tensor: it cannot leave without the tensor
            run.pins.append(_whole(ids, name))
    return tuple(out)


def _whole(ids: Tensor, name: str) -> Pin:
    return Pin(ids=ids.reshape(-1)[:1], reason="the whole parameter is one unit", where=name)


def pinned_roots(run: Trace, axes: tuple[Axis, ...]) -> dict[int, tuple[str, str]]:
    """Root → (reason, where) of the first pin that reached its class."""
    reasons: dict[int, tuple[str, str]] = {}
    for pin in run.pins:
        for root in np.unique(numbers(run.forest, pin.ids)).tolist():
            reasons.setdefault(root, (pin.reason, pin.where))
    for axis in axes:
        found = np.unique(axis.classes)
        if len(found) == 1 and found[0] != FIXED:
            reasons.setdefault(int(found[0]), ("the last channel of an axis", f"{axis.parameter}[{axis.axis}]"))
    for root, reason in _idle(run, axes).items():
        reasons.setdefault(root, reason)
    reasons.pop(FIXED, None)
    return reasons


def _idle(run: Trace, axes: tuple[Axis, ...]) -> dict[int, tuple[str, str]]:
    """Root → why nothing would move if it left: rows that nobody reads (cropped away), columns that read nothing (zeros, or a
    part of a weight that is never used)."""
    seen = [
        *run.norms.values(),
        *(s.ids for s in run.summed.values()),
        *(v for vectors in run.products.values() for v in vectors),
    ]
    statistics = [numbers(run.forest, ids).ravel() for ids in seen]
    read = np.unique(np.concatenate([[FIXED], *statistics, *(a.classes for a in axes if a.role == "read")]))
    made = [numbers(run.forest, ids).ravel() for ids in run.filled]
    written = np.unique(np.concatenate([[FIXED], *made, *(a.classes for a in axes if a.role == "write")]))
    out: dict[int, tuple[str, str]] = {}
    for axis in axes:
        known, why = (written, "it reads nothing") if axis.role == "read" else (read, "no output hangs on it")
        for root in axis.classes[~np.isin(axis.classes, known)].tolist():
            out.setdefault(root, (why, f"{axis.parameter}[{axis.axis}]"))
    return out


def _free_classes(axes: tuple[Axis, ...], reasons: Mapping[int, tuple[str, str]]) -> Indices:
    every = np.unique(np.concatenate([a.classes for a in axes])) if axes else np.zeros(0, dtype=np.int64)
    pinned = np.fromiter(reasons, dtype=np.int64, count=len(reasons))
    return np.setdiff1d(every[every != FIXED], pinned)


def _spaces(run: Trace, axes: tuple[Axis, ...], free: Indices) -> tuple[tuple[Space, ...], Indices]:
    """Classes with the same footprint become one space. Also root → (space, unit), -1 where fixed, shape [ids, 2]."""
    is_free = np.zeros(run.forest.size, dtype=bool)
    is_free[free] = True
    touches: dict[int, list[tuple[int, int]]] = defaultdict(list)
    positions: list[tuple[Indices, Indices]] = []  # per axis: positions ordered by class, and the classes
    for number, axis in enumerate(axes):
        order = np.argsort(axis.classes, kind="stable")
        sorted_classes = axis.classes[order]
        positions.append((order, sorted_classes))
        found, counts = np.unique(sorted_classes, return_counts=True)
        keep = is_free[found]
        for root, count in zip(found[keep].tolist(), counts[keep].tolist(), strict=True):
            touches[root].append((number, count))
    groups: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for root, touched in touches.items():
        groups[tuple(touched)].append(root)
    heads = {int(r) for ids in run.heads for r in np.unique(numbers(run.forest, ids)).tolist()}
    place = np.full((run.forest.size, 2), -1, dtype=np.int64)
    spaces: list[Space] = []
    for signature, roots in sorted(groups.items(), key=lambda item: min(item[1])):
        ordered = np.sort(np.asarray(roots, dtype=np.int64))
        footprints = tuple(_footprint(axes[n], *positions[n], ordered, count) for n, count in signature)
        spaces.append(
            Space(
                name=_name(footprints, spaces),
                footprints=footprints,
                kind="head" if int(ordered[0]) in heads else "channel",
            )
        )
        place[ordered, 0] = len(spaces) - 1
        place[ordered, 1] = np.arange(len(ordered))
    return tuple(spaces), place


def _footprint(axis: Axis, order: Indices, sorted_classes: Indices, roots: Indices, count: int) -> Footprint:
    starts = np.searchsorted(sorted_classes, roots)
    indices = np.sort(order[starts[:, None] + np.arange(count)], axis=1)
    return Footprint(parameter=axis.parameter, axis=axis.axis, indices=indices, role=axis.role)


def _name(footprints: tuple[Footprint, ...], taken: list[Space]) -> str:
    first = next((f for f in footprints if f.role == "write" and f.parameter.endswith("weight")), footprints[0])
    name = f"{first.parameter}[{first.axis}]"
    same = sum(s.name.split("#")[0] == name for s in taken)
    return f"{name}#{same + 1}" if same else name


def _reasons(axes: tuple[Axis, ...], reasons: Mapping[int, tuple[str, str]]) -> tuple[Pinned, ...]:
    """Pinned units by reason and place."""
    members: dict[tuple[str, str], set[int]] = defaultdict(set)
    named: dict[tuple[str, str], list[str]] = defaultdict(list)
    for axis in axes:
        for root in np.unique(axis.classes).tolist():
            if root in reasons:
                members[reasons[root]].add(root)
                label = f"{axis.parameter}[{axis.axis}]"
                if label not in named[reasons[root]]:
                    named[reasons[root]].append(label)
    return tuple(
        Pinned(reason=reason, units=len(roots), where=where, parameters=tuple(named[(reason, where)]))
        for (reason, where), roots in members.items()
    )
