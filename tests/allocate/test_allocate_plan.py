"""Plans: budgets hit, alignment and floor kept, recounted on nets built with the kept widths."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from paredown.allocate import allocate, predict
from paredown.allocate.levels import levels
from paredown.allocate.meter import Meter
from paredown.budget import Budget
from paredown.couple import Coupling, Footprint, Space, couple
from paredown.errors import InfeasibleError, NothingToDo, UsageError
from paredown.examine import Cost, examine
from paredown.plan import Plan
from paredown.program import Program, capture
from paredown.score import Scores, score

WIDTHS = (16, 24, 40, 12)


class Net(nn.Module):
    """A residual stream, a depthwise convolution, a concat and a flatten, at any widths."""

    def __init__(self, a: int, b: int, c: int, d: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, a, 3, padding=1)
        self.norm = nn.BatchNorm2d(a)
        self.up, self.deep, self.down = nn.Conv2d(a, b, 1), nn.Conv2d(b, b, 3, padding=1, groups=b), nn.Conv2d(b, a, 1)
        self.side = nn.Conv2d(a, c, 3, stride=2)
        self.fc = nn.Linear((a + c) * 9, d)
        self.head = nn.Linear(d, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.down(self.deep(self.up(x)))
        x = torch.cat([F.max_pool2d(x, 3, 2), self.side(x)], 1)
        return self.head(self.fc(x.flatten(1)).relu())


@functools.cache
def parts() -> tuple[Program, Coupling, Cost, Scores]:
    torch.manual_seed(0)
    program = capture(Net(*WIDTHS), torch.zeros(2, 3, 8, 8), train=False)
    coupling = couple(program)
    return program, coupling, examine(program), score(program, coupling)


def plan_for(budget: Budget, **options: Any) -> Plan:
    _, coupling, cost, scores = parts()
    return allocate(coupling, scores, cost, budget, **options)


def widths(plan: Plan) -> tuple[int, ...]:
    names = ("stem.weight", "up.weight", "side.weight", "fc.weight")
    return tuple(len(plan.keep.get(n, {}).get(0, range(w))) for n, w in zip(names, WIDTHS, strict=True))


def recount(plan: Plan) -> tuple[int, int]:
    """Parameters and MACs of the net built with the kept widths, by torch's own counter."""
    net = Net(*widths(plan)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 8, 8))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2


def test_the_coupling_is_the_one_the_tests_assume() -> None:
    _, coupling, cost, _ = parts()
    assert sorted(len(s) for s in coupling.spaces) == sorted(WIDTHS)
    meter = Meter(coupling, cost)
    assert (meter.parameters, meter.macs) == (cost.parameters, cost.macs) == recount(Plan(keep={}))


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("field", ["macs", "parameters"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_a_budget_is_hit_within_one_percent(allocation: Any, field: str, share: float) -> None:
    _, coupling, cost, _ = parts()
    plan = plan_for(Budget(**{field: share}), allocation=allocation, align=1)  # type: ignore[arg-type]
    reached = plan.made_by["reached"]
    assert abs(reached[field] - share * getattr(cost, field)) <= 0.01 * getattr(cost, field)
    assert (reached["parameters"], reached["macs"]) == recount(plan) == predict(coupling, cost, plan)
    assert "blocked_by" not in plan.made_by


@given(
    field=st.sampled_from(["macs", "parameters", "channels"]),
    share=st.floats(0.15, 0.95),
    allocation=st.sampled_from(["uniform", "global"]),
    align=st.sampled_from([1, 2, 4, 8]),
    floor=st.sampled_from([0.0, 0.1, 0.3]),
)
@settings(max_examples=60, deadline=None)
def test_any_plan_recounts_and_respects_floor_and_alignment(
    field: str, share: float, allocation: Any, align: int, floor: float
) -> None:
    _, coupling, cost, _ = parts()
    try:
        plan = plan_for(Budget(**{field: share}), allocation=allocation, align=align, floor=floor)  # type: ignore[arg-type]
    except InfeasibleError as error:
        assert error.nearest is not None
        plan = error.nearest
        if isinstance(error, NothingToDo):
            assert plan.keep == {}
            return
    reached = plan.made_by["reached"]
    assert (reached["parameters"], reached["macs"]) == recount(plan) == predict(coupling, cost, plan)
    for kept, dense in zip(widths(plan), WIDTHS, strict=True):
        assert kept >= max(1, math.ceil(floor * dense))
        step = align if align <= dense // 2 else 4  # 8 of 12 would leave no choice: 4 of 12
        assert kept == dense or kept % step == 0


def test_an_absolute_budget_is_the_amount_that_remains() -> None:
    _, _, cost, _ = parts()
    plan = plan_for(Budget(macs=cost.macs // 2), align=1)
    assert plan.made_by["asked"] == {"macs": cost.macs // 2}
    assert plan.keep == plan_for(Budget(macs=0.5), align=1).keep


def test_two_budgets_hold_together() -> None:
    _, _, cost, _ = parts()
    reached = plan_for(Budget(macs=0.6, parameters=0.3), align=1).made_by["reached"]
    assert reached["macs"] <= 0.61 * cost.macs
    assert reached["parameters"] <= 0.31 * cost.parameters


def test_channels_keep_the_share_of_every_space() -> None:
    assert widths(plan_for(Budget(channels=0.5), align=1)) == (8, 12, 20, 6)
    assert widths(plan_for(Budget(channels=0.5))) == (8, 16, 24, 8)  # the larger multiple of 8 (4 where 8 is too much)
    assert widths(plan_for(Budget(channels=10), align=1)) == (10, 10, 10, 10)


def test_uniform_keeps_one_ratio() -> None:
    kept = widths(plan_for(Budget(macs=0.5), align=1))
    ratios = [k / w for k, w in zip(kept, WIDTHS, strict=True)]
    assert max(ratios) - min(ratios) < 0.15


def test_global_removes_the_lowest_scores_of_all() -> None:
    _, coupling, _, scores = parts()
    plan = plan_for(Budget(channels=0.6), allocation="global", align=1, floor=0.0)
    comparable = scores.normalized()
    kept, gone = [], []
    for space in coupling.spaces:
        first = space.footprints[0]
        stays = np.isin(first.indices, plan.keep.get(first.parameter, {}).get(first.axis, first.indices)).all(1)
        kept += comparable[space.name][stays].tolist()
        gone += comparable[space.name][~stays].tolist()
    assert gone
    assert max(gone) <= min(kept)


def test_only_axes_that_change_are_named_and_buffers_are_among_them() -> None:
    plan = plan_for(Budget(channels=0.5), align=1, include=["stem"])
    assert set(plan.keep["norm.running_mean"]) == {0}
    assert set(plan.keep["stem.weight"]) == {0}
    assert set(plan.keep["up.weight"]) == {1}
    assert set(plan.keep["fc.weight"]) == {1}
    assert len(plan.keep["fc.weight"][1]) == (8 + WIDTHS[2]) * 9
    assert "head.weight" not in plan.keep


def test_the_same_arguments_give_the_same_digest() -> None:
    a, b = (plan_for(Budget(macs=0.5), allocation="global") for _ in range(2))
    assert a.digest == b.digest
    assert Plan.from_json(a.to_json()) == a
    assert a.digest != plan_for(Budget(macs=0.5)).digest


# ------------------------------------------------------------------------------------------------------ ties, patterns


def test_equal_scores_leave_from_the_lowest_index() -> None:  # fault 27
    _, coupling, cost, scores = parts()
    flat = Scores(criterion="flat", by_space={n: np.ones_like(s) for n, s in scores.by_space.items()})
    for allocation in ("uniform", "global"):
        plan = allocate(coupling, flat, cost, Budget(channels=0.5), allocation=allocation, align=1)  # type: ignore[arg-type]
        stem = plan.keep.get("stem.weight", {}).get(0)
        if stem is not None:
            assert stem == tuple(range(16 - len(stem), 16))
    assert stem is not None or allocation == "global"


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_no_space_is_ever_emptied(allocation: Any) -> None:  # fault 30
    plan = plan_for(Budget(parameters=2), allocation=allocation, floor=0.0, align=1)  # within 1 % of the dense amount
    assert widths(plan) == (1, 1, 1, 1)
    with pytest.raises(InfeasibleError) as caught:
        plan_for(Budget(parameters=2), allocation=allocation, floor=0.25, align=1)
    assert widths(caught.value.nearest) == (4, 6, 10, 3)


def test_a_pattern_that_matches_nothing_is_an_error_with_a_suggestion() -> None:  # faults 64, 65
    with pytest.raises(UsageError, match=r"stemm.*Did you mean 'stem'"):
        plan_for(Budget(macs=0.5), exclude=["stemm"])
    with pytest.raises(UsageError, match=r"layer9\.\*"):
        plan_for(Budget(macs=0.5), include=["layer9.*"])
    plan_for(Budget(macs=0.5), exclude=["head.*"])  # pinned anyway, but it exists


def test_a_pattern_that_protects_everything_leaves_nothing_to_do() -> None:  # fault 65
    with pytest.raises(NothingToDo, match="protect every space"):
        plan_for(Budget(macs=0.5), exclude=["*"])


def test_exclude_wins_over_include_and_says_so() -> None:  # fault 66
    plan = plan_for(Budget(channels=0.5), include=["side*", "up*"], exclude=["up"], align=1)
    assert widths(plan) == (16, 24, 20, 12)
    assert plan.made_by["precedence"] == "exclude wins over include"
    assert len(plan.made_by["protected"]) == 3


def test_a_text_is_one_pattern_and_not_its_letters() -> None:
    layers = [layer for _ in range(13) for layer in (nn.Linear(8, 8), nn.ReLU())]
    program = capture(nn.Sequential(*layers, nn.Linear(8, 8)), torch.zeros(2, 8), train=False)
    coupling, cost = couple(program), examine(program)
    scores = score(program, coupling)
    plan = allocate(coupling, scores, cost, Budget(channels=0.5), exclude="12", align=1)
    assert plan.made_by["exclude"] == ["12"]
    assert plan.made_by["protected"] == ["12.weight[0]"]
    assert len(plan.keep["2.weight"][0]) == 4
    with pytest.raises(UsageError, match="'77', which matches nothing"):
        allocate(coupling, scores, cost, Budget(channels=0.5), include="77")
    masks = score(program, coupling, "l1", granularity="element", include="12")
    assert set(masks.by_cell) == {"12.weight"}
    assert set(allocate(coupling, masks, cost, Budget(density=0.5), include="12").masks) == {"12.weight"}


def test_an_excluded_writer_protects_its_whole_space() -> None:
    assert widths(plan_for(Budget(channels=0.5), exclude=["down.weight"], align=1))[0] == 16  # the residual partner
    assert widths(plan_for(Budget(channels=0.5), exclude=["head"], align=1))[3] == 6  # head only reads it


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, "25%", "1e-3", True])
def test_ratios_have_one_rule(value: Any) -> None:  # fault 67
    with pytest.raises(UsageError, match="macs"):
        plan_for(Budget(macs=value))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"floor": 1.0}, "floor"),
        ({"align": 0}, "align"),
        ({"allocation": "greedy"}, "allocation"),
        ({"target": "toaster"}, "target"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        plan_for(Budget(macs=0.5), **options)


@pytest.mark.parametrize("budget", [Budget(latency_ms=3.0), Budget(), Budget(channels=0.5, macs=0.5)])
def test_budgets_of_another_kind_are_refused(budget: Budget) -> None:
    with pytest.raises(UsageError, match="budget"):
        plan_for(budget)


def test_scores_of_another_model_are_refused() -> None:
    _, coupling, cost, scores = parts()
    other = Scores(criterion="l1", by_space={n: s[:-1] for n, s in scores.by_space.items()})
    with pytest.raises(UsageError, match="must fit the coupling"):
        allocate(coupling, other, cost, Budget(macs=0.5))


def test_an_impossible_budget_comes_with_the_nearest_plan() -> None:  # fault 71
    _, _, cost, _ = parts()
    with pytest.raises(InfeasibleError, match=r"macs must be reducible .* 3 protected") as caught:
        plan_for(Budget(macs=0.2), include=["up"])
    nearest = caught.value.nearest
    assert nearest.keep
    assert caught.value.exit_code == 4
    assert nearest.made_by["reached"]["macs"] == recount(nearest)[1] > 0.2 * cost.macs


def test_a_budget_already_met_changes_nothing_and_says_so() -> None:  # fault 72
    _, _, cost, _ = parts()
    plan = plan_for(Budget(parameters=10 * cost.parameters))
    assert plan.keep == {}
    assert plan.made_by["already_met"] is True
    assert plan_for(Budget(channels=64)).made_by["already_met"] is True


def test_a_step_that_is_too_large_is_named() -> None:
    _, coupling, _, _ = parts()
    with pytest.raises(NothingToDo, match=r"alignment and floor|smallest step") as caught:
        plan_for(Budget(macs=0.97), include=["stem"])
    assert caught.value.nearest.keep == {}
    plan = plan_for(Budget(parameters=0.7), include=["stem", "side"], align=8)
    dense = plan.made_by["dense"]["parameters"]
    assert abs(plan.made_by["reached"]["parameters"] - 0.7 * dense) > 0.01 * dense
    assert any(s.name in plan.made_by["blocked_by"] for s in coupling.spaces)


def test_a_model_without_free_units_lists_the_reasons() -> None:
    program = capture(nn.Linear(4, 3), torch.zeros(2, 4), train=False)
    coupling = couple(program)
    with pytest.raises(NothingToDo, match="output"):
        allocate(coupling, score(program, coupling), examine(program), Budget(macs=0.5))


# -------------------------------------------------------------------------------------------------------------- levels


def space(units: int, per: int = 1) -> Space:
    indices = np.arange(units * per).reshape(units, per)
    return Space(name="s", footprints=(Footprint(parameter="w", axis=0, indices=indices, role="write"),))


@pytest.mark.parametrize(
    ("units", "per", "align", "floor", "expected"),
    [
        (32, 1, 8, 0.1, [8, 16, 24, 32]),
        (32, 1, 8, 0.3, [16, 24, 32]),
        (12, 64, 8, 0.1, [*range(2, 13)]),  # a head is a multiple of 8 by itself
        (8, 1, 8, 0.1, [4, 8]),
        (4, 1, 8, 0.1, [2, 4]),
        (2, 1, 8, 0.0, [1, 2]),
        (1, 1, 8, 0.0, [1]),
        (20, 6, 8, 0.0, [4, 8, 12, 16, 20]),  # 4 × 6 = 24 channels
        (10, 1, 1, 0.25, [*range(3, 11)]),
    ],
)
def test_levels(units: int, per: int, align: int, floor: float, expected: list[int]) -> None:
    assert levels(space(units, per), align=align, floor=floor).tolist() == expected


# ----------------------------------------------------------------------------------------------------------- attention


class Block(nn.Module):
    def __init__(self, heads: int = 4, hidden: int = 24) -> None:
        super().__init__()
        self.heads, self.hidden = heads, hidden
        self.q, self.k, self.v = (nn.Linear(16, 4 * heads) for _ in range(3))
        self.out = nn.Linear(4 * heads, 16)
        self.up, self.down = nn.Linear(16, hidden), nn.Linear(hidden, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


def test_heads_take_their_share_of_the_attention_products() -> None:
    program = capture(Block(), torch.zeros(2, 7, 16), train=False)
    coupling, cost = couple(program), examine(program)
    assert {s.kind for s in coupling.spaces} == {"head", "channel"}
    plan = allocate(coupling, score(program, coupling), cost, Budget(channels=0.5), align=1)
    small = examine(capture(Block(heads=2, hidden=12), torch.zeros(2, 7, 16), train=False))
    assert predict(coupling, cost, plan) == (small.parameters, small.macs)


def test_predict_agrees_with_the_pruned_model_captured_again() -> None:
    from paredown.prune.remove import prune

    program, coupling, cost, _ = parts()
    plan = plan_for(Budget(macs=0.4), allocation="global")
    small = prune(program, plan)
    again = examine(capture(small.module, torch.zeros(2, 3, 8, 8), train=False))
    assert predict(coupling, cost, plan) == (again.parameters, again.macs)


def test_a_lstm_in_the_model_is_recounted() -> None:
    class Rnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.rnn, self.out = nn.Linear(6, 16), nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.rnn(self.into(x).relu())[0])

    from paredown.prune.remove import prune

    program = capture(Rnn(), torch.zeros(2, 5, 6))
    coupling, cost = couple(program), examine(program)
    if not coupling.spaces:
        pytest.skip("recurrent layers are pinned")
    plan = allocate(coupling, score(program, coupling), cost, Budget(channels=0.5), align=1)
    again = examine(capture(prune(program, plan).module, torch.zeros(2, 5, 6), train=False))
    assert predict(coupling, cost, plan) == (again.parameters, again.macs)


def test_one_evaluation_is_quick() -> None:
    import time

    _, coupling, cost, _ = parts()
    meter = Meter(coupling, cost)
    start = time.perf_counter()
    for _ in range(100):
        meter.of(meter.units)
    assert (time.perf_counter() - start) / 100 < 2e-3
    many = meter.of(np.tile(meter.units, (7, 1)))
    assert many.shape == (7, 2)
    assert many[3].tolist() == [cost.parameters, cost.macs]
