"""A run's folder: one owner at a time, each finished stage on disk under its key, records that are always whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from paredown.errors import RejectedError, UsageError
from paredown.records import Record, append, locked, read_whole_lines, sweep_stale, write_text

RECIPE, RECORDS, STEPS, LOCK = "recipe.yaml", "records.jsonl", "steps", ".lock"
Kind = Literal["a run", "a curve", "a sensitivity"]
"""What a folder is of."""
MADE = (
    RECORDS, "report.html", "plan.json", "form.json", "model.safetensors", "curve.json", "sensitivity.json", "sensitivity.csv",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """The folder of one run. Stages are kept under `steps/`, so that a killed run continues where it was."""

    path: Path

    @property
    def steps(self) -> Path:
        """Where finished stages and checkpoints lie."""
        return self.path / STEPS

    def stage(self, number: int, name: str, key: str, make: Callable[[], Record]) -> Record:
        """The record of a stage: as it was measured, if it was with this key, else made now and kept."""
        file = self.steps / f"{number:02d}-{name}.json"
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["key"] == key:
                return Record.from_json(json.dumps(kept["record"]))
        record = make()
        kept = {"key": key, "record": json.loads(record.to_json())}
        write_text(file, json.dumps(kept, sort_keys=True) + "\n")
        self.write_records()
        return record

    def least_dense_ms(self) -> float | None:
        """Milliseconds that the dense file took at least in turns with a stage's; None before it did. By itself it has the caches for itself."""
        records = read_whole_lines(self.path / RECORDS) if (self.path / RECORDS).exists() else ()
        times = [m.value for r in records if (m := r.measured.get("baseline_latency_ms")) is not None and m.value]
        return min(map(float, times), default=None)

    def write_records(self) -> None:
        """records.jsonl anew from all finished stages, in order."""
        lines = []
        for file in sorted(self.steps.glob("[0-9][0-9]-*.json")):
            kept = json.loads(file.read_text(encoding="utf-8"))
            lines.append(Record.from_json(json.dumps(kept["record"])).to_json())
        write_text(self.path / RECORDS, "".join(line + "\n" for line in lines))


@contextmanager
def opened(
    path: Path, recipe_yaml: str, difference: Callable[[str], str], *, overwrite: bool, kind: Kind = "a run",
    grows: Callable[[str], bool] = lambda there: False,
) -> Iterator[RunFolder]:  # fmt: skip
    """Take a run folder: a new one, or one that holds the same recipe; a second process is refused (exit 7).

    `difference(yaml)` says how the recipe that is there differs from this one, "" where it does not. Another recipe,
    or a folder with other files in it, is refused (UsageError) unless `overwrite`, or where it `grows(yaml)`: all that was
    made counts for the new recipe as well. A folder of another `kind` is refused always.
    """
    if path.exists() and not path.is_dir():
        msg = f"out must be a folder. Got the file {path}."
        raise UsageError(msg)
    held = (
        f"a run folder must have one owner. {path} is in use by another process. Wait for it, or choose another --out."
    )
    with locked(path / LOCK, writable="out must be a writable folder", held=held):
        if (path / RECIPE).exists():
            _refuse_another_kind(path, kind)
        _claim(path, recipe_yaml, difference, grows, overwrite)
        sweep_stale(path)
        (path / STEPS).mkdir(exist_ok=True)
        yield RunFolder(path=path)


def _refuse_another_kind(path: Path, kind: Kind) -> None:
    """All kinds have a recipe.yaml, a records.jsonl and a report: one would replace those of the other."""
    found: Kind = kind
    if (path / "trials").is_dir() or (path / "curve.json").is_file():
        found = "a curve"
    elif (path / "journal.jsonl").is_file():
        found = "a sensitivity"
    elif any((path / STEPS).glob("[0-9][0-9]-*.json")):
        found = "a run"
    if found != kind:
        msg = f"out must be an empty folder or one of {kind}. Got {path}, which holds {found}. Choose another --out."
        raise UsageError(msg)


def _claim(
    path: Path, recipe_yaml: str, difference: Callable[[str], str], grows: Callable[[str], bool], overwrite: bool
) -> None:
    recipe, grown = path / RECIPE, False
    if recipe.exists():
        there = recipe.read_text(encoding="utf-8")
        changed = difference(there)
        if not changed:
            return
        grown = grows(there)
        if not overwrite and not grown and _made_something(path):
            kept = " (trials that both recipes have are kept)" if (path / "trials").is_dir() else ""
            msg = f"{path} holds another run. The recipe or its data differ:\n{changed}\nChoose another --out, or --overwrite{kept}."
            if "given." in changed:  # a notebook's functions count with all that they reach by name
                msg += " What a function keeps its results in, by a way that is not seen in its code, differs after every run: make it inside the function."
            raise UsageError(msg)
    elif not overwrite and any(p.name != LOCK for p in path.iterdir()):
        msg = f"out must be an empty folder or one of a run. Got {path} with other files in it. Choose another --out, or --overwrite."
        raise UsageError(msg)
    _clear(path, steps=not grown)  # what its data were stays on record
    write_text(recipe, recipe_yaml)


def _made_something(path: Path) -> bool:
    """Whether there is more than a recipe: a run that was refused before any work stands in nobody's way."""
    others = any(p.name not in (RECIPE, LOCK, STEPS) for p in path.iterdir())
    return others or any((path / STEPS).glob("*"))


def _clear(path: Path, *, steps: bool) -> None:
    """Delete what a run makes, and nothing else. Its recipe is replaced: killed in between, the folder is still one of a run."""
    for name in MADE:
        (path / name).unlink(missing_ok=True)
    for model in (*path.glob("*.onnx*"), *(f for x in path.glob("*.xml") for f in (x, x.with_suffix(".bin")))):
        model.unlink(missing_ok=True)
    if steps and (path / STEPS).is_dir():
        for file in (path / STEPS).iterdir():
            if file.is_file():
                file.unlink()


def add_device(path: Path, record: Record) -> None:
    """Put what a device measured (`import_results`) into a run, in the place of its earlier one, and write the report anew.

    Raises RejectedError where the device ran another model than those of the run.
    """
    from paredown.report import read_run, write_report
    from paredown.report.reading import stage_of_device

    run, sums = read_run(path), set(record.details["model"].values())
    if stage_of_device(run, record) is None:
        msg = f"the results must be of a file of the run. Got another model's: none of the run in {path} has the SHA-256 {min(sums)[:12]}…."
        raise RejectedError(msg)
    steps = path / STEPS
    if any(steps.glob("[0-9][0-9]-*.json")):
        kept = {"key": "imported", "record": json.loads(record.to_json())}
        write_text(steps / f"85-{record.cell['stage']}.json", json.dumps(kept, sort_keys=True) + "\n")
        RunFolder(path=path).write_records()
    else:  # the run came here without its steps
        append(path / RECORDS, record)
    write_report(path)


def key_of(*parts: Any) -> str:
    """SHA-256 of JSON values: what a stage's result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def files_digest(files: Sequence[Path]) -> str:
    """SHA-256 of one file, or of the sums of several: an .xml without its .bin says nothing of the weights."""
    sums = [file_digest(f) for f in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
