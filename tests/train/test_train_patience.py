"""Patience: what hangs ends with a hint, what is slow but comes is left alone."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sized
from types import ModuleType

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from paredown.errors import ResourceError, UsageError
from paredown.train import check_roles, task_from_module
from paredown.train.patience import Patient


class Stuck(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5:
            time.sleep(600)
        return torch.full((2,), float(index))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_hangs_ends_with_a_hint(workers: int) -> None:
    got, start = [], time.monotonic()
    with pytest.raises(
        ResourceError, match=r"calibration_batches must give a batch within 3 s.*num_workers=0"
    ) as caught:
        for batch in Patient(
            lambda: DataLoader(Stuck(), batch_size=2, num_workers=workers), "calibration_batches", 3.0
        )():
            got.append(batch)  # noqa: PERF402  (those before the one that hangs)
    assert caught.value.exit_code == 7
    assert 1 <= len(got) <= 2
    assert time.monotonic() - start < 60
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_the_time_between_batches_is_the_users_own() -> None:
    for _ in Patient(lambda: iter([1, 2, 3]), "train_batches", 0.2)():
        time.sleep(0.3)


def test_length_attributes_and_errors_are_those_of_the_loader() -> None:
    loader = DataLoader(Stuck(), batch_size=4)
    seen = Patient(lambda: loader, "train_batches")()
    assert isinstance(seen, Sized) and len(seen) == 2
    assert seen.batch_size == 4  # type: ignore[attr-defined]

    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("mine")

    seen = Patient(broken, "train_batches")()
    assert not isinstance(seen, Sized)
    with pytest.raises(KeyError, match="mine"):
        list(seen)
    assert list(Patient(list, "train_batches")()) == []


def test_alarms_of_the_user_and_threads_are_left_alone() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        for _ in Patient(lambda: iter([1, 2]), "train_batches", 0.05)():
            time.sleep(0.25)
        assert rung == [1]
        done: list[int] = []
        thread = threading.Thread(target=lambda: done.extend(Patient(lambda: iter([1, 2]), "train_batches", 0.05)()))
        thread.start()
        thread.join()
        assert done == [1, 2]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def module(**more: object) -> ModuleType:
    found = ModuleType("mine")
    data = torch.arange(24.0).reshape(3, 4, 2)
    found.__dict__.update(
        model=lambda: torch.nn.Linear(2, 1),
        inputs=lambda: torch.zeros(2, 2),
        calibration_batches=lambda: [data[0]],
        test_batches=lambda: [data[1]],
        train_batches=lambda: DataLoader(Stuck(), batch_size=2),
        step=lambda model, batch: model(batch).mean(),
        evaluate=lambda predict, batches: {"m": [float(predict(b).sum()) for b in batches]},
        METRIC={"name": "m", "unit": "", "goal": "max"},
    )
    found.__dict__.update(more)
    return found


def test_fault_60_the_task_module_sets_the_limit() -> None:
    with pytest.raises(ResourceError, match="train_batches must give a batch within 1 s"):
        check_roles(task_from_module(module(BATCH_SECONDS=1)))
    for wrong in (0, -1, True, "10"):
        with pytest.raises(UsageError, match="BATCH_SECONDS must be a number above 0"):
            task_from_module(module(BATCH_SECONDS=wrong))
