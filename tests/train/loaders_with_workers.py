"""Loaders with workers, in a process of their own: forks must not share a runner of tests.

test_train_patience.py runs this file with pytest.
"""

from __future__ import annotations

import time
from types import ModuleType

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, _utils

from paredown.errors import RejectedError, ResourceError
from paredown.train import check_roles, task_from_module
from paredown.train.given import given_digests, given_notes
from paredown.train.patience import Patient

_utils.MP_STATUS_CHECK_INTERVAL = 1.0  # so long, and not 5 s, PyTorch waits for a worker that hangs before it ends it


class Stuck(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5:
            time.sleep(600)
        return torch.full((2,), float(index))


def test_a_loader_whose_worker_hangs_ends_with_a_hint() -> None:
    got, start = [], time.monotonic()
    loader = DataLoader(Stuck(), batch_size=2, num_workers=1)
    with pytest.raises(
        ResourceError, match=r"calibration_batches must give a batch within 3 s.*num_workers=0"
    ) as caught:
        for batch in Patient(lambda: loader, "calibration_batches", 3)():
            got.append(batch)  # noqa: PERF402  (those before the one that hangs)
    assert caught.value.exit_code == 7
    assert len(got) == 2
    assert time.monotonic() - start < 60
    assert loader.timeout == 0


def test_a_timeout_of_the_users_own_stands() -> None:
    loader = DataLoader(Stuck(), batch_size=2, num_workers=1, timeout=2)
    with pytest.raises(RuntimeError, match="DataLoader timed out after 2 seconds"):
        list(Patient(lambda: loader, "train_batches", 600)())
    assert loader.timeout == 2


class Broken(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5:
            msg = "cannot identify image file 'scan-0005.png'"
            raise OSError(msg)
        return torch.zeros(2 + (index == 7))


def test_fault_51_what_a_worker_raised_is_of_the_dataset() -> None:
    with pytest.raises(RejectedError) as caught:
        list(Patient(lambda: DataLoader(Broken(), batch_size=2, num_workers=1), "train_batches")())
    said = str(caught.value)
    assert said.startswith(
        "train_batches must give batches. Got OSError: cannot identify image file 'scan-0005.png', at loaders_with_workers.py:"
    )
    assert " in __getitem__. " in said
    with pytest.raises(RejectedError, match=r"train_batches must give batches. Got RuntimeError: .*size"):
        list(Patient(lambda: DataLoader(Broken(), batch_size=2, sampler=[6, 7]), "train_batches")())
    with pytest.raises(
        RejectedError, match=r"Got OSError: cannot identify .*, at loaders_with_workers.py:\d+ in __getitem__"
    ):
        list(Patient(lambda: DataLoader(Broken(), batch_size=2), "train_batches")())


def test_fault_60_a_dataset_that_cannot_be_sent_to_workers() -> None:
    class Local(Stuck):
        pass

    loader = DataLoader(Local(), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    with (
        pytest.warns(UserWarning, match="pickle"),
        pytest.raises(RejectedError, match=r"Got .*pickle.*Local.*num_workers=0"),
    ):
        list(Patient(lambda: loader, "train_batches")())


def module(**more: object) -> ModuleType:
    found = ModuleType("mine")
    data = torch.arange(24.0).reshape(3, 4, 2)
    found.__dict__.update(
        model=lambda: torch.nn.Linear(2, 1),
        inputs=lambda: torch.zeros(2, 2),
        calibration_batches=lambda: [data[0]],
        test_batches=lambda: [data[1]],
        train_batches=lambda: DataLoader(Stuck(), batch_size=2, num_workers=1),
        step=lambda model, batch: model(batch).mean(),
        evaluate=lambda predict, batches: {"m": [float(predict(b).sum()) for b in batches]},
        METRIC={"name": "m", "unit": "", "goal": "max"},
    )
    found.__dict__.update(more)
    return found


def test_fault_60_the_task_module_sets_the_limit() -> None:
    with pytest.raises(ResourceError, match="train_batches must give a batch within 1 s"):
        check_roles(task_from_module(module(BATCH_SECONDS=1)))


def test_waiting_workers_of_a_loader_are_no_change() -> None:
    loader = DataLoader([torch.ones(2)] * 4, num_workers=1, persistent_workers=True)
    before = given_digests({"calibrate": loader, "train": lambda model: loader})
    assert len(list(loader)) == 4
    assert given_digests({"calibrate": loader, "train": lambda model: loader}) == before
    assert not given_notes(before)
