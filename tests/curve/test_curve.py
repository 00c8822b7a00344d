"""Curve: intervals against scipy and full enumeration, the two rules against brute force, what is never chosen."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from curve_records import sweep, trial
from paredown.bootstrap import expanded, resamples, student_t
from paredown.controls import compared, dense_parts, dense_verdict
from paredown.curve import Line, chord_distances, interval, lines, pareto, sweet_spot, upper_bound
from paredown.records import Measured, Record

finite = st.floats(-100, 100, allow_nan=False).map(lambda v: round(v, 3))


def every_resample(values: Sequence[float]) -> np.ndarray:
    """The means of all n^n equally likely resamples."""
    return np.asarray([np.mean(pick) for pick in itertools.product(values, repeat=len(values))])


# ----------------------------------------------------------------------------------------------------------- intervals


@given(st.lists(finite, min_size=2, max_size=5), st.sampled_from([0.8, 0.9, 0.95]))
def test_bounds_are_those_of_all_resamples(values: list[float], confidence: float) -> None:
    means, n = every_resample(values), len(values)
    share = scipy.stats.norm.cdf(math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(confidence, n - 1))
    wanted = np.quantile(means, share, method="inverted_cdf")
    assert upper_bound(values, confidence) == pytest.approx(wanted, abs=1e-6)
    half = scipy.stats.norm.cdf(math.sqrt(n / (n - 1)) * scipy.stats.t.ppf((1 + confidence) / 2, n - 1))
    found = interval(values, confidence)
    assert found.low == pytest.approx(-np.quantile(-means, half, method="inverted_cdf"), abs=1e-6)
    assert found.high == pytest.approx(np.quantile(means, half, method="inverted_cdf"), abs=1e-6)


@pytest.mark.parametrize("n", [8, 12, 30])
def test_bounds_of_many_seeds_are_scipys(n: int) -> None:
    values = np.random.default_rng(n).gamma(2.0, size=n)
    found = interval([*values])
    two_sided = 2 * expanded(0.975, n) - 1
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=two_sided, method="percentile", n_resamples=40_000, rng=1
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(found.low - theirs.low) < 0.05 * width
    assert abs(found.high - theirs.high) < 0.05 * width
    assert found.low < found.mean < found.high


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 40, 301])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 0.975, 0.999])
def test_students_t_is_scipys(share: float, freedom: int) -> None:
    assert student_t(share, freedom) == pytest.approx(scipy.stats.t.ppf(share, freedom), abs=1e-8)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_resamples_are_all_of_them(n: int) -> None:
    counts, weights = resamples(n)
    assert weights.sum() == pytest.approx(1.0)
    assert (counts.sum(axis=1) == n).all()
    wanted: dict[tuple[int, ...], int] = {}
    for pick in itertools.product(range(n), repeat=n):
        key = tuple(pick.count(i) for i in range(n))
        wanted[key] = wanted.get(key, 0) + 1
    assert {tuple(map(int, c)): round(w * n**n) for c, w in zip(counts, weights, strict=True)} == wanted


@given(st.lists(finite, min_size=2, max_size=9), st.floats(-50, 50), st.floats(0.1, 10))
def test_intervals_move_and_stretch_with_the_values(values: list[float], shift: float, factor: float) -> None:
    found, moved = interval(values), interval([factor * v + shift for v in values])
    assert found.low is not None and found.high is not None and moved.low is not None and moved.high is not None
    assert moved.low == pytest.approx(factor * found.low + shift, abs=1e-6)
    assert moved.high == pytest.approx(factor * found.high + shift, abs=1e-6)
    assert min(values) <= found.low <= found.mean + 1e-9
    assert found.mean - 1e-9 <= found.high <= max(values)
    bound = upper_bound(values)
    assert bound is not None and bound <= found.high


def test_one_seed_has_no_interval_rather_than_one_of_width_zero() -> None:
    assert (interval([97.0]).low, interval([97.0]).high, upper_bound([97.0])) == (None, None, None)


def test_three_seeds_cover_three_times_in_four_and_five_nine_times_in_ten() -> None:
    rng, share = np.random.default_rng(0), {}
    for n in (3, 5):
        found = [interval([*rng.normal(size=n)]) for _ in range(1500)]
        share[n] = np.mean([f.low <= 0 <= f.high for f in found if f.low is not None and f.high is not None])
    assert 0.70 < share[3] < 0.80
    assert 0.90 < share[5] < 0.96


# --------------------------------------------------------------------------------------------------------------- lines


def test_lines_are_by_method_and_schedule_with_the_dense_model_first() -> None:
    records = sweep({0.5: [97.0, 98.0], 0.75: [98.0, 98.5]}, [99.0, 98.8])
    records += sweep({0.5: [96.0, 96.5]}, [99.0, 98.8], schedule="multi-level")[2:]
    records += [trial("thin", 0.5, seed, 95.0, 95.0) for seed in (0, 1)]
    found = lines(records, goal="max")
    assert [line.name for line in found] == ["l1 one-shot", "l1 multi-level", "a uniformly thinner dense network"]
    first = found[0]
    assert [p.amount for p in first.points] == [None, 0.75, 0.5]
    assert [round(p.removed["parameters"], 6) for p in first.points] == [0.0, 25.0, 50.0]
    assert first.points[2].loss == pytest.approx({0: 2.0, 1: 0.8})
    assert first.points[2].steps == 100
    assert "latency" not in first.points[1].removed


def test_of_a_metric_to_be_small_more_is_a_loss() -> None:
    records = sweep({0.5: [110.0, 120.0]}, [100.0, 105.0])
    assert lines(records, goal="min")[0].points[1].loss == pytest.approx({0: 10.0, 1: 15.0})


def test_a_failed_trial_is_marked_and_is_in_no_mean() -> None:
    records = sweep({0.5: [97.0, 98.0, 99.0]}, [99.0, 99.0, 99.0])
    lost = next(r for r in records if r.cell["kind"] == "pruned" and r.cell["seed"] == 1)
    failed = {**lost.cell, "status": "crashed", "reason": "it did", "tail": []}
    point = lines([r for r in records if r is not lost], goal="max", failed=[failed])[0].points[1]
    assert point.seeds == (0, 2)
    assert point.held_out == {0: 97.0, 2: 99.0}
    assert not point.complete
    assert point.failed[0]["status"] == "crashed"


def test_a_point_of_which_nothing_is_left_is_there_and_empty() -> None:
    records = sweep({0.75: [98.0, 98.0]}, [99.0, 99.0])
    gone = [
        {"kind": "pruned", "method": "l1", "schedule": "one-shot", "amount": 0.5, "seed": s, "status": "timeout"}
        for s in (0, 1)
    ]
    point = lines(records, goal="max", failed=gone)[0].points[-1]
    assert (point.amount, point.seeds, len(point.failed)) == (0.5, (), 2)
    assert not point.complete


# -------------------------------------------------------------------------------------------------------------- pareto


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=12, unique_by=lambda t: t[0]))
def test_the_front_is_what_no_other_point_beats(drawn: list[tuple[int, int]]) -> None:
    records = sweep({tenth / 10: [90.0 + quality / 4] for tenth, quality in drawn}, [93.0])
    points = lines(records, goal="max")[0].points
    front = pareto(points, "parameters", goal="max")
    wanted = []
    for p in points:
        x, y = p.removed["parameters"], p.held_out[0]
        if not any(
            (q.removed["parameters"] >= x and q.held_out[0] >= y) and (q.removed["parameters"] > x or q.held_out[0] > y)
            for q in points
        ):
            wanted.append(p.amount)
    assert [p.amount for p in front] == wanted


# ---------------------------------------------------------------------------------------------------------- sweet spot


losses = st.lists(st.lists(st.integers(-4, 24).map(lambda v: v / 8), min_size=3, max_size=3), min_size=1, max_size=5)
AMOUNTS = (0.9, 0.7, 0.5, 0.3, 0.1)


def from_losses(drawn: Sequence[Sequence[float]]) -> tuple[Line, ...]:
    dense = [98.0] * len(drawn[0])
    return lines(sweep({a: [98.0 - v for v in row] for a, row in zip(AMOUNTS, drawn, strict=False)}, dense), goal="max")


@given(losses, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_with_a_limit_it_is_the_largest_reduction_that_keeps_it(drawn: list[list[float]], limit: float) -> None:
    spot = sweet_spot(from_losses(drawn), "sparsity", limit=limit, unit="%")
    within = [
        AMOUNTS[i]
        for i, row in enumerate(drawn)
        # Three seeds: the expanded percentile lies beyond 26 of 27 resamples, so the bound is the worst seed.
        if max(row) <= limit + 1e-9
    ]
    assert (None if spot.point is None else spot.point.amount) == (min(within) if within else None)
    assert spot.rule == "limit"
    if spot.point is not None:
        assert "one-sided 95 % bound" in spot.sentence and f"{limit:.2f} points" in spot.sentence
        assert spot.low is not None and spot.high is not None and spot.removed is not None
        assert spot.low <= spot.removed <= spot.high
    else:
        assert spot.sentence.startswith("Nothing was chosen")


@given(losses)
def test_without_a_limit_it_is_the_point_farthest_above_the_chord(drawn: list[list[float]]) -> None:
    found = from_losses(drawn)
    spot = sweet_spot(found, "parameters", limit=None, unit="%")
    x = [0.0, *[100 * (1 - a) for a in AMOUNTS[: len(drawn)]]]
    y = [0.0, *[-float(np.mean(row)) for row in drawn]]
    distances = by_projection(x, y)
    if spot.point is None:
        assert max(distances) <= 1e-9 and y[-1] < 0
    elif max(y) - min(y) < 1e-12:
        assert spot.removed == pytest.approx(x[-1])
    else:
        at = next(i for i, v in enumerate(x) if spot.removed is not None and abs(v - spot.removed) < 1e-6)
        assert distances[at] == pytest.approx(max(distances), abs=1e-9)
        assert distances[at] > 0 or (at == len(x) - 1 and y[-1] > -2e-9)  # the end, where it lost nothing


def by_projection(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Signed distance to the chord, by taking away the part along it."""
    u = (np.asarray(x) - min(x)) / (max(x) - min(x) or 1)
    v = (np.asarray(y) - min(y)) / (max(y) - min(y) or 1)
    points = np.stack([u, v], axis=1)
    along = points[-1] - points[0]
    along = along / np.linalg.norm(along)
    rest = points - points[0] - np.outer((points - points[0]) @ along, along)
    return [float(np.linalg.norm(r) * np.sign(r[1] + 1e-300)) for r in rest]


@given(
    st.lists(st.tuples(finite, finite), min_size=2, max_size=8, unique_by=lambda t: t[0]),
    st.floats(0.5, 20),
    st.floats(-30, 30),
)
def test_the_chord_does_not_know_the_units(drawn: list[tuple[float, float]], factor: float, shift: float) -> None:
    x, y = (np.asarray(v) for v in zip(*sorted(drawn), strict=True))
    before, after = chord_distances(x, y), chord_distances(factor * x + shift, 3 * y - shift)
    if np.ptp(x) > 0.1 and np.ptp(y) > 0.1:
        assert after == pytest.approx(before, abs=1e-6)
    assert before[0] == before[-1] == 0


def test_the_interval_of_the_sweet_spot_is_the_rule_on_every_resample() -> None:
    drawn = [[0.1, 0.2, 0.0], [0.3, 1.4, 0.2], [0.9, 0.4, 2.5]]
    found = from_losses(drawn)
    spot = sweet_spot(found, "parameters", limit=1.0, unit="%")
    took = []
    for pick in itertools.product(range(3), repeat=3):
        again = from_losses([[row[i] for i in pick] for row in drawn])
        chosen = sweet_spot(again, "parameters", limit=1.0).removed
        took.append(0.0 if chosen is None else chosen)
    assert len({round(t, 6) for t in took}) > 2
    assert spot.low == pytest.approx(-np.quantile(-np.asarray(took), 0.975, method="inverted_cdf"))
    assert spot.high == pytest.approx(np.quantile(took, 0.975, method="inverted_cdf"))


def test_of_several_lines_the_one_that_comes_furthest() -> None:
    records = sweep({0.75: [98.0, 98.0], 0.5: [90.0, 91.0]}, [98.0, 98.0])
    records += sweep({0.75: [98.0, 98.0], 0.5: [97.8, 97.9]}, [98.0, 98.0], method="taylor")[2:]
    spot = sweet_spot(lines(records, goal="max"), "sparsity", limit=0.5, unit="%")
    assert (spot.line, spot.point.amount if spot.point else None) == ("taylor one-shot", 0.5)


def test_a_line_does_not_win_by_collapsing() -> None:
    """Each line's own chord: the first line stands 0.57 above it at 0.25, the second, which loses less everywhere, 0.24."""
    first = {0.5: 97.0, 0.25: 96.0, 0.1: 38.0}
    second = {0.5: 97.5, 0.25: 97.0, 0.1: 96.0}
    dense = [98.0, 98.0]
    records = sweep({a: [v, v] for a, v in first.items()}, dense)
    records += sweep({a: [v, v] for a, v in second.items()}, dense, method="taylor")[2:]
    found = lines(records, goal="max")
    spot = sweet_spot(found, "sparsity", limit=None, unit="%")
    assert spot.line == "taylor one-shot" and "joint front of all lines" in spot.sentence
    assert spot.point in pareto([p for line in found for p in line.points], "sparsity", goal="max")
    alone = sweet_spot(lines(records[:8], goal="max"), "sparsity", limit=None, unit="%")
    assert alone.point is not None and alone.point.amount == 0.25 and "of the mean curve" in alone.sentence


def timed(kind: str, amount: float | None, seed: int, value: float, ms: float, dense_ms: float | None) -> Record:
    record = trial(kind, amount, seed, value, value)
    in_turns = {} if dense_ms is None else {"baseline_latency_ms": Measured(value=dense_ms, unit="ms")}
    return dataclasses.replace(
        record, measured={**record.measured, "latency_ms": Measured(value=ms, unit="ms"), **in_turns}
    )


def test_what_is_no_faster_is_never_chosen_and_latency_is_that_of_one_schedule() -> None:
    """A base timed alone at another time says 20 ms; beside each trial the dense file takes 10."""
    figures = {0.75: (95.0, 10.2), 0.5: (90.0, 7.0), 0.25: (89.0, 4.0)}
    records = [timed("base", None, s, 98.0, 20.0, None) for s in (0, 1)]
    records += [timed("pruned", a, s, v, ms, 10.0) for a, (v, ms) in figures.items() for s in (0, 1)]
    found = lines(records, goal="max")
    assert [round(p.removed["latency"], 6) for p in found[0].points] == [0.0, -2.0, 30.0, 60.0]
    for limit in (None, 4.0):
        spot = sweet_spot(found, "latency", limit=limit, unit="%")
        assert spot.point is None and "Nothing was chosen" in spot.sentence
    slow = [r for r in records if r.cell["amount"] in (None, 0.75)]
    spot = sweet_spot(lines(slow, goal="max"), "latency", limit=5.0, unit="%")
    assert spot.point is None and "takes anything off the latency" in spot.sentence


def test_small_figures_are_told_in_digits_that_count() -> None:
    records = sweep({0.5: [0.9034, 0.9031, 0.9037]}, [0.91, 0.91, 0.91])
    records += [trial("thin", 0.5, s, 0.9, 0.9, steps=1000) for s in range(3)]
    found = lines(records, goal="max")
    (told,) = compared(found, goal="max")
    assert told.sentence.startswith("pruning bought 0.00340 ± 0.00030 over a uniformly")
    assert "bound on the loss, 0.00690, is within 0.00800;" in sweet_spot(found, "sparsity", limit=0.008).sentence


def test_the_random_control_is_beside_its_own_line_only() -> None:
    records = sweep({0.5: [97.0, 97.0]}, [98.0, 98.0])
    records += sweep({0.5: [97.5, 97.5]}, [98.0, 98.0], schedule="lottery")[2:]
    records += [trial("random", 0.5, s, 96.0, 96.0) for s in (0, 1)]
    told = {c.line: c for c in compared(lines(records, goal="max"), goal="max", unit="%")}
    assert told["l1 one-shot"].comparable
    assert told["l1 lottery"].why == "it was pruned and trained like l1 one-shot"


def test_a_sweet_spot_from_scratch_is_said_to_be_one() -> None:
    records = sweep({0.5: [90.0, 90.0], 0.25: [80.0, 80.0]}, [98.0, 98.0])
    records += [trial("from-scratch", 0.5, s, 97.9, 97.9, schedule="from-scratch") for s in (0, 1)]
    records += [trial("thin", a, s, 90.0, 90.0, steps=1000) for a in (0.5, 0.25) for s in (0, 1)]
    found = lines(records, goal="max")
    spot = sweet_spot(found, "sparsity", limit=1.0, unit="%")
    told = dense_verdict(spot, compared(found, goal="max", unit="%"), goal="max")
    assert "(the sweet spot, 0.5 of l1 from-scratch, is itself trained from scratch)" in told


def test_without_a_control_at_the_sweet_spot_the_nearest_one_is_told() -> None:
    records = sweep({a: [v, v + 0.1] for a, v in ((0.8, 97.9), (0.65, 90.0), (0.5, 80.0), (0.3, 70.0))}, [98.0, 98.1])
    records += [trial("thin", a, s, 60.0, 60.0, steps=1000) for a in (0.3, 0.5, 0.65) for s in (0, 1)]
    found = lines(records, goal="max")
    told = compared(found, goal="max", unit="%")
    spot = sweet_spot(found, "sparsity", limit=1.0, unit="%")
    assert dense_verdict(spot, told, goal="max").startswith("At 0.65 of l1 one-shot (no control stands at 0.8), ")
    nothing = sweet_spot(found, "sparsity", limit=0.0, unit="%")
    assert dense_verdict(nothing, told, goal="max").startswith("At 0.3 of l1 one-shot (nothing was chosen), ")


def test_test_data_choose_nothing() -> None:
    held_out = {0.75: [98.0, 97.9, 98.1], 0.5: [97.0, 97.2, 97.1], 0.25: [90.0, 91.0, 89.0]}
    told = set()
    for order in itertools.permutations([99.0, 50.0, 10.0]):
        test = {a: [v] * 3 for a, v in zip(held_out, order, strict=True)}
        records = sweep(held_out, [98.2, 98.0, 98.3], test=test)
        for limit in (1.5, None):
            spot = sweet_spot(lines(records, goal="max"), "sparsity", limit=limit, unit="%")
            told.add((limit, spot.sentence))
    assert len(told) == 2


def test_without_held_out_data_nothing_is_chosen() -> None:
    records = [trial("base", None, s, None, 98.0) for s in (0, 1)]
    records += [trial("pruned", 0.5, s, None, 98.0) for s in (0, 1)]
    for limit in (1.0, None):
        spot = sweet_spot(lines(records, goal="max"), "sparsity", limit=limit)
        assert spot.point is None
        assert "held-out" in spot.sentence


def test_with_one_seed_a_limit_has_no_bound_and_the_chord_no_interval() -> None:
    found = lines(sweep({0.75: [98.0], 0.5: [97.9], 0.25: [80.0]}, [98.0]), goal="max")
    limited = sweet_spot(found, "sparsity", limit=1.0, unit="%")
    assert limited.point is None and "one seed" in limited.sentence
    knee = sweet_spot(found, "sparsity", limit=None, unit="%")
    assert knee.point is not None and knee.point.amount == 0.5
    assert (knee.low, knee.high) == (None, None)
    assert "no interval: one seed" in knee.sentence


def test_a_point_without_all_its_seeds_is_not_chosen() -> None:
    records = sweep({0.75: [98.0, 98.0], 0.5: [98.0, 98.0]}, [98.0, 98.0])
    lost = next(r for r in records if r.cell["amount"] == 0.5 and r.cell["seed"] == 1)
    failed = [{**lost.cell, "status": "crashed", "reason": "", "tail": []}]
    spot = sweet_spot(lines([r for r in records if r is not lost], goal="max", failed=failed), "sparsity", limit=1.0)
    assert spot.point is not None and spot.point.amount == 0.75


@pytest.mark.parametrize(
    ("measured", "amount"),
    [
        ({0.5: [99.0, 99.1]}, 0.5),  # one reduction, better than the dense model: it lies on the chord
        ({0.75: [98.0, 98.1], 0.5: [98.1, 98.2], 0.25: [99.0, 99.1]}, 0.25),  # all below it, none of which loses
        ({0.75: [99.0, 99.0], 0.5: [98.1, 98.2]}, 0.75),  # one above it
        ({0.75: [97.0, 97.0], 0.5: [96.8, 97.0]}, None),
    ],
)
def test_what_is_smaller_and_loses_nothing_is_chosen_though_it_is_the_end_of_the_chord(
    measured: dict[float, list[float]], amount: float | None
) -> None:
    spot = sweet_spot(lines(sweep(measured, [98.0, 98.1]), goal="max"), "sparsity", limit=None, unit="%")
    assert (None if spot.point is None else spot.point.amount) == amount
    if amount in (0.5, 0.25):
        assert "the largest reduction, which lost nothing in the mean" in spot.sentence and "mean gain" in spot.sentence


def test_a_curve_that_falls_at_once_has_no_knee() -> None:
    found = lines(sweep({0.75: [80.0, 81.0], 0.5: [79.0, 79.5], 0.25: [78.0, 78.5]}, [98.0, 98.0]), goal="max")
    spot = sweet_spot(found, "sparsity", limit=None, unit="%")
    assert spot.point is None
    assert "above the chord" in spot.sentence


# -------------------------------------------------------------------------------------------------- the dense question


def with_control(kind: str, values: Sequence[float], **more: object) -> tuple[Line, ...]:
    records = sweep({0.5: [97.0, 97.4, 97.2]}, [98.0, 98.1, 98.2])
    records += [trial(kind, 0.5, s, v, v, **{"steps": 1000, **more}) for s, v in enumerate(values)]  # type: ignore[arg-type]
    return lines(records, goal="max")


@pytest.mark.parametrize(("goal", "word"), [("max", "better"), ("min", "worse")])
def test_one_seed_says_better_or_worse_whichever_way_the_metric_goes(goal: str, word: str) -> None:
    records = [*sweep({0.5: [97.0]}, [98.0]), trial("thin", 0.5, 0, 96.0, 96.0, steps=1000)]
    (found,) = compared(lines(records, goal=goal), goal=goal, unit="%")
    assert f"pruning was 1.00 points {word} than a uniformly thinner dense model" in found.sentence
    assert "with one seed: no interval" in found.sentence


def test_what_pruning_bought_is_paired_by_seed() -> None:
    (found,) = compared(with_control("thin", [96.0, 96.0, 96.0]), goal="max", unit="%")
    wanted = interval([1.0, 1.4, 1.2])
    assert (found.gain.mean, found.gain.low, found.gain.high) == pytest.approx((wanted.mean, wanted.low, wanted.high))
    assert found.comparable
    assert found.sentence.startswith(
        "pruning bought 1.20 ± 0.20 points over a uniformly thinner dense model at equal MACs"
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([97.1, 97.3, 97.2], "did not buy anything that shows"),
        ([98.0, 98.4, 98.2], "bought nothing: it was 1.00 ± 0.00 points worse"),
    ],
)
def test_or_that_it_bought_nothing(values: list[float], said: str) -> None:
    (found,) = compared(with_control("scratch", values), goal="max", unit="%")
    assert said in found.sentence


def test_of_a_metric_to_be_small_less_is_a_gain() -> None:
    records = sweep({0.5: [100.0, 102.0]}, [99.0, 99.0]) + [
        trial("thin", 0.5, s, 110.0, 110.0, steps=1000) for s in (0, 1)
    ]
    (found,) = compared(lines(records, goal="min"), goal="min", unit="g")
    assert found.gain.mean == pytest.approx(9.0)
    assert "9.0 ± 1.0 g" in found.sentence


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"macs": 0.6}, "+20 %"),
        ({"steps": 500}, "500 steps"),
        ({"details": {"not_comparable": "the base came trained"}}, "the base came trained"),
    ],
)
def test_what_is_not_alike_is_not_comparable_and_says_why(more: dict[str, object], why: str) -> None:
    (found,) = compared(with_control("scratch", [96.0, 96.0, 96.0], **more), goal="max", unit="%")
    assert not found.comparable
    assert why in found.why
    assert found.sentence == (
        f"not comparable ({found.why}): the difference to the same shape trained from scratch is 1.20 ± 0.20 points "
        "(positive is in favour of pruning; 95 % interval over 3 seeds)."
    )


@pytest.mark.parametrize(
    ("share", "of_control", "why"), [(0, 0, ""), (0, 0.5, "the pruned model has no MACs, and it has")]
)
def test_a_network_whose_macs_are_none_is_compared(share: float, of_control: float, why: str) -> None:
    """Tables that are looked up, or masks that leave a layer nothing."""
    found = sweep({0.5: [97.0, 97.1, 97.2]}, [98.0, 98.0, 98.0])[:3]
    found += [trial("pruned", 0.5, s, 97.0, 97.0, macs=share) for s in range(3)]
    found += [trial("thin", 0.5, s, 96.0, 96.0, macs=of_control, steps=1000) for s in range(3)]
    (told,) = compared(lines(found, goal="max"), goal="max", unit="%")
    assert told.why == why and told.comparable == (not why)


def test_beside_a_random_control_alone_the_dense_question_is_not_tested() -> None:
    records = sweep({0.5: [97.0, 97.0]}, [98.0, 98.0]) + [trial("random", 0.5, s, 96.0, 96.0) for s in (0, 1)]
    found = lines(records, goal="max")
    spot = sweet_spot(found, "sparsity", limit=1.0, unit="%")
    first, second = dense_parts(spot, compared(found, goal="max", unit="%"), goal="max")
    assert first[0].startswith("At the sweet spot (0.5 remains, l1 one-shot), the criterion bought 1.00")
    assert second == ("Not tested: no dense control has a result there.", True)


def test_what_is_not_comparable_claims_nothing() -> None:
    """Whichever way the difference goes, and with one seed: the reason stands first, then a figure and no verdict on it."""
    for values in ([96.0, 96.0, 96.0], [97.1, 97.3, 97.2], [98.0, 98.4, 98.2], [96.0]):
        for kind in ("scratch", "thin"):
            found = with_control(kind, values, steps=500)
            if len(values) == 1:
                found = lines([*sweep({0.5: [97.0]}, [98.0]), trial(kind, 0.5, 0, 99.0, 99.0, steps=500)], goal="max")
            (told,) = compared(found, goal="max", unit="%")
            assert told.sentence.startswith("not comparable (it was trained for 500 steps, base and recovery together")
            assert not any(claim in told.sentence for claim in ("bought", "buy", "better", "worse"))
    assert "is −2.00 points (positive is in favour of pruning; with one seed: no interval" in told.sentence


def two_ways(*, schedule: bool = False, **more: object) -> tuple[Line, ...]:
    """l1, whose shape and random choice the controls have, and another way that loses less at the same MACs."""
    dense = [98.0, 98.0, 98.0]
    records = sweep({0.5: [90.0, 90.2, 90.1]}, dense)
    other = {"schedule": "multi-level"} if schedule else {"method": "taylor, global"}
    records += sweep({0.5: [97.5, 97.6, 97.7]}, dense, **other)[3:]  # type: ignore[arg-type]
    for kind in ("scratch", "thin", "random"):
        own = {"steps": 100} if kind == "random" else {"steps": 1000, **(more if kind == "thin" else {})}
        records += [trial(kind, 0.5, s, 96.0, 96.0, **own) for s in range(3)]  # type: ignore[arg-type]
    return lines(records, goal="max")


@pytest.mark.parametrize("schedule", [False, True])
def test_controls_of_another_way_do_not_pass_for_the_same_shape(schedule: bool) -> None:
    found = two_ways(schedule=schedule)
    told = {(c.line, c.control): c for c in compared(found, goal="max", unit="%")}
    first, other = (line.name for line in found if line.kind == "pruned")
    assert all(told[first, kind].comparable for kind in ("scratch", "thin", "random"))
    scratch = told[other, "scratch"]
    assert (scratch.comparable, scratch.why) == (False, "it has the shape of l1 one-shot")
    assert "the difference to the shape of l1 one-shot trained from scratch is 1.60 ± 0.10 points" in scratch.sentence
    assert "same shape" not in scratch.sentence
    assert told[other, "thin"].comparable  # the MACs are what it has to have, and no line's shape
    assert told[other, "random"].why == "it was pruned and trained like l1 one-shot"
    verdict = dense_verdict(
        sweet_spot(found, "sparsity", limit=1.0, unit="%"), compared(found, goal="max", unit="%"), goal="max"
    )
    assert verdict.startswith(
        f"At the sweet spot (0.5 remains, {other}), pruning bought 1.60 ± 0.10 points over a unif"
    )
    assert "the same shape" not in verdict


@pytest.mark.parametrize(("of_control", "alike"), [("a1", True), ("b2", False), (None, False)])
def test_two_ways_that_leave_one_shape_have_one_control(of_control: str | None, alike: bool) -> None:
    dense = [98.0, 98.0, 98.0]
    records = sweep({0.5: [90.0, 90.2, 90.1]}, dense)
    for schedule, values in (("multi-level", [97.5, 97.6, 97.7]),):
        records += [
            trial("pruned", 0.5, s, v, v, schedule=schedule, steps=100, details={"shapes": "a1"})
            for s, v in enumerate(values)
        ]
    own = {} if of_control is None else {"shapes": of_control}
    records += [trial("scratch", 0.5, s, 96.0, 96.0, steps=1000, details=own) for s in range(3)]
    found = lines(records, goal="max")
    told = {(c.line, c.control): c for c in compared(found, goal="max", unit="%")}
    other = next(line.name for line in found if line.schedule == "multi-level")
    assert told[other, "scratch"].comparable is alike
    assert ("the same shape trained from scratch" in told[other, "scratch"].sentence) is alike


def test_a_thinner_network_that_is_the_shape_from_scratch_is_so_for_all_ways_of_that_shape() -> None:
    records = sweep({0.5: [97.0, 97.1, 97.2]}, [98.0] * 3)[:3]
    for schedule in ("one-shot", "multi-level"):
        records += [
            trial("pruned", 0.5, s, 97.0 + s / 10, 97.0, schedule=schedule, steps=100, details={"shapes": "a1"})
            for s in range(3)
        ]
    for kind in ("scratch", "thin"):
        own = {"shapes": "a1", **({"same_as": "scratch"} if kind == "thin" else {})}
        records += [trial(kind, 0.5, s, 96.0, 96.0, steps=1000, details=own) for s in range(3)]
    found = compared(lines(records, goal="max"), goal="max", unit="%")
    assert [(c.line, c.same_as) for c in found if c.control == "thin"] == [
        ("l1 one-shot", "scratch"), ("l1 multi-level", "scratch"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([1.0, 1.4, 1.2], "bought 1.20 ± 0.20 points over"),
        ([1.0, 1.1, 1.8], "bought 1.30 points over"),
        ([-1.0, -1.1, -1.8], "bought nothing: it was 1.30 points worse than"),
        ([-1.0, 0.1, 3.0], "did not buy anything that shows over"),
    ],
)
def test_a_plus_minus_stands_only_where_both_sides_are_alike(gains: list[float], said: str) -> None:
    """± of the longer side reaches where the interval does not."""
    (found,) = compared(
        with_control("thin", [v - g for v, g in zip((97.0, 97.4, 97.2), gains, strict=True)]), goal="max", unit="%"
    )
    assert said in found.sentence
    low, high = (
        sorted((found.gain.low, found.gain.high), key=abs) if max(gains) < 0 else (found.gain.low, found.gain.high)
    )
    ends = f"(95 % interval {abs(low) if max(gains) < 0 else low:.2f} to {abs(high) if max(gains) < 0 else high:.2f} points over 3 seeds)"
    assert (ends.replace("-", "−") in found.sentence) is ("±" not in found.sentence)


def test_a_control_of_the_points_own_way_goes_before_that_of_another() -> None:
    records = sweep({0.5: [97.0] * 3}, [98.0] * 3)
    records += sweep({0.5: [97.5] * 3}, [98.0] * 3, schedule="multi-level")[3:]
    records += [trial("random", 0.5, s, 96.0, 96.0) for s in range(3)]
    (first, second) = compared(lines(records, goal="max"), goal="max", unit="%")
    assert (first.own, second.own) == (True, False)
    records += [trial("random", 0.5, s, 97.2, 97.2, schedule="multi-level") for s in range(3)]
    found = lines(records, goal="max")
    (first, second) = compared(found, goal="max", unit="%")
    assert (first.gain.mean, first.own, first.comparable) == (pytest.approx(1.0), True, True)
    assert (second.gain.mean, second.own, second.comparable) == (pytest.approx(0.3), True, True)
    assert [line.name for line in found if line.kind == "random"] == [
        "a random criterion, as l1 one-shot", "a random criterion, as l1 multi-level",
    ]  # fmt: skip


def test_a_thinner_network_that_is_the_first_lines_shape_is_no_other_lines() -> None:
    found = two_ways(details={"same_as": "scratch"})
    told = {(c.line, c.control): c for c in compared(found, goal="max", unit="%")}
    assert told["l1 one-shot", "thin"].same_as == "scratch"
    assert told["taylor, global one-shot", "thin"].same_as == ""
    spot = sweet_spot(found, "sparsity", limit=1.0, unit="%")
    assert "that very shape" not in dense_verdict(spot, [*told.values()], goal="max")


def test_a_thinner_network_of_other_macs_is_not_comparable_with_another_way() -> None:
    told = {(c.line, c.control): c for c in compared(two_ways(macs=0.6), goal="max", unit="%")}
    assert told["taylor, global one-shot", "thin"].why == "its MACs are +20 % of the pruned model's"


def test_of_the_dense_controls_a_comparable_one_is_told_first() -> None:
    """Though the other one, trained too short, is the better one on held-out data."""
    records = sweep({0.5: [97.5, 97.6, 97.7]}, [98.0, 98.0, 98.0])
    records += [trial("scratch", 0.5, s, 97.0, 97.0, steps=500) for s in range(3)]
    records += [trial("thin", 0.5, s, 96.0, 96.0, steps=1000) for s in range(3)]
    found = lines(records, goal="max")
    spot, told = sweet_spot(found, "sparsity", limit=1.0, unit="%"), compared(found, goal="max", unit="%")
    parts = dense_parts(spot, told, goal="max")
    assert [comparable for _, comparable in parts] == [True, False]
    assert "over a uniformly thinner" in parts[0][0] and parts[1][0].startswith(
        "Not comparable (it was trained for 500"
    )
    assert " ".join(text for text, _ in parts) == dense_verdict(spot, told, goal="max")


def test_with_one_seed_the_verdict_has_no_interval() -> None:
    records = [*sweep({0.5: [97.0]}, [98.0]), trial("thin", 0.5, 0, 96.0, 96.0, steps=1000)]
    (found,) = compared(lines(records, goal="max"), goal="max", unit="%")
    assert "no interval is available" in found.sentence
    assert found.gain.low is None


def test_the_verdict_stands_at_the_sweet_spot_against_the_better_dense_control() -> None:
    records = sweep({0.75: [98.0, 98.1, 98.2], 0.5: [97.5, 97.6, 97.7]}, [98.0, 98.1, 98.2])
    for amount in (0.75, 0.5):
        records += [trial("scratch", amount, s, 97.0, 97.0, steps=1000) for s in range(3)]
        records += [trial("thin", amount, s, 97.2, 96.0, steps=1000) for s in range(3)]
        records += [trial("random", amount, s, 90.0, 90.0) for s in range(3)]
    found = lines(records, goal="max")
    spot = sweet_spot(found, "sparsity", limit=1.0, unit="%")
    told = dense_verdict(spot, compared(found, goal="max", unit="%"), goal="max")
    assert told.startswith(
        "At the sweet spot (0.5 remains, l1 one-shot), pruning bought 1.60 ± 0.10 points over a uniformly"
    )
    assert "the same shape trained from scratch" in told
    assert "random criterion" in told
    assert "Not tested" in dense_verdict(spot, (), goal="max")


def test_ten_thousand_trials_take_seconds() -> None:
    import time

    rng = np.random.default_rng(0)
    amounts = [round(0.999 - 0.0019 * i, 4) for i in range(500)]
    records = sweep({a: [*(98 - 3 * (1 - a) ** 2 + rng.normal(0, 0.1, 20))] for a in amounts}, [98.0] * 20)
    assert len(records) > 10_000
    start = time.process_time()
    found = lines(records, goal="max")
    for limit in (0.5, None):
        assert sweet_spot(found, "sparsity", limit=limit, unit="%").point is not None
    assert time.process_time() - start < 15


# --------------------------------------------------------------------------------------------------- files in codes


def with_codes(record: Record, less: float, *, size: float = 0.25, failed: str = "") -> Record:
    """A trial with a second file that is worse by `less` and has `size` of the bytes."""
    if failed:
        return dataclasses.replace(
            record, details={**record.details, "quantized": {"scheme": "int8", "failed": failed}}
        )
    own = {
        f"quantized_{n}": dataclasses.replace(record.measured[n], value=record.measured[n].value - less)  # type: ignore[operator]
        for n in ("held_out", "metric")
    }
    own["quantized_bytes"] = Measured(value=size * record.measured["bytes"].value, unit="B")  # type: ignore[operator]
    details = {**record.details, "quantized": {"scheme": "int8"}}
    return dataclasses.replace(record, measured={**record.measured, **own}, details=details)


def in_codes(*, less: float = 0.3) -> list[Record]:
    found = sweep({0.75: [98.9, 98.8], 0.5: [97.0, 97.2]}, [99.0, 98.8])
    found += [trial("thin", 0.5, seed, 96.0, 96.0, steps=1000) for seed in (0, 1)]
    return [with_codes(r, less) for r in found]


def test_each_line_is_followed_by_that_of_its_files_in_codes_against_the_dense_model_in_float() -> None:
    found = lines(in_codes(), goal="max")
    thin = "a uniformly thinner dense network"
    assert [line.name for line in found] == ["l1 one-shot", "l1 one-shot, INT8", thin, f"{thin}, INT8"]
    codes = found[1]
    assert [(p.kind, p.amount, p.codes) for p in codes.points] == [
        ("base", None, "INT8"),
        ("pruned", 0.75, "INT8"),
        ("pruned", 0.5, "INT8"),
    ]
    assert codes.points[0].loss == pytest.approx({0: 0.3, 1: 0.3})
    assert codes.points[2].loss == pytest.approx({0: 2.3, 1: 1.9})
    assert codes.points[0].removed["bytes"] == pytest.approx(75.0)
    assert codes.points[0].removed["parameters"] == 0.0
    assert codes.points[2].removed["macs"] == found[0].points[2].removed["macs"] == pytest.approx(50.0)
    plain = [dataclasses.replace(r, details={"training": r.details["training"]}) for r in in_codes()]
    assert [line.name for line in lines(plain, goal="max")] == ["l1 one-shot", thin]


def test_files_in_codes_are_chosen_where_they_save_something_and_dense_ones_too() -> None:
    found = lines(in_codes(), goal="max")
    by_weights = sweet_spot(found, "sparsity", limit=0.2, unit="%")
    assert by_weights.point is not None and (by_weights.line, by_weights.point.codes) == ("l1 one-shot", "")
    by_bytes = sweet_spot(found, "bytes", limit=0.5, unit="%")
    assert by_bytes.point is not None and (by_bytes.point.codes, by_bytes.point.amount) == ("INT8", 0.75)
    dense = sweet_spot(found, "bytes", limit=0.3, unit="%")
    assert dense.point is not None and (dense.point.kind, dense.point.codes) == ("base", "INT8")
    assert dense.sentence.startswith(
        "the dense network, INT8, with 75.0 % of the file's bytes removed (nothing pruned): the largest"
    )
    told = dense_parts(dense, compared(found, goal="max", unit="%"), goal="max")[0][0]
    assert told.startswith("At 0.5 of l1 one-shot (the sweet spot prunes nothing), pruning bought 1.10")
    every = {id(p): p for line in found for p in line.points}.values()
    assert not any(p.codes for p in pareto([*every], "sparsity", goal="max"))
    assert any(p.codes for p in pareto([*every], "bytes", goal="max"))


def test_controls_in_codes_are_compared_with_pruned_files_in_codes() -> None:
    found = [with_codes(r, 1.0 if r.cell["kind"] == "thin" else 0.3) for r in in_codes()]
    gains = {c.line: c.gain.mean for c in compared(lines(found, goal="max"), goal="max")}
    assert gains == pytest.approx({"l1 one-shot": 1.1, "l1 one-shot, INT8": 1.8})


def test_a_trial_whose_quantization_failed_has_no_number_in_codes_and_its_point_is_not_chosen() -> None:
    found = [
        with_codes(r, 0.0, failed="no") if r.cell["amount"] == 0.75 and r.cell["seed"] == 1 else r for r in in_codes()
    ]
    codes = lines(found, goal="max")[1]
    assert [(p.seeds, len(p.failed), p.complete) for p in codes.points] == [
        ((0, 1), 0, True),
        ((0,), 1, False),
        ((0, 1), 0, True),
    ]
    spot = sweet_spot(lines(found, goal="max"), "bytes", limit=0.5)
    assert spot.point is not None and spot.point.amount is None


def test_a_dense_model_without_a_file_in_codes_keeps_no_pruned_one_from_being_chosen() -> None:
    found = [with_codes(r, 0.0, failed="no") if r.cell["kind"] == "base" else r for r in in_codes()]
    assert lines(found, goal="max")[1].points[0].test == {}
    spot = sweet_spot(lines(found, goal="max"), "bytes", limit=0.5)
    assert spot.point is not None and (spot.point.codes, spot.point.amount) == ("INT8", 0.75)
