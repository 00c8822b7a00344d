"""Batches on the command line: those of a task, with its step, or a file of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from paredown.cli.samples import as_batches
from paredown.cli.sources import arrays
from paredown.errors import UsageError

if TYPE_CHECKING:
    from paredown.program import Program
    from paredown.train import Task as TaskModule

Task = Annotated[
    str | None,
    Parameter(
        name="--task",
        help="Whose training batches and step are read: digits, cifar10, path/to/task.py or package.module, as in a recipe.",
    ),
]
Data = Annotated[
    Path | None, Parameter(name="--data", help="Folder handed to the task's functions that have a `data`.")
]
Calibrate = Annotated[
    Path | None,
    Parameter(name="--calibrate", help="Instead of --task: .npz or .npy of inputs, samples along the first axis."),
]
Batches = Annotated[int, Parameter(name="--batches", help="Batches that are read at most.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is read, and by whose loss."""

    step: Callable[..., Any] | None
    most: int
    """Batches at most."""
    _drawn: Callable[[Program], Iterable[Any]]

    def of(self, program: Program) -> Callable[[], Iterable[Any]]:
        """`batches()` for a model: whole ones where there is a `step`, else its inputs. The same at each call."""
        return lambda: self._drawn(program)


def source(task: str | None, data: Path | None, calibrate: Path | None, *, most: int, seed: int) -> Source | None:
    """The batches that were named, read or imported; None where none were. Raises UsageError and RejectedError."""
    if task is not None and calibrate is not None:
        msg = f"--task must stand without --calibrate: both say what is read. Got {task!r} and {str(calibrate)!r}."
        raise UsageError(msg)
    if data is not None and task is None:
        msg = f"--data must come with --task, whose functions take it. Got {str(data)!r} alone."
        raise UsageError(msg)
    if most < 1:
        msg = f"--batches must be an integer ≥ 1. Got {most}."
        raise UsageError(msg)
    if calibrate is not None:
        read = arrays(calibrate, "--calibrate")
        return Source(step=None, most=most, _drawn=lambda program: as_batches(read, program, "--calibrate"))
    if task is None:
        return None
    from paredown.models import load_task_module
    from paredown.train import task_from_module

    return _of_task(task_from_module(load_task_module(task), data=data), most, seed)


def _of_task(task: TaskModule, most: int, seed: int) -> Source:
    """Training batches with their step; calibration inputs of a task that trains by itself."""
    from paredown.train.task import seed_all

    draw = task.calibration_batches if task.step is None or task.train_batches is None else task.train_batches

    def drawn(program: Program) -> Iterable[Any]:
        del program
        seed_all(seed)
        return draw()

    return Source(step=None if draw is task.calibration_batches else task.step, most=most, _drawn=drawn)
