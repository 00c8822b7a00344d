"""Direct: the exporter without its decompositions, which trace the whole graph anew and take most of its time.

They leave alone an op that has a translation of its own, so where all ops have one there is nothing to trace. The few that have none in
graphs of eval mode are written here in the words that the decompositions use: batch norm, the global mean, chunks, and ops that change
their input in place, where nobody else reads it. Any other graph takes the exporter's own way; the tests hold both to one ONNX graph.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

_ATEN = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
VIEWS = frozenset("contiguous expand_as flatten reshape unflatten view_as".split())
"""Composite ops that may give back a view: the decompositions take all of these apart, but their own translations are as good."""
FRESH = frozenset("conv1d conv2d conv3d linear pad layer_norm group_norm instance_norm".split())
"""Composite ops that make a tensor of their own. Of the others some hand on their input and do not say so (dropout)."""

IN_PLACE = frozenset(
    "relu_ relu6_ hardtanh_ hardswish_ hardsigmoid_ silu_ leaky_relu_ elu_ sigmoid_ tanh_ clamp_ clamp_min_ clamp_max_ add_ sub_ mul_ div_ dropout_".split()
)
"""Ops that give what they write, in the shape of their first argument."""


def convert(program: ExportedProgram, registry: Any) -> Any:
    """The exporter's program for opset 18, or None where the graph has another op. `program` stays as it is."""
    from torch.onnx._internal.exporter import _core, _dispatching, _fx_passes

    own = _copied(program)
    if not _made_functional(own.graph):
        return None
    calls = [n for n in own.graph.nodes if n.op == "call_function" and n.target is not operator.getitem]
    if not all(_dispatching.dispatch(n, registry)[0] for n in calls):
        return None
    graph_module = own.graph_module
    graph_module.recompile()
    _fx_passes.insert_type_promotion_nodes(graph_module)
    own._graph_module = _fx_passes.remove_assertion_nodes(graph_module)
    found = _core._exported_program_to_onnx_program(own, registry=registry)
    found.optimize()
    return found


def _copied(program: ExportedProgram) -> ExportedProgram:
    """The same program with a graph of its own."""
    graph = copy.deepcopy(program.graph)
    for mine, node in zip(graph.nodes, program.graph.nodes, strict=True):
        mine.name, mine.target = (
            node.name,
            node.target,
        )  # an input called "input" would be renamed: the word is Python's
    own = copy.copy(program)
    own._graph_module = fx.GraphModule(program.graph_module, graph)
    return own


def _made_functional(graph: fx.Graph) -> bool:
    """Whether all ops are known now, and none changes a tensor."""
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "__module__", "") == "_operator":
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        if node.target is _ATEN.batch_norm.default and not _batch_norm(node):
            return False
        if node.target is _ATEN.chunk.default and not _chunks(node):
            return False
        if node.target is _ATEN.adaptive_avg_pool2d.default and all(size == 1 for size in node.args[1]):
            node.target, node.args = _ATEN.mean.dim, (node.args[0], [-1, -2], True)
        if node.target in (_ATEN.squeeze.dim, _ATEN.squeeze.dims) and not _squeeze(node):
            return False
        if node.target._schema.is_mutable and not _out_of_place(node):
            return False
        if _composite(node.target) and _aliases(node.target) and _name(node.target) not in VIEWS:
            return False
    return True


def _batch_norm(node: fx.Node) -> bool:
    """batch_norm with running statistics as the op that has a translation, which gives three results."""
    x, weight, bias, mean, variance, training, momentum, eps, _ = node.args
    if training or mean is None or variance is None:
        return False
    made = node.meta["val"]
    with node.graph.inserting_after(node):
        first = node.graph.call_function(operator.getitem, (node, 0))
    node.replace_all_uses_with(first)
    first.args, first.meta = (node, 0), dict(node.meta)
    node.target = _ATEN._native_batch_norm_legit_no_training.default
    node.args = (x, weight, bias, mean, variance, momentum, eps)
    node.meta["val"] = (made, made.new_empty((0,)), made.new_empty((0,)))
    return True


def _chunks(node: fx.Node) -> bool:
    """chunk as split, which says how long the parts are; the axis must have a known length."""
    (source, count), axis = node.args[:2], node.args[2] if len(node.args) > 2 else 0
    length = source.meta["val"].shape[axis]  # type: ignore[union-attr]
    if not isinstance(length, int):
        return False
    node.target, node.args = _ATEN.split.Tensor, (source, -(-length // count), axis)  # type: ignore[operator]
    return True


def _squeeze(node: fx.Node) -> bool:
    """Only axes of length 1, one after another from the last: torch leaves longer ones as they are, and ONNX refuses the file.

    The lengths must be known: one of the batch depends on how many samples come.
    """
    source: Any = node.args[0]
    made, asked = source.meta["val"], node.args[1]
    axes = {a % made.dim() for a in ([asked] if isinstance(asked, int) else asked)}  # type: ignore[union-attr]
    if not all(isinstance(made.shape[a], int) for a in axes):
        return False
    short = sorted(a for a in axes if made.shape[a] == 1)
    for axis in reversed(short[1:]):
        with node.graph.inserting_before(node):
            source = node.graph.call_function(_ATEN.squeeze.dim, (source, axis))
        made = made.squeeze(axis)
        source.meta["val"] = made
    node.target, node.args = (_ATEN.squeeze.dim, (source, short[0])) if short else (_ATEN.clone.default, (source,))
    return True


def _out_of_place(node: fx.Node) -> bool:
    """relu_ as relu, where its input is a tensor of its own that nobody else reads: not later, and not as a view from before."""
    target: Any = node.target
    source, name = node.args[0], _name(target)
    overload = getattr(getattr(_ATEN, name.removesuffix("_"), None), target._overloadname, None)
    if target.namespace != "aten" or name not in IN_PLACE or overload is None:
        return False
    if not isinstance(source, fx.Node) or source.op != "call_function":
        return False
    if name == "dropout_" and not node.args[2]:
        node.target = overload  # changes nothing
        return True
    others = [a.meta.get("val") for a in node.args if isinstance(a, fx.Node)]
    if any(not isinstance(t, Tensor) or t.dtype != node.meta["val"].dtype for t in others):
        return False  # in place the dtype stays, out of place the wider one wins
    if not _fresh(source) or len(source.users) > 1:
        return False
    node.target = overload
    return True


def _fresh(node: fx.Node) -> bool:
    made: Any = node.target
    if made is operator.getitem:
        return node.args[0].target is _ATEN._native_batch_norm_legit_no_training.default  # type: ignore[union-attr]
    if not isinstance(made, torch._ops.OpOverload) or _aliases(made):
        return False
    return not _composite(made) or _name(made) in FRESH


def _composite(op: torch._ops.OpOverload) -> bool:
    return op.has_kernel_for_dispatch_key(_COMPOSITE)


def _aliases(op: torch._ops.OpOverload) -> bool:
    return any(result.alias_info for result in op._schema.returns)


def _name(op: torch._ops.OpOverload) -> str:
    return op._schema.name.split("::")[1]
