"""The uniform quantizer: q = clamp(round(x / s) + z, qmin, qmax), x̂ = s · (q - z). Pure functions on tensors."""

from __future__ import annotations

from typing import Any

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


def symmetric(
    weight: Tensor, axis: int, floor: Tensor | None = None, *, quant_min: int = WEIGHT_MIN, quant_max: int = WEIGHT_MAX
) -> Tensor:
    """Scales of symmetric codes, one per index of `axis`, that hold every weight; float32, shape [channels].

    s = max(max w / quant_max, min w / quant_min), which is max|w| / 127 for eight bits. A channel of zeros gets
    1 / quant_max. `floor` (same shape) is the smallest scale allowed: see `bias_floor`.
    """
    rows = weight.detach().float().movedim(axis, 0).reshape(weight.shape[axis], -1)
    largest = torch.maximum(rows.amax(dim=1) / quant_max, rows.amin(dim=1) / quant_min)
    scales = torch.where(largest > 0, largest, torch.full_like(largest, 1.0 / quant_max)).clamp_min(1e-30)
    return scales if floor is None else torch.maximum(scales, floor)


def symmetric_of_least_error(
    weight: Tensor, axis: int, floor: Tensor | None = None, *, quant_min: int, quant_max: int, steps: int = 61
) -> Tensor:
    """Scales of least Σ (w - s·q)² per index of `axis`, among 1.0 to 0.4 of those of `symmetric`; float32, shape [channels].

    Few levels want a scale that cuts the largest weights off; with eight bits it hardly differs.
    """
    rows = weight.detach().float().movedim(axis, 0).reshape(weight.shape[axis], -1)
    whole = symmetric(weight, axis, quant_min=quant_min, quant_max=quant_max)
    best, least = whole.clone(), torch.full_like(whole, torch.inf)
    for ratio in torch.linspace(1.0, 0.4, steps).tolist():
        scales = whole * ratio if floor is None else torch.maximum(whole * ratio, floor)
        codes = torch.round(rows / scales[:, None]).clamp(quant_min, quant_max)
        errors = (rows - codes * scales[:, None]).square().sum(dim=1)
        better = errors < least
        best, least = torch.where(better, scales, best), torch.where(better, errors, least)
    return best


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


def fake_quantize(values: Tensor, observer: Any) -> Tensor:
    """x̂ of `values` by the parameters that an observer has found, per tensor or along its `ch_axis`; float32."""
    scale, zero_point = observer.calculate_qparams()
    axis = getattr(observer, "ch_axis", None)
    if axis is not None and scale.dim():
        shape = [1] * values.dim()
        shape[axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    codes = quantize_codes(values, scale, zero_point, observer.quant_min, observer.quant_max)
    return dequantize_codes(codes, scale, zero_point)
