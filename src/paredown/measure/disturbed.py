"""Disturbed inputs: noise, blur and contrast in three strengths each, the same for every file that is compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

STRENGTHS: dict[str, tuple[float, float, float]] = {
    "noise": (0.1, 0.2, 0.4),
    "blur": (0.5, 1.0, 2.0),
    "contrast": (0.75, 0.5, 0.25),
}
"""noise: Gaussian, of this share of the inputs' standard deviation. blur: Gaussian, of this σ in pixels. contrast: each picture's
distances from its own mean times this."""


def disturbances() -> Iterator[tuple[str, float]]:
    """All kinds and strengths, weak ones first."""
    for kind, strengths in STRENGTHS.items():
        yield from ((kind, s) for s in strengths)


def is_pictures(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is of one floating tensor [N, C, H, W] with more than one pixel.

    >>> is_pictures((torch.zeros(1, 3, 8, 8),), {}), is_pictures((torch.zeros(1, 16),), {})
    (True, False)
    """
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        return False
    return args[0].is_floating_point() and args[0].dim() == 4 and args[0].shape[2] * args[0].shape[3] > 1


def disturbed(predict: Callable[..., Any], kind: str, strength: float, spread: float, seed: int) -> Callable[..., Any]:
    """`predict` with inputs that are disturbed first. `spread` is the standard deviation that noise is a share of; call number k
    draws from a generator of its own, so that every file meets the same noise.

    >>> same = disturbed(lambda x: x, "contrast", 1.0, 1.0, 0)
    >>> same(torch.ones(1, 1, 2, 2)).tolist()
    [[[[1.0, 1.0], [1.0, 1.0]]]]
    """
    calls = 0

    def called(x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        if kind == "noise":
            generator = torch.Generator().manual_seed(1_000_003 * seed + calls)
            return predict(x + strength * spread * torch.randn(x.shape, generator=generator))
        if kind == "blur":
            return predict(_blurred(x, strength))
        mean = x.mean((1, 2, 3), keepdim=True)
        return predict(mean + strength * (x - mean))

    return called


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """A separable Gaussian, of three σ to each side; the border is repeated."""
    reach = max(1, math.ceil(3 * sigma))
    at = torch.arange(-reach, reach + 1, dtype=x.dtype)
    weights = torch.exp(-0.5 * (at / sigma) ** 2)
    weights = weights / weights.sum()
    channels = x.shape[1]
    x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    x = F.conv2d(x, weights.reshape(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
    return F.conv2d(x, weights.reshape(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
