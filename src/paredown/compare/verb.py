"""compare: what to lay beside what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from paredown.compare.files import time_files, told
from paredown.compare.nouns import Comparison, Difference, Timing
from paredown.compare.runs import Run, differences, files_of, read_runs, rows_of
from paredown.errors import UsageError
from paredown.measure.kinds import artifact_at

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
    laid = read_runs(folders) if folders else []
    found: list[Difference] = []
    notes: list[str] = []
    for other in laid[1:]:
        more, said = differences(laid[0], other)
        found, notes = found + more, notes + said
    files = {} if recorded else _run_files(laid, notes) if laid else _files(paths)
    timings: list[Timing] = []
    timed: list[str] = []
    if files:
        families = {name: run.name for name in files for run in laid if name.startswith(f"{run.name}/")}
        timings, timed = time_files(files, samples, num_threads=threads, runs=runs, seconds=seconds, families=families)
    fastest, as_fast = told(timings)
    return Comparison(
        metric=laid[0].view.metric if laid else {},
        runs=tuple(row for run in laid for row in rows_of(run)),
        differences=tuple(found),
        timings=tuple(timings),
        fastest=fastest,
        as_fast=as_fast,
        notes=tuple(dict.fromkeys([*notes, *timed])),
        not_tested=() if laid else (NO_QUALITY,),
    )


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
