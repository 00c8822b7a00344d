"""Pairs of neighbouring weights: on x86 without VNNI the products of two neighbours are summed in 16 bits, which saturate.

The instruction (vpmaddubsw) adds a0·w0 + a1·w1 for uint8 a and int8 w. 255 · 128 = 32,640 fits and 255 · 129 = 32,895 does not,
so that w0 + w1 within ±128 is exact whatever the activations are. NNCF's answer to this is weights of 7 bits, everywhere or in first layers; a
scale that is a little wider where two large weights are neighbours gives the same certainty and costs less.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pair_sums(weight: Tensor) -> Tensor:
    """The largest |w0 + w1| of two neighbours in each output. Shape [out], the dtype of `weight` (int32 for integers).

    weight [out, in] or [out, in, *kernel]. Neighbours are what kernels may put side by side: inputs 2i and 2i + 1 at one place of the
    kernel, the two at 2i and 2i + 1 of the row with places first (im2col of channels last) and, but for pictures, with inputs first.

    >>> pair_sums(torch.tensor([[100, 27, -90, -60]], dtype=torch.int8)).tolist()
    [150]
    """
    held = weight if weight.is_floating_point() else weight.to(torch.int32)
    by_place = held.reshape(held.shape[0], held.shape[1], -1).transpose(1, 2)
    found = torch.maximum(_largest(by_place), _largest(by_place.flatten(1)))
    return found if held.dim() in (2, 4) else torch.maximum(found, _largest(held.flatten(1)))


def _largest(rows: Tensor) -> Tensor:
    even = torch.nn.functional.pad(rows, (0, rows.shape[-1] % 2))
    sums: Tensor = even.reshape(*even.shape[:-1], -1, 2).sum(-1)
    return sums.abs().flatten(1).amax(1)


def pair_floor(weight: Tensor, pair_sum: int) -> Tensor:
    """The smallest scales by which no two neighbours' codes add up to more than `pair_sum`. Shape [out], float32.

    Rounding adds up to a half to each, so the sum before it is at most pair_sum - 1.
    """
    return pair_sums(weight.detach().float()) / (pair_sum - 1)
