"""Bags: nn.EmbeddingBag on bags of one length, as rows of a table that are added up, averaged, or the largest of them taken.

Exporters write embedding_bag as a loop over the bags, which OpenVINO refuses and which no quantizer looks into.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from paredown.quantize.decompose import call, op_name

aten = torch.ops.aten
_SUM, _MEAN, _MAX = 0, 1, 2


def has_bags(graph: fx.Graph) -> bool:
    """Whether there is one to rewrite."""
    return any(n.op == "call_function" and op_name(n) == "embedding_bag" for n in graph.nodes)


def plain_bags(graph: fx.GraphModule) -> None:
    """embedding_bag(table, ids) → embedding(table, ids) and its sum, mean or maximum over each row of ids, in place.

    Where ids are a matrix, as nn.EmbeddingBag takes them without offsets. ids that are `padding_idx` count nothing, a sum's
    `per_sample_weights` are factors. Bags by offsets, and maxima that leave something out, stay as they are.
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or op_name(node) != "embedding_bag":
            continue
        read = [u for u in node.users if u.users]
        if any(u.target is not operator.getitem or u.args[1] != 0 for u in read):
            continue
        new = _plain(node)
        if new is None:
            continue
        for user in read:
            user.replace_all_uses_with(new)
        for user in list(node.users):
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _plain(node: fx.Node) -> fx.Node | None:
    names = ("weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights", "include_last_offset", "padding_idx")  # fmt: skip
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    mode, padding, factors = given.get("mode", 0), given.get("padding_idx"), given.get("per_sample_weights")
    padding = None if padding == -1 else padding
    ids = _matrix(given["indices"])
    if ids is None or given.get("include_last_offset") or not _one_length(given["offsets"], ids):
        return None
    if mode == _MAX and (padding is not None or factors is not None):
        return None
    weights = _matrix(factors)
    if factors is not None and (weights is None or weights.meta["val"].shape != ids.meta["val"].shape):
        return None
    rows = call(node, aten.embedding.default, given["weight"], ids)
    if weights is not None:
        rows = call(node, aten.mul.Tensor, rows, call(node, aten.unsqueeze.default, weights, -1))
    if mode == _MAX:
        return call(node, aten.amax.default, rows, [1])
    if padding is None:
        return call(node, aten.mean.dim if mode == _MEAN else aten.sum.dim_IntList, rows, [1])
    counted = call(node, aten.to.dtype, call(node, aten.ne.Scalar, ids, padding), rows.meta["val"].dtype)
    counted = call(node, aten.unsqueeze.default, counted, -1)
    total = call(node, aten.sum.dim_IntList, call(node, aten.mul.Tensor, rows, counted), [1])
    if mode == _SUM:
        return total
    return call(
        node,
        aten.div.Tensor,
        total,
        call(node, aten.clamp_min.default, call(node, aten.sum.dim_IntList, counted, [1]), 1.0),
    )


def _matrix(flat: Any) -> fx.Node | None:
    """The matrix whose rows, one after the other, are this vector."""
    source = flat.args[0] if isinstance(flat, fx.Node) and op_name(flat) in ("reshape", "view", "flatten") else None
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    return source if isinstance(value, Tensor) and value.dim() == 2 else None  # type: ignore[return-value]


def _one_length(offsets: Any, ids: fx.Node) -> bool:
    """Whether bags begin where rows of ids do: arange(0, numel, row)."""
    if not isinstance(offsets, fx.Node) or op_name(offsets) != "arange" or len(offsets.args) != 3:
        return False
    start, end, step = offsets.args
    counted = isinstance(end, fx.Node) and op_name(end) == "sym_numel" and end.args[0] is ids
    length = ids.meta["val"].shape[1]
    whole = isinstance(end, int) and end == ids.meta["val"].numel()
    return bool(start == 0 and isinstance(length, int) and step == length and (counted or whole))
