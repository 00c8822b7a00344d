"""Probe: one evaluation of a network that says both how much worse its metric is and how far its outputs moved."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError, ResourceError
from paredown.measure.watched import Watch
from paredown.search.value import divergences
from paredown.train.distil import class_axis
from paredown.train.loop import on_device, private_copy, usable_device
from paredown.train.task import Task, call_inputs, kept_randomness, metric_values, predictor, seed_all

Distance = Literal["mse", "kl"]
Floats = NDArray[np.float64]
Call = tuple[Tensor, ...]
"""The floating tensors that one call of a predictor answered."""
UNITS: dict[Distance, str] = {"mse": "relative squared error", "kl": "nats"}
GROUPS = 64
"""Samples are kept as the means of at most so many groups: sample i is of group i mod GROUPS."""
IN_MEMORY_BYTES = 64 << 20
"""Answers of the dense network beyond this lie on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one damage did: how much worse the metric is (in its unit, positive is worse) and how far the outputs moved."""

    metric: float | None
    """None where the task has no held-out data with a metric, or evaluate had no number for these answers: `why`."""
    distance: float
    metric_groups: tuple[float, ...] = ()
    """Means over groups of samples; empty where evaluate returns one number for all."""
    distance_groups: tuple[float, ...] = ()
    why: str = ""


class Probe:
    """A task's held-out data, and the answers of the dense network on them.

    The metric is the task's `choose`, an `evaluate` on `choose_batches`; the distance is between the answers that the
    same evaluation saw, call by call, and those of the dense network. Without `choose` the inputs are the calibration
    batches, and there is no metric. Test data are never read. Answers are compared as they come: those of one call are
    in memory, and of the dense network's at most IN_MEMORY_BYTES, the others in a file without a name in `folder`.

    Distances, per sample i: "mse" ‖yᵢ - y⁰ᵢ‖² / meanⱼ‖y⁰ⱼ‖², whose mean is Σ‖y - y⁰‖² / Σ‖y⁰‖²; "kl" KL(softmax y⁰ᵢ || softmax yᵢ) in
    nats, of the first output. Where samples cannot be told apart (no batch axis) a call is one sample.

    Raises RejectedError where the dense network gives no finite floating outputs, or has no finite metric.
    """

    def __init__(
        self, task: Task, dense: nn.Module, distance: Distance, *, device: str = "cpu", seed: int = 0,
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        self._task, self._device, self._seed, self.distance = task, usable_device(device), seed, distance
        self._answers = _Shelf(folder)
        lengths, squares, sound = list[int](), list[Floats](), list[bool]()

        def keep(call: Call) -> None:
            sound.append(bool(call) and all(bool(t.isfinite().all()) for t in call))
            if sound[-1] and distance == "mse":
                squares.append(_squares(call))
            lengths.append(len(squares[-1] if squares else divergences(call[0], call[0])) if all(sound) else 0)
            self._answers.add(call)

        self._values, self.digest = self._asked(private_copy(dense).to(self._device), keep)
        self.dense = None if self._values is None else float(self._values.mean())
        if not sound or not all(sound):
            msg = "the dense network must have finite floating outputs on held-out data. Got none, or NaN or infinity. Look at the weights and the batches."
            raise RejectedError(msg)
        self._scale = max(float(np.concatenate(squares).mean()), 1e-30) if distance == "mse" else 1.0
        self.num_samples = sum(lengths)

    @property
    def device(self) -> torch.device:
        """Where models must be."""
        return self._device

    @property
    def metric_unit(self) -> str:
        """Of the task's metric."""
        return self._task.metric.unit

    def close(self) -> None:
        """Let the answers go."""
        self._answers.close()

    def of(self, module: nn.Module) -> Seen:
        """What became of a model. Raises RejectedError for outputs of other shapes, NaN or infinity."""
        distances, fits = list[Floats](), list[bool]()

        def compare(call: Call) -> None:
            number = len(fits)
            fits.append(self._answers.shapes[number : number + 1] == [[t.shape for t in call]])
            if all(fits):
                distances.append(self._distance(call, self._answers.call(number)))

        values, failed = None, None
        try:
            values, _ = self._asked(module, compare)
        except Exception as error:  # the user's metric of a damaged model: its answers may be known all the same
            failed = error
        whole = all(fits) and len(distances) == len(fits) == len(self._answers.shapes)
        moved = np.concatenate(distances) if whole else np.zeros(0)
        if failed is not None and not (whole and np.isfinite(moved).all()):
            raise failed
        if not whole:
            msg = "the outputs must have the shapes of the dense network's, call by call. Got others."
            raise RejectedError(msg)
        if not np.isfinite(moved).all():
            msg = "the outputs must be finite. Got NaN or infinity."
            raise RejectedError(msg)
        worse = None if failed is not None else self._worse(values)
        return Seen(
            metric=None if worse is None else float(worse.mean()),
            distance=float(moved.mean()),
            metric_groups=() if worse is None or worse.ndim == 0 else _grouped(worse),
            distance_groups=_grouped(moved),
            why="" if failed is None else in_a_line(failed),
        )

    def _worse(self, values: Floats | None) -> Floats | None:
        if values is None or self._values is None:
            return None
        if values.shape != self._values.shape:
            msg = f"evaluate must give the dense network's {self._values.shape} values. Got {values.shape}."
            raise RejectedError(msg)
        return np.asarray((-1.0 if self._task.metric.goal == "max" else 1.0) * (values - self._values))

    def _asked(self, module: nn.Module, hear: Callable[[Call], None]) -> tuple[Floats | None, str]:
        """(values of the metric, a digest of what was asked); every answer is heard before the user's function gets it."""
        predict = predictor(module)

        def heard(*args: Any, **kwargs: Any) -> Any:
            answer = predict(*on_device(args, self._device), **on_device(kwargs, self._device))
            # Now, as the user's function may write into what it is given.
            hear(tuple(t for t in pytree.tree_leaves(answer) if isinstance(t, Tensor) and t.is_floating_point()))
            return answer

        watch = Watch(heard)
        with kept_randomness():
            seed_all(self._seed)
            values = self._metric(watch)
        return values, watch.digest

    def _metric(self, watch: Callable[..., Any]) -> Floats | None:
        if self._task.choose is not None:
            value, samples = metric_values(self._task.metric, self._task.choose(watch))
            return np.asarray(value, dtype=np.float64) if samples is None else samples
        for batch in self._task.calibration_batches():
            args, kwargs = call_inputs(batch)
            watch(*args, **kwargs)
        return None

    def _distance(self, call: Call, wanted: Call) -> Floats:
        """One per sample of a call."""
        if self.distance == "kl":
            return np.asarray(divergences(call[0], wanted[0]).numpy())
        return _squares(tuple(a.double() - b.double() for a, b in zip(call, wanted, strict=True))) / self._scale


class _Shelf:
    """Answers, call by call: as they were, read back one call at a time."""

    def __init__(self, folder: Path | None) -> None:
        self.shapes: list[list[torch.Size]] = []
        self._places: list[tuple[int, list[np.dtype[Any]]]] = []
        self._folder = tempfile.gettempdir() if folder is None else str(folder)
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES, dir=self._folder)  # noqa: SIM115  (see close)

    def add(self, call: Call) -> None:
        """Put one more call behind the others."""
        arrays = [t.numpy() for t in call]
        self.shapes.append([t.shape for t in call])
        self._places.append((self._file.tell(), [a.dtype for a in arrays]))
        try:
            for array in arrays:
                self._file.write(np.ascontiguousarray(array).tobytes())
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # what is not written yet finds no room either
                self._file.close()
            msg = f"{self._folder} must have room for the dense network's answers. Got {error.strerror}. Free some, or choose another --out."
            raise ResourceError(msg) from error

    def call(self, number: int) -> Call:
        """The answers of one call."""
        place, dtypes = self._places[number]
        self._file.seek(place)
        found = []
        for shape, dtype in zip(self.shapes[number], dtypes, strict=True):
            array = np.frombuffer(self._file.read(shape.numel() * dtype.itemsize), dtype).reshape(shape)
            found.append(torch.from_numpy(array.copy()))
        return tuple(found)

    def close(self) -> None:
        """Let them go."""
        self._file.close()


def in_a_line(error: Exception) -> str:
    """What went wrong, for a table.

    >>> in_a_line(ValueError("no boxes left\\nin image 3"))
    'ValueError: no boxes left'
    """
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


def usual_distance(probe_output: Tensor, distil: str) -> Distance:
    """KL where a recipe distils class scores and the output has at least two classes, else the squared error.

    >>> usual_distance(torch.zeros(4, 10), "kl"), usual_distance(torch.zeros(4, 1), "kl"), usual_distance(torch.zeros(4, 10), "mse")
    ('kl', 'mse', 'mse')
    """
    has_classes = probe_output.dim() > 1 and probe_output.shape[class_axis(probe_output)] > 1
    return "kl" if distil == "kl" and has_classes else "mse"


def probe_key(probe: Probe, about: Sequence[Any]) -> str:
    """SHA-256 over what was asked, what the dense network scored, and everything in `about`, which json can write."""
    dense = None if probe.dense is None else f"{probe.dense:.6g}"
    text = json.dumps([probe.digest, dense, probe.distance, *about], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _squares(call: Call) -> Floats:
    """Sum of squares of each sample over all tensors of a call; of the whole call where samples cannot be told apart."""
    lengths = {len(t) if t.dim() else -1 for t in call}
    rows = lengths.pop() if len(lengths) == 1 else -1
    parts = [t.double().square().reshape(rows if rows > 0 else 1, -1).sum(1) for t in call]
    return np.asarray(torch.stack(parts).sum(0).numpy(), dtype=np.float64)


def _grouped(values: Floats) -> tuple[float, ...]:
    count = min(GROUPS, len(values))
    means = [float(values[g::count].mean()) for g in range(count)]
    return tuple(0.0 if math.isclose(m, 0.0, abs_tol=1e-300) else m for m in means)
