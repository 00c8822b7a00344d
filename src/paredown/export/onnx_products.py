"""Products: whether the 8-bit sums of a file are exact in every session of ONNX Runtime, also on x86 without VNNI."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from paredown.examine.onnx_file import FORMS
from paredown.export.onnx_passes import constant, root
from paredown.export.session import EXACT
from paredown.quantize.pairs import pair_sums

_MOST = 128
"""Two uint8 codes times weights that add up to this fit in 16 bits."""
_VIEWS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")


def mark(model: ir.Model) -> None:
    """Write the metadata where there are int8 weights and all keep within the pair rule (see quantize.pairs).

    Not into a file of floats, which needs no mark: another tool would hand it on to what it quantizes.
    """
    held = [v for v in model.graph.initializers.values() if v.const_value is not None]
    codes = [v for v in held if v.const_value is not None and v.const_value.dtype == ir.DataType.INT8]
    if codes and all(_fits(v) for v in codes):
        model.metadata_props[EXACT] = "1"


def _fits(value: ir.Value) -> bool:
    """Whether all products with these codes are exact. Zero points and tables take part in none."""
    for node, place in value.uses():
        if place != 0 and node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            continue
        if node.op_type in FORMS and place == 0:  # the weight of a layer in another form, which has the same neighbours
            if not _fits(node.outputs[0]):
                return False
        elif node.op_type == "DequantizeLinear":
            if not all(_exact(*reader, value) for reader in _readers(node.outputs[0])):
                return False
        elif node.op_type != "Gather":
            return False
    return True


def _readers(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Who computes with it, through views."""
    found: list[tuple[ir.Node, int]] = []
    for node, place in value.uses():
        found += _readers(node.outputs[0]) if node.op_type in _VIEWS and place == 0 else [(node, place)]
    return found


def _exact(node: ir.Node, place: int, value: ir.Value) -> bool:
    codes: NDArray[Any] | None = constant(root(value))
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return node.op_type not in ("ConvTranspose", "LSTM", "GRU", "RNN", "Einsum")  # element by element
    if codes is None or place != 1 or codes.ndim < 2:
        return False
    if node.op_type == "Conv":
        # One output per channel has a kernel of its own, without pairs; several are unfolded, and taps of one channel are neighbours.
        alone = codes.shape[1] == 1 < codes.shape[0] == node.attributes.get_int("group", 1)
        return alone or _within(codes)
    across = codes.swapaxes(-1, -2).reshape(-1, codes.shape[-2])
    along = codes.reshape(-1, codes.shape[-1])
    if value not in _sources(node.inputs[1]):
        return _within(along) and _within(across)  # it went through a view: whichever way it lies
    return _within(along if node.attributes.get_int("transB", 0) else across)


def _sources(value: ir.Value | None) -> tuple[Any, ...]:
    node = None if value is None else value.producer()
    return tuple(node.inputs) if node is not None and node.op_type == "DequantizeLinear" else ()


def _within(codes: NDArray[Any]) -> bool:
    return bool(pair_sums(torch.from_numpy(np.ascontiguousarray(codes))).max() <= _MOST)
