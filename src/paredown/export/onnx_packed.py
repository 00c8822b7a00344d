"""Codes of fewer than 8 bits as bytes of an ONNX file, unpacked by standard ops when a session is made.

    bytes uint8 [⌈n·b / 8⌉] → Gather of a table [256, codes per byte] → Reshape → the int8 codes → DequantizeLinear

The table says what codes each byte holds. It reads nothing but constants, so a runtime computes it once, as it loads the file
(ONNX Runtime folds constants before it looks for layers to run in int8), and what it executes is what it would execute of a
file with one code per byte. The bytes are those of docs/packed.md; widths that are no power of two are the sum of two or three.
DequantizeLinear on ONNX's own INT4 would be shorter, but ONNX Runtime 1.32 then computes the layer in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from paredown.quantize.nouns import Packed
from paredown.quantize.packed import TRITS, pack_codes
from paredown.quantize.schemes import Levels

WORTH_BYTES = 400
"""What the ops around a weight take in the file, for each of its parts."""
PLANES: Mapping[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Widths, lowest bits first, that a code of so many bits is cut into: each must divide a byte."""


def pack_weights(model: ir.Model, weights: Mapping[ir.Value, Packed]) -> int:
    """Replace initializers of int8 codes below 8 bits by their bytes and the ops that unpack them; returns how many."""
    formats: dict[tuple[int, Levels], list[tuple[ir.Value, NDArray[Any]]]] = {}
    for value, packed in weights.items():
        codes = None if value.const_value is None else value.const_value.numpy()
        if codes is None or codes.dtype != np.int8 or not value.is_initializer() or packed.bits >= 8:
            continue
        if _saved(codes, packed.bits) > 0:
            formats.setdefault((packed.bits, packed.levels), []).append((value, codes))
    tables: dict[tuple[Any, ...], ir.Value] = {}
    done = 0
    for (bits, levels), held in formats.items():
        if sum(_saved(codes, bits) for _, codes in held) > sum(256 * 8 // width for width in PLANES[bits]):
            for value, codes in held:
                _unpacked(model, value, codes, _parts(codes, bits, levels), tables)
            done += len(held)
    return done


def _saved(codes: NDArray[Any], bits: int) -> int:
    """Bytes that packing a weight saves, less what the ops around it take; its tables are shared."""
    return int(codes.size * (8 - bits) // 8 - WORTH_BYTES * len(PLANES[bits]))


def _parts(codes: NDArray[Any], bits: int, levels: Levels) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """(bytes, table [256, codes per byte] int8) of each part; the codes are the sum of what the tables give."""
    flat = torch.from_numpy(np.ascontiguousarray(codes)).reshape(-1)
    if levels == "ternary":
        digits = np.arange(256)[:, None] // 3 ** np.arange(TRITS) % 3 - 1
        return [(pack_codes(flat, bits=bits, levels=levels).numpy(), digits.astype(np.int8))]
    low, step = (1 - 2**bits, 2) if levels in ("balanced", "binary") else (-(2 ** (bits - 1)), 1)
    unsigned = (flat.short() - low) // step
    parts: list[tuple[NDArray[Any], NDArray[Any]]] = []
    below = 0
    for width in PLANES[bits]:
        plane = ((unsigned >> below) & (2**width - 1)).to(torch.uint8)
        digits = (np.arange(256)[:, None] >> width * np.arange(8 // width)) & (2**width - 1)
        table = step * (digits << below) + (0 if parts else low)
        parts.append((pack_codes(plane, bits=width).numpy(), table.astype(np.int8)))
        below += width
    return parts


def _unpacked(
    model: ir.Model, value: ir.Value, codes: NDArray[Any], parts: list[Any], tables: dict[tuple[Any, ...], ir.Value]
) -> None:
    name, graph = str(value.name), model.graph
    nodes: list[ir.Node] = []

    def run(op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(op, list(inputs), attributes))
        nodes[-1].outputs[0].name = f"{name}_{len(nodes)}"
        return nodes[-1].outputs[0]

    def shared(key: tuple[Any, ...], label: str, array: NDArray[Any]) -> ir.Value:
        if key not in tables:
            tables[key] = _initializer(model, label, array)
        return tables[key]

    total: ir.Value | None = None
    for number, (data, table) in enumerate(parts):
        label = f"codes{table.tobytes()[:8].hex()}_{table.shape[1]}"
        held = shared((table.tobytes(), table.shape), label, table)
        index = run("Cast", _initializer(model, f"{name}_bytes{number}", data), to=ir.DataType.INT32)
        flat = run("Reshape", run("Gather", held, index, axis=0), shared(("flat",), "flat", np.array([-1])))
        if data.size * table.shape[1] != codes.size:
            ends = [shared(("end", n), f"end{n}", np.array([n])) for n in (0, codes.size)]
            flat = run("Slice", flat, *ends)
        if len(parts) > 1:
            flat = run("Cast", flat, to=ir.DataType.INT32)
        total = flat if total is None else run("Add", total, flat)
    assert total is not None
    if len(parts) > 1:
        total = run("Cast", total, to=ir.DataType.INT8)
    out = run(
        "Reshape",
        total,
        shared(("shape", codes.shape), "shape" + "x".join(map(str, codes.shape)), np.array(codes.shape)),
    )
    first = next(node for node in graph if value in node.inputs)
    graph.insert_before(first, nodes)
    value.replace_all_uses_with(out)
    del graph.initializers[name]


def _initializer(model: ir.Model, name: str, array: NDArray[Any]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value
