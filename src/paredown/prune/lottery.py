"""Lottery tickets: rounds of whole trainings, a mask after each, and a return of weights or of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from paredown.errors import UsageError
from paredown.prune.accumulate import Accumulated
from paredown.prune.changing import Kept
from paredown.prune.job import Job, accumulation, as_masks, cells_of, chosen, finished, trained, with_masks
from paredown.prune.mask import apply_masks
from paredown.prune.nouns import Pruned
from paredown.prune.schedule import Lottery
from paredown.train import checkpoint as checkpoints
from paredown.train.loop import Hook, Training, private_copy
from paredown.train.masks import mask_hook


class Remembered:
    """All parameters and buffers as they are after `step` steps of a training; kept in its checkpoints."""

    def __init__(self, module: nn.Module, step: int) -> None:
        """With step 0 it is the module as given."""
        self._step = step
        now = checkpoints.model_tensors(module).items() if step == 0 else ()
        self._tensors: dict[str, Tensor] = {n: t.detach().clone() for n, t in now}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By name; empty where the training has not come to `step`."""
        return self._tensors

    def hook(self) -> Hook:
        """For `fit`."""
        return Hook(name=f"remember step {self._step}", after_step=self._look, state=self._state, restore=self._restore)

    def _look(self, training: Training) -> None:
        if training.step + 1 == self._step:
            now = checkpoints.model_tensors(training.module).items()
            self._tensors = {n: t.detach().cpu().clone() for n, t in now}

    def _state(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        self._tensors = dict(state)


def lottery(job: Job, how: Lottery, density: float) -> Pruned:
    """The ticket that is left after all rounds, trained once more.

    Raises UsageError where `rewind_step` lies beyond the end of a training.
    """
    accumulated = accumulation(job)
    kept: Kept = dict(job.first)
    module = with_masks(job, kept)
    remembered = Remembered(module, how.rewind_step)
    for number, share in enumerate(how.densities(density, job.start_density)):
        watching = [remembered.hook()] if number == 0 and how.rewind == "weights" else []
        module = trained(job, module, [*watching, *_hooks(job, accumulated, kept)], number).module
        kept = chosen(job, cells_of(job, accumulated, module, share), kept, share)
        if how.rewind == "weights":
            module = _rewound(module, remembered.tensors, how.rewind_step)
        apply_masks(module, as_masks(job, kept))
    module = trained(job, module, _hooks(job, None, kept), how.rounds).module
    return finished(job, module, kept, density, how)


def _hooks(job: Job, accumulated: Accumulated | None, kept: Kept) -> list[Hook]:
    masks = as_masks(job, kept)
    return [*([accumulated.hook()] if accumulated is not None else []), *([mask_hook(masks)] if masks else [])]


@torch.no_grad()
def _rewound(module: nn.Module, tensors: Mapping[str, Tensor], step: int) -> nn.Module:
    if not tensors:
        msg = (
            f"rewind_step must lie within a training. Got {step}, which was not reached. Train longer, or rewind less."
        )
        raise UsageError(msg)
    back = private_copy(module)
    for name, tensor in checkpoints.model_tensors(back).items():
        tensor.copy_(tensors[name])
    return back
