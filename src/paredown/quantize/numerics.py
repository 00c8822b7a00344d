"""The uniform quantizer: q = clamp(round(x / s) + z, qmin, qmax), x̂ = s · (q - z). Pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHT_MIN, WEIGHT_MAX = -127, 127
"""Symmetric int8 weights leave out -128: the range is symmetric and products cannot saturate alone."""


def affine(low: float, high: float, quant_min: int, quant_max: int) -> tuple[float, int]:
    """Scale and zero point of the range [low, high], which is widened to include 0 so that 0 is exact.

    s = (high - low) / (quant_max - quant_min), z = round(quant_min - low / s). An empty range (always 0) gets
    scale 1 / (quant_max - quant_min). Scales are float32 values.

    >>> affine(0.0, 2.55, 0, 255)[1]
    0
    """
    low, high = min(low, 0.0), max(high, 0.0)
    levels = quant_max - quant_min
    width = high - low if high > low else 1.0
    scale = float(torch.tensor(max(width / levels, 1e-30), dtype=torch.float32))
    zero_point = quant_min - round(low / scale)
    return scale, max(quant_min, min(quant_max, zero_point))


def symmetric(weight: Tensor, axis: int, floor: Tensor | None = None) -> Tensor:
    """Scales of symmetric codes, one per index of `axis`: s = max|w| / 127, float32, shape [channels].

    A channel of zeros gets scale 1/127. `floor` (same shape) is the smallest scale allowed: see `bias_floor`.
    """
    largest = weight.detach().abs().float().movedim(axis, 0).reshape(weight.shape[axis], -1).amax(dim=1)
    scales = torch.where(largest > 0, largest, torch.ones_like(largest)) / WEIGHT_MAX
    scales = scales.clamp_min(1e-30)
    return scales if floor is None else torch.maximum(scales, floor)


def bias_floor(bias: Tensor, activation_scale: float) -> Tensor:
    """The smallest weight scale per channel for which the bias, an int32 of scale s_w · s_x, cannot overflow.

    s_w ≥ |b| / (2³⁰ · s_x). Runtimes store the bias like that; with a nearly dead channel it would wrap around.
    """
    return bias.detach().abs().float() / (2.0**30 * activation_scale)


def quantize_codes(
    values: Tensor, scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int
) -> Tensor:
    """Codes of `values`, int32, rounding half to even. `scale` and `zero_point` broadcast against `values`."""
    return (torch.round(values / scale) + zero_point).clamp(quant_min, quant_max).to(torch.int32)


def dequantize_codes(codes: Tensor, scale: Tensor | float, zero_point: Tensor | int) -> Tensor:
    """x̂ = s · (q - z), float32."""
    return (codes - zero_point).to(torch.float32) * scale
