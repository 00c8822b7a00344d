"""fit: the one training loop. Fine-tuning, distillation, masks, growth and QAT hang on its hooks.

The loop owns mode, device, random seeds, optimizer and checkpoints; the user owns `step(model, batch) -> loss`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.errors import Interrupted, MissingError, RejectedError, ResourceError, UsageError
from paredown.layouts import guarded_layouts
from paredown.plain import deep_copy
from paredown.recipe_fields import STREAMS
from paredown.score.patterns import as_patterns
from paredown.statistics.batches import Given, batches_of, reseeded, taken
from paredown.train import checkpoint as checkpoints
from paredown.train.distil import Distil, Teacher, taught_by
from paredown.train.options import OptimizerChoice as OptimizerChoice  # noqa: PLC0414  (it is this room's name for it as well)
from paredown.train.options import Options, check_training, made_optimizer
from paredown.train.options import Schedule as Schedule  # noqa: PLC0414
from paredown.train.ranks import Ranks, own_device
from paredown.train.task import Batches, Step, batch_length, kept_randomness, seed_all, stream

MOST_RETRIES = 2
DIVERGED = 10.0
"""An epoch whose mean loss is this many times the loss at the start has diverged, also where it is finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """What one attempt at an epoch did; equal in an interrupted and in an uninterrupted run."""

    epoch: int
    loss: float | None
    """Mean over samples; None where it was not finite."""
    lr: float
    """Learning rate of the first parameter group at the epoch's last step."""
    num_samples: int
    num_skipped: int = 0
    """Batches of one sample that batch norm cannot train on."""
    note: str = ""
    """Why the epoch was rolled back and repeated with half the learning rate; empty where it counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a training stands; given to `progress` after every step and every epoch."""

    epoch: int
    epochs: int
    step: int
    """Steps done in this epoch."""
    steps: int
    """Steps in every epoch."""
    loss: float | None
    history: tuple[Epoch, ...]
    training: str = ""
    """Name of its checkpoint, without the suffix: tells the trainings of one call apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The trained copy (CPU, eval mode) and what happened, epoch by epoch, rolled-back attempts included."""

    module: nn.Module
    history: tuple[Epoch, ...]


@dataclass(slots=True, kw_only=True)
class Training:
    """The state of a running training, as hooks see it: they may change the module's tensors in place."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    step: int = 0
    """Optimizer steps in all, of `steps` × epochs."""
    steps: int = 0
    saved_epochs: int = 0
    scale: float = 1.0
    """What roll-backs made of the learning rate: 1, 1/2, 1/4."""
    loss: float = math.nan
    start_loss: float | None = None
    """Mean loss of the first steps of all: the yardstick for divergence."""
    history: list[Epoch] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """Something that hangs on the loop. `state` and `restore` make it survive checkpoints and roll-backs."""

    name: str
    after_backward: Callable[[Training], None] | None = None
    after_step: Callable[[Training], None] | None = None
    after_epoch: Callable[[Training], None] | None = None
    state: Callable[[], Mapping[str, Tensor]] | None = None
    restore: Callable[[Mapping[str, Tensor]], None] | None = None


def fit(
    module: nn.Module,
    batches: Given,
    step: Step,
    *,
    epochs: int,
    optimizer: OptimizerChoice = "sgd",
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    clip_norm: float | None = None,
    schedule: Schedule = "cosine",
    seed: int = 0,
    device: str = "cpu",
    teacher: nn.Module | None = None,
    distil: Distil = "none",
    temperature: float = 4.0,
    distil_weight: float = 0.9,
    distil_layers: Sequence[str] = (),
    distil_layers_weight: float = 10.0,
    hooks: Sequence[Hook] = (),
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    max_steps: int | None = None,
    distributed: bool = False,
) -> Fitted:
    """Train a deep copy of `module` on `step(model, batch) -> loss`; the module itself is not touched.

    loss = (1 - w) × step + w × distil, w = `distil_weight` where a teacher distils, else 0 (see train.distil); modules that
    match `distil_layers` (fnmatch) are held to the teacher's outputs too, `distil_layers_weight` × the relative error.
    Learning rate at step t of T, cosine: lr/2 × (1 + cos(π t / T)); `constant`: lr. An `optimizer(parameters)` keeps its own
    rates, which the schedule multiplies. `batches`, a function, a list or a DataLoader, are asked once per epoch after torch, numpy and random are seeded
    for each epoch anew, from the seed and its number; without a length it is counted by one pass first. `max_steps` bounds the steps of each epoch (endless
    loaders). Parameters with requires_grad=False stay as they are; normalization and dropout are in train mode.

    With `checkpoint`, each epoch ends with an atomic one, and the same call continues there: on a CPU with as many threads, to
    the same bits. A loss that is not finite, or 10 × that of the start, rolls the epoch back and halves the learning rate,
    twice at most. A last batch of one sample is left out with batch norm. `distributed`: see train.ranks.

    Raises UsageError, RejectedError (no batches, nothing trainable, loss stays NaN), ResourceError (out of memory or
    disk), MissingError (no such device), Interrupted (Ctrl-C; resumable where there is a checkpoint).

    >>> data = [(torch.randn(8, 2), torch.zeros(8, dtype=torch.long))] * 3
    >>> step = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> fit(nn.Linear(2, 3), lambda: data, step, epochs=2).history[-1].num_samples
    24
    """
    check_training(step, teacher)
    options = Options(
        epochs=epochs, optimizer=optimizer, lr=lr, momentum=momentum, weight_decay=weight_decay, clip_norm=clip_norm,
        schedule=schedule, seed=seed, distil="none" if teacher is None else distil, temperature=temperature,
        distil_weight=distil_weight, max_steps=max_steps, distil_layers=as_patterns(distil_layers),
        distil_layers_weight=distil_layers_weight,
    )  # fmt: skip
    where = usable_device(own_device(device) if distributed else device)
    ranks = Ranks.of(where) if distributed else None
    config = _config(options, module, teacher, hooks, ranks)
    with kept_randomness(), memory_of(where):
        student = private_copy(module).to(where)
        training = Training(module=student, optimizer=made_optimizer(student, options))
        distiller = taught_by(teacher, student, where, distil, temperature, distil_layers, distil_layers_weight)
        run = _Run(
            training=training, batches=batches_of(batches, "train_batches"), step=step, options=options, device=where, teacher=distiller,
            hooks=tuple(hooks), base_lrs=[float(g["lr"]) for g in training.optimizer.param_groups], progress=progress,
            ranks=ranks, called=student if ranks is None else ranks.wrapped(student),
            name="" if checkpoint is None else checkpoint.stem, finite=finite_tensors(student),
        )  # fmt: skip
        try:
            with guarded_layouts(student):
                _train(run, checkpoint, config)
        except KeyboardInterrupt as error:
            raise _interrupted(run, checkpoint) from error
        finally:
            if distiller is not None:
                distiller.detach()
    return Fitted(module=student.to("cpu").eval(), history=tuple(training.history))


def learning_rate(schedule: Schedule, step: int, steps: int) -> float:
    """The factor on the learning rate at step t = 0 … T-1: cosine (1 + cos(π t / T)) / 2, constant 1.

    >>> [round(learning_rate("cosine", t, 4), 3) for t in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def usable_device(device: str) -> torch.device:
    """The torch device of that name; raises MissingError where this machine has none."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # a CPU build of torch raises AssertionError for cuda
        msg = (
            f"the device must be one that torch can use here. Got {device!r}: {str(error).splitlines()[0]}. Use "
            "--device cpu, or see `paredown doctor`."
        )
        raise MissingError(msg) from error
    return found


@contextmanager
def memory_of(device: torch.device) -> Iterator[None]:
    """ResourceError where the block does not fit in the memory of the device."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise  # the user's own error, from step or batches
        msg = f"training must fit in the memory of {device}. Got out of memory. Yield smaller batches."
        raise ResourceError(msg) from error


def private_copy(module: nn.Module) -> nn.Module:
    """A deep copy; raises RejectedError where the module does not allow one."""
    try:
        return deep_copy(module)
    except Exception as error:
        msg = (
            "the model must allow copy.deepcopy, because paredown never changes the original. Got "
            f"{type(error).__name__}: {error}."
        )
        raise RejectedError(msg) from error


# ------------------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    training: Training
    batches: Batches
    step: Step
    options: Options
    device: torch.device
    base_lrs: list[float]
    teacher: Teacher | None
    hooks: tuple[Hook, ...]
    progress: Callable[[Progress], None] | None
    called: nn.Module
    """What `step` gets: the module, or its wrapper where ranks share the training."""
    ranks: Ranks | None
    name: str
    finite: frozenset[str]
    """Tensors that must stay so: a causal mask of minus infinity may be a buffer."""

    @property
    def writes(self) -> bool:
        """Whether this process tells and saves."""
        return self.ranks is None or self.ranks.rank == 0


class _Diverged(Exception):
    """The loss is not finite or far above its start: the epoch is rolled back."""


def _train(run: _Run, path: Path | None, config: Mapping[str, Any]) -> None:
    training = run.training
    saved = checkpoints.load(path, config) if path is not None else None
    if run.ranks is not None:  # before rank 0 writes one
        run.ranks.agree("checkpoint: its folder must be one that all can read", str(saved and saved.facts))
    if saved is not None:
        _restore(run, saved)
        _report(run, 0)
    else:
        training.steps = _count_steps(run)
    last = _snapshot(run)
    if path is not None and saved is None and run.writes:
        checkpoints.save(path, last, config)  # a full disk or a read-only folder shows now, not after an epoch
    while training.epoch < run.options.epochs:
        try:
            _epoch(run)
        except _Diverged as error:
            _roll_back(run, last, str(error))
            continue
        training.epoch += 1
        for hook in run.hooks:
            if hook.after_epoch is not None:
                hook.after_epoch(training)
        last = _snapshot(run)
        if run.ranks is not None:
            run.ranks.agree("weights and masks after an epoch", _digest(last))
        if path is not None and run.writes:
            checkpoints.save(path, last, config)
            training.saved_epochs = training.epoch
        _report(run, training.steps)


def _epoch(run: _Run) -> None:
    training = run.training
    run.called.train()
    seed = stream(run.options.seed, training.epoch)
    seed_all(seed)
    retries = sum(bool(e.note) for e in training.history)
    has_batch_norm = any(name.endswith("running_var") for name, _ in training.module.named_buffers())
    total, num_samples, num_skipped, done, usual = 0.0, 0, 0, 0, 0
    first: list[float] = []
    source = reseeded(run.batches(), seed)
    for batch in taken(source, run.options.max_steps, "train_batches"):
        length = batch_length(batch)
        usual = max(usual, length)
        if _too_short(run, length, usual, has_batch_norm):
            num_skipped += 1  # variance over one sample: torch refuses it or makes it NaN
            continue
        number = training.epoch * training.steps + done
        if run.ranks is None:
            loss = _step(run, on_device(batch, run.device), number)
        else:
            loss = _shared_step(run, run.ranks, batch, length, number)
        done += 1
        if not math.isfinite(loss):
            msg = f"loss {loss} at step {done}"
            raise _Diverged(msg)
        total, num_samples = total + loss * length, num_samples + length
        if len(first) < 10:
            first.append(loss)
        _report(run, done)
    if done == 0:
        msg = (
            f"batches must yield at least one batch to train on. Got none in epoch {training.epoch + 1}. A generator "
            "must be made anew at each call."
        )
        raise RejectedError(msg)
    mean = total / num_samples
    if bad := sorted(run.finite - finite_tensors(training.module)):
        msg = f"NaN or infinity in {bad[0]}"
        raise _Diverged(msg)
    if training.start_loss is None:
        training.start_loss = sum(first) / len(first)
    if retries < MOST_RETRIES and 0 < DIVERGED * training.start_loss < mean:
        msg = f"mean loss {mean:.4g}, {DIVERGED:g} × above the start"
        raise _Diverged(msg)
    lr = float(training.optimizer.param_groups[0]["lr"])
    training.history.append(
        Epoch(epoch=training.epoch + 1, loss=mean, lr=lr, num_samples=num_samples, num_skipped=num_skipped)
    )


def _too_short(run: _Run, length: int, usual: int, has_batch_norm: bool) -> bool:
    """Whether a last batch is left out: one sample with batch norm; with ranks, any that leaves one of them too little."""
    if run.ranks is None:
        return length == 1 < usual and has_batch_norm
    return length < run.ranks.world * (2 if has_batch_norm else 1) <= usual


def _shared_step(run: _Run, ranks: Ranks, batch: Any, length: int, number: int) -> float:
    """This rank's part of a step. Its dropout must not move the random numbers by which all ranks read the same batches."""
    with kept_randomness():
        seed_all(hash((run.options.seed, number, ranks.rank)) % 2**32)
        try:
            loss = _step(run, on_device(ranks.part(batch, length), run.device), number, ranks.weight(length))
        except RuntimeError as error:
            if "find_unused_parameters" not in str(error):
                raise
            msg = "every trainable parameter must take part in the loss where ranks share a training. Got one without a gradient. Freeze it by requires_grad_(False), or train in one process."
            raise RejectedError(msg) from error
    ranks.share_buffers(run.training.module)
    return loss


def _step(run: _Run, batch: Any, step: int, weight_of_part: float = 1.0) -> float:
    training = run.training
    factor = training.scale * learning_rate(run.options.schedule, step, training.steps * run.options.epochs)
    for group, base in zip(training.optimizer.param_groups, run.base_lrs, strict=True):
        group["lr"] = base * factor
    training.optimizer.zero_grad(set_to_none=True)
    loss = _checked_loss(run.step(run.called, batch))
    if run.teacher is not None:
        weight = run.options.distil_weight
        loss = (1 - weight) * loss + weight * run.teacher.loss()
    if run.ranks is not None:
        loss = loss * weight_of_part
    training.step, training.loss = step, float(loss.detach()) if run.ranks is None else run.ranks.mean(loss)
    if not math.isfinite(training.loss):
        return training.loss
    loss.backward()
    for hook in run.hooks:
        if hook.after_backward is not None:
            hook.after_backward(training)
    if run.options.clip_norm is not None:
        nn.utils.clip_grad_norm_([p for p in training.module.parameters() if p.grad is not None], run.options.clip_norm)
    training.optimizer.step()
    for hook in run.hooks:
        if hook.after_step is not None:
            hook.after_step(training)
    return training.loss


def _roll_back(run: _Run, last: checkpoints.Snapshot, why: str) -> None:
    training = run.training
    retries = sum(bool(e.note) for e in training.history) + 1
    lr = float(training.optimizer.param_groups[0]["lr"])
    if retries > MOST_RETRIES:
        msg = (
            f"training must stay finite. Got {why} in epoch {training.epoch + 1} at learning rate {lr:g}, after "
            f"{MOST_RETRIES} retries with half the "
            "learning rate each. Use a lower learning rate, clip_norm, or look for NaN in the data."
        )
        if run.options.distil == "mse":
            msg += (
                " distil: mse is in the square of the outputs' own unit, whatever step's loss is in: for outputs in large numbers "
                "(grams, pixels) lower distil_weight, or use distil: none."
            )
        raise RejectedError(msg)
    history = [
        *training.history,
        Epoch(
            epoch=training.epoch + 1, loss=None, lr=lr, num_samples=0, note=f"{why}: rolled back, learning rate halved"
        ),
    ]
    scale = training.scale / 2
    _restore(run, last)
    training.history, training.scale = history, scale


def _interrupted(run: _Run, path: Path | None) -> Interrupted:
    saved = "There is no checkpoint: nothing was saved."
    if path is not None:
        saved = f"{path} holds {run.training.saved_epochs} epochs; the same command continues there."
    return Interrupted(f"stopped in epoch {run.training.epoch + 1} of {run.options.epochs}. {saved}")


# ------------------------------------------------------------------------------------------------- state and its checks


def _snapshot(run: _Run) -> checkpoints.Snapshot:
    training = run.training
    state = copy.deepcopy(training.optimizer.state_dict())
    facts = {
        "epoch": training.epoch, "scale": training.scale, "steps": training.steps, "start_loss": training.start_loss,
        "history": [{s: getattr(e, s) for s in Epoch.__slots__} for e in training.history],
    }  # fmt: skip
    model = {n: t.detach().clone() for n, t in checkpoints.model_tensors(training.module).items()}
    hooks = {h.name: {n: t.detach().clone() for n, t in h.state().items()} for h in run.hooks if h.state is not None}
    return checkpoints.Snapshot(model=model, optimizer=state, hooks=hooks, facts=facts)


def _digest(snapshot: checkpoints.Snapshot) -> str:
    """SHA-256 of the tensors of model and hooks, to the bit."""
    digest = hashlib.sha256()
    hooks = {f"{hook} {name}": tensor for hook, state in snapshot.hooks.items() for name, tensor in state.items()}
    for name, tensor in sorted({**snapshot.model, **hooks}.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _restore(run: _Run, snapshot: checkpoints.Snapshot) -> None:
    training, facts = run.training, snapshot.facts
    with torch.no_grad():
        for name, tensor in checkpoints.model_tensors(training.module).items():
            tensor.copy_(snapshot.model[name])
    training.optimizer.load_state_dict(copy.deepcopy(dict(snapshot.optimizer)))
    training.saved_epochs = int(facts["epoch"])
    training.epoch, training.scale, training.steps = int(facts["epoch"]), float(facts["scale"]), int(facts["steps"])
    training.start_loss, training.history = facts["start_loss"], [Epoch(**e) for e in facts["history"]]
    for hook in run.hooks:
        if hook.restore is not None:
            hook.restore(snapshot.hooks.get(hook.name, {}))


def _config(
    options: Options, module: nn.Module, teacher: nn.Module | None, hooks: Sequence[Hook], ranks: Ranks | None
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued, and on all ranks, as JSON values."""
    given = {name: getattr(options, name) for name in options.__slots__}
    if options.distil_layers:
        given["distil_layers"] = list(options.distil_layers)
    else:  # a checkpoint of before there were any goes on
        del given["distil_layers"], given["distil_layers_weight"]
    if not isinstance(options.optimizer, str):
        given["optimizer"] = getattr(options.optimizer, "__qualname__", type(options.optimizer).__name__)
    config = {
        **given,
        "streams": STREAMS,
        "hooks": [hook.name for hook in hooks],
        "weights at the start": checkpoints.state_digest(module),
        "weights of the teacher": checkpoints.state_digest(teacher)
        if teacher is not None and options.distil != "none"
        else None,
    }
    if ranks is None:
        return config
    ranks.agree("options and weights at the start", json.dumps(config, sort_keys=True), error=UsageError)
    return {**config, "ranks": ranks.world}


def _count_steps(run: _Run) -> int:
    """Steps per epoch: the schedule needs to know where the end is."""
    seed_all(run.options.seed)
    batches = run.batches()
    if isinstance(batches, Sized):
        count = len(batches)
    else:
        most = 100_000 if run.options.max_steps is None else run.options.max_steps
        count = sum(1 for _ in islice(batches, most + 1))
        if run.options.max_steps is None and count > most:
            msg = f"batches must end. Got more than {most:,} in one epoch. Give max_steps, the steps of an epoch."
            raise UsageError(msg)
    if count == 0:
        msg = "batches must yield at least one batch. Got none. Check the path and filters of the training data."
        raise RejectedError(msg)
    return count if run.options.max_steps is None else min(count, run.options.max_steps)


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = (
            f"a tensor of shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
            if isinstance(loss, Tensor)
            else type(loss).__name__
        )
        msg = f"step(model, batch) must return the loss, one number that depends on the model's parameters. Got {got}."
        raise UsageError(msg)
    return loss.reshape(())


def finite_tensors(module: nn.Module) -> frozenset[str]:
    """Names of the floating-point parameters and buffers that hold neither NaN nor infinity."""
    every = checkpoints.model_tensors(module).items()
    return frozenset(n for n, t in every if t.is_floating_point() and bool(torch.isfinite(t.detach()).all()))


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device; mappings that pytree does not know are moved by their own `to`."""

    def move(value: Any) -> Any:
        movable = isinstance(value, Tensor) or (isinstance(value, Mapping) and hasattr(value, "to"))
        return cast(Any, value).to(device) if movable else value

    return pytree.tree_map(move, batch)


def _report(run: _Run, done: int) -> None:
    if run.progress is not None and run.writes:
        training = run.training
        loss = training.loss if math.isfinite(training.loss) else None
        run.progress(
            Progress(
                epoch=training.epoch,
                epochs=run.options.epochs,
                step=done,
                steps=training.steps,
                loss=loss,
                history=tuple(training.history),
                training=run.name,
            )
        )
