"""Pairs of neighbouring weights: on x86 without VNNI the products of two neighbours are summed in 16 bits, which saturate.

The instruction (vpmaddubsw) adds a0·w0 + a1·w1 for uint8 a and int8 w. 255 · 128 = 32,640 fits and 255 · 129 = 32,895 does not,
so that w0 + w1 within ±128 is exact whatever the activations are. NNCF's answer to this is weights of 7 bits, everywhere or in first layers; a
scale that is a little wider where two large weights are neighbours gives the same certainty and costs less.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


@functools.lru_cache(maxsize=256)
def neighbours(shape: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """What kernels may put side by side in a weight's row [in, *kernel], as pairs of places in the row laid flat.

    Inputs 2i and 2i + 1 at one place of the kernel; the two at 2i and 2i + 1 of the row with places first (im2col of channels
    last); and, but for pictures, of the row as it is. A kernel of three axes is also one of two whose frames are channels (export/onnx_kernels.py).

    >>> [(a.tolist(), b.tolist()) for a, b in neighbours((4,))]
    [([0, 2], [1, 3])]
    """
    inputs, taps = shape[0], math.prod(shape[1:])
    by_tap = torch.arange(inputs * taps).reshape(inputs, taps).T  # [taps, inputs]
    even = inputs - inputs % 2
    orders = [(by_tap[:, 0:even:2].flatten(), by_tap[:, 1:even:2].flatten())]
    rows = [by_tap.flatten()] if inputs % 2 and taps > 1 else []
    rows += [torch.arange(inputs * taps)] if len(shape) not in (1, 3) else []
    orders += [(row[: len(row) - len(row) % 2 : 2], row[1::2]) for row in rows]
    if len(shape) == 4 and inputs % 2:
        flat = torch.arange(inputs * taps).reshape(shape).transpose(0, 1).flatten()
        orders += [(flat[a], flat[b]) for a, b in neighbours((inputs * shape[1], *shape[2:]))]
    return tuple(pair for pair in orders if len(pair[0]))


def pair_sums(weight: Tensor) -> Tensor:
    """The largest |w0 + w1| of two neighbours in each output; 0 without any. Shape [out], the dtype of `weight` (int32 for integers).

    weight [out, in] or [out, in, *kernel].

    >>> pair_sums(torch.tensor([[100, 27, -90, -60]], dtype=torch.int8)).tolist()
    [150]
    """
    rows = (weight if weight.is_floating_point() else weight.to(torch.int32)).flatten(1)
    found = torch.zeros(len(rows), dtype=rows.dtype)
    for a, b in neighbours(tuple(weight.shape[1:])):
        found = torch.maximum(found, (rows[:, a] + rows[:, b]).abs().amax(1))
    return found


def pair_floor(weight: Tensor, pair_sum: int) -> Tensor:
    """The smallest scales by which no two neighbours' codes add up to more than `pair_sum`. Shape [out], float32.

    Rounding adds up to a half to each, so the sum before it is at most pair_sum - 1.
    """
    return pair_sums(weight.detach().float()) / (pair_sum - 1)


def within(codes: Tensor, shape: Sequence[int], pair_sum: int) -> Tensor:
    """Codes [out, K] of a weight with rows of `shape` [in, *kernel], of which no two neighbours add up to more than `pair_sum`.

    Of two that do, the larger gives way; the others stay as they are.

    >>> within(torch.tensor([[100.0, 60.0, -5.0, 7.0]]), (4,), 128)
    tensor([[68., 60., -5.,  7.]])
    """
    held, changed = codes.clone(), True
    while changed:  # every round makes codes smaller
        changed = False
        for a, b in neighbours(tuple(shape)):
            left, right = held[:, a], held[:, b]
            beyond = left + right - (left + right).clamp(-pair_sum, pair_sum)
            if bool((beyond != 0).any()):
                first = left.abs() >= right.abs()
                held[:, a], held[:, b] = left - beyond * first, right - beyond * ~first
                changed = True
    return held
