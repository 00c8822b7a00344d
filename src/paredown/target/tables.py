"""One table per runtime: what it executes in int8, how it wants activations, what to decompose for it."""

from __future__ import annotations

import dataclasses
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
    """What a file may hold. float16 stands for weights alone; what is computed is float32."""
    fusions: tuple[str, ...]
    """Activations that the runtime fuses into the op before it: quantize after them."""
    decompositions: tuple[str, ...]
    """aten ops rewritten before annotation because the runtime has no int8 kernel for the whole."""
    alignment: int
    """Channels are rounded to a multiple of this."""
    limits: Mapping[str, int] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    suffix: str = ".onnx"
    """Ending of the name of the model file."""
    extras: tuple[str, ...] = ("onnx",)
    """Of paredown, in `pip install 'paredown[…]'`: what export, check and measure need."""
    modules: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
    """What these extras bring, by the name under which it is imported."""
    float_results: tuple[str, ...] = ()
    """Ops that can return float from codes, which they do where nothing reads codes, through views of them too; "*" is all."""
    fixed: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Op → smallest and largest value of its result, where its int8 kernel has one scale and takes no other."""
    pair_sum: int | None = None
    """How much the codes of two neighbouring int8 weights of one output may add up to, above or below 0; None: anything. On x86
    without VNNI, the products of two uint8 activations with two weights are summed in 16 bits, which saturate beyond 128 × 255."""
    forms: tuple[str, ...] = ()
    """Layers on codes that are exported in another form with the same result, because the int8 kernel for that form is
    faster, and the one for them as they are often slower than float: what was measured stands in export/onnx_kernels.py."""
    environment: tuple[str, ...] = ()
    """Pinned packages that are installed apart, by `paredown setup`, because they conflict with others."""
    own_modules: tuple[str, ...] = ()
    """What these bring, by the name under which that environment imports it."""


def _kinds(**kinds: str) -> dict[str, str]:
    return {op: kind for kind, ops in kinds.items() for op in ops.split()}


_MOVES = (
    "max_pool1d max_pool2d max_pool3d avg_pool2d adaptive_avg_pool2d flatten unflatten view reshape _unsafe_view permute transpose t "
    "numpy_T swapaxes movedim squeeze unsqueeze slice select narrow pad constant_pad_nd cat concat stack expand expand_as repeat tile "
    "split split_with_sizes chunk unbind tensor_split roll flip index_select pixel_shuffle pixel_unshuffle upsample_nearest2d"
)

# What ONNX Runtime 1.23–1.32 runs in 8 bits on the CPU: QLinearConv, QGemm, QLinearAdd, QLinearMul, QLinearSigmoid,
# QLinearLeakyRelu, QLinearGlobalAveragePool, and any op that only moves values, on uint8 tensors as they are.
# Attention products, softmax, normalization, GELU and transposed convolutions have no kernel worth using:
# int8 attention products bought nothing on ViT-B/16 (137 ms against 130 ms), so they are left out.
_ORT_X86 = _kinds(
    weighted="conv1d conv2d conv3d linear",
    binary="add add_ mul mul_",
    lookup="sigmoid sigmoid_ leaky_relu leaky_relu_ hardsigmoid hardsigmoid_",
    shared=_MOVES,
)
# The exporter writes hard-sigmoid as one multiplication of codes, which needs this scale (see export/onnx_passes.py).
_ORT_FIXED = dict.fromkeys(("hardsigmoid", "hardsigmoid_"), (0.0, 255 / 256))

# What OpenVINO 2026.4 was seen to run in 8 bits on a CPU with AVX2: convolutions (with groups too), FullyConnected, element-wise addition and
# multiplication, pools, means over height and width, concatenation, and what only moves values. Its layers take any
# element-wise activation, sum and requantization into themselves, so that an activation is left whole and its result is
# quantized: hard-swish as x · hardsigmoid(x) was five nodes in float, one of them a reference kernel, and is none this way.
# Tokens need no reshaping in front of a linear layer. Attention products, softmax and normalization stay float.
_OPENVINO_X86 = _kinds(
    weighted="conv1d conv2d conv3d linear",
    binary="add add_ mul mul_",
    shared=_MOVES,
)
# What XNNPACK runs in 8 bits in ExecuTorch 1.5.1 (its partitioner's own list, STATIC_QUANT): both inputs and the one output of an
# op must be codes, the last layer's too. No curve has an int8 kernel there: hard-swish, sigmoid, GELU and softmax are float between
# two conversions inside the same delegate, and so are padding and pools other than maxima and global means. Hard-swish
# is left whole: its parts would leave XNNPACK. expand, select and layer norm are not XNNPACK's at all. squeeze and unflatten become reshapes
# (phone_passes.py), which XNNPACK refuses when it loads the file unless their result has the scale of what they read.
_XNNPACK = _kinds(
    weighted="conv1d conv2d linear",
    binary="add add_ sub sub_ mul mul_",
    shared=(
        "max_pool2d adaptive_avg_pool2d flatten unflatten view reshape permute transpose t numpy_T swapaxes movedim squeeze unsqueeze slice narrow "
        "cat concat"
    ),
)
# What LiteRT 2.3 runs in 8 bits, in XNNPACK or in its own kernels: its converter makes an int8 op of everything that stands between
# a dequantize and a quantize. Results of sigmoid, tanh and softmax have the one scale that its own kernels take.
# Attention products and normalization stay float. Its int8 hard-swish is not XNNPACK's, and cuts the graph (docs/decisions/phones.md).
_LITERT = _kinds(
    weighted="conv1d conv2d linear",
    binary="add add_ sub sub_ mul mul_",
    lookup="sigmoid sigmoid_ tanh tanh_ hardswish hardswish_ leaky_relu leaky_relu_ gelu",
    shared=_MOVES,
)
_LITERT_FIXED = {
    **dict.fromkeys(("sigmoid", "sigmoid_", "softmax", "_softmax"), (0.0, 255 / 256)),
    **dict.fromkeys(("tanh", "tanh_"), (-1.0, 127 / 128)),
}
_IDENTITIES = ("dropout", "dropout_", "feature_dropout", "alias", "detach", "contiguous", "clone", "lift_fresh_copy")
_CLAMPS = ("relu", "relu_", "hardtanh", "hardtanh_", "relu6", "relu6_")
_CURVES = (
    *("sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_", "hardswish", "hardswish_", "silu", "silu_"),
    *("leaky_relu", "leaky_relu_", "elu", "elu_", "gelu", "mish", "tanh", "tanh_"),
)

_ORT = Target(
    name="onnxruntime-x86",
    activation_dtype="uint8",
    ops=_ORT_X86,
    dtypes=("float32", "float16", "uint8", "int8"),
    fusions=_CLAMPS,
    decompositions=(
        *_IDENTITIES,
        *("hardswish", "hardswish_", "silu", "silu_", "mean", "adaptive_max_pool2d", "linear", "view", "_unsafe_view"),
    ),
    alignment=8,
    limits={"opset": 18, "opset_max": 23},
    fixed=_ORT_FIXED,
    pair_sum=128,
    forms=("frames", "repeat", "merge", "gelu"),
    float_results=("linear",),  # QGemm; its integers become floats once, not codes and then floats
)

TARGETS: Mapping[str, Target] = {
    _ORT.name: _ORT,
    # The same kernels by name; those of ARM sum bytes in 32 bits, so that weights need not give way to their neighbours. Nothing else
    # is known to differ: no ARM device was measured. What is measured here is of this machine; there, it is through a bundle.
    "onnxruntime-arm": dataclasses.replace(_ORT, name="onnxruntime-arm", pair_sum=None),
    "openvino-x86": Target(
        name="openvino-x86",
        activation_dtype="uint8",
        ops=_OPENVINO_X86,
        dtypes=("float32", "float16", "uint8", "int8"),
        fusions=(*_CLAMPS, *_CURVES),
        decompositions=(*_IDENTITIES, "mean", "adaptive_max_pool2d", "view", "_unsafe_view"),
        alignment=8,
        limits={"opset": 18, "opset_max": 20},
        suffix=".xml",
        extras=("onnx", "openvino"),
        modules=("onnx", "onnxscript", "openvino"),
        float_results=("*",),
        pair_sum=128,
    ),
    "executorch-xnnpack": Target(
        name="executorch-xnnpack",
        activation_dtype="int8",
        ops=_XNNPACK,
        dtypes=("float32", "int8"),
        fusions=_CLAMPS,
        decompositions=(*_IDENTITIES, "silu", "silu_", "mean", "adaptive_max_pool2d", "view", "_unsafe_view"),
        alignment=8,
        suffix=".pte",
        extras=(),
        modules=(),
        environment=("torch==2.13.0", "executorch==1.5.1"),
        own_modules=("executorch.exir", "executorch.runtime"),
    ),
    "litert": Target(
        name="litert",
        activation_dtype="int8",
        ops=_LITERT,
        dtypes=("float32", "float16", "int8"),
        fusions=_CLAMPS,
        decompositions=(*_IDENTITIES, "silu", "silu_", "mean", "adaptive_max_pool2d", "view", "_unsafe_view"),
        alignment=8,
        suffix=".tflite",
        extras=(),
        modules=(),
        fixed=_LITERT_FIXED,
        environment=("torch==2.13.0", "litert-torch==0.10.0", "ai-edge-quantizer==0.10.0", "ai-edge-litert==2.3.0"),
        own_modules=("litert_torch", "ai_edge_quantizer", "ai_edge_litert.interpreter"),
    ),
}


def named(name: str) -> Target:
    """The target of that name. Raises UsageError for another name."""
    if name in TARGETS:
        return TARGETS[name]
    msg = f"target must be one of {', '.join(TARGETS)}. Got {name!r}."
    raise UsageError(msg)
