"""Journal: measured points on disk as soon as they are known, so that a stopped measurement goes on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paredown.program import Program
from paredown.records import Measured, Record, append, mend, read_whole_lines
from paredown.score.nouns import Scores
from paredown.search.value import Value


class Journal:
    """Points of one measurement in a JSON-lines file; those of others in the same file are left alone."""

    def __init__(
        self,
        path: Path | None,
        program: Program,
        scores: Scores,
        value: Value,
        batch_norm: Any,
        seed: int,
        *,
        repair: bool,
    ) -> None:
        self._path, self._value = path, value
        self._key = _key(program, scores, value, batch_norm, seed, repair) if path is not None else ""
        self._known: dict[tuple[str, int], float] = {}
        if path is not None and path.exists():
            mend(path)
            for record in read_whole_lines(path):
                number = record.measured.get("increase")
                if record.cell.get("key") == self._key and number is not None and number.value is not None:
                    self._known[(record.cell["name"], record.cell["kept"])] = float(number.value)

    def known(self, name: str, kept: int) -> float | None:
        """A point that was measured before; None where it was not, or failed."""
        return self._known.get((name, kept))

    def add(self, name: str, kept: int, of: int, increase: float | None, why: str) -> None:
        """Write one point; a failed one has no value and says why."""
        if self._path is None:
            return
        number = Measured(
            value=increase,
            unit=self._value.unit,
            badge="not tested" if increase is None else "measured",
            n=self._value.num_samples or None,
            protocol="one layer alone, the others dense",
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        cell = {"stage": "sensitivity", "key": self._key, "name": name, "kept": kept, "of": of}
        append(self._path, Record(cell=cell, measured={"increase": number}, details={"why": why} if why else {}))


class MeasuredFiles:
    """Amounts of the files that a search has made, one line each, on disk as soon as they are known; read once, not for each file."""

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, -1
        self._by_plan: dict[str | None, list[Record]] = {}

    def of(self, plan_digest: str, key: str) -> list[Record]:
        """What was measured of a plan's file under a key; what a line that is no record was of is measured again."""
        self._read()
        return [r for r in self._by_plan.get(plan_digest, []) if r.measured and r.cell.get("key") == key]

    def under(self, key: str) -> list[Record]:
        """What was measured of all files under a key."""
        self._read()
        return [r for found in self._by_plan.values() for r in found if r.measured and r.cell.get("key") == key]

    def _read(self) -> None:
        size = self._on_disk()
        if size != self._size:  # an earlier process wrote it
            self._size, self._by_plan = size, {}
            for record in read_whole_lines(self._path):
                self._by_plan.setdefault(record.plan_digest, []).append(record)

    def add(self, record: Record) -> None:
        """Write one file's amounts; one that could not be made has none."""
        mend(self._path)
        known = self._on_disk() == self._size
        append(self._path, record)
        if known:
            self._by_plan.setdefault(record.plan_digest, []).append(record)
            self._size = self._on_disk()

    def _on_disk(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0


@functools.lru_cache(maxsize=4)
def measured_files(path: Path) -> MeasuredFiles:
    """The journal at a path, the same for all searches in this process that write there."""
    return MeasuredFiles(path)


def _key(program: Program, scores: Scores, value: Value, batch_norm: Any, seed: int, repair: bool) -> str:
    """Everything that a measured number depends on."""
    state = hashlib.sha256()
    norms = None
    if batch_norm is not None:
        norms = [batch_norm.num_batches, getattr(batch_norm.batches, "__qualname__", "")]
    about = [
        program.source_digest,
        scores.criterion,
        scores.granularity,
        seed,
        value.digest(),
        norms,
        torch.__version__,
        *(["repair"] if repair else []),
    ]
    state.update(json.dumps([*about, dataclasses.asdict(value.metric) if value.metric else None]).encode())
    for by_name in (scores.by_space, scores.by_cell):
        for name, array in sorted(by_name.items()):
            state.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return state.hexdigest()
