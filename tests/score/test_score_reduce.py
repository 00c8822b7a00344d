"""Shares of what is larger (LAMP) against a sum for each score; the diagonal that obs divides by against an inverse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paredown.couple import couple
from paredown.program import capture
from paredown.score import reduce, score
from paredown.score.reduce import share_of_larger
from paredown.statistics.curvature import inverse_diagonal


def by_hand(scores: list[float]) -> list[float]:
    """One sum for each score, in Python's own exact fractions of two."""
    return [s / sum(t for t in scores if t >= s) if s else 0.0 for s in scores]


@given(
    scores=st.lists(st.sampled_from([0.0, -0.0, 1e-30, 0.5, 1.0, 1.5, 2.0, 1e30]), max_size=40),
    kind=st.sampled_from([np.float32, np.float64]),
    at_once=st.sampled_from([1, 2, 5, 1 << 16]),
)
def test_shares_are_those_of_one_sum_per_score(scores: list[float], kind: Any, at_once: int) -> None:
    """Equal scores lie on both sides of the blocks that float32 is worked out in."""
    usual, reduce._AT_ONCE = reduce._AT_ONCE, at_once
    try:
        given_scores = np.array(scores, dtype=kind)
        found = share_of_larger(given_scores)
    finally:
        reduce._AT_ONCE = usual
    assert found.dtype == kind
    np.testing.assert_array_equal(given_scores, np.array(scores, dtype=kind))  # not written to
    np.testing.assert_allclose(found, by_hand([float(s) for s in given_scores]), rtol=1e-6)


def test_many_scores_in_blocks_are_as_one_sum_in_float64() -> None:
    scores = np.random.default_rng(0).gamma(0.5, size=200_001).astype(np.float32).reshape(3, -1)
    blocks = share_of_larger(scores)
    assert scores.size > 3 * reduce._AT_ONCE and blocks.shape == scores.shape
    np.testing.assert_allclose(blocks, share_of_larger(scores.astype(np.float64)), rtol=1e-6)
    assert blocks.max() == 1.0


@pytest.mark.parametrize("size", [1, 40, 256, 300, 520])
def test_the_diagonal_of_an_inverse_is_that_of_the_whole(size: int) -> None:
    x = torch.randn(size // 2 + 1, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    gram = x.T @ x / len(x)
    whole = np.linalg.inv(gram.numpy() + 0.01 * float(gram.diagonal().mean()) * np.eye(size))
    np.testing.assert_allclose(inverse_diagonal(gram, 0.01).numpy(), whole.diagonal(), rtol=1e-9)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_obs_from_fewer_positions_than_inputs_divides_by_the_same_diagonal(damping: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        net[0].bias[2] = -100.0
    images = torch.randn(2, 3, 7, 7)
    program = capture(net, images)
    found = score(
        program, couple(program), "obs", granularity="element", batches=[images], damping=damping,
        positions_per_sample=None,
    ).by_cell["2.weight"]  # fmt: skip
    x = nn.functional.unfold(net[1](net[0](images)), 3).movedim(1, 2).flatten(0, 1).detach().double().numpy()
    assert x.shape == (50, 72)
    h = x.T @ x / len(x)
    h[np.diag_indices(72)] += (h.diagonal() == 0) + max(damping, 1e-5) * h.diagonal().mean()
    wanted = net[2].weight.detach().double().flatten(1).numpy() ** 2 / np.linalg.inv(h).diagonal()
    dead = (x == 0).all(0)
    assert dead[2 * 9 : 3 * 9].all()
    wanted[:, dead] = 0.0
    np.testing.assert_allclose(np.asarray(found).reshape(4, 72), wanted, rtol=1e-4)
    fewer = score(program, couple(program), "obs", granularity="element", batches=[images], positions_per_sample=9)
    assert not np.allclose(np.asarray(fewer.by_cell["2.weight"]), np.asarray(found), rtol=0.01)
