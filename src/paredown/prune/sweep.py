"""The sweep of OBS over the columns of a weight: who leaves, and how the others of the row answer. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.statistics.curvature import upper

_DEAD = 1e-30
"""Factor on the saliency of weights whose input was never seen: they leave first, the smaller ones before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What a sweep leaves. Shapes [groups, rows, K]."""

    weight: Tensor
    kept: Tensor
    before: float
    """Σ of squared output errors per position with the mask alone."""
    after: float
    """The same with the update."""


def swept(
    weight: Tensor,
    gram: Tensor,
    *,
    removed: int | None = None,
    pattern: tuple[int, int] | None = None,
    inputs: int = 0,
    kept: Tensor | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> Swept:
    """SparseGPT (Frantar & Alistarh 2023, algorithm 1) on a weight [groups, rows, K] with mean x xᵀ [groups, K, K].

    Columns go from left to right; what is removed from one is answered by all columns to its right:
    err = w_j / U_jj, W[:, j:] -= err U[j, j:]. One of three rules says who leaves: exactly `removed` weights, chosen in
    every block of columns as the smallest w² / U_jj² over all its rows; the `pattern` (n, m): n of every m consecutive of
    the `inputs` at one tap stay, chosen by the weights as updated so far; or a mask `kept`. Blocks are lazy: columns behind a
    block are updated once, with one product, which is the same. float64.

    Where we differ: exactly as many leave as asked (the authors' threshold overshoots at ties), and weights of dead
    inputs leave first but are not set to zero otherwise.
    """
    order = _order(weight.shape[2], inputs) if pattern else torch.arange(weight.shape[2])
    work = weight.double()[..., order].clone()
    held = gram[:, order][:, :, order]
    factor = torch.stack([upper(one, damping) for one in held])
    dead = held.diagonal(dim1=1, dim2=2) == 0
    stays = torch.ones_like(work, dtype=torch.bool) if kept is None else kept[..., order].clone()
    for start, stop in _blocks(work.shape[2], block, pattern, inputs):
        part, small = work[..., start:stop], factor[:, start:stop, start:stop]
        if removed is not None:
            share = _so_far(removed, stop, work.shape[2]) - _so_far(removed, start, work.shape[2])
            stays[..., start:stop] = _smallest_leave(_saliency(part, small, dead[:, start:stop]), share)
        errors = torch.empty_like(part)
        for j in range(stop - start):
            if pattern is not None and _opens(start + j, pattern[1], inputs):
                width = _width(start + j, pattern[1], inputs)
                here = slice(j, j + width)
                gone = _saliency(part[..., here], small[:, here, here], dead[:, start:stop][:, here])
                stays[..., start + j : start + j + width] = _largest_stay(gone, pattern[0])
            settled = torch.where(stays[..., start + j], part[..., j], 0.0)
            error = (part[..., j] - settled) / small[:, j, j, None]
            part[..., j:] -= error[..., None] * small[:, None, j, j:]
            part[..., j] = settled
            errors[..., j] = error
        work[..., stop:] -= errors @ factor[:, start:stop, stop:]
    back = torch.argsort(order)
    found, stays = work[..., back], stays[..., back]
    dense = weight.double()
    return Swept(
        weight=found,
        kept=stays,
        before=_energy(dense.masked_fill(stays, 0.0), gram),
        after=_energy(dense - found, gram),
    )


def _order(length: int, inputs: int) -> Tensor:
    """Columns [in · taps] with the inputs of one tap side by side."""
    return torch.arange(length).reshape(inputs, -1).T.reshape(-1)


def _blocks(length: int, block: int, pattern: tuple[int, int] | None, inputs: int) -> Iterator[tuple[int, int]]:
    """Blocks of columns; with a pattern none is cut through."""
    start = 0
    while start < length:
        stop = min(start + block, length)
        while pattern is not None and stop < length and not _opens(stop, pattern[1], inputs):
            stop += 1
        yield start, stop
        start = stop


def _opens(column: int, m: int, inputs: int) -> bool:
    """Whether a group of m inputs begins here; the last of a tap may be shorter."""
    return column % inputs % m == 0


def _width(column: int, m: int, inputs: int) -> int:
    return min(m, inputs - column % inputs)


def _so_far(removed: int, columns: int, length: int) -> int:
    """Weights that have left after so many columns: their share, in whole numbers that sum up."""
    return removed * columns // length


def _saliency(part: Tensor, factor: Tensor, dead: Tensor) -> Tensor:
    """w² / U_jj². Shape [groups, rows, columns]."""
    found = part.square() / factor.diagonal(dim1=1, dim2=2).square()[:, None, :]
    return torch.where(dead[:, None, :], found * _DEAD, found)


def _smallest_leave(saliency: Tensor, count: int) -> Tensor:
    stays = torch.ones(saliency.numel(), dtype=torch.bool)
    stays[torch.argsort(saliency.reshape(-1), stable=True)[:count]] = False
    return stays.reshape(saliency.shape)


def _largest_stay(saliency: Tensor, count: int) -> Tensor:
    """The `count` highest of the last axis; of equal ones the later stays."""
    stays = torch.zeros_like(saliency, dtype=torch.bool)
    order = torch.argsort(saliency, dim=-1, stable=True)
    return stays.scatter_(-1, order[..., -count:], True)


def _energy(change: Tensor, gram: Tensor) -> float:
    """Σ over rows of d H dᵀ: the mean squared change of the outputs, summed over outputs."""
    return float(((change @ gram) * change).sum())
