"""recover: train a pruned model back, with the one loop or with the user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

from paredown.errors import Interrupted, RejectedError, UsageError
from paredown.layouts import guarded_layouts
from paredown.program import Program
from paredown.statistics.batches import Batches, Given, batches_of, check_whole
from paredown.train import checkpoint as checkpoints
from paredown.train.batch_norm import reestimate_batch_norm
from paredown.train.distil import Distil
from paredown.train.loop import (
    Hook,
    OptimizerChoice,
    Progress,
    Schedule,
    finite_tensors,
    fit,
    private_copy,
    usable_device,
)
from paredown.train.masks import Masks, check_zeros, keep_masks, mask_hook
from paredown.train.ranks import Ranks, own_device
from paredown.train.task import Step


class HoldsModule(Protocol):
    """A frozen dataclass with the module to train and the program it came from, as paredown.Pruned is."""

    @property
    def module(self) -> nn.Module:
        """What is trained."""

    @property
    def program(self) -> Program:
        """Its example inputs are used."""


S = TypeVar("S", bound=HoldsModule)


def recover(
    small: S,
    train_batches: Given | None = None,
    *,
    step: Step | None = None,
    train: Callable[[nn.Module], nn.Module | None] | None = None,
    teacher: nn.Module | None = None,
    epochs: int = 3,
    optimizer: OptimizerChoice = "sgd",
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    clip_norm: float | None = None,
    schedule: Schedule = "cosine",
    seed: int = 0,
    device: str = "cpu",
    distil: Distil | None = None,
    temperature: float = 4.0,
    distil_weight: float = 0.9,
    distil_layers: Sequence[str] = (),
    distil_layers_weight: float = 10.0,
    batch_norm_batches: int = 100,
    hooks: Sequence[Hook] = (),
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    max_steps: int | None = None,
    distributed: bool = False,
) -> S:
    """`small` with its module trained by `fit` (or the user's own `train`), then batch norm re-estimated.

    With `train_batches` (a function, a list or a DataLoader) and `step` the options are those of fit; `distil` is "kl" where there is a teacher (for a
    regression say "mse"). With `train(model)` the loop is the user's: it gets a deep copy and trains it in place or
    returns a model of the same structure; `train_batches` and `step`, where given too, only serve batch norm.
    Masks of `small.plan` are kept in either loop: zeros stay zero through momentum and weight decay, and are checked
    (VerificationError where something else than a torch optimizer revived them).
    Statistics are re-estimated once, at the end: training in train mode never reads them, so a re-estimation before
    it changes nothing (measured on ResNet-20: the same bits of accuracy), and one after it is worth a little (+0.07).
    `epochs=0` re-estimates and leaves it at that; `batch_norm_batches=0` skips it. `small` itself is not touched.
    `distributed`: every process of torchrun calls this alike, with the model pruned by one plan, and shares every batch
    (see train.ranks); all return the same. A loop of one's own wraps the model itself.

    Raises UsageError (no way to train, a generator for more than one pass, ranks with different plans), Interrupted, and what fit and reestimate_batch_norm raise.
    """
    if train is None and (step is None or train_batches is None):
        msg = f"recover must be given train_batches and step, or train. Got {train_batches!r} and {step!r}."
        raise UsageError(msg)
    if not isinstance(getattr(small, "module", None), nn.Module) or not hasattr(small, "program"):
        msg = f"recover must be given what prune returned, a Pruned. Got {type(small).__name__}."
        raise UsageError(msg)
    own: object = train
    if own is not None and not callable(own):
        msg = f"train must be a function train(model) that trains it. Got {type(own).__name__}."
        raise UsageError(msg)
    batches = None if train_batches is None else batches_of(train_batches, "train_batches")
    check_whole("batch_norm_batches", batch_norm_batches, 0)
    if distil is None:
        distil = "none" if teacher is None else "kl"
    masks = getattr(getattr(small, "plan", None), "masks", {})
    if distributed:
        device = own_device(device)
        _same_plan(small, train, usable_device(device))
    if train is not None:
        module = _own(small.module, train, masks)
    else:
        module = fit(
            small.module, cast(Batches, batches), cast(Step, step), epochs=epochs, optimizer=optimizer, lr=lr,
            momentum=momentum, weight_decay=weight_decay, clip_norm=clip_norm, schedule=schedule, seed=seed,
            device=device, teacher=teacher, distil=distil, temperature=temperature, distil_weight=distil_weight,
            distil_layers=distil_layers, distil_layers_weight=distil_layers_weight,
            hooks=(*hooks, mask_hook(masks)) if masks else hooks, checkpoint=checkpoint, progress=progress, max_steps=max_steps,
            distributed=distributed,
        ).module  # fmt: skip
    if batch_norm_batches and batches is not None and step is not None:
        args, kwargs = small.program.inputs
        module = reestimate_batch_norm(
            module, batches, {"args": args, "kwargs": kwargs}, step=step, num_batches=batch_norm_batches,
            seed=seed + epochs, device=device,
        )  # fmt: skip
    return cast(S, dataclasses.replace(cast(Any, small), module=module))


def _same_plan(small: object, train: object, device: torch.device) -> None:
    """Ranks must have pruned alike: what they would average is otherwise of different channels and masks."""
    if train is not None:
        msg = "distributed must come with step and train_batches. Got train: a loop of its own wraps the model in DistributedDataParallel itself, and its masks are kept there too."
        raise UsageError(msg)
    plan = getattr(getattr(small, "plan", None), "digest", "")
    Ranks.of(device).agree("plan: channels, masks and all else that was pruned", plan, error=UsageError)


def _own(module: nn.Module, train: Callable[[nn.Module], nn.Module | None], masks: Masks) -> nn.Module:
    """The user's own loop on a deep copy; what it gives back must have the same tensors. Masks are kept in it."""
    copied = private_copy(module).train()
    try:
        with keep_masks(copied, masks), guarded_layouts(copied):
            returned = train(copied)
    except Interrupted:
        raise
    except KeyboardInterrupt as error:
        msg = (
            "stopped in the task module's own train(). It keeps its own checkpoints, if any; the same command runs it "
            "again."
        )
        raise Interrupted(msg) from error
    trained: object = copied if returned is None else returned
    if not isinstance(trained, nn.Module):
        msg = f"train(model) must train in place and return None, or return the model. Got {type(trained).__name__}."
        raise UsageError(msg)
    before, after = ({n: tuple(t.shape) for n, t in checkpoints.model_tensors(m).items()} for m in (module, trained))
    if before != after:
        different = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
        msg = (
            f"train(model) must keep the model's structure. Got changes in {', '.join(different[:5])}. Return the "
            "model itself, not a wrapper."
        )
        raise RejectedError(msg)
    if bad := sorted(finite_tensors(module) - finite_tensors(trained)):
        msg = (
            f"train(model) must return finite weights. Got NaN or infinity in {', '.join(bad[:5])}. Use a lower "
            "learning rate."
        )
        raise RejectedError(msg)
    if trained is not copied:  # another module than the one that was watched
        check_zeros(trained, masks)
    return trained.to("cpu").eval()
