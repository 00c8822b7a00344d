"""What a run's data, and the sensitivity it reads, were when it began: the same command must not go on with other ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from paredown.contents import contents
from paredown.pipeline.folder import RECORDS, STEPS
from paredown.records import write_text
from paredown.train import Task
from paredown.train.task import kept_randomness

FILE, SENSITIVITY = "data.json", "sensitivity.json"
_SHOWN = 5


def changed_sensitivity(folder: Path, asked: str | None) -> str:
    """That `prune.sensitivity` holds another measurement than a run folder began with; "" as `changed`."""
    if asked is None or not changed(folder, Path(asked, RECORDS), SENSITIVITY):
        return ""
    return f"  prune.sensitivity: {asked} holds another measurement than the one that the run there began with"


def remember_sensitivity(folder: Path, asked: str | None) -> None:
    """Write down what `prune.sensitivity` holds, once."""
    remember(folder, None if asked is None else Path(asked, RECORDS), SENSITIVITY)


def changed(folder: Path, data: Path | None, file: str = FILE) -> str:
    """How the data differ from those that a run folder began with; "" where they do not, or where none are on record."""
    known = folder / STEPS / file
    if data is not None and not known.is_file() and (folder / "trials").is_dir():
        return f"  files of {data}: not on record, the sweep there was begun before they counted"
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


def settle(task: Task, data: Path | None) -> None:
    """Draw one batch for every role: a task that fetches, unpacks or caches its data does so before they are written down."""
    if data is None:
        return
    with kept_randomness():
        for batches in (task.train_batches, task.calibration_batches, task.choose_batches, task.test_batches):
            if batches is not None:
                next(iter(batches()), None)


def remember(folder: Path, data: Path | None, file: str = FILE) -> None:
    """Write down what the data are, once."""
    known = folder / STEPS / file
    if data is not None and data.exists() and not known.exists():
        write_text(known, json.dumps(contents(data)))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
