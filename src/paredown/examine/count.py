"""MACs per op: one function and one table line per op that multiplies, a list of ops that do not, the rest is unknown.

A function returns (MACs, weights): MACs = rows × Σ numel(weights) wherever `weights` is not empty, so that MACs can be
predicted exactly from the lengths that remain of those weights. One MAC is one multiply and one add; FLOPs = 2 × MACs.
Padding and causal masks are not subtracted: this is what a dense kernel computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

Shape = tuple[int, ...]
Counted = tuple[int, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One node with its arguments by schema name and what is known of them."""

    node: fx.Node
    arguments: Mapping[str, Any]
    shape_of: Callable[[Any], Shape]
    """Shape of a node's value at the smallest batch."""
    weight_of: Callable[[Any], str | None]
    """Name of the parameter that a node is a whole (possibly permuted) view of."""
    out: Shape

    def shape(self, name: str) -> Shape:
        """Shape of the tensor argument `name`."""
        return self.shape_of(self.arguments[name])

    def weights(self, *names: str) -> tuple[str, ...]:
        """The first of the arguments that is a whole parameter, as a tuple of one, or an empty one."""
        found = (self.weight_of(self.arguments[n]) for n in names)
        return next(((w,) for w in found if w is not None), ())


def conv(call: Call) -> Counted:
    """MACs = output positions × numel(weight [O, I/groups, k…]); dilation and stride only change the positions."""
    weight = call.shape("weight")
    if call.arguments.get("transposed"):
        return conv_transpose(call)
    return _numel(call.out) // max(weight[0], 1) * _numel(weight), call.weights("weight")


def conv_transpose(call: Call) -> Counted:
    """MACs = input positions × numel(weight [I, O/groups, k…])."""
    weight = call.shape("weight")
    return _numel(call.shape("input")) // max(weight[0], 1) * _numel(weight), call.weights("weight")


def linear(call: Call) -> Counted:
    """MACs = rows × numel(weight [O, I])."""
    weight = call.shape("weight")
    return _numel(call.shape("input")) // max(weight[-1], 1) * _numel(weight), call.weights("weight")


def product(first: str, second: str) -> Callable[[Call], Counted]:
    """MACs of a (batched, broadcast) matrix product: numel(out) × contracted length."""

    def count(call: Call) -> Counted:
        a, b = call.shape(first), call.shape(second)
        macs = _numel(call.out) * a[-1]
        weights = call.weights(second, first)
        if weights and macs % max(_numel(b if call.weight_of(call.arguments[second]) else a), 1):
            weights = ()
        return macs, weights

    return count


def attention(call: Call) -> Counted:
    """MACs = heads × L × S × (E + Ev): query [.., L, E] · key [.., S, E], then weights · value [.., S, Ev]."""
    return sum(attention_parts(call)), ()


def attention_parts(call: Call) -> tuple[int, int]:
    """MACs of query·key and of weights·value."""
    pairs = _numel(call.out[:-1]) * call.shape("key")[-2]
    return pairs * call.shape("query")[-1], pairs * call.out[-1]


def recurrent(call: Call) -> Counted:
    """MACs = steps × Σ numel(2-D weights): LSTM, GRU and plain RNN, all layers, directions and projections."""
    parameters = call.arguments["params"]
    matrices = [p for p in parameters if len(call.shape_of(p)) == 2]
    names = tuple(w for p in matrices if (w := call.weight_of(p)) is not None)
    sequence = call.shape("data" if "data" in call.arguments else "input")
    macs = _numel(sequence[:-1]) * sum(_numel(call.shape_of(p)) for p in matrices)
    return macs, names if len(set(names)) == len(matrices) else ()


def cell(call: Call) -> Counted:
    """MACs = rows × (numel(w_ih) + numel(w_hh))."""
    names = tuple(n for n in ("w_ih", "w_hh") if (call.weight_of(call.arguments[n])) is not None)
    macs = _numel(call.shape("input")[:-1]) * (_numel(call.shape("w_ih")) + _numel(call.shape("w_hh")))
    return macs, tuple(str(call.weight_of(call.arguments[n])) for n in names) if len(names) == 2 else ()


def einsum(call: Call) -> Counted:
    """MACs of pairwise contraction (see einsum_macs); the weight where one of two operands is a parameter."""
    operands = call.arguments["tensors"]
    shapes = [call.shape_of(o) for o in operands]
    macs = einsum_macs(str(call.arguments["equation"]), shapes)
    names = [w for o in operands if (w := call.weight_of(o)) is not None]
    whole = len(operands) == 2 and len(names) == 1 and macs > 0
    sizes = {call.weight_of(o): _numel(s) for o, s in zip(operands, shapes, strict=True)}
    return macs, tuple(names) if whole and macs % max(sizes[names[0]], 1) == 0 else ()


def einsum_macs(equation: str, shapes: list[Shape]) -> int:
    """MACs of pairwise contraction from left to right: see counted_pairs.

    >>> einsum_macs("bi,bj,ijk->bk", [(2, 3), (2, 4), (3, 4, 5)])
    120
    """
    terms, result = indices(equation, shapes)
    return sum(macs for _, macs in counted_pairs(terms, result, shapes))


def counted_pairs(
    terms: Sequence[Sequence[str]], result: Sequence[str], shapes: Sequence[Shape]
) -> list[tuple[frozenset[str], int]]:
    """The indices of each pair that is contracted, from left to right, and the product of their lengths.

    Indices that only one operand has, and that the result lacks, are summed first; a pair without a contracted index
    is element-wise and counts 0.
    """
    length = {
        index: size
        for term, shape in zip(terms, shapes, strict=True)
        for index, size in zip(term, shape, strict=True)
        if size != 1
    }
    pairs, left = [], set(terms[0])
    for position, term in enumerate(terms[1:], start=1):
        later = set(result).union(*terms[position + 1 :])
        right = {i for i in term if i in left or i in later}
        left = {i for i in left if i in right or i in later}
        if not (left | right) <= later:
            pairs.append((frozenset(left | right), math.prod(length.get(i, 1) for i in left | right)))
        left = (left | right) & later
    return pairs


BILINEAR = "...i,kij,...j->...k"
"""torch's bilinear, of its first input, its weight and its second input."""


def bilinear(call: Call) -> Counted:
    """MACs of y_k = x₁ᵀ W_k x₂, the weight with the first input before the second."""
    return sum(pair_macs(call)), ()


def pair_macs(call: Call) -> list[int]:
    """MACs of each contracted pair of an einsum or a bilinear form, in their order."""
    names = ("input1", "weight", "input2")
    given = "equation" in call.arguments
    operands = call.arguments["tensors"] if given else [call.arguments[n] for n in names]
    shapes = [call.shape_of(o) for o in operands]
    terms, result = indices(str(call.arguments["equation"]) if given else BILINEAR, shapes)
    return [macs for _, macs in counted_pairs(terms, result, shapes)]


COUNTED: dict[str, Callable[[Call], Counted]] = {
    "conv1d": conv,
    "conv2d": conv,
    "conv3d": conv,
    "convolution": conv,
    "torchvision::deform_conv2d": conv,
    "conv_transpose1d": conv_transpose,
    "conv_transpose2d": conv_transpose,
    "conv_transpose3d": conv_transpose,
    "linear": linear,
    "matmul": product("self", "other"),
    "mm": product("self", "mat2"),
    "bmm": product("self", "mat2"),
    "mv": product("self", "vec"),
    "dot": product("self", "tensor"),
    "addmm": product("mat1", "mat2"),
    "addmv": product("mat", "vec"),
    "baddbmm": product("batch1", "batch2"),
    "einsum": einsum,
    "bilinear": bilinear,
    "scaled_dot_product_attention": attention,
    "lstm": recurrent,
    "gru": recurrent,
    "rnn_tanh": recurrent,
    "rnn_relu": recurrent,
    "lstm_cell": cell,
    "gru_cell": cell,
    "rnn_tanh_cell": cell,
    "rnn_relu_cell": cell,
}

_SHAPE = """view reshape permute transpose t numpy_T mT swapaxes swapdims movedim moveaxis flatten unflatten squeeze
unsqueeze expand expand_as broadcast_to broadcast_tensors repeat repeat_interleave tile cat concat concatenate
stack hstack vstack split split_with_sizes chunk tensor_split unbind slice select narrow index index_select
gather take_along_dim roll flip rot90 pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle unfold
im2col col2im diagonal diag diag_embed as_strided view_as reshape_as contiguous clone detach alias copy
lift_fresh_copy lift_fresh to type_as _to_copy float _shape_as_tensor slice_scatter select_scatter index_put
index_copy index_fill index_add scatter scatter_add masked_scatter meshgrid cartesian_prod atleast_1d atleast_2d
atleast_3d view_as_real view_as_complex real imag"""
_MAKE = """
zeros ones full empty arange linspace eye zeros_like ones_like full_like empty_like new_zeros new_ones new_full
new_empty scalar_tensor fill zero tril triu tril_indices triu_indices rand randn rand_like randn_like bernoulli
uniform normal randint randperm"""
_ELEMENTWISE = """
add sub rsub mul div true_divide floor_divide remainder fmod pow square sqrt rsqrt exp exp2 expm1 log log2 log10
log1p abs neg sign sgn sin cos tan asin acos atan atan2 sinh cosh tanh sigmoid reciprocal floor ceil round trunc
frac clamp clamp_min clamp_max clip maximum minimum fmax fmin where masked_fill lerp addcmul addcdiv erf erfc
isnan isinf isfinite nan_to_num eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and
bitwise_or bitwise_not bitwise_xor bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ outer hypot
logaddexp xlogy relu relu6 leaky_relu prelu _prelu_kernel rrelu elu selu celu gelu silu mish hardtanh hardswish
hardsigmoid hardshrink softshrink tanhshrink softplus softsign threshold log_sigmoid logsigmoid glu dropout
feature_dropout alpha_dropout feature_alpha_dropout native_dropout"""
_NORM = """batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training layer_norm
native_layer_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm local_response_norm
linalg_vector_norm norm frobenius_norm normalize cosine_similarity pairwise_distance"""
_REDUCE = """
sum mean prod amax amin max min argmax argmin any all var std var_mean std_mean softmax _softmax log_softmax
_log_softmax logsumexp cumsum cumprod cummax cummin sort argsort topk kthvalue median mode nonzero unique
unique2 _unique2 count_nonzero bincount histc searchsorted bucketize one_hot is_nonzero item equal allclose"""
_POOL = """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool1d_with_indices max_pool3d_with_indices
avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool2d
max_unpool2d fractional_max_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact2d _upsample_bilinear2d_aa
_upsample_bicubic2d_aa grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator embedding
embedding_bag embedding_renorm torchvision::roi_align torchvision::nms"""
_CHECK = """sym_size sym_numel sym_stride sym_storage_offset size _assert_scalar _assert_tensor_metadata _assert_async
sym_constrain_range sym_constrain_range_for_size _local_scalar_dense"""

ZERO: frozenset[str] = frozenset(" ".join((_SHAPE, _MAKE, _ELEMENTWISE, _NORM, _REDUCE, _POOL, _CHECK)).split())
"""Ops that count 0 MACs by convention: no contraction. Norms, pools and resampling included."""


def op_name(node: fx.Node) -> str:
    """Name of an op without "aten", overload and in-place underscore: "conv2d", "torchvision::deform_conv2d"."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", node.target))
    name = str(schema.name).removeprefix("aten::")
    return name.removesuffix("_") if schema.is_mutable and not name.endswith("__") else name


def bound(node: fx.Node) -> dict[str, Any]:
    """Arguments of a node by schema name, without defaults."""
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def indices(equation: str, shapes: list[Shape]) -> tuple[list[list[str]], list[str]]:
    """Index lists of the operands and the result; the axes under an ellipsis become "…0", "…1", from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = []
    for term, shape in zip(left.split(","), shapes, strict=True):
        head, dots, tail = term.partition("...")
        hidden = len(shape) - len(head) - len(tail) if dots else 0
        terms.append([*head, *(f"…{i}" for i in reversed(range(hidden))), *tail])
    flat = [i for term in terms for i in term]
    dotted = sorted({i for i in flat if i.startswith("…")}, reverse=True)
    if not arrow:
        return terms, [*dotted, *sorted(i for i in set(flat) if flat.count(i) == 1 and i not in dotted)]
    head, dots, tail = right.partition("...")
    return terms, [*head, *(dotted if dots else ()), *tail]


def _numel(shape: Shape) -> int:
    return math.prod(shape)
