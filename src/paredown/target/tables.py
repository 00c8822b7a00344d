"""One table per runtime: what it executes in int8, how it wants activations, what to decompose for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from paredown.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a runtime can do. `ops` maps an op of the exported graph to how it is quantized for this runtime."""

    name: str
    activation_dtype: Literal["uint8", "int8"]
    ops: Mapping[str, str]
    """aten op name (no overload) → "weighted" | "binary" | "lookup" | "shared" | "matmul"; an op not named stays float.
    weighted: int8 weight per output channel, quantized input and output. binary, matmul: both inputs and the output.
    lookup: one input, an output with a scale of its own. shared: moves or selects values, output has the input's scale."""
    dtypes: tuple[str, ...]
    fusions: tuple[str, ...]
    """Activations that the runtime fuses into the op before it: quantize after them."""
    decompositions: tuple[str, ...]
    """aten ops rewritten before annotation because the runtime has no int8 kernel for the whole."""
    alignment: int
    """Channels are rounded to a multiple of this."""
    limits: Mapping[str, int] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()


def _kinds(**kinds: str) -> dict[str, str]:
    return {op: kind for kind, ops in kinds.items() for op in ops.split()}


# What ONNX Runtime 1.23–1.32 runs in 8 bits on the CPU: QLinearConv, QGemm, QLinearAdd, QLinearMul, QLinearSigmoid,
# QLinearLeakyRelu, QLinearGlobalAveragePool, and any op that only moves values, on uint8 tensors as they are.
# Attention products, softmax, normalization, GELU, hard-sigmoid and transposed convolutions have no kernel worth using:
# int8 attention products bought nothing on ViT-B/16 (137 ms against 130 ms), so they are left out.
_ORT_X86 = _kinds(
    weighted="conv1d conv2d conv3d linear",
    binary="add add_ mul mul_",
    lookup="sigmoid sigmoid_ leaky_relu leaky_relu_",
    shared=(
        "max_pool1d max_pool2d max_pool3d avg_pool2d adaptive_avg_pool2d flatten unflatten view reshape _unsafe_view permute transpose t "
        "numpy_T swapaxes movedim squeeze unsqueeze slice select narrow pad constant_pad_nd cat concat stack expand expand_as repeat tile "
        "split split_with_sizes chunk unbind tensor_split roll flip index_select pixel_shuffle pixel_unshuffle upsample_nearest2d"
    ),
)

TARGETS: Mapping[str, Target] = {
    "onnxruntime-x86": Target(
        name="onnxruntime-x86",
        activation_dtype="uint8",
        ops=_ORT_X86,
        dtypes=("float32", "uint8", "int8"),
        fusions=("relu", "relu_", "hardtanh", "hardtanh_", "relu6", "relu6_"),
        decompositions=(
            *("dropout", "dropout_", "feature_dropout", "alias", "detach", "contiguous", "clone", "lift_fresh_copy"),
            *("hardswish", "hardswish_", "silu", "silu_", "mean", "linear", "view", "_unsafe_view"),
        ),
        alignment=8,
        limits={"opset": 18, "opset_max": 23},
    ),
}

KNOWN = ("onnxruntime-x86", "onnxruntime-arm", "openvino-x86", "executorch-xnnpack", "litert")


def named(name: str) -> Target:
    """The target of that name. Raises UsageError for another name, and says so where it is planned but not here yet."""
    if name in TARGETS:
        return TARGETS[name]
    later = " It is a target of paredown, but this version cannot export to it yet." if name in KNOWN else ""
    msg = f"target must be one of {', '.join(TARGETS)}. Got {name!r}.{later}"
    raise UsageError(msg)
