"""What may not be laid side by side, for runs and curves alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paredown.errors import RejectedError, UsageError


def short(paths: list[str]) -> list[str]:
    """The last part of every path where that tells them apart, else the paths as they were given. Raises UsageError for one given twice."""
    last = [Path(p).resolve().name for p in paths]
    if len({Path(p).resolve() for p in paths}) < len(paths):
        msg = f"the things to compare must be different. Got one of them twice: {', '.join(paths)}."
        raise UsageError(msg)
    return last if len(set(last)) == len(last) else paths


def refuse_other_metric(a: Mapping[str, str], b: Mapping[str, str], names: tuple[str, str]) -> None:
    """Raise RejectedError where name, unit or goal of two metrics differ."""
    wrong = [f"{k} {a[k]!r} and {b[k]!r}" for k in ("name", "unit", "goal") if a[k] != b[k]]
    if wrong:
        msg = f"runs must be of one metric to be compared. Got {'; '.join(wrong)} in {names[0]} and {names[1]}."
        raise RejectedError(msg)


def refuse_other_data(
    digests: Sequence[str], counts: Sequence[set[Any]], names: tuple[str, str], tasks: Sequence[str]
) -> None:
    """Raise RejectedError where the metric was measured on other samples; of two tasks both are named."""
    if digests[0] == digests[1] and counts[0] == counts[1]:
        return
    got = f"{_listed(counts[0])} and {_listed(counts[1])} samples" if counts[0] != counts[1] else ""
    got = got or f"test data {digests[0][:12] or 'unknown'} and {digests[1][:12] or 'unknown'}"
    of = f" (tasks {tasks[0] or 'unknown'} and {tasks[1] or 'unknown'})" if tasks[0] != tasks[1] else ""
    msg = f"runs must be measured on the same test samples, with the same truth and in the same order, to be compared. Got {got} in {names[0]} and {names[1]}{of}."
    raise RejectedError(msg)


def _listed(counts: set[Any]) -> str:
    return ", ".join(f"{n:,}" for n in sorted(counts)) or "an unknown number of"
