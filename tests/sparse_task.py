"""A small network and data to train it on, for tests of pruning in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paredown as pare
from paredown.errors import Interrupted
from paredown.prune.movement import SoftMovement
from paredown.prune.schedule import Gradual, Iterative, Lottery, Regrowth
from paredown.prune.sparsify import sparsify
from paredown.train.loop import Hook, Training

WEIGHTS = ("0.weight", "3.weight", "8.weight")
"""What masks consider in the network below: 216 + 1152 + 64 = 1432 weights."""
BATCHES = 8


def small_net(seed: int = 0) -> nn.Sequential:
    """Two convolutions with batch norm and a linear layer."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


@cache
def program() -> pare.Program:
    return pare.capture(small_net(), torch.zeros(2, 3, 8, 8))


@cache
def _data() -> tuple[tuple[Tensor, Tensor], ...]:
    """Four classes, each with a pattern of its own in noise: it can be learnt."""
    g = torch.Generator().manual_seed(1)
    patterns = torch.randn(4, 3, 8, 8, generator=g)
    labels = [torch.randint(4, (16,), generator=g) for _ in range(BATCHES)]
    return tuple((patterns[y] + torch.randn(16, 3, 8, 8, generator=g), y) for y in labels)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented by noise of torch's global generator, as real training batches are."""
    for x, y in _data():
        yield x + 0.1 * torch.randn_like(x), y


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def sparse(**options: Any) -> pare.Pruned:
    """sparsify on the small network: 3 epochs of 8 steps to a density of a quarter, where nothing else is asked."""
    given = {"density": 0.25, "epochs": 3, "lr": 0.05, **options}
    return sparsify(given.pop("model", program()), given.pop("train_batches", batches), step=step, **given)


def nonzero(module: nn.Module) -> dict[str, int]:
    parameters = dict(module.named_parameters())
    return {n: int((parameters[n] != 0).sum()) for n in WEIGHTS}


def watch(look: Callable[[Training], Any]) -> tuple[Hook, list[Any]]:
    """A hook that writes down what it sees after each step."""
    seen: list[Any] = []
    return Hook(name="watch", after_step=lambda training: seen.append(look(training))), seen


def interrupted(at: int) -> Callable[[], Iterator[Any]]:
    """Batches that stop, as Ctrl-C does, before batch number `at` of all that were ever drawn."""
    drawn = [0]

    def some() -> Iterator[Any]:
        for batch in batches():
            if drawn[0] == at:
                raise KeyboardInterrupt
            drawn[0] += 1
            yield batch

    return some


def assert_resumes(tmp_path: Path, at: int, **options: Any) -> None:
    """Interrupted and resumed equals uninterrupted: plan, and every tensor bit for bit."""
    whole = sparse(**options)
    path = tmp_path / "train.safetensors"
    with pytest.raises(Interrupted):
        sparse(**options, checkpoint=path, train_batches=interrupted(at))
    assert list(tmp_path.iterdir())
    resumed = sparse(**options, checkpoint=path)
    assert resumed.plan.digest == whole.plan.digest
    assert {n: m.digest for n, m in resumed.plan.masks.items()} == {n: m.digest for n, m in whole.plan.masks.items()}
    for (name, a), (_, b) in zip(resumed.module.state_dict().items(), whole.module.state_dict().items(), strict=True):
        assert a.shape == b.shape and np.array_equal(a.numpy(), b.numpy()), name


WAYS: dict[str, dict[str, Any]] = {
    "one-shot": {"schedule": "one-shot"},
    "iterative": {"schedule": Iterative(rounds=4)},
    "linear": {"schedule": Iterative(rounds=4, spacing="linear")},
    "gradual": {"schedule": Gradual(updates=6)},
    "gradual with regrowth": {"schedule": Gradual(updates=6, regrow=0.3)},
    "rigl": {"schedule": Regrowth(every=3), "criterion": "random", "allocation": "erk"},
    "set": {"schedule": Regrowth(by="random", every=3), "criterion": "random", "allocation": "erk"},
    "lottery": {"schedule": Lottery(rounds=2, rewind_step=5)},
    "learning-rate rewinding": {"schedule": Lottery(rounds=2, rewind="learning_rate")},
    "movement": {"criterion": "movement", "schedule": Gradual(updates=6)},
    "block movement": {"criterion": "movement", "granularity": "4x4"},
    "soft movement": {"criterion": SoftMovement(score_lr=0.5, penalty=1.0), "density": None},
    "sr_ste": {"criterion": "sr_ste", "granularity": "2:4", "density": None},
    "gradual sr_ste": {"criterion": "sr_ste"},
    "accumulated movement": {"criterion": "accumulated_movement"},
    "gradient drift": {"criterion": "gradient_drift"},
    "blocks": {"granularity": "4x4"},
    "kernels": {"granularity": "kernel", "schedule": "iterative"},
    "levels": {"density": (0.5, 0.5), "epochs": 2},
}
