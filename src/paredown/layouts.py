"""Where the layout of a tensor decides whether torch's own kernels are right, and pruning leads there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LANES = 8
"""Of the kernel that is at fault, on AVX2; on as many channels and more its gradients are right."""


def guarded_layouts(module: nn.Module) -> AbstractContextManager[object]:
    """Strided 1×1 convolutions of 2 to 7 input channels stay out of channels_last for as long as it lasts.

    The gradient of their input, with oneDNN as in torch 2.13 on processors with AVX2, is written beyond its end: the process
    dies, now or later. Pruning makes such layers of any ResNet's shortcuts. Inputs and weights are made contiguous, which changes
    their layout and no value. Nothing is watched where no parameter has such a shape.

    >>> with guarded_layouts(nn.Conv2d(4, 8, 1, 2)) as guard:
    ...     type(guard).__name__
    '_Guard'
    """
    return _Guard() if any(_is_narrow(p) for p in module.parameters()) else nullcontext()


def _is_narrow(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.shape[2:] == (1, 1) and 1 < weight.shape[1] < _LANES


class _Guard(TorchFunctionMode):
    """Sees modules, functions and the ops of captured graphs alike."""

    _CONVOLUTIONS = frozenset({torch.conv2d, torch.ops.aten.conv2d.default, torch.ops.aten.conv2d})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._CONVOLUTIONS:
            given = dict(zip(("input", "weight", "bias", "stride"), args, strict=False)) | kwargs
            if _is_at_risk(given["input"], given["weight"], given.get("stride", 1)):
                weight = given["weight"]
                kwargs.update(
                    input=given["input"].contiguous(), weight=weight.flatten(1).contiguous().reshape(weight.shape)
                )
                kwargs.update({name: given[name] for name in ("bias", "stride") if name in given})
                kwargs.update(zip(("padding", "dilation", "groups"), args[4:], strict=False))
                args = ()
        return func(*args, **kwargs)


def _is_at_risk(x: Tensor, weight: Tensor, stride: Any) -> bool:
    """`x` alone tells nothing: weights in channels_last take the input with them."""
    strided = max(stride) > 1 if isinstance(stride, list | tuple) else stride > 1
    return strided and x.device.type == "cpu" and x.dim() == 4 and _is_narrow(weight)
