"""ExecuTorch files (.pte) for XNNPACK, written and executed in an environment of their own; and what they execute.

The file takes one sample at a time. The int8 graph is ours, on int8 activations; codes are those of `Quantized.weights`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from paredown.export import phone
from paredown.export.artifact import Artifact, Check
from paredown.export.child import child_of
from paredown.program import Program
from paredown.quantize.batches import Batches
from paredown.quantize.nouns import Quantized
from paredown.target import Target

_DEQUANTIZE = ("quantized_decomposed.dequantize_per_tensor", "quantized_decomposed.dequantize_per_channel")
TOLERANCES = {"fp32": 1e-4}
"""Scheme → largest error, in parts of the output scale. Where activations are rounded, the cosine decides instead."""


def write(thing: Program | Quantized, path: Path, *, target: Target, opset: int) -> Artifact:
    """Lower to XNNPACK and write; ops that XNNPACK does not take go to ExecuTorch's portable kernels. `opset` is ONNX's."""
    del opset
    return phone.convert(thing, path, target, _apart)


def _apart(program: ExportedProgram) -> None:
    """Give every reader of a dequantized value its own dequantize, in place.

    The partitioner takes dequantize, op and quantize together: a dequantize that two partitions share makes a circle of
    dependencies, which it refuses.
    """
    for node in list(program.graph.nodes):
        if not str(node.target).startswith(_DEQUANTIZE):  # by name: where nothing was quantized, torch has no such ops
            continue
        readers = [u for u in node.users if u.op != "output"]
        for reader in readers if len(readers) < len(node.users) else readers[1:]:
            with program.graph.inserting_before(reader):
                own = program.graph.node_copy(node)
            reader.replace_input_with(node, own)
    program.graph_module.recompile()


def compare(artifact: Artifact, reference: Any, samples: Batches, *, strict: bool) -> Check:
    """Run the file on the samples against PyTorch, and list what runs in int8, in float, and outside of XNNPACK."""
    found, _ = child_of(artifact.target, 1).ask("inspect", path=str(artifact.path.resolve()))
    notes = [f"outside of XNNPACK: {kind} {why}" for kind, why in found["outside"].items()]
    return phone.compared(
        artifact, reference, samples, strict=strict, tolerance=TOLERANCES.get(artifact.scheme),
        nodes=(found["int8"], found["float"]), notes=[f"{found['delegates']} part(s) in XNNPACK, one sample per run", *notes],
    )  # fmt: skip
