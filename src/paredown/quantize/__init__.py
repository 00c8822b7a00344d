"""Quantization: integer codes for weights and activations, for a runtime's own table of int8 ops."""

from paredown.quantize.nouns import Packed, Quantized
from paredown.quantize.numerics import affine, bias_floor, dequantize_codes, quantize_codes, symmetric
from paredown.quantize.schemes import SCHEMES, Scheme
from paredown.quantize.static import quantize

__all__ = [
    "SCHEMES",
    "Packed",
    "Quantized",
    "Scheme",
    "affine",
    "bias_floor",
    "dequantize_codes",
    "quantize",
    "quantize_codes",
    "symmetric",
]
