"""What files of data hold: a run or a sweep belongs to the data that it began with."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

CONTENTS_BYTES = 4 << 30
"""Files are told apart by their contents up to this size of all together; beyond it by size and time of change."""
_OF_A_RUN = ("recipe.yaml", "steps")
"""A folder with these is one of a run, and no data."""


def contents(path: Path) -> dict[str, str]:
    """A digest of every file of a folder (or of one file), by relative path; run folders in it are no data."""
    files = {str(f.relative_to(path)) if f != path else f.name: f for f in _files(path)}
    by_content = sum(f.stat().st_size for f in files.values()) <= CONTENTS_BYTES
    return {name: _digest(file) if by_content else _stamp(file) for name, file in sorted(files.items())}


def digest_of(path: Path) -> str:
    """One digest of all files."""
    return hashlib.sha256(json.dumps(contents(path)).encode()).hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for folder, below, names in os.walk(path):
        if _OF_A_RUN[0] in names and _OF_A_RUN[1] in below:
            below.clear()
            continue
        below[:] = sorted(n for n in below if n != "__pycache__")
        yield from (file for n in names if (file := Path(folder, n)).is_file())


def _digest(file: Path) -> str:
    found = file.stat()
    return _hashed(file, found.st_size, found.st_mtime_ns)


@functools.cache  # of one process, which asks more than once
def _hashed(file: Path, size: int, changed_ns: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:24]


def _stamp(file: Path) -> str:
    found = file.stat()
    return f"{found.st_size} {found.st_mtime_ns}"
