"""Probe: one evaluation of a network that says both how much worse its metric is and how far its outputs moved."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError
from paredown.measure.watched import Watch
from paredown.search.value import divergences
from paredown.train.loop import on_device, private_copy, usable_device
from paredown.train.task import Task, call_inputs, kept_randomness, metric_values, predictor, seed_all

Distance = Literal["mse", "kl"]
Floats = NDArray[np.float64]
Answers = list[tuple[Tensor, ...]]
UNITS: dict[Distance, str] = {"mse": "relative squared error", "kl": "nats"}
GROUPS = 64
"""Samples are kept as the means of at most so many groups: sample i is of group i mod GROUPS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one damage did: how much worse the metric is (in its unit, positive is worse) and how far the outputs moved."""

    metric: float | None
    """None where the task has no held-out data with a metric."""
    distance: float
    metric_groups: tuple[float, ...] = ()
    """Means over groups of samples; empty where evaluate returns one number for all."""
    distance_groups: tuple[float, ...] = ()


class Probe:
    """A task's held-out data, and the answers of the dense network on them.

    The metric is the task's `choose`, an `evaluate` on `choose_batches`; the distance is between the answers that the
    same evaluation saw, call by call, and those of the dense network. Without `choose` the inputs are the calibration
    batches, and there is no metric. Test data are never read.

    Distances, per sample i: "mse" ‖yᵢ - y⁰ᵢ‖² / meanⱼ‖y⁰ⱼ‖², whose mean is Σ‖y - y⁰‖² / Σ‖y⁰‖²; "kl" KL(softmax y⁰ᵢ || softmax yᵢ) in
    nats, of the first output. Where samples cannot be told apart (no batch axis) a call is one sample.

    Raises RejectedError where the dense network gives no finite floating outputs, or has no finite metric.
    """

    def __init__(self, task: Task, dense: nn.Module, distance: Distance, *, device: str = "cpu", seed: int = 0) -> None:
        self._task, self._device, self._seed, self.distance = task, usable_device(device), seed, distance
        values, answers, digest = self._asked(private_copy(dense).to(self._device))
        self.dense = None if values is None else float(values.mean())
        self._values, self._answers, self.digest = values, answers, digest
        self._scale = 1.0
        if not answers or not all(answers) or not all(bool(t.isfinite().all()) for call in answers for t in call):
            msg = "the dense network must have finite floating outputs on held-out data. Got none, or NaN or infinity. Look at the weights and the batches."
            raise RejectedError(msg)
        if distance == "mse":
            self._scale = max(float(np.concatenate([_squares(call) for call in answers]).mean()), 1e-30)
        self.num_samples = len(self._distances(answers))

    @property
    def device(self) -> torch.device:
        """Where models must be."""
        return self._device

    @property
    def metric_unit(self) -> str:
        """Of the task's metric."""
        return self._task.metric.unit

    def of(self, module: nn.Module) -> Seen:
        """What became of a model. Raises RejectedError for outputs of other shapes, NaN or infinity."""
        values, answers, _ = self._asked(module)
        moved = self._distances(answers)
        if not np.isfinite(moved).all():
            msg = "the outputs must be finite. Got NaN or infinity."
            raise RejectedError(msg)
        worse = None
        if values is not None and self._values is not None:
            sign = -1.0 if self._task.metric.goal == "max" else 1.0
            if values.shape != self._values.shape:
                msg = f"evaluate must give the dense network's {self._values.shape} values. Got {values.shape}."
                raise RejectedError(msg)
            worse = sign * (values - self._values)
        return Seen(
            metric=None if worse is None else float(worse.mean()),
            distance=float(moved.mean()),
            metric_groups=() if worse is None or worse.ndim == 0 else _grouped(worse),
            distance_groups=_grouped(moved),
        )

    def _asked(self, module: nn.Module) -> tuple[Floats | None, Answers, str]:
        """(values of the metric, the answers call by call, a digest of what was asked)."""
        answers: Answers = []
        predict = predictor(module)

        def heard(*args: Any, **kwargs: Any) -> Any:
            answer = predict(*on_device(args, self._device), **on_device(kwargs, self._device))
            leaves = [t for t in pytree.tree_leaves(answer) if isinstance(t, Tensor) and t.is_floating_point()]
            answers.append(tuple(t.clone() for t in leaves))  # the user's function may write into what it is given
            return answer

        watch = Watch(heard)
        with kept_randomness():
            seed_all(self._seed)
            values = self._metric(watch)
        return values, answers, watch.digest

    def _metric(self, watch: Callable[..., Any]) -> Floats | None:
        if self._task.choose is not None:
            value, samples = metric_values(self._task.metric, self._task.choose(watch))
            return np.asarray(value, dtype=np.float64) if samples is None else samples
        for batch in self._task.calibration_batches():
            args, kwargs = call_inputs(batch)
            watch(*args, **kwargs)
        return None

    def _distances(self, answers: Answers) -> Floats:
        """One per sample."""
        if [[t.shape for t in call] for call in answers] != [[t.shape for t in call] for call in self._answers]:
            msg = "the outputs must have the shapes of the dense network's, call by call. Got others."
            raise RejectedError(msg)
        found = []
        for call, wanted in zip(answers, self._answers, strict=True):
            if self.distance == "kl":
                found.append(divergences(call[0], wanted[0]).numpy())
            else:
                moved = tuple(a.double() - b.double() for a, b in zip(call, wanted, strict=True))
                found.append(_squares(moved) / self._scale)
        return np.concatenate(found)


def usual_distance(probe_output: Tensor, distil: str) -> Distance:
    """KL where a recipe distils class scores and the output has at least two classes, else the squared error.

    >>> usual_distance(torch.zeros(4, 10), "kl"), usual_distance(torch.zeros(4, 1), "kl"), usual_distance(torch.zeros(4, 10), "mse")
    ('kl', 'mse', 'mse')
    """
    if distil != "kl" or probe_output.dim() < 2:
        return "mse"
    return "kl" if probe_output.shape[1 if probe_output.dim() > 3 else -1] > 1 else "mse"


def probe_key(probe: Probe, about: Sequence[Any]) -> str:
    """SHA-256 over what was asked, what the dense network scored, and everything in `about`, which json can write."""
    dense = None if probe.dense is None else f"{probe.dense:.6g}"
    text = json.dumps([probe.digest, dense, probe.distance, *about], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _squares(call: tuple[Tensor, ...]) -> Floats:
    """Sum of squares of each sample over all tensors of a call; of the whole call where samples cannot be told apart."""
    lengths = {len(t) if t.dim() else -1 for t in call}
    rows = lengths.pop() if len(lengths) == 1 else -1
    parts = [t.double().square().reshape(rows if rows > 0 else 1, -1).sum(1) for t in call]
    return np.asarray(torch.stack(parts).sum(0).numpy(), dtype=np.float64)


def _grouped(values: Floats) -> tuple[float, ...]:
    count = min(GROUPS, len(values))
    means = [float(values[g::count].mean()) for g in range(count)]
    return tuple(0.0 if math.isclose(m, 0.0, abs_tol=1e-300) else m for m in means)
