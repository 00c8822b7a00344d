"""What a run's data were when it began: the same command must not go on with other ones."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from paredown.pipeline.folder import RECIPE, STEPS
from paredown.records import write_text

FILE = "data.json"
CONTENTS_BYTES = 4 << 30
"""Files are told apart by their contents up to this size of all together; beyond it by size and time of change."""
_SHOWN = 5


def contents(path: Path) -> dict[str, str]:
    """A digest of every file of a folder (or of one file), by relative path; run folders in it are no data."""
    files = {str(f.relative_to(path)) if f != path else f.name: f for f in _files(path)}
    by_content = sum(f.stat().st_size for f in files.values()) <= CONTENTS_BYTES
    return {name: _digest(file) if by_content else _stamp(file) for name, file in sorted(files.items())}


def digest_of(path: Path) -> str:
    """One digest of all files."""
    return hashlib.sha256(json.dumps(contents(path)).encode()).hexdigest()


def changed(folder: Path, data: Path | None) -> str:
    """How the data differ from those that a run folder began with; "" where they do not, or where none are on record."""
    known = folder / STEPS / FILE
    if data is None or not known.is_file():
        return ""
    before: Mapping[str, str] = json.loads(known.read_text(encoding="utf-8"))
    now = contents(data)
    if before == now:
        return ""
    kinds = {
        "new": [n for n in now if n not in before],
        "gone": [n for n in before if n not in now],
        "changed": [n for n in now if n in before and now[n] != before[n]],
    }
    told = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    return f"  files of {data}: {'; '.join(told)}"


def remember(folder: Path, data: Path | None) -> None:
    """Write down what the data are, once."""
    known = folder / STEPS / FILE
    if data is not None and data.exists() and not known.exists():
        write_text(known, json.dumps(contents(data)))


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for folder, below, names in os.walk(path):
        if RECIPE in names and Path(folder, STEPS).is_dir():
            below.clear()  # a run folder
            continue
        below[:] = sorted(n for n in below if n != "__pycache__")
        yield from (file for n in names if (file := Path(folder, n)).is_file())


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:24]


def _stamp(file: Path) -> str:
    found = file.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
