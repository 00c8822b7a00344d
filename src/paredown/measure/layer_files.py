"""Files of one layer each: a convolution or a matrix product of given shape, in float32 or on integer codes, as a runtime takes it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from paredown.errors import UsageError

Kind = Literal["conv", "linear"]
Scheme = Literal["fp32", "int8"]
OPSET, IR = 18, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """All that decides how long one layer takes, but for what runs it. Channels are those of all groups together."""

    kind: Kind
    out_channels: int
    in_channels: int
    positions: tuple[int, ...]
    """Of a convolution the input's height and width (or length); of a linear layer the rows."""
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        bad = self.out_channels < 1 or self.in_channels < 1 or self.groups < 1
        if bad or self.out_channels % self.groups or self.in_channels % self.groups:
            msg = f"a layer must have channels ≥ 1 that its groups divide. Got {self.out_channels}, {self.in_channels} and {self.groups}."
            raise UsageError(msg)

    def described(self) -> dict[str, Any]:
        """As JSON: the key of a cached time."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        weight = self.out_channels * self.in_channels // self.groups * math.prod(self.kernel)
        return weight * math.prod(self.positions if self.kind == "linear" else self.after)

    @property
    def after(self) -> list[int]:
        """Height and width (or length) of a convolution's result."""
        parts = zip(self.positions, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts]


def write_layer(shape: LayerShape, path: Path, scheme: Scheme = "fp32") -> Path:
    """An ONNX file of that one layer with a bias, random weights (seed 0), one sample.

    int8: codes in, codes out (uint8), int8 weights per output channel, as `quantize` writes them for ONNX Runtime and
    OpenVINO, so that no conversion of activations is part of what is timed. Raises UsageError (another scheme).
    """
    from onnx import TensorProto, checker, helper, save_model

    if scheme not in ("fp32", "int8"):
        msg = f"a layer's scheme must be 'fp32' or 'int8'. Got {scheme!r}."
        raise UsageError(msg)
    kind = TensorProto.FLOAT if scheme == "fp32" else TensorProto.UINT8
    names = ("x", "y") if scheme == "fp32" else ("x_codes", "y_codes")
    nodes, held = (_float_layer if scheme == "fp32" else _coded_layer)(shape)
    source = helper.make_tensor_value_info(names[0], kind, _input(shape))
    result = helper.make_tensor_value_info(names[1], kind, _output(shape))
    graph = helper.make_graph(nodes, "layer", [source], [result], initializer=held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    checker.check_model(model)
    save_model(model, str(path))
    return path


def feed_for(shape: LayerShape, scheme: Scheme) -> dict[str, Any]:
    """One random sample for the file of a layer."""
    generator = np.random.default_rng(1)
    if scheme == "fp32":
        return {"x": generator.standard_normal(_input(shape)).astype(np.float32)}
    return {"x_codes": generator.integers(0, 256, _input(shape)).astype(np.uint8)}


def _input(shape: LayerShape) -> list[int]:
    if shape.kind == "linear":
        return [math.prod(shape.positions), shape.in_channels]
    return [1, shape.in_channels, *shape.positions]


def _output(shape: LayerShape) -> list[int]:
    if shape.kind == "linear":
        return [math.prod(shape.positions), shape.out_channels]
    return [1, shape.out_channels, *shape.after]


def _op(shape: LayerShape, names: list[str], out: str) -> Any:
    from onnx import helper

    if shape.kind == "linear":
        return helper.make_node("Gemm", names, [out], transB=1)
    return helper.make_node(
        "Conv", names, [out], group=shape.groups, kernel_shape=list(shape.kernel), strides=list(shape.stride),
        pads=[*shape.padding, *shape.padding], dilations=list(shape.dilation),
    )  # fmt: skip


def _weights(shape: LayerShape) -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    size = (shape.out_channels, shape.in_channels // shape.groups, *shape.kernel)
    weight = generator.standard_normal(size).astype(np.float32) / math.sqrt(max(math.prod(size[1:]), 1))
    return weight, generator.standard_normal(shape.out_channels).astype(np.float32)


def _float_layer(shape: LayerShape) -> tuple[list[Any], list[Any]]:
    from onnx import numpy_helper

    weight, bias = _weights(shape)
    return [_op(shape, ["x", "w", "b"], "y")], [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(bias, "b"),
    ]


def _coded_layer(shape: LayerShape) -> tuple[list[Any], list[Any]]:
    from onnx import helper, numpy_helper

    weight, bias = _weights(shape)
    scales = np.abs(weight.reshape(len(weight), -1)).max(1) / 127 + np.float32(1e-9)
    codes = np.round(weight / scales.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
    step, middle = np.float32(0.02), np.uint8(128)
    held = {
        "codes": codes, "scales": scales.astype(np.float32), "zeros": np.zeros(len(codes), np.int8), "step": step,
        "middle": middle, "bias_codes": np.round(bias / (scales * step)).astype(np.int32),
        "bias_scales": (scales * step).astype(np.float32), "bias_zeros": np.zeros(len(codes), np.int32),
        "out_step": np.float32(0.05),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["x_codes", "step", "middle"], ["x"]),
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["w"], axis=0),
        helper.make_node("DequantizeLinear", ["bias_codes", "bias_scales", "bias_zeros"], ["b"], axis=0),
        _op(shape, ["x", "w", "b"], "y"),
        helper.make_node("QuantizeLinear", ["y", "out_step", "middle"], ["y_codes"]),
    ]
    return nodes, [numpy_helper.from_array(np.asarray(v), n) for n, v in held.items()]
