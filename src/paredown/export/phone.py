"""What the runtimes for phones share: a program with its batch fixed, converted and executed in an environment of its own."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError, UsageError, VerificationError
from paredown.export.artifact import Artifact, Check, layer_counts
from paredown.export.child import child_of
from paredown.export.conditioning import excuse, hopeless
from paredown.export.onnxruntime import distance
from paredown.export.phone_passes import plain
from paredown.export.session import predictor, skeleton
from paredown.program import Program, quiet
from paredown.quantize.batches import Batches, rows, tensors_of
from paredown.quantize.nouns import Quantized
from paredown.quantize.schemes import DYNAMIC
from paredown.records import whole_file
from paredown.target import Target

Prepare = Callable[[ExportedProgram], None]


def exported(thing: Program | Quantized) -> ExportedProgram:
    """The eval graph for one sample, or for the batch that the program is fixed to. No stack traces: they hold paths."""
    free = (thing.program if isinstance(thing, Quantized) else thing).batch == "dynamic"
    args, kwargs = rows(thing.inputs, slice(0, 1)) if free else thing.inputs
    module = thing.module if isinstance(thing, Quantized) else thing.eval_graph.module(check_guards=False)
    with torch.no_grad(), quiet("torch.export"):
        program = torch.export.export(module, tuple(args), dict(kwargs), strict=False)
        fixed = program.module(check_guards=False)
        plain(fixed)
        program = torch.export.export(fixed, tuple(args), dict(kwargs), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def about(program: ExportedProgram, scheme: str) -> str:
    """Scheme, names of the inputs and structure of the outputs, as the JSON that the file keeps."""
    args, kwargs = program.example_inputs or ((), {})
    names = [str(n) for n in program.graph_signature.user_inputs]
    if len(names) != len(tensors_of((args, kwargs))):
        msg = f"every input must be a tensor for a phone. Got {len(names)} inputs, of which {len(tensors_of((args, kwargs)))} are tensors."
        raise RejectedError(msg)
    outs = [s for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    structure = skeleton(program.call_spec.out_spec, [not isinstance(s.arg, ConstantArgument) for s in outs])
    return json.dumps({"scheme": scheme, "inputs": names, "outputs": structure}, separators=(",", ":"))


class _Tensors(nn.Module):
    """A network that gives its tensors alone, one after the other."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """As the network is called."""
        return tuple(v for v in pytree.tree_leaves(self.inner(*args, **kwargs)) if isinstance(v, Tensor))


def _tensors(program: ExportedProgram) -> ExportedProgram:
    """A program that returns None besides its tensors, without it: LiteRT's converter has no None. The structure is kept by `about`."""
    outs = [s.arg for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    if not any(isinstance(arg, ConstantArgument) for arg in outs):
        return program
    args, kwargs = program.example_inputs or ((), {})
    with torch.no_grad(), quiet("torch.export"):
        found = torch.export.export(
            _Tensors(program.module(check_guards=False)), tuple(args), dict(kwargs), strict=False
        )
    for node in found.graph.nodes:
        node.meta.pop("stack_trace", None)
    return found


def convert(thing: Program | Quantized, path: Path, target: Target, prepare: Prepare, **more: Any) -> Artifact:
    """Write the file through the converter in the target's environment; whole or not at all.

    `prepare` changes the program in place before it goes there; `more` goes with it.

    The program goes there as torch.export.save writes it, which the other side unpickles. That is safe here and nowhere
    else: the bytes are this process's own and go through the pipe to its own child, never through a file.
    """
    if path.suffix.lower() != target.suffix:
        msg = f"a file for {target.name} must have a name that ends in {target.suffix}. Got {path.name!r}."
        raise UsageError(msg)
    if isinstance(thing, Quantized) and thing.scheme in DYNAMIC:
        msg = f"scheme must be one with static activations for {target.name}. Got {thing.scheme!r}. Quantize with scheme='int8'."
        raise UsageError(msg)
    scheme = thing.scheme if isinstance(thing, Quantized) else "fp32"
    program = exported(thing)
    told = about(program, scheme)
    program = _tensors(program)
    prepare(program)
    child = child_of(target.name, 1)
    written = io.BytesIO()
    with quiet("torch.export"):
        torch.export.save(program, written)
    del program
    with whole_file(path) as temporary:
        try:
            data = np.frombuffer(written.getbuffer(), np.uint8)
            child.ask("convert", [data], out=str(temporary.resolve()), about=told, **more)
        except RejectedError as error:
            msg = f"the network must be convertible for {target.name}. Its converter said: {error}"
            raise RejectedError(msg) from error
    return Artifact(files=(path,), target=target.name, scheme=scheme)


def compared(
    artifact: Artifact,
    reference: Any,
    samples: Batches,
    *,
    strict: bool,
    tolerance: float | None,
    nodes: tuple[Sequence[str], Sequence[str]],
    notes: Sequence[str],
) -> Check:
    """The file on the samples, at their batch and at 1, against PyTorch; `tolerance` None means that the cosine decides."""
    far = distance(predictor(artifact), reference, samples)
    within = far.within(tolerance)
    odd = not (far.finite and far.in_spread)
    excused = "" if within or tolerance is not None or odd else excuse(reference, far.worst, far.cosine, far.answers)
    check = Check(
        max_error=far.error,
        scale=far.scale,
        cosine=far.cosine,
        int8_nodes=tuple(nodes[0]),
        float_nodes=tuple(nodes[1]),
        holds=within or bool(excused),
        notes=(*notes, *([excused] if excused else [])),
        **layer_counts(*nodes),
    )
    if strict and not check.holds:
        why = "" if tolerance is not None or not far.finite else hopeless(reference, far.worst, far.cosine)
        msg = f"{artifact.path.name} in its runtime must equal PyTorch {far.told(tolerance)}{why}"
        raise VerificationError(msg, evidence=check)
    return check


__all__ = ["about", "compared", "convert", "exported"]
