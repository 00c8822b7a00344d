"""paredown quantize and paredown export: a model as the file that a runtime executes, checked in that runtime."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from paredown.cli import options, reading
from paredown.cli.coding import PACKED, Asked, Coded, Work, evaluations
from paredown.cli.samples import RANDOM_SAMPLES, as_batches, random_batches
from paredown.cli.show import emit, only_document, say, show, table
from paredown.cli.sources import Tuned, arrays, calibration_of, is_run, loaded, tuned
from paredown.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from paredown.export import Check, Predict
    from paredown.program import Program
    from paredown.quantize import Quantized
    from paredown.train import Task

_OUT = Parameter(
    name="--out",
    help="The file to write: model.onnx, model.xml for openvino-x86, model.pte for executorch-xnnpack, model.tflite for litert; "
    "model.safetensors for the packed weights of w4a4 alone.",
)
_MODEL = Parameter(
    help="torchvision:resnet50, timm:resnet50, package.module:callable or path/to/file.py:callable, with --input; or the folder "
    "that `paredown compress` wrote, whose recipe names model and samples. Naming your own code runs it."
)
_NO_SAMPLES = (
    "quantize must be given --calibrate FILE.npz with inputs of the kind that the model will see, or --task. Got none; paredown "
    "does not invent them. To try size and speed alone: --calibrate random."
)

_Calibrate = Annotated[
    str | None,
    Parameter(
        help=".npz or .npy of inputs, samples along the first axis; or the word random. Without it: those of --task."
    ),
]
_Scheme = Annotated[
    Literal["int8", "w4a8", "w4a4", "int8-dynamic", "w4", "w2", "ternary", "binary", "fp16"],
    Parameter(
        help="Bits of weights and activations; int8-dynamic, w4, fp16 and, without --repair, w2, ternary and binary (weights alone) "
        "need no --calibrate. fp16 halves the file, computed in float32. w4a4 runs in kernels of 8 bits, its activations in bytes: accuracy is that of 4 bits, time is not."
    ),
]
_Observer = Annotated[
    Literal["mse", "minmax", "moving-average", "percentile", "entropy"],
    Parameter(help="How the range of an activation is chosen."),
]
_Samples = Annotated[int | None, Parameter(help="Calibration samples at most.")]
_Repair = Annotated[
    list[Literal["equalize", "smooth", "gptq", "adaround", "blocks", "bias", "bias-fast"]] | None,
    Parameter(help="What is done against the rounding; may be given several times."),
]
_FloatLayers = Annotated[list[str] | None, Parameter(help="Patterns of parameters or modules that stay in float.")]
_Epochs = Annotated[
    int | None, Parameter(help="Train with rounding for so many epochs, on the batches and the step of --task.")
]
_Lr = Annotated[
    float | None, Parameter(help="Learning rate of that training, falling to 0 as a cosine. Default: 0.01.")
]
_Distil = Annotated[
    Literal["none", "kl", "mse"] | None,
    Parameter(help="How the network in float teaches: kl for logits (the default), mse for regression, none."),
]
_Teacher = Annotated[
    Path | None,
    Parameter(
        help="Weights of the dense MODEL, which teaches (--epochs) or is compared with (--spare) where it is pruned."
    ),
]
_MaxSteps = Annotated[int | None, Parameter(help="Steps of an epoch at most.")]
_Spare = Annotated[
    bool,
    Parameter(
        negative="", show_default=False,
        help="Put the fewest layers back to float for which the metric on the task's choose_batches keeps --metric-loss.",
    ),
]  # fmt: skip
_MetricLoss = Annotated[
    float | None, Parameter(help="What --spare allows the metric to lose against float, in its own unit.")
]
_SizeBytes = Annotated[
    str | None,
    Parameter(
        help='Bits per layer for a file of at most so many bytes, "150 kB", or such a fraction of the float file.'
    ),
]
_Bits = Annotated[
    list[int] | None,
    Parameter(help="A width that --size-bytes may give a layer; again for more. Default: 8, 6, 4, 3, 2."),
]
_Seed = Annotated[int | None, Parameter(help="Of the training. Default: 0, or that of a run's recipe.")]


def quantize(
    model: Annotated[str, _MODEL],
    /,
    *,
    input: options.OptionalInput = None,
    out: Annotated[Path, _OUT],
    calibrate: _Calibrate = None,
    task: reading.Task = None,
    data: reading.Data = None,
    scheme: _Scheme = "int8",
    observer: _Observer = "mse",
    samples: _Samples = None,
    repair: _Repair = None,
    float_layers: _FloatLayers = None,
    spare: _Spare = False,
    metric_loss: _MetricLoss = None,
    size_bytes: _SizeBytes = None,
    bits: _Bits = None,
    epochs: _Epochs = None,
    lr: _Lr = None,
    distil: _Distil = None,
    teacher: _Teacher = None,
    max_steps: _MaxSteps = None,
    seed: _Seed = None,
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
    asked = Asked(
        scheme=scheme, target=target, observer=observer, samples=samples, repair=repair or (), float_layers=float_layers or (),
        epochs=epochs, lr=lr, distil=distil, max_steps=max_steps, teacher=teacher, spare=spare, metric_loss=metric_loss,
        size_bytes=size_bytes, bits=bits or (),
    )  # fmt: skip
    said_by_a_run = {"--weights": weights, "--strip-prefix": strip_prefix, "--pruned": pruned, "--task": task}
    run = is_run(model, input, {**said_by_a_run, "--data": data, "--teacher": teacher})
    asked.check(out, has_task=run or task is not None)
    if calibrate is None and task is None and not asked.needless and not run:
        raise UsageError(_NO_SAMPLES)
    read_files = {"weights": weights, "model": model.rpartition(":")[0], "calibration": calibrate, "teacher": teacher}
    for file in _weights_in(Path(model) if run else pruned):
        check_out_file(out, {"pruned model": file}, overwrite=overwrite)
    check_out_file(out, read_files, overwrite=overwrite)
    read = None if calibrate in (None, "random") else arrays(Path(str(calibrate)), "--calibrate")
    with only_document(json):
        named_task = _task(task, data)
        if not run:
            asked.check_task(named_task)
        found = tuned(
            model, input, weights=weights, strip_prefix=strip_prefix, pruned=pruned, threads=threads,
            device=None if epochs else device,
        )  # fmt: skip
        whose = named_task or found.task
        asked.check_task(whose)  # that of a run
        chosen_seed = found.seed if seed is None else seed
        batches, source = _samples(found, read, calibrate, named_task, chosen_seed, samples)
        leaked = _checked(whose, batches, source, asked)
        work = Work(
            asked=asked, tuned=found, task=whose, batches=batches, seed=chosen_seed, device=device or "cpu", out=out,
            strip_prefix=strip_prefix, say=lambda text: say(text, quiet=quiet or json),
        )  # fmt: skip
        coded = work.coded()
        with _whole(out):
            written = _written(work, coded, opset)
            facts = _facts(work, coded, written, source)
        facts["notes"] += leaked
        work.checkpoint.unlink(missing_ok=True)  # not before: a file that cannot be written costs no training
    _told(written, facts, json=json, quiet=quiet)
    return 0


def _weights_in(folder: Path | None) -> Iterator[Path]:
    """What a folder is rebuilt from, and what its run goes on from; w4a4 writes files of the same suffix."""
    if folder is not None:
        yield folder / "model.safetensors"
        yield from folder.glob("masks-*.safetensors")
        yield from folder.glob("steps/*.safetensors")


def _task(task: str | None, data: Path | None) -> Task | None:
    """The task that was named. Raises UsageError where only its data were."""
    if task is None:
        if data is not None:
            msg = f"--data must come with --task, whose functions take it. Got {str(data)!r} alone."
            raise UsageError(msg)
        return None
    from paredown.models import load_task_module
    from paredown.train import task_from_module

    return task_from_module(load_task_module(task), data=data)


def _samples(
    asked: Tuned,
    read: dict[str, Any] | None,
    calibrate: str | None,
    task: Task | None = None,
    seed: int = 0,
    most: int | None = None,
) -> tuple[Any, str]:
    """What the scheme is calibrated on and the file is compared on, and where it comes from: given, the task, or random."""
    if read is not None:
        return as_batches(read, asked.found.program, "--calibrate"), "given"
    if calibrate is None and task is not None:
        return calibration_of(task, seed, most), "task"
    if asked.batches is not None and calibrate is None:
        return (asked.batches if asked.task is None else calibration_of(asked.task, seed, most)), "task"
    return random_batches(asked.found.program), "random"


def _checked(task: Task | None, batches: Any, source: str, asked: Asked) -> tuple[str, ...]:
    """What is odd about calibration samples beside those of the task's metric, before any work; test data calibrate nothing (RejectedError)."""
    if task is None or source == "random":
        return ()
    from functools import partial

    from paredown.quantize.batches import each
    from paredown.train.roles import check_calibration

    name = "--calibrate" if source == "given" else "calibration_batches"
    return check_calibration(
        task, partial(each, batches), calibrates=not asked.needless, trains=bool(asked.epochs), name=name
    )


@contextmanager
def _whole(out: Path) -> Iterator[None]:
    """Where anything fails until the block ends, the file that it wrote does not stay: it is not one that was checked."""
    files = [f for f in (out, _beside(out)) if f is not None]
    before = [_stamp(f) for f in files]
    try:
        yield
    except BaseException:
        for file, known in zip(files, before, strict=True):
            if _stamp(file) != known:
                file.unlink(missing_ok=True)
        raise


def _stamp(file: Path) -> tuple[int, int] | None:
    return (file.stat().st_mtime_ns, file.stat().st_ino) if file.exists() else None


_NOISY = 0.1
"""20 dB."""
_NO_RUNTIME = "simulated: the file holds the packed weights alone (docs/packed.md), no runtime multiplies 4-bit codes; --out model.onnx runs in kernels of 8 bits"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """The files, and what executes them: a runtime, by its check, or for what is simulated none."""

    files: tuple[Path, ...]
    target: str
    scheme: str
    predict: Predict
    checked: Check | None
    packed: dict[str, Any] | None = None
    """Where the bytes of a packed file are."""

    @property
    def size_bytes(self) -> int:
        """Of all files, by stat."""
        return sum(f.stat().st_size for f in self.files)


def _written(work: Work, coded: Coded, opset: int) -> _Written:
    """The file that the runtime executes, executed and compared; or the packed weights, read back."""
    import paredown
    from paredown.export import predictor

    quant, out = coded.quantized, work.out
    shared: dict[str, Any] = {"target": quant.target, "scheme": quant.scheme}
    if out.suffix.lower() == PACKED:
        work.say("write the packed weights")
        return _Written(files=(out,), predict=predictor(quant), checked=None, packed=_packed(quant, out), **shared)
    work.say("export and check")
    artifact = paredown.export(quant, out, opset=opset)
    coded.refuse_larger(artifact.size_bytes, artifact.files)
    checked = paredown.check(artifact, quant, work.compared)
    return _Written(files=artifact.files, predict=predictor(artifact), checked=checked, **shared)


def _packed(quant: Quantized, out: Path) -> dict[str, Any]:
    """The weights in a file of their own. Raises VerificationError where what is read back is not what was written."""
    import dataclasses

    from paredown.quantize.packed import load_packed, save_packed

    size = save_packed(quant.weights, out)
    again = load_packed(out)
    same = again.keys() == quant.weights.keys() and all(
        bool((again[n].unpack() == w.unpack()).all()) for n, w in quant.weights.items()
    )
    if not same:
        msg = f"packed weights must be read back as they were written. Got other ones at {str(out)!r}."
        raise VerificationError(msg)
    return {**dataclasses.asdict(size), "bits_per_weight": size.bits_per_weight}


def _lost(program: Program, quant: Quantized, batches: Any) -> float:
    """The simulation's error against the float network, as a share of what an output's values differ among themselves."""
    from paredown.export.onnxruntime import distance
    from paredown.export.session import predictor

    return distance(predictor(quant), program, batches).lost


def _facts(work: Work, coded: Coded, written: _Written, source: str) -> dict[str, Any]:
    """What the document says beside the file and its check: `source` calibrated it, samples that are given or random compared it."""
    quant, found, needless = coded.quantized, work.tuned.found, work.asked.needless
    lost = _lost(found.program, quant, work.compared)
    notes = [
        *((RANDOM_SAMPLES,) if source == "random" and not needless else ()),
        *found.notes,
        *quant.notes,
        *coded.notes,
    ]
    if lost > _NOISY:
        notes.append(
            f"rounding changes an output by {lost:.0%} of what its values differ among themselves: try --repair, --observer or --float-layers; "
            "`paredown numerics MODEL --input … --out page.html` shows the noise of every layer"
        )
    metric: dict[str, Any] = {}
    if work.task is not None:
        work.say("evaluate")
        calibration = None if needless else work.batches
        value, odd = evaluations(work.task, work.tuned.thing, written.predict, calibration)
        metric = {"metric": {**value, "badge": "simulated" if written.checked is None else "measured"}}
        notes += odd
    share = quant.coverage
    return {
        "rounding": {
            "error_of_deviation": lost,
            "badge": "measured" if written.checked is not None else "simulated",
            "samples": "given" if source != "random" else "random",
        },
        "calibrated_on": "none" if needless else source,
        **({"coverage": {"macs": share.macs, "weights": share.weights}} if share else {}),
        "bits": {name: packed.bits for name, packed in quant.weights.items()},
        **metric,
        **coded.told,
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
        Literal["fp32", "fp16"], Parameter(help="fp16 halves the weights, not the time; not for executorch-xnnpack.")
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
        from paredown.export import predictor

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
        args, kwargs = found.program.inputs
        with _whole(out):
            artifact = paredown.export(found.program, out, target=target, opset=opset, scheme=scheme)
            checked = paredown.check(artifact, found.program, [{"args": args, "kwargs": kwargs}])
        written = _Written(
            files=artifact.files, target=artifact.target, scheme=artifact.scheme, predict=predictor(artifact),
            checked=checked,
        )  # fmt: skip
    _told(written, {"weights": found.weights, "notes": list(found.notes)}, json=json, quiet=quiet)
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


def _rounding(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What the codes cost against the float network; nothing of a float file."""
    if "rounding" not in facts:
        return []
    lost, samples = facts["rounding"]["error_of_deviation"], facts["rounding"]["samples"]
    decibel = f"{-20 * math.log10(lost):.1f} dB" if lost else "no error"
    badge = facts["rounding"]["badge"]
    return [
        (
            "quantized against float",
            f"error of {lost:.1%} of the outputs' own deviation ({decibel}), {samples} samples ({badge})",
        )
    ]


def _asked_for(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What else was done and found, a row each: widths, training, layers in float, the metric."""
    rows = []
    if "size_bytes" in facts:
        from paredown.pipeline.fitted import in_words

        asked = facts["size_bytes"]
        rows.append(
            (
                "bits per layer",
                f"{in_words(facts['bits'])}, for {asked['asked']:,} B (8 bits: {asked['with_8_bits']:,})",
            )
        )
    if "training" in facts:
        made = facts["training"]
        losses = [row["loss"] for row in made["history"] if row["loss"] is not None]
        loss = f", loss {losses[0]:.3g} to {losses[-1]:.3g}" if losses else ""
        teacher = "no teacher" if made["teacher"] is None else f"taught by {made['teacher']} ({made['distil']})"
        rows.append(("trained with rounding", f"{made['epochs']} epochs, rate {made['lr']:g}, {teacher}{loss}"))
    if "spare" in facts:
        kept = facts["spare"]
        names = ", ".join(kept["float_layers"]) or "none"
        rows.append(("layers put in float", f"{names}; {kept['extra_bytes']:,} B more (estimated)"))
    if "metric" in facts:
        m = facts["metric"]
        values = f"{m['codes']:.4g} {m['unit']} quantized, {m['float']:.4g} {m['unit']} in float"
        rows.append((f"{m['name']} on {m['data']} data", f"{values} ({m['badge']})"))
    return rows


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


def _told(written: _Written, facts: dict[str, Any], *, json: bool, quiet: bool) -> None:
    checked = written.checked
    if json:
        emit(
            {
                "schema": 1,
                "files": [{"name": str(f), "bytes": f.stat().st_size} for f in written.files],
                "file_bytes": written.size_bytes,
                "target": written.target,
                "scheme": written.scheme,
                **_check_document(checked),
                **(
                    {}
                    if written.packed is None
                    else {"packed": written.packed, "runtime": None, "simulated": _NO_RUNTIME}
                ),
                **facts,
            }
        )
        return
    rows = [
        ("file bytes", f"{written.size_bytes:,} (measured)"),
        ("scheme", f"{written.scheme} for {written.target}" if checked else f"{written.scheme}, simulated"),
        *_rounding(facts),
        *_asked_for(facts),
        *(_runtime_rows(checked, facts) if checked else [("runtime", _NO_RUNTIME)]),
    ]
    show(
        table(("", str(written.files[0])), rows, left=2),
        *(f"note: {n}" for n in (*facts["notes"], *(checked.notes if checked else ()))),
        quiet=quiet,
    )


def _check_document(checked: Check | None) -> dict[str, Any]:
    """The keys of a check; all there and empty where no runtime executes the file."""
    if checked is None:
        return {"check": None, "int8_nodes": [], "float_nodes": [], "float_reasons": {}, "layers": None}
    return {
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
    }


def _runtime_rows(checked: Check, facts: dict[str, Any]) -> list[tuple[str, str]]:
    against = "the simulation" if "rounding" in facts else "PyTorch"
    return [
        (
            f"runtime against {against}",
            f"max error {checked.max_error:.2g} at scale {checked.scale:.2g}, cosine {checked.cosine:.6f}",
        ),
        ("runs in int8", f"{len(checked.int8_nodes)} nodes of the runtime's own graph{_share(checked)}"),
        *_in_float(checked),
    ]
