"""Patience: what hangs ends with a hint, what is slow but comes is left alone."""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import forked
from paredown.errors import RejectedError, ResourceError, UsageError
from paredown.train import task_from_module
from paredown.train.patience import Patient


def test_loaders_with_workers() -> None:
    """In a process of its own, without a terminal's plugins."""
    file = Path(__file__).with_name("loaders_with_workers.py")
    call = "import sys, pytest\nsys.exit(pytest.main(['-q', '-n', '0', '-p', 'no:cacheprovider', sys.argv[1]]))"
    done = forked.run(call, file)
    assert "6 passed" in done.stdout, done.stdout + done.stderr


def test_whatever_else_is_late_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    def slow() -> Iterator[int]:
        yield 1
        time.sleep(0.6)
        yield 2

    assert list(Patient(slow, "train_batches", 2.0)()) == [1, 2]
    said = capsys.readouterr().err
    assert said.count("note: waiting for train_batches: no batch for 0.2 s, at most 2 s are waited (Ctrl-C stops)") == 1
    assert not [
        t for t in threading.enumerate() if t.name == "patience train_batches" and t.is_alive() and not _ends(t)
    ]


def _hangs() -> Iterator[int]:
    yield 1
    with contextlib.suppress(Exception):  # a loader that tries again whatever it meets
        threading.Event().wait(60)
    yield 2


def _hangs_at_once() -> list[int]:
    time.sleep(60)
    return [1]


@pytest.mark.parametrize("function", [_hangs, _hangs_at_once, lambda: map(time.sleep, [60])])
def test_fault_60_what_hangs_without_workers_is_ended(function: Callable[[], Iterable[int]]) -> None:
    start, before = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with pytest.raises(
        ResourceError, match=r"test_batches must give a batch within 0.3 s.*BATCH_SECONDS in the task module"
    ) as caught:
        list(Patient(function, "test_batches", 0.3)())
    assert caught.value.exit_code == 7 and time.monotonic() - start < 5
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_wait_within_a_wait_ends_by_its_own_limit_and_lets_the_other_go_on() -> None:
    def within(pause: float) -> Iterator[int]:
        yield from Patient(lambda: iter([1, 2]), "train_batches", 60)()
        time.sleep(pause)

    assert list(Patient(lambda: within(0.0), "calibration_batches", 0.5)()) == [1, 2]
    with pytest.raises(ResourceError, match=r"calibration_batches must give a batch within 0\.5 s"):
        list(Patient(lambda: within(30.0), "calibration_batches", 0.5)())


def test_an_alarm_of_somebody_else_stands(capsys: pytest.CaptureFixture[str]) -> None:
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.4)
        assert list(Patient(lambda: map(time.sleep, [0.8]), "train_batches", 0.2)()) == [None]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert heard == [True]
    assert "note: waiting for train_batches: no batch for 0.02 s (Ctrl-C stops)" in capsys.readouterr().err


def _ends(thread: threading.Thread) -> bool:
    thread.join(5)
    return not thread.is_alive()


def test_the_time_between_batches_is_the_users_own(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in Patient(lambda: iter([1, 2, 3]), "train_batches", 1.0)():
        time.sleep(0.7)
    assert capsys.readouterr().err == ""


def test_length_attributes_and_errors_are_those_of_the_loader() -> None:
    loader = DataLoader(TensorDataset(torch.zeros(8, 2)), batch_size=4)
    seen = Patient(lambda: loader, "train_batches")()
    assert isinstance(seen, Sized) and len(seen) == 2
    assert seen.batch_size == 4  # type: ignore[attr-defined]
    assert [len(b[0]) for b in copy.deepcopy(seen)] == [4, 4]

    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("mine")

    seen = Patient(broken, "train_batches")()
    assert not isinstance(seen, Sized)
    with pytest.raises(KeyError, match="mine"):
        list(seen)
    assert list(Patient(list, "train_batches")()) == []


@pytest.mark.parametrize("wrong", [0, -1, True, "10"])
def test_the_limit_must_be_a_time(wrong: object) -> None:
    found = ModuleType("mine")
    found.__dict__.update(
        model=lambda: torch.nn.Linear(2, 1),
        inputs=lambda: torch.zeros(2, 2),
        calibration_batches=lambda: [torch.zeros(2, 2)],
        test_batches=lambda: [torch.ones(2, 2)],
        train_batches=lambda: [torch.ones(3, 2)],
        step=lambda model, batch: model(batch).mean(),
        evaluate=lambda predict, batches: {"m": [float(predict(b).sum()) for b in batches]},
        METRIC={"name": "m", "unit": "", "goal": "max"},
        BATCH_SECONDS=wrong,
    )
    with pytest.raises(UsageError, match="BATCH_SECONDS must be a number above 0"):
        task_from_module(found)


@pytest.mark.parametrize("given", [None, 3, "batches", {"x": 1}])
def test_what_holds_no_batches_is_refused(given: object) -> None:
    with pytest.raises(RejectedError, match=r"calibration_batches\(\) must return batches.*Got"):
        Patient(lambda: given, "calibration_batches")()  # type: ignore[arg-type, return-value]


def test_a_generator_that_is_used_up_is_refused() -> None:
    once = iter([1, 2])
    batches = Patient(lambda: once, "test_batches")
    assert list(batches()) == [1, 2]
    with pytest.raises(RejectedError, match=r"test_batches\(\) must return its batches anew"):
        batches()
    anew = Patient(lambda: iter([1, 2]), "test_batches")
    assert list(anew()) == list(anew()) == [1, 2]
