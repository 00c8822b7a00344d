"""Patience: a data loader whose workers hang ends with a hint and not never (fault 60)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from paredown.errors import RejectedError, ResourceError

BATCH_SECONDS = 600.0
"""Longest wait for one batch, where the task module has no BATCH_SECONDS of its own. The first one starts the workers."""


class Patient:
    """A function that returns batches, as before, with a limit to the wait for one of them.

    A DataLoader with workers and no timeout of its own gets this one, and its end is a ResourceError with a hint. What else
    a batch comes from cannot be ended from outside without harm: there a line on stderr says what is waited for.

    >>> list(Patient(lambda: [1, 2], "train_batches", 60.0)())
    [1, 2]
    """

    def __init__(self, batches: Callable[[], Iterable[Any]], name: str, seconds: float = BATCH_SECONDS) -> None:
        self.batches, self.name, self.seconds = batches, name, seconds
        self._last: Any = None

    def __call__(self) -> Iterable[Any]:
        """The batches, as they are, but for the wait. Raises RejectedError for what holds none, or is used up."""
        source: Any = self.batches()
        if not isinstance(source, Iterable) or isinstance(source, str | bytes | Mapping):
            msg = (
                f"{self.name}() must return batches: a list, a DataLoader or a generator. Got {type(source).__name__}."
            )
            raise RejectedError(msg)
        if isinstance(source, Iterator):
            if source is self._last:
                msg = (
                    f"{self.name}() must return its batches anew in every call. Got the same {type(source).__name__} again, which is "
                    "used up. Make the generator inside the function, or return a list."
                )
                raise RejectedError(msg)
            self._last = source
        kind = _SizedBatches if isinstance(source, Sized) else _Batches
        return kind(source, self.name, self.seconds)


class _Batches:
    def __init__(self, source: Iterable[Any], name: str, seconds: float) -> None:
        self.source, self.name, self.seconds = source, name, seconds

    def __iter__(self) -> Iterator[Any]:
        with _said(self.name, self.seconds) as waiting:
            with _limited(self.source, self.name, self.seconds):
                source = iter(self.source)
            while True:
                try:
                    with waiting(), _explained(self.source, self.name, self.seconds):
                        batch = next(source)
                except StopIteration:
                    return
                yield batch

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self.source, name)


class _SizedBatches(_Batches):
    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]


@contextmanager
def _limited(source: Any, name: str, seconds: float) -> Iterator[None]:
    """The loader's own timeout, which its iterator reads when it is made, and only then."""
    if not isinstance(source, DataLoader) or not source.num_workers or source.timeout:
        yield
        return
    source.timeout = seconds
    try:
        with _explained(source, name, seconds):
            yield
    finally:
        source.timeout = 0


@contextmanager
def _explained(source: Any, name: str, seconds: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(source, DataLoader) or source.timeout or "DataLoader timed out" not in str(error):
            raise
        msg = (
            f"{name} must give a batch within {seconds:g} s. Got none: a worker of the data loader hangs. Try num_workers=0, which "
            "shows where; BATCH_SECONDS in the task module allows a longer wait."
        )
        raise ResourceError(msg) from error


@contextmanager
def _said(name: str, seconds: float) -> Iterator[Callable[[], Any]]:
    """One thread per pass over the batches, which looks at a clock and says so once, where a batch is late."""
    since: list[float] = []
    done = threading.Event()

    @contextmanager
    def waiting() -> Iterator[None]:
        since.append(time.monotonic())
        try:
            yield
        finally:
            since.clear()

    def watch() -> None:
        while not done.wait(min(seconds, 5.0) / 2):
            began = next(iter(since), None)
            if began is not None and time.monotonic() - began > seconds:
                print(f"note: waiting for {name}: no batch for {seconds:g} s (Ctrl-C stops)", file=sys.stderr)
                return

    watcher = threading.Thread(target=watch, daemon=True, name=f"patience {name}")
    watcher.start()
    try:
        yield waiting
    finally:
        done.set()
