"""refit against least squares itself: the cost of a unit is what the best fit of the others leaves, by numpy's lstsq."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from paredown.allocate import allocate
from paredown.budget import Budget
from paredown.couple import couple
from paredown.errors import UsageError
from paredown.examine import examine
from paredown.program import capture
from paredown.score import score
from paredown.search import sensitivity


def left_over(x: np.ndarray, w: np.ndarray, kept: list[int]) -> float:
    """min over W' of Σ‖W x - W' x_kept‖² / Σ‖W x‖²; x [N, K], w [out, K]."""
    y = x @ w.T
    fit = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
    return float(((y - x[:, kept] @ fit) ** 2).sum() / (y**2).sum())


def linears(inner: int = 6) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, inner), nn.ReLU(), nn.Linear(inner, 4)).eval(), torch.randn(400, 5)


def test_the_first_to_leave_costs_what_the_best_fit_leaves() -> None:
    net, images = linears()
    program = capture(net, images[:2])
    scores = score(program, couple(program), "refit", batches=[images], damping=0.0, at_once=0.0).by_space
    found = scores["0.weight[0]"]
    hidden = torch.relu(net[0](images)).detach().double().numpy()
    weight = net[2].weight.detach().double().numpy()
    alone = [left_over(hidden, weight, [k for k in range(6) if k != c]) for c in range(6)]
    assert int(np.argmin(found)) == int(np.argmin(alone))
    assert found.min() == pytest.approx(min(alone), rel=1e-6)
    order = list(np.argsort(found))
    for gone in range(1, 6):  # and so on: the score is what all that left costs together
        assert found[order[gone - 1]] == pytest.approx(left_over(hidden, weight, order[gone:]), rel=1e-5)
    assert found.max() == pytest.approx(1.0, rel=1e-5)  # nothing left: all is lost


def test_a_channel_that_others_can_say_is_worth_nothing_whatever_its_size() -> None:
    net, images = linears(4)
    with torch.no_grad():
        net[0].weight[3] = 5 * net[0].weight[1]
        net[0].bias[3] = 5 * net[0].bias[1]
    program = capture(net, images[:2])
    coupling = couple(program)
    found = score(program, coupling, "refit", batches=[images]).by_space["0.weight[0]"]
    assert sorted(found)[0] < 1e-3 < sorted(found)[1]
    assert int(np.argmin(found)) in (1, 3)
    assert int(np.argmax(score(program, coupling, "l1").by_space["0.weight[0]"])) == 3  # its size says the opposite


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_by_their_patches_and_the_batch_norm_behind(groups: int) -> None:
    torch.manual_seed(1)
    first, second, norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2, groups=groups, bias=False), nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight, 0.2, 3.0)
    norm.running_var.uniform_(0.2, 2.0)
    net = nn.Sequential(first, nn.ReLU(), second, norm, nn.Conv2d(4, 2, 1)).eval()
    images = torch.randn(24, 3, 10, 10)
    program = capture(net, images[:2])
    coupling = couple(program)
    space = next(s for s in coupling.spaces if s.name == "0.weight[0]")
    options = {"damping": 0.0, "at_once": 0.0, "positions_per_sample": 1000}
    found = score(program, coupling, "refit", batches=[images], **options).by_space[space.name]
    patches = nn.functional.unfold(torch.relu(first(images)), 3, stride=2).movedim(1, 2).flatten(0, 1)
    x = patches.detach().double().numpy().reshape(len(patches), groups, -1)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double().numpy()
    w = (second.weight.flatten(1).detach().double().numpy() * scale[:, None]).reshape(groups, 4 // groups, -1)
    reads = next(f for f in space.footprints if f.parameter == "2.weight" and f.role == "read" and f.axis == 1)
    alone = []
    for unit in range(len(space)):
        gone = {9 * int(i) + tap for i in reads.indices[unit] for tap in range(9)}
        kept = [k for k in range(x.shape[2]) if k not in gone]
        alone.append(sum(left_over(x[:, g], w[g], kept) for g in range(groups)))
    assert found.min() == pytest.approx(min(alone), rel=1e-5)
    assert int(np.argmin(found)) == int(np.argmin(alone))


class Twice(nn.Module):
    """The same channels side by side, read by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        return self.second(torch.cat([hidden, hidden.square()], 1))


def test_a_unit_that_one_layer_reads_twice_leaves_with_both_columns() -> None:
    torch.manual_seed(0)
    net, images = Twice().eval(), torch.randn(300, 5)
    program = capture(net, images[:2])
    coupling = couple(program)
    (space,) = [s for s in coupling.spaces if any(f.parameter == "second.weight" and f.axis == 1 for f in s.footprints)]
    found = score(program, coupling, "refit", batches=[images], damping=0.0, at_once=0.0).by_space[space.name]
    hidden = torch.relu(net.first(images)).detach().double()
    x, w = torch.cat([hidden, hidden.square()], 1).numpy(), net.second.weight.detach().double().numpy()
    alone = [left_over(x, w, [k for k in range(8) if k % 4 != c]) for c in range(4)]
    assert found.min() == pytest.approx(min(alone), rel=1e-5)
    assert int(np.argmin(found)) == int(np.argmin(alone))


def test_what_cannot_be_read_falls_back_with_its_name() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2)).eval()
    program = capture(net, torch.randn(2, 2, 4, 4))
    with pytest.warns(UserWarning, match=r"falls back to l2 .* 0\.weight\[0\]"):
        found = score(program, couple(program), "refit", batches=[torch.randn(4, 2, 4, 4)])
    assert found.by_space["0.weight[0]"] == pytest.approx(
        net[0].weight.detach().square().sum((1, 2, 3)).double().numpy()
    )


@pytest.mark.parametrize(
    "options", [{"damping": -1.0}, {"at_once": 1.0}, {"positions_per_sample": 0}, {"damping": True}]
)
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    net, images = linears()
    program = capture(net, images[:2])
    with pytest.raises(UsageError, match=next(iter(options))):
        score(program, couple(program), "refit", batches=[images], **options)


def test_a_repaired_point_is_the_error_of_the_best_fit() -> None:
    net, images = linears()
    program = capture(net, images[:2])
    coupling = couple(program)
    scores = score(program, coupling, "refit", batches=[images], damping=0.0, at_once=0.0)
    given = {"distance": "mse", "batches": [images], "amounts": [0.5]}
    cut = sensitivity(program, coupling, scores, **given).increase["0.weight[0]"][3]
    fitted = sensitivity(program, coupling, scores, **given, repair=True)
    kept = [int(k) for k in np.argsort(scores.by_space["0.weight[0]"])[3:]]
    hidden = torch.relu(net[0](images)).detach().double().numpy()
    weight, bias = net[2].weight.detach().double().numpy(), net[2].bias.detach().double().numpy()
    lost = left_over(hidden, weight, kept) * ((hidden @ weight.T) ** 2).sum()
    wanted = lost / ((hidden @ weight.T + bias) ** 2).sum()
    assert fitted.increase["0.weight[0]"][3] == pytest.approx(wanted, rel=1e-2)  # a ridge of 1e-3
    assert cut is not None and cut > 1.5 * wanted
    assert fitted.made_by["repair"] is True
    plan = allocate(
        coupling, scores, examine(program), Budget(channels=0.5), allocation="knapsack", sensitivity=fitted, align=1
    )
    assert len(plan.keep["0.weight"][0]) == 3


def test_repair_refuses_what_it_cannot_do(tmp_path) -> None:
    net, images = linears()
    program = capture(net, images[:2])
    coupling = couple(program)
    cells = score(program, coupling, "l1", granularity="element")
    with pytest.raises(UsageError, match="channels or heads"):
        sensitivity(program, coupling, cells, distance="mse", batches=[images], repair=True)
    units = score(program, coupling, "l1")
    log = tmp_path / "log.jsonl"
    plain = sensitivity(program, coupling, units, distance="mse", batches=[images], amounts=[0.5], journal=log)
    again = sensitivity(
        program, coupling, units, distance="mse", batches=[images], amounts=[0.5], journal=log, repair=True
    )
    assert plain.increase != again.increase  # a journal of the one is not read as the other


def damped_left_over(x: np.ndarray, w: np.ndarray, kept: list[int], damping: float) -> float:
    """The same with λ‖W' - W‖² (W' is 0 where not kept), by lstsq on rows of x and of √λ I stacked; over mean ‖W x‖²."""
    amount = np.sqrt(damping * (x**2).mean(0).mean() * len(x))
    wide = np.concatenate([x, amount * np.eye(x.shape[1])])
    y = wide @ w.T
    fit = np.linalg.lstsq(wide[:, kept], y, rcond=None)[0]
    return float(((y - wide[:, kept] @ fit) ** 2).sum() / ((x @ w.T) ** 2).sum())


@pytest.mark.parametrize("at_once", [0.0, 0.3])
def test_fewer_positions_than_inputs(at_once: float) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    with torch.no_grad():
        net[0].bias.fill_(0.5)
        net[0].bias[4] = -100.0  # a dead channel: inputs that are always 0
    images = torch.randn(2, 3, 9, 9)
    program = capture(net, images)
    coupling = couple(program)
    options = {"damping": 0.01, "at_once": at_once, "positions_per_sample": 1000}
    found = score(program, coupling, "refit", batches=[images], **options).by_space["0.weight[0]"]
    patches = nn.functional.unfold(net[1](net[0](images)), 3).movedim(1, 2).flatten(0, 1)
    x, w = patches.detach().double().numpy(), net[2].weight.detach().double().flatten(1).numpy()
    assert x.shape == (50, 108)  # 50 positions, 108 inputs
    w[:, (x == 0).all(0)] = 0.0  # nothing is lost with what reads a dead channel
    order = np.argsort(found, kind="stable")
    assert order[0] == 4
    assert found[4] == pytest.approx(0.0, abs=1e-9)

    def without(units: list[int]) -> float:
        kept = [k for k in range(108) if k // 9 not in units]
        return damped_left_over(x, w, kept, 0.01)

    gone: list[int] = []
    for unit in order.tolist()[:-1]:
        rest = [u for u in range(12) if u not in gone]
        if not at_once:
            assert unit == min(rest, key=lambda u: without([*gone, u]))  # the best one leaves, each time
        gone.append(unit)  # also of those that leave together: what all so far cost together
        assert found[unit] == pytest.approx(without(gone), rel=1e-5, abs=1e-9)


def test_units_that_can_say_one_another_do_not_leave_together() -> None:
    torch.manual_seed(0)
    net, images = linears(16)
    with torch.no_grad():  # 8 channels, each of them twice
        net[0].weight[8:], net[0].bias[8:] = net[0].weight[:8].clone(), net[0].bias[:8].clone()
        net[2].weight[:, 8:] *= 1.5
    program = capture(net, images[:2])
    found = score(program, couple(program), "refit", batches=[images], at_once=0.9).by_space["0.weight[0]"]
    first = set(np.argsort(found)[:8].tolist())
    assert {u % 8 for u in first} == set(range(8))  # one of each pair, though at the start all 16 look free
    assert 5 * sorted(found)[7] < sorted(found)[8]
