"""geometric_median: how far a filter is from all others of its layer (He et al. 2019, "FPGM", eq. 4).

g(i) = Σ_j ‖w_i - w_j‖₂: what lies near the geometric median can be replaced by the others. Units compare everything that
counts for them (their rows, or with group "all" all that leaves with them); rows and columns of a weight likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paredown.granularity import Granularity
from paredown.score.nouns import Cells, Source, UnitScores, counted
from paredown.score.reduce import left_out

KINDS = ("row", "column")


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometricMedianOptions:
    """No options."""


def geometric_median(source: Source, options: GeometricMedianOptions) -> dict[str, UnitScores]:
    """Σ of Euclidean distances to all other units of the space."""
    del options
    scores = {}
    biases = left_out(source)
    for space in source.coupling.spaces:
        products = torch.zeros(len(space), len(space), dtype=torch.float64)
        for f in counted(space, source.weights, source.group, biases):
            weight = source.weights[f.parameter].detach().movedim(f.axis, 0)
            rows = weight[torch.from_numpy(f.indices)].reshape(len(space), -1).double()
            products += rows @ rows.T
        scores[space.name] = _distances(products)
    return scores


def geometric_median_cells(
    source: Source, options: GeometricMedianOptions, granularity: Granularity
) -> dict[str, Cells]:
    """The same for the rows or columns of every weight."""
    del options
    found: dict[str, Cells] = {}
    for name, weight in source.weights.items():
        matrix = weight.detach().reshape(len(weight), -1).double()
        rows = matrix if granularity.kind == "row" else matrix.T
        found[name] = _distances(rows @ rows.T)
    return found


def _distances(products: Tensor) -> UnitScores:
    """Σ_j √(‖w_i‖² + ‖w_j‖² - 2 w_i·w_j); below the rounding of the products it is 0. Shape [units]."""
    sizes = products.diagonal()
    squares = sizes[:, None] + sizes[None, :] - 2 * products
    noise = 64 * torch.finfo(torch.float64).eps * (sizes[:, None] + sizes[None, :])
    distances = torch.where(squares > noise, squares, torch.zeros_like(squares)).sqrt_()
    return np.asarray(distances.sum(dim=1).numpy())
