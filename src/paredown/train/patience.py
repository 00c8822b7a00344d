"""Patience: a batch must come within a time, so that a data loader whose workers hang ends with a hint and not never."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from paredown.errors import ResourceError

BATCH_SECONDS = 600.0
"""Longest wait for one batch, where the task module has no BATCH_SECONDS of its own. The first one starts the workers."""


class Patient:
    """A function that returns batches, as before, but ResourceError where one of them takes longer than `seconds`.

    The wait is ended by an alarm of the operating system: on Windows, outside of the main thread, and where an alarm is set already
    there is no limit.

    >>> list(Patient(lambda: [1, 2], "train_batches", 60.0)())
    [1, 2]
    """

    def __init__(self, batches: Callable[[], Iterable[Any]], name: str, seconds: float = BATCH_SECONDS) -> None:
        self.batches, self.name, self.seconds = batches, name, seconds

    def __call__(self) -> Iterable[Any]:
        """The batches, each of which must come in time."""
        with _limited(self.name, self.seconds):
            source = self.batches()
        kind = _SizedBatches if isinstance(source, Sized) else _Batches
        return kind(source, self.name, self.seconds)


class _Batches:
    def __init__(self, source: Iterable[Any], name: str, seconds: float) -> None:
        self.source, self.name, self.seconds = source, name, seconds

    def __iter__(self) -> Iterator[Any]:
        with _limited(self.name, self.seconds):
            source = iter(self.source)
        while True:
            try:
                with _limited(self.name, self.seconds):
                    batch = next(source)
            except StopIteration:
                return
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


class _SizedBatches(_Batches):
    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]


@contextmanager
def _limited(name: str, seconds: float) -> Iterator[None]:
    able = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not able or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        yield
        return

    def late(number: int, frame: object) -> None:
        msg = (
            f"{name} must give a batch within {seconds:g} s. Got none: a worker of the data loader may hang. Try num_workers=0, or "
            "DataLoader(timeout=30), which says more; BATCH_SECONDS in the task module allows a longer wait."
        )
        raise ResourceError(msg)

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
