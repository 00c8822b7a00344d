"""Measured and Record: numbers with their unit, spread and badge; an append-only journal; files that appear whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from paredown.errors import ResourceError

Badge = Literal["measured", "estimated", "not tested"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One number and how it came about. `low`–`high` is its interval; `protocol` says what interval that is.

    A figure that was not measured has value None and badge "not tested". Timings carry timing=True: they are the
    only fields that may differ between two runs of one recipe.
    """

    value: float | int | None
    unit: str
    badge: Badge = "measured"
    low: float | None = None
    high: float | None = None
    n: int | None = None
    protocol: str = ""
    machine: str = ""
    timing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of one stage of one run; one line of records.jsonl."""

    cell: Mapping[str, Any]
    """What was done: {"stage": …, "recipe_digest": …, …}."""
    plan_digest: str | None = None
    measured: Mapping[str, Measured] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    """Tables for the report: layers before and after, removed units, float nodes, the snippet."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The inverse of to_json."""
        return cls.from_data(json.loads(line))

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Record:
        """From what the JSON holds."""
        return cls(**{**data, "measured": {name: Measured(**value) for name, value in data["measured"].items()}})


def append(path: Path, record: Record) -> None:
    """Append one record and flush it to disk."""
    append_line(path, record.to_json())


def append_line(path: Path, line: str) -> None:
    """Append one line to a journal; it is on the disk when this returns."""
    with _explained(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def mend(path: Path) -> None:
    """Cut off a last line that a kill left unfinished: the next one would be written behind it."""
    if not path.exists():
        return
    with _explained(path), path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:  # backwards, a block at a time
            start = max(0, end - 65_536)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def read(path: Path) -> list[Record]:
    """All records of a journal. A last line that a kill cut short is left out."""
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    return [Record.from_json(line) for line in lines if line]


def read_whole_lines(path: Path) -> list[Record]:
    """As `read`, without the lines that are no record: what they were of is measured again."""
    found: list[Record] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                found.append(Record.from_json(line))
    return found


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error; nothing half-written stays.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> with whole_file(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("done")
    >>> (folder / "a.txt").read_text()
    'done'
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(place: Path, *, writable: str, held: str) -> Iterator[None]:
    """Hold the lock file `place`, which ends with the process; a folder that is not there is made.

    Raises ResourceError: with `writable`, what must be, where the folder cannot be written, and with `held` where another process has it.
    """
    import fcntl  # not on Windows, where records can still be read

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.open("w")
    except OSError as error:
        msg = f"{writable}. Got {place.parent}: {error.strerror or error}."
        raise ResourceError(msg) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResourceError(held) from error
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sweep_stale(folder: Path) -> int:
    """Delete temporary files that a kill left behind; returns how many."""
    stale = list(folder.rglob(".*.tmp"))
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the disk said
        msg = f"{path} must be writable. Got {getattr(error, 'strerror', None) or error}. Free space or choose another --out."
        raise ResourceError(msg) from error
