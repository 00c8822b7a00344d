"""How much memory this machine, or the container that it runs in, has left."""

from __future__ import annotations

import re
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """What may still be taken without swapping: of the machine, and of the control group (version 2) where that is less.

    None where the system does not say.
    """
    found = [n for n in (_of_machine(), _of_group()) if n is not None]
    return min(found, default=None)


def number_in(path: Path) -> int | None:
    """The whole number that a file of the system holds; None where there is no such file, or "max" in it."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _of_machine() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None  # not Linux
    match = re.search(r"MemAvailable:\s*(\d+) kB", text)
    return int(match[1]) * 1024 if match else None


def _of_group() -> int | None:
    limit, used = (number_in(_GROUP / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return None
    try:
        text = (_GROUP / "memory.stat").read_text(encoding="ascii")
    except OSError:
        text = ""
    files = re.findall(
        r"(?m)^(?:in)?active_file (\d+)$", text
    )  # pages of files, which are dropped before anything is refused
    return max(0, limit - used + sum(int(n) for n in files))
