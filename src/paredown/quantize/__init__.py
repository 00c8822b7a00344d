"""Quantization: integer codes for weights and activations, for a runtime's own table of int8 ops."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paredown.quantize.nouns import Coverage, Packed, Quantized
from paredown.quantize.numerics import affine, bias_floor, dequantize_codes, quantize_codes, symmetric
from paredown.quantize.schemes import SCHEMES, Scheme
from paredown.quantize.static import quantize, require_torchao

if TYPE_CHECKING:
    from paredown.quantize.culprits import Culprit, Spared, spare
    from paredown.quantize.mixed import Allotment, allot
    from paredown.quantize.qat import train_quantized

__all__ = [
    "SCHEMES",
    "Allotment",
    "Coverage",
    "Culprit",
    "Packed",
    "Quantized",
    "Scheme",
    "Spared",
    "affine",
    "allot",
    "bias_floor",
    "dequantize_codes",
    "quantize",
    "quantize_codes",
    "spare",
    "symmetric",
    "train_quantized",
]
_LATER = {
    "Allotment": "mixed",
    "allot": "mixed",
    "Culprit": "culprits",
    "Spared": "culprits",
    "spare": "culprits",
    "train_quantized": "qat",
}
"""These import torchao, which is slow and may be missing."""


def __getattr__(name: str) -> Any:
    """Load what needs torchao when it is first used (PEP 562)."""
    if name not in _LATER:
        msg = f"module 'paredown.quantize' has no attribute {name!r}"
        raise AttributeError(msg)
    require_torchao()
    return getattr(import_module(f"paredown.quantize.{_LATER[name]}"), name)
