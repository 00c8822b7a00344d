"""Run: one run of the main job, as all its stages see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from paredown.pipeline.folder import RunFolder
from paredown.recipe import Recipe
from paredown.records import Record
from paredown.train import Task
from paredown.train.loop import usable_device

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: what is asked, on what, where."""

    recipe: Recipe
    task: Task
    folder: RunFolder
    say: Say
    on_training: Callable[[str, Any], None]
    weights_given: bool
    model: Callable[[], nn.Module]
    environment: Mapping[str, Any]
    dense: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What later stages need of earlier ones: the dense file's artifact and metric, what a search found, or came nearest with."""

    def record(self, stage: str, title: str, **fields: Any) -> Record:
        """A record of this run."""
        cell = {
            "stage": stage,
            "title": title,
            "recipe_digest": self.recipe.digest,
            "task": self.task.name,
            "target": self.recipe.target,
        }
        return Record(cell=cell, environment=self.environment, **fields)


def device_told(device: str) -> str:
    """The device of a recipe as records say it: with the GPU's own name, where it is one. Raises MissingError where there is none.

    >>> device_told("cpu")
    'cpu'
    """
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(usable_device(device))})"


def random_note(run: Run) -> list[str]:
    """What every output says of a model without given weights."""
    return [] if run.weights_given else ["No weights were given: the model is random, its quality means nothing."]
