"""ONNX of the schemes without calibration: int8-dynamic as DynamicQuantizeLinear and integer products, w4 as MatMulNBits.

The simulation's ops go through the exporter as placeholders of the domain "paredown"; `lower` turns each into the operators
that the runtime executes. Codes are those of `Quantized.weights`: they are moved, offset and packed, never computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram

from paredown.export.onnx_passes import _replace, constant, initializer
from paredown.quantize import simulate  # noqa: F401  (registers torch.ops.paredown)

DOMAIN, CONTRIB = "paredown", "com.microsoft"
BLOCK, ZERO = 32, 128
GATES = (0, 3, 1, 2)
"""PyTorch keeps the gates of an LSTM as i, f, g, o; ONNX as i, o, f, g."""


def marked(program: ExportedProgram) -> ExportedProgram:
    """The program with every op of the simulation replaced by a placeholder that the ONNX exporter passes through."""
    ops = torch.ops.paredown
    table: dict[Any, Callable[..., Any]] = {
        ops.dynamic_linear.default: _mark_linear,
        ops.group_linear.default: _mark_groups,
        ops.code_rows.default: _mark_rows,
        ops.dynamic_lstm.default: _mark_lstm,
    }
    return program.run_decompositions(table)  # type: ignore[no-any-return]


def _mark_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Linear", (x, codes, scales), dtype=torch.float32, shape=(*x.shape[:-1], codes.shape[0])
    )


def _mark_groups(x: Tensor, codes: Tensor, scales: Tensor, group: int) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Groups",
        (x, codes, scales),
        {"group": group},
        dtype=torch.float32,
        shape=(*x.shape[:-1], codes.shape[0]),
    )


def _mark_rows(codes: Tensor, scales: Tensor, indices: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Rows", (codes, scales, indices), dtype=torch.float32, shape=(*indices.shape, codes.shape[1])
    )


def _mark_lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    codes: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    directions = 2 if bidirectional else 1
    attributes: dict[str, Any] = {"layers": num_layers, "directions": directions, "batch_first": int(batch_first)}
    width = h.shape[2] * directions
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::Lstm",
            (x, h, c, *codes, *scales, *biases),
            attributes,
            dtypes=(torch.float32,) * 3,
            shapes=((x.shape[0], x.shape[1], width), h.shape, c.shape),
        )
    )


def lower(model: ir.Model, names: Mapping[str, str], accuracy_level: int) -> dict[str, str]:
    """Replace the placeholders, in place. `names` says which parameter an initializer holds; returns the same for the new ones.

    `accuracy_level` goes to MatMulNBits: 0 computes in float32, 4 in int8 with a range per row and block of inputs.
    """
    found = dict(names)
    done: dict[str, ir.Value] = {}
    for node in list(model.graph):
        if node.domain != DOMAIN:
            continue
        if node.op_type == "Linear":
            _lower_linear(model, node, found, done)
        elif node.op_type == "Groups":
            _lower_groups(model, node, found, done, accuracy_level)
        elif node.op_type == "Rows":
            _lower_rows(model, node, found, done)
        else:
            _lower_lstm(model, node, found)
    model.opset_imports.pop(DOMAIN, None)
    model.graph.opset_imports[CONTRIB] = 1
    return found


def _lower_linear(model: ir.Model, node: ir.Node, names: dict[str, str], done: dict[str, ir.Value]) -> None:
    """DynamicQuantizeLinear → MatMulInteger → Cast → Mul, which ONNX Runtime fuses to one node, the bias after it included."""
    x, codes, scales = node.inputs
    before: list[ir.Node] = []
    if any(user.op_type in ("Rows", "Gather") for user, _ in codes.uses()):
        # A head tied to an embedding: one copy in the file. The runtime transposes it when it loads.
        before.append(ir.node("Transpose", [_unsigned(model, codes, names, done)], {"perm": [1, 0]}))
        matrix = before[0].outputs[0]
    else:
        matrix = _unsigned(model, codes, names, done, transposed=True)
    quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    product = ir.node("MatMulInteger", [quantize.outputs[0], matrix, quantize.outputs[2], _offset(model, done)])
    cast = ir.node("Cast", [product.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    scale = ir.node("Mul", [quantize.outputs[1], scales])
    _replace(
        model, node, [*before, quantize, product, cast, scale, ir.node("Mul", [cast.outputs[0], scale.outputs[0]])]
    )


def _unsigned(
    model: ir.Model, codes: ir.Value, names: dict[str, str], done: dict[str, ir.Value], *, transposed: bool = False
) -> ir.Value:
    """The codes q as uint8 q + 128, whose zero point is 128; made once, however many read them.

    On x86 without VNNI, products of uint8 activations with int8 weights saturate unless the session asks for precision;
    with uint8 weights they are exact in every session, and nodes may share weights.
    """
    key = f"{codes.name}_{'columns' if transposed else 'rows'}"
    if key not in done:
        array = offset(_array(codes))
        done[key] = initializer(model, key, np.ascontiguousarray(array.T) if transposed else array)
        names[key] = names.get(str(codes.name), str(codes.name))
    return done[key]


def offset(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """q + 128, the same numbers around the zero point 128.

    >>> offset(np.array([-127, 0, 127], np.int8)).tolist()
    [1, 128, 255]
    """
    return (codes.astype(np.int16) + ZERO).astype(np.uint8)


def _offset(model: ir.Model, done: dict[str, ir.Value]) -> ir.Value:
    if "zero" not in done:
        done["zero"] = initializer(model, f"{DOMAIN}_zero", np.array(ZERO, np.uint8))
    return done["zero"]


def _lower_groups(
    model: ir.Model, node: ir.Node, names: dict[str, str], done: dict[str, ir.Value], accuracy_level: int
) -> None:
    x, codes, scales = node.inputs
    array = _array(codes)
    packed = done.get(str(codes.name))
    if packed is None:
        packed = done[str(codes.name)] = initializer(model, f"{codes.name}_4", nibbles(array, BLOCK))
        names[str(packed.name)] = names.get(str(codes.name), str(codes.name))
    attributes = {"K": array.shape[1], "N": array.shape[0], "bits": 4, "block_size": BLOCK}
    if accuracy_level:
        attributes["accuracy_level"] = accuracy_level
    _replace(model, node, [ir.node("MatMulNBits", [x, packed, scales], attributes, domain=CONTRIB)])


def nibbles(codes: NDArray[np.int8], block: int) -> NDArray[np.uint8]:
    """Codes [outputs, inputs] from -8 to 7 as MatMulNBits holds them: uint8 [outputs, blocks, block / 2], two to a byte.

    A byte is (c₀ + 8) + 16 · (c₁ + 8), the earlier input in the low half; the zero point 8 is implied. A last block that is
    not full is filled with 0. Source: ONNX Runtime, contrib operator MatMulNBits.

    >>> nibbles(np.array([[-8, 7, 0]], np.int8), 4).tolist()
    [[[240, 136]]]
    """
    outputs, inputs = codes.shape
    padded = np.pad(codes, ((0, 0), (0, -inputs % block)))
    shifted = (padded.astype(np.int16) + 8).astype(np.uint8).reshape(outputs, -1, block)
    return np.asarray(shifted[..., 0::2] | (shifted[..., 1::2] << 4), np.uint8)


def _lower_rows(model: ir.Model, node: ir.Node, names: dict[str, str], done: dict[str, ir.Value]) -> None:
    """Gather rows of codes and their scales; the codes become numbers by a scale of 1."""
    codes, scales, indices = node.inputs
    one = done.setdefault("one", initializer(model, f"{DOMAIN}_one", np.array(1, np.float32)))
    column = initializer(model, f"{node.outputs[0].name}_column", _array(scales)[:, None])
    rows, factors = (
        ir.node("Gather", [_unsigned(model, codes, names, done), indices]),
        ir.node("Gather", [column, indices]),
    )
    plain = ir.node("DequantizeLinear", [rows.outputs[0], one, _offset(model, done)])
    _replace(model, node, [rows, factors, plain, ir.node("Mul", [plain.outputs[0], factors.outputs[0]])])


# ----------------------------------------------------------------------------------------------------------------- LSTM


def _lower_lstm(model: ir.Model, node: ir.Node, names: dict[str, str]) -> None:
    """One DynamicQuantizeLSTM per layer."""
    count, directions, batch_first = (
        int(node.attributes.get_int(k, 0)) for k in ("layers", "directions", "batch_first")
    )
    x, h, c, *rest = node.inputs
    size = 2 * count * directions
    codes, scales, biases = rest[:size], rest[size : 2 * size], rest[2 * size :]
    new: list[ir.Node] = []

    def add(op: str, inputs: list[Any], attributes: dict[str, Any] | None = None, **more: Any) -> list[ir.Value]:
        new.append(ir.node(op, inputs, attributes or {}, **more))
        return list(new[-1].outputs)

    states = [
        [v] if count == 1 else add("Split", [v], {"axis": 0, "num_outputs": count}, num_outputs=count) for v in (h, c)
    ]
    (value,) = add("Transpose", [x], {"perm": [1, 0, 2]}) if batch_first else [x]
    finals: list[list[ir.Value]] = [[], []]
    for layer in range(count):
        mine = slice(2 * directions * layer, 2 * directions * (layer + 1))
        label = str(node.outputs[0].name) + f"_{layer}"
        parts = _layer(codes[mine], scales[mine], biases[mine])
        held = {k: initializer(model, f"{label}_{k}", v) for k, v in parts.items()}
        owner = names.get(str(codes[mine][0].name), "lstm.weight").rpartition(".")[0]
        names[str(held["w"].name)] = f"{owner}.l{layer}" if count > 1 else owner
        weights = [held["w"], held["r"], held.get("b")]
        inputs = [value, *weights, None, states[0][layer], states[1][layer], None]
        inputs += [held[k] for k in ("w_scale", "w_zero", "r_scale", "r_zero")]
        kind = {"hidden_size": parts["r"].shape[1], "direction": "bidirectional" if directions == 2 else "forward"}
        out, *final = add("DynamicQuantizeLSTM", inputs, kind, domain=CONTRIB, num_outputs=3)
        for kept, state in zip(finals, final, strict=True):
            kept.append(state)
        value = _joined(model, label, out, directions, add)
    if batch_first:
        (value,) = add("Transpose", [value], {"perm": [1, 0, 2]})
    last = [v[0] if count == 1 else add("Concat", v, {"axis": 0})[0] for v in finals]
    _put(model, node, new, [value, *last])


def _joined(
    model: ir.Model, label: str, out: ir.Value, directions: int, add: Callable[..., list[ir.Value]]
) -> ir.Value:
    """[steps, directions, batch, hidden] → [steps, batch, directions · hidden]."""
    if directions == 1:
        axis = initializer(model, f"{label}_axis", np.array([1], np.int64))
        return add("Squeeze", [out, axis])[0]
    shape = initializer(model, f"{label}_shape", np.array([0, 0, -1], np.int64))
    (moved,) = add("Transpose", [out], {"perm": [0, 2, 1, 3]})
    return add("Reshape", [moved, shape])[0]


def _layer(codes: Any, scales: Any, biases: Any) -> dict[str, NDArray[Any]]:
    """The weights of one layer as the kernel takes them: [directions, inputs, 4 · hidden], gates in ONNX's order.

    Zero points have the shape of the scales: with one per direction only, ONNX Runtime 1.32 reads beyond them in the second
    direction and computes something else.
    """

    def stacked(values: Any, first: int) -> NDArray[Any]:
        return np.stack([np.concatenate([np.split(_array(v), 4)[g] for g in GATES]) for v in values[first::2]])

    found: dict[str, NDArray[Any]] = {}
    for first, key in enumerate("wr"):
        found[key] = np.ascontiguousarray(offset(stacked(codes, first)).transpose(0, 2, 1))
        found[f"{key}_scale"] = stacked(scales, first)
        found[f"{key}_zero"] = np.full(found[f"{key}_scale"].shape, ZERO, np.uint8)
    if biases:
        found["b"] = np.concatenate([stacked(biases, 0), stacked(biases, 1)], axis=1)
    return found


def _put(model: ir.Model, node: ir.Node, new: list[ir.Node], outputs: list[ir.Value]) -> None:
    """Like `_replace`, for a node with several outputs."""
    model.graph.insert_after(node, new)
    names = [o.name for o in node.outputs]
    for old, value in zip(node.outputs, outputs, strict=True):
        value.shape, value.type = old.shape, old.type
        if old.is_graph_output():
            model.graph.outputs[[v is old for v in model.graph.outputs].index(True)] = value
        old.replace_all_uses_with(value)
    model.graph.remove(node, safe=True)
    for value, name in zip(outputs, names, strict=True):
        value.name = name


def _array(value: ir.Value | None) -> NDArray[Any]:
    array = constant(value)
    if array is None:
        msg = f"{value.name if value is not None else 'a weight'} must be an initializer of the exported graph"
        raise AssertionError(msg)
    return array
