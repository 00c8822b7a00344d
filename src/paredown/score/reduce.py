"""From element saliency to unit scores, over the footprints of each space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from paredown.couple.space import Space
from paredown.score.nouns import Elements, Group, UnitScores, counted


def unit_sums(
    spaces: Iterable[Space], elements: Elements, weights: Mapping[str, Tensor], group: Group
) -> dict[str, UnitScores]:
    """Σ of element saliency over each unit, by space. Every axis of a parameter is summed once, for all its spaces."""
    along: dict[tuple[str, int], UnitScores] = {}
    scores = {}
    for space in spaces:
        total = np.zeros(len(space), dtype=np.float64)
        for f in counted(space, weights, group):
            key = (f.parameter, f.axis)
            if key not in along:
                along[key] = _along(elements[f.parameter], f.axis)
            total += along[key][f.indices].sum(axis=1)
        scores[space.name] = total
    return scores


def _along(values: Tensor, axis: int) -> UnitScores:
    """Sums over all other axes in float64. Shape [length of axis]."""
    rows = values.detach().movedim(axis, 0).reshape(values.shape[axis], -1)
    return np.ascontiguousarray(rows.sum(dim=1, dtype=torch.float64).numpy())
