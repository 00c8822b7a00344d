"""paredown measure: size, latency and memory of a file, through the runtime that runs it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.show import emit, only_document, show, table
from paredown.cli.sources import arrays
from paredown.errors import RejectedError, UsageError

if TYPE_CHECKING:
    from paredown.export import Artifact
    from paredown.records import Measured

NO_QUALITY = "quality: a file knows no metric; `paredown compress` measures it through the task's evaluate"


def measure(
    file: Annotated[Path, Parameter(help="An .onnx file, or an .xml file of OpenVINO with its .bin beside it.")],
    /,
    *,
    samples: Annotated[Path | None, Parameter(help=".npz or .npy of inputs, samples along the first axis.")] = None,
    input: options.OptionalInput = None,
    baseline: Annotated[Path | None, Parameter(help="A second file to take turns with: gives the speedup.")] = None,
    threads: Annotated[int, Parameter(help="Threads of the runtime.")] = 1,
    runs: Annotated[int, Parameter(help="Readings at most, 5 or more.")] = 200,
    seconds: Annotated[float, Parameter(help="Time at most.")] = 10.0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Bytes, latency (with its spread) and memory of a file, measured in its runtime on this machine."""
    if (samples is None) == (input is None):
        msg = f"measure must be given --samples FILE.npz or --input 1x3x224x224. Got {'neither' if samples is None else 'both'}."
        raise UsageError(msg)
    with only_document(json):
        artifact, other = _artifact(file), None if baseline is None else _artifact(baseline)
        if samples is not None:
            batches = _batches(arrays(samples, "--samples"), artifact)
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
        rows = [(name, *_figures(value)) for name, value in found.items()]
        show(table(titles, rows), *how, f"not tested: {NO_QUALITY}", quiet=quiet)
    return 0


def _artifact(path: Path) -> Artifact:
    """A file and its side files, as it stands on disk."""
    if path.suffix.lower() == ".xml":
        return _openvino_artifact(path)
    if path.suffix.lower() != ".onnx":
        msg = f"measure must be given an .onnx or an .xml file. Got {str(path)!r}."
        raise UsageError(msg)
    from paredown.examine import examine_onnx
    from paredown.export import Artifact

    cost = examine_onnx(path)
    scheme = "int8" if {"QuantizeLinear", "DequantizeLinear"} & set(cost.ops) else "fp32"
    return Artifact(files=tuple(path.parent / name for name in cost.files), target="onnxruntime-x86", scheme=scheme)


def _openvino_artifact(path: Path) -> Artifact:
    from paredown.export import Artifact

    side = path.with_suffix(".bin")
    for file in (path, side):
        if not file.is_file():
            msg = f"measure must be given an .xml file of OpenVINO with its .bin beside it. {str(file)!r} is no file."
            raise UsageError(msg)
    scheme = "int8" if 'type="FakeQuantize"' in path.read_text(encoding="utf-8", errors="replace") else "fp32"
    return Artifact(files=(path, side), target="openvino-x86", scheme=scheme)


def _batches(read: dict[str, Any], artifact: Artifact) -> list[Any]:
    """One batch of all samples, in the order of the file's inputs."""
    import torch

    from paredown.export.session import open_session

    wanted = [i.name for i in open_session(artifact.path).get_inputs()]
    order = wanted if set(wanted) == set(read) else list(read)
    if len(order) != len(wanted):
        msg = f"--samples must hold one array for each input of the file: {', '.join(wanted)}. Got {', '.join(order)}."
        raise RejectedError(msg)
    return [tuple(torch.from_numpy(read[n].astype(read[n].dtype.newbyteorder("="))) for n in order)]


def _figures(value: Measured) -> tuple[str, ...]:
    def figure(number: float | None) -> str:
        return "" if number is None else f"{number:,}" if isinstance(number, int) else f"{number:.4g}"

    return figure(value.value) or "not tested", value.unit, figure(value.low), figure(value.high), value.badge
