"""Which ranks: the best within a budget against brute force, exact counts, patterns, and what cannot be."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paredown as pare
from paredown.errors import InfeasibleError, NothingToDo, RejectedError, UsageError
from paredown.factorize.select import frontier, knapsack, least_loss, uniform
from paredown.plan import Plan


class Net(nn.Module):
    """Convolutions of several kinds and a linear layer, trained on nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.wide = nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False)
        self.split = nn.Conv2d(48, 48, (3, 5), padding="same", dilation=(2, 1), groups=4)
        self.point = nn.Conv2d(48, 64, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(torch.relu(self.norm(self.stem(x))))
        x = self.point(torch.relu(self.split(torch.relu(x))))
        return self.head(torch.relu(x).mean((2, 3)))  # type: ignore[no-any-return]


INPUT = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def program() -> pare.Program:
    return pare.capture(Net(), INPUT)


def counted(pruned: pare.Pruned) -> tuple[int, int]:
    """What examine counts in the factorized module, captured anew."""
    cost = pare.examine(pare.capture(pruned.module, INPUT, train=False))
    return cost.parameters, cost.macs


# ---------------------------------------------------------------------------------------------- the choice by itself


def test_the_least_loss_within_any_limit_is_brute_forces() -> None:
    rng = np.random.default_rng(0)
    met = 0
    for _ in range(300):
        options = [frontier(rng.integers(1, 30, 5), rng.random(5)) for _ in range(4)]
        limit = int(rng.integers(4, 90))
        every = itertools.product(*[range(len(o.costs)) for o in options])
        totals = [total(options, list(choice)) for choice in every]
        fitting = [loss for cost, loss in totals if cost <= limit]
        found, spread = least_loss(options, limit), uniform(options, limit)
        if not fitting:
            assert found is None
            assert spread is None
            continue
        assert found is not None
        assert spread is not None
        cost, loss = total(options, found)
        assert cost <= limit
        assert loss == pytest.approx(min(fitting))
        assert total(options, spread)[0] <= limit
        met += 1
    assert met > 200


def total(options: list[Any], chosen: list[int]) -> tuple[int, float]:
    pairs = list(zip(options, chosen, strict=True))
    return sum(int(o.costs[i]) for o, i in pairs), sum(float(o.losses[i]) for o, i in pairs)


def test_with_convex_losses_it_is_the_sorted_order_of_energy_per_cost() -> None:
    """svd_llm: σ² per parameter, sorted over all layers, is what both ways must give at every step of that order."""
    rng = np.random.default_rng(1)
    prices = [3, 5, 2]
    spectra = [np.sort(rng.random(6))[::-1] for _ in prices]
    options = []
    for price, sigma in zip(prices, spectra, strict=True):
        tails = np.append(sigma[::-1].cumsum()[::-1], 0.0)
        options.append(frontier(price * np.arange(7), tails))
    order = sorted(((s / p, p, s) for p, sigma in zip(prices, spectra, strict=True) for s in sigma), reverse=True)
    spent, left = 0, sum(s for sigma in spectra for s in sigma)
    for _, price, gain in order:
        spent, left = spent + price, left - gain
        found = least_loss(options, spent)
        assert found is not None
        assert total(options, found)[1] == pytest.approx(left, abs=1e-12)


def test_large_limits_are_counted_in_steps_and_still_hold() -> None:
    rng = np.random.default_rng(2)
    options = [frontier(rng.integers(10**6, 10**8, 30), rng.random(30)) for _ in range(20)]
    least, most = (sum(int(o.costs[at]) for o in options) for at in (0, -1))
    for share in (0.0, 0.01, 0.3, 0.9, 1.0):
        limit = least + int(share * (most - least))
        for chosen in (knapsack(options, limit), least_loss(options, limit)):
            assert chosen is not None
            assert total(options, chosen)[0] <= limit


# -------------------------------------------------------------------------------------------------- a model's ranks


@pytest.mark.parametrize("method", ["svd", "spatial_svd", "tucker2"])
@pytest.mark.parametrize("metric", ["parameters", "macs"])
def test_the_budget_is_met_and_counted_exactly(program: pare.Program, method: str, metric: str) -> None:
    plan = pare.choose_ranks(program, pare.Budget(**{metric: 0.5}), method=method, align=1)
    small = pare.factorize(program, plan)
    reached, dense = plan.made_by["reached"], plan.made_by["dense"]
    assert counted(small) == (reached["parameters"], reached["macs"])
    assert 0.48 * dense[metric] <= reached[metric] <= 0.5 * dense[metric]
    assert small.proof.moved > 0
    assert set(plan.ranks) | set(plan.made_by["stays_dense"]) == {
        f"{n}.weight" for n in ("stem", "wide", "split", "point", "head")
    }
    assert {r.method for r in plan.ranks.values()} <= {method, "svd"}


def test_uniform_allocation_treats_layers_alike(program: pare.Program) -> None:
    plan = pare.choose_ranks(program, pare.Budget(parameters=0.6), allocation="uniform", align=1)
    small = pare.factorize(program, plan)
    shares = []
    for name in plan.ranks:
        chain = small.module.get_submodule(name.removesuffix(".weight"))
        numel = sum(p.numel() for n, p in chain.named_parameters() if n.endswith("weight"))
        shares.append(numel / program.state[name].numel())
    assert len(shares) >= 4
    assert max(shares) - min(shares) < 0.15
    assert counted(small)[0] <= 0.6 * plan.made_by["dense"]["parameters"]


def test_global_allocation_loses_less_than_uniform(program: pare.Program) -> None:
    lost = {}
    for allocation in ("global", "uniform"):
        plan = pare.choose_ranks(program, pare.Budget(parameters=0.5), allocation=allocation, align=1)  # type: ignore[arg-type]
        lost[allocation] = sum(plan.made_by["losses"].values())
    assert lost["global"] < lost["uniform"]


def test_energy_keeps_the_least_ranks_that_hold_it(program: pare.Program) -> None:
    plan = pare.choose_ranks(program, energy=0.6, align=1, floor=0.0)
    assert plan.ranks
    for name, rank in plan.ranks.items():
        (r,) = rank.ranks
        weight = program.state[name].detach().double()
        groups = 4 if name == "split.weight" else 1
        sigma = torch.linalg.svdvals(weight.reshape(groups, weight.shape[0] // groups, -1)).square().sum(0)
        share = sigma.cumsum(0) / sigma.sum()
        assert share[r - 1] >= 0.6
        assert r == 1 or share[r - 2] < 0.6


def test_ranks_are_aligned_where_the_layer_allows_it(program: pare.Program) -> None:
    plan = pare.choose_ranks(program, pare.Budget(parameters=0.5))
    assert plan.made_by["align"] == 8
    for name, rank in plan.ranks.items():
        full = min(program.state[name].shape[0], program.state[name][0].numel())
        assert rank.ranks[0] % 8 == 0 or full < 16


def test_patterns_choose_layers_and_must_match(program: pare.Program) -> None:
    plan = pare.choose_ranks(program, energy=0.5, include=["split", "wide"], exclude=["spl*"])
    assert set(plan.ranks) == {"wide.weight"}
    assert plan.made_by["stays_dense"]["split.weight"] == "a pattern leaves it out"
    with pytest.raises(UsageError, match=r"'widee', which matches nothing. Did you mean 'wide"):
        pare.choose_ranks(program, energy=0.5, exclude=["widee"])
    assert set(pare.choose_ranks(program, energy=0.5, include="split").ranks) == {"split.weight"}


def test_a_budget_out_of_reach_names_the_nearest(program: pare.Program) -> None:
    with pytest.raises(InfeasibleError, match="parameters must be reducible") as caught:
        pare.choose_ranks(program, pare.Budget(parameters=0.05), floor=0.5)
    nearest = caught.value.nearest
    small = pare.factorize(program, nearest)
    assert counted(small)[0] == nearest.made_by["reached"]["parameters"]


def test_a_budget_that_holds_already_changes_nothing(program: pare.Program) -> None:
    plan = pare.choose_ranks(program, pare.Budget(parameters=10**9))
    assert not plan.ranks
    assert plan.made_by["already_met"]


def test_a_model_in_which_no_rank_saves_says_why() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(NothingToDo, match=r"0.weight: no rank saves anything; 2.weight: no rank saves") as caught:
        pare.choose_ranks(pare.capture(net, torch.zeros(2, 2)), pare.Budget(parameters=0.5))
    assert caught.value.exit_code == 4
    embedding = nn.Sequential(nn.Embedding(9, 8))
    with pytest.raises(NothingToDo, match="embedding reads it"):
        pare.choose_ranks(pare.capture(embedding, torch.zeros(2, 3, dtype=torch.int64)), energy=0.5)


def test_layers_that_would_save_nothing_stay_dense() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    plan = pare.choose_ranks(pare.capture(net, torch.zeros(2, 64)), pare.Budget(parameters=0.4))
    assert set(plan.ranks) == {"0.weight"}
    assert plan.made_by["stays_dense"] == {"2.weight": "no rank saves anything"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "a budget or an energy"),
        ({"energy": 0.5, "budget": pare.Budget(macs=0.5)}, "Got both"),
        ({"energy": 1.0}, "energy must be a fraction"),
        ({"energy": True}, "energy must be a fraction"),
        ({"budget": pare.Budget(channels=0.5)}, "must give parameters or macs"),
        ({"budget": pare.Budget(parameters=0.5, macs=0.5)}, "one of them"),
        ({"energy": 0.5, "method": "lora"}, "method must be one of"),
        ({"energy": 0.5, "choice": "measured"}, "must be given a budget"),
        ({"energy": 0.5, "floor": 1.0}, "floor must be"),
        ({"energy": 0.5, "align": 0}, "align must be"),
        ({"energy": 0.5, "target": "gameboy"}, "gameboy"),
        ({"energy": 0.5, "method": "svd_llm"}, "must be given batches"),
        ({"budget": pare.Budget(macs=0.5), "choice": "measured"}, "loss_batches"),
        ({"budget": pare.Budget(macs=0.5), "weigh": "heavily"}, "weigh must be one of"),
    ],
)
def test_options_are_checked(program: pare.Program, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        pare.choose_ranks(program, **options)


# --------------------------------------------------------------------------------------------------- measured losses


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def held_out(program: pare.Program) -> list[tuple[Tensor, Tensor]]:
    """The dense model's own answers: its loss is 0, so any truncation shows."""
    x = torch.randn(3, 16, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [(one, program.module(one)) for one in x]


def test_a_layer_that_the_loss_does_not_feel_goes_first(program: pare.Program) -> None:
    """Nothing before `point` reaches the output: only a measurement can know that."""
    net = Net().eval()
    with torch.no_grad():
        net.split.weight.mul_(1e-4)
        u, _, vt = torch.linalg.svd(net.point.weight.flatten(1), full_matrices=False)
        net.point.weight.copy_((u * 0.5 ** torch.arange(48) @ vt)[..., None, None])  # so the spectrum would choose it
    deaf = pare.capture(net, INPUT)
    plan = pare.choose_ranks(
        deaf, pare.Budget(parameters=0.42), choice="measured", loss=mean_loss, loss_batches=held_out(deaf), align=1
    )
    spectrum = pare.choose_ranks(deaf, pare.Budget(parameters=0.42), align=1)
    assert "wide.weight" in plan.ranks
    assert "point.weight" in set(spectrum.ranks) - set(plan.ranks)
    small, other = (pare.factorize(deaf, p) for p in (plan, spectrum))
    batches = held_out(deaf)
    loss, worse = (sum(mean_loss(s.module, b).item() for b in batches) for s in (small, other))
    assert loss < worse
    assert counted(small)[0] <= 0.42 * plan.made_by["dense"]["parameters"]
    assert all(v >= 0 for v in plan.made_by["losses"].values())


def test_measured_rises_are_those_of_the_factorized_model(program: pare.Program) -> None:
    """One layer factorized at the chosen rank must show the very loss that its table said."""
    batches = held_out(program)
    plan = pare.choose_ranks(
        program, pare.Budget(parameters=0.9), choice="measured", loss=mean_loss, loss_batches=batches, align=1
    )
    assert plan.ranks
    for name, rank in plan.ranks.items():
        one = pare.factorize(program, Plan(keep={}, ranks={name: rank}))
        loss = float(np.mean([mean_loss(one.module, b).item() for b in batches]))
        assert loss == pytest.approx(plan.made_by["losses"][name], rel=1e-3)


def test_measuring_needs_batches_and_a_finite_loss(program: pare.Program) -> None:
    options: dict[str, Any] = {"choice": "measured", "loss": mean_loss}
    with pytest.raises(RejectedError, match="at least one batch"):
        pare.choose_ranks(program, pare.Budget(macs=0.5), loss_batches=[], **options)
    with pytest.raises(RejectedError, match="must be finite"):
        pare.choose_ranks(
            program, pare.Budget(macs=0.5), loss_batches=[(INPUT, torch.full((2, 10), torch.nan))], **options
        )
    with pytest.raises(UsageError, match="ratios must be"):
        pare.choose_ranks(program, pare.Budget(macs=0.5), loss_batches=held_out(program), ratios=[2], **options)
