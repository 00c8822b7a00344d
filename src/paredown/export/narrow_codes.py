"""Codes of fewer than 8 bits in bytes: kernels of 8 bits compute with them, and give what kernels of their own width would."""

from __future__ import annotations

import copy

import torch
from torch import fx

_QUANTIZE = "quantized_decomposed::quantize_per_tensor"


def clamped(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that cuts codes to their own range: a runtime's QuantizeLinear saturates where the type of the codes ends.

    clamp(round(x / s) + z, 0, 255), then clamp(·, 0, 15): the codes that the simulation has, in the bytes that 8-bit kernels read.
    """
    own = copy.deepcopy(module)
    for node in list(own.graph.nodes):
        if (
            node.op != "call_function"
            or getattr(node.target, "_schema", None) is None
            or node.target._schema.name != _QUANTIZE
        ):
            continue
        low, high, dtype = node.args[3:6]
        ends = torch.iinfo(dtype)
        if (low, high) == (ends.min, ends.max):
            continue
        with own.graph.inserting_after(node):
            cut = own.graph.call_function(torch.ops.aten.clamp.default)
        node.replace_all_uses_with(cut)
        cut.args, cut.meta = (node, low, high), dict(node.meta)
    own.recompile()
    return own


__all__ = ["clamped"]
