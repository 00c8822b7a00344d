"""paredown quantize and paredown export: a model as the file that a runtime executes, checked in that runtime."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.show import emit, only_document, say, show, table
from paredown.cli.sources import Tuned, arrays, is_run, loaded, tuned
from paredown.errors import RejectedError, UsageError

if TYPE_CHECKING:
    from paredown.export import Artifact, Check
    from paredown.program import Program
    from paredown.quantize import Quantized

_OUT = Parameter(
    name="--out",
    help="The file to write: model.onnx, model.xml for openvino-x86, model.pte for executorch-xnnpack, model.tflite for litert.",
)
_MODEL = Parameter(
    help="torchvision:resnet50, timm:resnet50, package.module:callable or path/to/file.py:callable, with --input; or the folder "
    "that `paredown compress` wrote, whose recipe names model and samples. Naming your own code runs it."
)
_NO_SAMPLES = (
    "quantize must be given --calibrate FILE.npz with inputs of the kind that the model will see. Got none; paredown "
    "does not invent them. To try size and speed alone: --calibrate random."
)
NO_DATA = ("int8-dynamic", "w4")
"""Schemes that read no samples (quantize.schemes.DYNAMIC, which would load torch); samples that are given check the file."""
WEIGHTS = ("w2", "ternary", "binary")
"""Schemes that need samples for a repair only (quantize.schemes.WEIGHTS)."""
RANDOM_SAMPLES = "CALIBRATED ON RANDOM NUMBERS: the ranges are not those of your data. For a try of size and speed only, never to ship."


def quantize(
    model: Annotated[str, _MODEL],
    /,
    *,
    input: options.OptionalInput = None,
    out: Annotated[Path, _OUT],
    calibrate: Annotated[
        str | None, Parameter(help=".npz or .npy of inputs, samples along the first axis; or the word random.")
    ] = None,
    scheme: Annotated[
        Literal["int8", "w4a8", "int8-dynamic", "w4", "w2", "ternary", "binary"],
        Parameter(
            help="Bits of weights and activations; int8-dynamic, w4 and, without --repair, w2, ternary and binary (weights alone) need no --calibrate."
        ),
    ] = "int8",
    observer: Annotated[
        Literal["mse", "minmax", "moving-average", "percentile", "entropy"],
        Parameter(help="How the range of an activation is chosen."),
    ] = "mse",
    samples: Annotated[int | None, Parameter(help="Calibration samples at most.")] = None,
    repair: Annotated[
        list[Literal["equalize", "smooth", "gptq", "adaround", "blocks", "bias", "bias-fast"]] | None,
        Parameter(help="What is done against the rounding; may be given several times."),
    ] = None,
    float_layers: Annotated[
        list[str] | None, Parameter(help="Patterns of parameters or modules that stay in float.")
    ] = None,
    target: options.Target = "onnxruntime-x86",
    opset: Annotated[int, Parameter(help="ONNX opset; older runtimes need a lower one.")] = 18,
    weights: options.Weights = None,
    strip_prefix: options.StripPrefix = None,
    pruned: options.From = None,
    threads: options.Threads = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Quantize to 8 bits or fewer, with samples where the scheme needs them; export, and check the file in its runtime."""
    needless = scheme in NO_DATA or (scheme in WEIGHTS and not repair)
    run = is_run(model, input, {"--weights": weights, "--strip-prefix": strip_prefix, "--pruned": pruned})
    if calibrate is None and not needless and not run:
        raise UsageError(_NO_SAMPLES)
    check_out_file(out, {"weights": weights, "model": model.rpartition(":")[0]}, overwrite=overwrite)
    read = None if calibrate in (None, "random") else arrays(Path(str(calibrate)), "--calibrate")
    with only_document(json):
        import paredown

        asked = tuned(
            model, input, weights=weights, strip_prefix=strip_prefix, pruned=pruned, threads=threads, device=device
        )
        batches, source = _samples(asked, read, calibrate)
        say("quantize", quiet=quiet or json)
        quant = paredown.quantize(
            asked.thing, target=target, scheme=scheme, calibrate=None if needless else batches, observer=observer,
            num_samples=samples, repair=repair or (), float_layers=float_layers or (),
        )  # fmt: skip
        say("export and check", quiet=quiet or json)
        artifact = paredown.export(quant, out, opset=opset)
        checked = paredown.check(artifact, quant, batches)
        lost = _lost(asked.found.program, quant, batches)
    facts = _facts(asked.found, quant, "none" if needless else source, lost, given=source != "random")
    _told(artifact, checked, facts, json=json, quiet=quiet)
    return 0


def _samples(asked: Tuned, read: dict[str, Any] | None, calibrate: str | None) -> tuple[Any, str]:
    """What the scheme is calibrated on and the file is compared on, and where it comes from: given, the task, or random."""
    if read is not None:
        return as_batches(read, asked.found.program, "--calibrate"), "given"
    if asked.batches is not None and calibrate is None:
        return asked.batches, "task"
    return random_batches(asked.found.program), "random"


_NOISY = 0.1
"""20 dB."""


def _lost(program: Program, quant: Quantized, batches: Any) -> float:
    """The simulation's error against the float network, as a share of what an output's values differ among themselves."""
    from paredown.export.onnxruntime import distance
    from paredown.export.session import predictor

    return distance(predictor(quant), program, batches).lost


def _facts(found: Any, quant: Any, source: str, lost: float, *, given: bool) -> dict[str, Any]:
    """What the document says beside the file and its check: `source` calibrated it, samples that are `given` or random compared it."""
    notes = [*((RANDOM_SAMPLES,) if source == "random" else ()), *found.notes, *quant.notes]
    if lost > _NOISY:
        notes.append(
            f"rounding changes an output by {lost:.0%} of what its values differ among themselves: try --repair, --observer or --float-layers; "
            "`paredown numerics MODEL --input … --out page.html` shows the noise of every layer"
        )
    share = quant.coverage
    return {
        "rounding": {"error_of_deviation": lost, "badge": "measured", "samples": "given" if given else "random"},
        "calibrated_on": source,
        **({"coverage": {"macs": share.macs, "weights": share.weights}} if share else {}),
        "weights": found.weights,
        "notes": list(dict.fromkeys(notes)),
    }


def export(
    model: options.Model,
    /,
    *,
    input: options.Input,
    out: Annotated[Path, _OUT],
    target: options.Target = "onnxruntime-x86",
    scheme: Annotated[
        Literal["fp32", "fp16"], Parameter(help="fp16 halves the weights, for openvino-x86 and litert.")
    ] = "fp32",
    opset: Annotated[int, Parameter(help="ONNX opset; older runtimes need a lower one.")] = 18,
    weights: options.Weights = None,
    strip_prefix: options.StripPrefix = None,
    pruned: options.From = None,
    threads: options.Threads = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Write a file in floating point, and check it in its runtime on the example input."""
    check_out_file(out, {"weights": weights, "model": model.rpartition(":")[0]}, overwrite=overwrite)
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
        say("export and check", quiet=quiet or json)
        artifact = paredown.export(found.program, out, target=target, opset=opset, scheme=scheme)
        args, kwargs = found.program.inputs
        checked = paredown.check(artifact, found.program, [{"args": args, "kwargs": kwargs}])
    _told(artifact, checked, {"weights": found.weights, "notes": list(found.notes)}, json=json, quiet=quiet)
    return 0


def check_out_file(out: Path, inputs: dict[str, Any], *, overwrite: bool, option: str = "--out") -> None:
    """A new file; never one that is read. So is the file of weights that a runtime has beside it."""
    beside = _beside(out)
    if out.is_dir():
        msg = f"{option} must be a file to write. Got the folder {str(out)!r}. Add a name, as {str(out / 'model.onnx')!r}."
        raise UsageError(msg)
    for what, path in inputs.items():
        for written in (out, beside):
            if path and written and Path(path).is_file() and Path(path).resolve() == written.resolve():
                msg = f"{option} must not be the file of the {what}. Got {str(written)!r} for both."
                raise UsageError(msg)
    if out.suffix.lower() == ".xml" and beside is not None and beside.exists() and not overwrite:
        msg = f"{option} must have no other file where its weights go. Got {str(beside)!r}, which exists. Choose another name, or --overwrite."
        raise UsageError(msg)
    if out.exists() and not overwrite:
        msg = f"{option} must be a new file. Got {str(out)!r}, which exists. Choose another, or --overwrite."
        raise UsageError(msg)


def _beside(out: Path) -> Path | None:
    """Where a second file is written: OpenVINO's weights always, ONNX's where they are too large for one."""
    suffix = out.suffix.lower()
    if suffix == ".xml":
        return out.with_suffix(".bin")
    return out.with_name(f"{out.name}.data") if suffix == ".onnx" else None


def as_batches(read: dict[str, Any], program: Program, option: str) -> list[Any]:
    """Arrays as batches of 32 samples in the structure of the example inputs: by name where all names fit, else in order.

    Where the network's batch is fixed, a batch has its length, and samples that do not fill one are left out.
    """
    import torch
    from torch import Tensor
    from torch.utils import _pytree as pytree

    leaves, structure = pytree.tree_flatten(program.inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    names = [str(n) for n in program.inputs.kwargs]
    order = list(read)
    if names and len(read) == len(names) == len(places) and set(read) == set(names):
        order = names
    if len(order) != len(places):
        msg = f"{option} must hold one array for each of the model's {len(places)} inputs. Got {len(order)}: {', '.join(order)}."
        raise RejectedError(msg)
    tensors = [_fitting(read[name], leaves[at], name, option) for name, at in zip(order, places, strict=True)]
    size, total = 32, min((len(t) for t in tensors if t.dim()), default=0)
    if program.batch != "dynamic":
        size = next(int(leaves[at].shape[0]) for at in places if leaves[at].dim())
        if total < size:
            msg = f"{option} must hold at least one batch of {size}, which the network's batch is fixed to. Got {total} samples."
            raise RejectedError(msg)
        tensors = [t[: total - total % size] for t in tensors]
    batches = []
    for parts in zip(*(torch.split(t, size) for t in tensors), strict=True):
        filled = list(leaves)
        for at, part in zip(places, parts, strict=True):
            filled[at] = part
        args, kwargs = pytree.tree_unflatten(filled, structure)
        batches.append({"args": args, "kwargs": kwargs})
    return batches


def _fitting(array: Any, example: Any, name: str, option: str) -> Any:
    """The array as a tensor of the example's dtype. Whole numbers are not taken for normalised inputs."""
    import torch

    if example.is_floating_point() and array.dtype.kind != "f":
        msg = f"{option} must hold the model's own inputs, normalised, as floats. Got {array.dtype} in {name!r}."
        raise RejectedError(msg)
    if array.dtype.kind not in "fiub" or (not example.is_floating_point() and array.dtype.kind == "f"):
        msg = f"{option} must hold numbers of the kind {example.dtype}. Got {array.dtype} in {name!r}."
        raise RejectedError(msg)
    if tuple(array.shape[1:]) != tuple(example.shape[1:]):
        msg = f"{option} must hold samples of the shape {tuple(example.shape[1:])}. Got {tuple(array.shape[1:])} in {name!r}."
        raise RejectedError(msg)
    native = array.astype(array.dtype.newbyteorder("="))  # torch reads no foreign byte order
    return torch.from_numpy(native).to(example.dtype)


def random_batches(program: Program) -> list[Any]:
    """32 samples of seeded noise in the form of the example inputs; integers repeat the example."""
    import torch
    from torch import Tensor
    from torch.utils import _pytree as pytree

    generator = torch.Generator().manual_seed(0)

    def noise(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.randn(leaf.shape, generator=generator).to(leaf.dtype)

    made = [pytree.tree_map(noise, program.inputs) for _ in range(16)]
    return [{"args": args, "kwargs": kwargs} for args, kwargs in made]


def _rounding(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What the codes cost against the float network; nothing of a float file."""
    if "rounding" not in facts:
        return []
    lost, samples = facts["rounding"]["error_of_deviation"], facts["rounding"]["samples"]
    decibel = f"{-20 * math.log10(lost):.1f} dB" if lost else "no error"
    return [
        (
            "codes against float",
            f"error of {lost:.1%} of the outputs' own deviation ({decibel}), {samples} samples (measured)",
        )
    ]


def _share(checked: Check) -> str:
    """How many of the layers that multiply with weights are among them."""
    share = checked.layer_share
    if share is None:
        return ""
    return f"; {checked.num_layers_on_codes} of {checked.num_layers} convolutions and linear layers ({share:.0%})"


def _in_float(checked: Check) -> list[tuple[str, str]]:
    """One row per kind of node that computes in float: how many, the first few by name, and why where it is known."""
    kinds: dict[str, list[str]] = {}
    for node in checked.float_nodes:
        kind, _, name = node.partition(": ")
        kinds.setdefault(kind, []).append(name)
    rows = []
    for kind, names in sorted(kinds.items(), key=lambda one: (-len(one[1]), one[0])):
        some = ", ".join(n for n in names[:_NAMES] if n) + (", …" if len(names) > _NAMES else "")
        rows.append(
            f"{kind} {len(names)}× ({some})" + (f": {checked.reasons[kind]}" if kind in checked.reasons else "")
        )
    return [("computes in float" if i == 0 else "", row) for i, row in enumerate(rows or ["none"])]


_NAMES = 3


def _told(artifact: Artifact, checked: Check, facts: dict[str, Any], *, json: bool, quiet: bool) -> None:
    if json:
        emit(
            {
                "schema": 1,
                "files": [{"name": str(f), "bytes": f.stat().st_size} for f in artifact.files],
                "file_bytes": artifact.size_bytes,
                "target": artifact.target,
                "scheme": artifact.scheme,
                "check": {
                    "max_error": checked.max_error,
                    "scale": checked.scale,
                    "cosine": checked.cosine,
                    "holds": checked.holds,
                    "notes": list(checked.notes),
                },
                "int8_nodes": list(checked.int8_nodes),
                "float_nodes": list(checked.float_nodes),
                "float_reasons": dict(checked.reasons),
                "layers": {"all": checked.num_layers, "on_codes": checked.num_layers_on_codes},
                **facts,
            }
        )
        return
    rows = [
        ("file bytes", f"{artifact.size_bytes:,} (measured)"),
        ("scheme", f"{artifact.scheme} for {artifact.target}"),
        *_rounding(facts),
        (
            f"runtime against {'the simulation' if 'rounding' in facts else 'PyTorch'}",
            f"max error {checked.max_error:.2g} at scale {checked.scale:.2g}, cosine {checked.cosine:.6f}",
        ),
        ("runs in int8", f"{len(checked.int8_nodes)} nodes of the runtime's own graph{_share(checked)}"),
        *_in_float(checked),
    ]
    show(
        table(("", str(artifact.path)), rows, left=2),
        *(f"note: {n}" for n in (*facts["notes"], *checked.notes)),
        quiet=quiet,
    )
