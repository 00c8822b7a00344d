"""Train mode beside eval mode: where their graphs say the same, what was shown of one holds of the other."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from paredown.couple import recurrent
from paredown.couple.trace import op_name
from paredown.program import Program, placeholder_names

_DROPOUT = frozenset(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"))
_WITH_FLAGS = frozenset(("batch_norm", "instance_norm", "scaled_dot_product_attention", *recurrent.RULES))
"""Ops that take the mode as an argument."""


def trains_as_it_runs(program: Program) -> bool:
    """Whether the train graph is the eval graph but for dropout, batch counters and the flags of norms and recurrent ops.

    >>> import torch; from torch import nn; from paredown.program import capture
    >>> trains_as_it_runs(capture(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout()), torch.zeros(2, 4)))
    True
    """
    return program.train_graph is not None and _said(program.train_graph) == _said(program.eval_graph)


def _said(graph: ExportedProgram) -> list[Any]:
    """The calls of a graph, in order, on numbered values."""
    names = placeholder_names(graph)
    told: list[Any] = []
    number: dict[fx.Node, Any] = {}
    users = 0
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            users += node.name not in names
            number[node] = names.get(node.name, users)
        elif node.op == "output":
            told.append(_numbered(node.args, number))
        elif node.op == "call_function" and not _counts(node, number):
            op = op_name(node).removesuffix("_")
            if op in _DROPOUT:
                number[node] = number[node.args[0]]
                continue
            given = (node.args, dict(node.kwargs))
            if op in _WITH_FLAGS:
                given = ([a for a in pytree.tree_leaves(given) if isinstance(a, fx.Node)], {})
            number[node] = ("made", len(told))
            told.append((str(node.target), _numbered(given, number)))
    return told


def _counts(node: fx.Node, number: dict[fx.Node, Any]) -> bool:
    """num_batches_tracked += 1."""
    first = node.args[0] if node.args else None
    return (
        op_name(node) == "add_"
        and isinstance(first, fx.Node)
        and str(number.get(first)).endswith("num_batches_tracked")
    )


def _numbered(value: Any, number: dict[fx.Node, Any]) -> str:
    return str(pytree.tree_map(lambda v: number.get(v, v) if isinstance(v, fx.Node) else v, value))
