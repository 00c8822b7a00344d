"""HardSigmoid between codes, as one multiplication of codes: every code against the formula, in ONNX Runtime's own graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from paredown.export import onnx_passes

CODES = np.arange(256, dtype=np.uint8).reshape(1, 256)


def graph(scale: float, zero: int, *, out_scale: float = 1 / 256, **attributes: float) -> onnx.ModelProto:
    """x · HardSigmoid(x) on codes; the second output is the gate alone."""
    held = {
        "s": np.float32(scale), "z": np.uint8(zero), "gs": np.float32(out_scale), "gz": np.uint8(0),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["x"]),
        helper.make_node("HardSigmoid", ["x"], ["h"], **{"alpha": 1 / 6, "beta": 0.5, **attributes}),
        helper.make_node("QuantizeLinear", ["h", "gs", "gz"], ["g"]),
        helper.make_node("DequantizeLinear", ["g", "gs", "gz"], ["gate"]),
        helper.make_node("Mul", ["x", "gate"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "s", "z"], ["yc"]),
        helper.make_node("DequantizeLinear", ["yc", "s", "z"], ["out"]),
    ]
    values = [
        helper.make_tensor_value_info(n, t, [1, 256])
        for n, t in (("codes", TensorProto.UINT8), ("out", TensorProto.FLOAT), ("gate", TensorProto.FLOAT))
    ]
    made = helper.make_graph(
        nodes, "g", values[:1], values[1:], [numpy_helper.from_array(np.array(a), n) for n, a in held.items()]
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model: Any, folder: Path) -> tuple[list[np.ndarray], list[str]]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "o.onnx")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"codes": CODES})
    return found, [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]


def rewritten(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    held = ir.serde.deserialize_model(model)
    done = onnx_passes.hard_sigmoids(held)
    return ir.serde.serialize_model(held), done


@pytest.mark.parametrize(("scale", "zero"), [(0.05, 128), (0.1, 60), (0.003, 10), (0.9, 3), (6 / 256, 128)])
def test_every_code_is_that_of_the_formula(scale: float, zero: int, tmp_path: Path) -> None:
    new, done = rewritten(graph(scale, zero))
    assert done == 1
    (out, gate), ops = run(new, tmp_path)
    assert "HardSigmoid" not in ops
    assert ops.count("QLinearMul") == 2
    x = (CODES.astype(np.float64) - zero) * np.float32(scale)
    wanted = np.clip(x / 6 + 0.5, 0, 1) * 256
    apart = np.abs(gate.astype(np.float64) * 256 - np.clip(wanted, 0, 255))
    assert apart.max() <= 0.5 + 1e-3  # nearest codes; a half may go either way
    assert gate.min() >= 0
    assert gate.max() <= 255 / 256
    (plain_out, plain_gate), plain_ops = run(graph(scale, zero), tmp_path)
    assert "HardSigmoid" in plain_ops
    assert np.abs(gate - plain_gate).max() <= 1 / 256 + 1e-7  # only at halves
    assert (gate == plain_gate).mean() > 0.9
    assert np.abs(out - plain_out).max() <= 1.01 * scale


def test_other_slopes_and_scales_are_left_alone() -> None:
    assert rewritten(graph(0.05, 128, alpha=0.2))[1] == 0
    assert rewritten(graph(0.05, 128, beta=0.4))[1] == 0
    assert rewritten(graph(0.05, 128, out_scale=1 / 255))[1] == 0
