from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from paredown.errors import RejectedError
from paredown.measure import evaluated, paired, summarize


def test_wilson_interval_of_a_textbook_example() -> None:
    # Newcombe (1998), table I: 81 of 263, score interval without continuity correction.
    some = summarize([1.0] * 81 + [0.0] * 182, "%")
    assert some.value == pytest.approx(0.3080, abs=1e-4)
    assert (some.low, some.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert some.n == 263
    assert "Wilson" in some.protocol


def test_percent_and_fraction_agree() -> None:
    one, hundred = summarize([1.0, 0.0, 1.0, 1.0]), summarize([100.0, 0.0, 100.0, 100.0])
    assert hundred.low == pytest.approx(100 * one.low)
    assert hundred.high == pytest.approx(100 * one.high)


def test_all_right_still_has_an_interval() -> None:
    some = summarize([1.0] * 540)
    assert some.value == some.high == pytest.approx(1.0)
    assert 0.99 < some.low < 1.0


def test_normal_interval_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(600):
        some = summarize(random.normal(3.0, 2.0, 80))
        hits += some.low <= 3.0 <= some.high
    assert 0.92 <= hits / 600 <= 0.98


@pytest.mark.parametrize("n", [2, 3, 5, 6, 30, 200, 301, 5000])
def test_intervals_of_means_are_scipys_students(n: int) -> None:
    """With five samples, which a slice may hold, 1.96 s/√n would hold the mean seven times in eight."""
    rng = np.random.default_rng(n)
    before, after = rng.normal(3, 2, n), rng.normal(4, 2, n)
    for found, values in ((summarize(before), before), (paired(before, after), after - before)):
        wanted = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
        assert (found.low, found.high) == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("binary", [True, False])
def test_paired_interval_covers_as_often_as_it_says(binary: bool) -> None:
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(600):
        before = (random.random(300) < 0.9).astype(float) if binary else random.normal(1.0, 1.0, 300)
        flip = random.random(300) < 0.05
        after = np.where(flip, 1 - before, before) if binary else before + random.normal(0.1, 0.5, 300)
        truth = 0.05 * (0.1 - 0.9) if binary else 0.1
        found = paired(before, after)
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / 600 <= 0.985


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_paired_is_antisymmetric_and_its_value_is_the_difference_of_means(pairs: list[tuple[bool, bool]]) -> None:
    before, after = (np.array([float(p[i]) for p in pairs]) for i in (0, 1))
    one, other = paired(before, after, "%"), paired(after, before, "%")
    assert one.value == pytest.approx(after.mean() - before.mean())
    assert one.low == pytest.approx(-other.high)
    assert one.high >= one.low


def test_two_networks_that_agree_everywhere_do_not_get_certainty() -> None:
    same = paired([1.0] * 539 + [0.0], [1.0] * 539 + [0.0])
    assert same.value == 0.0
    assert same.low < 0.0 < same.high
    assert same.high - same.low < 0.02


@pytest.mark.parametrize(
    "wrong", [None, True, "0.9", float("nan"), [1.0, float("inf")], [], [[1.0, 2.0]], object(), {"nested": 1}]
)
def test_a_metric_that_is_no_number_is_refused_by_name(wrong: object) -> None:
    with pytest.raises(RejectedError, match="the metric 'accuracy' must be"):
        evaluated(lambda _: {"accuracy": wrong}, lambda: None)


@pytest.mark.parametrize("wrong", [None, 0.9, {}, "accuracy"])
def test_evaluate_must_return_named_values(wrong: object) -> None:
    with pytest.raises(RejectedError, match="evaluate must return"):
        evaluated(lambda _: wrong, lambda: None)


def test_tensors_bools_and_numbers_are_taken() -> None:
    found = evaluated(
        lambda _: {
            "a": torch.tensor([True, False]),
            "b": 3,
            "c": np.float32(0.5),
            "d": torch.ones(2, requires_grad=True),
        },
        print,
    )
    assert {k: v.tolist() for k, v in found.items()} == {"a": [1.0, 0.0], "b": 3.0, "c": 0.5, "d": [1.0, 1.0]}
    assert summarize(found["b"]).low is None


def test_pairs_must_be_of_the_same_samples() -> None:
    with pytest.raises(RejectedError, match="same samples"):
        paired([1.0, 2.0], [1.0])
