"""Networks that several pages share, on the handwritten digits: trained once, kept in the book's folder."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import paredown as pare
from paredown.export import predictor
from paredown.prune import Pruned
from paredown.recipes import digits
from talk.page import Setting

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def base_epochs(setting: Setting) -> int:
    """Of the dense network."""
    return setting.pick(12, 30)


def recovery_epochs(setting: Setting) -> int:
    """Of whatever is done to it."""
    return setting.pick(4, 10)


def dense(setting: Setting, seed: int = 0) -> nn.Module:
    """DigitsNet of width 32, trained; 77,290 parameters. Not to be changed: pages share it."""
    return _dense(setting.shared, base_epochs(setting), seed)


def program(setting: Setting, seed: int = 0) -> pare.Program:
    """The dense network, captured."""
    return _program(setting.shared, base_epochs(setting), seed)


@functools.cache
def _dense(folder: Path, epochs: int, seed: int) -> nn.Module:
    return digits.scratch(
        digits.model(seed=seed), epochs=epochs, seed=seed, checkpoint=folder / f"dense-{seed}.safetensors"
    )


@functools.cache
def _program(folder: Path, epochs: int, seed: int) -> pare.Program:
    return pare.capture(_dense(folder, epochs, seed), digits.inputs())


def halved(setting: Setting, seed: int = 0) -> Pruned:
    """Half of its channels by L1 norm, then recovery with the dense network as teacher."""
    whole = program(setting, seed)
    coupling = pare.couple(whole)
    plan = pare.allocate(coupling, pare.score(whole, coupling, "l1"), pare.examine(whole), pare.Budget(channels=0.5))
    return pare.recover(
        pare.prune(whole, plan), digits.train_batches, step=digits.step, teacher=dense(setting, seed), lr=0.03, seed=seed,
        epochs=recovery_epochs(setting), checkpoint=setting.shared / f"halved-{seed}.safetensors",
    )  # fmt: skip


def thin(setting: Setting, seed: int = 0) -> nn.Module:
    """The shape of `halved` with fresh weights, trained as long as base and recovery together."""
    shape = pare.fresh(halved(setting, seed).module, seed=seed)
    place = setting.shared / f"thin-{seed}.safetensors"
    epochs = base_epochs(setting) + recovery_epochs(setting)
    return digits.scratch(shape, epochs=epochs, seed=seed, checkpoint=place)


def accuracy(model: Any, batches: Batches | None = None) -> float:
    """% of test images (or of `batches`) that a network, or an exported file in its runtime, gets right."""
    found = digits.evaluate(predictor(model), digits.test_batches() if batches is None else batches)
    return float(found["accuracy"].mean())
