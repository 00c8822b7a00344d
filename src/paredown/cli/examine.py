"""paredown examine: what a model or a file costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.show import columns, emit, only_document, say, show, table
from paredown.cli.sources import loaded
from paredown.errors import UsageError

if TYPE_CHECKING:
    from paredown.examine import OnnxCost


def examine(
    model: options.Model,
    /,
    *,
    input: options.OptionalInput = None,
    target_size: Annotated[
        str | None, Parameter(help='Say which layers must shrink for this size: "5 MB", "5 MiB".')
    ] = None,
    plot: Annotated[Path | None, Parameter(help="Write the bar chart as .png or .svg.")] = None,
    by: Annotated[
        Literal["macs", "parameters", "parameter_bytes", "activation_bytes"], Parameter(help="What the bars show.")
    ] = "macs",
    file: Annotated[
        Path | None, Parameter(help="A checkpoint whose size is compared with its tensors; default: --weights.")
    ] = None,
    weights: options.Weights = None,
    strip_prefix: options.StripPrefix = None,
    pruned: options.From = None,
    threads: options.Threads = None,
    device: options.Device = None,
    strict: options.Strict = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Parameters, MACs, bytes and activation memory, per layer and in total; MODEL may be an .onnx file too."""
    if model.lower().endswith(".onnx"):
        return _examine_file(
            model,
            {"--target-size": target_size, "--plot": plot, "--file": file, "--weights": weights, "--pruned": pruned},
            json,
            quiet,
        )
    if input is None:
        msg = f"examine must be given --input for a PyTorch model, as --input 1x3x224x224. Got none with {model!r}."
        raise UsageError(msg)
    if plot is not None and plot.exists() and not overwrite:
        msg = f"--plot must be a new file. Got {str(plot)!r}, which exists. Choose another, or --overwrite."
        raise UsageError(msg)
    from paredown.budget import parse_bytes

    size = (
        None
        if target_size is None
        else parse_bytes(target_size if not target_size.isdecimal() else f"{target_size} B", "--target-size")
    )
    with only_document(json):
        import paredown

        found = loaded(
            model,
            input,
            weights=weights,
            strip_prefix=strip_prefix,
            pruned=pruned,
            train=False,
            threads=threads,
            device=device,
        )
        cost = paredown.examine(found.program, target_bytes=size, strict=strict, model=model, file=file or weights)
        if plot is not None:
            say(f"wrote {cost.plot(plot, value=by)}", quiet=quiet)
    if json:
        from json import loads

        emit({**loads(cost.to_json()), "weights": found.weights, "notes": list(found.notes)})
        return 0
    show(cost, cost.bars(value=by, width=columns()), *(f"note: {n}" for n in found.notes), quiet=quiet)
    return 0


def _examine_file(path: str, given: dict[str, Any], json: bool, quiet: bool) -> int:
    """An ONNX file holds its shapes and weights: options of a PyTorch model say nothing about it."""
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        msg = f"{', '.join(unused)} must go with a PyTorch model. Got the ONNX file {path!r}. Leave it out."
        raise UsageError(msg)
    from paredown.examine import examine_onnx

    cost = examine_onnx(path)
    if json:
        from json import loads

        emit(loads(cost.to_json()))
    else:
        show(*_as_tables(cost), quiet=quiet)
    return 0


def _as_tables(cost: OnnxCost) -> list[Any]:
    totals = [
        ("parameters", f"{cost.parameters:,}"),
        ("MACs", f"{cost.macs:,} of all ops that multiply, free axes being 1 (FLOPs = 2 × MACs)"),
        ("parameter bytes", f"{cost.parameter_bytes:,}"),
        ("file bytes", f"{cost.file_bytes:,} (measured: {', '.join(cost.files)})"),
        ("opset", str(cost.opset)),
        ("ops", ", ".join(f"{n} {op}" for op, n in cost.ops.items())),
        *((("not counted", ", ".join(cost.uncounted)),) if cost.uncounted else ()),
    ]
    rows = [(name, kind, f"{macs:,}") for name, kind, macs in cost.by_node]
    return [table(("", cost.path), totals, left=2), table(("node", "op", "MACs"), rows, left=2)]
