"""Options of a training: what they may be, in words where they are something else, and the optimizer they ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from paredown.errors import RejectedError, UsageError
from paredown.statistics.batches import check_whole
from paredown.train.distil import Distil

OptimizerChoice = str | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
""" "sgd", "adamw" (torch's own defaults otherwise), or a function of the trainable parameters."""
Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of fit that decide its result; a checkpoint keeps them. Raises UsageError for what they may not be."""

    epochs: int
    optimizer: OptimizerChoice
    lr: float
    momentum: float
    weight_decay: float
    clip_norm: float | None
    schedule: Schedule
    seed: int
    distil: Distil
    temperature: float
    distil_weight: float
    max_steps: int | None
    distil_layers: tuple[str, ...]
    distil_layers_weight: float

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs, 0)
        if self.max_steps is not None:
            check_whole("max_steps", self.max_steps)
        for name in ("lr", "momentum", "weight_decay", "temperature", "distil_weight", "distil_layers_weight"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                msg = f"{name} must be a number. Got {getattr(self, name)!r}."
                raise UsageError(msg)
        rules = [
            ("seed", isinstance(self.seed, int), "a whole number"),
            ("lr", math.isfinite(self.lr) and self.lr > 0, "a finite number > 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number ≥ 0"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "a number > 0, or none"),
            ("temperature", self.temperature > 0, "a number > 0"),
            ("distil_weight", 0 <= self.distil_weight <= 1, "from 0 to 1"),
            ("distil_layers_weight", 0 <= self.distil_layers_weight < math.inf, "a finite number ≥ 0"),
            ("distil", self.distil in ("none", "kl", "mse"), 'one of "none", "kl", "mse"'),
            ("schedule", self.schedule in ("cosine", "constant"), '"cosine" or "constant"'),
        ]
        for name, holds, rule in rules:
            if not holds:
                msg = f"{name} must be {rule}. Got {getattr(self, name)!r}."
                raise UsageError(msg)


def check_training(step: object, teacher: object) -> None:
    """Raises UsageError where step is no function, or the teacher no module."""
    if not callable(step):
        msg = f"step must be a function step(model, batch) that returns the loss. Got {type(step).__name__}."
        raise UsageError(msg)
    if teacher is not None and not isinstance(teacher, nn.Module):
        msg = f"teacher must be the dense model, an nn.Module. Got {type(teacher).__name__}."
        raise UsageError(msg)


def made_optimizer(module: nn.Module, options: Options) -> torch.optim.Optimizer:
    """The optimizer of a module's trainable parameters. Raises UsageError, and RejectedError where there are none."""
    choice, lr, decay = options.optimizer, options.lr, options.weight_decay
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        msg = (
            "the model must have a parameter with requires_grad. Got none: everything is frozen, or there are no "
            "parameters."
        )
        raise RejectedError(msg)
    if choice == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=options.momentum, weight_decay=decay)
    if choice == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    if isinstance(choice, str):
        msg = f'optimizer must be "sgd", "adamw" or a function of the parameters. Got {choice!r}.'
        raise UsageError(msg)
    made: object = choice(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        msg = f"optimizer(parameters) must return a torch.optim.Optimizer. Got {type(made).__name__}."
        raise UsageError(msg)
    return made
