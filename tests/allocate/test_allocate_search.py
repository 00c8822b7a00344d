"""Counts that hit a budget: one ratio stays one, as far as steps of alignment and of kernels allow."""

from __future__ import annotations

import numpy as np
import pytest

from paredown.allocate.search import TOLERANCE, uniform

EIGHTS = np.arange(8, 65, 8)


def sixteens(counts: np.ndarray) -> np.ndarray:
    """Milliseconds of three layers, nearly alike, whose kernels take sixteen channels at once, beside others that stay."""
    return 150 + (np.ceil(counts / 16) * [9.2, 9.0, 9.4] + 0.02 * counts).sum(-1)


@pytest.mark.parametrize("width", range(8, 56, 8))
def test_layers_alike_stay_within_one_step_of_alignment(width: int) -> None:
    """Where a whole step of all three is too much, single ones are given more, not one much and another little."""
    dense = float(sixteens(np.array([64, 64, 64])))
    limit = float(sixteens(np.full(3, width))) + 7  # a few milliseconds above what one ratio takes
    found = uniform([EIGHTS] * 3, np.array([64, 64, 64]), lambda c: (sixteens(c) - limit) / dense)
    assert abs(found.gap) <= TOLERANCE
    assert max(found.counts) - min(found.counts) <= 8, found.counts


def test_what_neighbours_of_the_ratio_cannot_reach_other_counts_do() -> None:
    """Two counts alone per space: the budget lies between what their corners give."""
    allowed = [np.array([10, 100]), np.array([1, 50, 60, 100])]
    found = uniform(allowed, np.array([100, 100]), lambda c: (c.sum(-1) - 70) / 200)
    assert found.counts.tolist() == [10, 60] and found.gap == 0
