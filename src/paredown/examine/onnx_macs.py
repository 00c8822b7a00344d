"""MACs of one node of an ONNX file, from shapes: one function and one table line per op that multiplies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from paredown.examine.count import Shape, einsum_macs

Shapes = Mapping[str, Shape]
"""Value → shape at the smallest batch, where all of it is known."""


def op_of(node: Any) -> str:
    """Name of an op, with the domain where it is not ONNX's own: "Conv", "com.microsoft::QGemm"."""
    return str(node.op_type) if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _conv(node: Any, shapes: Shapes) -> int | None:
    at = 3 if node.op_type == "QLinearConv" else 1
    weight, out = shapes.get(node.input[at]), shapes.get(node.output[0])
    return None if weight is None or out is None else math.prod(out) // max(weight[0], 1) * math.prod(weight)


def _conv_transpose(node: Any, shapes: Shapes) -> int | None:
    data, weight = shapes.get(node.input[0]), shapes.get(node.input[1])
    return None if weight is None or data is None else math.prod(data) // max(weight[0], 1) * math.prod(weight)


def _gemm(node: Any, shapes: Shapes) -> int | None:
    a, b = shapes.get(node.input[0]), shapes.get(node.input[1])
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return None
    flags = {x.name: x.i for x in node.attribute}
    rows, inner = (a[1], a[0]) if flags.get("transA") else (a[0], a[1])
    return int(rows) * int(inner) * int(b[0] if flags.get("transB") else b[1])


def _matmul(node: Any, shapes: Shapes) -> int | None:
    """Elements of the result × the contracted length, which either operand tells."""
    second = 3 if node.op_type == "QLinearMatMul" else 1
    a, b, out = shapes.get(node.input[0]), shapes.get(node.input[second]), shapes.get(node.output[0])
    if out is None and a and b and len(b) <= 2:
        out = (*a[:-1], *b[-1:])
    inner = (a or (b or ())[-2:-1])[-1:]
    return math.prod(out) * inner[0] if out is not None and inner else None


def _recurrent(node: Any, shapes: Shapes) -> int | None:
    """Steps × batch × (numel W + numel R), the two weights holding all directions."""
    x, out, weights = shapes.get(node.input[0]), shapes.get(node.output[0]), _inputs(node, shapes, 1, 2)
    if weights is None or any(len(w) != 3 for w in weights):
        return None
    per_step = sum(math.prod(w) for w in weights)
    if x is not None and len(x) == 3:
        return x[0] * x[1] * per_step
    r = weights[1]  # the result has steps × batch × directions × hidden elements
    return None if out is None else math.prod(out) // max(r[0] * min(r[1:]), 1) * per_step


def _einsum(node: Any, shapes: Shapes) -> int | None:
    given = _inputs(node, shapes, *range(len(node.input)))
    equation = next((a.s.decode() for a in node.attribute if a.name == "equation"), "")
    try:
        return None if given is None else einsum_macs(equation, list(given))
    except ValueError:  # an equation that does not fit its operands
        return None


def _attention(node: Any, shapes: Shapes) -> int | None:
    """Query·key and weights·value; the keys of a cache join those given."""
    cached = len(node.input) > 4 and bool(node.input[4])
    given = _inputs(node, shapes, *((0, 1, 2, 4) if cached else (0, 1, 2)))
    if given is None or len({len(s) for s in given[:3]}) != 1:
        return None
    q, k, v = given[:3]
    keys = k[-2] + (given[3][-2] if cached else 0)
    if len(q) == 4:  # [batch, heads, length, depth]
        return math.prod(q[:3]) * keys * (q[3] + v[3])
    heads: dict[str, int] = {a.name: a.i for a in node.attribute if a.name.endswith("_num_heads")}
    if len(q) != 3 or not heads.get("q_num_heads") or not heads.get("kv_num_heads"):
        return None
    return q[0] * q[1] * keys * (q[2] + heads["q_num_heads"] * (v[2] // heads["kv_num_heads"]))


def _inputs(node: Any, shapes: Shapes, *places: int) -> tuple[Shape, ...] | None:
    """Shapes of these inputs; None where one is not given or not known."""
    names = [node.input[p] for p in places if p < len(node.input)]
    found = tuple(shapes[n] for n in names if n in shapes)
    return found if len(found) == len(places) else None


def _unknown(node: Any, shapes: Shapes) -> None:
    """An op that multiplies and that no rule here counts."""


MACS: Mapping[str, Callable[[Any, Shapes], int | None]] = {
    "Conv": _conv,
    "ConvInteger": _conv,
    "QLinearConv": _conv,
    "DeformConv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "Einsum": _einsum,
    "Attention": _attention,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "com.microsoft::DynamicQuantizeLSTM": _recurrent,
    "DFT": _unknown,
    "STFT": _unknown,
    "LinearAttention": _unknown,
    "CausalConvWithState": _unknown,
}
"""Op → its MACs; None where a shape that they need is not known."""
