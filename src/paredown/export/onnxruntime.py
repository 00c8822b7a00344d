"""ONNX files for ONNX Runtime: float or QDQ, dynamic batch, nothing of the machine inside; and what the runtime makes of them."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import inspect
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils import _pytree as pytree

from paredown.errors import MissingError, RejectedError, UsageError, VerificationError
from paredown.export.artifact import SCHEME, Artifact, Check, layer_counts
from paredown.export.conditioning import excuse, hopeless
from paredown.export.distance import Distance
from paredown.export.narrow_codes import clamped
from paredown.export.onnx_forms import refuse_forms
from paredown.export.session import STRUCTURE, Predict, leaf_names, open_session, predictor, skeleton
from paredown.program import Program, quiet, source_line
from paredown.quantize.bags import has_bags, plain_bags
from paredown.quantize.batches import Batches, each, filled, length, rows, tensors_of
from paredown.quantize.nouns import Packed, Quantized
from paredown.quantize.schemes import DYNAMIC, HALF, is_narrow
from paredown.records import whole_file
from paredown.target import Target, named

SPLIT_BYTES = 1_900_000_000
"""Above this many bytes of weights they go to a side file: one protobuf message holds 2 GiB at most."""
TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2, "w4": 1e-3, "w2": 1e-4, "ternary": 1e-4, "binary": 1e-4}
"""Scheme → largest error, in parts of the output scale; of fp16 against a network that is not rounded. Where activations are rounded, the cosine decides instead."""
IR_VERSIONS = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
"""Opset → the version of the file format that came with it. A newer one, as the exporter writes, would shut out the older
runtimes that a lower opset is asked for."""


def write(thing: Program | Quantized, path: Path, *, target: Target, opset: int, accuracy_level: int = 0) -> Artifact:
    """Convert, tidy, name and write; the files appear whole or not at all."""
    limits = target.limits
    if isinstance(opset, bool) or not isinstance(opset, int) or not limits["opset"] <= opset <= limits["opset_max"]:
        msg = f"opset must be an integer from {limits['opset']} to {limits['opset_max']} for {target.name}. Got {opset!r}."
        raise UsageError(msg)
    model = onnx_model(thing, opset, accuracy_level=accuracy_level, packed=True)
    files = write_files(model, path)
    return Artifact(files=files, target=target.name, scheme=thing.scheme if isinstance(thing, Quantized) else "fp32")


def onnx_model(
    thing: Program | Quantized, opset: int, *, accuracy_level: int = 0, on_codes: bool = True, packed: bool = False
) -> Any:
    """The network as an `onnx_ir.Model`, named and tidy. `on_codes`: ops that only move values do so on codes, biases are int32.

    `packed`: codes of fewer than 8 bits are bytes that hold several (see onnx_packed).
    """
    quantized = isinstance(thing, Quantized) and thing.scheme != HALF
    with quiet("onnxscript", "onnx_ir"):
        again = isinstance(thing, Quantized) or has_bags(thing.eval_graph.graph)
        program = _exported(thing) if again else thing.eval_graph  # type: ignore[union-attr]
        model = _converted(program, opset)
        names = _parameter_names(thing, model)
        if isinstance(thing, Quantized) and thing.scheme in DYNAMIC:
            names = _onnx_dynamic().lower(model, names, accuracy_level)
        coded = thing.weights if packed and isinstance(thing, Quantized) else {}
        forms = named(thing.target).forms if isinstance(thing, Quantized) else ()
        _polish(model, program, names, quantized, on_codes, coded, forms)
        if isinstance(thing, Quantized) and thing.scheme == HALF:
            from paredown.export.onnx_half import WORTH_BYTES, WORTH_BYTES_AS_TEXT, halve

            halve(model, WORTH_BYTES_AS_TEXT if "openvino" in thing.target else WORTH_BYTES)
        if isinstance(thing, Quantized):
            model.metadata_props[SCHEME] = thing.scheme
    model.ir_version = IR_VERSIONS[opset]
    return model


def _exported(thing: Program | Quantized) -> ExportedProgram:
    """The graph that is written, as an exported program, with the batch free where that of the float network is."""
    args, kwargs = thing.inputs
    module = thing.module if isinstance(thing, Quantized) else thing.eval_graph.module(check_guards=False)
    if has_bags(module.graph):
        module = copy.deepcopy(module) if isinstance(thing, Quantized) else module
        plain_bags(module)
    module = clamped(module) if isinstance(thing, Quantized) and is_narrow(thing.scheme) else module
    shapes = None
    if (thing.program if isinstance(thing, Quantized) else thing).batch == "dynamic":
        size = length((args, kwargs))

        def free(value: Any) -> Any:
            return {0: Dim.AUTO} if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else None

        names = _argument_names(module)
        shapes = {**dict(zip(names, pytree.tree_map(free, args), strict=False)), **pytree.tree_map(free, kwargs)}
    with torch.no_grad():
        program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    return _onnx_dynamic().marked(program) if isinstance(thing, Quantized) and thing.scheme in DYNAMIC else program


def _onnx_dynamic() -> Any:
    from paredown.export import onnx_dynamic

    return onnx_dynamic


def _argument_names(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]


def _refuse_unsupported(program: ExportedProgram, opset: int) -> None:
    """List every op that has no translation; the exporter itself stops at the first. Nothing is written by then."""
    from torch.onnx._internal.exporter import _decomp, _dispatching

    registry = _translations(opset, _num_ops())
    table = _decomp.create_onnx_friendly_decomposition_table(set(_decomp.get_onnx_implemented_overloads(registry)))
    missing: dict[str, tuple[int, str]] = {}
    for node in program.run_decompositions(table).graph.nodes:
        checks = str(node.target).startswith(_CHECKS)  # which the exporter leaves out
        if node.op == "call_function" and not checks and _dispatching.dispatch(node, registry)[0] is None:
            count, where = missing.get(str(node.target), (0, source_line(node)))
            missing[str(node.target)] = (count + 1, where)
    if missing:
        listed = "; ".join(
            f"{op} ({n}×{', first at ' + where if where else ''})" for op, (n, where) in sorted(missing.items())
        )
        msg = f"every op must have a translation to ONNX opset {opset}. Got {listed}. Replace these ops, or keep them out of forward."
        raise RejectedError(msg)


_CHECKS = ("aten._assert", "aten.sym_constrain_range")


def _converted(program: ExportedProgram, opset: int) -> Any:
    """The exporter's model; its own words are kept out of the way unless it fails."""
    refuse_forms(program)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            result = _export(program, opset)
    except ImportError as error:
        msg = f"export must have onnx and onnxscript. Got: {error}. Run: pip install 'paredown[onnx]'."
        raise MissingError(msg) from error
    except Exception as error:
        _refuse_unsupported(program, opset)
        reason = str(error).strip().splitlines()[0][:300]
        msg = f"the network must be convertible to ONNX opset {opset}. Got {type(error).__name__}: {reason}."
        raise RejectedError(msg) from error
    if result is None:
        msg = "the ONNX exporter must return a program. Got None."
        raise RejectedError(msg)
    return result.model


def _export(program: ExportedProgram, opset: int) -> Any:
    """torch.onnx.export, but its table of translations is kept: making it anew in every call takes longer than a small network.

    Where every op has a translation there is a shorter way (see onnx_direct).
    """
    asked: dict[str, Any] = {"opset_version": opset, "verbose": False, "optimize": True}
    try:
        from torch.onnx._internal.exporter import _core

        asked["registry"] = _translations(opset, _num_ops())
        if not asked.keys() <= inspect.signature(_core.export).parameters.keys():
            raise AttributeError
    except (ImportError, AttributeError, TypeError):  # another version of PyTorch
        return torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False, optimize=True)
    if opset == _OPSET_OF_TRANSLATIONS:
        from paredown.export import onnx_direct

        with contextlib.suppress(Exception):  # whatever it is, the long way says it better
            result = onnx_direct.convert(program, asked["registry"])
            if result is not None:
                return result
    try:
        return _core.export(program, **asked)
    except Exception:
        with contextlib.suppress(Exception):  # its optimizer fails on some graphs that it has written well (RAFT)
            return _core.export(program, **{**asked, "optimize": False})
        raise


_OPSET_OF_TRANSLATIONS = 18
"""For a later one the exporter converts the model afterwards."""


def _num_ops() -> int:
    """How many ops PyTorch knows by now: libraries that are imported later bring theirs, and the table leaves out what is not there."""
    return len(torch._C._dispatch_get_all_op_names())


def load_translations() -> None:
    """Make the table that the first export makes, in a process that is forked for every export: it takes longer than a small network."""
    with contextlib.suppress(ImportError, AttributeError, TypeError):  # not installed, or another version of PyTorch
        _translations(_OPSET_OF_TRANSLATIONS, _num_ops())


@functools.lru_cache(maxsize=4)
def _translations(opset: int, num_ops: int) -> Any:
    from torch.onnx._internal.exporter import _constants, _registration

    return _registration.ONNXRegistry.from_torchlib(opset_version=max(opset, _constants.TORCHLIB_OPSET))


def _parameter_names(thing: Program | Quantized, model: Any) -> dict[str, str]:
    """Initializer → parameter it holds."""
    if isinstance(thing, Quantized) and thing.scheme == HALF:
        thing = thing.program
    if isinstance(thing, Program):
        return {name: name for name in model.graph.initializers if name in thing.state}
    held = {p.codes.data_ptr(): name for name, p in thing.weights.items()}
    found: dict[str, str] = {}
    for name in model.graph.initializers:
        tensor: Any = thing.module
        for part in name.split("."):
            tensor = getattr(tensor, part, None)
        if isinstance(tensor, Tensor) and tensor.data_ptr() in held:
            found[name] = held[tensor.data_ptr()]
    return found


def _polish(
    model: Any,
    program: ExportedProgram,
    names: Mapping[str, str],
    quantized: bool,
    on_codes: bool,
    packed: Mapping[str, Packed],
    forms: Sequence[str],
) -> None:
    from paredown.export import onnx_packed, onnx_passes, onnx_products

    _name_edges(model, program)
    held = {model.graph.initializers[k]: name for k, name in names.items()}
    onnx_passes.tidy(model, on_codes=on_codes, forms=forms)
    left = {str(v.name): held[v] for v in model.graph.initializers.values() if v in held}
    onnx_passes.shorten(model, left, keep_weights=not quantized)
    onnx_packed.pack_weights(model, {v: packed[name] for v, name in held.items() if name in packed})
    onnx_products.mark(model)


def _name_edges(model: Any, program: ExportedProgram) -> None:
    """Outputs by their place in the structure; the free axis of inputs and outputs is called batch."""
    outs = [s for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    structure = skeleton(program.call_spec.out_spec, [not isinstance(s.arg, ConstantArgument) for s in outs])
    taken = {v.name for v in model.graph.inputs}
    for number, name in leaf_names(structure).items():
        model.graph.outputs[number].name = name if name not in taken else f"{name}_out"
    model.metadata_props.clear()
    if structure != 0:
        model.metadata_props[STRUCTURE] = json.dumps(structure, separators=(",", ":"))
    free: dict[str, str] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value is not None:
                first = axis == 0 and "batch" not in free.values()
                value.shape[axis] = free.setdefault(dim.value, "batch" if first else f"axis{len(free)}")


def write_files(model: Any, path: Path) -> tuple[Path, ...]:
    """One file, or two where the weights are too large for one."""
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    if size <= SPLIT_BYTES:
        data = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        with whole_file(path) as temporary:
            temporary.write_bytes(data)
        return (path,)
    side = path.with_name(path.name + ".data")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export") as folder:
        ir.external_data.unload_from_model(model, folder, side.name, size_threshold_bytes=1024)
        data = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        with whole_file(side) as temporary:
            (Path(folder) / side.name).replace(temporary)
    with whole_file(path) as temporary:
        temporary.write_bytes(data)
    return (path, side)


# --------------------------------------------------------------------------------------------------------------- check


def compare(artifact: Artifact, reference: Any, samples: Batches, *, strict: bool) -> Check:
    """Run the file on the samples, at their batch and at batch 1, against PyTorch."""
    far = distance(predictor(artifact), reference, samples)
    model = _optimized(artifact)
    int8_nodes, float_nodes = inspect_optimized(model)
    tolerance = None if _rounds_activations(artifact) else TOLERANCES.get(artifact.scheme)
    within = far.within(tolerance)
    excused = (
        ""
        if within or tolerance or not (far.finite and far.in_spread)
        else excuse(reference, far.worst, far.cosine, far.answers)
    )
    check = Check(
        max_error=far.error,
        scale=far.scale,
        cosine=far.cosine,
        int8_nodes=int8_nodes,
        float_nodes=float_nodes,
        holds=within or bool(excused),
        notes=(excused,) if excused else (),
        **layer_counts(int8_nodes, float_nodes, constant_products(model)),
    )
    if strict and not check.holds:
        why = "" if tolerance or not far.finite else hopeless(reference, far.worst, far.cosine)
        msg = f"{artifact.path.name} in its runtime must equal PyTorch {far.told(tolerance)}{why}"
        raise VerificationError(msg, evidence=check)
    return check


def _rounds_activations(artifact: Artifact) -> bool:
    """Whether a 4-bit file asks for products in int8 (accuracy_level 4), which the simulation leaves in float."""
    if artifact.scheme != "w4":
        return False
    import onnx

    nodes = onnx.load(str(artifact.path), load_external_data=False).graph.node
    return any(a.name == "accuracy_level" and a.i == 4 for n in nodes for a in n.attribute)


def distance(runtime: Predict, reference: Any, samples: Batches) -> Distance:
    """How far a file is from PyTorch on the samples, at their batch and at batch 1. Raises RejectedError without samples."""
    torch_side, far = predictor(reference), Distance()
    for batch in each(samples):
        for part in [batch] if length(batch) == 1 else [batch, rows(batch, slice(0, 1))]:
            before, got = far.cosine, tensors_of(runtime(*part[0], **part[1]))
            far.add(got, _reference(torch_side, part, reference))
            if far.cosine < before:
                far.worst, far.answers = part, got
    if not far.runs:
        msg = "check must have at least one sample. Got 0 batches."
        raise RejectedError(msg)
    return far


def _reference(predict: Any, part: Any, reference: Any) -> list[Tensor]:
    """PyTorch's outputs; a program with a fixed batch is asked with its own batch only."""
    program = reference.program if isinstance(reference, Quantized) else reference
    whole = filled(program, part) if isinstance(program, Program) else part
    found = tensors_of(predict(*whole[0], **whole[1]))
    return found if whole is part else [t[:1] for t in found]


def _optimized(artifact: Artifact) -> Any:
    """The runtime's own optimised graph (ORT_ENABLE_EXTENDED)."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(artifact.path, optimized=optimized)
        return onnx.load(str(optimized), load_external_data=False)


def _label(node: Any) -> str:
    return f"{node.op_type}: {node.name or (node.output[0] if node.output else '')}"


def constant_products(model: Any) -> set[str]:
    """ "op: name" of products with a matrix that no input decides: linear layers, though the same op multiplies activations too."""
    constants, found = {i.name for i in model.graph.initializer}, set[str]()
    factors = dict.fromkeys(("MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat"), (0, 1)) | {
        "QLinearMatMul": (0, 3)
    }
    for node in model.graph.node:
        read = [name for name in node.input if name]
        if all(name in constants for name in read):
            constants |= set(node.output)
        elif any(node.input[i] in constants for i in factors.get(node.op_type, ())):
            found.add(_label(node))
    return found


def inspect_optimized(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """("op: name" in int8, "op: name" in float) of the runtime's own optimised graph."""
    kinds = {
        i.name: "code" if i.data_type in _CODES else "float" if i.data_type in _FLOATS else "other"
        for i in model.graph.initializer
    }
    kinds |= {i.name: "float" if i.type.tensor_type.elem_type in _FLOATS else "other" for i in model.graph.input}
    int8_nodes, float_nodes = [], []
    for node in model.graph.node:
        kind = _kind_of_output(node, kinds)
        kinds |= dict.fromkeys(node.output, kind)
        if node.op_type == "DynamicQuantizeLinear":
            kinds[node.output[1]] = "other"  # a scale, which only joins those of the weights
        label = _label(node)
        if (
            node.op_type in _INT8_OPS
            or node.op_type.startswith("QLinear")
            or (kind == "code" and node.op_type not in _EDGES)
        ):
            int8_nodes.append(label)
        elif kind == "float" and node.op_type not in (*_EDGES, *_VIEWS):
            float_nodes.append(label)
    return tuple(int8_nodes), tuple(float_nodes)


_FLOATS, _CODES = (1, 10, 11, 16), (2, 3)  # onnx.TensorProto: FLOAT, FLOAT16, DOUBLE, BFLOAT16; UINT8, INT8
_EDGES = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant")
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
_INT8_OPS = (
    *("QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "ConvInteger", "QAttention"),
    *("DynamicQuantizeLSTM", "MatMulNBits"),
)
_FLOAT_RESULT = ("DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
_OTHER_RESULT = (
    "Shape",
    "Size",
    "ArgMax",
    "ArgMin",
    "MatMulInteger",
    "ConvInteger",
    "NonZero",
    "Equal",
    "Greater",
    "Less",
    "Not",
    "And",
    "Or",
)


def _kind_of_output(node: Any, kinds: Mapping[str, str]) -> str:
    if node.op_type in _FLOAT_RESULT:
        return "float"
    if node.op_type == "QGemm":
        return "code" if len(node.input) > 8 and node.input[8] else "float"
    if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") or node.op_type.startswith("QLinear"):
        return "code"
    if node.op_type in _OTHER_RESULT:
        return "other"
    if node.op_type == "Cast":
        to = next(a.i for a in node.attribute if a.name == "to")
        return "float" if to in _FLOATS else "code" if to in _CODES else "other"
    position = 1 if node.op_type == "Where" else 0
    data = node.input[position] if len(node.input) > position else ""
    return kinds.get(data, "other")


def summary(check: Check) -> str:
    """One line: how many nodes run in int8 and which kinds stay float."""
    kinds = collections.Counter(n.split(":")[0] for n in check.float_nodes)
    left = ", ".join(f"{k} {n}×" for k, n in sorted(kinds.items())) or "nothing"
    return f"{len(check.int8_nodes)} nodes in int8; float: {left}"
