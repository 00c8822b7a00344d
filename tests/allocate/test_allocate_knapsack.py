"""The knapsack against trying everything, and against its linear bound where that is too much."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paredown.allocate.knapsack import knapsack

NUMBERS = st.one_of(st.integers(0, 12).map(float), st.floats(-3, 50, allow_nan=False, width=32))


@st.composite
def problems(draw: Any) -> tuple[list[list[float]], list[list[float]], float]:
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    costs = [draw(st.lists(NUMBERS, min_size=n, max_size=n)) for n in sizes]
    losses = [draw(st.lists(NUMBERS, min_size=n, max_size=n)) for n in sizes]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    return costs, losses, draw(st.floats(low - 2, high + 2))


@given(problem=problems())
@settings(max_examples=150)
def test_nothing_is_better(problem: tuple[list[list[float]], list[list[float]], float]) -> None:
    costs, losses, limit = problem
    fitting = [
        (sum(worse[i] for worse, i in zip(losses, c, strict=True)), c)
        for c in itertools.product(*(range(len(g)) for g in costs))
        if sum(g[i] for g, i in zip(costs, c, strict=True)) <= limit
    ]
    found = knapsack(costs, losses, limit)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert found.exact
    assert sum(g[i] for g, i in zip(costs, found.chosen, strict=True)) == pytest.approx(found.cost)
    assert found.cost <= limit + 1e-9
    assert sum(g[i] for g, i in zip(losses, found.chosen, strict=True)) == pytest.approx(found.loss)
    assert found.loss == pytest.approx(min(fitting)[0])


def test_a_model_of_sixty_layers_is_solved_exactly_by_an_independent_table() -> None:
    generator = np.random.default_rng(0)
    costs = [np.sort(generator.integers(1, 60, 8)) for _ in range(60)]
    losses = [np.sort(generator.uniform(0, 5, 8))[::-1] for _ in range(60)]
    limit = int(sum(c[0] for c in costs) * 0.5 + sum(c[-1] for c in costs) * 0.5)
    best = np.zeros(limit + 1)
    for c, worse in zip(costs, losses, strict=True):  # one cell for every amount spent
        after = np.full(limit + 1, np.inf)
        for cost, loss in zip(c.tolist(), worse.tolist(), strict=True):
            after[cost:] = np.minimum(after[cost:], best[: limit + 1 - cost] + loss)
        best = after
    found = knapsack(costs, losses, limit)
    assert found is not None
    assert found.exact
    assert found.loss == pytest.approx(best[limit])
    greedy_would_not_do = knapsack(costs, losses, limit, most_states=1)
    assert greedy_would_not_do is not None
    assert not greedy_would_not_do.exact
    assert greedy_would_not_do.loss >= found.loss


@pytest.mark.parametrize("seed", range(200))
def test_a_limit_that_the_cheapest_choice_just_meets_is_met(seed: int) -> None:
    """Sums of fractions differ in the last bit by the order they are added in; a limit found by halving lies there."""
    generator = np.random.default_rng(seed)
    costs = [generator.uniform(-0.3, 0, 5) for _ in range(3)]
    losses = [generator.uniform(0, 9, 5) for _ in range(3)]
    least = sum(float(np.sort(c)[0]) for c in costs)
    for limit in (least, float(np.nextafter(least, 1)), least + 1e-18):
        found = knapsack(costs, losses, limit)
        assert found is not None
        assert found.exact
        assert found.chosen == tuple(int(np.argmin(c)) for c in costs)


def test_steps_of_a_rounding_do_not_hide_the_answer() -> None:
    """Costs that differ in their last bit alone, and losses that do not."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        base = generator.uniform(0.1, 0.3, 3)
        costs = [[b, float(np.nextafter(b, 1)), b + 0.1] for b in base]
        losses = [[9.0, 3.0, 0.0]] * 3
        limit = sum(c[1] for c in costs)
        found = knapsack(costs, losses, limit)
        assert found is not None
        assert found.loss <= 9.0


def test_huge_costs_need_no_table() -> None:
    found = knapsack([[10**12, 4 * 10**12 + 1], [10**12, 3 * 10**12]], [[5.0, 0.0], [3.0, 0.0]], 5 * 10**12)
    assert found is not None
    assert (found.chosen, found.cost) == ((0, 1), 4e12)
