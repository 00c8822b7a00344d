"""Schedules: arithmetic on densities and steps, against values from the papers."""

from __future__ import annotations

import itertools

import pytest

from paredown.errors import UsageError
from paredown.prune.schedule import (
    Gradual,
    Iterative,
    Lottery,
    OneShot,
    Regrowth,
    cubic,
    moving_share,
    named_schedule,
)


def test_cubic_values_of_zhu_and_gupta() -> None:
    points = Gradual(start=0.0, end=1.0, updates=4).points(0.1, 400)
    assert [t for t, _ in points] == [100, 200, 300, 400]
    assert [1 - d for _, d in points] == pytest.approx([0.5203125, 0.7875, 0.8859375, 0.9], abs=1e-12)
    assert [round(cubic(0, 0.9, p), 4) for p in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5203, 0.7875, 0.8859, 0.9]


def test_gradual_begins_at_the_density_there_is() -> None:
    (_, first), (_, last) = Gradual(updates=2).points(0.1, 100, start_density=0.5)
    assert first == pytest.approx(1 - (0.9 + (0.5 - 0.9) * 0.125))
    assert last == 0.1


def test_points_lie_where_start_and_end_say() -> None:
    points = Gradual(start=0.25, end=0.75, updates=5).points(0.2, 1000)
    assert [t for t, _ in points] == [350, 450, 550, 650, 750]
    assert all(a > b for (_, a), (_, b) in itertools.pairwise(points))


def test_a_training_of_few_steps_still_reaches_the_end() -> None:
    for steps in (1, 2, 3, 7):
        for way in (Gradual(end=0.05), Iterative(rounds=4, end=0.1)):
            points = way.points(0.3, steps)
            assert points[-1][1] == 0.3
            assert all(1 <= t <= steps for t, _ in points[1:])


def test_iterative_linear_and_geometric() -> None:
    linear = Iterative(rounds=4, spacing="linear").points(0.2, 100)
    assert [d for _, d in linear] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    geometric = [d for _, d in Iterative(rounds=4, spacing="geometric").points(0.0625, 100)]
    assert geometric == pytest.approx([0.5, 0.25, 0.125, 0.0625])
    assert [t for t, _ in linear] == [0, 22, 43, 65]


def test_lottery_removes_a_fifth_of_what_is_left() -> None:
    assert Lottery(rounds=5).densities(0.8**5) == pytest.approx([0.8, 0.64, 0.512, 0.4096, 0.32768])


def test_synflow_steps_of_one_shot() -> None:
    densities = OneShot(rounds=100).before(0.01)
    assert len(densities) == 100 and densities[-1] == 0.01
    assert densities[49] == pytest.approx(0.1)  # ρ^(50/100)


def test_rigl_times_and_share() -> None:
    points = Regrowth(every=100, end=0.75).points(0.1, 1000)
    assert [t for t, _ in points] == [0, 100, 200, 300, 400, 500, 600, 700]
    assert moving_share(0.3, 0.0) == pytest.approx(0.3)
    assert moving_share(0.3, 1 / 3) == pytest.approx(0.15 * 1.5)
    assert moving_share(0.3, 1.0) == pytest.approx(0.0, abs=1e-12)


def test_a_mask_that_never_moves_is_refused() -> None:
    """With the default, 100 steps apart, a training of 133 steps has no update before its end at three quarters."""
    with pytest.raises(UsageError, match=r"every must be below 75, .*Got every=100 .* 100 steps.*Regrowth\(every=10\)"):
        Regrowth(every=100, end=0.75).points(0.1, 100)
    with pytest.raises(UsageError, match="every must be below 100"):
        Regrowth().points(0.1, 133)
    assert len(Regrowth().points(0.1, 134)) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: OneShot(rounds=0),
        lambda: Iterative(rounds=0),
        lambda: Iterative(end=1.0),
        lambda: Iterative(spacing="cubic"),  # type: ignore[arg-type]
        lambda: Gradual(start=0.6, end=0.5),
        lambda: Gradual(updates=0),
        lambda: Gradual(regrow=1.0),
        lambda: Regrowth(by="none"),
        lambda: Regrowth(fraction=0.0),
        lambda: Regrowth(every=0),
        lambda: Lottery(rewind="optimizer"),  # type: ignore[arg-type]
        lambda: Lottery(rewind_step=-1),
        lambda: named_schedule("gradul"),
        lambda: named_schedule(3),
    ],
)
def test_bad_options_are_refused(make) -> None:
    with pytest.raises(UsageError, match="must be"):
        make()


def test_a_misspelt_name_is_answered_with_the_right_one() -> None:
    with pytest.raises(UsageError, match="Did you mean 'gradual'"):
        named_schedule("gradul")
