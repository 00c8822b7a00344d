"""One rule per op: how the ids of its result follow from the ids of its operands, and what it ties.

A rule takes the node and the Trace and returns the id tensor of the result (a tuple for several results, an int for
a size). Families: constant, size, shape, unary, binary, reduce, contraction (contract.py), recurrent, norm, pool. An op without a
rule pins every id that reaches it; so the answer is sound whatever the op does.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.couple import contract, recurrent, shape
from paredown.couple.ids import FIXED, compact, fixed, laid, tidy, varying
from paredown.couple.operand import Rule, args_of, merge, result, schema, unknown
from paredown.couple.trace import Trace

# ----------------------------------------------------------------------------------------------------- unary and binary


def _unary(node: fx.Node, trace: Trace) -> Any:
    """Element by element, one tensor: the ids go through."""
    others = [n for n in node.all_input_nodes if n in trace.parameters or isinstance(trace.ids.get(n), Tensor)]
    if len(others) > 1 and schema(node).name not in ("aten::to", "aten::type_as"):
        return _nary(node, trace)  # clamp(x, min=tensor) and the like
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


def _compared(node: fx.Node, trace: Trace) -> Any:
    """cosine_similarity, pairwise_distance, cdist: a statistic of two operands, over the channels that are left of both."""
    one, other = (trace.forest.canon(trace.of(n)) for n in node.args[:2])
    axis = int(args_of(node, "dim")[0]) if any(a.name == "dim" for a in schema(node).arguments) else -1
    if one.dim() != other.dim() or not (bool((one != FIXED).any()) or bool((other != FIXED).any())):
        return unknown(node, trace)
    axis %= one.dim()
    left, right = (trace.vector(ids, axis, "compared at every position") for ids in (one, other))
    trace.tie(left, right, "compared with a constant")
    left = trace.forest.canon(left)
    if bool((left == FIXED).any()) or not trace.forest.whole(left):
        trace.pin(left, f"{node.target} over a part of the channels")
        return result(node)
    trace.norms[node] = laid(left, axis, one.shape)
    return result(node)


def _reduce(node: fx.Node, trace: Trace) -> Any:
    """Reductions: over a channel axis they run over the survivors; heads are tied whole; what cannot shrink pins."""
    if any(a.name == "other" for a in schema(node).arguments):
        return _nary(node, trace)  # max(a, b)
    ids = trace.forest.canon(trace.of(node.args[0]))
    dims, keep = _reduced(node, ids)
    if _shrinks(node) and _over_channels(ids, dims, trace):
        ids = _at_every_position(ids, dims, trace)
        if trace.forest.whole(ids):  # of a slice nothing might be left
            trace.norms[node], ids = ids, fixed(ids.shape)
    if node not in trace.norms:
        ids = reduce_rows(ids, dims, f"{node.target} over the channels", trace)
    for axis in sorted(dims, reverse=True):
        ids = ids.narrow(axis, 0, 1) if keep else ids.select(axis, 0)
    return pytree.tree_map(lambda o: tidy(ids.expand(o.shape)) if isinstance(o, Tensor) else o, result(node))


def _shrinks(node: fx.Node) -> bool:
    """Whether the reduction has a meaning over fewer channels: it gives no positions along them (argmax, max's indices)."""
    name = schema(node).name.removeprefix("aten::")
    if name in ("max", "min"):
        values_only = (u.target is operator.getitem and (u.args[1] == 0 or not u.users) for u in node.users)
        return isinstance(result(node), Tensor) or all(values_only)
    return name in _STATISTICS


def _over_channels(ids: Tensor, dims: list[int], trace: Trace) -> bool:
    """Whether a reduced axis is that of the channels, and no other one is: not heads or parts of them, not tokens."""
    across = varying(ids)
    rest = [a for a in across if a not in dims]
    if trace.are_heads(ids):
        return False
    if not rest:
        return len(rest) < len(across)
    return any(_holds_channels(ids, a, trace) for a in across if a in dims) and not any(
        _holds_channels(ids, a, trace) for a in rest
    )


def _at_every_position(ids: Tensor, dims: list[int], trace: Trace) -> Tensor:
    """A statistic over the channels, as a norm written out by hand takes it, is taken of those that are left: the same at every token."""
    for axis in [a for a in varying(ids) if a not in dims]:
        trace.tie(ids, ids.narrow(axis, 0, 1), "reduced at every position")
        ids = trace.forest.canon(ids)
    return ids


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
    if any(_holds_channels(ids, d, trace) for d in dims if d in varying(ids)):
        trace.heads.append(first)  # else the same channel of several layers (fields of embeddings that are summed)
    trace.tie(ids, first, reason)
    return trace.forest.canon(ids)


def _reduced(node: fx.Node, ids: Tensor) -> tuple[list[int], bool]:
    names = {a.name for a in schema(node).arguments}
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
    first = out.narrow(axis, 0, 1) if out.dim() else out  # topk returns fewer; along the axis ids do not vary any more
    return pytree.tree_map(lambda o: first.expand(o.shape) if isinstance(o, Tensor) else o, result(node))


# --------------------------------------------------------------------------------------------------------------- norms


def _channel_norm(node: fx.Node, trace: Trace) -> Any:
    """batch_norm, instance_norm: every channel on its own; parameters and statistics follow it."""
    ids = trace.forest.canon(trace.of(node.args[0]))
    if varying(ids) and 1 not in varying(ids) and node.args[3] is None:
        return _row_norm(node, ids, trace)
    channels = trace.vector(ids, 1, "channels of a norm")
    for operand in node.args[1:5]:
        if isinstance(operand, fx.Node):
            trace.tie(trace.of(operand), channels, "norm over a fixed channel")
    return trace.forest.canon(ids)


def _row_norm(node: fx.Node, ids: Tensor, trace: Trace) -> Tensor:
    """batch_norm as a way to standardise the rows of a weight: what leaves are entries of every row."""
    for operand in node.args[1:5]:
        if isinstance(operand, fx.Node):
            trace.pin(trace.of(operand), "norm over a fixed channel")
    trace.norms[node] = ids
    return ids


def _last_norm(node: fx.Node, trace: Trace) -> Any:
    """layer_norm, rms_norm over the last axes: survivors are normalised among themselves."""
    ids = trace.forest.canon(trace.of(node.args[0]))
    over: Any = node.args[1]
    first = ids.dim() - len(over)
    names = [a.name for a in schema(node).arguments if a.name in ("weight", "bias")]
    operands = [trace.of(n) for n in args_of(node, *names) if isinstance(n, fx.Node)]
    if any(a >= first for a in varying(ids)) and _is_split(ids, first, trace):
        # heads: one norm serves all of them, so each head stays whole and the norm's own axis stays fixed
        for operand in operands:
            trace.pin(operand, "a norm shared by all heads")
        return reduce_rows(ids, list(range(first, ids.dim())), "norm over the channels", trace)
    if varying(ids) and varying(ids)[-1] < first:  # rows that leave whole, each normalised by itself: nothing ties them
        for operand in operands:
            trace.pin(operand, "a norm shared by all rows")
        return ids
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
    return any(_holds_channels(ids, axis, trace) for axis in range(first) if axis in varying(ids))


def _holds_channels(ids: Tensor, axis: int, trace: Trace) -> bool:
    """Whether the first two positions along an axis are different channels of one weight: of no table of learned tokens."""
    small = compact(ids)
    a, b = small.narrow(axis, 0, 1), small.narrow(axis, 1, 1)
    origin_a, origin_b = trace.forest.origins(a.contiguous()), trace.forest.origins(b.contiguous())
    of_one = (origin_a == origin_b) & (origin_a > 0) & ~trace.are_elements(origin_a)
    return bool((of_one & (a != b)).any())


def _channel_shuffle(node: fx.Node, trace: Trace) -> Any:
    """[groups · n] channels in another order: of every group the same positions leave, so that groups stay equal."""
    ids = trace.forest.canon(trace.of(node.args[0]))
    channels = trace.vector(ids, 1, "channels that are shuffled")
    table = channels.reshape(int(args_of(node, "groups")[0]), -1)
    trace.tie(table, table[:1], "groups of a shuffle")
    return shape.executed(node, trace)


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
    name = schema(node).name
    return 1 if "1d" in name else 3 if "3d" in name else 2


def _windows(node: fx.Node, trace: Trace) -> Any:
    """im2col: every channel as so many rows as a window has places."""
    ids, shape = trace.of(node.args[0]), result(node).shape
    channels = trace.vector(ids, ids.dim() - 3, "cut into windows together")
    return laid(channels.repeat_interleave(shape[-2] // len(channels)), len(shape) - 2, shape)


def _from_windows(node: fx.Node, trace: Trace) -> Any:
    """col2im: rows of one channel are added up into its picture."""
    ids, shape = trace.of(node.args[0]), result(node).shape
    rows = trace.vector(ids, ids.dim() - 2, "windows that are put together").reshape(shape[-3], -1)
    trace.tie(rows, rows[:, :1], "places of one window")
    return laid(rows[:, 0], len(shape) - 3, shape)


def _fourier(node: fx.Node, trace: Trace) -> Any:
    """A Fourier transform along axes that carry no channels: they go through."""
    ids, out = trace.forest.canon(trace.of(node.args[0])), result(node)
    asked: Any = args_of(node, "dim")[0]
    axes = [asked] if isinstance(asked, int) else list(range(ids.dim()) if asked is None else asked)
    if any(a % ids.dim() in varying(ids) for a in axes):
        return unknown(node, trace)
    for axis in axes:
        ids = ids.narrow(axis, 0, 1)
    return ids.expand(out.shape)


def _as_complex(node: fx.Node, trace: Trace) -> Any:
    """[…, 2] as complex numbers: both parts are of one channel."""
    ids = trace.forest.canon(trace.of(node.args[0]))
    trace.tie(ids, ids.narrow(-1, 0, 1), "parts of a complex number")
    return tidy(trace.forest.canon(ids).select(-1, 0))


def _as_real(node: fx.Node, trace: Trace) -> Any:
    return trace.of(node.args[0]).unsqueeze(-1).expand(result(node).shape)


def _grid_sample(node: fx.Node, trace: Trace) -> Any:
    ids = trace.forest.canon(trace.of(node.args[0]))
    trace.pin(trace.of(node.args[1]), "coordinates of a sampling grid")
    return laid(trace.vector(ids, 1, "sampled together"), 1, result(node).shape)


def _outer(node: fx.Node, trace: Trace) -> Any:
    one, other = (trace.of(n) for n in args_of(node, "self", "vec2"))
    return merge(one[:, None], other[None, :], trace)


# --------------------------------------------------------------------------------------------------------------- table

_UNARY = (
    "relu relu_ relu6 relu6_ silu silu_ gelu gelu_ hardtanh hardtanh_ hardswish hardswish_ hardsigmoid hardsigmoid_ sigmoid sigmoid_ "
    "tanh tanh_ elu elu_ selu selu_ celu celu_ mish mish_ softplus softsign leaky_relu leaky_relu_ rrelu threshold threshold_ logit "
    "log_sigmoid dropout dropout_ feature_dropout feature_dropout_ alpha_dropout alpha_dropout_ feature_alpha_dropout native_dropout "
    "clone contiguous detach detach_ alias to _to_copy type_as float_power lift_fresh "
    "abs abs_ neg neg_ exp exp_ expm1 log log_ log2 log10 log1p sqrt sqrt_ rsqrt rsqrt_ square reciprocal sin cos tan atan asin acos sinh cosh erf erfc "
    "ceil floor round trunc frac sign clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ isnan isinf isfinite nan_to_num bitwise_not logical_not "
    "zero_ fill_ zeros_like ones_like full_like empty_like rand_like randn_like bernoulli bernoulli_ uniform_ normal_ positive fill "
    "real imag conj _conj resolve_conj angle hardshrink softshrink tanhshrink sgn nan_to_num_ requires_grad_"
).split()
_NARY = (
    "add add_ sub sub_ mul mul_ div div_ rsub pow pow_ floor_divide remainder fmod maximum minimum atan2 where masked_fill masked_fill_ "
    "eq ne lt le gt ge eq_ ne_ logical_and logical_or logical_xor bitwise_and bitwise_or addcmul addcmul_ addcdiv addcdiv_ lerp lerp_ "
    "expand_as copy_ copy true_divide true_divide_ __and__ __or__ xlogy hypot complex polar"
).split()
_SHAPE = (
    "view reshape squeeze unsqueeze expand split split_with_sizes tensor_split flatten unflatten stack repeat repeat_interleave "
    "pixel_shuffle pixel_unshuffle narrow movedim moveaxis swapaxes broadcast_to _unsafe_view hstack vstack meshgrid flip rot90 view_copy _reshape_alias"
).split()
_MOVED = "permute transpose t numpy_T swapdims adjoint mT".split()
_REDUCE = (
    "mean sum amax amin prod var std var_mean std_mean norm linalg_vector_norm logsumexp argmax argmin max min any all median count_nonzero nansum"
).split()
_STATISTICS = "mean sum amax amin var std var_mean std_mean norm linalg_vector_norm logsumexp".split()
"""Reductions that are taken over the channels that are left."""
_SOFTMAX = "softmax log_softmax _softmax _log_softmax cumsum cumprod sort topk kthvalue argsort".split()
_POOL = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa lp_pool2d"
).split()
_PYTHON = "add sub mul floordiv truediv mod neg eq ne lt le gt ge and_ or_ not_ pow trunc floor ceil sqrt min max sym_min sym_max".split()


def _table() -> dict[str, Rule]:
    table: dict[str, Rule] = {}
    for names, rule in (
        (_UNARY, _unary),
        (_NARY, _nary),
        (_SHAPE, shape.executed),
        (("cat", "concat"), shape.joined),
        (_MOVED, shape.moved),
        (_REDUCE, _reduce),
        (_SOFTMAX, _softmax),
        (_POOL, _pool),
        (
            [f"operator.{n}" for n in _PYTHON] + ["sym_max", "sym_min", "sym_sum", "sym_not", "sym_float", "sym_ite"],
            shape.python,
        ),
        (sorted(shape.CREATE_LIKE), shape.create_like),
        ("select unbind".split(), shape.picked),
        ("index index_select".split(), shape.gather_rows),
        ("constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad2d".split(), shape.pad),
        ("batch_norm instance_norm _native_batch_norm_legit_functional".split(), _channel_norm),
        ("layer_norm rms_norm".split(), _last_norm),
        (
            "_assert_scalar _assert_tensor_metadata sym_constrain_range_for_size sym_constrain_range _assert_async".split(),
            shape.nothing,
        ),
    ):
        table |= dict.fromkeys(names, rule)
    return (
        table
        | contract.RULES
        | recurrent.RULES
        | {
            "operator.getitem": shape.getitem,
            "sym_size": shape.size,
            "sym_numel": shape.numel,
            "slice": shape.slice,
            "chunk": shape.chunk,
            "reshape_as": shape.like_another,
            "view_as": shape.like_another,
            "roll": shape.kept_whole,
            "tril": shape.triangle,
            "triu": shape.triangle,
            "embedding": shape.embedding,
            "embedding_bag": shape.embedding_bag,
            "unfold": shape.unfold,
            "glu": _glu,
            "prelu": _prelu,
            "group_norm": _group_norm,
            "channel_shuffle": _channel_shuffle,
            "native_channel_shuffle": _channel_shuffle,
            "grid_sampler": _grid_sample,
            "view_as_complex": _as_complex,
            "view_as_real": _as_real,
            "im2col": _windows,
            "col2im": _from_windows,
            **{f"fft_{kind}{over}": _fourier for kind in ("fft", "ifft", "rfft", "irfft") for over in ("", "2", "n")},
            "outer": _outer,
            **dict.fromkeys(("cosine_similarity", "pairwise_distance", "cdist"), _compared),
        }
    )


RULES: dict[str, Rule] = _table()
