"""Roles of data: training, calibration, held-out and test samples must be there, and be different ones, by content."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError
from paredown.program import call_inputs
from paredown.train.task import Batches, Predict, Task, first_tensor, kept_randomness

TRAIN_SECONDS = 120.0
"""Time after which training data are no longer compared with the other roles."""
ALIKE = 0.9
"""Where no more than this share of the test samples is distinct, samples are alike by chance (a few sensors, categories), and one that is
also in another role shows nothing."""
MOST_BATCHES = 100_000
"""Of calibration, held-out or test data; more have no end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """How many distinct samples each role has, and what is odd about them."""

    num_train: int | None
    num_calibration: int
    num_choose: int | None
    num_test: int | None
    test_digest: str | None = None
    """SHA-256 over all test samples with all that their batches hold of them, their truth above all, as they come, and as often; None where
    evaluate reads data of its own. Values per sample of two runs may be paired by their place where it is the same."""
    warnings: tuple[str, ...] = ()
    samples: Mapping[str, set[bytes] | None] = field(default_factory=dict, repr=False, compare=False)
    """Hashes by role, until evaluate has run: it may read test data of its own."""

    def beside(self, seen: Remembered) -> Roles:
        """With what evaluate was seen to read: raises RejectedError where choices are made on it, warns where it was trained on."""
        if seen.samples <= (self.samples.get("test") or set()):
            return dataclasses.replace(self, samples={})  # compared already
        told = [
            t for name in ("calibration_batches", "choose_batches") for t in seen.refuse(self.samples.get(name), name)
        ]
        told += _common_with("training", self.samples.get("train"), "test", seen.samples)
        return dataclasses.replace(self, warnings=(*self.warnings, *told), samples={})


def content_hashes(batches: Iterable[Any], *, max_batches: int = 100_000, like: Any = None) -> set[bytes]:
    """16-byte hash of each sample's bytes in the first tensor of every batch (samples lie along axis 0).

    `like` is an example of the network's inputs: of several, all count. Targets behind them, or under other names, do not.

    >>> len(content_hashes([torch.tensor([[1.0], [2.0]]), (torch.tensor([[1.0]]), 0)]))
    2
    >>> users, items, ratings = torch.tensor([7, 7]), torch.tensor([1, 2]), torch.tensor([3.5, 4.0])
    >>> len(content_hashes([(users, items, ratings)])), len(content_hashes([(users, items, ratings)], like=(users, items)))
    (1, 2)
    """
    found: set[bytes] = set()
    for batch in islice(batches, max_batches):
        found.update(_hashes(_inputs_in(batch, like)))
    return found


def _inputs_in(batch: Any, like: Any) -> list[Tensor]:
    """The tensors of a batch that are the network's inputs, named ones last and by their names; without those that have no row for each sample."""
    first = first_tensor(batch)
    if like is None:
        return [first]
    args, kwargs = call_inputs(like)
    names, unnamed = sorted(kwargs), len(_tensors(args))
    if isinstance(batch, Mapping) and not set(batch) <= {"args", "kwargs"}:
        found = _tensors([batch[n] for n in names if n in batch])
    elif isinstance(batch, Mapping):
        given, named = call_inputs(batch)
        found = _tensors([given, [named[n] for n in sorted(named)]])
    else:
        leaves = _tensors(batch)
        behind = dict(zip(kwargs, leaves[unnamed:], strict=False))
        found = leaves[:unnamed] + [behind[n] for n in names if n in behind]
    first = found[0] if found else first
    return [t for t in found if t.shape[:1] == first.shape[:1]] or [first]


def _tensors(nested: Any) -> list[Tensor]:
    return [torch.as_tensor(v) for v in pytree.tree_leaves(nested) if isinstance(v, Tensor | np.ndarray)]


def _hashes(tensors: list[Tensor]) -> list[bytes]:
    """One for each row."""
    if not tensors[0].numel():
        return []
    columns = []
    for tensor in tensors:
        samples = tensor.detach().cpu().contiguous()
        prefix = f"{samples.dtype}{tuple(samples.shape[1:])}".encode()
        rows = samples.reshape(len(samples), -1) if samples.dim() else samples.reshape(1, 1)
        columns.append([hashlib.blake2b(prefix + _bytes(row), digest_size=16).digest() for row in rows])
    if len(columns) == 1:
        return columns[0]
    return [hashlib.blake2b(b"".join(row), digest_size=16).digest() for row in zip(*columns, strict=True)]


def check_roles(task: Task) -> Roles:
    """Train, calibrate/choose and test data must be there and be different samples, by content.

    Samples that are both in training and in test are a warning (augmented training samples differ from their
    originals, so only unaugmented duplicates are seen), as is a training set that is not read through in TRAIN_SECONDS.
    Raises RejectedError: a role has no batches or no end, calibration or held-out samples are also test samples,
    calibration batches do not have the structure of `inputs()`.
    """
    with kept_randomness():
        _check_structure(task)
        like = task.inputs()
        calibration = _role(task.calibration_batches, "calibration_batches", like)
        test = _role(task.test_batches, "test_batches", like)
        choose = _role(task.choose_batches, "choose_batches", like)
        reading = _Limited(task.train_batches, TRAIN_SECONDS)
        train = None if task.train_batches is None else _role(reading, "train_batches", like)
    warnings = [reading.warning] if reading.warning else []
    for name, role in (("calibration_batches", calibration), ("choose_batches", choose)):
        warnings += _refuse_common(name, role, test)
    for name, role in (("test", test), ("held-out", choose)):
        warnings += _common_with("training", train, name, role)
    return Roles(
        num_train=None if train is None else len(train),
        num_calibration=len(calibration or ()),
        num_choose=None if choose is None else len(choose),
        num_test=None if test is None else len(test),
        test_digest=None if test is None else test.whole.hexdigest(),
        warnings=tuple(warnings),
        samples={"calibration_batches": calibration, "choose_batches": choose, "train": train, "test": test},
    )


def check_calibration(
    task: Task,
    batches: Batches,
    *,
    calibrates: bool = True,
    trains: bool = False,
    name: str = "calibration_batches",
) -> tuple[str, ...]:
    """Before codes are calibrated on these batches: the data that the metric is read on must be there, and be different samples.

    Returns what to tell. Raises RejectedError where held-out or test data are empty, or hold calibration samples (test data), by content;
    not where nothing is `calibrates`d on them. Training data are read where it `trains`.
    """
    with kept_randomness():
        like = task.inputs()
        calibration = _role(batches, name, like)
        test = _role(task.test_batches, "test_batches", like)
        choose = _role(task.choose_batches, "choose_batches", like)
        train = _role(_Limited(task.train_batches, TRAIN_SECONDS), "train_batches", like) if trains else None
    told = _common_with("training", train, *(("test", test) if choose is None else ("held-out", choose)))
    if calibrates:
        told += _refuse_common(name, calibration, test)
        told += _common_with("calibration", calibration, "held-out", choose)
    return tuple(told)


class Remembered:
    """`predict` as before, and the hashes of the samples that it was given: of test data that evaluate reads by itself.

    >>> seen = Remembered(lambda x: x)
    >>> _ = seen(torch.zeros(3, 2)), seen(torch.ones(1, 2))
    >>> len(seen.samples)
    2
    """

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self.samples: set[bytes] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the predictor answers."""
        if any(isinstance(leaf, Tensor | np.ndarray) for leaf in pytree.tree_leaves((args, kwargs))):
            call = {"args": args, "kwargs": kwargs}
            self.samples |= content_hashes([call], like=call)
        return self._predict(*args, **kwargs)

    def refuse(self, samples: set[bytes] | None, name: str) -> list[str]:
        """Raises RejectedError where some of these are what evaluate gave the network; a sentence where that may be chance."""
        return _refuse_common(name, samples, self.samples, "what evaluate gives the network")


class _Samples(set[bytes]):
    """Hashes of a role's samples; `count` has those that repeat, too, and `whole` is of all that the batches hold, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.whole = 0, hashlib.sha256()

    def add_batch(self, batch: Any, like: Any) -> None:
        """The inputs of every sample; to `whole` each sample with its truth, however many come at once, then what has no row for each."""
        hashes = _hashes(_inputs_in(batch, like))
        self.update(hashes)
        self.count += len(hashes)
        tensors = _tensors(dict(batch) if isinstance(batch, Mapping) else batch)
        of_each = [t for t in tensors if t.shape[:1] == (len(hashes),) and t.numel()]
        self.whole.update(b"".join(_hashes(of_each) if of_each else hashes))
        for place, tensor in enumerate(tensors):
            if tensor.shape[:1] != (len(hashes),):  # boxes of a picture, or one number for all
                self.whole.update(b"".join([f"{place} {tuple(tensor.shape)}".encode(), *_hashes([tensor[None]])]))


def _refuse_common(
    name: str, role: set[bytes] | None, test: set[bytes] | None, whose: str = "test_batches"
) -> list[str]:
    common = len((role or set()) & (test or set()))
    known = test if isinstance(test, _Samples) else role  # evaluate may have read its data more than once
    if common and isinstance(known, _Samples) and len(known) <= ALIKE * known.count:
        return [
            f"{common} of {len(role or ())} distinct samples of {name} are in {whose} too. Samples are alike here ({len(known):,} of {known.count:,} "
            f"{'test' if known is test else name} samples are distinct), so that this shows no error; whether the same rows were taken is not tested."
        ]
    if common:
        msg = (
            f"{name} must not share samples with {whose}. Got {common} of {len(role or ())} samples that are also test samples. "
            "Test data never chooses anything: take calibration samples from the training data."
        )
        raise RejectedError(msg)
    return []


def _common_with(whose: str, one: set[bytes] | None, name: str, role: set[bytes] | None) -> list[str]:
    """A sentence with the count where samples that a figure is read on are also of this kind."""
    common = len((one or set()) & (role or set()))
    if not common:
        return []
    return [f"{common} of {len(role or ())} {name} samples are also {whose} samples: the {name} figures are too good."]


class _Limited:
    """Batches until a time is over, or MOST_BATCHES are read; endless and very large training data are compared with the other roles by what was read."""

    def __init__(self, batches: Batches | None, seconds: float) -> None:
        self._batches, self._seconds, self.warning = batches, seconds, ""

    def __call__(self) -> Iterator[Any]:
        assert self._batches is not None
        start = time.monotonic()
        for number, batch in enumerate(self._batches(), start=1):
            yield batch
            if number == MOST_BATCHES or time.monotonic() - start > self._seconds:
                self.warning = (
                    f"training data were compared with the other roles in their first {number:,} batches only "
                    f"({self._seconds:g} s, or {MOST_BATCHES:,} batches). If train_batches has no end, set recover.max_steps."
                )
                return


def _ending(batches: Iterable[Any], name: str) -> Iterator[Any]:
    start, told = time.monotonic(), False
    for number, batch in enumerate(batches):
        if not told and time.monotonic() - start > TRAIN_SECONDS / 2:
            told = True
            print(
                f"note: {name}: {number:,} batches read in {TRAIN_SECONDS / 2:g} s, and more come; it must end",
                file=sys.stderr,
            )
        if number == MOST_BATCHES:
            msg = f"{name} must end. Got more than {MOST_BATCHES:,} batches. Is it an endless loader?"
            raise RejectedError(msg)
        yield batch


def _role(batches: Batches | None, name: str, like: Any = None) -> _Samples | None:
    if batches is None:
        return None
    found = _Samples()
    for batch in islice(_ending(batches(), name), MOST_BATCHES + 1):
        found.add_batch(batch, like)
    if not found:
        msg = f"{name} must yield at least one batch with a sample. Got none. Check the path and filters of the data."
        raise RejectedError(msg)
    return found


def _check_structure(task: Task) -> None:
    batch = next(iter(task.calibration_batches()), None)
    if batch is None:
        return
    want, got = (call_inputs(v) for v in (task.inputs(), batch))
    if pytree.tree_structure(want) != pytree.tree_structure(got):
        msg = (
            f"calibration batches must have the structure of inputs(): {_shown(want)}. Got {_shown(got)}. Yield inputs only, or give "
            "the task module "
            "`batch_inputs(batch)`, which takes the inputs out of a batch."
        )
        raise RejectedError(msg)
    for example, given in zip(pytree.tree_leaves(want), pytree.tree_leaves(got), strict=True):
        if isinstance(example, Tensor) and isinstance(given, Tensor) and _kind(example) != _kind(given):
            msg = (
                f"calibration batches must be of the kind of inputs(): {_kind(example)}. Got {_kind(given)}. Only the first axis, that of the "
                "samples, may have another length. Convert them in calibration_batches, or give the task module `batch_inputs(batch)`."
            )
            raise RejectedError(msg)


def _kind(tensor: Tensor) -> str:
    """Type and shape of one sample, as "float32 [·, 3, 32, 32]"."""
    axes = ["·", *map(str, tensor.shape[1:])] if tensor.dim() else []
    return f"{str(tensor.dtype).removeprefix('torch.')} [{', '.join(axes)}]"


def _shown(call: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    """What a model is called with, as "model(tensor, mask=tensor)"."""

    def one(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {one(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list | tuple):
            left, right = "[]" if isinstance(value, list) else "()"
            return left + ", ".join(map(one, value)) + right
        return "tensor" if isinstance(value, Tensor) else type(value).__name__

    args, kwargs = call
    return f"model({', '.join([*map(one, args), *(f'{k}={one(v)}' for k, v in kwargs.items())])})"


def _bytes(row: Tensor) -> bytes:
    return row.reshape(-1).view(torch.uint8).numpy().tobytes() if row.numel() else b""
