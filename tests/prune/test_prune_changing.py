"""Regrowth: the counts, the places and the optimizer state, against the rules of RigL and SET carried out by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import paredown as pare
from paredown.errors import NothingToDo, RejectedError, UsageError
from paredown.granularity import Granularity
from paredown.plan import Mask
from paredown.prune.changing import Changing, ChangingMasks, _grown
from paredown.prune.mask import apply_masks
from paredown.prune.schedule import Gradual, Regrowth, moving_share
from paredown.prune.sparsify import sparsify
from paredown.train import fit
from paredown.train.loop import Hook, Training
from sparse_task import BATCHES, WEIGHTS, batches, program, small_net, sparse, step

RIGL = {"schedule": Regrowth(every=4, end=0.75), "criterion": "random", "allocation": "erk"}


def recorded(**options: Any) -> tuple[list[dict[str, Any]], pare.Pruned]:
    """Per step: dense gradients, weights before and after the step, optimizer state after it."""
    rows: list[dict[str, Any]] = []

    def before(training: Training) -> None:
        parameters = dict(training.module.named_parameters())
        rows.append({"weights": {n: parameters[n].detach().clone() for n in WEIGHTS}})

    def after(training: Training) -> None:
        parameters = dict(training.module.named_parameters())
        rows[-1]["after"] = {n: parameters[n].detach().clone() for n in WEIGHTS}
        rows[-1]["momentum"] = {n: training.optimizer.state[parameters[n]]["momentum_buffer"].clone() for n in WEIGHTS}

    result = sparse(**options, hooks=[Hook(name="record", after_backward=before, after_step=after)])
    return rows, result


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_a_training_too_short_for_a_mask_to_move_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="every must be below"):
        sparse(schedule=name, criterion="random", allocation="erk")


def test_a_share_too_small_to_move_one_connection_is_nothing_to_do() -> None:
    with pytest.raises(NothingToDo, match=r"fraction=0.001.*must move at least one connection"):
        sparse(**{**RIGL, "schedule": Regrowth(every=4, fraction=0.001)})


@pytest.mark.parametrize("by", ["gradient", "random"])
def test_every_weight_keeps_its_number_of_connections(by: str) -> None:
    rows, result = recorded(**{**RIGL, "schedule": Regrowth(by=by, every=4)}, weight_decay=0.0)  # type: ignore[arg-type]
    kept = {n: m.num_kept for n, m in result.plan.masks.items()}
    assert sum(kept.get(n, 0) for n in WEIGHTS) + (64 if "8.weight" not in kept else 0) == 358
    moved = 0
    for earlier, later in pairwise(rows):
        for name, number in kept.items():
            assert int((later["weights"][name] != 0).sum()) <= number
            moved += int(((later["weights"][name] != 0) & (earlier["weights"][name] == 0)).sum())
    assert moved > 20
    for row in rows[-5:]:  # nothing moves any more: all new connections have left zero
        assert {n: int((row["after"][n] != 0).sum()) for n in kept} == kept


@pytest.mark.parametrize("by", ["gradient", "random"])
def test_drop_and_grow_are_those_of_the_paper(by: str) -> None:
    """At every update, from the weights after its step and the dense gradient of its batch: exact sets and counts."""
    net = small_net()
    rng = np.random.default_rng(0)
    first = {n: rng.random(tuple(p.shape)) < 0.3 for n, p in net.named_parameters() if n in WEIGHTS}
    apply_masks(net, {n: Mask.of(k, "element") for n, k in first.items()})
    points = ((4, 0.3), (8, 0.3), (12, 0.3))
    how = Changing(
        points=lambda steps: points, choose=lambda module, kept, density: kept, epochs=2,
        granularity=Granularity.parse("element"), moving=lambda t, n: moving_share(0.4, t / 12), grow_by=by,  # type: ignore[arg-type]
    )  # fmt: skip
    changing = ChangingMasks(how, first)
    rows: list[dict[str, Any]] = []

    def named(training: Training) -> dict[str, nn.Parameter]:
        return {n: p for n, p in training.module.named_parameters() if n in WEIGHTS}

    def backward(training: Training) -> None:
        rows.append({"gradient": {n: p.grad.clone() for n, p in named(training).items()}, "old": changing.kept})

    def stepped(training: Training) -> None:
        rows[-1]["stepped"] = {n: p.detach().clone() for n, p in named(training).items()}

    def updated(training: Training) -> None:
        memory = {n: training.optimizer.state[p]["momentum_buffer"].clone() for n, p in named(training).items()}
        weights = {n: p.detach().clone() for n, p in named(training).items()}
        rows[-1] |= {"new": changing.kept, "weights": weights, "momentum": memory}

    hooks = [
        Hook(name="before", after_backward=backward, after_step=stepped),
        changing.hook("masks"),
        Hook(name="after", after_step=updated),
    ]
    fit(net, batches, step, epochs=2, lr=0.05, hooks=hooks)
    assert len(rows) == 2 * BATCHES
    for t, row in enumerate(rows, start=1):
        for name in WEIGHTS:
            old, new = torch.from_numpy(row["old"][name]), torch.from_numpy(row["new"][name])
            if t not in (4, 8):  # the third update comes where the share has fallen to zero
                assert torch.equal(old, new)
                continue
            k = min(round(0.2 * (1 + math.cos(math.pi * t / 12)) * int(old.sum())), int((~old).sum()))
            assert k > 0
            size = row["stepped"][name].abs()
            dropped = lowest(torch.where(old, size, torch.inf), k)
            assert int(new.sum()) == int(old.sum())
            if by == "gradient":
                grown = lowest(torch.where(~old | dropped, -row["gradient"][name].abs(), torch.inf), k)
                assert torch.equal(new, (old & ~dropped) | grown)
            assert not (old & ~dropped & ~new).any()  # nothing but the smallest is dropped
            fresh = new & ~old
            assert fresh.any()
            assert not row["weights"][name][fresh].any()
            assert not row["momentum"][name][fresh].any()
            assert row["momentum"][name][old & ~dropped].any()


def lowest(values: torch.Tensor, number: int) -> torch.Tensor:
    found = torch.zeros(values.numel(), dtype=torch.bool)
    found[values.reshape(-1).argsort(stable=True)[:number]] = True
    return found.reshape(values.shape)


def test_growth_by_gradient_beats_random_growth_on_a_sparse_target() -> None:
    """A linear map with 8 of 256 weights: RigL finds most of them, a fixed random mask hardly any."""
    g = torch.Generator().manual_seed(0)
    target = torch.zeros(16, 16)
    places = torch.randperm(256, generator=g)[:8]
    target.view(-1)[places] = torch.tensor([1.0, -1.0]).repeat(4)
    xs = [torch.randn(32, 16, generator=g) for _ in range(25)]
    data = [(x, x @ target.T) for x in xs]
    torch.manual_seed(0)
    net = nn.Linear(16, 16, bias=False)
    found = {}
    for name, schedule in (("fixed", "one-shot"), ("rigl", Regrowth(every=5)), ("set", Regrowth(by="random", every=5))):
        result = _trained(net, data, schedule)
        found[name] = int(result.plan.masks["weight"].kept.reshape(-1)[places.numpy()].sum())
    assert found["rigl"] >= 7 > found["set"] >= found["fixed"]


def _trained(net: nn.Module, data: Any, schedule: Any) -> pare.Pruned:
    def squared(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    return sparsify(
        pare.capture(net, torch.zeros(2, 16)), lambda: data, step=squared, density=0.1, criterion="random",
        allocation="uniform", schedule=schedule, epochs=4, lr=0.5, weight_decay=0.0,
    )  # fmt: skip


def test_a_short_last_epoch_still_ends_at_the_density() -> None:
    """The loop counts the first epoch; where later ones are shorter, the last update is made at the end."""
    passes = [0]

    def shrinking() -> Any:
        passes[0] += 1
        every = list(batches())
        return iter(every if passes[0] <= 2 else every[:2])

    result = sparse(schedule=Gradual(updates=4, end=1.0), train_batches=shrinking)
    parameters = dict(result.module.named_parameters())
    assert sum(int((parameters[n] != 0).sum()) for n in WEIGHTS) == 358


@pytest.mark.parametrize("how", [{"criterion": "wanda"}, {"criterion": "l1", "allocation": "uniform", "scope": "row"}])
@pytest.mark.parametrize(
    "schedule", [Regrowth(every=4), Regrowth(by="random", every=4), Gradual(updates=6, regrow=0.4)]
)
def test_growth_keeps_the_density_where_cells_compete_in_their_row(how: dict[str, str], schedule: Any) -> None:
    """A row that grew above its share lost the surplus at the next choice, and others stayed below theirs."""
    rows, result = recorded(**how, schedule=schedule, weight_decay=0.0)
    at_once = sparse(**how, schedule="one-shot", epochs=0)
    for name, mask in at_once.plan.masks.items():
        assert result.plan.masks[name].num_kept == mask.num_kept
        if isinstance(schedule, Gradual):
            each = [m.kept.reshape(len(m.kept), -1).sum(1).tolist() for m in (mask, result.plan.masks[name])]
            assert each[0] == each[1]
    weights = torch.cat([torch.stack([r["after"][n].flatten() != 0 for r in rows]) for n in WEIGHTS], dim=1)
    assert (weights[1:] & ~weights[:-1]).any()  # something grew


def test_growth_in_the_rows_of_a_weight_stored_in_out() -> None:
    """Two groups, [in, out]: every output grows as many of its own inputs as it dropped."""
    dropped = np.zeros((4, 3), dtype=bool)
    dropped[0, 1] = dropped[1, 1] = dropped[2, 0] = True
    grown = _grown(np.arange(12.0).reshape(4, 3), dropped, np.ones((4, 3), dtype=bool), groups=2)
    assert grown.tolist() == [[False, True, False], [False, True, False], [False] * 3, [True, False, False]]


def test_blocks_grow_whole() -> None:
    _, result = recorded(schedule=Gradual(updates=6, regrow=0.4), granularity="4x4")
    for mask in result.plan.masks.values():
        matrix = mask.kept.reshape(mask.shape[0], -1)
        for r in range(0, matrix.shape[0], 4):
            for c in range(0, matrix.shape[1], 4):
                block = matrix[r : r + 4, c : c + 4]
                assert block.all() or not block.any()


def test_nothing_grows_where_an_earlier_plan_has_zeros() -> None:
    first = sparse(density=0.5, epochs=1)
    second = sparse(model=first, density=0.2, schedule=Gradual(updates=6, regrow=0.4), granularity="4x4", epochs=2)
    parameters = dict(second.module.named_parameters())
    for name, mask in second.plan.masks.items():
        assert not (mask.kept & ~first.plan.masks[name].kept).any()
        assert not parameters[name].detach().numpy()[~mask.kept].any()


def test_nan_in_training_is_refused_not_masked() -> None:
    def broken(model: nn.Module, batch: Any) -> torch.Tensor:
        return step(model, batch) * float("nan")

    for criterion in ("l1", "movement"):
        with pytest.raises(RejectedError, match="finite"):
            sparsify(program(), batches, step=broken, density=0.5, epochs=1, criterion=criterion)


@pytest.mark.parametrize("options", [{"schedule": Gradual(updates=6)}, {"criterion": "movement"}, RIGL], ids=str)
def test_an_epoch_that_is_rolled_back_takes_its_masks_with_it(options: dict[str, Any]) -> None:
    """The loss is NaN once, in the second epoch: the epoch begins again with its own masks and half the learning rate."""
    calls, counts = [0], []

    def once_broken(model: nn.Module, batch: Any) -> torch.Tensor:
        calls[0] += 1
        return step(model, batch) * (float("nan") if calls[0] == BATCHES + 6 else 1.0)

    def look(training: Training) -> None:
        parameters = dict(training.module.named_parameters())
        counts.append((training.step, sum(int((parameters[n] != 0).sum()) for n in WEIGHTS)))

    notes: list[str] = []
    result = sparsify(
        program(), batches, step=once_broken, **{"density": 0.25, "epochs": 3, "lr": 0.05, **options},
        hooks=[Hook(name="look", after_step=look)], progress=lambda p: notes.extend(e.note for e in p.history if e.note),
    )  # fmt: skip
    assert any("rolled back" in n for n in notes)
    steps = [s for s, _ in counts]
    assert steps == [*range(BATCHES), *range(BATCHES, BATCHES + 5), *range(BATCHES, 3 * BATCHES)]
    again = counts[BATCHES + 5 :]
    if options is not RIGL:  # the same densities at the same steps, both times
        assert again[:5] == counts[BATCHES : BATCHES + 5]
    assert sum(int((p != 0).sum()) for n, p in result.module.named_parameters() if n in WEIGHTS) == 358
