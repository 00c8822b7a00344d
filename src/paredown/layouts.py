"""Where the layout of a tensor decides whether torch's own kernels are right, and pruning leads there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_LANES = 8
"""Of the kernel that is at fault, on AVX2; on as many channels and more its gradients are right."""


def guard_layouts(module: nn.Module) -> list[RemovableHandle]:
    """Keep strided 1×1 convolutions of 2 to 7 input channels out of channels_last; their hooks.

    The gradient of their input, with oneDNN as in torch 2.13 on processors with AVX2, is written beyond its end: the process
    dies, now or later. Pruning makes such layers of any ResNet's shortcuts. Inputs and weights are made contiguous, which changes
    their layout and no value. What `forward` calls as a function is not seen.

    >>> len(guard_layouts(nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.Conv2d(8, 8, 1, 2), nn.Conv2d(4, 8, 1))))
    1
    """
    found = [m for m in module.modules() if isinstance(m, nn.Conv2d) and _is_at_risk(m)]
    for weight in (p for conv in found for p in conv.parameters() if p.dim() == 4 and p.device.type == "cpu"):
        with torch.no_grad():  # .contiguous() leaves the strides of axes of length 1 as they are, and those decide
            weight.data = torch.empty(weight.shape, dtype=weight.dtype).copy_(weight)
    return [conv.register_forward_pre_hook(_contiguous) for conv in found]


@contextmanager
def guarded_layouts(module: nn.Module) -> Iterator[None]:
    """The same for as long as it lasts."""
    hooks = guard_layouts(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_at_risk(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (1, 1) and max(conv.stride) > 1 and conv.groups == 1 and 1 < conv.in_channels < _LANES
    )  # fmt: skip


def _contiguous(_conv: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.contiguous() if isinstance(v, Tensor) and v.device.type == "cpu" else v for v in inputs)
