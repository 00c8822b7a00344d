"""paredown compare: runs or model files side by side, and which runtime is the fastest for them."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.measure import file_batches
from paredown.cli.show import emit, only_document, show, table
from paredown.cli.sources import arrays
from paredown.errors import RejectedError, UsageError
from paredown.report.wording import digits, interval, quantity

if TYPE_CHECKING:
    from paredown.compare import Comparison
    from paredown.records import Measured


def compare(
    *things: Annotated[
        Path,
        Parameter(
            help="Folders of runs or of curves, or model files (.onnx, .xml); two or more, or one run for every runtime."
        ),
    ],
    samples: Annotated[Path | None, Parameter(help=".npz or .npy of inputs to time with; default: noise.")] = None,
    input: options.OptionalInput = None,
    out: Annotated[Path | None, Parameter(help="With one run: where its files for every runtime stay.")] = None,
    recorded: Annotated[
        bool,
        Parameter(negative="", show_default=False, help="Only what the runs recorded: nothing is timed now."),
    ] = False,
    threads: Annotated[int, Parameter(help="Threads of every runtime.")] = 1,
    runs: Annotated[int, Parameter(help="Rounds at most, 5 or more.")] = 200,
    seconds: Annotated[float, Parameter(help="Time at most.")] = 20.0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Lay runs or model files side by side, time them in every runtime at hand, and say which is the fastest."""
    if samples is not None and input is not None:
        msg = f"--samples must stand without --input. Got {str(samples)!r} and {input!r}."
        raise UsageError(msg)
    for thing in things:
        if not thing.exists():
            msg = f"what to compare must be folders of runs or model files. Got {str(thing)!r}, which does not exist."
            raise RejectedError(msg)
    with only_document(json), _for_runtimes(things, out, recorded) as (laid, own, said):
        import paredown

        found = paredown.compare(
            *laid,
            samples=own if samples is None and input is None else _samples(laid, samples, input),
            recorded=recorded,
            threads=threads,
            runs=runs,
            seconds=seconds,
        )
        found = dataclasses.replace(found, notes=(*found.notes, *said))
    if json:
        given = samples is not None or input is not None
        emit(_document(found, "given" if given else "random" if own is None else "task"))
        return 0
    if found.runs:
        mark = ["* recommended"] if any(r.recommended for r in found.runs) else []
        show(_runs_table(found), *mark, *_differences(found), *found.answers, quiet=quiet)
    if found.timings:
        show(_timings_table(found), _verdict(found), quiet=quiet)
    notes = (*(f"note: {n}" for n in found.notes), *(f"not tested: {n}" for n in found.not_tested))
    show(*notes, quiet=quiet)
    return 0


@contextmanager
def _for_runtimes(
    things: tuple[Path, ...], out: Path | None, recorded: bool
) -> Iterator[tuple[tuple[Path, ...], Any, list[str]]]:
    """What is given; where it is one run, its network as files for every runtime at hand, with its samples and what is missing."""
    if len(things) != 1 or not things[0].is_dir() or recorded:
        if out is not None:
            msg = f"--out must stand with one run, without --recorded: it is where the files for every runtime go. Got {len(things)} to compare."
            raise UsageError(msg)
        yield things, None, []
        return
    from paredown.pipeline.runtimes import files_for_runtimes, is_run

    if not is_run(things[0]):
        msg = f"one folder to compare must be a run of `paredown compress` that has ended. Got {things[0]}. Give two or more runs or files."
        raise UsageError(msg)
    with tempfile.TemporaryDirectory() as temporary:
        files, notes, batches = files_for_runtimes(things[0], Path(temporary) if out is None else out)
        yield tuple(files), batches, notes


def _samples(things: tuple[Path, ...], samples: Path | None, input: str | None) -> Any:
    if input is not None:
        from paredown.models import parse_input

        return [parse_input(input)]
    if samples is None:
        return None
    read = arrays(samples, "--samples")
    first = next((t for t in things if t.is_file()), None)
    if first is None:
        import torch

        return [tuple(torch.from_numpy(a.astype(a.dtype.newbyteorder("="))) for a in read.values())]
    from paredown.measure import artifact_at

    return file_batches(read, artifact_at(first))


def _document(found: Comparison, samples: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "metric": dict(found.metric) or None,
        "runs": [
            {
                **{k: getattr(r, k) for k in ("run", "stage", "file", "recommended")},
                "figures": {k: dataclasses.asdict(v) for k, v in r.figures.items()},
            }
            for r in found.runs
        ],
        "differences": [dataclasses.asdict(d) for d in found.differences],
        "samples": samples,
        "timings": [dataclasses.asdict(t) for t in found.timings],
        "fastest": found.fastest,
        "as_fast": list(found.as_fast),
        "notes": list(found.notes),
        "not_tested": list(found.not_tested),
        "answers": list(found.answers),
    }


def _runs_table(found: Comparison) -> Any:
    """One row per file or point; a figure that no row has is no column, and stands among what was not tested."""
    titles = {"bytes": "bytes", "gzip_bytes": "gzip", "parameters": "parameters", "macs": "MACs"}
    titles |= {"metric": found.metric.get("label", "metric"), "latency_ms": "latency ms", "speedup": "× dense"}
    tell = {"metric": _with_unit, "latency_ms": _spread, "speedup": _spread}
    shown = [k for k in titles if any(k in r.figures and r.figures[k].value is not None for r in found.runs)]
    if "speedup" in shown and len({r.figures["latency_ms"].machine for r in found.runs} - {""}) > 1:
        shown.remove("latency_ms")  # milliseconds of two machines in one column would be read as one scale
    rows: list[tuple[str, ...]] = []
    for run, own in itertools.groupby(found.runs, lambda r: r.run):
        rows.append((f"{run}/", *("" for _ in shown)))
        rows += [
            (f"{r.stage}{' *' if r.recommended else ''}", *(tell.get(k, _count)(r.figures[k]) for k in shown))
            for r in own
        ]
    return table(("run / stage", *(titles[k] for k in shown)), rows)


def _count(value: Measured) -> str:
    return "not tested" if value.value is None else f"{value.value:,}"


def _with_unit(value: Measured) -> str:
    if value.value is None:
        return "not tested"
    ends = interval(value.low, value.high, value.unit)
    return f"{quantity(value.value, value.unit)}{f' ({ends})' if ends else ''}"


def _spread(value: Measured) -> str:
    if value.value is None:
        return "not tested"
    ends = "" if value.low is None or value.high is None else f" ({digits(value.low, 4)} – {digits(value.high, 4)})"
    mark = "" if value.badge == "measured" else f" {value.badge}"
    return f"{digits(value.value, 4)}{ends}{mark}"


def _differences(found: Comparison) -> list[str]:
    """Two files in two or three lines: sizes in one, then the metric and the speed."""
    lines = []
    for first, second in dict.fromkeys((d.first, d.second) for d in found.differences):
        pair = [d for d in found.differences if (d.first, d.second) == (first, second)]
        exact = [f"{_EXACT[d.what]} {d.change.value:+,}" for d in pair if d.what in _EXACT]
        if exact and not any(d.change.value for d in pair if d.what in _EXACT):
            lines.append(f"{second} against {first}: as large in everything counted")
        elif exact:
            lines.append(f"{second} against {first}: {', '.join(exact)}")
        lines += [d.said for d in pair if d.what not in _EXACT]
    return lines


_EXACT = {"bytes": "bytes", "gzip_bytes": "gzip", "parameters": "parameters", "macs": "MACs"}


def _timings_table(found: Comparison) -> Any:
    titles = ("file and runtime", "scheme", "bytes", "median ms (p10 – p90)", "× the fastest", "answers")
    said = {"own": "own runtime", "same": "the same", "other": "DIFFER"}
    rows = [
        (
            t.name,
            t.scheme,
            f"{t.bytes:,}",
            _spread(t.latency_ms),
            "fastest" if t.name == found.fastest else _spread(t.slowdown),
            said[t.answers],
        )
        for t in found.timings
    ]
    return table(titles, rows, left=2)


def _verdict(found: Comparison) -> str:
    if found.fastest is None:
        return "No runtime answers as it should: none is recommended."
    best = f"Fastest on this machine (measured): {found.fastest}."
    if found.as_fast:
        best += f" Not told from it: {', '.join(found.as_fast)}."
    wrong = [f"{t.name}: {t.note}" for t in found.timings if t.answers == "other"]
    return "\n".join([best, *(f"Left out: {w}." for w in wrong)])
