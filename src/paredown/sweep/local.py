"""Local: the trials of a sweep on this machine. `run_missing` runs the cells without a result; `read_results` reads them.

    FOLDER/journal.jsonl        one line per finished trial, appended by the one process that holds the folder
    FOLDER/trials/KEY/          what a trial made; KEY is the digest of the cell and of the versions it ran with
    FOLDER/trials/KEY/result.json    its record, written whole by the trial: the journal only gathers these

A kill between a result and its line in the journal loses nothing, as the result is found; a line cut short is dropped.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from paredown.errors import Interrupted, ResourceError, UsageError
from paredown.records import Record, append_line, mend, write_text
from paredown.sweep.grid import Cell
from paredown.sweep.serve import MARK

Status = Literal["done", "refused", "crashed", "timeout", "out of memory", "not run"]
JOURNAL, TRIALS, RESULT = "journal.jsonl", "trials", "result.json"
_NO_MEMORY = ("MemoryError", "can't allocate memory", "bad_alloc", "OutOfMemoryError", "out of memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one trial ended. Only one that is done has a record: a failure is never a number."""

    digest: str
    status: Status
    reason: str = ""
    """Why there is no record, in a line."""
    tail: tuple[str, ...] = ()
    """The last lines it wrote to stderr."""
    record: Record | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """How trials run here."""

    worker: str
    """Name of the module with `main(request, emit)` that does a trial."""
    processes: int
    threads: int = 1
    """Of one trial, whatever the number of processes: results must not depend on it."""
    seconds: float | None = None
    memory_bytes: int | None = None
    gpus: tuple[str, ...] = ()
    """Each process sees one of them, in turn."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            msg = f"--processes must be ≥ 1. Got {self.processes}."
            raise UsageError(msg)
        if self.memory_bytes is not None and sys.platform != "linux":
            msg = f"curve.trial.memory must be used on Linux. Got {sys.platform}. Leave it out."
            raise UsageError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A trial begins, goes on or ends."""

    cell: Cell
    what: Literal["begins", "goes on", "ends"]
    told: Mapping[str, Any] = field(default_factory=dict)
    """What the trial says of itself."""
    outcome: Outcome | None = None


def key_of_trial(digest: str, versions: Mapping[str, Any]) -> str:
    """What a result is found under: 20 hexadecimal digits of the cell and the versions."""
    text = json.dumps([digest, dict(versions)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def trial_folder(folder: Path, digest: str, versions: Mapping[str, Any]) -> Path:
    """Where a trial keeps its files."""
    return folder / TRIALS / key_of_trial(digest, versions)


def read_results(cells: Sequence[Cell], folder: Path, versions: Mapping[str, Any]) -> dict[str, Outcome]:
    """What is known of the cells, by digest: the journal, and results that no line tells of yet."""
    return _known(cells, folder, versions)[0]


def _known(cells: Sequence[Cell], folder: Path, versions: Mapping[str, Any]) -> tuple[dict[str, Outcome], set[str]]:
    """(outcomes by digest, digests of those that only their own folder tells of)."""
    keys = {key_of_trial(c.digest, versions): c for c in cells}
    rows = {key: row for row in _rows(folder / JOURNAL) if (key := str(row.get("key"))) in keys}  # the last line counts
    found = {keys[key].digest: _outcome(keys[key].digest, row) for key, row in rows.items()}
    alone = set()
    for key, cell in keys.items():
        if cell.digest not in found or found[cell.digest].status != "done":
            record = _result(folder / TRIALS / key)
            if record is not None:
                found[cell.digest] = Outcome(digest=cell.digest, status="done", record=record)
                alone.add(cell.digest)
    return found, alone


def run_missing(
    cells: Sequence[Cell],
    folder: Path,
    versions: Mapping[str, Any],
    machine: Machine,
    *,
    retry: bool = False,
    progress: Callable[[Event], None] = lambda event: None,
) -> None:
    """Run every cell without a result, those first that others need; each in a process of its own, marked if it fails.

    Failed trials stay as they are, unless `retry`. The caller holds the folder's lock. Raises Interrupted (Ctrl-C; the
    same call goes on) and ResourceError (the journal cannot be written, or trials cannot be started).
    """
    journal = folder / JOURNAL
    mend(journal)
    known, alone = _known(cells, folder, versions)
    todo = []
    for cell in cells:
        outcome = known.get(cell.digest)
        if outcome is None or (retry and outcome.status != "done"):
            todo.append(cell)
        elif cell.digest in alone:
            _append(journal, cell, key_of_trial(cell.digest, versions), outcome)
    if not todo:
        return
    sweep = _Sweep(folder=folder, versions=dict(versions), machine=machine, progress=progress)
    sweep.plan(todo, {d: o for d, o in known.items() if o.status == "done" or not retry})
    try:
        sweep.run()
    except KeyboardInterrupt as error:
        missing = len(todo) - sweep.ended
        msg = f"{len(cells) - missing} of {len(cells)} trials are done or marked; the same command goes on with the others."
        raise Interrupted(msg) from error
    finally:
        sweep.stop()


class _Slot:
    """A server, and the cell it is at work on."""

    def __init__(self, machine: Machine, number: int) -> None:
        gpus = {"CUDA_VISIBLE_DEVICES": machine.gpus[number % len(machine.gpus)]} if machine.gpus else {}
        environment = {**os.environ, "OMP_NUM_THREADS": str(machine.threads), **gpus}
        self.cell: Cell | None = None
        self.began = 0.0
        self.heard = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paredown.sweep.serve", machine.worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment, start_new_session=True,
        )  # fmt: skip

    def ask(self, cell: Cell, request: Mapping[str, Any]) -> None:
        self.cell, self.began = cell, time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is read as the end of the server
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def answers(self) -> Iterable[dict[str, Any]]:
        """What came since the last time; the end of the server is an answer too."""
        assert self.process.stdout is not None
        read = os.read(self.process.stdout.fileno(), 1 << 16)
        if not read:
            code = self.process.wait()
            yield {"ended": code, "stopped": "", "tail": ["the process that starts trials ended"], "server": True}
            return
        *lines, self.heard = (self.heard + read).split(b"\n")
        for line in lines:
            if line.startswith(MARK.encode()):
                yield json.loads(line[1:])

    def close(self) -> None:
        """End the server: the closed pipe ends the trial and all it started."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@dataclass(slots=True, kw_only=True)
class _Sweep:
    """The trials that run, those that may, and those that wait for others."""

    folder: Path
    versions: Mapping[str, Any]
    machine: Machine
    progress: Callable[[Event], None]
    ended: int = 0
    ready: collections.deque[Cell] = field(default_factory=collections.deque)
    waiting: dict[str, set[str]] = field(default_factory=dict)
    """Digest of a cell to the digests it still waits for."""
    after: dict[str, list[Cell]] = field(default_factory=lambda: collections.defaultdict(list))
    slots: list[_Slot] = field(default_factory=list)

    def plan(self, todo: Sequence[Cell], known: Mapping[str, Outcome]) -> None:
        """Sort the cells by whether they can begin."""
        for cell in todo:
            needs = {digest for _, digest in cell.needs}
            failed = [known[d] for d in needs if d in known and known[d].status != "done"]
            missing = {d for d in needs if d not in known}
            if failed:
                self._skip(cell)
            elif missing:
                self.waiting[cell.digest] = missing
                for digest in missing:
                    self.after[digest].append(cell)
            else:
                self.ready.append(cell)

    def run(self) -> None:
        """Until nothing runs and nothing can begin."""
        with selectors.DefaultSelector() as selector:
            while self.ready or any(s.cell is not None for s in self.slots):
                self._start(selector)
                for key, _ in selector.select():
                    slot: _Slot = key.data
                    for answer in slot.answers():
                        self._heard(slot, answer)
                        if answer.get("server"):
                            selector.unregister(key.fileobj)
                            self.slots.remove(slot)
                            slot.close()

    def stop(self) -> None:
        """End all processes."""
        for slot in self.slots:
            slot.close()

    def _start(self, selector: selectors.BaseSelector) -> None:
        while self.ready:
            slot = next((s for s in self.slots if s.cell is None), None)
            if slot is None and len(self.slots) == self.machine.processes:
                return
            if slot is None:
                slot = self._new_slot(selector)
            cell = self.ready.popleft()
            place = trial_folder(self.folder, cell.digest, self.versions)
            request = {
                "cell": {
                    **cell.told(),
                    "epochs": cell.epochs,
                    "latency": cell.latency,
                    "recipe": cell.recipe.to_yaml(),
                },
                "folder": str(place),
                "needs": {r: str(trial_folder(self.folder, d, self.versions)) for r, d in cell.needs},
                "versions": dict(self.versions),
                "beside": None if cell.recipe.folder is None else str(cell.recipe.folder),
            }
            limits = {"seconds": self.machine.seconds, "memory_bytes": self.machine.memory_bytes}
            slot.ask(cell, {"request": request, **limits})
            self.progress(Event(cell=cell, what="begins"))

    def _new_slot(self, selector: selectors.BaseSelector) -> _Slot:
        try:
            slot = _Slot(self.machine, len(self.slots))
        except OSError as error:
            msg = f"a process for trials must start. Got {error.strerror or error}. Use fewer --processes."
            raise ResourceError(msg) from error
        self.slots.append(slot)
        assert slot.process.stdout is not None
        selector.register(slot.process.stdout, selectors.EVENT_READ, slot)
        return slot

    def _heard(self, slot: _Slot, answer: Mapping[str, Any]) -> None:
        cell = slot.cell
        if cell is None:
            return
        if "ended" not in answer:
            self.progress(Event(cell=cell, what="goes on", told=answer))
            return
        slot.cell = None
        key = key_of_trial(cell.digest, self.versions)
        outcome = self._judged(cell, self.folder / TRIALS / key, answer)
        _append(self.folder / JOURNAL, cell, key, outcome, seconds=time.monotonic() - slot.began)
        self.ended += 1
        self.progress(Event(cell=cell, what="ends", outcome=outcome))
        for other in self.after.pop(cell.digest, []):
            if other.digest not in self.waiting:
                continue
            self.waiting[other.digest].discard(cell.digest)
            if outcome.status != "done":
                del self.waiting[other.digest]
                self._skip(other)
            elif not self.waiting[other.digest]:
                del self.waiting[other.digest]
                self.ready.append(other)

    def _judged(self, cell: Cell, place: Path, answer: Mapping[str, Any]) -> Outcome:
        tail, code = tuple(map(str, answer["tail"])), int(answer["ended"])
        record = _result(place)
        if record is not None:
            return Outcome(digest=cell.digest, status="done", record=record)
        last = next((line for line in reversed(tail) if line.strip()), "no message")
        status: Status = "crashed"
        if answer["stopped"] == "time":
            status, reason = "timeout", f"not done in {self.machine.seconds:g} s"
        elif answer["stopped"] == "memory":
            status, reason = "out of memory", f"more than {(self.machine.memory_bytes or 0) / 1e9:.3g} GB in memory"
        elif any(sign in line for sign in _NO_MEMORY for line in tail[-3:]):
            status, reason = "out of memory", last
        elif code < 0:
            reason = f"ended by signal {-code}" + (", perhaps for want of memory" if code == -9 else f": {last}")
        else:
            status, reason = ("refused" if last.startswith("paredown.errors.") else "crashed"), last
        return Outcome(digest=cell.digest, status=status, reason=reason, tail=tail)

    def _skip(self, cell: Cell) -> None:
        """Not run, as is all that waits for it: it has no line in the journal, so that a retry of the other runs it."""
        self.ended += 1
        outcome = Outcome(digest=cell.digest, status="not run", reason="a trial that it needs has no result")
        self.progress(Event(cell=cell, what="ends", outcome=outcome))
        for other in self.after.pop(cell.digest, []):
            if self.waiting.pop(other.digest, None) is not None:
                self._skip(other)


# ------------------------------------------------------------------------------------------------------------- journal


def _append(journal: Path, cell: Cell, key: str, outcome: Outcome, *, seconds: float | None = None) -> None:
    """One line, on the disk when this returns."""
    row = {
        "key": key,
        "digest": cell.digest,
        "name": cell.name,
        "status": outcome.status,
        "reason": outcome.reason,
        "tail": list(outcome.tail),
        "seconds": None if seconds is None else round(seconds, 2),
        "record": None if outcome.record is None else json.loads(outcome.record.to_json()),
    }
    append_line(journal, json.dumps(row, allow_nan=False))


def _rows(journal: Path) -> Iterable[dict[str, Any]]:
    """The lines of the journal; what is no line is left out: its result is found where it lies."""
    if not journal.is_file():
        return
    with journal.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def _outcome(digest: str, row: Mapping[str, Any]) -> Outcome:
    record = row.get("record")
    return Outcome(
        digest=digest,
        status=row["status"],
        reason=str(row.get("reason", "")),
        tail=tuple(map(str, row.get("tail", ()))),
        record=None if record is None else Record.from_data(record),
    )


def write_result(place: Path, record: Record) -> None:
    """What a trial writes last."""
    write_text(place / RESULT, record.to_json() + "\n")


def _result(place: Path) -> Record | None:
    file = place / RESULT
    try:
        return Record.from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
