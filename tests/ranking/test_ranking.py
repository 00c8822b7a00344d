"""Orders and how far they can be relied on: against SciPy, by hand, and on orders that are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, rankdata

from paredown.ranking import kendall, rank_intervals, ranks, stability

pairs = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 5), min_size=n, max_size=n) for _ in range(2)])
)


@given(pairs)
def test_tau_and_ranks_are_those_of_scipy(two: tuple[list[int], list[int]]) -> None:
    a, b = two
    found = kendall(a, b)
    if len(set(a)) < 2 or len(set(b)) < 2:
        assert found is None
    else:
        assert found == pytest.approx(kendalltau(a, b).statistic)
    assert ranks(a).tolist() == rankdata(a).tolist()


def noisy(noise: float, seed: int = 1) -> np.ndarray:
    return np.arange(6.0)[:, None] + noise * np.random.default_rng(seed).normal(size=(6, 40))


def test_stability_falls_with_the_noise_to_nothing() -> None:
    found = [stability(noisy(s)) for s in (0.1, 4.0, 1000.0)]
    taus = [f.tau for f in found if f is not None]
    assert taus[0] == 1.0 > taus[1] > taus[2] and abs(taus[2]) < 0.5
    assert found[1] is not None and found[1].low < found[1].tau < found[1].high


def test_halves_are_disjoint() -> None:
    """With all of the signal in one group, never both halves see it: halves agree where they may not."""
    one = np.zeros((8, 40))
    one[:, 0] = np.arange(8.0)
    assert stability(one) is None  # in every split one of the halves is all ties


def test_intervals_hold_the_ranks() -> None:
    values = noisy(3.0)
    found = rank_intervals(values)
    assert found is not None
    for (low, high), rank in zip(found, ranks(values.mean(1)), strict=True):
        assert 1 <= low <= rank <= high <= 6
    assert any(low < high for low, high in found)


@pytest.mark.parametrize("shape", [(2, 40), (5, 3)])
def test_too_few_rows_or_groups_are_no_order(shape: tuple[int, int]) -> None:
    assert stability(np.random.default_rng(0).normal(size=shape)) is None


def test_the_same_seed_is_the_same() -> None:
    assert stability(noisy(3.0)) == stability(noisy(3.0))
    assert rank_intervals(noisy(3.0)) == rank_intervals(noisy(3.0))
