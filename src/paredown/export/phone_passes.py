"""Rewrites for phones, where every size is known: what their converters take badly into ops that they take whole.

XNNPACK in ExecuTorch has slices, reshapes and products of matrices with three axes, but no select, squeeze, unbind or expand; and
both converters make a dozen ops of attention, among them a search for rows that are masked everywhere.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from paredown.quantize.decompose import CONVS, attach, call, largest, op_name, own_weights

aten = torch.ops.aten


def plain(graph: fx.GraphModule) -> None:
    """Apply all rewrites in place; each computes the same function of the same shapes."""
    for node in list(graph.graph.nodes):
        rewrite = _REWRITES.get(op_name(node))
        new = rewrite(graph, node) if rewrite else None
        if new is not None and new is not node:
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _sizes(node: fx.Node) -> list[int]:
    return [int(d) for d in node.meta["val"].shape]


def _source(node: fx.Node) -> fx.Node | None:
    first = node.args[0]
    return first if isinstance(first, fx.Node) else None


def _reshape(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x = _source(node)
    return None if x is None else call(node, aten.reshape.default, x, _sizes(node))


def _same(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What repeats or cuts nothing."""
    x = _source(node)
    return x if x is not None and _sizes(x) == _sizes(node) else None


def _select(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x, axis, index = node.args
    if not isinstance(x, fx.Node) or not isinstance(axis, int) or not isinstance(index, int):
        return None
    return _picked(node, x, axis, index, _sizes(node))


def _picked(before: fx.Node, x: fx.Node, axis: int, index: int, sizes: list[int]) -> fx.Node:
    shape = _sizes(x)
    at = index % shape[axis]
    one = x if shape[axis] == 1 else call(before, aten.slice.Tensor, x, axis, at, at + 1)
    return call(before, aten.reshape.default, one, sizes)


def _unbind(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else 0
    if not isinstance(x, fx.Node) or not isinstance(axis, int):
        return None
    for part in list(node.users):
        if part.target is operator.getitem and isinstance(part.args[1], int):
            part.replace_all_uses_with(_picked(node, x, axis, part.args[1], _sizes(part)))
            graph.graph.erase_node(part)
    return None  # without readers it goes by itself


def _mean(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The mean over height and width keeps both axes, at length 1, and loses them in a reshape."""
    x, axes = node.args[0], node.args[1] if len(node.args) > 1 else None
    if not isinstance(x, fx.Node) or not isinstance(axes, list | tuple) or len(_sizes(x)) != 4:
        return None
    if sorted(int(a) % 4 for a in axes) != [2, 3] or len(_sizes(node)) == 4 or node.kwargs:
        return None
    return call(node, aten.reshape.default, call(node, aten.mean.dim, x, list(axes), True), _sizes(node))


def _attention(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """softmax(q · scale · kᵀ + mask) · v on matrices; None for what is causal, grouped, dropped out or masked by truth values."""
    q, k, v = node.args[:3]
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, node.args[3:], strict=False)), **node.kwargs}
    mask, scale = given.get("attn_mask"), given.get("scale")
    if given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa"):
        return None
    if not (isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)):
        return None
    if isinstance(mask, fx.Node) and not mask.meta["val"].is_floating_point():
        return None
    *lead, tokens, width = _sizes(q)
    if _sizes(k)[:-2] != lead or _sizes(v)[:-2] != lead:
        return None
    flat = [math.prod(lead)]
    q3, k3, v3 = (call(node, aten.reshape.default, x, [*flat, *_sizes(x)[-2:]]) for x in (q, k, v))
    factor = torch.tensor([width**-0.5 if scale is None else float(scale)])  # type: ignore[arg-type]
    with graph.graph.inserting_before(node):
        held = graph.graph.get_attr(attach(graph, f"{node.name}_scale", factor))
    held.meta["val"] = q.meta["val"].fake_mode.from_tensor(factor, static_shapes=True)
    logits = call(
        node, aten.bmm.default, call(node, aten.mul.Tensor, q3, held), call(node, aten.transpose.int, k3, 1, 2)
    )
    if isinstance(mask, fx.Node):
        seen = _sizes(logits)[-1]
        whole = call(node, aten.reshape.default, logits, [*lead, tokens, seen])
        logits = call(node, aten.reshape.default, call(node, aten.add.Tensor, whole, mask), [*flat, tokens, seen])
    product = call(node, aten.bmm.default, call(node, aten.softmax.int, logits, -1), v3)
    return call(node, aten.reshape.default, product, _sizes(node))


def _padded(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """A convolution whose padding is a word: the converters take numbers. What cannot be the same on both sides is padded before."""
    names = ("stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        **dict(zip(names, node.args[3:], strict=False)),
    }
    given.update({k: v for k, v in node.kwargs.items() if k in names})
    x, weight = node.args[:2]
    if not isinstance(given["padding"], str) or not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    kernel = _sizes(weight)[2:]
    stride, spread = (_for_each(given[k], len(kernel)) for k in ("stride", "dilation"))
    whole = [d * (k - 1) if given["padding"] == "same" else 0 for d, k in zip(spread, kernel, strict=True)]
    if any(n % 2 for n in whole):
        ends = [n for p in reversed(whole) for n in (p // 2, p - p // 2)]
        x, whole = call(node, aten.constant_pad_nd.default, x, ends), [0] * len(whole)
    conv = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)[len(kernel) - 1]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return call(node, conv, x, weight, bias, stride, [n // 2 for n in whole], spread, given["groups"])


def _for_each(value: Any, axes: int) -> list[int]:
    return [int(value)] * axes if isinstance(value, int) else [int(v) for v in value] * (axes // len(value))


def _largest(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    del graph
    return largest(node)


def _softplus(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """log(1 + eˣ) as max(x, 0) + log(1 + e^-|x|), which is exact where eˣ is too large, without a choice between two values.

    LiteRT's converter makes an int8 op of such a choice, whose values must have one scale and have two.
    """
    x = _source(node)
    if x is None or [a for a in node.args[1:] if a not in (1, 20)] or node.kwargs:
        return None
    small = call(node, aten.exp.default, call(node, aten.neg.default, call(node, aten.abs.default, x)))
    tail = call(node, aten.log.default, call(node, aten.add.Tensor, small, 1.0))
    return call(node, aten.add.Tensor, call(node, aten.relu.default, x), tail)


def _mish(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """x · tanh(log(1 + eˣ))."""
    x = _source(node)
    grown = None if x is None else _softplus(graph, node)
    return None if grown is None else call(node, aten.mul.Tensor, x, call(node, aten.tanh.default, grown))


def _prelu(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """On four axes, which is what XNNPACK's converter takes."""
    x = _source(node)
    sizes = [] if x is None else _sizes(x)
    if x is None or len(sizes) in (0, 1, 4):
        return None
    four = call(node, aten.reshape.default, x, [*sizes[:2], math.prod(sizes[2:]), 1])
    return call(node, aten.reshape.default, call(node, aten.prelu.default, four, node.args[1]), sizes)


def _own(graph: fx.GraphModule, node: fx.Node) -> None:
    """A layer in front of a batch norm has weights of its own: XNNPACK's converter folds the norm into them, also where others read them."""
    layer = node.args[0]
    if isinstance(layer, fx.Node) and (layer.target in CONVS or op_name(layer) == "linear"):
        own_weights(graph, layer)


_REWRITES: dict[str, Callable[[fx.GraphModule, fx.Node], fx.Node | None]] = {
    **dict.fromkeys(("squeeze", "unsqueeze", "flatten", "unflatten", "view", "_unsafe_view"), _reshape),
    **dict.fromkeys(("expand", "expand_as", "slice", "repeat"), _same),
    "select": _select,
    "unbind": _unbind,
    "mean": _mean,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _padded),
    "adaptive_max_pool2d": _largest,
    "batch_norm": _own,
    "softplus": _softplus,
    "mish": _mish,
    "prelu": _prelu,
    "scaled_dot_product_attention": _attention,
}
