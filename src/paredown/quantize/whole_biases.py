"""Biases in whole steps of what they are added to, where a runtime's integer kernel rounds them so and the steps are coarse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from paredown.quantize.decompose import attach, fetch, op_name

_LAYERS = ("conv1d", "conv2d", "conv3d", "linear")
_QUANTIZED = torch.ops.quantized_decomposed


def whole_biases(graph: fx.GraphModule, target: str) -> int:
    """b → s·round(b / s), s = s_x · s_w per channel, of every layer on codes, in place; returns how many layers.

    That is the int32 bias of ONNX Runtime's kernels, for its targets alone: without it the simulation has codes at ties that the file
    has not, each a step of the output away (a small siamese network at 8 bits: a cosine of 0.9982 and 0.9993; with 4 bits, whose steps are coarse, 0.94 and
    1.0000 for a transformer).
    """
    done = 0
    if not target.startswith("onnxruntime"):
        return done
    for node in graph.graph.nodes:
        if node.op != "call_function" or op_name(node) not in _LAYERS or len(node.args) < 3:
            continue
        step, bias = _step(graph, node), node.args[2]
        if step is None or not isinstance(bias, fx.Node) or bias.op != "get_attr":
            continue
        old = fetch(graph, str(bias.target))
        if step.numel() not in (1, old.numel()):
            continue
        whole = ((old.detach().double() / step).round() * step).to(old.dtype)
        name = attach(graph, str(bias.target), whole)  # one of its own: the float network and other layers keep theirs
        with graph.graph.inserting_before(node):
            own = graph.graph.get_attr(name)
        own.meta = dict(bias.meta)
        node.replace_input_with(bias, own)
        done += 1
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return done


def _step(graph: fx.GraphModule, layer: fx.Node) -> Tensor | None:
    """s_x · s_w as float32 holds it; None where one of them is no code, or the product is a matrix per sample, whose bias stays float."""
    x, weight = layer.args[0], layer.args[1]
    if (
        not isinstance(x, fx.Node)
        or not isinstance(weight, fx.Node)
        or x.target is not _QUANTIZED.dequantize_per_tensor.default
    ):
        return None
    if op_name(layer) == "linear" and layer.meta["val"].dim() != 2:
        return None
    given: Any = weight.args[1] if len(weight.args) > 1 else None
    if weight.target is _QUANTIZED.dequantize_per_channel.default:
        scales = fetch(graph, str(given.target))
    elif weight.target is _QUANTIZED.dequantize_per_tensor.default:
        scales = torch.tensor([given])
    else:
        return None
    return (scales.float() * torch.tensor(x.args[1]).float()).double()


__all__ = ["whole_biases"]
