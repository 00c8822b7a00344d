"""Weights that are zero before anything is quantized: channels and layers that compute nothing, told and, in training, mended."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paredown.errors import RejectedError
from paredown.quantize.decompose import fetch
from paredown.quantize.numerics import observes_weight
from paredown.quantize.static import Calibrated

NEARLY = 0.99
"""Share of zeros from which a layer is one of (nearly) all zeros."""
_NAMES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Zeros:
    """The zeros of one weight."""

    parameter: str
    channels: Tensor
    """bool [channels]: which of them have no weight but 0, as after a batch norm with a scale of 0."""
    share: float
    """Of all its weights."""

    @property
    def whole(self) -> bool:
        """Whether no weight is other than 0."""
        return bool(self.channels.all())


def zeros_of(base: Calibrated) -> Iterator[Zeros]:
    """The weights that will be codes and have a channel of zeros, or are nearly all zeros; before any rounding."""
    for node in base.prepared.graph.nodes:
        observer: Any = fetch(base.prepared, str(node.target)) if node.op == "call_module" else None
        if observer is None or not observes_weight(observer) or getattr(node.args[0], "op", "") != "get_attr":
            continue
        held = str(node.args[0].target)
        weight = base.floats.get(held, fetch(base.prepared, held)).detach()
        channels = zero_channels(weight, int(observer.ch_axis))
        share = float((weight == 0).double().mean())
        if bool(channels.any()) or share >= NEARLY:
            yield Zeros(parameter=base.parameter_of(node), channels=channels, share=share)


def zero_channels(weight: Tensor, axis: int) -> Tensor:
    """Which channels along an axis have no weight but 0. bool [channels].

    >>> zero_channels(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), 0).tolist()
    [True, False]
    """
    return (weight.detach().movedim(axis, 0).flatten(1) == 0).all(1)


def told(base: Calibrated, masked: Collection[str] = ()) -> Iterator[str]:
    """What is zero, one sentence for each kind of it; not what a mask holds there."""
    found = [z for z in zeros_of(base) if z.parameter not in masked]
    whole = [z.parameter for z in found if z.whole]
    if whole:
        yield f"zeros: all weights of {_some(whole)} are 0: its output does not depend on its input"
    nearly = [f"{z.parameter} ({z.share:.1%})" for z in found if z.share >= NEARLY and not z.whole]
    if nearly:
        yield f"zeros: nearly all weights of {_some(nearly)} are 0"
    dead = [z for z in found if bool(z.channels.any()) and not z.whole]
    if dead:
        count = sum(int(z.channels.sum()) for z in dead)
        yield f"zeros: {count} channels of {_some([z.parameter for z in dead])} have no weight but 0, as after a batch norm with a scale of 0"


def refuse_zeros(base: Calibrated) -> None:
    """Before a training with rounding: a layer without any weight has no range that its weights or its output could be learnt in.

    Raises RejectedError.
    """
    whole = [z.parameter for z in zeros_of(base) if z.whole]
    if whole:
        msg = (
            f"layers must have weights other than 0 to be trained with rounding. Got only 0 in {_some(whole)}: neither they nor their outputs have a "
            "range to learn in. Train the network in float first, leave them in float (float_layers), or prune them."
        )
        raise RejectedError(msg)


def usable_steps(scales: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Steps to start a training from: a channel of zeros has the median of the others', for its own says nothing of its weights.

    >>> usable_steps(torch.tensor([1.0, 0.5, 0.5]), torch.tensor([[0.0], [1.0], [2.0]]), 0).tolist()
    [0.5, 0.5, 0.5]
    """
    zero = zero_channels(weight, axis)
    if scales.dim() == 0 or not bool(zero.any()) or bool(zero.all()):
        return scales
    return torch.where(zero, scales[~zero].median(), scales)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")


__all__ = ["NEARLY", "Zeros", "refuse_zeros", "told", "usable_steps", "zero_channels", "zeros_of"]
