"""Rounding that gradients pass: what is executed later, rehearsed in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paredown.quantize.numerics import ODD, snap
from paredown.quantize.schemes import Levels


class Rounding(torch.autograd.Function):
    """x̂ and its gradients by hand: autograd's own take three times as long and keep four tensors of x's size.

    ∂x̂/∂s is (x̂ - x) / s inside the range and x̂ / s outside, so Σ grad ∂x̂/∂s = (Σ grad x̂ - Σ_inside grad x) / s.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, levels: Levels, gain: float
    ) -> Tensor:
        """x̂, float32 of the shape of x; scale and zero point broadcast against it."""
        shifted = bool(zero_point.any())
        place = x / scale
        if shifted:
            place += zero_point
        if levels == "integer":
            rounded = place.clamp(low, high)
            inside = rounded == place
            rounded.round_()
        else:
            edge = high + (1.0 if levels in ODD else 0.5)
            inside = place.abs() < edge
            rounded = snap(place, low, high, levels)
        if shifted:
            rounded -= zero_point
        rounded *= scale
        ctx.save_for_backward(x, scale, rounded, inside)
        ctx.gain = gain
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of x and of the scale, the latter times `gain`."""
        x, scale, rounded, inside = ctx.saved_tensors
        passed = grad * inside
        if not ctx.needs_input_grad[1]:
            return passed, None, None, None, None, None, None
        if scale.dim():
            shared = [axis for axis, length in enumerate(scale.shape) if length == 1]
            pull = (grad * rounded - passed * x).sum(shared, keepdim=True)
        else:
            pull = _product(grad, rounded) - _product(passed, x)
        return passed, pull / scale * ctx.gain, None, None, None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Σ a b, in one pass where both lie in memory alike."""
    order = sorted(range(b.dim()), key=b.stride, reverse=True)
    return torch.dot(a.permute(order).reshape(-1), b.permute(order).reshape(-1))
