"""OBS: the sweep against brute force and the published ratios; whole models walked layer after layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paredown.allocate import allocate
from paredown.budget import Budget
from paredown.couple import couple
from paredown.errors import NothingToDo, RejectedError, UsageError
from paredown.examine import examine
from paredown.plan import Mask, Plan
from paredown.program import capture
from paredown.prune import load, obs, save
from paredown.prune.sweep import swept
from paredown.score import score

WIDTH, TOKENS, SEEDS = 256, 4096, 5


# ------------------------------------------------------------------------------------------- the sweep, by brute force


def spread_inputs(seed: int, width: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing


def answered(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """OBS without any of its algebra: column by column, the columns to the right minimise the error by least squares.

    Settling column j to ŵ_j, the free columns F = {j+1, …} move by δ = argmin ‖(δ_F, ŵ_j - w_j)‖_H = -H_FF⁻¹ H_Fj (ŵ_j - w_j).
    """
    work = weight.clone()
    for j in range(work.shape[1]):
        step = torch.where(kept[:, j], 0.0, -work[:, j])
        work[:, j] += step
        free = slice(j + 1, work.shape[1])
        if j + 1 < work.shape[1]:
            work[:, free] -= step[:, None] * torch.linalg.solve(gram[free, free], gram[free, j])[None]
    return work


@pytest.mark.parametrize("block", [1, 5, 128])
def test_the_update_is_least_squares_and_blocks_do_not_matter(block: int) -> None:
    x = spread_inputs(0, 12, 200)
    gram = x.T @ x / len(x)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    kept = torch.rand(7, 12, generator=generator) > 0.4
    found = swept(weight[None], gram[None], kept=kept[None], block=block, damping=0.0)
    torch.testing.assert_close(found.weight[0], answered(weight, gram, kept), rtol=1e-6, atol=1e-8)
    assert found.after < found.before
    change = weight - found.weight[0]
    assert found.after == pytest.approx(float((x @ change.T).square().sum() / len(x)))
    assert found.before == pytest.approx(float((x @ weight.masked_fill(kept, 0).T).square().sum() / len(x)))


@pytest.mark.parametrize(("removed", "block"), [(0, 4), (1, 4), (37, 5), (83, 128), (119, 7)])
def test_exactly_as_many_leave_as_asked_also_among_equal_weights(removed: int, block: int) -> None:
    gram = torch.eye(15, dtype=torch.float64)[None].repeat(2, 1, 1)
    found = swept(torch.ones(2, 4, 15), gram, removed=removed, block=block)
    assert int((~found.kept).sum()) == removed
    again = swept(torch.ones(2, 4, 15), gram, removed=removed, block=block)
    assert torch.equal(found.kept, again.kept)
    assert bool((found.weight[~found.kept] == 0).all())


def test_patterns_are_chosen_by_the_weights_as_updated() -> None:
    """Against the plain loop: at every group of four inputs the two smallest w² / U_jj² of the present weights leave."""
    x = spread_inputs(3, 24, 300)
    gram = x.T @ x / len(x)
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = swept(weight[None], gram[None], pattern=(2, 4), inputs=24, block=10, damping=0.0)
    held = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    work, kept = weight.clone(), torch.ones(5, 24, dtype=torch.bool)
    for j in range(24):
        if j % 4 == 0:
            saliency = work[:, j : j + 4] ** 2 / held.diagonal()[j : j + 4] ** 2
            kept[torch.arange(5)[:, None], j + saliency.argsort(dim=1)[:, :2]] = False
        error = torch.where(kept[:, j], 0.0, work[:, j]) / held[j, j]
        work[:, j:] -= error[:, None] * held[j, j:]
    assert torch.equal(found.kept[0], kept)
    torch.testing.assert_close(found.weight[0], work.masked_fill(~kept, 0), rtol=1e-6, atol=1e-8)
    assert not torch.equal(kept, swept(weight[None], torch.eye(24).double()[None], pattern=(2, 4), inputs=24).kept[0])


def test_dead_inputs_leave_first_and_small_ones_before() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, 1.0, 0.0])).double()
    weight = torch.tensor([[0.1, 5.0, 0.2, 4.0], [0.3, 3.0, 0.4, 6.0]])
    found = swept(weight[None], gram[None], removed=2)
    assert found.kept[0].tolist() == [[True, True, True, False], [True, False, True, True]]
    torch.testing.assert_close(found.weight[0].float(), torch.where(found.kept[0], weight, 0.0))


# --------------------------------------------------------------------------------------------- METHODS 12.1, as ratios


def published(kind: str, seed: int) -> tuple[nn.Linear, Tensor]:
    """A 256 × 256 layer and 4096 inputs: power-law correlated with 4 outlier channels × 15, or white."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    if kind == "corr":
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
        x = (x * torch.arange(1, WIDTH + 1) ** -0.5) @ basis.T
        x[:, torch.randperm(WIDTH, generator=generator)[:4]] *= 15
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
    return layer, x


def relative_error(dense: Tensor, pruned: Tensor, x: Tensor) -> float:
    return float((x @ (dense - pruned).T).square().sum() / (x @ dense.T).square().sum())


def errors(kind: str, granularity: str, density: float) -> dict[str, float]:
    """Mean over five seeds of ‖(W - W')X‖² / ‖WX‖² for each method, every one through the product's own verbs."""
    found: dict[str, list[float]] = {"l1": [], "wanda": [], "obs": []}
    for seed in range(SEEDS):
        layer, x = published(kind, seed)
        program = capture(layer, x[:2], train=False)
        coupling, cost = couple(program), examine(program)
        dense = layer.weight.detach()
        for criterion in ("l1", "wanda"):
            scores = score(program, coupling, criterion, granularity=granularity, batches=[x])
            budget = None if ":" in granularity else Budget(density=density)
            kept = allocate(coupling, scores, cost, budget).masks["weight"].kept
            assert kept.mean() == pytest.approx(density, abs=2e-3)
            found[criterion].append(relative_error(dense, dense * torch.from_numpy(kept), x))
        pruned = obs(program, lambda x=x: [x], density=density, granularity=granularity)
        weight = pruned.module.weight.detach()
        assert float((weight == 0).float().mean()) == pytest.approx(1 - density, abs=2e-3)
        found["obs"].append(relative_error(dense, weight, x))
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize(("granularity", "density"), [("element", 0.5), ("element", 0.3), ("2:4", 0.5)])
def test_data_helps_on_correlated_inputs_and_only_there(granularity: str, density: float) -> None:
    corr = errors("corr", granularity, density)
    assert corr["wanda"] <= 0.4 * corr["l1"]
    assert corr["obs"] <= 0.75 * corr["wanda"]
    white = errors("iid", granularity, density)  # the negative control: a win here would be a leak
    assert max(white.values()) <= 1.15 * min(white.values())
    expected = {("element", 0.5): 0.072, ("element", 0.3): 0.218, ("2:4", 0.5): 0.133}[granularity, density]
    assert white["l1"] == pytest.approx(expected, rel=0.1)


# -------------------------------------------------------------------------------------------------------- whole models


class Mixed(nn.Module):
    """Ordinary, grouped, depthwise and transposed convolutions, a shared linear layer, attention, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.shared = nn.Linear(8, 8)
        self.product = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(torch.relu(self.depthwise(torch.relu(self.grouped(torch.relu(self.norm(self.first(x))))))))
        tokens = h.flatten(2).transpose(1, 2)
        tokens = tokens + self.attend(tokens, tokens, tokens, need_weights=False)[0]
        return self.shared(torch.relu(self.shared(tokens))) @ self.product


def mixed() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = Mixed().eval()
    x = torch.randn(24, 3, 8, 8)
    x[:, 1] = 0.7 * x[:, 0] + 0.3 * x[:, 1]
    return net, x


def test_every_kind_of_layer_is_pruned_exactly_and_answers() -> None:
    net, x = mixed()
    program = capture(net, x[:2], train=False)
    before = {n: t.clone() for n, t in program.state.items()}
    pruned = obs(program, lambda: [x[:12], x[12:]], density=0.6)
    names = ["first", "grouped", "depthwise", "up", "attend.out_proj", "shared"]
    every = {*(f"{n}.weight" for n in names), "attend.in_proj_weight", "product"}
    assert set(pruned.plan.masks) == every == set(pruned.fits)
    for name in every:
        weight = pruned.module.get_parameter(name)
        gone = int((weight == 0).sum())
        assert gone == round(0.4 * weight.numel()) == int((~pruned.plan.masks[name].kept).sum())
    better = [n for n, fit in pruned.fits.items() if fit.after < fit.before]
    assert len(better) >= len(every) - 1
    for name, tensor in program.state.items():
        assert torch.equal(tensor, before[name])
    others = {n for n, _ in net.named_parameters()} - every
    for name in others:
        assert torch.equal(pruned.module.get_parameter(name), net.get_parameter(name))
    only_masks = {n: net.get_parameter(n).detach() * torch.from_numpy(m.kept) for n, m in pruned.plan.masks.items()}
    masked = torch.func.functional_call(net, only_masks, (x,))
    with torch.no_grad():
        assert float((pruned.module(x) - net(x)).square().mean()) < 0.8 * float((masked - net(x)).square().mean())
    assert pruned.program is program
    assert pruned.proof.shown == ("masks",)
    assert pruned.proof.own_move is not None and pruned.proof.own_move > 0


def test_later_layers_see_what_earlier_ones_became() -> None:
    """The second layer's fit is measured on inputs from the pruned first layer, not from the dense one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
    x = spread_inputs(5, 12, 256).float()
    program = capture(net, x[:2], train=False)
    both = obs(program, lambda: [x], density=0.4)
    alone = obs(program, lambda: [x], density=0.4, include=["2"])
    assert set(alone.plan.masks) == {"2.weight"}
    hidden = torch.relu(both.module[0](x)).detach().double()
    gram = hidden.T @ hidden / len(hidden)
    expected = swept(net[2].weight.detach()[None], gram[None], removed=36)
    torch.testing.assert_close(both.module[2].weight.detach().double(), expected.weight[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(alone.module[2].weight, both.module[2].weight, atol=1e-3)


def test_given_masks_are_kept_and_answered(tmp_path: Path) -> None:
    """Blocks chosen by any criterion, then answered by OBS; saved and loaded in the user's class."""
    net, x = mixed()
    program = capture(net, x[:2], train=False)
    coupling, cost = couple(program), examine(program)
    scores = score(program, coupling, "l2", granularity="4x1")
    plan = allocate(coupling, scores, cost, Budget(density=0.5), leave_out=("depthwise",))
    pruned = obs(program, lambda: [x], masks=plan.masks)
    assert pruned.plan.masks.keys() == plan.masks.keys()
    assert all(pruned.plan.masks[n].bits == plan.masks[n].bits for n in plan.masks)
    assert {m.granularity for m in pruned.plan.masks.values()} == {"4x1"}
    assert sum(f.after < f.before for f in pruned.fits.values()) >= len(pruned.fits) - 1
    save(pruned, tmp_path / "small")
    again = load(tmp_path / "small", Mixed())
    torch.testing.assert_close(again.eval()(x), pruned.module(x))


def test_two_of_four_input_channels_at_every_tap() -> None:
    net, x = mixed()
    pruned = obs(capture(net, x[:2], train=False), lambda: [x], granularity="2:4")
    kept = pruned.plan.masks["grouped.weight"].kept  # 4 inputs per group
    assert bool((kept.sum(axis=1) == 2).all())
    kept = pruned.plan.masks["first.weight"].kept  # 3 inputs: the rest of a group keeps two
    assert bool((kept.sum(axis=1) == 2).all())
    assert "depthwise.weight" not in pruned.plan.masks
    assert any("product" in note and "no meaning" in note for note in pruned.notes)
    kept = pruned.plan.masks["attend.in_proj_weight"].kept
    assert bool((kept.reshape(24, 2, 4).sum(axis=2) == 2).all())


def test_a_step_gives_the_batches_and_density_can_be_by_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(40, 6)

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    batch = (x, torch.zeros(40, dtype=torch.long))
    program = capture(net, x[:2], train=False)
    pruned = obs(program, lambda: [batch], step=step, density={"0.weight": 0.5})
    assert set(pruned.plan.masks) == {"0.weight"}
    assert torch.equal(pruned.module[0].weight, obs(program, lambda: [x], density={"0.weight": 0.5}).module[0].weight)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 8)
            self.middle = nn.Linear(8, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.words.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.relu(self.middle(self.words(tokens))))

    torch.manual_seed(0)
    net = Tied()
    tokens = torch.randint(0, 20, (16, 7))
    pruned = obs(capture(net, tokens, train=False), lambda: [tokens])
    assert pruned.module.head.weight is pruned.module.words.weight
    assert len(pruned.plan.masks) == 2


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"granularity": "4x1"}, UsageError, "element or N:M"),
        ({"density": 0.0}, UsageError, "density"),
        ({"density": {"9.weight": 0.5}}, UsageError, r"9\.weight"),
        ({"granularity": "2:4", "density": 0.3}, UsageError, "left out with 2:4"),
        ({"damping": float("nan")}, UsageError, "damping"),
        ({"block": 0}, UsageError, "block"),
        ({"include": ["nothing.*"]}, UsageError, "matches nothing"),
        ({"masks": {"0.weight": Mask.of(np.ones((2, 2), dtype=bool), "element")}}, UsageError, "fit its parameter"),
        ({"density": 1.0}, NothingToDo, "keep all"),
        ({"exclude": ["*"]}, UsageError, "weights to mask"),
    ],
)
def test_wrong_use_is_refused(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(8, 6)
    with pytest.raises(kind, match=text):
        obs(capture(net, x, train=False), lambda: [x], **options)


@pytest.mark.parametrize(
    ("batches", "text"), [([], "at least one"), ([torch.full((8, 6), float("nan"))], r"0\.weight")]
)
def test_bad_data_is_refused(batches: list[Tensor], text: str) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(RejectedError, match=text):
        obs(capture(net, torch.randn(8, 6), train=False), lambda: batches)


def test_the_plan_says_how_it_was_made() -> None:
    net = nn.Linear(6, 5)
    x = torch.randn(8, 6)
    plan = obs(capture(net, x, train=False), lambda: [x]).plan
    assert plan.made_by["verb"] == "obs"
    bits = {m.digest: m.bits for m in plan.masks.values()}
    assert Plan.from_json(plan.to_json(), bits) == plan
