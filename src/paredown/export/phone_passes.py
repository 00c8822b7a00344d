"""Rewrites for phones, where every size is known: what their converters take badly into ops that they take whole.

XNNPACK in ExecuTorch has slices, reshapes and products of matrices with three axes, but no select, squeeze, unbind or expand; and
both converters make a dozen ops of attention, among them a search for rows that are masked everywhere.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import fx

from paredown.quantize.decompose import attach, call, op_name

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


_REWRITES: dict[str, Callable[[fx.GraphModule, fx.Node], fx.Node | None]] = {
    **dict.fromkeys(("squeeze", "unsqueeze", "flatten", "unflatten", "view", "_unsafe_view"), _reshape),
    **dict.fromkeys(("expand", "expand_as", "slice", "repeat"), _same),
    "select": _select,
    "unbind": _unbind,
    "mean": _mean,
    "scaled_dot_product_attention": _attention,
}
