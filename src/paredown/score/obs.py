"""obs: what the best answer to a weight's removal still costs its layer (Hassibi & Stork 1993, "OBS", eq. 5).

With H = mean x xᵀ of the layer's inputs (damped) the least increase of mean ‖Δy‖² when w_ij goes and the rest of its row
answers is w_ij² / [H⁻¹]_jj. Blocks, kernels, rows and columns leave as a whole: tr(W_B ([H⁻¹]_BB)⁻¹ W_Bᵀ). With
diagonal="conditioned" it is SparseGPT's w² / U_jj², U the upper Cholesky factor of H⁻¹: [H⁻¹]_jj given that all columns
before j are settled (Frantar & Alistarh 2023), which depends on the order of columns. The update of the weights that
belongs to it is `paredown.prune.obs`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from paredown.errors import UsageError
from paredown.granularity import Granularity
from paredown.score.nouns import Cells, Computed, Elements, Source
from paredown.score.wanda import read_along_one_axis
from paredown.statistics.curvature import Curvature, inverse_diagonal, inverse_diagonal_of_rows, upper
from paredown.statistics.inputs import InputStatistics, input_statistics

KINDS = ("row", "column", "kernel", "block")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObsOptions:
    """How the curvature is used."""

    diagonal: Literal["inverse", "conditioned"] = "inverse"
    damping: float = 0.01
    """Added to the diagonal of H, as a share of its mean."""
    positions_per_sample: int | None = 64
    """Patches of a convolution that are looked at in each sample, at most; None looks at all."""

    def __post_init__(self) -> None:
        if self.diagonal not in ("inverse", "conditioned"):
            msg = f"diagonal must be 'inverse' or 'conditioned'. Got {self.diagonal!r}."
            raise UsageError(msg)
        if not (isinstance(self.damping, int | float) and math.isfinite(self.damping) and self.damping >= 0):
            msg = f"damping must be a finite number ≥ 0. Got {self.damping!r}."
            raise UsageError(msg)
        most = self.positions_per_sample
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            msg = f"positions_per_sample must be an integer ≥ 1, or None for all. Got {most!r}."
            raise UsageError(msg)


def obs(source: Source, options: ObsOptions) -> Iterator[Elements]:
    """Element saliency w² / [H⁻¹]_jj; w² where inputs cannot be seen."""
    seen = _seen(source, options, rows=options.diagonal == "inverse")
    weights = source.weights
    divisors = {}
    for name in list(seen):
        statistics = seen.pop(name)
        kept = _diagonal(statistics, options)
        kept.masked_fill_(
            statistics.squared_norms == 0, math.inf
        )  # an input that is always 0: its weights cost nothing
        shape = tuple(weights[name].shape)
        # A Gram matrix is the largest thing here: none is held longer than its inverse is worked out.
        divisors[name] = (dataclasses.replace(statistics, gram=None, rows=None), kept, shape)

    def saliency(name: str) -> Tensor:
        squares = weights[name].square()
        if name not in divisors:
            return squares
        statistics, kept, shape = divisors[name]
        return squares / statistics.along(kept, shape).to(squares.dtype)

    yield Computed(weights, saliency)


def obs_cells(source: Source, options: ObsOptions, granularity: Granularity) -> dict[str, Cells]:
    """Cells that leave as a whole: tr(W_B ([H⁻¹]_BB)⁻¹ W_Bᵀ) per weight of the cell, B its columns."""
    if options.diagonal == "conditioned":
        msg = (
            "diagonal must be 'inverse' with cells that leave as a whole: what is conditioned is one weight's column on those "
            f"before it. Got 'conditioned' with granularity {granularity}. Leave it out, or use element or N:M."
        )
        raise UsageError(msg)
    seen = _seen(source, options, rows=True)
    found: dict[str, Cells] = {}
    unseen: list[str] = []
    for name, stored in source.weights.items():
        statistics = seen.pop(name, None)
        flipped = statistics is not None and statistics.flipped
        if statistics is not None and flipped and granularity.kind == "kernel":
            found[name] = _flipped_kernels(stored.detach().double(), statistics, granularity, options)
            continue
        inputs = None if statistics is None else _held(statistics)
        if statistics is None or inputs is None or (flipped and len(inputs) > 1):
            found[name] = granularity.reduce(stored.detach().double().square().numpy(), "mean")
            unseen += [] if statistics is None else [name]  # those without statistics are named already
            continue
        weight = stored.T if flipped else stored  # [in, out] here only for square blocks, which turn with the matrix
        shape = tuple(weight.shape)
        grid, sizes = granularity.grid(shape), granularity.cell_sizes(shape)
        groups = len(inputs)
        matrix = weight.detach().double().reshape(groups, shape[0] // groups, -1)
        matrix = matrix * (statistics.squared_norms > 0)[:, None, :]
        per_row = torch.cat([_blocks(matrix[g], inputs[g], granularity, shape, options) for g in range(groups)])
        cells = _over_rows(per_row.numpy(), granularity, grid).reshape(grid) / sizes.reshape(grid)
        found[name] = np.ascontiguousarray(cells.T) if flipped else cells
    if unseen:
        warnings.warn(f"obs takes w² where outputs stored along axis 1 have inputs of their own: {', '.join(unseen)}.", UserWarning, stacklevel=4)  # fmt: skip
    return found


def _flipped_kernels(
    weight: Tensor, statistics: InputStatistics, granularity: Granularity, options: ObsOptions
) -> Cells:
    """Kernels of a weight stored [in, out, …]: all taps of one see the same input, so each answers as a weight alone does."""
    kept = _diagonal(statistics, options).masked_fill(statistics.squared_norms == 0, math.inf)
    saliency = weight.square() / statistics.along(kept, tuple(weight.shape))
    return granularity.reduce(saliency.numpy(), "mean")


def _seen(source: Source, options: ObsOptions, *, rows: bool) -> dict[str, InputStatistics]:
    names = read_along_one_axis(source, "obs")
    return input_statistics(
        source.program,
        names,
        source.batches or (),
        loss=source.loss,
        num_batches=source.num_batches,
        module=source.module,
        positions_per_sample=options.positions_per_sample,
        rows=rows,
    )


def _diagonal(statistics: InputStatistics, options: ObsOptions) -> Tensor:
    """What w² is divided by. Shape [groups, K], float64."""
    if statistics.rows is not None:
        return torch.stack([inverse_diagonal_of_rows(one, options.damping) for one in statistics.rows])
    assert statistics.gram is not None
    parts = []
    for one in statistics.gram:
        if options.diagonal == "inverse":
            parts.append(inverse_diagonal(one, options.damping))
        else:
            parts.append(upper(one, options.damping).diagonal().square())
    return torch.stack(parts)


def _held(statistics: InputStatistics) -> list[Curvature] | None:
    """What is known of each group's inputs: rows where those are fewer than the inputs, else the Gram matrix."""
    if statistics.rows is not None:
        return [Curvature(rows=one) for one in statistics.rows]
    return None if statistics.gram is None else [Curvature(gram=one) for one in statistics.gram]


def _blocks(
    matrix: Tensor, inputs: Curvature, granularity: Granularity, shape: tuple[int, ...], options: ObsOptions
) -> Tensor:
    """tr of each row over consecutive blocks of columns. Shape [rows, blocks]."""
    if granularity.kind == "row":  # [H⁻¹]⁻¹ is H: nothing is left that could answer
        return inputs.quadratic(matrix, options.damping)[:, None]
    width = {"column": 1, "kernel": math.prod(shape[2:]), "block": granularity.b}[granularity.kind]
    costs, start = [], 0
    for held in inputs.inverse_blocks(width, options.damping):
        blocks, size, _ = held.shape
        parts = matrix[:, start : start + blocks * size].reshape(len(matrix), blocks, size).permute(1, 2, 0)
        costs.append((parts * torch.linalg.solve(held, parts)).sum(dim=1).T)
        start += blocks * size
    return torch.cat(costs, dim=1)


def _over_rows(per_row: np.ndarray, granularity: Granularity, grid: tuple[int, ...]) -> np.ndarray:
    if granularity.kind == "column":
        return np.asarray(per_row.sum(axis=0))
    if granularity.kind == "block":
        return np.asarray(np.add.reduceat(per_row, np.arange(grid[0]) * granularity.a, axis=0))
    return per_row
