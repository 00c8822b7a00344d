"""geometric_median: how far a filter is from all others of its layer (He et al. 2019, "FPGM", eq. 4).

g(i) = Σ_j ‖w_i - w_j‖₂: what lies near the geometric median can be replaced by the others. Units compare everything that
counts for them (their rows, or with group "all" all that leaves with them); rows and columns of a weight likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paredown.granularity import Granularity
from paredown.score.nouns import Cells, Source, UnitScores, counted
from paredown.score.reduce import left_out

Floats = NDArray[np.float64]
KINDS = ("row", "column")
_ROWS = 64
"""Of a block at least: smaller products are slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometricMedianOptions:
    """No options."""


def geometric_median(source: Source, options: GeometricMedianOptions) -> dict[str, UnitScores]:
    """Σ of Euclidean distances to all other units of the space."""
    del options
    scores = {}
    biases = left_out(source)
    for space in source.coupling.spaces:
        products = np.zeros((len(space), len(space)))
        for f in counted(space, source.weights, source.group, biases):
            weight = source.weights[f.parameter].detach().movedim(f.axis, 0)
            products += _products(weight[torch.from_numpy(f.indices)].reshape(len(space), -1))
        scores[space.name] = _distances(products)
    return scores


def geometric_median_cells(
    source: Source, options: GeometricMedianOptions, granularity: Granularity
) -> dict[str, Cells]:
    """The same for the rows or columns of every weight."""
    del options
    found: dict[str, Cells] = {}
    for name, weight in source.weights.items():
        matrix = weight.detach().reshape(len(weight), -1)
        found[name] = _distances(_products(matrix if granularity.kind == "row" else matrix.T))
    return found


def _products(rows: Tensor) -> Floats:
    """Inner products of all rows, float64. Each pair is multiplied once but for those of a block of rows."""
    wide = rows.double()
    found = torch.empty(len(wide), len(wide), dtype=torch.float64)
    step = max(_ROWS, -(-len(wide) // 8))
    for start in range(0, len(wide), step):
        part = wide[start : start + step] @ wide[start:].T
        found[start : start + step, start:] = part
        found[start:, start : start + step] = part.T
    return np.asarray(found.numpy())


def _distances(products: Floats) -> UnitScores:
    """Σ_j √(‖w_i‖² + ‖w_j‖² - 2 w_i·w_j); below the rounding of the products it is 0. Shape [units]; products are used up."""
    sizes = products.diagonal().copy()
    both = sizes[:, None] + sizes[None, :]
    products *= -2
    products += both
    both *= 64 * np.finfo(np.float64).eps
    products[products <= both] = 0.0
    return np.asarray(np.sqrt(products, out=products).sum(axis=1))
