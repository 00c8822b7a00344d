"""Measure: size, quality, latency and memory of an exported file, through the runtime that runs it.

Importing this room loads neither torch nor a runtime, so that it can describe an environment where they are broken.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.errors import MissingError, RejectedError, ResourceError, UsageError
from paredown.measure.bundle import Bundle, Tolerance, bundle, read_bundle
from paredown.measure.imported import import_results
from paredown.measure.kinds import artifact_at, filled, first_sample, refuse_other_inputs, run_once
from paredown.measure.machine import machine, machine_text
from paredown.measure.quality import evaluated, paired, summarize
from paredown.records import Measured

if TYPE_CHECKING:
    from paredown.export.artifact import Artifact
    from paredown.quantize.batches import Batches


def measure(
    artifact: Artifact,
    samples: Batches,
    *,
    evaluate: Callable[[Any], Any] | None = None,
    baseline: Artifact | None = None,
    baseline_ms: float | None = None,
    threads: int = 1,
    runs: int = 200,
    seconds: float = 10.0,
    units: Mapping[str, str] | None = None,
    memory: bool = True,
) -> dict[str, Measured]:
    """Size, quality, latency and memory of a file, all through the runtime, each with unit, spread, protocol and machine.

    "bytes": stat of all its files. "gzip_bytes": the same compressed (level 9, no time stamp). "latency_ms": one sample,
    or as many as the file fixes, which the protocol says; `threads` threads, warm-up, median with 10th–90th percentile; a series
    of readings that was disturbed is repeated once, which the protocol says too;
    with `baseline` the two files take turns, and "baseline_latency_ms" and "speedup" join (ratio with 95 % interval). `baseline_ms`: what the baseline is known to take at
    least; a series in which it takes 8 % more was disturbed too.
    "peak_memory_bytes", "after_import_memory_bytes" and "memory_bytes" (their difference): a process of its own. With `evaluate`, one
    entry per metric: evaluate(predict) returns {name: number, or one value per sample}; arrays give mean and 95 %
    interval. `units` names the metrics' units. Timings and memory carry timing=True.

    Raises RejectedError (no samples, a baseline of another fixed batch, a metric that is None, text or NaN), UsageError
    (threads, runs, seconds), MissingError (the runtime), ResourceError (the process that measures memory failed).
    """
    if threads < 1 or runs < 5:
        msg = f"threads must be ≥ 1 and runs ≥ 5. Got {threads} and {runs}."
        raise UsageError(msg)
    if not 0 < seconds < float("inf"):
        msg = f"seconds must be a number above 0. Got {seconds}."
        raise UsageError(msg)
    where = machine_text()
    measured = dict(sizes(artifact.files, where))
    sample = first_sample(samples)
    measured |= _latencies(artifact, baseline, baseline_ms, sample, threads, runs, seconds, where)
    if memory:
        measured |= _memory(artifact, sample, threads, where)
    if evaluate is not None:
        from paredown.export.session import predictor

        for name, values in evaluated(evaluate, predictor(artifact, threads=threads)).items():
            if name in measured:
                msg = f"a metric must not be called {name!r}: that is measured already. Rename it in evaluate."
                raise RejectedError(msg)
            measured[name] = summarize(values, (units or {}).get(name, ""), where)
    return measured


def sizes(files: tuple[Path, ...], where: str = "") -> dict[str, Measured]:
    """Bytes of the files by stat, and gzipped one by one (level 9, mtime 0: the same for the same bytes)."""
    total = sum(f.stat().st_size for f in files)
    packed = sum(len(gzip.compress(f.read_bytes(), 9, mtime=0)) for f in files)
    return {
        "bytes": Measured(value=total, unit="B", n=len(files), protocol=f"stat of {len(files)} file(s)", machine=where),
        "gzip_bytes": Measured(
            value=packed, unit="B", n=len(files), protocol="gzip level 9, no time stamp", machine=where
        ),
    }


def _latencies(
    artifact: Artifact, baseline: Artifact | None, baseline_ms: float | None, sample: Any, threads: int, runs: int,
    seconds: float, where: str,
) -> dict[str, Measured]:  # fmt: skip
    from paredown.export.session import open_session, products_of
    from paredown.measure.latency import latency

    files = {"this": artifact, **({"baseline": baseline} if baseline is not None else {})}
    sessions = {name: open_session(one.path, threads=threads) for name, one in files.items()}
    for name, one in files.items():
        if said := products_of(one):
            sessions[name].note = said  # the protocol of its timings
    found = {name: filled(session, sample) for name, session in sessions.items()}
    feeds, batch = {name: feed for name, (feed, _) in found.items()}, found["this"][1]
    refuse_other_inputs({str(files[name].path): feed for name, feed in feeds.items()})
    for name, session in sessions.items():
        run_once(session, feeds[name], files[name].path.name)
    times = latency(
        sessions, feeds, threads=threads, runs=runs, seconds=seconds, machine=where, batch=batch, baseline_ms=baseline_ms
    )  # fmt: skip
    names = {"this": "latency_ms", "baseline": "baseline_latency_ms", "ratio": "speedup"}
    return {names[k]: v for k, v in times.items()}


def memory(artifact: Artifact, samples: Batches, *, threads: int = 1) -> dict[str, Measured]:
    """Peak memory of a process that does nothing but run the file: three of the figures of `measure`, bytes.

    Raises RejectedError (no samples), MissingError (the runtime), ResourceError (the process failed).
    """
    return _memory(artifact, first_sample(samples), threads, machine_text())


def _memory(artifact: Artifact, sample: Any, threads: int, where: str) -> dict[str, Measured]:
    from paredown.export.session import open_session

    feed, batch = filled(open_session(artifact.path, threads=threads), sample)
    shapes = {name: [list(a.shape), str(a.dtype)] for name, a in feed.items()}
    script = Path(__file__).with_name("memory.py")
    command = [_python(artifact), "-P", str(script), str(artifact.path.resolve()), json.dumps(shapes), str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        msg = "the process that measures memory must end within 600 s. It did not."
        raise ResourceError(msg) from error
    except (IndexError, ValueError) as error:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        kind = MissingError if "ModuleNotFoundError" in last else ResourceError
        msg = f"the process that measures memory must print its reading. Got exit code {done.returncode}: {last}."
        raise kind(msg) from error
    peak, after = int(found["peak_bytes"]), int(found["after_import_bytes"])
    fed = "one sample" if batch == 1 else f"a batch of {batch}"
    how = f"own process, {threads} thread, 5 runs of {fed}, getrusage maximum resident size"

    def reading(value: int, what: str) -> Measured:
        return Measured(value=value, unit="B", n=1, protocol=f"{what}; {how}", machine=where, timing=True)

    return {
        "peak_memory_bytes": reading(peak, "peak"),
        "after_import_memory_bytes": reading(after, "after importing the runtime"),
        "memory_bytes": reading(peak - after, "peak minus after import"),
    }


def _python(artifact: Artifact) -> str:
    """The interpreter that has the file's runtime."""
    from paredown.environments import python_of
    from paredown.target import named

    target = named(artifact.target)
    return str(python_of(target)) if target.environment else sys.executable


__all__ = [
    "Bundle",
    "Tolerance",
    "artifact_at",
    "bundle",
    "evaluated",
    "import_results",
    "machine",
    "machine_text",
    "measure",
    "memory",
    "paired",
    "read_bundle",
    "sizes",
    "summarize",
]
