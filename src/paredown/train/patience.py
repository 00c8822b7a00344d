"""Patience: a data loader whose workers hang ends with a hint and not never (fault 60)."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from paredown.errors import ParedownError, RejectedError, ResourceError

BATCH_SECONDS = 600.0
"""Longest wait for one batch, where the task module has no BATCH_SECONDS of its own. The first one starts the workers."""
_TOLD = 0.1
"""Share of that wait after which a line on stderr says what is waited for."""
_WAYS = "BATCH_SECONDS in the task module (in a notebook: paredown.train.patience.BATCH_SECONDS) allows a longer wait."


_LIBRARIES = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "<")
"""Where files lie that are not the user's."""


class Patient:
    """A function that returns batches, as before, with a limit to the wait for one of them: then a ResourceError with a hint.

    A DataLoader with workers and no timeout of its own gets this one. What else a batch comes from is ended by an alarm, as Ctrl-C would
    end it; where there is none (another thread than the main one, SIGALRM in use, Windows) a line on stderr says what is waited for.

    >>> list(Patient(lambda: [1, 2], "train_batches", 60.0)())
    [1, 2]
    """

    def __init__(self, batches: Callable[[], Iterable[Any]], name: str, seconds: float | None = None) -> None:
        self.batches, self.name, self._seconds = batches, name, seconds
        self._last: Any = None

    @property
    def seconds(self) -> float:
        """Longest wait for one batch."""
        return BATCH_SECONDS if self._seconds is None else self._seconds

    def __call__(self) -> Iterable[Any]:
        """The batches, as they are, but for the wait. Raises RejectedError for what holds none, or is used up."""
        with _said(self.name, self.seconds) as waiting, waiting():
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
        ends_itself = isinstance(self.source, DataLoader) and self.source.num_workers > 0
        with _said(self.name, self.seconds, ends=not ends_itself) as waiting:
            with _explained(self.source, self.name, self.seconds), _limited(self.source, self.seconds):
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
def _limited(source: Any, seconds: float) -> Iterator[None]:
    """The loader's own timeout, which its iterator reads when it is made, and only then."""
    if not isinstance(source, DataLoader) or not source.num_workers or source.timeout:
        yield
        return
    source.timeout = seconds
    try:
        yield
    finally:
        source.timeout = 0


@contextmanager
def _explained(source: Any, name: str, seconds: float) -> Iterator[None]:
    """What a DataLoader raises is of the user's dataset, wherever it was raised: it is told as such, with the name of the function."""
    try:
        yield
    except (ParedownError, StopIteration, MemoryError):
        raise
    except Exception as error:
        late = "DataLoader timed out" in str(error)
        if not isinstance(source, DataLoader) or (late and source.timeout):
            raise
        if not late:
            raise _of_loader(error, name) from error
        msg = (
            f"{name} must give a batch within {seconds:g} s. Got none: a worker of the data loader hangs. Try num_workers=0, which "
            f"shows where; {_WAYS}"
        )
        raise ResourceError(msg) from error


def _of_loader(error: Exception, name: str) -> ParedownError:
    """An error of a data loader; a worker's is a text that ends with what it raised, after its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    worker = lines[0].startswith("Caught ")
    got = lines[-1] if worker else f"{type(error).__name__}: {lines[0]}"
    text = str(error) if worker else "".join(traceback.format_tb(error.__traceback__))
    frames = [f for f in re.findall(r'File "(.+)", line (\d+), in (\S+)', text) if not f[0].startswith(_LIBRARIES)]
    where = f", at {Path(frames[-1][0]).name}:{frames[-1][1]} in {frames[-1][2]}" if frames else ""
    kind: type[ParedownError] = RejectedError
    fix = "Look at the dataset and its transforms; num_workers=0 shows where."
    if "shared memory" in str(error) or "Cannot allocate memory" in str(error):
        kind, fix = (
            ResourceError,
            "Take fewer workers or smaller batches, or more shared memory (docker run --shm-size).",
        )
    elif "pickle" in str(error).lower():
        fix = "Workers are sent the dataset: define it and its transforms in a module, not as lambda or inside a function, or set num_workers=0."
    return kind(f"{name} must give batches. Got {got.rstrip('.')[:500]}{where}. {fix}")


@contextmanager
def _said(name: str, seconds: float, *, ends: bool = True) -> Iterator[Callable[[], Any]]:
    """For one pass over the batches: gives the context of a single wait, which an alarm `ends` where there can be one.

    One thread per pass looks at a clock, and says so once, where a batch is late.
    """
    since: list[float] = []
    done = threading.Event()
    ends = ends and _alarm_is_free()

    @contextmanager
    def waiting() -> Iterator[None]:
        since.append(time.monotonic())
        try:
            with _ended(name, seconds) if ends else nullcontext():
                yield
        finally:
            since.clear()

    def watch() -> None:
        while not done.wait(min(_TOLD * seconds, 5.0) / 2):
            began = next(iter(since), None)
            if began is not None and time.monotonic() - began > _TOLD * seconds:
                end = f", at most {seconds:g} s are waited" if ends else ""
                print(
                    f"note: waiting for {name}: no batch for {_TOLD * seconds:g} s{end} (Ctrl-C stops)", file=sys.stderr
                )
                return

    watcher = threading.Thread(target=watch, daemon=True, name=f"patience {name}")
    watcher.start()
    try:
        yield waiting
    finally:
        done.set()


class _Late(BaseException):
    """Raised by the alarm; no user's `except Exception` takes it."""


_deadlines: list[float] = []
"""Of the waits that are open, one within another."""


def _alarm_is_free() -> bool:
    """Whether SIGALRM can end what the main thread waits for: nobody else uses it."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        return False
    unused = signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    return bool(_deadlines) or unused


@contextmanager
def _ended(name: str, seconds: float) -> Iterator[None]:
    """Raises ResourceError in what runs here for longer than this."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    _deadlines.append(time.monotonic() + seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Late as error:
        msg = (
            f"{name} must give a batch within {seconds:g} s. Got none: what it reads hangs, or is slow (a network drive, a lock, an endless "
            f"loop). {_WAYS}"
        )
        raise ResourceError(msg) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _deadlines.pop()
        signal.signal(signal.SIGALRM, before)
        if _deadlines:  # the wait that this one was within goes on
            signal.setitimer(signal.ITIMER_REAL, max(_deadlines[-1] - time.monotonic(), 1e-3))
