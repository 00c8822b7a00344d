"""Masks from scores: exact counts, floors, N:M, what is left out, and what the budget says."""

from __future__ import annotations

import dataclasses
import functools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from paredown.allocate import Sensitivity, allocate, foresee
from paredown.allocate.masks import layer_mask
from paredown.budget import Budget
from paredown.couple import Coupling, couple
from paredown.errors import InfeasibleError, NothingToDo, RejectedError, UsageError
from paredown.examine import Cost, examine
from paredown.granularity import Granularity
from paredown.plan import Plan
from paredown.program import Program, capture
from paredown.prune import prune
from paredown.score import Scores, score


class Net(nn.Module):
    """One input channel, a depthwise convolution, groups, an embedding and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.table = nn.Embedding(5, 12)
        self.fc = nn.Linear(12, 7)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        x = self.grouped(F.relu(self.point(self.depthwise(F.relu(self.stem(x))))))
        return self.fc(x.mean((2, 3)) + self.table(index))


WEIGHTS = ("stem.weight", "depthwise.weight", "point.weight", "grouped.weight", "fc.weight")
TOTAL = 72 + 72 + 96 + 432 + 84


@functools.cache
def parts() -> tuple[Program, Coupling, Cost]:
    torch.manual_seed(0)
    program = capture(Net(), (torch.randn(2, 1, 8, 8), torch.tensor([1, 3])), train=False)
    return program, couple(program), examine(program)


def scores_of(granularity: str = "element", digits: int | None = None, seed: int = 0) -> Scores:
    """Magnitudes, rounded where ties are wanted."""
    g, generator = Granularity.parse(granularity), np.random.default_rng(seed)
    by_cell = {}
    for name in (*WEIGHTS, "table.weight"):
        values = np.abs(generator.normal(size=parts()[2].parameter_shapes[name]))
        by_cell[name] = g.reduce(values if digits is None else np.round(values, digits))
    return Scores(criterion="l1", by_space={}, granularity=granularity, by_cell=by_cell)


def plan_for(budget: Budget | None, granularity: str = "element", **options: Any) -> Plan:
    _, coupling, cost = parts()
    scores = options.pop("scores", None) or scores_of(granularity)
    return allocate(coupling, scores, cost, budget, **options)


def kept(plan: Plan, name: str) -> int:
    return plan.masks[name].num_kept if name in plan.masks else math.prod(parts()[2].parameter_shapes[name])


def test_the_model_is_the_one_the_tests_assume() -> None:
    _, _, cost = parts()
    assert sum(math.prod(cost.parameter_shapes[n]) for n in WEIGHTS) == TOTAL


# -------------------------------------------------------------------------------------------------------- exact counts


@given(
    density=st.one_of(st.floats(0.01, 0.99), st.sampled_from([0.5, 0.25, 0.05, 0.9999, 1e-4])),
    digits=st.sampled_from([None, 0, 1]),
    allocation=st.sampled_from(["uniform", "global", "erk"]),
)
def test_exactly_the_asked_number_of_elements_leaves(density: float, digits: int | None, allocation: Any) -> None:
    scores = scores_of(digits=digits)
    try:
        plan = plan_for(Budget(density=density), scores=scores, allocation=allocation, floor=0.0)
    except NothingToDo:
        assert round((1 - density) * TOTAL) == 0 or (allocation == "uniform" and round((1 - density) * 432) == 0)
        return
    total = sum(kept(plan, n) for n in WEIGHTS)
    assert total == plan.made_by["reached"]["kept"]
    if allocation == "uniform":
        for name in WEIGHTS:
            size = math.prod(parts()[2].parameter_shapes[name])
            assert kept(plan, name) == max(1, size - round(round((1 - density) * size, 6)))
    else:
        assert total == max(len(WEIGHTS), TOTAL - round(round((1 - density) * TOTAL, 6)))
    for name, mask in plan.masks.items():  # what stays beats what leaves; at a tie the later index stays
        stays, values = mask.kept.ravel(), scores.by_cell[name].ravel()
        if stays.any() and not stays.all():
            assert values[stays].min() >= values[~stays].max()
            ties = np.flatnonzero(values == values[stays].min())
            assert sorted(stays[ties].tolist()) == stays[ties].tolist()


def test_a_global_ranking_is_one_sort_over_all() -> None:
    scores = scores_of()
    plan = plan_for(Budget(density=0.3), scores=scores, allocation="global", floor=0.0)
    flat = np.concatenate([scores.by_cell[n].ravel() for n in WEIGHTS])
    cut = np.sort(flat)[round(0.7 * TOTAL)]
    for name in WEIGHTS:
        assert (plan.masks[name].kept == (scores.by_cell[name] >= cut)).all()
    scaled = Scores(
        criterion="l1", by_space={}, granularity="element", by_cell={n: s * (1000 if n == "fc.weight" else 1) for n, s in scores.by_cell.items()}
    )  # fmt: skip
    raw = plan_for(Budget(density=0.3), scores=scaled, allocation="global")
    assert "fc.weight" not in raw.masks
    for how in ("mean", "max"):
        one = plan_for(Budget(density=0.3), scores=scaled, allocation="global", normalize=how)
        two = plan_for(Budget(density=0.3), scores=scores, allocation="global", normalize=how)
        assert {n: m.bits for n, m in one.masks.items()} == {n: m.bits for n, m in two.masks.items()}


def test_cells_of_different_sizes_are_compared_by_their_layer_or_by_weight() -> None:
    scores = scores_of("row")
    for how in (None, "none", "size", "mean", "max"):
        plan = plan_for(Budget(density=0.5), scores=scores, allocation="global", normalize=how, floor=0.0)
        inputs = {n: math.prod(parts()[2].parameter_shapes[n][1:]) for n in WEIGHTS}
        divisor = {
            n: {"size": inputs[n], "mean": scores.by_cell[n].mean(), "max": scores.by_cell[n].max()}.get(
                how or "none", 1
            )
            for n in WEIGHTS
        }
        kept_scores, gone_scores = [], []
        for name in WEIGHTS:
            rows = plan.masks[name].kept.reshape(len(scores.by_cell[name]), -1)[:, 0] if name in plan.masks else np.ones(len(scores.by_cell[name]), bool)  # fmt: skip
            kept_scores += (scores.by_cell[name] / divisor[name])[rows].tolist()
            gone_scores += (scores.by_cell[name] / divisor[name])[~rows].tolist()
        if how in (None, "none"):  # the one row of each layer that always stays apart
            kept_scores = sorted(kept_scores)[len(WEIGHTS) :]
        assert min(kept_scores) >= max(gone_scores)
        assert plan.made_by["normalize"] == (how or "none")


def test_an_absolute_density_counts_elements() -> None:
    for allocation in ("uniform", "global", "erk"):
        plan = plan_for(Budget(density=200), allocation=allocation)
        assert plan.made_by["reached"]["kept"] == 200
        assert plan.made_by["asked"] == {"density": 200}


@pytest.mark.parametrize("granularity", ["2x2", "4x1", "1x5", "row", "column", "kernel"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "erk"])
def test_cells_leave_whole_and_come_near(granularity: str, allocation: Any) -> None:
    scores = scores_of(granularity)
    plan = plan_for(Budget(density=0.4), scores=scores, allocation=allocation, floor=0.0)
    g = Granularity.parse(granularity)
    largest = 0
    for name, mask in plan.masks.items():
        sizes = g.cell_sizes(mask.shape)
        largest = max(largest, int(sizes.max()))
        cells = g.reduce(mask.kept.astype(float))
        assert np.isin(cells, (0, *np.unique(sizes))).all()
        assert ((cells == 0) | (cells == sizes)).all()
        assert mask.granularity == granularity
        values = scores.by_cell[name]
        assert values[cells > 0].min() >= values[cells == 0].max(initial=-np.inf)
    reached = plan.made_by["reached"]
    slack = largest * (len(WEIGHTS) if allocation != "global" else 1)
    assert abs(reached["kept"] - 0.4 * TOTAL) <= slack
    assert reached["kept"] == sum(kept(plan, n) for n in WEIGHTS)


def test_rows_are_compared_within_themselves() -> None:
    scores = scores_of()
    plan = plan_for(Budget(density=0.25), scores=scores, scope="row")
    for name in WEIGHTS:
        table, stays = scores.by_cell[name].reshape(len(scores.by_cell[name]), -1), plan.masks[name].kept
        for row, mine in zip(table, stays.reshape(table.shape), strict=True):
            number = min(round(0.75 * len(row)), len(row) - 1)
            leaves = set(sorted(range(len(row)), key=lambda i: (row[i], i))[:number])
            assert {i for i in range(len(row)) if not mine[i]} == leaves
    assert plan.made_by["scope"] == "row"


def test_the_scope_is_that_of_the_criterion_unless_asked() -> None:
    scores = dataclasses.replace(scores_of(), scope="row")
    _, coupling, cost = parts()
    assert allocate(coupling, scores, cost, Budget(density=0.5)).made_by["scope"] == "row"
    assert allocate(coupling, scores, cost, Budget(density=0.5), scope="layer").made_by["scope"] == "layer"
    assert allocate(coupling, scores, cost, Budget(density=0.5), allocation="global").made_by["scope"] == "model"


# -------------------------------------------------------------------------------------------------------------- floors


def test_floors_hold_and_the_others_give_the_more() -> None:
    weak = scores_of()
    weak.by_cell["grouped.weight"][:] *= 1e-6  # type: ignore[index]
    for floor in (0.05, {"grouped": 0.3, "*": 0.02}):
        plan = plan_for(Budget(density=0.15 if floor == 0.05 else 0.25), scores=weak, allocation="global", floor=floor)
        wanted = 0.05 if floor == 0.05 else 0.3
        assert kept(plan, "grouped.weight") == math.ceil(wanted * 432 - 1e-9)
        assert plan.made_by["reached"]["kept"] == TOTAL - round((0.85 if floor == 0.05 else 0.75) * TOTAL)
        free = [n for n in WEIGHTS if n != "grouped.weight"]
        values = np.concatenate([weak.by_cell[n].ravel() for n in free])
        stays = np.concatenate([plan.masks[n].kept.ravel() if n in plan.masks else np.ones(weak.by_cell[n].size, bool) for n in free])  # fmt: skip
        assert values[stays].min() > values[~stays].max()
    default = plan_for(Budget(density=0.3), scores=weak, allocation="global")
    assert kept(default, "grouped.weight") == 5  # 1 %
    assert min(kept(plan_for(Budget(density=0.002), allocation=a), n) for a in ("global", "uniform", "erk") for n in WEIGHTS) >= 1  # fmt: skip


def test_a_floor_above_the_density_is_infeasible_and_the_nearest_plan_comes_along() -> None:
    for allocation in ("uniform", "global", "erk"):
        with pytest.raises(InfeasibleError, match=r"floor=0.4") as caught:
            plan_for(Budget(density=0.2), allocation=allocation, floor=0.4)
        nearest = caught.value.nearest
        assert nearest.made_by["reached"]["kept"] == sum(math.ceil(0.4 * math.prod(parts()[2].parameter_shapes[n])) for n in WEIGHTS)  # fmt: skip


def test_a_floor_for_one_layer_does_not_break_the_sum() -> None:
    plan = plan_for(Budget(density=0.3), floor={"fc": 0.8})
    assert kept(plan, "fc.weight") == math.ceil(0.8 * 84)
    assert plan.made_by["reached"]["kept"] == TOTAL - round(0.7 * TOTAL)
    shares = [kept(plan, n) / math.prod(parts()[2].parameter_shapes[n]) for n in WEIGHTS if n != "fc.weight"]
    assert max(shares) - min(shares) < 0.02


# ----------------------------------------------------------------------------------------------------------------- N:M


def test_n_of_m_needs_no_budget() -> None:
    plan = plan_for(None, "2:4")
    for name, mask in plan.masks.items():
        matrix = np.moveaxis(mask.kept, 1, -1)
        for first in range(0, mask.shape[1] - 3, 4):
            assert (matrix[..., first : first + 4].sum(-1) == 2).all(), name
    assert "stem.weight" not in plan.masks  # one input
    assert plan.masks.keys() == plan_for(Budget(density=0.5), "2:4").masks.keys()
    with pytest.raises(UsageError, match=r"density=0.5"):
        plan_for(Budget(density=0.25), "2:4")
    with pytest.raises(UsageError, match="uniform with N:M"):
        plan_for(None, "2:4", allocation="global")
    with pytest.raises(UsageError, match="scope"):
        plan_for(None, "2:4", scope="row")


# -------------------------------------------------------------------------------------------- weights stored [in, out]


class Conv1D(nn.Module):
    """As GPT-2's: a linear layer with its weight stored [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Flipped(nn.Module):
    """Three weights stored [in, out], one of them by group, and a linear layer."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=groups)
        self.conv1d = Conv1D(6, 8)
        self.product = nn.Parameter(torch.randn(8, 5))
        self.fc = nn.Linear(5, 4)

    def inputs(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What each weight is multiplied with. Shape [positions, in]."""
        first = F.relu(self.up(x)).mean((2, 3))
        second = F.relu(self.conv1d(first))
        third = F.relu(second @ self.product)
        channels = x.movedim(1, -1).flatten(0, 2)
        return {"up.weight": channels, "conv1d.weight": first, "product": second, "fc.weight": third}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.inputs(x)["fc.weight"])


def flipped(groups: int = 2) -> tuple[Flipped, torch.Tensor, Program]:
    torch.manual_seed(2)
    net = Flipped(groups).eval()
    x = torch.randn(16, 4, 3, 3) * torch.tensor([0.1, 3.0, 1.0, 20.0])[:, None, None]
    return net, x, capture(net, x[:2], train=False)


def lowest_of_each_output(net: Flipped, x: torch.Tensor, groups: int, share: float) -> dict[str, np.ndarray]:
    """What stays of every weight when each output loses that share of |w| · ‖x‖, by loops over outputs."""
    expected = {}
    for name, seen in net.inputs(x).items():
        weight = net.get_parameter(name).detach().double().numpy()
        norms = seen.detach().double().square().mean(0).sqrt().numpy()
        stays = np.ones(weight.shape, dtype=np.bool_)
        parts = groups if name == "up.weight" else 1
        for part in range(parts):
            for out in range(weight.shape[0 if name == "fc.weight" else 1]):
                inputs = range(part * len(norms) // parts, (part + 1) * len(norms) // parts)
                where = [(out, i) if name == "fc.weight" else (i, out, *at) for i in inputs for at in np.ndindex(weight.shape[2:])]  # fmt: skip
                score = [abs(weight[at]) * norms[at[1] if name == "fc.weight" else at[0]] for at in where]
                for k in np.argsort(score, kind="stable")[: min(round(share * len(where)), len(where) - 1)]:
                    stays[where[k]] = False
        expected[name] = stays
    return expected


@pytest.mark.parametrize("by_hand", [False, True])
def test_rows_are_outputs_however_the_weight_is_stored(by_hand: bool) -> None:
    """Wanda within each output. In one input all weights share one norm: compared there it is magnitude."""
    groups = 1 if by_hand else 2
    net, x, program = flipped(groups)
    coupling = couple(program)
    scores = score(program, coupling, "wanda", granularity="element", batches=[x[:8], x[8:]])
    assert scores.flipped == {"up.weight": groups, "conv1d.weight": 1, "product": 1}
    if by_hand:  # nobody said it: the coupling does
        scores = dataclasses.replace(scores, flipped=None)
    plan = allocate(coupling, scores, examine(program), Budget(density=0.5))
    expected = lowest_of_each_output(net, x, groups, 0.5)
    assert plan.masks.keys() == expected.keys()
    for name, stays in expected.items():
        np.testing.assert_array_equal(plan.masks[name].kept, stays, err_msg=name)
        flips = (scores.flipped or {}).get(name, 0)
        if not by_hand:
            alone = layer_mask(scores.by_cell[name], stays.shape, Granularity.parse("element"), 0.5, rows=True, flipped=flips)  # fmt: skip
            np.testing.assert_array_equal(alone, stays, err_msg=name)


@pytest.mark.parametrize("granularity", ["2:4", "row", "column", "4x1"])
def test_cells_never_lie_across_a_weight_stored_in_out(granularity: str) -> None:
    """2 of 4 outputs are no 2:4, and a "row" would be an input. Loudly left out, by hand-made scores too."""
    net, _, program = flipped()
    coupling, cost = couple(program), examine(program)
    with pytest.warns(UserWarning, match=rf"stored \[in, out, …\].*{granularity} has no meaning: up.weight, conv1d"):
        scores = score(program, coupling, "l1", granularity=granularity)
    assert scores.by_cell.keys() == {"fc.weight"}
    assert any("up.weight, conv1d.weight, product" in note for note in scores.notes)
    budget = None if granularity == "2:4" else Budget(density=0.5)
    plan = allocate(coupling, scores, cost, budget)
    assert plan.masks.keys() == {"fc.weight"}
    if granularity == "2:4":
        order = np.argsort(np.abs(net.fc.weight.detach().numpy()[:, :4]), axis=1)
        expected = np.ones((4, 5), dtype=np.bool_)  # the rest of one input stays
        np.put_along_axis(expected, order[:, :2], False, axis=1)
        np.testing.assert_array_equal(plan.masks["fc.weight"].kept, expected)
    g = Granularity.parse(granularity)
    by_cell = {n: g.reduce(np.abs(net.get_parameter(n).detach().double().numpy())) for n in net.inputs(torch.ones(2, 4, 3, 3))}  # fmt: skip
    plan = allocate(coupling, Scores(criterion="l1", by_space={}, granularity=granularity, by_cell=by_cell), cost, budget)  # fmt: skip
    assert plan.masks.keys() == {"fc.weight"}
    assert set(plan.made_by["left_out"]) == {"up.weight", "conv1d.weight", "product"}
    only = nn.Sequential(Conv1D(8, 8))
    with pytest.raises(UsageError, match=r"Got only weights stored \[in, out, …\]"):
        alone = capture(only, torch.zeros(2, 8))
        score(alone, couple(alone), "l1", granularity=granularity)


@pytest.mark.parametrize("granularity", ["2x2", "kernel"])
def test_cells_that_turn_with_the_weight_take_part(granularity: str) -> None:
    """Square blocks of a matrix and kernels are the same cells [in, out] as [out, in]."""
    _, _, program = flipped()
    scores = score(program, couple(program), "l1", granularity=granularity)
    assert scores.by_cell.keys() >= {"conv1d.weight", "product", "fc.weight"}
    assert ("up.weight" in scores.by_cell) == (granularity == "kernel")


# ------------------------------------------------------------------------------------------------- who takes part


def test_all_layers_take_part_unless_they_are_left_out_and_it_is_said() -> None:
    everything = plan_for(Budget(density=0.5))
    assert set(everything.masks) == set(WEIGHTS)
    assert everything.made_by["left_out"] == {"table.weight": "no layer multiplies with it"}
    plan = plan_for(Budget(density=0.5), leave_out=["first", "last", "depthwise"])
    assert set(plan.masks) == {"point.weight", "grouped.weight"}
    assert plan.made_by["left_out"]["stem.weight"] == "first layer"
    assert plan.made_by["left_out"]["depthwise.weight"] == "depthwise"
    assert plan.made_by["left_out"]["fc.weight"] == "last layer"
    assert plan.made_by["reached"]["of"] == 96 + 432
    assert set(plan_for(Budget(density=0.5), leave_out=["depthwise"]).masks) == set(WEIGHTS) - {"depthwise.weight"}


def test_patterns_choose_and_must_match() -> None:
    assert set(plan_for(Budget(density=0.5), include=["point", "fc*"], exclude=["fc"]).masks) == {"point.weight"}
    with pytest.raises(UsageError, match="Did you mean 'point'"):
        plan_for(Budget(density=0.5), exclude=["pont"])
    with pytest.raises(UsageError, match="matches nothing"):
        plan_for(Budget(density=0.5), floor={"layer9": 0.5})
    with pytest.raises(NothingToDo, match="a pattern leaves it out"):
        plan_for(Budget(density=0.5), exclude=["*"])
    space = next(s.name for s in parts()[1].spaces if s.name.startswith("point"))
    assert "point.weight" not in plan_for(Budget(density=0.5), exclude=[space.replace("[", "[[]")]).masks


# ------------------------------------------------------------------------------------------------------------- budgets


def test_parameters_and_macs_are_effective_ones() -> None:
    program, coupling, cost = parts()
    for allocation in ("uniform", "global", "erk"):
        plan = plan_for(Budget(parameters=0.5), allocation=allocation)
        reached = plan.made_by["reached"]
        assert abs(reached["nonzero_parameters"] - 0.5 * cost.parameters) <= 1
        assert reached["parameters"] == cost.parameters
        plan = plan_for(Budget(macs=0.4), allocation=allocation)
        reached = plan.made_by["reached"]
        assert abs(reached["effective_macs"] - 0.4 * cost.macs) <= 0.01 * cost.macs
        assert reached["macs"] == cost.macs
        assert counted_macs(program, plan) == reached["effective_macs"] == foresee(coupling, cost, plan).effective_macs
        assert foresee(coupling, cost, plan).nonzero_parameters == reached["nonzero_parameters"]


def counted_macs(program: Program, plan: Plan) -> int:
    """Multiplications with a weight that is not masked: run on ones, with ones for weights, padding included."""
    ones = Net().eval()
    with torch.no_grad():
        for name, p in ones.named_parameters():
            p.fill_(0.0 if name.endswith("bias") or name.startswith("table") else 1.0)
            if name in plan.masks:
                p.copy_(torch.from_numpy(plan.masks[name].kept).float())
    total = 0.0

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += float(output.numel() / len(output) / module.weight.shape[0] * module.weight.sum())  # type: ignore[operator, union-attr, arg-type]

    for module in ones.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        ones(torch.ones(1, 1, 8, 8), torch.tensor([0]))
    return round(total)


@pytest.mark.parametrize("budget", [Budget(channels=0.5), Budget(size_bytes=0.5), Budget(latency_ms=2.0), Budget(), Budget(density=0.5, macs=0.5)])  # fmt: skip
def test_budgets_that_zeros_do_not_meet_are_refused(budget: Budget) -> None:
    with pytest.raises(UsageError, match="a budget for masks"):
        plan_for(budget)


@pytest.mark.parametrize("value", [0, 1, 1.0, 0.0, -0.5, "25%", True, float("nan")])
def test_densities_have_the_one_rule_of_budgets(value: Any) -> None:
    with pytest.raises(UsageError, match="density"):
        Budget(density=value)


def test_a_density_that_is_met_already_says_so() -> None:
    plan = plan_for(Budget(density=TOTAL))
    assert plan.made_by["already_met"] is True
    assert not plan.masks
    assert plan_for(Budget(parameters=10**6)).made_by["already_met"] is True


def test_a_budget_out_of_reach_is_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="parameters that are not zero") as caught:
        plan_for(Budget(parameters=20), exclude=["grouped"])
    assert set(caught.value.nearest.masks) == set(WEIGHTS) - {"grouped.weight"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"allocation": "magic"}, "allocation"),
        ({"normalize": "median"}, "normalize"),
        ({"scope": "column"}, "scope"),
        ({"leave_out": ["middle"]}, "leave_out"),
        ({"leave_out": "first"}, "leave_out"),
        ({"align": 8}, "align"),
        ({"floor": 1}, "floor"),
        ({"floor": {"fc": 2.0}}, "floor"),
        ({"allocation": "knapsack"}, "sensitivity"),
        ({"allocation": "global", "scope": "row"}, "ranking of the whole model"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        plan_for(Budget(density=0.5), **options)


def test_scores_must_fit_and_be_finite() -> None:
    scores = scores_of()
    scores.by_cell["fc.weight"][0, 0] = np.nan  # type: ignore[index]
    with pytest.raises(RejectedError, match=r"fc\.weight"):
        plan_for(Budget(density=0.5), scores=scores)
    other = Scores(criterion="l1", by_space={}, granularity="element", by_cell={"fc.weight": np.ones((3, 3))})
    with pytest.raises(UsageError, match="fit the model"):
        plan_for(Budget(density=0.5), scores=other)
    with pytest.raises(UsageError, match="hold cells"):
        plan_for(Budget(density=0.5), scores=Scores(criterion="l1", by_space={}, granularity="element"))


def test_the_same_arguments_give_the_same_plan() -> None:
    for allocation in ("uniform", "global", "erk"):
        a, b = (plan_for(Budget(density=0.3), allocation=allocation) for _ in range(2))
        assert a.digest == b.digest
        assert Plan.from_json(a.to_json(), {m.digest: m.bits for m in a.masks.values()}) == a


# ---------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("granularity", ["element", "2:4", "row", "4x1", "kernel"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_pruned_model_has_the_zeros_of_the_plan(granularity: str, allocation: Any) -> None:
    program, coupling, cost = parts()
    if granularity == "2:4" and allocation == "global":
        pytest.skip("N:M is uniform")
    plan = plan_for(None if granularity == "2:4" else Budget(density=0.5), granularity, allocation=allocation)
    pruned = prune(program, plan, condense=False)
    zeros = sum(int((pruned.module.get_parameter(n) == 0).sum()) for n in WEIGHTS)
    assert zeros == TOTAL - plan.made_by["reached"]["kept"] > 0
    assert foresee(coupling, cost, pruned.plan).nonzero_parameters == cost.parameters - zeros


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3])) for _ in range(3)]


@pytest.mark.parametrize("criterion", ["l1", "lamp", "taylor", "wanda", "random"])
@pytest.mark.parametrize("granularity", ["element", "2:4", "row", "2x2"])
def test_from_the_criterion_to_zeros(criterion: str, granularity: str) -> None:
    program, coupling, cost = parts()
    try:
        scores = score(
            program,
            coupling,
            criterion,
            granularity=granularity,
            batches=batches(),
            loss=lambda m, b: m(*b).square().mean(),
        )
    except UsageError as error:
        pytest.skip(str(error))
    assert set(scores.by_cell) == set(WEIGHTS)
    plan = allocate(coupling, scores, cost, None if granularity == "2:4" else Budget(density=0.5))
    if granularity != "2:4":
        slack = {"element": 0, "row": 5 * 36, "2x2": 5 * 4}[granularity] + (60 if criterion == "wanda" else 5)
        assert abs(plan.made_by["reached"]["kept"] - 0.5 * TOTAL) <= slack
    pruned = prune(program, plan, condense=False)
    zeros = sum(int((pruned.module.get_parameter(n) == 0).sum()) for n in WEIGHTS)
    assert zeros == TOTAL - plan.made_by["reached"]["kept"] > 0
    if criterion == "wanda" and granularity == "element":
        assert plan.made_by["scope"] == "row"
        for name, mask in plan.masks.items():  # METHODS: the lowest s of every row, by a naive loop
            table = np.asarray(scores.by_cell[name], dtype=np.float64).reshape(mask.shape[0], -1)
            for row, stays in zip(table.tolist(), mask.kept.reshape(table.shape).tolist(), strict=True):
                leaves = sorted(range(len(row)), key=lambda i: (row[i], i))[: min(round(0.5 * len(row)), len(row) - 1)]
                assert {i for i, s in enumerate(stays) if not s} == set(leaves)


# ------------------------------------------------------------------------------------------------------------ measured


def curves(sensitive: str) -> dict[str, dict[int | float, float | None]]:
    return {n: {f: (20.0 if n == sensitive else 1.0) * (1 / f - 1) for f in (0.75, 0.5, 0.25, 0.1)} for n in WEIGHTS}


@pytest.mark.parametrize("allocation", ["sensitivity", "greedy", "knapsack"])
@pytest.mark.parametrize("budget", [Budget(density=0.4), Budget(macs=0.4), Budget(parameters=0.5)])
def test_measured_increases_spare_the_sensitive_layer(allocation: Any, budget: Budget) -> None:
    plan = plan_for(budget, allocation=allocation, sensitivity=curves("grouped.weight"))
    shares = {n: kept(plan, n) / math.prod(parts()[2].parameter_shapes[n]) for n in WEIGHTS}
    other = plan_for(budget, allocation=allocation, sensitivity=curves("point.weight"))
    assert shares["grouped.weight"] > 1.2 * kept(other, "grouped.weight") / 432
    assert shares["point.weight"] < kept(other, "point.weight") / 96 / 1.2
    reached = plan.made_by["reached"]
    (unit, asked), *_ = plan.made_by["asked"].items()
    got = {"density": reached["kept"], "macs": reached["effective_macs"], "parameters": reached["nonzero_parameters"]}
    assert abs(got[unit] - asked) <= (0 if unit != "macs" else 0.01 * parts()[2].macs)
    table = Sensitivity.from_table(
        curves("grouped.weight"), {n: math.prod(parts()[2].parameter_shapes[n]) for n in WEIGHTS}
    )
    total = sum(float(table.at(n, kept(plan, n))) for n in WEIGHTS)
    assert total == pytest.approx(plan.made_by["expected_increase"], rel=0.05)


def test_layers_nobody_measured_stay_dense_and_too_few_are_infeasible() -> None:
    table = {n: c for n, c in curves("fc.weight").items() if n in ("grouped.weight", "fc.weight")}
    plan = plan_for(Budget(density=0.6), allocation="greedy", sensitivity=table)
    assert set(plan.masks) <= {"grouped.weight", "fc.weight"}
    assert plan.made_by["unmeasured"] == ["stem.weight", "depthwise.weight", "point.weight"]
    with pytest.raises(InfeasibleError, match="densities that were measured") as caught:
        plan_for(Budget(density=0.2), allocation="sensitivity", sensitivity=table)
    assert kept(caught.value.nearest, "grouped.weight") == round(0.1 * 432)


# ---------------------------------------------------------------------------------------------------------- time, memory


@pytest.mark.parametrize("allocation", ["uniform", "global", "erk"])
def test_millions_of_weights_take_little_memory_beside_their_scores(allocation: Any) -> None:
    net = nn.Sequential(nn.Linear(2048, 1024, bias=False), nn.ReLU(), nn.Linear(1024, 2048, bias=False))
    program = capture(net, torch.zeros(2, 2048), train=False)
    by_cell = {n: program.state[n].detach().abs().numpy() for n in ("0.weight", "2.weight")}
    scores = Scores(criterion="l1", by_space={}, granularity="element", by_cell=by_cell)
    coupling, cost = couple(program), examine(program)
    tracemalloc.start()
    plan = allocate(coupling, scores, cost, Budget(density=0.1), allocation=allocation)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.made_by["reached"]["kept"] == sum(s.size - round(0.9 * s.size) for s in by_cell.values())
    assert peak < 0.8 * cost.parameter_bytes + 16e6  # 25.5 million weights: 57 MB beside 102 MB of float32 scores
