"""Tables of layers in an allocation: bilinear between points, and the best choice that there is (every one tried)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from paredown.allocate import Latency, allocate
from paredown.allocate.latency import LayerLatency, Length
from paredown.budget import Budget
from paredown.couple import couple
from paredown.errors import InfeasibleError, UsageError
from paredown.examine import examine
from paredown.program import capture
from paredown.score import score


def layer(name, writes, reads, outs, ins, ms):
    return LayerLatency(
        name=name, writes=writes, reads=reads, out_channels=outs, in_channels=ins, ms=np.array(ms, np.float64)
    )


def test_bilinear_is_what_two_lines_give():
    rng = np.random.default_rng(0)
    outs, ins = (2, 5, 16), (1, 4, 9)
    ms = rng.random((3, 3))
    table = layer("a", Length(dense=16), Length(dense=9), outs, ins, ms)
    for o, i in itertools.product((2, 3, 5, 7.5, 16), (1, 2, 4, 8, 9)):
        rows = [np.interp(i, ins, row) for row in ms]
        assert float(table.at(o, i)) == pytest.approx(float(np.interp(o, outs, rows)))
    assert float(table.at(1, 0)) == ms[0, 0]  # below the grid nothing gets faster
    assert table.at(np.array([[2, 16], [5, 5]]), np.array(4)).shape == (2, 2)


def test_one_point_of_an_axis_that_cannot_shrink():
    table = layer("a", Length(dense=10), Length(dense=8, per={"s": 1.0}), (10,), (4, 8), [[1.0, 3.0]])
    assert table.of({"s": 8}, {"s": np.array([8, 6, 4])}).tolist() == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("ms", [[[1.0]], [[float("nan"), 1.0]], [[-1.0, 1.0]]])
def test_tables_that_are_none_are_refused(ms):
    with pytest.raises(UsageError, match="milliseconds must be numbers"):
        layer("a", Length(dense=10), Length(dense=8), (10,), (4, 8), ms)


def chain():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)
    )
    program = capture(net, torch.zeros(2, 3, 12, 12))
    return program, couple(program), examine(program)


@pytest.mark.parametrize("limit", [3.0, 4.4, 6.1, 8.0])
def test_no_other_counts_lose_less_within_the_limit(limit):
    """Two spaces meet in one layer: what one saves depends on the other. 8³ choices are tried."""
    program, coupling, cost = chain()
    spaces = [s.name for s in coupling.spaces]
    assert [len(s) for s in coupling.spaces] == [8, 8, 8]
    grid, rng = tuple(range(1, 9)), np.random.default_rng(7)
    layers = tuple(
        layer(
            f"l{n}", Length(dense=8, per={b: 1.0}), Length(dense=8, per={a: 1.0}), grid, grid, np.outer(grid, grid) / 20
        )
        for n, (a, b) in enumerate(itertools.pairwise(spaces))
    )
    # Outer products are what MACs are; a staircase on top is what a runtime adds.
    steps = layer(
        "stairs", Length(dense=8, per={spaces[0]: 1.0}), Length(dense=1), grid, (1,), [[1.0 + (n > 4)] for n in grid]
    )
    latency = Latency(layers=(*layers, steps), rest_ms=0.5)
    losses = {s: {n: float(v) for n, v in zip(grid, np.sort(rng.random(8))[::-1] * 3, strict=True)} for s in spaces}
    for points in losses.values():
        points[8] = 0.0
    plan = allocate(
        coupling, score(program, coupling, "l1"), cost, Budget(latency_ms=limit), allocation="knapsack", align=1,
        floor=0.0, sensitivity=losses, latency=latency,
    )  # fmt: skip
    kept = {s.name: len(plan.keep.get(s.footprints[0].parameter, {}).get(0, range(8))) for s in coupling.spaces}

    def ms(counts):
        return float(latency.total(dict.fromkeys(spaces, 8), {s: np.array(n) for s, n in counts.items()}))

    def loss(counts):
        return sum(losses[s][n] for s, n in counts.items())

    every = [dict(zip(spaces, counts, strict=True)) for counts in itertools.product(grid, repeat=3)]
    dense = ms(dict.fromkeys(spaces, 8))
    assert ms(kept) <= limit + 0.01 * dense  # the tolerance of allocate
    best = min(loss(c) for c in every if ms(c) <= limit)
    assert loss(kept) <= best + 1e-9


def test_a_limit_below_the_floor_says_the_nearest_plan():
    program, coupling, cost = chain()
    first = coupling.spaces[0].name
    table = layer("a", Length(dense=8, per={first: 1.0}), Length(dense=3), (1, 8), (3,), [[1.0], [4.0]])
    with pytest.raises(InfeasibleError) as caught:
        allocate(
            coupling, score(program, coupling, "l1"), cost, Budget(latency_ms=0.5), latency=Latency(layers=(table,))
        )
    assert caught.value.nearest is not None


def test_a_table_of_another_model_is_refused():
    program, coupling, cost = chain()
    table = layer("a", Length(dense=8, per={"other": 1.0}), Length(dense=3), (1, 8), (3,), [[1.0], [4.0]])
    with pytest.raises(UsageError, match="spaces of the coupling"):
        allocate(
            coupling, score(program, coupling, "l1"), cost, Budget(latency_ms=3.0), latency=Latency(layers=(table,))
        )
