"""Runs side by side, from their records alone: every file a row, every common stage a difference with its interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paredown.compare.counted import counted
from paredown.compare.nouns import COUNTED, FIGURES, WORDS, Difference, RunRow
from paredown.compare.refusals import refuse_other_data, refuse_other_metric, short
from paredown.errors import RejectedError
from paredown.measure.quality import kept_values, paired
from paredown.records import Measured, Record
from paredown.report import read_run
from paredown.report.reading import View, entry, figure, mapping, runtime, stage_name, stage_title, text, threads
from paredown.report.wording import difference, digits, interval, times


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run folder, read."""

    name: str
    folder: Path
    view: View

    @property
    def test_data(self) -> str:
        """Digest of the samples that the metric was measured on; "" where the task reads data of its own."""
        return text(entry(self.view.verdict, "test_data"), 80)

    def file(self, record: Record | None) -> Path | None:
        """The file of a stage, where it is still there."""
        name = text(entry(record, "file"))
        path = self.folder / name
        return path if name and Path(name).name == name and path.is_file() else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, held to one metric and one test set. Raises UsageError and RejectedError, naming what differs."""
    names = short([str(f) for f in folders])
    runs = []
    for name, folder in zip(names, folders, strict=True):
        run = Run(name=name, folder=folder, view=read_run(folder))
        kind = stage_name(run.view.records[0]) if run.view.records else ""
        if kind in ("curve", "sensitivity"):
            msg = f"what is compared must be runs, or curves alone. Got a {kind} in {name!r}. `paredown compress` of a recipe makes a run; `paredown report` shows a {kind}, beside a run of its network too."
            raise RejectedError(msg)
        if not run.view.stages:
            msg = f"a run must have at least one measured file. Got none in {str(folder)!r}. Run `paredown compress` into it first."
            raise RejectedError(msg)
        runs.append(run)
    for other in runs[1:]:
        _refuse_unfinished(runs[0], other)
        names_of = (runs[0].name, other.name)
        refuse_other_metric(runs[0].view.metric, other.view.metric, names_of)
        refuse_other_data(
            [r.test_data for r in (runs[0], other)], [_samples(r) for r in (runs[0], other)], names_of,
            [text(mapping(r.view.records[0].cell).get("task")) for r in (runs[0], other)],
        )  # fmt: skip
    return runs


def rows_of(run: Run) -> list[RunRow]:
    """One row per file of a run, in the order of its journal."""
    return [
        RunRow(
            run=run.name,
            stage=stage_name(record),
            title=stage_title(record),
            file=text(entry(record, "file")),
            recommended=stage_name(record) == run.view.recommended,
            figures={key: figure(record, key) for key in FIGURES},
        )
        for record in run.view.stages
    ]


def differences(first: Run, second: Run) -> tuple[list[Difference], list[str], list[str]]:
    """(differences stage by stage, notes, not tested) of two runs; of the recommended files first, where their stages differ."""
    pairs: list[tuple[str, str]] = []
    best = first.view.recommended, second.view.recommended
    if best[0] and best[1] and best[0] != best[1]:
        pairs.append((best[0], best[1]))
    pairs += [(n, n) for n in map(stage_name, first.view.stages) if second.view.stage(n) is not None]
    found: list[Difference] = []
    notes: list[str] = []
    missing = [*_alone(first, second), *_alone(second, first)]
    for a, b in pairs:
        one, other = first.view.stage(a), second.view.stage(b)
        if one is None or other is None:
            continue
        if text(entry(one, "digest")) and text(entry(one, "digest")) == text(entry(other, "digest")):
            notes.append(f"{second.name}/{b} is the same file as {first.name}/{a}")
            continue
        missing += _lacking(first, one, second, other)
        found += _exact(first, one, second, other)
        found += _metric(first, one, second, other, notes)
        found += _latency(first, one, second, other, notes)
    return found, list(dict.fromkeys(notes)), list(dict.fromkeys(missing))


def _alone(run: Run, other: Run) -> list[str]:
    """Stages that the other run lacks."""
    names = [n for n in map(stage_name, run.view.stages) if other.view.stage(n) is None and n != run.view.recommended]
    return [f"in {other.name}, what {run.name} has: {', '.join(names)}"] if names else []


def _lacking(first: Run, one: Record, second: Run, other: Record) -> list[str]:
    """Figures that were not measured in one of the two, so that nothing is said of them."""
    a, b = _names(first, one, second, other)
    words = {**WORDS, "metric": first.view.metric["name"]}
    out = []
    for key, word in words.items():
        without = [name for name, r in ((a, one), (b, other)) if figure(r, key).value is None]
        if without:
            out.append(f"{word} of {' and '.join(without)}")
    return out


# --------------------------------------------------------------------------------------------------- what may be compared


def _refuse_unfinished(first: Run, other: Run) -> None:
    if all(mapping(entry(r.view.verdict, "metric")) for r in (first, other)):
        return
    msg = f"runs must be finished to be compared. Got no verdict in {first.name if first.view.verdict is None else other.name}. Run `paredown compress` again: it continues."
    raise RejectedError(msg)


def _samples(run: Run) -> set[Any]:
    return {figure(r, "metric").n for r in run.view.stages} - {None}


# ---------------------------------------------------------------------------------------------------------- differences


def _names(first: Run, one: Record, second: Run, other: Record) -> tuple[str, str]:
    return f"{first.name}/{stage_name(one)}", f"{second.name}/{stage_name(other)}"


def _exact(first: Run, one: Record, second: Run, other: Record) -> list[Difference]:
    a, b = _names(first, one, second, other)
    of = [{key: figure(record, key) for key in COUNTED} for record in (one, other)]
    return counted((a, of[0]), (b, of[1]), "exact, second - first")


def _metric(first: Run, one: Record, second: Run, other: Record, notes: list[str]) -> list[Difference]:
    """Paired where both runs kept a value per sample; else by whether the two intervals are apart."""
    a, b = _names(first, one, second, other)
    x, y = figure(one, "metric"), figure(other, "metric")
    if x.value is None or y.value is None:
        return []
    unit, label = x.unit or first.view.metric["unit"], first.view.metric["name"]
    change = _paired(first, one, second, other, unit, notes)
    if change is not None and change.low is not None and change.high is not None:
        apart = not change.low <= 0 <= change.high
        how = f"{difference(float(change.value or 0), unit)}, paired interval {interval(change.low, change.high, unit, signed=True)}"
    else:
        change = Measured(value=y.value - x.value, unit=unit, protocol="second - first, not paired")
        known = None not in (x.low, x.high, y.low, y.high)
        apart = known and (y.low > x.high or x.low > y.high)  # type: ignore[operator]
        how = f"{difference(y.value - x.value, unit)}, not paired; their intervals {'are apart' if apart else 'overlap' if known else 'are not known'}"
    up = (change.value or 0) > 0
    better = (b if up == (first.view.metric["goal"] == "max") else a) if apart and change.value else None
    verdict = f"{better} is better" if better else "not distinguishable"
    return [
        Difference(
            what="metric",
            first=a,
            second=b,
            change=change,
            better=better,
            said=f"{label} of {b} against {a}: {how}: {verdict}",
        )
    ]


def _paired(first: Run, one: Record, second: Run, other: Record, unit: str, notes: list[str]) -> Measured | None:
    values = kept_values(first.folder, stage_name(one)), kept_values(second.folder, stage_name(other))
    if values[0] is None or values[1] is None or values[0].shape != values[1].shape or not values[0].ndim:
        return None
    if not first.test_data:
        notes.append(
            "the runs do not say what their test data are (evaluate reads its own): samples are paired by their order"
        )
    return paired(values[0], values[1], unit)


def _latency(first: Run, one: Record, second: Run, other: Record, notes: list[str]) -> list[Difference]:
    """Each run timed its files in turns with its own dense file: where that is one file, its speedups can be compared.

    Latencies of two schedules cannot: the same file took twice as long in one as in the other beside other work.
    """
    a, b = _names(first, one, second, other)
    x, y = figure(one, "latency_ms"), figure(other, "latency_ms")
    if not x.value or not y.value:
        return []
    facts = [(f.machine, runtime(r), threads(r)) for f, r in ((x, one), (y, other))]
    for what, p, q in zip(("machine", "runtime", "threads"), *facts, strict=True):
        if p != q:
            notes.append(f"latency of {a} and {b} is not compared: another {what} ({p or 'unknown'}; {q or 'unknown'})")
            return []
    dense = [text(entry(run.view.stage("dense"), "digest")) for run in (first, second)]
    gains = [figure(r, "speedup") if stage_name(r) != "dense" else _ONE for r in (one, other)]
    if not dense[0] or dense[0] != dense[1] or any(None in (g.value, g.low, g.high) for g in gains):
        notes.append(
            f"latency of {a} and {b} is not compared: it was measured in two schedules, against different dense files"
        )
        return []
    p, q = gains
    value, low, high = (float(u) / float(v) for u, v in ((q.value, p.value), (q.low, p.high), (q.high, p.low)))  # type: ignore[arg-type]
    protocol = "ratio of the speedups over the dense file that both runs have; the ends of both 95 % intervals"
    change = Measured(value=value, unit="×", low=low, high=high, protocol=protocol, machine=x.machine, timing=True)
    better = b if low > 1 else a if high < 1 else None
    verdict = f"{better} is faster" if better else "not distinguishable"
    said = f"speed of {b} against {a}: {times(value)} ({digits(low)} to {digits(high)}), by their speedups over the same dense file: {verdict}"
    return [Difference(what="latency_ms", first=a, second=b, change=change, better=better, said=said)]


_ONE = Measured(value=1.0, unit="×", low=1.0, high=1.0)


def files_of(run: Run) -> list[Path]:
    """The dense file and the recommended one, where they are still in the folder."""
    wanted: list[Any] = [run.view.stage("dense"), run.view.stage(run.view.recommended)]
    return list(dict.fromkeys(p for p in (run.file(r) for r in wanted) if p is not None))
