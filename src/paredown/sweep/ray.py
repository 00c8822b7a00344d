"""Ray: the trials of a sweep on the machines of a Ray cluster, by the same two functions as `local`.

The process that asks holds the folder and alone writes into it. A trial gets the files that it needs (its own from
before, the base, the pruned model) as bytes through Ray's object store, works in a temporary folder of its node, in a
process of its own under the same limits as here, and gives its files back. So nodes need no common disk, but each
needs paredown in the same versions (a trial refuses others), and what the recipe names by path (task module, data,
weights) at the same path. A node that is lost takes nothing finished with it: its trials begin again on another one.

Ray knows no passwords: who reaches a cluster runs code on it. Use one that is yours.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paredown.errors import MissingError, UsageError
from paredown.records import whole_file
from paredown.sweep.grid import Cell
from paredown.sweep.slots import Slot
from paredown.sweep.trials import RESULT, Event, Machine, Order, order_of, read_results, trial_folder

__all__ = ["read_results", "run_missing"]

MOST_LOSSES = 3
"""A trial that loses its node as often is marked: it may be the trial that ends it."""
MANY = 10_000
"""Trials at a time where nobody says how many: the cluster's own cores decide."""
_ANSWERS_WITHIN_S = 20
Files = Mapping[str, bytes]
"""Relative path, with slashes, to content."""


def run_missing(
    cells: Sequence[Cell],
    folder: Path,
    versions: Mapping[str, Any],
    machine: Machine,
    *,
    retry: bool = False,
    progress: Callable[[Event], None] = lambda event: None,
) -> None:
    """Run every cell without a result on the cluster at `machine.cluster`, as `local.run_missing` does here.

    As many run at a time as the cluster has cores / threads for, at most `machine.processes`. Trials tell only that they begin
    and how they end. A connection that was made before (`ray.init`) is used as it is. Raises MissingError (Ray, or no
    cluster at the address), UsageError (no node has the cores that a trial wants), Interrupted, and ResourceError (the
    journal cannot be written).
    """
    with order_of(cells, folder, versions, machine, retry=retry, progress=progress) as order:
        if order.ready:
            ray = _ray()
            with _connected(ray, machine):
                _check_room(ray, machine)
                _run(ray, order)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        msg = f"--ray must have Ray. Got {error}. pip install 'paredown[ray]'."
        raise MissingError(msg) from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, machine: Machine) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here tells nobody
    address = machine.cluster or "auto"
    try:
        if address not in ("auto", "local"):
            _check_health(address)
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, subprocess.SubprocessError) as error:
        said = str(error).splitlines()[0] if isinstance(error, ConnectionError | ValueError) else "nobody answers."
        msg = f"--ray must be the address of a Ray cluster that runs. Got {address!r}: {said} Start one: ray start --head."
        raise MissingError(msg) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_health(address: str) -> None:
    """Whether a cluster answers: `ray.init` itself waits for minutes where nobody does, and cannot be stopped."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    subprocess.run(command, check=True, capture_output=True, timeout=_ANSWERS_WITHIN_S)


def _check_room(ray: Any, machine: Machine) -> None:
    most = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if most < machine.threads * machine.ranks:
        msg = f"a node of the cluster must have the cores of one trial, {machine.threads * machine.ranks}. Got {most:g} at most. Set threads or recover.ranks in the recipe."
        raise UsageError(msg)


def _run(ray: Any, order: Order) -> None:
    """Until nothing runs and nothing can begin."""
    machine, losses = order.machine, collections.Counter[str]()
    # Ray's own retries are off: a loss is counted, and the next attempt starts from what is known then.
    of_one = machine.threads * machine.ranks
    trial = ray.remote(_trial).options(
        num_cpus=of_one, num_gpus=machine.ranks if machine.gpus else 0, max_retries=0, retry_exceptions=False
    )
    running: dict[Any, tuple[Cell, float]] = {}
    try:
        while order.ready or running:
            cores = ray.cluster_resources().get("CPU", 0)
            while order.ready and len(running) < min(machine.processes, max(1, int(cores // of_one))):
                cell = order.ready.popleft()
                running[_submitted(trial, order, cell)] = (cell, time.monotonic())
                order.progress(Event(cell=cell, what="begins"))
            (done, *_), _ = ray.wait([*running], num_returns=1)
            cell, began = running.pop(done)
            answer = _answer(ray, done, trial_folder(order.folder, cell.digest, order.versions))
            if answer.pop("lost", False):
                losses[cell.digest] += 1
                if losses[cell.digest] < MOST_LOSSES:
                    order.ready.appendleft(cell)
                    continue
            order.ends(cell, answer, seconds=time.monotonic() - began)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)  # ends Ray's worker, whose closed pipe ends the trial


def _submitted(trial: Any, order: Order, cell: Cell) -> Any:
    """The trial on its way, with copies of what it needs. Folders are named from the root that it will have there."""
    asked = order.request(cell, Path())
    needed = [packed(order.folder / path) for path in asked["request"]["needs"].values()]
    return trial.remote(asked, order.machine, packed(order.folder / asked["request"]["folder"]), *needed)


def _answer(ray: Any, done: Any, place: Path) -> dict[str, Any]:
    """How a trial ended, once its files are here; {"lost": True, …} where its node or its memory was taken from it."""
    try:
        answer, files = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        return {"ended": 1, "stopped": "", "tail": str(error).strip().splitlines()[-12:]}
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()[0]
        return {"ended": 1, "stopped": "", "tail": [f"lost {MOST_LOSSES} times: {first[:300]}"], "lost": True}
    unpacked(place, files)
    return dict(answer)


# --------------------------------------------------------------------------------------------------------- on the node


def _trial(asked: Mapping[str, Any], machine: Machine, own: Files, *needed: Files) -> tuple[dict[str, Any], Files]:
    """In a worker process of Ray: one trial in a temporary folder; (how it ended, its files)."""
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        root, request = Path(folder), asked["request"]
        needs = {role: root / path for role, path in request["needs"].items()}
        for place, files in zip([root / request["folder"], *needs.values()], [own, *needed], strict=True):
            unpacked(place, files)
        here = {"folder": str(root / request["folder"]), "needs": {role: str(path) for role, path in needs.items()}}
        answer = _asked_here({**asked, "request": {**request, **here}}, machine)
        return answer, packed(root / request["folder"])


_slots: dict[str, Slot] = {}
"""In a worker process of Ray, which does one trial after the other: its server with the libraries loaded, by its GPU."""


def _asked_here(asked: Mapping[str, Any], machine: Machine) -> dict[str, Any]:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # Ray's choice for this trial
    for other in [g for g in _slots if g != gpu]:
        _slots.pop(other).close()
    if gpu not in _slots:
        _slots[gpu] = Slot(dataclasses.replace(machine, gpus=()), 0)
    slot = _slots[gpu]
    slot.ask(None, asked)
    while True:
        for answer in slot.answers():
            if answer.get("server"):
                _slots.pop(gpu).close()
            if "ended" in answer:
                return answer


# ---------------------------------------------------------------------------------------------------------------- files


def packed(place: Path) -> dict[str, bytes]:
    """The files of a folder and of those in it; {} where there is none. Locks, half-written files and links stay behind.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> unpacked(folder, {"steps/a.txt": b"a"})
    >>> packed(folder)
    {'steps/a.txt': b'a'}
    """
    files = sorted(p for p in place.rglob("*") if p.is_file() and not p.is_symlink())
    return {p.relative_to(place).as_posix(): p.read_bytes() for p in files if p.suffix != ".tmp" and p.name != ".lock"}


def unpacked(place: Path, files: Files) -> None:
    """Make a folder hold these files and no others; one with the name of a result comes last, so that it is never alone.

    Raises UsageError where a path leads out of the folder.
    """
    for name in files:
        if not (place / name).resolve().is_relative_to(place.resolve()):
            msg = f"a file of a trial must lie in its folder. Got {name!r}."
            raise UsageError(msg)
    for gone in packed(place).keys() - files.keys():
        (place / gone).unlink()
    for name in sorted(files, key=lambda n: n == RESULT):
        with whole_file(place / name) as temporary:
            temporary.write_bytes(files[name])
