"""Criteria of the table under schedules: on the weights as they are, with a teacher listening, in many rounds."""

from __future__ import annotations

import pytest
import torch

import paredown as pare
from paredown.prune.schedule import OneShot
from paredown.prune.scratch import fresh
from sparse_task import WEIGHTS, nonzero, small_net, sparse

TOTAL = 1432


@pytest.mark.parametrize("criterion", ["l2", "taylor", "wanda", "fisher", "snip", "grasp", "synflow", "lamp", "random"])
@pytest.mark.parametrize("schedule", ["one-shot", "gradual"])
def test_every_criterion_under_a_schedule_and_a_teacher(criterion: str, schedule: str) -> None:
    """Scores are of the weights as they are, in the midst of a training that a teacher listens to."""
    result = sparse(criterion=criterion, schedule=schedule, teacher=small_net(7), epochs=1, score_batches=2)
    # Wanda's share is each output row's own: 7 of 27, 18 of 72 and 4 of 16 stay.
    by_row = 8 * 7 + 16 * 18 + 4 * 4
    assert sum(nonzero(result.module).values()) == (by_row if criterion == "wanda" else round(0.25 * TOTAL))
    assert result.plan.made_by["criterion"] == criterion


def test_wanda_compares_inside_rows() -> None:
    result = sparse(criterion="wanda", schedule="one-shot", epochs=0, score_batches=2)
    for mask in result.plan.masks.values():
        rows = mask.kept.reshape(mask.shape[0], -1).sum(axis=1)
        assert rows.max() - rows.min() <= 1


def test_synflow_in_many_rounds_empties_no_layer() -> None:
    """Tanaka et al.: at a density where one round of magnitude scores empties a layer, 100 rounds of SynFlow do not."""
    program = pare.capture(fresh(small_net(), seed=2), torch.zeros(2, 3, 8, 8))
    options = {"model": program, "density": 0.02, "epochs": 0, "floor": 0.0}
    many = sparse(**options, criterion="synflow", schedule=OneShot(rounds=100))
    alive = {n: int(m.kept.sum()) for n, m in many.plan.masks.items()}
    assert sum(alive.values()) == 1432 - round(0.98 * 1432) and min(alive.values()) >= 3
    once = sparse(**options, criterion="synflow", schedule=OneShot(rounds=1))
    assert any(once.plan.masks[n].digest != many.plan.masks[n].digest for n in WEIGHTS)
