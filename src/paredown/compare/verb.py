"""compare: what to lay beside what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paredown.compare import curves
from paredown.compare.curve_speeds import OWN
from paredown.compare.files import time_files, told
from paredown.compare.nouns import WORDS, Comparison, Difference, RunRow, Timing
from paredown.compare.runs import Run, differences, files_of, read_runs, rows_of
from paredown.errors import UsageError
from paredown.measure.kinds import artifact_at
from paredown.report.wording import difference, megabytes

if TYPE_CHECKING:
    from paredown.export import Artifact
    from paredown.quantize.batches import Batches

NO_QUALITY = "quality of the files: a file knows no metric; runs of `paredown compress` do"


def compare(
    *things: str | Path,
    samples: Batches | None = None,
    recorded: bool = False,
    threads: int = 1,
    runs: int = 200,
    seconds: float = 10.0,
) -> Comparison:
    """Lay runs (folders) or model files side by side, and time their files in every runtime at hand, in one schedule.

    Folders: one row per file with what the records have; against the first run the difference of every common stage:
    sizes exactly, the metric paired over samples where both runs kept them (else by whether the intervals are apart),
    speed on one machine by the speedups over the dense file that both have. Then, unless `recorded`, the dense and the recommended files of all runs are timed here.
    Folders of `paredown curve`: one row per point with means over seeds; against the first curve the difference of the sweet
    spots and of every common point, sizes as means, the metric on test data and the speeds over each one's own dense file (where both
    were timed on one machine) paired by seed; nothing is timed.
    Files: each in its own runtime and in every other one that is installed and executes it (an .onnx file in ONNX
    Runtime and OpenVINO), taking turns; medians, 10th–90th percentile, ratio to the fastest with a 95 % interval. A runtime
    that answers otherwise than the file's own one is shown and never called the fastest. An integer file that is slower
    than the fastest float file of its runtime is named in `notes`. `samples` are inputs (the first is used); without them
    seeded noise.

    Raises UsageError (nothing to compare, folders among files), RejectedError (other metrics, units or test sets; files
    with other inputs), MissingError (a file's own runtime).

    >>> import tempfile, torch
    >>> from paredown.export import export
    >>> folder = Path(tempfile.mkdtemp())
    >>> for width in (4, 8):
    ...     _ = export((torch.nn.Linear(16, width), torch.zeros(2, 16)), folder / f"w{width}.onnx")
    >>> found = compare(folder / "w4.onnx", folder / "w8.onnx", runs=5, seconds=0.1)
    >>> {t.file for t in found.timings} == {"w4.onnx", "w8.onnx"}, found.fastest is not None
    (True, True)
    """
    paths = [Path(t) for t in things]
    if threads < 1 or runs < 5:
        msg = f"threads must be ≥ 1 and runs ≥ 5. Got {threads} and {runs}."
        raise UsageError(msg)
    folders = [p for p in paths if p.is_dir()]
    if not paths or (folders and len(folders) < len(paths)) or (len(paths) < 2 and bool(folders)):
        msg = f"compare must be given two or more folders of runs, or model files. Got {', '.join(map(str, paths)) or 'nothing'}."
        raise UsageError(msg)
    if folders and (many := curves.read_curves(folders)):
        return _of_curves(many)
    laid = read_runs(folders) if folders else []
    found: list[Difference] = []
    notes: list[str] = []
    missing: list[str] = [] if laid else [NO_QUALITY]
    for other in laid[1:]:
        more, said, lacking = differences(laid[0], other)
        found, notes, missing = found + more, notes + said, missing + lacking
    files = {} if recorded else _run_files(laid, notes) if laid else _files(paths)
    timings: list[Timing] = []
    timed: list[str] = []
    if files:
        families = {name: run.name for name in files for run in laid if name.startswith(f"{run.name}/")}
        timings, timed = time_files(files, samples, num_threads=threads, runs=runs, seconds=seconds, families=families)
    fastest, as_fast = told(timings)
    rows = tuple(row for run in laid for row in rows_of(run))
    missing = [*_nowhere(rows), *missing]
    return Comparison(
        metric=laid[0].view.metric if laid else {},
        runs=rows,
        differences=tuple(found),
        timings=tuple(timings),
        fastest=fastest,
        as_fast=as_fast,
        notes=tuple(dict.fromkeys([*notes, *timed])),
        not_tested=tuple(dict.fromkeys(missing)),
        answers=_answers(rows, found, laid[0].view.metric if laid else {}),
    )


def _of_curves(many: Sequence[curves.Curve]) -> Comparison:
    found: list[Difference] = []
    notes: list[str] = []
    missing: list[str] = []
    for other in many[1:]:
        more, said, lacking = curves.differences(many[0], other)
        found, notes, missing = found + more, notes + said, missing + lacking
    rows = tuple(row for curve in many for row in curves.rows_of(curve))
    missing = [*_nowhere(rows), *missing]
    metric = many[0].view.metric
    return Comparison(
        metric={**metric, "label": metric["name"].capitalize() if metric["name"].islower() else metric["name"]},
        runs=rows, differences=tuple(found), timings=(), fastest=None, as_fast=(), notes=tuple(dict.fromkeys(notes)),
        not_tested=tuple(dict.fromkeys(missing)), answers=_answers(rows, found, metric),
    )  # fmt: skip


def _nowhere(rows: Sequence[RunRow]) -> list[str]:
    """Figures that no row has."""
    return [
        f"{word}: no row has it"
        for key, word in WORDS.items()
        if rows and all(r.figures[key].value is None for r in rows)
    ]


def _answers(rows: Sequence[RunRow], found: Sequence[Difference], metric: Mapping[str, str]) -> tuple[str, ...]:
    """The recommended file of every other run against that of the first: smaller, better, faster, or not told."""
    best = {r.run: f"{r.run}/{r.stage}" for r in rows if r.recommended}
    names = list(dict.fromkeys(r.run for r in rows))
    if not names or names[0] not in best:
        return ()
    first = best[names[0]]
    out = []
    for name in names[1:]:
        pair = {d.what: d for d in found if (d.first, d.second) == (first, best.get(name))}
        if pair:
            parts = [_size_said(pair), _metric_said(pair, metric), _speed_said(pair)]
            out.append(f"{best[name]} against {first}, both recommended: {'; '.join(parts)}.")
        elif name in best and all(r.figures["bytes"].value is not None for r in rows if r.recommended):
            out.append(f"{best[name]} and {first}, both recommended, are the same.")
    return tuple(out)


def _size_said(pair: Mapping[str, Difference]) -> str:
    if "bytes" not in pair:
        return "size not tested"
    change = pair["bytes"].change.value or 0
    return f"{megabytes(abs(change))} {'smaller' if change < 0 else 'larger'}" if change else "as large"


def _metric_said(pair: Mapping[str, Difference], metric: Mapping[str, str]) -> str:
    name = metric.get("name", "metric")
    if "metric" not in pair:
        return f"{name} not tested"
    found = pair["metric"]
    if found.better is None:
        return f"no difference in {name} that shows"
    return f"{name} {'better' if found.better == found.second else 'worse'}, {difference(float(found.change.value or 0), found.change.unit)}"


def _speed_said(pair: Mapping[str, Difference]) -> str:
    if "latency_ms" not in pair:
        return "speed not compared"
    found = pair["latency_ms"]
    if OWN in found.said:
        return "speed of each over its own dense file alone"
    if found.better is None:
        return "no difference in speed that shows"
    return "faster" if found.better == found.second else "slower"


def _files(paths: list[Path]) -> dict[str, Artifact]:
    """Artifacts by the shortest name that tells them apart."""
    if len({p.resolve() for p in paths}) < len(paths):
        msg = f"the files to compare must be different. Got one of them twice: {', '.join(map(str, paths))}."
        raise UsageError(msg)
    for path in paths:
        if not path.is_file():
            msg = f"what to compare must be files or folders that are there. Got {str(path)!r}."
            raise UsageError(msg)
    names = [p.name for p in paths]
    names = names if len(set(names)) == len(names) else [str(p) for p in paths]
    return dict(zip(names, map(artifact_at, paths), strict=True))


def _run_files(laid: list[Run], notes: list[str]) -> dict[str, Artifact]:
    """Dense and recommended files of all runs. Files with the same bytes are timed once."""
    from paredown.measure.bundled.runner import sha256

    found: dict[str, Artifact] = {}
    seen: dict[str, str] = {}
    for run in laid:
        files = files_of(run)
        if not files:
            notes.append(f"{run.name}: its files are not in the folder any more, so they are not timed here")
        for path in files:
            name, artifact = f"{run.name}/{path.name}", artifact_at(path)
            sums = " ".join(sha256(f) for f in artifact.files)  # an .xml alone says nothing of the weights
            if sums in seen:
                notes.append(f"{name} is the same file as {seen[sums]}")
                continue
            seen[sums] = name
            found[name] = artifact
    return found
