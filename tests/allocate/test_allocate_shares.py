"""Densities by layer: ERK by its own published loop and by bisection, curves by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from paredown.allocate.shares import by_price, equal_increase, erk, in_whole_numbers, scaled

SHAPES = [(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 1, 1), (64, 1, 3, 3), (128, 64, 3, 3), (10, 128)]


def as_published(shapes: list[tuple[int, ...]], density: float) -> list[float]:
    """RigL's loop: make layers dense whose density would be above 1, and solve again."""
    dense: set[int] = set()
    while True:
        sizes = [int(np.prod(s)) for s in shapes]
        left = density * sum(sizes) - sum(sizes[i] for i in dense)
        free = [i for i in range(len(shapes)) if i not in dense]
        epsilon = left / sum(sum(shapes[i]) for i in free)
        wanted = {i: epsilon * sum(shapes[i]) / sizes[i] for i in free}
        above = [i for i in free if wanted[i] > 1]
        if not above:
            return [1.0 if i in dense else wanted[i] for i in range(len(shapes))]
        dense.add(max(above, key=lambda i: wanted[i]))


@pytest.mark.parametrize("density", [0.02, 0.1, 0.2, 0.5, 0.9])
def test_erk_is_the_published_one(density: float) -> None:
    amounts = np.array([np.prod(s) for s in SHAPES], dtype=float)
    found = scaled(erk(SHAPES), amounts, np.zeros(len(SHAPES)), density * amounts.sum())
    assert found == pytest.approx(as_published(SHAPES, density))
    assert (found <= 1).all()
    if density == 0.2:
        assert (found == 1).any(), "the case in which a layer is dense must be among the tested"


@given(
    raw=st.lists(st.floats(1e-3, 10), min_size=1, max_size=6),
    amounts=st.lists(st.integers(1, 1000), min_size=6, max_size=6),
    lows=st.lists(st.floats(0, 1), min_size=6, max_size=6),
    share=st.floats(0, 1),
)
def test_scaled_densities_meet_the_target_like_bisection(
    raw: list[float], amounts: list[int], lows: list[float], share: float
) -> None:
    r, a, low = np.array(raw), np.array(amounts[: len(raw)], dtype=float), np.array(lows[: len(raw)])
    target = float(a @ low + share * (a.sum() - a @ low))
    found = scaled(r, a, low, target)
    assert a @ found == pytest.approx(target, rel=1e-6, abs=1e-6)
    few, many = 0.0, 1.0 / r.min()
    for _ in range(200):
        middle = (few + many) / 2
        if a @ np.clip(middle * r, low, 1) < target:
            few = middle
        else:
            many = middle
    assert found == pytest.approx(np.clip(many * r, low, 1), abs=1e-5)


def curve(generator: np.random.Generator, convex: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    density = np.array([0.1, 0.25, 0.5, 0.75, 1.0])
    if convex:
        return density, generator.uniform(0.1, 2) * (1 / density - 1)
    return density, np.append(np.sort(generator.uniform(0, 2, 4))[::-1], 0.0)


@given(seed=st.integers(0, 100), share=st.floats(0.15, 0.95), convex=st.booleans())
def test_measured_curves_are_spent_to_the_target(seed: int, share: float, convex: bool) -> None:
    generator = np.random.default_rng(seed)
    curves = [curve(generator, convex) for _ in range(4)]
    amounts = generator.integers(1, 50, 4).astype(float)
    lows = np.full(4, 0.1)
    target = share * float(amounts.sum())
    losses = {}
    for how in ("sensitivity", "greedy", "knapsack"):
        found = (
            equal_increase(curves, amounts, lows, target)
            if how == "sensitivity"
            else by_price(curves, amounts, lows, target, exact=how == "knapsack")
        )
        assert amounts @ found == pytest.approx(target)
        assert ((found >= lows - 1e-12) & (found <= 1 + 1e-12)).all()
        losses[how] = sum(float(np.interp(f, *c)) for f, c in zip(found, curves, strict=True))
    assert losses["knapsack"] <= losses["greedy"] + 1e-9
    if convex:  # no mixture of random densities that meets the target is better
        assert losses["greedy"] <= losses["sensitivity"] + 1e-9
        others = generator.uniform(0.1, 1, (2000, 4))
        others = others[np.abs(others @ amounts - target) < 0.01 * amounts.sum()]
        sums = sum(np.interp(others[:, i], *curves[i]) for i in range(4))
        slope = max(abs((c[1][1] - c[1][0]) / (0.15 * a)) for c, a in zip(curves, amounts, strict=True))
        assert (sums >= losses["greedy"] - slope * 0.01 * amounts.sum()).all()


def test_twice_as_sensitive_gives_half() -> None:
    straight = [(np.array([0.0, 1.0]), np.array([s, 0.0])) for s in (1.0, 2.0)]
    found = equal_increase(straight, np.ones(2), np.zeros(2), 2 - 0.9)
    assert (1 - found).tolist() == pytest.approx([0.6, 0.3])


def test_a_plateau_that_costs_nothing_is_given_in_part() -> None:
    flat = [(np.array([0.2, 0.6, 1.0]), np.array([1.0, 0.0, 0.0])), (np.array([0.5, 1.0]), np.array([1.0, 0.0]))]
    found = equal_increase(flat, np.ones(2), np.zeros(2), 1.8)
    assert found.tolist() == pytest.approx([0.8, 1.0])


@given(wanted=st.lists(st.floats(0, 9), min_size=1, max_size=6), data=st.data())
def test_whole_numbers_sum_up(wanted: list[float], data: Any) -> None:
    w = np.array(wanted)
    most = np.ceil(w).astype(int) + 1
    total = round(float(w.sum()))
    assume(total <= most.sum())
    found = in_whole_numbers(w, most, total)
    assert found.sum() == total
    assert (np.abs(found - w) <= 1 + 1e-9).all()
