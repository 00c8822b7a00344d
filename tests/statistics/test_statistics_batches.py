"""Batches in every form that users have them; others are refused in words, and so are batches of nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paredown as pare
from paredown.errors import RejectedError, UsageError
from paredown.prune.obs import obs
from paredown.statistics.batches import as_number, batches_of, once, taken
from paredown.train import reestimate_batch_norm

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3
LIST = [(X[:4], Y[:4]), (X[4:], Y[4:])]
INPUTS = [x for x, _ in LIST]
LOADER = DataLoader(TensorDataset(X, Y), batch_size=4)


def step(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def parts() -> tuple[Any, ...]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )
    program = pare.capture(net, X[:2])
    coupling = pare.couple(program)
    scores = pare.score(program, coupling)
    plan = pare.allocate(coupling, scores, pare.examine(program), pare.Budget(channels=0.5), align=1)
    return program, coupling, scores, pare.prune(program, plan)


@pytest.mark.parametrize("given", [LIST, lambda: LIST, LOADER, lambda: iter(LIST), tuple(LIST)])
def test_batches_are_there_at_every_pass(given: Any) -> None:
    batches = batches_of(given)
    for _ in range(2):
        assert torch.equal(torch.cat([x for x, _ in batches()]), X)
    assert torch.equal(torch.cat([x for x, _ in once(given)]), X)


def test_a_generator_is_enough_for_one_pass_and_refused_for_more() -> None:
    assert [*once(x for x in LIST)] == LIST
    for one_pass in ((x for x in LIST), iter(LIST), map(tuple, LIST)):
        with pytest.raises(UsageError, match=r"^train_batches must be there for more than one pass.*DataLoader. Got "):
            batches_of(one_pass, "train_batches")


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (X, "Tensor. One batch is \\[batch\\]"),
        (np.zeros(3), "ndarray"),
        ({"x": X}, "dict"),
        ("data", "str"),
        (3, "int"),
        (None, "NoneType"),
        (nn.Sequential(nn.ReLU()), "Sequential"),
        (TensorDataset(X), "TensorDataset. Wrap it in a DataLoader"),
        (lambda: None, "NoneType from the function"),
    ],
)
def test_what_is_no_batches_is_refused(given: Any, got: str) -> None:
    with pytest.raises(UsageError, match=f"must be a function that returns batches, a list or a DataLoader. Got {got}"):
        once(given)


def _verbs(parts: tuple[Any, ...]) -> dict[str, Callable[[Any], Any]]:
    program, coupling, scores, small = parts
    found: dict[str, Callable[[Any], Any]] = {
        name: lambda b, name=name: pare.score(program, coupling, name, batches=b, loss=step)
        for name in "taylor taylor2 fisher snip grasp hessian_trace wanda obs refit apoz mean_activation".split()
    }
    found |= {
        "sensitivity": lambda b: pare.sensitivity(program, coupling, scores, batches=b, loss=step),
        "reconstruct": lambda b: pare.reconstruct(small, b, step=step),
        "obs update": lambda b: obs(program, b, step=step, density=0.5),
        "recover": lambda b: pare.recover(small, b, step=step, epochs=1),
        "sparsify": lambda b: pare.sparsify(program, b, step=step, density=0.5, epochs=1),
        "batch norm": lambda b: reestimate_batch_norm(program.module, b, X[:2], step=step),
        "ranks": lambda b: pare.choose_ranks(
            program, pare.Budget(parameters=0.8), choice="measured", loss=step, loss_batches=b
        ),
    }
    return found


NAMES = sorted(_verbs((None,) * 4))


@pytest.mark.parametrize("name", NAMES)
def test_every_verb_takes_a_list_a_loader_and_a_function(name: str, parts: tuple[Any, ...]) -> None:
    verb = _verbs(parts)[name]
    for given in (LIST, LOADER, lambda: LIST):
        assert verb(given) is not None
    with pytest.raises(UsageError, match="must be a function that returns batches, a list or a DataLoader"):
        verb(X)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_a_sample_is_refused(name: str, parts: tuple[Any, ...]) -> None:
    """Means over nothing are zeros, or NaN: criteria gave every unit the same score."""
    with pytest.raises(
        RejectedError, match=r"a batch must hold at least one sample. Got tensors of length 0 in batch 1"
    ):
        _verbs(parts)[name]([LIST[0], (X[:0], Y[:0])])


def test_an_empty_part_of_a_batch_is_none() -> None:
    batch = {"boxes": torch.zeros(0, 4), "image": X[:1]}
    assert [*taken([batch], 1)] == [batch]


@pytest.mark.parametrize("criterion", ["wanda", "obs", "refit", "apoz", "mean_activation"])
def test_labels_without_a_loss_are_refused(criterion: str, parts: tuple[Any, ...]) -> None:
    program, coupling, scores, small = parts
    assert pare.score(program, coupling, criterion, batches=INPUTS).by_space
    says = "batches must be the model's inputs alone .*Got tuple with 2 tensors in batch 0. Leave the labels out"
    with pytest.raises(UsageError, match=says):
        pare.score(program, coupling, criterion, batches=LIST)
    with pytest.raises(UsageError, match=says):
        pare.sensitivity(program, coupling, scores, batches=LIST, distance="mse")
    with pytest.raises(UsageError, match=says):
        pare.reconstruct(small, LIST)


def test_a_loss_must_be_one_number(parts: tuple[Any, ...]) -> None:
    program, coupling, scores, _ = parts
    assert as_number(torch.ones(1, 1), 0) == as_number(1, 0) == 1.0
    with pytest.raises(RejectedError, match=r"a loss must be one number. Got a tensor of shape \(4, 3\) at batch 0"):
        pare.sensitivity(program, coupling, scores, batches=LIST, loss=lambda m, b: m(b[0]))
    with pytest.raises(RejectedError, match="Got NoneType"):
        as_number(None, 0)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_numbers_of_batches_are_whole(value: Any, parts: tuple[Any, ...]) -> None:
    program, coupling, scores, small = parts
    for call in (
        lambda: pare.score(program, coupling, "taylor", batches=LIST, loss=step, num_batches=value),
        lambda: pare.sensitivity(program, coupling, scores, batches=LIST, loss=step, num_batches=value),
        lambda: pare.sparsify(program, LIST, step=step, density=0.5, score_batches=value),
        lambda: pare.recover(small, LIST, step=step, batch_norm_batches=value or -1),
        lambda: pare.choose_ranks(
            program, pare.Budget(parameters=0.8), method="svd_llm", batches=INPUTS, num_batches=value or -1
        ),
    ):
        with pytest.raises(UsageError, match="must be a whole number ≥"):
            call()
