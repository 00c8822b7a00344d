"""What every rule uses: arguments by name, the shape of the result, the fallback, and the meeting of operands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.couple.ids import FIXED, compact, fixed, tidy, varying
from paredown.couple.trace import Trace, concrete, numbers, sizes

Rule = Callable[[fx.Node, Trace], Any]


def schema(node: fx.Node) -> Any:
    """The schema of an ATen op: name, argument names and defaults."""
    target: Any = node.target
    return target._schema


def args_of(node: fx.Node, *names: str) -> list[Any]:
    """The arguments of these names, given by position or keyword, with the schema's defaults."""
    every = schema(node).arguments
    at = {a.name: i for i, a in enumerate(every)}
    out = []
    for name in names:
        i = at[name]
        out.append(node.args[i] if i < len(node.args) else node.kwargs.get(name, every[i].default_value))
    return out


def result(node: fx.Node) -> Any:
    """Fixed ids in the structure and shape of the node's result."""
    return pytree.tree_map(
        lambda v: fixed(sizes(v)) if isinstance(v, torch.Tensor) else concrete(v),
        node.meta.get("val"),
    )


def unknown(node: fx.Node, trace: Trace) -> Any:
    """No rule: pin all that reaches the op."""
    touched = [trace.of(n) for n in node.all_input_nodes]
    if any(bool((t != FIXED).any()) for t in touched):
        name = str(node.target)
        trace.unknown[name] += 1
        for ids in touched:
            trace.pin(ids, f"no rule for {name}")
    return result(node)


def precedence(ids: Tensor, trace: Trace) -> tuple[bool, bool, int]:
    """Which of two sets of channels goes through where an element can have one: the higher.

    Those that may leave by what was pinned so far, before those that may not; then those that a layer writes, before the
    elements of a table (nodes, tokens); then the larger set.
    """
    pinned = [p.ids for p in trace.pins]
    mine = compact(ids)
    held = (
        bool(pinned) and np.isin(numbers(trace.forest, mine), [FIXED, *numbers(trace.forest, torch.cat(pinned))]).all()
    )
    origins = trace.forest.origins(mine)
    return not held, not bool(trace.are_elements(origins[mine != FIXED]).all()), int(mine.numel())


def merge(a: Tensor, b: Tensor, trace: Trace) -> Tensor:
    """The ids of an element-wise result; shapes broadcast.

    An operand of length 1 along the other's channels serves all of them: it does not die with any one of them.
    """
    dims = max(a.dim(), b.dim())
    a, b = (t.reshape((1,) * (dims - t.dim()) + tuple(t.shape)) if t.dim() < dims else t for t in (a, b))
    a, b = _numbers(a, b, trace), _numbers(b, a, trace)
    a, b = trace.forest.canon(a), trace.forest.canon(b)
    a, b = _released(a, b, trace), _released(b, a, trace)
    a = _crossed(a, b, trace)
    b = _crossed(b, a, trace)
    a, b = _whole(a, b, trace), _whole(b, a, trace)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    one, two = compact(a), compact(b)
    trace.forest.unite(one, two)
    one, two = torch.broadcast_tensors(one, two)
    # A fixed element beside a channel: harmless where the fixed operand is broadcast along the channels, else it pins.
    for x, y, y_whole in ((one, two, b), (two, one, a)):
        lone = (x != FIXED) & (y == FIXED)
        if bool(lone.any()) and any(y_whole.shape[d] > 1 for d in varying(tidy(x))):
            for axis in varying(tidy(x)):
                trace.stiffen(axis - dims, x.shape[axis])
            trace.pin(x[lone], "a constant as long as the channels is combined with them")
    return tidy(torch.where(one != FIXED, one, two)).expand(shape)


def _numbers(t: Tensor, other: Tensor, trace: Trace) -> Tensor:
    """`t` as numbers where it is a table of positions by channels (rotary), or of positions alone (a mask), that several heads share.

    It is saved, or made of saved numbers.
    Its columns would tie the heads to one another, and those of all layers that read it: then no head could leave.
    """
    columns = [d for d in varying(t) if d in varying(other)]
    shared = [d for d in varying(other) if t.shape[d] == 1]
    positions = [d for d in range(t.dim()) if t.shape[d] > 1 and d not in columns]
    if not (trace.whole_tables and shared and positions and varying(t) and trace.is_saved(t)):
        return t
    for axis in positions:
        trace.tie(t, t.narrow(axis, 0, 1), "a table that all heads share")
        t = trace.forest.canon(t)
    trace.keep_table(t, "a table that all heads share")
    return fixed(t.shape)


def _released(t: Tensor, other: Tensor, trace: Trace) -> Tensor:
    """`t` as fixed where it is a single channel broadcast along the other's many."""
    stretched = [d for d in varying(other) if t.shape[d] == 1]
    if stretched and bool((t != FIXED).any()) and not varying(t):
        trace.pin(t, "one channel is broadcast over many")
        return fixed(t.shape)
    return t


def _crossed(t: Tensor, other: Tensor, trace: Trace) -> Tensor:
    """`t` as fixed where its channels lie along other axes than the other's: every one of them meets every other one.

    All would be one unit. So the states of a scan stay, and its channels may leave. Who meets a constant of its length stays
    in any case; else those that are fewer, of two as many the first.
    """
    mine, others = varying(t), varying(other)
    if not mine or not others or {*mine} & {*others}:
        return t
    bound, free = any(other.shape[d] > 1 for d in mine), not any(t.shape[d] > 1 for d in others)
    fewer = math.prod(t.shape[d] for d in mine) <= math.prod(other.shape[d] for d in others)
    if not bound and not (free and fewer):
        return t
    for table in (t, other):
        trace.cross(table)
    trace.pin(t, "each of them meets every channel of another layer")
    return fixed(t.shape)


def _whole(t: Tensor, other: Tensor, trace: Trace) -> Tensor:
    """`t` tied along the axes of a constant (a rotary table) that all rows share: then only whole rows (heads) leave."""
    across = varying(t)
    along = [d for d in across if other.shape[d] > 1]
    if bool((other != FIXED).any()) or not along or along == across:
        return t
    for axis in along:
        trace.tie(t, t.narrow(axis, 0, 1), "a constant as long as the channels is combined with them")
        t = trace.forest.canon(t)
    return t
