"""paredown measure: size, latency and memory of a file, through the runtime that runs it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.show import emit, only_document, show, table
from paredown.cli.sources import arrays, existing_folder
from paredown.errors import RejectedError, UsageError

if TYPE_CHECKING:
    from paredown.export import Artifact
    from paredown.records import Measured

NO_QUALITY = "quality: a file knows no metric; `paredown compress` measures it through the task's evaluate"


def measure(
    file: Annotated[
        Path,
        Parameter(help="An .onnx file, or an .xml file of OpenVINO with its .bin beside it; a bundle for --import."),
    ],
    /,
    *,
    samples: Annotated[Path | None, Parameter(help=".npz or .npy of inputs, samples along the first axis.")] = None,
    input: options.OptionalInput = None,
    baseline: Annotated[Path | None, Parameter(help="A second file to take turns with: gives the speedup.")] = None,
    threads: Annotated[int, Parameter(help="Threads of the runtime.")] = 1,
    runs: Annotated[int, Parameter(help="Readings at most, 5 or more.")] = 200,
    seconds: Annotated[float, Parameter(help="Time of a series at most; a disturbed one is repeated once.")] = 10.0,
    import_: Annotated[
        Path | None,
        Parameter(
            name="--import",
            help="results.json of a device that ran the bundle FILE: read back instead of measured here.",
        ),
    ] = None,
    into: Annotated[
        Path | None,
        Parameter(help="With --import: folder of the run that made the model; its report shows the device."),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Bytes, latency (with its spread) and memory of a file, measured in its runtime on this machine."""
    if import_ is not None:
        if samples is not None or input is not None or baseline is not None:
            msg = "--import must stand without --samples, --input and --baseline: nothing is measured here. Got one of them."
            raise UsageError(msg)
        return imported(file, import_, into, json=json, quiet=quiet)
    if into is not None:
        msg = f"--into must come with --import results.json. Got {str(into)!r} alone."
        raise UsageError(msg)
    if (samples is None) == (input is None):
        msg = f"measure must be given --samples FILE.npz or --input 1x3x224x224. Got {'neither' if samples is None else 'both'}."
        raise UsageError(msg)
    from paredown.measure import artifact_at

    with only_document(json):
        artifact, other = artifact_at(file), None if baseline is None else artifact_at(baseline)
        if samples is not None:
            batches = file_batches(arrays(samples, "--samples"), artifact)
        else:
            from paredown.models import parse_input

            batches = [parse_input(str(input))]
        import paredown

        found = paredown.measure(artifact, batches, baseline=other, threads=threads, runs=runs, seconds=seconds)
    if json:
        emit(
            {
                "schema": 1,
                "file": str(file),
                "measured": {name: dataclasses.asdict(value) for name, value in found.items()},
                "samples": "random" if samples is None else "given",
                "not_tested": [NO_QUALITY],
            }
        )
    else:
        titles = (str(file), "value", "unit", "low", "high", "badge")
        how = [f"{name}: {value.protocol}." for name, value in found.items() if value.protocol]
        rows = [(name, *figures(value)) for name, value in found.items()]
        show(table(titles, rows), *how, f"not tested: {NO_QUALITY}", quiet=quiet)
    return 0


def imported(file: Path, results: Path, into: Path | None, *, json: bool, quiet: bool) -> int:
    """Read the results of a device, print them, and give them to a run."""
    from paredown.measure import import_results

    record = import_results(results, file)
    if into is not None:
        from paredown.pipeline.folder import add_device

        add_device(existing_folder(into, "--into"), record)
    details = record.details
    if json:
        emit(
            {
                "schema": 1,
                "file": str(file),
                "stage": record.cell["stage"],
                "device": record.environment["device"],
                "runtime": record.environment["runtime"],
                "threads": record.environment["threads"],
                "measured": {name: dataclasses.asdict(value) for name, value in record.measured.items()},
                **{key: details[key] for key in ("flags", "series", "golden", "model", "not_tested")},
            }
        )
        return 0
    rows = [(name, *figures(value)) for name, value in record.measured.items()]
    notes = [f"{name}: {value.protocol}." for name, value in record.measured.items()]
    show(
        table((str(record.cell["title"]), "value", "unit", "low", "high", "badge"), rows),
        *notes,
        *(f"note: {flag}" for flag in details["flags"]),
        *(f"not tested: {what}" for what in details["not_tested"]),
        quiet=quiet,
    )
    return 0


def file_batches(read: dict[str, Any], artifact: Artifact) -> list[Any]:
    """One batch of all samples, in the order of the file's inputs."""
    import torch

    from paredown.export.session import open_session

    wanted = [i.name for i in open_session(artifact.path).get_inputs()]
    order = wanted if set(wanted) == set(read) else list(read)
    if len(order) != len(wanted):
        msg = f"--samples must hold one array for each input of the file: {', '.join(wanted)}. Got {', '.join(order)}."
        raise RejectedError(msg)
    return [tuple(torch.from_numpy(read[n].astype(read[n].dtype.newbyteorder("="))) for n in order)]


def figures(value: Measured) -> tuple[str, ...]:
    """Value, unit, both ends and badge as cells of a table."""

    def figure(number: float | None) -> str:
        return "" if number is None else f"{number:,}" if isinstance(number, int) else f"{number:.4g}"

    return figure(value.value) or "not tested", value.unit, figure(value.low), figure(value.high), value.badge
