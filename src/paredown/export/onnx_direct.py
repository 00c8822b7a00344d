"""Direct: the exporter without its decompositions, which trace a graph of integers anew and take half of its time.

A quantized graph in eval mode has few kinds of ops, and all of these have a translation of their own. What is left of the
decompositions is written here: ops that change their input in place, where nobody else reads it, and the global mean. Any other
graph takes the exporter's own way; the tests hold both ways to the same ONNX graph.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

KNOWN = frozenset(
    "conv1d conv2d linear add mul relu relu6 hardtanh sigmoid hardsigmoid leaky_relu gelu cat max_pool2d mean flatten view reshape permute "
    "transpose slice select unbind unsqueeze pad expand layer_norm scaled_dot_product_attention sym_size quantize_per_tensor "
    "dequantize_per_tensor dequantize_per_channel".split()
)
"""Ops whose own translation is as good as that of their parts."""


def convert(program: ExportedProgram, registry: Any) -> Any:
    """The exporter's program for opset 18, or None where the graph has another op. `program` is changed: the same function."""
    from torch.onnx._internal.exporter import _core, _dispatching, _fx_passes

    if not _made_functional(program.graph):
        return None
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    if not all(_dispatching.dispatch(n, registry)[0] for n in calls if n.target is not operator.getitem):
        return None
    graph_module = program.graph_module
    graph_module.recompile()
    _fx_passes.insert_type_promotion_nodes(graph_module)
    program._graph_module = _fx_passes.remove_assertion_nodes(graph_module)
    found = _core._exported_program_to_onnx_program(program, registry=registry)
    found.optimize()
    return found


def _made_functional(graph: fx.Graph) -> bool:
    """Whether all ops are known now, and none changes a tensor."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        if node.target._schema.is_mutable and not _copied(node):
            return False
        if node.target is torch.ops.aten.adaptive_avg_pool2d.default and all(size == 1 for size in node.args[1]):
            node.target, node.args = torch.ops.aten.mean.dim, (node.args[0], [-1, -2], True)
        if node.target._schema.name.split("::")[1] not in KNOWN:
            return False
    return True


def _copied(node: fx.Node) -> bool:
    """relu_ as relu, where its input is a tensor of its own that nobody else reads: not later, and not as a view from before."""
    target: Any = node.target
    source, name = node.args[0], target._schema.name.split("::")[1]
    if not isinstance(source, fx.Node) or source.op != "call_function" or not name.endswith("_"):
        return False
    made: Any = source.target
    own = isinstance(made, torch._ops.OpOverload) and not any(a.alias_info for a in made._schema.returns)
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    overload = getattr(packet, target._overloadname, None)
    if not own or overload is None or len(source.users) > 1:
        return False
    node.target = overload
    return True
