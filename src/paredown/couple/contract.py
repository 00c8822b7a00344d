"""Rules for ops that contract one operand with another: convolution, linear, matrix products, attention."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from paredown.couple import letters, stacks
from paredown.couple.computed import follow
from paredown.couple.ids import FIXED, along, fixed, laid, tidy, varying
from paredown.couple.operand import args_of, merge, precedence, result, schema, unknown
from paredown.couple.trace import Summed, Trace
from paredown.examine.count import indices


def _conv(node: fx.Node, trace: Trace) -> Any:
    source, weight, bias, groups = args_of(node, "input", "weight", "bias", "groups")
    made = trace.computed.get(weight)
    weight = weight if made is None else made.parameter
    if weight not in trace.parameters:
        return unknown(node, trace)
    shape = result(node).shape
    axis = len(shape) - (len(trace.parameters[weight].shape) - 2) - 1
    ids = trace.forest.canon(trace.of(source))
    over_tokens = made is None and _passes(node, ids, axis)
    read = fixed(ids.shape[axis : axis + 1]) if over_tokens else trace.vector(ids, axis, "channels of a convolution")
    wrote = trace.weight(weight, 0, "write")
    _grouped(trace, weight, 1, read, wrote, int(groups))
    if made is not None:  # what leaves is read by no weight that could be zeroed: by a computed one
        trace.summed[node] = Summed(operand=source, axis=axis, ids=read)
        of_group = read.reshape(int(groups), -1)[0]
        trace.products[node.name] = [of_group, wrote] if len(of_group) > 1 else [wrote]  # no parameter has its MACs
        follow(made, trace)
    _bias(trace, bias, wrote)
    if over_tokens:
        return _through(trace, ids, axis, wrote, shape)
    return laid(wrote, axis, shape)


def _passes(node: fx.Node, ids: Tensor, axis: int) -> bool:
    """Whether a convolution mixes tokens and lets the channels, which lie along its kernel of width 1, go through."""
    across = varying(ids)
    if not across or axis in across or ids.shape[axis] == 1:
        return False
    groups, stride, padding = args_of(node, "groups", "stride", "padding")
    kernel: Any = node.args[1]
    plain = padding == "valid" or (not isinstance(padding, str) and not any(padding))
    return (
        groups == 1
        and plain
        and all(s == 1 for s in stride)
        and all(k == 1 for k in kernel.meta["val"].shape[2:])
        and min(across) > axis
    )


def _conv_transpose(node: fx.Node, trace: Trace) -> Any:
    """Weight [in, out / groups, …]: axis 0 reads, axis 1 writes."""
    source, weight, bias, groups = args_of(node, "input", "weight", "bias", "groups")
    if weight not in trace.parameters:
        return unknown(node, trace)
    shape = result(node).shape
    axis = len(shape) - (len(trace.parameters[weight].shape) - 2) - 1
    read = trace.vector(trace.of(source), axis, "channels of a convolution")
    groups = int(groups)
    trace.read(weight, 0, read, "read by a convolution")
    per = trace.weight(weight, 1, "write")
    if groups == 1:
        wrote = per
    elif len(per) == 1:  # depthwise: each output follows its input
        trace.pin(per, "kernel of a depthwise convolution")
        wrote = read
    else:
        rows = read.reshape(groups, -1)
        trace.tie(rows, rows[:1], "groups of a convolution")
        wrote = per.repeat(groups)
    _bias(trace, bias, wrote)
    return laid(wrote, axis, shape)


def _grouped(trace: Trace, weight: fx.Node, axis: int, read: Tensor, wrote: Tensor, groups: int) -> None:
    """Tie a convolution's channels: per group the same positions leave, so that groups stay equal."""
    if groups == 1:
        trace.read(weight, axis, read, "read by a convolution")
        return
    ins, outs = read.reshape(groups, -1), wrote.reshape(groups, -1)
    if ins.shape[1] == 1:  # depthwise, also with a multiplier: outputs follow their input
        trace.tie(outs, ins, "depthwise convolution of a fixed channel")
        return
    trace.tie(ins, ins[:1], "groups of a convolution")
    trace.tie(outs, outs[:1], "groups of a convolution")
    trace.read(weight, axis, ins[0], "read by a convolution")


def _bias(trace: Trace, bias: Any, wrote: Tensor) -> None:
    if isinstance(bias, fx.Node):
        trace.tie(trace.of(bias), wrote, "a computed bias")


def _linear(node: fx.Node, trace: Trace) -> Any:
    source, weight, bias = args_of(node, "input", "weight", "bias")
    shape = result(node).shape
    made = trace.computed.get(weight)
    if made is not None:
        read = trace.vector(trace.of(source), len(shape) - 1, "features of a linear layer")
        each = read.reshape(trace.parameters[made.parameter].shape[1], -1)
        trace.tie(each, each[:, :1], "columns that are read together")
        trace.read(made.parameter, 1, each[:, 0], "read by a linear layer")
        wrote = trace.weight(made.parameter, 0, "write")
        trace.summed[node] = Summed(operand=source, axis=len(shape) - 1, ids=read)  # as in _conv
        trace.products[node.name] = [read, wrote]
        follow(made, trace)
        _bias(trace, bias, wrote)
        return laid(wrote, len(shape) - 1, shape)
    if weight not in trace.parameters or len(trace.parameters[weight].shape) != 2:
        return unknown(node, trace)
    return _product_with_weight(trace, source, weight, 1, 0, shape, bias)


def _product_with_weight(
    trace: Trace, source: fx.Node, weight: fx.Node, read_axis: int, write_axis: int, shape: Any, bias: Any = None
) -> Tensor:
    """The last axis is read and written. Where the channels lie along another one (tokens are mixed, each channel by
    itself) they go through, and the layer keeps its size."""
    ids = trace.forest.canon(trace.of(source))
    across = varying(ids)
    # An axis of length 1 cannot tell: a table with one feature left is read feature by feature as before.
    over_tokens = bool(across) and ids.dim() - 1 not in across and len(shape) == ids.dim() and ids.shape[-1] > 1
    read = fixed(ids.shape[-1:]) if over_tokens else trace.vector(ids, ids.dim() - 1, "features of a linear layer")
    trace.read(weight, read_axis, read, "read by a linear layer")
    wrote = trace.weight(weight, write_axis, "write")
    _bias(trace, bias, wrote)
    if trace.parameters[weight].is_part and trace.node is not None:
        trace.products[trace.node.name] = [read, wrote]  # MACs are not counted by elements of a part
    if over_tokens:
        return _through(trace, ids, ids.dim() - 1, wrote, shape)
    return laid(wrote, len(shape) - 1, shape)


def _through(trace: Trace, ids: Tensor, axis: int, wrote: Tensor, shape: Any) -> Tensor:
    """The channels go through a layer that mixes tokens along `axis`; it is as wide as it was, for as many channels as are left."""
    trace.pin(wrote, "a layer along another axis than the channels")
    if len(varying(ids)) == 1 and trace.node is not None:
        trace.products[trace.node.name] = [along(ids, varying(ids)[0])]
    return ids.narrow(axis, 0, 1).expand(tuple(shape))


def _matmul(node: fx.Node, trace: Trace) -> Any:
    a, b = node.args[0], node.args[1]
    shape = result(node).shape
    if _is_matrix(trace, b) and not _is_matrix(trace, a) and len(trace.of(a).shape) >= 2:
        return _product_with_weight(trace, a, b, 0, 1, shape)  # type: ignore[arg-type]
    stacked = stacks.product(trace, a, b, shape)
    if stacked is not None:
        return stacked
    left, right = trace.of(a), trace.of(b)
    if left.dim() < 2 or right.dim() < 2:
        return _vector_product(node, trace, left, right)
    return contract(trace, left, right, shape, node.name, Reader(node, a, -1))


def _addmm(node: fx.Node, trace: Trace) -> Any:
    """bias + a @ b."""
    bias, a, b = node.args[:3]
    shape = result(node).shape
    if _is_matrix(trace, b) and not _is_matrix(trace, a):
        out = _product_with_weight(trace, a, b, 0, 1, shape)  # type: ignore[arg-type]
    else:
        stacked = stacks.product(trace, a, b, shape)
        reader = Reader(node, a, -1)
        out = contract(trace, trace.of(a), trace.of(b), shape, node.name, reader) if stacked is None else stacked
    return merge(out, trace.of(bias), trace).expand(shape)


def _is_matrix(trace: Trace, node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node in trace.parameters
        and len(trace.parameters[node].shape) == 2
        and trace.parameters[node].name not in trace.raw
    )


def _vector_product(node: fx.Node, trace: Trace, a: Tensor, b: Tensor) -> Any:
    for ids in (a, b):
        trace.pin(ids, "product with a vector")
    return result(node)


class Reader(NamedTuple):
    """Who sums over the contracted axis: the node, its first operand, and that operand's axis."""

    node: fx.Node
    operand: Any
    axis: int


def contract(trace: Trace, a: Tensor, b: Tensor, shape: Any, name: str, reader: Reader) -> Tensor:
    """out[l, i, k] = Σ_j a[l, i, j] · b[l, j, k] for ids.

    Where ids vary along the leading axes (heads), each row l lives or dies as a whole. Without heads, j is tied
    between the operands, and i and k go through. An operand that all heads share (one key for all of them) has no
    heads of its own: see _shared.
    """
    lead = tuple(shape[:-2])
    a, b = (t.reshape((1,) * (len(shape) - t.dim()) + tuple(t.shape)) for t in (a, b))
    a, b = trace.forest.canon(a), trace.forest.canon(b)
    a, b = _shared(trace, a, b, -1)
    b, a = _shared(trace, b, a, -2)
    i, j, k = a.shape[-2], a.shape[-1], b.shape[-1]
    a, b = tidy(a.expand(*lead, i, j)), tidy(b.expand(*lead, j, k))
    num_lead = len(lead)
    if any(ax < num_lead for t in (a, b) for ax in varying(t)):
        return _whole_rows(trace, a, b, shape, name)
    return _single(trace, a, b, shape, name, reader)


def _shared(trace: Trace, mine: Tensor, other: Tensor, summed: int) -> tuple[Tensor, Tensor]:
    """Heads of `mine` that all meet one and the same `other`.

    Where that is a constant for each head, no head may leave, and where it is one set of channels for all heads, the
    channels summed over leave from every head alike: either way heads are tied position by position (lockstep). Only
    where they are whole already they stay free, and what they share stays.
    """
    for axis in [x for x in varying(mine) if x < mine.dim() - 2]:
        across = varying(other)
        if axis in across:
            continue
        if not across and bool((other != FIXED).any()):  # one unit in all: it could only leave with everything
            trace.pin(other, "shared by all heads")
            other = fixed(other.shape)
        if not across and other.shape[axis] == 1:
            continue
        if not across or mine.dim() + summed in varying(mine):
            why = "one operand for all heads" if across else "a constant for each head"
            trace.tie(mine, mine.narrow(axis, 0, 1), why)
            mine, other = trace.forest.canon(mine), trace.forest.canon(other)
        else:
            trace.pin(other, "shared by all heads")
            other = fixed(other.shape)
    return mine, other


def _whole_rows(trace: Trace, a: Tensor, b: Tensor, shape: Any, name: str) -> Tensor:
    lead = tuple(shape[:-2])
    # batch axes are constant: work on one row per distinct leading position
    keep = [ax for ax in range(len(lead)) if ax in varying(a) or ax in varying(b)]
    pick = tuple(slice(None) if ax in keep else slice(0, 1) for ax in range(len(lead)))
    rows = math.prod(lead[ax] for ax in keep)
    flat = torch.cat([_inner(t)[pick].reshape(rows, -1) for t in (a, b)], dim=1)
    flat = torch.sort(flat, dim=1, descending=True).values
    head = flat[:, :1]
    trace.tie(torch.where(flat == FIXED, head, flat), head, "heads")
    trace.heads.append(head.reshape(-1))
    head = trace.forest.canon(head)
    small = head.reshape([lead[ax] if ax in keep else 1 for ax in range(len(lead))] + [1, 1])
    out = tidy(small).expand(tuple(shape))
    trace.products[name] = [head.reshape(-1)]
    return out


def _inner(ids: Tensor) -> Tensor:
    """The same ids with the last two axes narrowed where constant."""
    for axis in (ids.dim() - 2, ids.dim() - 1):
        if ids.shape[axis] > 1 and ids.stride(axis) == 0:
            ids = ids.narrow(axis, 0, 1)
    return ids


def _single(trace: Trace, a: Tensor, b: Tensor, shape: Any, name: str, reader: Reader) -> Tensor:
    num = len(shape) - 2
    # What meets a constant along the summed axis keeps it whole: its rows may leave (a matrix that is made for every sample).
    a_alone, b_alone = bool((b == FIXED).all()), bool((a == FIXED).all())
    a = _unmixed(trace, a, num + 1 if a_alone else num)
    b = _unmixed(trace, b, num if b_alone else num + 1)
    # An operand whose channels do not lie along the summed axis (rows that go through) keeps it whole.
    left = along(a, a.dim() - 1) if num + 1 in varying(a) else fixed(a.shape[-1:])
    right = along(b, b.dim() - 2) if num in varying(b) else fixed(b.shape[-2:-1])
    if num + 1 in varying(a) or num in varying(b):
        trace.tie(left, right, "contracted with a constant")
        trace.summed[reader.node] = Summed(operand=reader.operand, axis=reader.axis, ids=left)
    rows = along(a, a.dim() - 2) if num in varying(a) else None
    columns = along(b, b.dim() - 1) if num + 1 in varying(b) else None
    trace.products[name] = [v for v in (left if num + 1 in varying(a) else None, rows, columns) if v is not None]
    if rows is not None and columns is not None:
        behind = precedence(rows, trace) < precedence(columns, trace)
        trace.pin(rows if behind else columns, "rows and columns of a product both carry channels")
        rows, columns = (None, columns) if behind else (rows, None)
    if rows is not None:
        return laid(rows, len(shape) - 2, shape)
    if columns is not None:
        return laid(columns, len(shape) - 1, shape)
    return fixed(shape)


def _unmixed(trace: Trace, ids: Tensor, across: int) -> Tensor:
    """Channels along the axis that is summed over only: where they vary along the other one as well they are tied."""
    if len([x for x in varying(ids) if x >= ids.dim() - 2]) > 1:
        trace.tie(ids, ids.narrow(across, 0, 1), "a product over mixed channels")
        ids = trace.forest.canon(ids)
    return ids


def _attention(node: fx.Node, trace: Trace) -> Any:
    """softmax(q kᵀ / √d + mask) v."""
    q, k, v, mask = args_of(node, "query", "key", "value", "attn_mask")
    queries, keys, values = trace.of(q), trace.of(k), trace.of(v)
    shape = result(node).shape
    names = {a.name for a in schema(node).arguments}
    if "enable_gqa" in names and args_of(node, "enable_gqa")[0]:
        times = queries.shape[-3] // keys.shape[-3]
        keys, values = (t.repeat_interleave(times, dim=-3) for t in (keys, values))
    scores = contract(
        trace,
        queries,
        keys.transpose(-1, -2),
        (*shape[:-1], keys.shape[-2]),
        f"{node.name}:scores",
        Reader(node, q, -1),
    )
    if isinstance(mask, fx.Node):
        scores = merge(scores, trace.of(mask), trace).expand(scores.shape)
    if scores.dim() - 1 in varying(scores) or scores.dim() - 2 in varying(scores):
        trace.pin(scores, "attention over channels")
        scores = fixed(scores.shape)
    return contract(trace, trace.forest.canon(scores), values, shape, f"{node.name}:values", Reader(node, q, -1))


def _einsum(node: fx.Node, trace: Trace) -> Any:
    """Two operands: a linear layer, or out[batch, row, column] = Σ_summed left · right, permuted into a matrix product.

    Letters beyond one row and one column are batch letters of which the other operand has one position. Another number of
    operands: see letters.
    """
    operands: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    shape = result(node).shape
    terms, out = indices(str(node.args[0]), [letters.sizes_of(trace, o) for o in operands])
    if len(operands) != 2:
        return letters.product(node, trace, terms, out, operands)
    left, right = terms
    summed = [c for c in left if c in right and c not in out]
    if any(len({*t}) != len(t) for t in (left, right, out)) or {*left, *right} != {*out, *summed}:
        return unknown(node, trace)
    columns = [c for c in out if c not in left]
    if len(summed) == len(columns) == 1 and len(right) == 2 and _is_matrix(trace, operands[1]):
        ids = trace.of(operands[0])
        read = trace.vector(ids, left.index(summed[0]), "features of a product")
        trace.read(operands[1], right.index(summed[0]), read, "read by a product")
        wrote = trace.weight(operands[1], right.index(columns[0]), "write")
        return laid(wrote, out.index(columns[0]), shape)
    stacked = stacks.einsum(trace, (left, right, out), operands, shape)
    if stacked is not None:
        return stacked
    a, b = (trace.forest.canon(trace.of(o)) for o in operands)
    along_a, along_b = [left[x] for x in varying(a)], [right[x] for x in varying(b)]
    sums = [c for c in summed if c in along_a or c in along_b]
    if len(sums) > 1:
        return unknown(node, trace)
    row = _one([c for c in out if c not in right], along_a, "0")
    column = _one(columns, along_b, "1")
    batch = [c for c in out if c not in (row, column)]
    one, two = _ordered(a, left, [*batch, row, *sums]), _ordered(b, right, [*batch, *sums, column])
    one, two = (one, two) if sums else (one.unsqueeze(-1), two.unsqueeze(-2))
    size = dict(zip(out, shape, strict=True))
    lead = [*(size[c] for c in batch), size.get(row, 1), size.get(column, 1)]
    reader = Reader(node, operands[0], left.index(sums[0]) if sums else -1)
    product = contract(trace, one, two, lead, node.name, reader)
    have = [*batch, row, column]
    return tidy(product.permute([have.index(c) for c in [*out, *(c for c in have if c not in out)]]).reshape(shape))


def _one(ours: list[str], varying_letters: list[str], none: str) -> str:
    """The letter whose channels go through as a row or column: one along which they vary, else the last."""
    return next((c for c in ours if c in varying_letters), ours[-1] if ours else none)


def _ordered(ids: Tensor, have: list[str], want: list[str]) -> Tensor:
    """Axes in the wanted order; of letters that are not wanted the first position, for those that are not there an axis of 1."""
    left = list(have)
    for letter in [c for c in have if c not in want]:
        ids = ids.select(left.index(letter), 0)
        left.remove(letter)
    ids = ids.permute([left.index(c) for c in want if c in left])
    for place, letter in enumerate(want):
        if letter not in left:
            ids = ids.unsqueeze(place)
    return ids


RULES = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    "bilinear": letters.bilinear,
}
