"""Export: a network as a file that a runtime executes, and the proof that it executes the same function."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from paredown.environments import python_of
from paredown.errors import MissingError, RejectedError, UsageError
from paredown.export.artifact import Artifact, Check
from paredown.export.session import Predict, predictor, products_of
from paredown.program import Program, capture
from paredown.prune.nouns import Pruned
from paredown.quantize.batches import Batches
from paredown.quantize.half import quantize_half
from paredown.quantize.nouns import Quantized
from paredown.quantize.schemes import HALF, SCHEMES
from paredown.target import TARGETS, named, why_float

RUNTIMES: Mapping[str, str] = {
    "onnxruntime-x86": "paredown.export.onnxruntime",
    "onnxruntime-arm": "paredown.export.onnxruntime",
    "openvino-x86": "paredown.export.openvino",
    "executorch-xnnpack": "paredown.export.executorch",
    "litert": "paredown.export.litert",
}
"""Target → the module that writes its files and opens what the runtime makes of them."""


def export(
    thing: Program | Pruned | Quantized | tuple[nn.Module, Any],
    path: str | Path,
    *,
    target: str | None = None,
    opset: int = 18,
    scheme: Literal["fp32", "fp16"] = "fp32",
    accuracy_level: Literal[0, 4] = 0,
) -> Artifact:
    """Write the file that a runtime executes: ONNX, float32 or on integer codes, with the batch free where the program's is.

    For OpenVINO a .xml file with a .bin beside it, made of the same graph; for ExecuTorch a .pte and for LiteRT a .tflite file,
    whose batch is fixed at 1 and whose converters need an environment of their own (`paredown setup TARGET`). `scheme`
    "fp16" halves the weights of a float network (for ONNX Runtime, OpenVINO and LiteRT), and with them the file; x86 computes in float32 all the
    same, no faster. What float16 cannot hold stays float32: `quantize(…, scheme="fp16")` gives the same file, and says which weights.

    `thing` is a Program, a Pruned, a Quantized, or (module, inputs). Integer codes are written as they are in
    `Quantized.weights`, never computed again. The bytes depend on nothing but `thing` and the versions of torch and
    onnxscript, and hold no path, user name or stack trace. Weights above 1.9 GB go to a side file, listed in
    `Artifact.files`. Files appear whole or not at all. `accuracy_level` says how 4-bit weights are multiplied: 0 in
    float32, 4 in int8 with a range per row and 32 inputs, which is faster on some machines and less exact.

    Raises UsageError (target, opset), RejectedError (weights that are not float32, ops without a translation, listed before conversion), MissingError
    (onnx, onnxscript, the environment), ResourceError (the path cannot be written), NothingToDo (fp16, where no weight can be halved).

    >>> import tempfile, torch
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    >>> artifact = export((net, torch.zeros(2, 1, 4, 4)), Path(tempfile.mkdtemp()) / "net.onnx")
    >>> artifact.scheme, len(artifact.files)
    ('fp32', 1)
    """
    table = named(target or (thing.target if isinstance(thing, Quantized) else "onnxruntime-x86"))
    if isinstance(thing, Quantized) and thing.target != table.name:
        msg = f"target must be that of the quantized network, {thing.target!r}. Got {table.name!r}. Quantize again for it."
        raise UsageError(msg)
    runtime = _runtime(table.name)
    path = Path(path)
    if path.is_dir():
        msg = f"path must be a file to write. Got the folder {path}. Add a name such as model.onnx."
        raise UsageError(msg)
    more: dict[str, Any] = {}
    if scheme != "fp32" and (scheme != HALF or isinstance(thing, Quantized) or "float16" not in table.dtypes):
        able = ", ".join(t.name for t in TARGETS.values() if "float16" in t.dtypes)
        msg = f"scheme must be 'fp32', or 'fp16' for a float network and {able}. Got {scheme!r} for {table.name}."
        raise UsageError(msg)
    if accuracy_level:
        if accuracy_level != 4 or not isinstance(thing, Quantized) or thing.scheme != "w4":
            msg = f"accuracy_level must be 0, or 4 for a network that is w4. Got {accuracy_level!r}."
            raise UsageError(msg)
        more = {"accuracy_level": accuracy_level}
    found = _floating(thing)
    _refuse_other_floats(found.program if isinstance(found, Quantized) else found)
    if scheme == HALF and isinstance(found, Program):
        found = quantize_half(found, target=table.name)
    return runtime.write(found, path, target=table, opset=opset, **more)  # type: ignore[no-any-return]


def _refuse_other_floats(program: Program) -> None:
    """Half precision in a file is the exporter's to make; kernels of double precision the runtimes do not have."""
    parameters = program.eval_graph.graph_signature.parameters
    for name in parameters:
        dtype = program.state[name].dtype
        if dtype.is_floating_point and dtype != torch.float32:
            kind = str(dtype).removeprefix("torch.")
            msg = f"a network must be of float32 to be exported. Got {kind} in {name}. Call model.float() before capture; scheme='fp16' writes halves where a runtime has them."
            raise RejectedError(msg)


def check(
    artifact: Artifact,
    reference: Program | Pruned | Quantized | nn.Module,
    samples: Batches,
    *,
    strict: bool = True,
) -> Check:
    """Run the file in its runtime on real samples, at their batch size and at 1, and compare with PyTorch.

    float32 holds where max |runtime - torch| ≤ 1e-4 · max |torch|, fp16 where it is ≤ 1e-2 of it. int8 holds where the cosine
    of every output tensor is ≥ 0.999 against `reference`, which should be the Quantized that was exported: single steps of
    rounding differ between the two and propagate, so the maximum error says little there. Where OpenVINO's own sums saturate
    (x86 without VNNI) the same file executed in float is held to that instead, and a note says so. A network that amplifies rounding,
    so that its simulation differs from itself when its float results are disturbed by a part in a million, is held to twice that
    difference (conditioning.py; at least 0.98), and a note says so. Also opens the runtime's own optimised
    graph and lists what runs in int8 and what computes in float, with the reason by kind of op, and counts the convolutions and
    products with a constant matrix that run on codes (`layer_share`). A file whose products are exact here but not in every session of
    ONNX Runtime, as one for ARM, says so in its notes.

    Raises VerificationError with the Check as `evidence` where it does not hold and `strict`; RejectedError without
    samples; MissingError where the runtime is missing or older than the file.
    """
    found: Check = _runtime(artifact.target).compare(artifact, reference, samples, strict=strict)
    products = products_of(artifact)
    found = dataclasses.replace(found, notes=(*found.notes, products)) if products else found
    scheme = SCHEMES.get(artifact.scheme)
    if scheme is None or scheme.activations != "static":
        return found  # a float file has no reasons; those of schemes without samples stand in Quantized.notes
    table, kinds = named(artifact.target), {node.partition(":")[0] for node in found.float_nodes}
    return dataclasses.replace(found, reasons={kind: why_float(table, kind) for kind in sorted(kinds)})


def _runtime(target: str) -> Any:
    table = named(target)
    if table.environment:
        python_of(table)
    for library in table.modules:
        try:
            importlib.import_module(library)
        except ImportError as error:
            extra = library if library in table.extras else table.extras[0]
            msg = f"the target {target} must have {library}. It cannot be imported ({error}). Run: pip install 'paredown[{extra}]'."
            raise MissingError(msg) from error
    return importlib.import_module(RUNTIMES[table.name])


def _floating(thing: Any) -> Program | Quantized:
    """What the runtime's module exports: a captured program or a quantized one."""
    if isinstance(thing, Program | Quantized):
        return thing
    if isinstance(thing, Pruned):
        args, kwargs = thing.program.inputs
        return capture(thing.module, {"args": args, "kwargs": kwargs}, train=False)
    if isinstance(thing, tuple) and len(thing) == 2 and isinstance(thing[0], nn.Module):
        return capture(thing[0], thing[1], train=False)
    msg = (
        f"the thing to export must be a Program, a Pruned, a Quantized or (module, inputs). Got {type(thing).__name__}."
    )
    raise UsageError(msg)


__all__ = ["RUNTIMES", "Artifact", "Check", "Predict", "check", "export", "predictor"]
