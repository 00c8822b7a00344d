"""Metrics in % that cannot be shares: refused where it is certain, noted where it only looks so."""

from __future__ import annotations

import numpy as np
import pytest

from paredown.errors import RejectedError
from paredown.train import Metric, metric_values
from paredown.train.shares import share_note

RIGHT = np.array([1.0, 0.0, 1.0, 1.0])


def of(name: str, unit: str = "%", goal: str = "max") -> Metric:
    return Metric(name=name, unit=unit, goal=goal)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [8100.0, 100.01, -2.0, 1e4 * RIGHT])
@pytest.mark.parametrize("name", ["accuracy", "Top-1", "f1", "macro_F1"])
def test_a_share_beyond_0_to_100_percent_is_refused(name: str, values: float | np.ndarray) -> None:
    with pytest.raises(RejectedError, match="declared in %, must be between 0 and 100"):
        metric_values(of(name), {name: values})


def test_right_or_wrong_as_0_and_1_under_percent_is_refused() -> None:
    with pytest.raises(RejectedError, match="must be 100 for a sample that is right"):
        metric_values(of("accuracy"), {"accuracy": RIGHT})


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        (of("accuracy"), 100 * RIGHT),
        (of("accuracy"), np.zeros(4)),  # all wrong, which a pruned network may be
        (of("accuracy"), 100.0),
        (of("accuracy"), 0.7),  # one number may be that bad: noted, not refused
        (of("accuracy", ""), RIGHT),
        (of("accuracy relative to the teacher"), 104.0),
        (of("mean absolute percentage error", goal="min"), 250.0),
        (of("mae", "g", "min"), 250.0 * RIGHT),
    ],
)
def test_what_may_be_right_is_taken(metric: Metric, values: float | np.ndarray) -> None:
    assert metric_values(metric, {metric.name: values})[0] == pytest.approx(float(np.mean(values)))


def test_the_dense_networks_value_is_noted_where_its_unit_looks_wrong() -> None:
    assert "100 × it" in share_note(of("accuracy"), 0.97)
    assert "more than 100" in share_note(of("recovered"), 130.0)
    for metric, value in (
        (of("accuracy"), 97.0),
        (of("mape", goal="min"), 0.5),
        (of("r2", ""), 0.9),
    ):
        assert share_note(metric, value) == ""
    assert "100 ×" not in share_note(of("accuracy"), 0.0), "a share of nothing has no other unit"


@pytest.mark.parametrize(("goal", "unit", "told"), [("max", "%", True), ("max", "points", True), ("min", "g", False)])
def test_a_dense_network_that_scores_nothing_has_nothing_to_lose(goal: str, unit: str, told: bool) -> None:
    assert ("it has nothing to lose" in share_note(of("IoU", unit, goal), 0.0)) is told
