"""sparsify: what every schedule must hold, whatever the criterion and the granularity."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import paredown as pare
from paredown.errors import NothingToDo, UsageError
from paredown.prune.movement import SoftMovement
from paredown.prune.schedule import Gradual, Iterative, Lottery, OneShot
from paredown.prune.sparsify import sparsify
from sparse_task import BATCHES, WAYS, WEIGHTS, batches, nonzero, program, small_net, sparse, step, watch

TOTAL = 1432


@pytest.mark.parametrize("way", [w for w in WAYS if w != "soft movement"])
def test_zeros_hold_and_density_is_exact(way: str) -> None:
    """Momentum and strong weight decay revive nothing; the number of zeros is that of the plan."""
    before = {n: t.clone() for n, t in program().state.items()}
    result = sparse(**WAYS[way], momentum=0.95, weight_decay=0.01)
    parameters = dict(result.module.named_parameters())
    for name, mask in result.plan.masks.items():
        assert not parameters[name].detach().numpy()[~mask.kept].any()
        assert parameters[name].detach().numpy()[mask.kept].all()
    kept = sum(nonzero(result.module).values())
    if WAYS[way].get("density", 0.25) is not None:
        cell = {"4x4": 16, "kernel": 9}.get(WAYS[way].get("granularity", ""), 0)
        assert abs(kept - round(0.25 * TOTAL)) <= cell / 2
    assert all(torch.equal(before[n], t) for n, t in program().state.items())  # the model given is untouched
    assert any(not torch.equal(p, before[n]) for n, p in result.module.named_parameters())


@pytest.mark.parametrize("way", [Gradual(updates=6), Iterative(rounds=4), Iterative(rounds=3, spacing="linear")])
def test_density_is_exact_at_every_update(way: Gradual | Iterative) -> None:
    hook, seen = watch(lambda training: sum(nonzero(training.module).values()))
    sparse(schedule=way, hooks=[hook])
    points = way.points(0.25, 3 * BATCHES)
    expected = [
        TOTAL - round((1 - next((d for t, d in reversed(points) if t <= done), 1.0)) * TOTAL) for done in range(1, 25)
    ]
    assert len(set(expected)) >= 3
    assert seen == expected


def test_what_leaves_stays_out_without_regrowth() -> None:
    hook, seen = watch(
        lambda training: {n: (dict(training.module.named_parameters())[n] != 0).clone() for n in WEIGHTS}
    )
    sparse(schedule=Gradual(updates=8), hooks=[hook])
    for earlier, later in pairwise(seen):
        assert not any(bool((later[n] & ~earlier[n]).any()) for n in WEIGHTS)


def test_regrowth_brings_some_back() -> None:
    hook, seen = watch(
        lambda training: {n: (dict(training.module.named_parameters())[n] != 0).clone() for n in WEIGHTS}
    )
    sparse(schedule=Gradual(updates=8, regrow=0.3), hooks=[hook], weight_decay=0.0)
    back = sum(int((later[n] & ~earlier[n]).sum()) for earlier, later in pairwise(seen) for n in WEIGHTS)
    assert back > 20
    assert sum(int(seen[-1][n].sum()) for n in WEIGHTS) == round(0.25 * TOTAL)


def test_one_shot_by_magnitude_keeps_the_largest() -> None:
    result = sparse(schedule="one-shot", floor=0.0)
    every = np.concatenate([program().state[n].detach().abs().numpy().ravel() for n in WEIGHTS])
    least = np.sort(every)[-round(0.25 * TOTAL)]
    for name in WEIGHTS:
        assert np.array_equal(result.plan.masks[name].kept, program().state[name].detach().abs().numpy() >= least)


def test_gradual_chooses_on_the_weights_as_they_are() -> None:
    one_shot, gradual = (sparse(schedule=s, lr=0.2) for s in ("one-shot", "gradual"))
    assert any(one_shot.plan.masks[n].digest != gradual.plan.masks[n].digest for n in WEIGHTS)


def test_levels_are_shares_of_what_the_level_before_left() -> None:
    result = sparse(density=(0.75, 0.67), epochs=1)
    assert sum(nonzero(result.module).values()) == TOTAL - round((1 - 0.75 * 0.67) * TOTAL)
    first = sparse(density=0.75, epochs=1)
    for name in WEIGHTS:
        assert not (result.plan.masks[name].kept & ~first.plan.masks[name].kept).any()
    assert len(result.plan.made_by["levels"]) == 2


def test_a_pruned_model_is_pruned_further() -> None:
    first = sparse(density=0.5, epochs=1)
    second = sparse(model=first, density=0.25, epochs=1)
    assert second.program is first.program
    assert sum(nonzero(second.module).values()) == round(0.25 * TOTAL)
    for name in WEIGHTS:
        assert not (second.plan.masks[name].kept & ~first.plan.masks[name].kept).any()


def test_channels_in_two_levels_are_those_of_the_talk() -> None:
    """25 % of the filters, then 33 % of the rest: half of them are gone, physically, with one proof."""
    levels = [pare.Budget(channels=0.75), pare.Budget(channels=0.67)]
    result = sparse(granularity="channel", density=None, budget=levels, align=1, epochs=1)
    assert result.module[0].weight.shape == (4, 3, 3, 3)
    assert result.module[3].weight.shape == (8, 4, 3, 3)
    assert result.proof.max_error <= 1e-4 * result.proof.scale and result.proof.moved > 0
    assert result.program is program()


def test_rows_leave_physically() -> None:
    result = sparse(granularity="row", exclude=["8.weight"])
    assert result.module[3].weight.shape[0] < 16
    assert result.module(torch.zeros(3, 3, 8, 8)).shape == (3, 4)


def test_exclude_include_and_leave_out() -> None:
    assert set(sparse(exclude=["0.*"]).plan.masks) == {"3.weight", "8.weight"}
    assert set(sparse(include=["3.*"]).plan.masks) == {"3.weight"}
    assert set(sparse(leave_out=["first", "last"]).plan.masks) == {"3.weight"}


def test_frozen_weights_stay_whole() -> None:
    net = small_net()
    net[0].requires_grad_(False)
    result = sparse(model=pare.capture(net, torch.zeros(2, 3, 8, 8)))
    assert "0.weight" not in result.plan.masks
    assert torch.equal(result.module[0].weight, net[0].weight)


def test_tied_weights_have_one_mask() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    torch.manual_seed(0)
    data = [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(6)]
    for criterion in ("l1", "movement", "accumulated_movement"):
        result = sparsify(
            pare.capture(Tied(), torch.zeros(2, 8)), lambda: data, step=step, density=0.5, epochs=2, criterion=criterion
        )
        assert result.module.a.weight is result.module.b.weight
        assert int((result.module.a.weight != 0).sum() + (result.module.c.weight != 0).sum()) == 48


def test_a_loss_that_grows_with_the_zeros_is_no_divergence() -> None:
    """A network that has learnt its data: the loss rises far above ten times its start, as it must."""
    trained = pare.recover(
        sparse(density=0.99, schedule="one-shot", epochs=8, lr=0.1), batches, step=step, epochs=8, lr=0.1
    )
    losses: list[float] = []
    notes: list[str] = []

    def look(progress: Any) -> None:
        losses.append(progress.loss)
        notes.extend(e.note for e in progress.history)

    sparse(model=trained, density=0.02, epochs=2, lr=1e-4, schedule=Gradual(end=0.3), progress=look, floor=0.0)
    assert max(losses) > 10 * np.mean(losses[:3])
    assert not any(notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": None}, "must be given density"),
        ({"density": 25}, "share in"),
        ({"density": 1.0}, "share in"),
        ({"density": ()}, "at least one level"),
        ({"granularity": "2:4"}, "no amount"),
        ({"criterion": "soft_movement"}, "no amount"),
        ({"granularity": "layer"}, "Got layer"),
        ({"granularity": "channel"}, "must be given budget"),
        (
            {"granularity": "channel", "density": None, "budget": pare.Budget(channels=0.5), "schedule": "gradual"},
            "one-shot",
        ),
        (
            {"granularity": "channel", "density": None, "budget": pare.Budget(channels=0.5), "criterion": "movement"},
            "score units",
        ),
        ({"criterion": "gates"}, "used with channels"),
        ({"criterion": "movement", "schedule": "lottery"}, "gradual"),
        ({"criterion": "gradient_drift", "schedule": "one-shot"}, "before its first choice"),
        ({"granularity": "2:4", "density": None, "schedule": "gradual"}, "N:M"),
        ({"align": 8}, "align"),
        ({"schedule": "cosine"}, "schedule must be"),
        ({"exclude": ["nothing*"]}, "nothing"),
        ({"schedule": Lottery(rounds=1, rewind_step=10_000), "epochs": 1}, "rewind_step"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sparse(**options)


def test_soft_movement_that_prunes_nothing_says_so() -> None:
    with pytest.raises(NothingToDo, match="left every weight"):
        sparse(density=None, criterion=SoftMovement(score_lr=1e-6))


def test_no_epochs_is_one_shot_without_training() -> None:
    result = sparse(schedule="one-shot", epochs=0, batch_norm_batches=0)
    for name in WEIGHTS:
        kept = result.plan.masks[name].kept
        assert np.array_equal(
            dict(result.module.named_parameters())[name].detach().numpy()[kept],
            program().state[name].detach().numpy()[kept],
        )


def test_several_rounds_before_the_training_see_their_own_mask() -> None:
    once, often = (sparse(schedule=OneShot(rounds=r), epochs=0) for r in (1, 5))
    assert {n: m.digest for n, m in once.plan.masks.items()} == {n: m.digest for n, m in often.plan.masks.items()}


@pytest.mark.parametrize("schedule", ["one-shot", "iterative"])
def test_wanda_is_compared_within_each_output_unless_it_is_asked_otherwise(schedule: str) -> None:
    """A ranking of the whole model is another, worse method: every output keeps its own share."""
    result = sparse(criterion="wanda", schedule=schedule, epochs=0 if schedule == "one-shot" else 1)
    assert result.plan.masks.keys() == set(WEIGHTS)
    for name, mask in result.plan.masks.items():
        by_output = mask.kept.reshape(len(mask.kept), -1)
        inputs = by_output.shape[1]
        assert (by_output.sum(axis=1) == inputs - round(0.75 * inputs)).all(), name
    counts = [m.kept.reshape(len(m.kept), -1).sum(axis=1) for m in sparse(criterion="wanda", allocation="global", schedule="one-shot", epochs=0).plan.masks.values()]  # fmt: skip
    assert any(len(set(c.tolist())) > 1 for c in counts)


class InOut(nn.Module):
    """A weight stored [in, out], and one stored [out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(8, 12)), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(x @ self.first))


def test_weights_stored_in_out_are_masked_by_output_or_left_out() -> None:
    torch.manual_seed(0)
    model = pare.capture(InOut(), torch.zeros(2, 8))
    data = [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(4)]
    given = {"model": model, "train_batches": lambda: data, "epochs": 1}
    kept = sparse(**given, criterion="wanda").plan.masks["first"].kept
    assert (kept.sum(axis=0) == 2).all() and len(set(kept.sum(axis=1).tolist())) > 1
    for criterion in ("sr_ste", "l1"):
        with pytest.warns(UserWarning, match="2:4 has no meaning: first"):
            result = sparse(**given, criterion=criterion, granularity="2:4", density=None)
        assert result.plan.masks.keys() == {"last.weight"}
        assert (result.plan.masks["last.weight"].kept.reshape(4, 3, 4).sum(axis=2) == 2).all()
    with pytest.warns(UserWarning, match="row has no meaning: first"):
        assert "first" not in sparse(**given, criterion="movement", granularity="row", density=0.5).plan.masks


def test_wanda_in_turn_masks_the_layers_before_by_the_share_of_each_round() -> None:
    """One round is score and allocate at the density; a gradual schedule comes to as many zeros."""
    options: dict[str, Any] = {
        "criterion": "wanda",
        "sequential": True,
        "epochs": 1,
        "lr": 1e-9,
        "batch_norm_batches": 0,
    }
    found = sparse(schedule=OneShot(rounds=1), density=0.5, **options)
    coupling, cost = pare.couple(program()), pare.examine(program())
    torch.manual_seed(0)
    data = list(batches())
    scores = pare.score(program(), coupling, "wanda", granularity="element", batches=data, loss=step, sequential=True, density=0.5)  # fmt: skip
    plan = pare.allocate(coupling, scores, cost, pare.Budget(density=0.5))
    assert {n: m.digest for n, m in found.plan.masks.items()} == {n: m.digest for n, m in plan.masks.items()}
    gradual = sparse(schedule=Gradual(updates=3), density=0.5, **options)
    assert nonzero(gradual.module) == nonzero(found.module)
