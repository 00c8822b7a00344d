"""LiteRT files (.tflite), written and executed in an environment of their own; and what they execute.

The file takes one sample at a time, in float. The int8 graph is ours: the converter takes it where every weight is still in
float in front of a quantize of its own. The weights that go there are the values of the codes, so that the quantize, done while the
file is written, gives the same codes again.
"""

from __future__ import annotations

import collections
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from paredown.errors import RejectedError
from paredown.export import phone
from paredown.export.artifact import Artifact, Check
from paredown.export.child import child_of
from paredown.program import Program
from paredown.quantize.batches import Batches
from paredown.quantize.decompose import fetch
from paredown.quantize.half import in_halves, why_whole
from paredown.quantize.nouns import Quantized
from paredown.quantize.schemes import HALF
from paredown.target import Target

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}
"""Scheme → largest error, in parts of the output scale. fp16 rounds weights to 11 bits, which is 5e-4 each."""


def write(thing: Program | Quantized, path: Path, *, target: Target, opset: int) -> Artifact:
    """Convert and write. `opset` is ONNX's."""
    del opset
    half = isinstance(thing, Quantized) and thing.scheme == HALF
    if half:
        _refuse_whole(thing)  # type: ignore[arg-type]
    return phone.convert(thing, path, target, _unfold, int8=isinstance(thing, Quantized) and not half, half=half)


def _refuse_whole(thing: Quantized) -> None:
    """The converter makes halves of all constants, also of what float16 cannot hold and of what was to stay float32."""
    for name in dict.fromkeys(str(n.target) for n in thing.module.graph.nodes if n.op == "get_attr"):
        tensor = fetch(thing.module, name)
        if not isinstance(tensor, Tensor) or tensor.dim() < 2 or not tensor.is_floating_point() or not tensor.numel():
            continue
        asked = isinstance(tensor, nn.Parameter) and not in_halves(thing, name)
        why = why_whole(tensor.detach()) or ("asked for in float32" if asked else "")
        if why:
            msg = f"every weight must be held by float16 for {thing.target}, whose converter has no other. Got {name}: {why}. Take fp32 or int8, or onnxruntime-x86, where it stays float32."
            raise RejectedError(msg)


def _unfold(program: ExportedProgram) -> None:
    """A constant that is dequantized becomes its float value, quantized and dequantized, in place."""
    if not any("dequantize" in str(n.target) for n in program.graph.nodes):
        return  # where nothing was quantized, torch has no such ops
    ops = torch.ops.quantized_decomposed
    pairs = {
        ops.dequantize_per_tensor.default: ops.quantize_per_tensor.default,
        ops.dequantize_per_channel.default: ops.quantize_per_channel.default,
    }
    held = {
        **program.graph_signature.inputs_to_buffers,
        **program.graph_signature.inputs_to_parameters,
        **program.graph_signature.inputs_to_lifted_tensor_constants,
    }
    for node in list(program.graph.nodes):
        codes = node.args[0] if node.target in pairs else None
        if not isinstance(codes, fx.Node) or codes.name not in held:
            continue
        values = [_value(program, held, a) if isinstance(a, fx.Node) else a for a in node.args]
        weight = node.target(*values, **node.kwargs)
        _set(program, held[codes.name], weight)
        codes.meta["val"] = codes.meta["val"].fake_mode.from_tensor(weight, static_shapes=True)
        with program.graph.inserting_before(node):
            quantize = program.graph.call_function(pairs[node.target], (codes, *node.args[1:]), dict(node.kwargs))
        quantize.meta["val"] = codes.meta["val"].to(torch.int8)
        node.update_arg(0, quantize)
    program.graph_module.recompile()


def _value(program: ExportedProgram, held: dict[str, str], node: fx.Node) -> torch.Tensor:
    name = held[node.name]
    found = program.state_dict.get(name, program.constants.get(name))
    assert isinstance(found, torch.Tensor)
    return found


def _set(program: ExportedProgram, name: str, value: torch.Tensor) -> None:
    (program.state_dict if name in program.state_dict else program.constants)[name] = value


def compare(artifact: Artifact, reference: object, samples: Batches, *, strict: bool) -> Check:
    """Run the file on the samples against PyTorch, and list what runs in int8 and what in float."""
    found, _ = child_of(artifact.target, 1).ask("inspect", path=str(artifact.path.resolve()))
    kinds = collections.Counter(n.partition(":")[0] for n in found["float"])
    notes = ["one sample per run"]
    if artifact.scheme not in TOLERANCES and kinds:
        listed = ", ".join(f"{k} {n}×" for k, n in sorted(kinds.items()))
        notes.append(
            f"in float, because the table of {artifact.target} has no int8 form for what it is part of: {listed}"
        )
    return phone.compared(
        artifact, reference, samples, strict=strict, tolerance=TOLERANCES.get(artifact.scheme),
        nodes=(found["int8"], found["float"]), notes=notes,
    )  # fmt: skip
