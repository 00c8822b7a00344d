"""Quantization: integer codes for weights and activations, for a runtime's own table of int8 ops."""

from paredown.quantize.nouns import Packed, Quantized
from paredown.quantize.numerics import affine, bias_floor, dequantize_codes, quantize_codes, symmetric
from paredown.quantize.static import SCHEMES, quantize

__all__ = [
    "SCHEMES",
    "Packed",
    "Quantized",
    "affine",
    "bias_floor",
    "dequantize_codes",
    "quantize",
    "quantize_codes",
    "symmetric",
]
