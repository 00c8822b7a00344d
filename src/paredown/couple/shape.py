"""Rules for constants, sizes and shapes: shape ops are executed as they are, on the ids."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.couple import views
from paredown.couple.ids import fixed, laid, tidy, varying
from paredown.couple.operand import args_of, result, schema, unknown
from paredown.couple.trace import Trace, concrete, sizes

# ------------------------------------------------------------------------------------------------ constants and sizes

_CREATE = {
    "arange",
    "zeros",
    "ones",
    "full",
    "empty",
    "linspace",
    "eye",
    "scalar_tensor",
    "tensor",
    "lift_fresh_copy",
    "rand",
    "randn",
    "triu_indices",
    "tril_indices",
}
CREATE_LIKE = {"new_zeros", "new_ones", "new_full", "new_empty"}


def is_constant(node: fx.Node, trace: Trace) -> bool:
    """Whether a node can be computed now: it reads no activation and no learned number."""
    if not isinstance(node.target, torch._ops.OpOverload):
        ins = node.all_input_nodes
        return bool(ins) and all(n in trace.values or isinstance(trace.ids.get(n), int | float | bool) for n in ins)
    name = schema(node).name.removeprefix("aten::")
    if name in _CREATE:
        return all(n in trace.values or isinstance(trace.ids.get(n), int | float | bool) for n in node.all_input_nodes)
    ins = node.all_input_nodes
    if not ins or name.startswith(("sym_", "_assert")):
        return False
    return all(n in trace.values or isinstance(trace.ids.get(n), int | float | bool) for n in ins) and any(
        n in trace.values for n in ins
    )


def create_like(node: fx.Node, trace: Trace) -> Any:
    """x.new_zeros(size): constant, whatever x holds."""
    name = schema(node).name.removeprefix("aten::new_")
    rest = fx.node.map_arg(node.args[1:], lambda n: trace.ids[n] if n not in trace.values else trace.values[n])
    makers: dict[str, Any] = {"zeros": torch.zeros, "ones": torch.ones, "full": torch.full, "empty": torch.zeros}
    trace.values[node] = makers[name](*rest, dtype=node.meta["val"].dtype)
    return fixed(trace.values[node].shape)


def size(node: fx.Node, trace: Trace) -> Any:
    """x.size(axis) as the number it had in the example."""
    source, axis = args_of(node, "self", "dim")
    return concrete(source.meta["val"].shape[axis])


def numel(node: fx.Node, trace: Trace) -> Any:
    """x.numel() as the number it had in the example: channels that are counted stay, since the number is computed with."""
    source: Any = node.args[0]
    trace.pin(trace.of(source), "its elements are counted")
    return math.prod(sizes(source.meta["val"]))


def python(node: fx.Node, trace: Trace) -> Any:
    """Arithmetic on sizes."""
    args = fx.node.map_arg(node.args, lambda n: trace.ids[n])
    return node.target(*args)  # type: ignore[operator]


def getitem(node: fx.Node, trace: Trace) -> Any:
    """One of several results."""
    source: Any = node.args[0]
    if source in trace.pieces:
        trace.parameters[node] = trace.pieces[source][node.args[1]]  # type: ignore[index]
        return None
    if source in trace.values:
        trace.values[node] = trace.values[source][node.args[1]]  # type: ignore[index]
    return trace.ids[source][node.args[1]]


def nothing(node: fx.Node, trace: Trace) -> Any:
    """Assertions of torch.export: no result."""
    return None


# --------------------------------------------------------------------------------------------------------------- shape


def moved(node: fx.Node, trace: Trace) -> Any:
    """Ops that only move axes, also of a weight: seen through, so that x @ W.t() is a linear."""
    source: Any = node.args[0]
    seen = trace.parameters.get(source)
    if seen is not None and (len(seen.shape) == 2 or (len(seen.shape) == 3 and trace.stacks)):
        order = _order(node, len(seen.shape))
        trace.parameters[node] = dataclasses.replace(
            seen,
            shape=tuple(seen.shape[i] for i in order),
            axes=tuple(seen.axes[i] for i in order),
            starts=tuple(seen.starts[i] for i in order) if seen.starts else (),
        )
        return None
    return executed(node, trace)


def _order(node: fx.Node, dims: int) -> list[int]:
    """Which axis of the operand each axis of the result is."""
    name, order = schema(node).name.removeprefix("aten::"), list(range(dims))
    if name == "permute":
        asked: Any = node.args[1]
        return [int(a) % dims for a in asked]
    if name == "numpy_T":
        return order[::-1]
    axes: Any = node.args[1:3] if len(node.args) == 3 else (dims - 2, dims - 1)
    first, second = (int(a) % dims for a in axes)
    order[first], order[second] = order[second], order[first]
    return order


def executed(node: fx.Node, trace: Trace) -> Any:
    """Run the op itself on the ids."""
    if views.cut(node, trace):
        return None
    target: Any = node.target
    if target is torch.ops.aten.view.default:
        target = torch.ops.aten.reshape.default
    args = fx.node.map_arg(node.args, lambda n: _operand(n, trace))
    kwargs = {
        k: v
        for k, v in fx.node.map_arg(node.kwargs, lambda n: _operand(n, trace)).items()
        if k not in ("dtype", "memory_format")
    }
    out = target(*args, **kwargs)
    return pytree.tree_map(lambda t: tidy(t) if isinstance(t, Tensor) else t, out)


def joined(node: fx.Node, trace: Trace) -> Any:
    """cat: a constant that is put beside channels may have to be as long as what it stands for (a state at the start)."""
    axis, joint = int(args_of(node, "dim")[0]), node.meta["val"].dim()
    for ids in (trace.of(part) for part in node.all_input_nodes):
        if ids.dim() == joint:  # else the empty list that a loop begins with
            trace.stiffen(axis % joint - joint, ids.shape[axis])
    return executed(node, trace)


def _operand(node: fx.Node, trace: Trace) -> Any:
    if node in trace.parameters or isinstance(trace.ids.get(node), Tensor):
        return trace.of(node)
    return trace.ids[node]


def like_another(node: fx.Node, trace: Trace) -> Any:
    """x.reshape_as(other), x.view_as(other): only the shape of other is read, so its channels must leave as x's do."""
    shape_of: Any = node.args[1]
    other = trace.of(shape_of)
    out = trace.forest.canon(trace.of(node.args[0]).reshape(other.shape))
    trace.tie(out, other, "reshaped to the shape of another tensor")
    return tidy(out)


def picked(node: fx.Node, trace: Trace) -> Any:
    """select, unbind: the number of results is fixed, so the axis must not shrink."""
    if views.cut(node, trace):
        return None
    source: Any = node.args[0]
    ids = trace.of(source)
    axis = int(args_of(node, "dim")[0])
    trace.later(ids, axis, ids, "one position is picked from the channels")
    return executed(node, trace)


def kept_whole(node: fx.Node, trace: Trace) -> Any:
    """roll: positions along the axis carry meaning, so it must not shrink."""
    ids = trace.of(node.args[0])
    dims = args_of(node, "dims")[0]
    for axis in dims if dims else range(ids.dim()):
        trace.later(ids, axis, ids, "positions along the channels carry meaning")
    return executed(node, trace)


def triangle(node: fx.Node, trace: Trace) -> Any:
    """tril, triu: what is kept of a row hangs on the number of the row."""
    ids = trace.of(node.args[0])
    for axis in (-2, -1):
        trace.later(ids, axis, ids, "positions along the channels carry meaning")
    return ids


def slice(node: fx.Node, trace: Trace) -> Any:
    """x[start:end:step]: x[0::2] and x[1::2] take the same places of every pair, so that whole pairs may leave."""
    if views.cut(node, trace):
        return None
    ids = trace.of(node.args[0])
    axis, start, end, step = args_of(node, "dim", "start", "end", "step")
    if step not in (None, 1):
        axis, length = int(axis or 0) % ids.dim(), ids.shape[int(axis or 0)]
        if length % step == 0 and 0 <= (start or 0) < step and (end is None or end >= length):
            groups = trace.forest.canon(ids).unflatten(axis, (length // step, step))
            if {axis, axis + 1} & set(varying(tidy(groups))):
                trace.tie(groups, groups.narrow(axis + 1, 0, 1), "every n-th channel is taken")
        else:
            trace.later(ids, axis, ids, "every n-th channel is taken")
    return executed(node, trace)


def chunk(node: fx.Node, trace: Trace) -> Any:
    """chunk: pieces stay equal where that is affordable, because the user's code will cut into equal pieces again."""
    if views.cut(node, trace):
        return None
    ids = trace.of(node.args[0])
    parts, axis = args_of(node, "chunks", "dim")
    out = executed(node, trace)
    if len({p.shape for p in out}) == 1 and axis % ids.dim() in varying(trace.forest.canon(ids)):
        stacked = tidy(torch.stack(list(out)))
        trace.chunks(stacked)
    else:
        trace.later(ids, axis, ids, f"the channels are cut into {parts} unequal chunks")
    return out


def gather_rows(node: fx.Node, trace: Trace) -> Any:
    """index_select and x[idx]: along an indexed axis nothing may shrink; a constant index is executed."""
    source, index = node.args[0], node.args[1]
    ids = trace.of(source)
    if schema(node).name == "aten::index_select":
        axes, constant = [int(index)], node.args[2] in trace.values  # type: ignore[arg-type]
        indices: Any = node.args[2]
    else:
        axes = [i for i, v in enumerate(index) if v is not None]  # type: ignore[arg-type]
        constant = all(v in trace.values for v in index if v is not None)  # type: ignore[union-attr]
        indices = index
    for axis in axes:
        trace.later(ids, axis, ids, "channels are picked by index")
    if constant:
        real = fx.node.map_arg(indices, lambda n: trace.values[n])
        if schema(node).name == "aten::index_select":
            return tidy(ids.index_select(axes[0], real))
        return tidy(torch.ops.aten.index.Tensor(ids, list(real)))
    shape = result(node).shape
    if any(a in varying(trace.forest.canon(ids)) for a in axes):
        # rows of a table by data: the rows must agree, then any row stands for all
        for axis in axes:
            trace.tie(ids, ids.narrow(axis, 0, 1), "picked by data")
        ids = trace.forest.canon(ids)
    if axes == [0] and len(shape) >= ids.dim() - 1:
        return tidy(ids[0].expand(shape))
    if len(axes) == 1 and len(shape) == ids.dim():
        return tidy(ids.narrow(axes[0], 0, 1).expand(shape))
    trace.pin(ids, f"indexed by data in {node.target}")
    return result(node)


def embedding(node: fx.Node, trace: Trace) -> Any:
    """Rows by index: the columns are channels."""
    return (
        _looked_up(node, trace, sizes(node.meta["val"])) if node.args[0] in trace.parameters else unknown(node, trace)
    )


def embedding_bag(node: fx.Node, trace: Trace) -> Any:
    """The same rows, added up, averaged or the largest. The further results say where they were taken from."""
    if node.args[0] not in trace.parameters:
        return unknown(node, trace)
    found, *more = (sizes(v) for v in node.meta["val"])
    # of the largest there is an index for every channel
    return _looked_up(node, trace, found), *(_looked_up(node, trace, s) if len(s) == 2 else fixed(s) for s in more)


def _looked_up(node: fx.Node, trace: Trace, shape: tuple[int, ...]) -> Tensor:
    weight: Any = node.args[0]
    if trace.parameters[weight].name in trace.raw:
        trace.pin(trace.of(weight), "a table that is also used element by element")
    rows = trace.weight(weight, 0, "write")
    trace.pin(rows, "rows of an embedding table")
    return laid(trace.weight(weight, 1, "write"), len(shape) - 1, shape)


def pad(node: fx.Node, trace: Trace) -> Any:
    """Padding along channels makes new channels of its own (option-A shortcuts); elsewhere channels just go on."""
    ids = trace.forest.canon(trace.of(node.args[0]))
    sides: Any = node.args[1]
    pad: list[Any] = [trace.ids[p] if isinstance(p, fx.Node) else p for p in sides]
    shape = list(ids.shape)
    for i in range(len(pad) // 2):
        axis, before, after = len(shape) - 1 - i, int(pad[2 * i]), int(pad[2 * i + 1])
        if axis not in varying(ids):
            shape[axis] += before + after
            ids = ids.narrow(axis, 0, 1).expand(shape)
            continue
        pieces = [ids.narrow(axis, max(-before, 0), shape[axis] + min(before, 0) + min(after, 0))]
        made = [_new_channels(trace, max(count, 0), axis, shape) for count in (before, after)]
        if any(a.name == "value" and args_of(node, "value")[0] for a in schema(node).arguments):
            trace.filled += made
        pieces = [made[0], *pieces, made[1]]
        ids = tidy(torch.cat(pieces, dim=axis))
        shape[axis] += before + after
    mode = node.args[2] if len(node.args) > 2 else "constant"
    if (
        isinstance(mode, str)
        and mode != "constant"
        and any(a in varying(ids) and ids.shape[a] != trace.of(node.args[0]).shape[a] for a in range(ids.dim()))
    ):
        trace.pin(ids, f"padding channels by {mode}")
    return ids


def _new_channels(trace: Trace, count: int, axis: int, shape: list[int]) -> Tensor:
    size = list(shape)
    size[axis] = count
    return laid(trace.forest.fresh(count), axis, size)


def unfold(node: fx.Node, trace: Trace) -> Any:
    """Sliding windows along an axis that carries no channels."""
    ids = trace.of(node.args[0])
    axis = int(args_of(node, "dimension")[0])
    trace.later(ids, axis, ids, "windows over the channels")
    return executed(node, trace)
