"""Value: one number for a model, by a loss, a metric, or how far its outputs move; and what makes it worse."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError, UsageError
from paredown.statistics.batches import Given, as_number, check_whole, once, taken
from paredown.train.distil import class_axis
from paredown.train.given import code_digest
from paredown.train.loop import on_device, usable_device
from paredown.train.task import Metric, Predict, Step, batch_length, call_inputs, metric_values, predictor


@dataclass(kw_only=True)
class Value:
    """How a model is judged. The first model asked with first=True is the reference of a distance."""

    unit: str
    name: str
    """"loss", "metric", "mse" or "kl"."""
    device: torch.device
    batches: tuple[Any, ...] = ()
    loss: Step | None = None
    evaluate: Callable[[Predict], Any] | None = None
    metric: Metric | None = None
    num_samples: int = 0
    _wanted: tuple[tuple[Tensor, ...], ...] = ()

    def of(self, module: nn.Module, *, first: bool = False) -> float:
        """The value of a model in eval mode; without gradients is the caller's business."""
        module.eval()
        if self.evaluate is not None:
            return self._metric(module)
        if self.loss is not None:
            return self._loss(module)
        if first:
            self._wanted = tuple(self._outputs(module, batch) for batch in self.batches)
            if not any(self._wanted):
                msg = "a distance must have floating outputs to compare. Got none."
                raise RejectedError(msg)
        return self._distance(module)

    def worse(self, value: float, dense: float) -> float:
        """How much worse a value is than the dense one."""
        if self.metric is not None and self.metric.goal == "max":
            return dense - value
        return value - dense

    def digest(self) -> str:
        """Of what is measured, by functions of which code, and on which data."""
        state = hashlib.sha256()
        functions = [code_digest(f) for f in (self.loss, self.evaluate) if f is not None]
        state.update(repr((self.name, self.unit, functions)).encode())
        for leaf in pytree.tree_leaves(list(self.batches)):
            if isinstance(leaf, Tensor):
                state.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
                state.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            else:
                state.update(repr(leaf).encode() if isinstance(leaf, str | int | float | bool | None) else b"?")
        return state.hexdigest()

    def _metric(self, module: nn.Module) -> float:
        assert self.evaluate is not None and self.metric is not None
        predict = predictor(module)
        value, samples = metric_values(
            self.metric,
            self.evaluate(
                lambda *args, **kwargs: predict(*on_device(args, self.device), **on_device(kwargs, self.device))
            ),
        )
        self.num_samples = self.num_samples if samples is None else len(samples)
        return value

    def _loss(self, module: nn.Module) -> float:
        assert self.loss is not None
        total, count = 0.0, 0
        for number, batch in enumerate(self.batches):
            length = batch_length(batch)
            total += length * as_number(self.loss(module, on_device(batch, self.device)), number)
            count += length
        return total / count

    def _outputs(self, module: nn.Module, batch: Any) -> tuple[Tensor, ...]:
        args, kwargs = call_inputs(on_device(batch, self.device))
        leaves = pytree.tree_leaves(module(*args, **kwargs))
        return tuple(t.detach() for t in leaves if isinstance(t, Tensor) and t.is_floating_point())

    def _distance(self, module: nn.Module) -> float:
        moved, scale = 0.0, 0.0
        for batch, wanted in zip(self.batches, self._wanted, strict=True):
            outputs = self._outputs(module, batch)
            if self.name == "kl":
                length = batch_length(batch)
                moved, scale = moved + length * _divergence(outputs[0], wanted[0]), scale + length
                continue
            for a, b in zip(outputs, wanted, strict=True):
                moved += float((a.double() - b.double()).square().sum())
                scale += float(b.double().square().sum())
        return moved / max(scale, 1e-30)


def value_of(
    batches: Given | None,
    *,
    loss: Step | None,
    evaluate: Callable[[Predict], Any] | None,
    metric: Metric | None,
    distance: str | None,
    num_batches: int,
    device: str,
) -> Value:
    """Checks that exactly one way of judging is given, with what it needs. Raises UsageError and RejectedError."""
    given = [n for n, v in (("loss", loss), ("evaluate", evaluate), ("distance", distance)) if v is not None]
    if len(given) != 1:
        msg = f"sensitivity must be given one of loss, evaluate and distance. Got {' and '.join(given) or 'none'}."
        raise UsageError(msg)
    if distance not in (None, "mse", "kl"):
        msg = f"distance must be 'mse' or 'kl'. Got {distance!r}."
        raise UsageError(msg)
    where = usable_device(device)
    if evaluate is not None:
        if metric is None:
            msg = "evaluate must come with its metric, Metric(name, unit, goal), which says what is better. Got none."
            raise UsageError(msg)
        return Value(unit=metric.unit, name="metric", device=where, evaluate=evaluate, metric=metric)
    found = _batches(batches, num_batches)
    unit = "loss" if loss is not None else {"mse": "relative squared error", "kl": "nats"}[cast(str, distance)]
    return Value(
        unit=unit,
        name=distance or "loss",
        device=where,
        batches=found,
        loss=loss,
        num_samples=sum(batch_length(b) for b in found),
    )


def _batches(batches: Given | None, num_batches: int) -> tuple[Any, ...]:
    check_whole("num_batches", num_batches)
    if batches is None:
        msg = "batches must be given to measure a loss or a distance: held-out data. Got none."
        raise UsageError(msg)
    found = tuple(taken(once(batches), num_batches))
    if not found:
        msg = "batches must yield at least one batch. Got none. A generator must be made anew for each call."
        raise RejectedError(msg)
    return found


def divergences(scores: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || scores) of class scores in nats, [N] float64: of each sample, the mean over its other positions.

    Classes lie where `train.distil.class_axis` has them. Raises UsageError for outputs without one.

    >>> divergences(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist()
    [0.0, 0.0]
    """
    axis = class_axis(wanted)
    if wanted.dim() < 2 or wanted.shape[axis] < 2:
        msg = f"distance 'kl' must have class scores to compare. Got an output of shape {tuple(wanted.shape)}. Take 'mse'."
        raise UsageError(msg)
    target, given = F.log_softmax(wanted.double(), axis), F.log_softmax(scores.double(), axis)
    return (target.exp() * (target - given)).sum(axis).reshape(len(wanted), -1).mean(1)


def _divergence(scores: Tensor, wanted: Tensor) -> float:
    return float(divergences(scores, wanted).mean())


__all__: Sequence[str] = ["Value", "divergences", "value_of"]
