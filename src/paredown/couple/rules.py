"""One rule per op: how the ids of its result follow from the ids of its operands, and what it ties.

A rule takes the node and the Trace and returns the id tensor of the result (a tuple for several results, an int for
a size). Families: constant, size, shape, unary, binary, reduce, contraction (contract.py), norm, pool. An op without a
rule pins every id that reaches it; so the answer is sound whatever the op does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.couple.ids import FIXED, along, fixed, laid, tidy, varying
from paredown.couple.trace import Trace, concrete, sizes

Rule = Callable[[fx.Node, Trace], Any]


def args_of(node: fx.Node, *names: str) -> list[Any]:
    """The arguments of these names, given by position or keyword, with the schema's defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    at = {a.name: i for i, a in enumerate(schema)}
    out = []
    for name in names:
        i = at[name]
        out.append(node.args[i] if i < len(node.args) else node.kwargs.get(name, schema[i].default_value))
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


# ------------------------------------------------------------------------------------------------ constants and sizes

_CREATE = {"arange", "zeros", "ones", "full", "empty", "linspace", "eye", "scalar_tensor", "tensor", "lift_fresh_copy", "rand", "randn", "triu_indices", "tril_indices"}
_CREATE_LIKE = {"new_zeros", "new_ones", "new_full", "new_empty"}


def is_constant(node: fx.Node, trace: Trace) -> bool:
    """Whether a node can be computed now: it reads no activation and no learned number."""
    if not isinstance(node.target, torch._ops.OpOverload):
        ins = node.all_input_nodes
        return bool(ins) and all(n in trace.values or isinstance(trace.ids.get(n), int | float | bool) for n in ins)
    name = node.target._schema.name.removeprefix("aten::")
    if name in _CREATE:
        return all(n in trace.values or isinstance(trace.ids.get(n), int | float | bool) for n in node.all_input_nodes)
    ins = node.all_input_nodes
    if not ins or name.startswith(("sym_", "_assert")):
        return False
    return all(n in trace.values or isinstance(trace.ids.get(n), int | float | bool) for n in ins) and any(n in trace.values for n in ins)


def _create_like(node: fx.Node, trace: Trace) -> Any:
    """x.new_zeros(size): constant, whatever x holds."""
    name = node.target._schema.name.removeprefix("aten::new_")  # type: ignore[union-attr]
    rest = fx.node.map_arg(node.args[1:], lambda n: trace.ids[n] if n not in trace.values else trace.values[n])
    make = {"zeros": torch.zeros, "ones": torch.ones, "full": torch.full, "empty": torch.zeros}[name]
    trace.values[node] = make(*rest, dtype=node.meta["val"].dtype)
    return fixed(trace.values[node].shape)


def _size(node: fx.Node, trace: Trace) -> Any:
    source, axis = node.args[0], node.args[1]
    return concrete(source.meta["val"].shape[axis])  # type: ignore[union-attr,index]


def _python(node: fx.Node, trace: Trace) -> Any:
    args = fx.node.map_arg(node.args, lambda n: trace.ids[n])
    return node.target(*args)  # type: ignore[operator]


def _getitem(node: fx.Node, trace: Trace) -> Any:
    source: Any = node.args[0]
    if source in trace.values:
        trace.values[node] = trace.values[source][node.args[1]]  # type: ignore[index]
    return trace.ids[source][node.args[1]]


def _nothing(node: fx.Node, trace: Trace) -> Any:
    return None


# --------------------------------------------------------------------------------------------------------------- shape


def _moved(node: fx.Node, trace: Trace) -> Any:
    """Ops that only move axes, also of a weight: seen through, so that x @ W.t() is a linear."""
    source: Any = node.args[0]
    seen = trace.parameters.get(source)
    if seen is not None and len(seen.shape) == 2:
        import dataclasses

        name = node.target._schema.name  # type: ignore[union-attr]
        order = list(node.args[1]) if name == "aten::permute" else [1, 0]  # type: ignore[arg-type]
        trace.parameters[node] = dataclasses.replace(seen, shape=tuple(seen.shape[i] for i in order), axes=tuple(seen.axes[i] for i in order))
        return None
    return _executed(node, trace)


def _executed(node: fx.Node, trace: Trace) -> Any:
    """Run the op itself on the ids."""
    target: Any = node.target
    if target is torch.ops.aten.view.default:
        target = torch.ops.aten.reshape.default
    args = fx.node.map_arg(node.args, lambda n: _operand(n, trace))
    kwargs = {k: v for k, v in fx.node.map_arg(node.kwargs, lambda n: _operand(n, trace)).items() if k not in ("dtype", "memory_format")}
    out = target(*args, **kwargs)
    return pytree.tree_map(lambda t: tidy(t) if isinstance(t, Tensor) else t, out)


def _operand(node: fx.Node, trace: Trace) -> Any:
    if node in trace.parameters or isinstance(trace.ids.get(node), Tensor):
        return trace.of(node)
    return trace.ids[node]


def _picked(node: fx.Node, trace: Trace) -> Any:
    """select, unbind: the number of results is fixed, so the axis must not shrink."""
    source: Any = node.args[0]
    ids = trace.of(source)
    axis = int(args_of(node, "dim")[0])
    trace.later(ids, axis, ids, "one position is picked from the channels")
    return _executed(node, trace)


def _kept_whole(node: fx.Node, trace: Trace) -> Any:
    """roll: positions along the axis carry meaning, so it must not shrink."""
    ids = trace.of(node.args[0])
    dims = args_of(node, "dims")[0]
    for axis in dims if dims else range(ids.dim()):
        trace.later(ids, axis, ids, "positions along the channels carry meaning")
    return _executed(node, trace)


def _slice(node: fx.Node, trace: Trace) -> Any:
    ids = trace.of(node.args[0])
    axis, step = args_of(node, "dim", "step")
    if step not in (None, 1):
        trace.later(ids, int(axis or 0), ids, "every n-th channel is taken")
    return _executed(node, trace)


def _chunk(node: fx.Node, trace: Trace) -> Any:
    """chunk: pieces stay equal where that is affordable, because the user's code will cut into equal pieces again."""
    ids = trace.of(node.args[0])
    parts, axis = args_of(node, "chunks", "dim")
    out = _executed(node, trace)
    if len({p.shape for p in out}) == 1 and axis % ids.dim() in varying(trace.forest.canon(ids)):
        stacked = tidy(torch.stack(list(out)))
        trace.chunks(stacked)
    else:
        trace.later(ids, axis, ids, f"the channels are cut into {parts} unequal chunks")
    return out


def _gather_rows(node: fx.Node, trace: Trace) -> Any:
    """index_select and x[idx]: along an indexed axis nothing may shrink; a constant index is executed."""
    source, index = node.args[0], node.args[1]
    ids = trace.of(source)
    if node.target._schema.name == "aten::index_select":  # type: ignore[union-attr]
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
        if node.target._schema.name == "aten::index_select":  # type: ignore[union-attr]
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


def _embedding(node: fx.Node, trace: Trace) -> Any:
    weight: Any = node.args[0]
    shape = result(node).shape
    if weight not in trace.parameters:
        return unknown(node, trace)
    if trace.parameters[weight].name in trace.raw:
        trace.pin(trace.of(weight), "a table that is also used element by element")
    rows = trace.weight(weight, 0, "write")
    trace.pin(rows, "rows of an embedding table")
    return laid(trace.weight(weight, 1, "write"), len(shape) - 1, shape)


def _pad(node: fx.Node, trace: Trace) -> Any:
    """Padding along channels makes new channels of its own (option-A shortcuts); elsewhere channels just go on."""
    ids = trace.forest.canon(trace.of(node.args[0]))
    pad = [trace.ids[p] if isinstance(p, fx.Node) else p for p in node.args[1]]  # type: ignore[union-attr]
    shape = list(ids.shape)
    for i in range(len(pad) // 2):
        axis, before, after = len(shape) - 1 - i, int(pad[2 * i]), int(pad[2 * i + 1])
        if axis not in varying(ids):
            shape[axis] += before + after
            ids = ids.narrow(axis, 0, 1).expand(shape)
            continue
        pieces = [ids.narrow(axis, max(-before, 0), shape[axis] + min(before, 0) + min(after, 0))]
        if before > 0:
            pieces.insert(0, _new_channels(trace, before, axis, shape))
        if after > 0:
            pieces.append(_new_channels(trace, after, axis, shape))
        ids = tidy(torch.cat(pieces, dim=axis))
        shape[axis] += before + after
    mode = node.args[2] if len(node.args) > 2 else "constant"
    if isinstance(mode, str) and mode != "constant" and any(a in varying(ids) and ids.shape[a] != trace.of(node.args[0]).shape[a] for a in range(ids.dim())):
        trace.pin(ids, f"padding channels by {mode}")
    return ids


def _new_channels(trace: Trace, count: int, axis: int, shape: list[int]) -> Tensor:
    size = list(shape)
    size[axis] = count
    return laid(trace.forest.fresh(count), axis, size)


def _unfold(node: fx.Node, trace: Trace) -> Any:
    """Sliding windows along an axis that carries no channels."""
    ids = trace.of(node.args[0])
    axis = int(args_of(node, "dimension")[0])
    trace.later(ids, axis, ids, "windows over the channels")
    return _executed(node, trace)


# ----------------------------------------------------------------------------------------------------- unary and binary


def _unary(node: fx.Node, trace: Trace) -> Any:
    """Element by element, one tensor: the ids go through."""
    ids = trace.of(node.args[0])
    out = result(node)
    if isinstance(out, Tensor) and ids.shape != out.shape:
        ids = ids.expand(out.shape)
    source: Any = node.args[0]
    if not isinstance(out, Tensor):
        return pytree.tree_map(lambda o: ids if isinstance(o, Tensor) and o.shape == ids.shape else o, out)
    if source in trace.values and node not in trace.values:
        return ids
    return ids


def _nary(node: fx.Node, trace: Trace) -> Any:
    """Element by element, several tensors: what meets lives or dies together."""
    operands = [n for n in node.all_input_nodes if n in trace.parameters or isinstance(trace.ids.get(n), Tensor)]
    out = result(node)
    ids = trace.of(operands[0])
    for other in operands[1:]:
        ids = merge(ids, trace.of(other), trace)
    return ids.expand(out.shape) if isinstance(out, Tensor) and ids.shape != out.shape else ids


def merge(a: Tensor, b: Tensor, trace: Trace) -> Tensor:
    """The ids of an element-wise result; shapes broadcast.

    An operand of length 1 along the other's channels serves all of them: it does not die with any one of them.
    """
    a, b = trace.forest.canon(a), trace.forest.canon(b)
    dims = max(a.dim(), b.dim())
    a, b = (t.reshape((1,) * (dims - t.dim()) + tuple(t.shape)) if t.dim() < dims else t for t in (a, b))
    a, b = _released(a, b, trace), _released(b, a, trace)
    shape = torch.broadcast_shapes(a.shape, b.shape)
    one, two = _small(a), _small(b)
    trace.forest.unite(one, two)
    one, two = torch.broadcast_tensors(one, two)
    # A fixed element beside a channel: harmless where the fixed operand is broadcast along the channels, else it pins.
    for x, y, y_whole in ((one, two, b), (two, one, a)):
        lone = (x != FIXED) & (y == FIXED)
        if bool(lone.any()) and any(y_whole.shape[d] > 1 for d in varying(tidy(x))):
            trace.pin(x[lone], "a constant as long as the channels is combined with them")
    return tidy(torch.where(one != FIXED, one, two)).expand(shape)


def _small(ids: Tensor) -> Tensor:
    from paredown.couple.ids import compact

    return compact(ids)


def _released(t: Tensor, other: Tensor, trace: Trace) -> Tensor:
    """`t` as fixed where it is a single channel broadcast along the other's many."""
    stretched = [d for d in varying(other) if t.shape[d] == 1]
    if stretched and bool((t != FIXED).any()) and not varying(t):
        trace.pin(t, "one channel is broadcast over many")
        return fixed(t.shape)
    return t


def _glu(node: fx.Node, trace: Trace) -> Any:
    """glu(x) = a · sigmoid(b) with a, b the halves of x along an axis."""
    ids = trace.of(node.args[0])
    axis = int(args_of(node, "dim")[0])
    a, b = ids.chunk(2, dim=axis)
    return merge(tidy(a), tidy(b), trace)


def _prelu(node: fx.Node, trace: Trace) -> Any:
    ids, slope = trace.of(node.args[0]), trace.of(node.args[1])
    if slope.numel() > 1:
        axis = 1 if ids.dim() > 1 else 0
        trace.tie(trace.vector(ids, axis, "prelu"), slope, "prelu")
    else:
        trace.pin(slope, "one slope for all channels")
    return ids


# ------------------------------------------------------------------------------------------------------------- reduce


def _reduce(node: fx.Node, trace: Trace) -> Any:
    """Reductions: over channels they tie what is reduced together (a head), or pin a whole channel axis."""
    ids = trace.forest.canon(trace.of(node.args[0]))
    dims, keep = _reduced(node, ids)
    ids = reduce_rows(ids, dims, f"{node.target} over the channels", trace)
    for axis in sorted(dims, reverse=True):
        ids = ids.narrow(axis, 0, 1) if keep else ids.select(axis, 0)
    return pytree.tree_map(lambda o: tidy(ids.expand(o.shape)) if isinstance(o, Tensor) else o, result(node))


def reduce_rows(ids: Tensor, dims: list[int], reason: str, trace: Trace) -> Tensor:
    """Tie along `dims`; where no other axis varies the whole channel axis is pinned instead."""
    if not any(d in varying(ids) for d in dims):
        return ids
    if all(a in dims for a in varying(ids)):
        trace.pin(ids, reason)
        return fixed(ids.shape)
    first = ids
    for axis in dims:
        first = first.narrow(axis, 0, 1)
    trace.tie(ids, first, reason)
    trace.heads.append(first)
    return trace.forest.canon(ids)


def _reduced(node: fx.Node, ids: Tensor) -> tuple[list[int], bool]:
    names = {a.name for a in node.target._schema.arguments}  # type: ignore[union-attr]
    dims: Any = args_of(node, "dim")[0] if "dim" in names else None
    keep = bool(args_of(node, "keepdim")[0]) if "keepdim" in names else False
    if isinstance(dims, int):
        dims = [dims]
    dims = [d % max(ids.dim(), 1) for d in dims] if dims else list(range(ids.dim()))
    return dims, keep


def _softmax(node: fx.Node, trace: Trace) -> Any:
    """softmax, cumulative ops: shape stays, but elements along the axis see each other."""
    ids = trace.forest.canon(trace.of(node.args[0]))
    axis = int(args_of(node, "dim")[0]) % max(ids.dim(), 1)
    out = reduce_rows(ids, [axis], f"{node.target} over the channels", trace)
    return pytree.tree_map(lambda o: out if isinstance(o, Tensor) else o, result(node))


# --------------------------------------------------------------------------------------------------------------- norms


def _channel_norm(node: fx.Node, trace: Trace) -> Any:
    """batch_norm, instance_norm: every channel on its own; parameters and statistics follow it."""
    ids = trace.of(node.args[0])
    channels = trace.vector(ids, 1, "channels of a norm")
    for operand in node.args[1:5]:
        if isinstance(operand, fx.Node):
            trace.tie(trace.of(operand), channels, "norm over a fixed channel")
    return trace.forest.canon(ids)


def _last_norm(node: fx.Node, trace: Trace) -> Any:
    """layer_norm, rms_norm over the last axes: survivors are normalised among themselves."""
    ids = trace.forest.canon(trace.of(node.args[0]))
    over: Any = node.args[1]
    first = ids.dim() - len(over)
    operands = [trace.of(n) for n in args_of(node, *[a for a in ("weight", "bias") if a in {x.name for x in node.target._schema.arguments}]) if isinstance(n, fx.Node)]  # type: ignore[union-attr]
    if any(a >= first for a in varying(ids)) and _is_split(ids, first, trace):
        # heads: one norm serves all of them, so each head stays whole and the norm's own axis stays fixed
        for operand in operands:
            trace.pin(operand, "a norm shared by all heads")
        return reduce_rows(ids, list(range(first, ids.dim())), "norm over the channels", trace)
    leading = ids
    for axis in range(first):
        if axis in varying(ids):
            trace.tie(ids, leading.narrow(axis, 0, 1), "norm over tokens")
            ids = leading = trace.forest.canon(ids)
    for operand in operands:
        trace.tie(operand, ids[(0,) * first], "norm over a fixed channel")
    ids = trace.forest.canon(ids)
    trace.norms[node] = ids[(0,) * first]
    return ids


def _is_split(ids: Tensor, first: int, trace: Trace) -> bool:
    """Whether a leading axis holds channels of the same weight as the normalised one: heads, not tokens."""
    for axis in range(first):
        if axis in varying(ids):
            small = _small(ids)
            a, b = small.narrow(axis, 0, 1), small.narrow(axis, 1, 1)
            origin_a, origin_b = trace.forest.origins(a.contiguous()), trace.forest.origins(b.contiguous())
            if bool(((origin_a == origin_b) & (origin_a > 0) & (a != b)).any()):
                return True
    return False


def _group_norm(node: fx.Node, trace: Trace) -> Any:
    """group_norm: all groups lose the same positions, so that groups stay equal."""
    ids = trace.of(node.args[0])
    groups, weight, bias = args_of(node, "num_groups", "weight", "bias")
    channels = trace.vector(ids, 1, "channels of a norm")
    for operand in (weight, bias):
        if isinstance(operand, fx.Node):
            trace.tie(trace.of(operand), channels, "norm over a fixed channel")
    table = channels.reshape(int(groups), -1)
    if table.shape[1] > 1:
        trace.tie(table, table[:1], "groups of a norm")
        trace.norms[node] = channels
    return trace.forest.canon(ids)


# ------------------------------------------------------------------------------------------------------ pool, resample


def _pool(node: fx.Node, trace: Trace) -> Any:
    """Pooling and resampling over the spatial axes: channels go through."""
    ids = trace.forest.canon(trace.of(node.args[0]))
    out = result(node)
    shape = out.shape if isinstance(out, Tensor) else out[0].shape
    spatial = _spatial(node)
    first = ids.dim() - spatial
    for axis in range(first, ids.dim()):
        if axis in varying(ids):
            trace.tie(ids, ids.narrow(axis, 0, 1), "pooled together")
            ids = trace.forest.canon(ids)
        ids = ids.narrow(axis, 0, 1)
    ids = ids.expand(shape)
    return ids if isinstance(out, Tensor) else tuple(ids if o.shape == shape else o for o in out)


def _spatial(node: fx.Node) -> int:
    name = node.target._schema.name  # type: ignore[union-attr]
    return 1 if "1d" in name else 3 if "3d" in name else 2


def _grid_sample(node: fx.Node, trace: Trace) -> Any:
    ids = trace.forest.canon(trace.of(node.args[0]))
    trace.pin(trace.of(node.args[1]), "coordinates of a sampling grid")
    return laid(trace.vector(ids, 1, "sampled together"), 1, result(node).shape)


def _rnn(node: fx.Node, trace: Trace) -> Any:
    """LSTM, GRU, RNN: the inputs of the first layer are read; everything inside is pinned."""
    source, hidden, params = node.args[0], node.args[1], node.args[2]
    why = f"inside {node.target}"
    firsts = _first_layer(node, params)  # type: ignore[arg-type]
    ids = trace.of(source)
    channels = trace.vector(ids, ids.dim() - 1, why)
    for n in pytree.tree_leaves((hidden, params)):
        if n in firsts:
            trace.read(n, 1, channels, "read by a recurrent layer")
            trace.pin(trace.weight(n, 0, "write"), why)
        elif isinstance(n, fx.Node):
            trace.pin(trace.of(n), why)
    return result(node)


def _first_layer(node: fx.Node, params: list[fx.Node]) -> set[fx.Node]:
    """weight_ih of layer 0, both directions."""
    has_biases, layers, both = args_of(node, "has_biases", "num_layers", "bidirectional")
    per = len(params) // (int(layers) * (2 if both else 1))
    return {params[0], *([params[per]] if both else [])}


# --------------------------------------------------------------------------------------------------------------- table

_UNARY = (
    "relu relu_ relu6 relu6_ silu silu_ gelu gelu_ hardtanh hardtanh_ hardswish hardswish_ hardsigmoid hardsigmoid_ sigmoid sigmoid_ "
    "tanh tanh_ elu elu_ selu selu_ celu celu_ mish mish_ softplus softsign leaky_relu leaky_relu_ rrelu threshold threshold_ logit "
    "log_sigmoid dropout dropout_ feature_dropout feature_dropout_ alpha_dropout alpha_dropout_ feature_alpha_dropout native_dropout "
    "clone contiguous detach detach_ alias to _to_copy type_as float_power lift_fresh "
    "abs abs_ neg neg_ exp exp_ expm1 log log_ log2 log10 log1p sqrt sqrt_ rsqrt rsqrt_ square reciprocal sin cos tan atan asin acos sinh cosh erf erfc "
    "ceil floor round trunc frac sign clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ isnan isinf isfinite nan_to_num bitwise_not logical_not "
    "zero_ fill_ zeros_like ones_like full_like empty_like rand_like randn_like bernoulli bernoulli_ uniform_ normal_ tril triu positive fill "
    "hardshrink softshrink tanhshrink sgn flip nan_to_num_ requires_grad_"
).split()
_NARY = (
    "add add_ sub sub_ mul mul_ div div_ rsub pow pow_ floor_divide remainder fmod maximum minimum atan2 where masked_fill masked_fill_ "
    "eq ne lt le gt ge eq_ ne_ logical_and logical_or logical_xor bitwise_and bitwise_or addcmul addcmul_ addcdiv addcdiv_ lerp lerp_ "
    "expand_as view_as copy_ copy true_divide true_divide_ __and__ __or__ xlogy hypot"
).split()
_SHAPE = (
    "view reshape squeeze unsqueeze expand cat concat split split_with_sizes tensor_split flatten unflatten stack repeat repeat_interleave "
    "pixel_shuffle pixel_unshuffle channel_shuffle narrow movedim moveaxis swapaxes broadcast_to _unsafe_view hstack vstack meshgrid rot90 view_copy _reshape_alias"
).split()
_MOVED = "permute transpose t numpy_T swapdims adjoint mT".split()
_REDUCE = (
    "mean sum amax amin prod var std var_mean std_mean norm linalg_vector_norm logsumexp argmax argmin max min any all median count_nonzero nansum"
).split()
_SOFTMAX = "softmax log_softmax _softmax _log_softmax cumsum cumprod sort topk kthvalue argsort".split()
_POOL = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa lp_pool2d"
).split()
_PYTHON = "add sub mul floordiv truediv mod neg eq ne lt le gt ge and_ or_ not_ pow trunc floor ceil sqrt min max sym_min sym_max".split()


def _table() -> dict[str, Rule]:
    from paredown.couple import contract

    table: dict[str, Rule] = {}
    for names, rule in (
        (_UNARY, _unary),
        (_NARY, _nary),
        (_SHAPE, _executed),
        (_MOVED, _moved),
        (_REDUCE, _reduce),
        (_SOFTMAX, _softmax),
        (_POOL, _pool),
        ("sym_size sym_numel".split(), _size),
        ([f"operator.{n}" for n in _PYTHON] + ["sym_max", "sym_min", "sym_sum", "sym_not", "sym_float", "sym_ite"], _python),
        (sorted(_CREATE_LIKE), _create_like),
        ("select unbind".split(), _picked),
        ("index index_select".split(), _gather_rows),
        ("constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad2d".split(), _pad),
        ("batch_norm instance_norm _native_batch_norm_legit_functional".split(), _channel_norm),
        ("layer_norm rms_norm".split(), _last_norm),
        ("lstm gru rnn_tanh rnn_relu".split(), _rnn),
        ("_assert_scalar _assert_tensor_metadata sym_constrain_range_for_size sym_constrain_range _assert_async".split(), _nothing),
    ):
        table |= dict.fromkeys(names, rule)
    return table | contract.RULES | {
        "operator.getitem": _getitem,
        "slice": _slice,
        "chunk": _chunk,
        "roll": _kept_whole,
        "embedding": _embedding,
        "unfold": _unfold,
        "glu": _glu,
        "prelu": _prelu,
        "group_norm": _group_norm,
        "grid_sampler": _grid_sample,
    }


RULES: dict[str, Rule] = _table()
