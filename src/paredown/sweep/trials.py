"""Trials: what the engines of a sweep share: results under the digest of what was done, the journal, and whose turn it is.

    FOLDER/journal.jsonl        one line per finished trial, appended by the one process that holds the folder
    FOLDER/trials/KEY/          what a trial made; KEY is the digest of the cell and of the versions it ran with
    FOLDER/trials/KEY/result.json    its record, written whole by the trial: the journal only gathers these

A kill between a result and its line in the journal loses nothing, as the result is found; a line cut short is dropped.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from paredown.errors import Interrupted, ResourceError, UsageError
from paredown.records import Record, append_line, mend, write_text
from paredown.sweep.grid import Cell

Status = Literal["done", "refused", "crashed", "timeout", "out of memory", "not run"]
JOURNAL, TRIALS, RESULT = "journal.jsonl", "trials", "result.json"
_NO_ROOM = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS)))
"""What the disk says where the next trial would fail as well."""
_BROKEN = (ValueError, KeyError, TypeError, AttributeError)
"""What reading a record raises that is none."""
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
    ranks: int = 1
    """Processes that a trial may start to train by, each with these threads."""
    seconds: float | None = None
    memory_bytes: int | None = None
    gpus: tuple[str, ...] = ()
    """Each process sees one of them (those of all its ranks, as "0,1"), in turn."""
    cluster: str | None = None
    """Address of the Ray cluster whose machines are meant; None: this one."""

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
    found = {}
    for key, row in rows.items():
        with contextlib.suppress(*_BROKEN):  # its result is found where it lies
            found[keys[key].digest] = _outcome(keys[key].digest, row)
    alone = set()
    for key, cell in keys.items():
        noted = found.get(cell.digest)
        if noted is None or noted.status != "done" or lacks_a_file(noted.record):
            record = _result(folder / TRIALS / key)
            if record is not None and (noted is None or noted.record != record):
                found[cell.digest] = Outcome(digest=cell.digest, status="done", record=record)
                alone.add(cell.digest)
    return found, alone


def of_other_versions(
    cells: Sequence[Cell], folder: Path, versions: Mapping[str, Any]
) -> tuple[int, dict[str, tuple[Any, Any]]]:
    """(how many cells have a result of other versions alone, {name: (version of the last of these, version here)})."""
    keys = {c.digest: key_of_trial(c.digest, versions) for c in cells}
    there: dict[str, Mapping[str, Any]] = {}
    known = set()
    for row in _rows(folder / JOURNAL):
        digest = str(row.get("digest"))
        if row.get("status") != "done" or digest not in keys:
            continue
        if row.get("key") == keys[digest]:
            known.add(digest)
        else:
            with contextlib.suppress(*_BROKEN):
                there[digest] = dict(row["record"]["environment"]["versions"])
    others = [made for digest, made in there.items() if digest not in known]
    last = others[-1] if others else {}
    names = [name for name in {**last, **versions} if last.get(name) != versions.get(name)] if last else []
    return len(others), {name: (last.get(name), versions.get(name)) for name in names}


def lacks_a_file(record: Record | None) -> bool:
    """Whether a trial that ended well has no file in codes but the reason for it: a retry repeats it, and trains nothing."""
    told = record.details.get("quantized") if record is not None else None
    return isinstance(told, Mapping) and bool(told.get("failed"))


@dataclass(slots=True, kw_only=True)
class Order:
    """The trials that may begin, and those that wait for others; an engine takes from `ready` and tells how they ended."""

    folder: Path
    versions: Mapping[str, Any]
    machine: Machine
    progress: Callable[[Event], None]
    ended: int = 0
    ready: collections.deque[Cell] = field(default_factory=collections.deque)
    waiting: dict[str, set[str]] = field(default_factory=dict)
    """Digest of a cell to the digests it still waits for."""
    after: dict[str, list[Cell]] = field(default_factory=lambda: collections.defaultdict(list))

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

    def request(self, cell: Cell, root: Path) -> dict[str, Any]:
        """What the worker's `main` is asked, with the folders of trials below `root`, and the limits."""
        place = trial_folder(root, cell.digest, self.versions)
        request = {
            "cell": {
                **cell.told(),
                "epochs": cell.epochs,
                "latency": cell.latency,
                "quantized": cell.quantized,
                "recipe": cell.recipe.to_yaml(),
            },
            "folder": str(place),
            "needs": {r: str(trial_folder(root, d, self.versions)) for r, d in cell.needs},
            "versions": dict(self.versions),
            "beside": None if cell.recipe.folder is None else str(cell.recipe.folder),
        }
        return {"request": request, "seconds": self.machine.seconds, "memory_bytes": self.machine.memory_bytes}

    def ends(self, cell: Cell, answer: Mapping[str, Any], *, seconds: float) -> None:
        """Judge a trial by what it left and by how its process ended, note it, and let those begin that waited for it.

        Raises ResourceError where the disk took no more: all that follow would fail, and stay marked.
        """
        key = key_of_trial(cell.digest, self.versions)
        outcome = self._judged(cell, self.folder / TRIALS / key, answer)
        # Not where files of the user's own, elsewhere, found no room.
        ours = outcome.status == "refused" or str(self.folder) in outcome.reason
        if ours and any(said in outcome.reason for said in _NO_ROOM):
            msg = f"{outcome.reason} The sweep was stopped at {cell.name!r}, which is not marked as failed: the same command goes on with it."
            raise ResourceError(msg)
        _append(self.folder / JOURNAL, cell, key, outcome, seconds=seconds)
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
        silent = f"ended with exit code {code}, without a result or a message"
        last = next((line for line in reversed(tail) if line.strip()), silent)
        status: Status = "crashed"
        if answer["stopped"] == "time":
            status, reason = "timeout", f"not done in {self.machine.seconds:g} s"
        elif answer["stopped"] == "memory":
            status, reason = "out of memory", f"more than {(self.machine.memory_bytes or 0) / 1e9:.3g} GB in memory"
        elif any(sign in line for sign in _NO_MEMORY for line in tail[-3:]):
            status, reason = "out of memory", last
        elif code < 0:
            reason = _by_signal(-code, tail)
            reason = f"the process that starts trials was {reason}" if answer.get("server") else reason
        else:
            ours = last.startswith("paredown.errors.")  # a sentence of ours needs no name of a class before it
            status, reason = ("refused", last.partition(": ")[2] or last) if ours else ("crashed", last)
        return Outcome(digest=cell.digest, status=status, reason=reason, tail=tail)

    def _skip(self, cell: Cell) -> None:
        """Not run, as is all that waits for it: it has no line in the journal, so that a retry of the other runs it."""
        self.ended += 1
        outcome = Outcome(digest=cell.digest, status="not run", reason="a trial that it needs has no result")
        self.progress(Event(cell=cell, what="ends", outcome=outcome))
        for other in self.after.pop(cell.digest, []):
            if self.waiting.pop(other.digest, None) is not None:
                self._skip(other)


def _by_signal(number: int, tail: Sequence[str]) -> str:
    """Which signal ended a trial, and where in its code, or the last that it said."""
    names = {int(s): s.name for s in signal.Signals}
    told = f"ended by signal {number}" + (f" ({names[number]})" if number in names else "")
    if number == signal.SIGKILL:
        return f"{told}, perhaps for want of memory"
    lines = [line.strip() for line in tail if line.strip()]
    said = next((line for line in lines if line.startswith('File "')), lines[-1] if lines else "")
    return f"{told}: {said}" if said else told


def _gone(
    cells: Sequence[Cell], todo: Sequence[Cell], known: Mapping[str, Outcome], folder: Path, versions: Mapping[str, Any]
) -> list[Cell]:
    """The cells that those to do read, that are done and whose files are no longer there; and what these read in turn."""
    by_digest, found = {c.digest: c for c in cells}, dict[str, Cell]()
    seen, asked = {c.digest for c in todo}, [*todo]
    while asked:
        for _, digest in asked.pop().needs:
            if digest in seen or digest not in known or known[digest].status != "done":
                continue
            seen.add(digest)
            if not (trial_folder(folder, digest, versions) / RESULT).is_file():
                found[digest] = by_digest[digest]
                asked.append(by_digest[digest])
    return [*found.values()]


@contextlib.contextmanager
def order_of(
    cells: Sequence[Cell],
    folder: Path,
    versions: Mapping[str, Any],
    machine: Machine,
    *,
    retry: bool,
    progress: Callable[[Event], None],
) -> Iterator[Order]:
    """Whose turn it is of the cells without a result; results that no line tells of get theirs. Ctrl-C becomes Interrupted."""
    journal = folder / JOURNAL
    mend(journal)
    known, alone = _known(cells, folder, versions)
    todo = []
    for cell in cells:
        outcome = known.get(cell.digest)
        if outcome is None or (retry and (outcome.status != "done" or lacks_a_file(outcome.record))):
            todo.append(cell)
        elif cell.digest in alone:
            _append(journal, cell, key_of_trial(cell.digest, versions), outcome)
    todo += _gone(cells, todo, known, folder, versions)
    order = Order(folder=folder, versions=dict(versions), machine=machine, progress=progress)
    try:
        again = {cell.digest for cell in todo}
        order.plan(todo, {d: o for d, o in known.items() if d not in again})
        yield order
    except KeyboardInterrupt as error:
        missing = len(todo) - order.ended
        done = f"{len(cells) - missing} of {len(cells)}" if missing else f"all {len(cells)}"
        msg = f"{done} trials are done or marked; the same command goes on{' with the others' if missing else ''}."
        raise Interrupted(msg) from error


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
    except (FileNotFoundError, *_BROKEN):  # what a disk spoilt is made again
        return None
