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
    """aten op name (no overload) → "weighted" | "binary" | "lookup" | "shared" | "matmul"; an op not named stays float."""
    dtypes: tuple[str, ...]
    fusions: tuple[str, ...]
    """Activations that the runtime fuses into the op before it: quantize after them."""
    decompositions: tuple[str, ...]
    """aten ops rewritten before annotation because the runtime has no int8 kernel for the whole."""
    alignment: int
    """Channels are rounded to a multiple of this."""
    limits: Mapping[str, int] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()


TARGETS: Mapping[str, Target] = {
    "onnxruntime-x86": Target(
        name="onnxruntime-x86",
        activation_dtype="uint8",
        ops={},
        dtypes=("float32", "uint8", "int8"),
        fusions=("relu", "relu_", "hardtanh", "hardtanh_"),
        decompositions=("hardswish", "hardswish_", "silu", "silu_"),
        alignment=8,
        limits={"opset": 18},
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
