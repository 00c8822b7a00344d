"""OpenVINO files (.xml and .bin) for its CPU plugin: made of the same ONNX graph, tidied; and what the plugin makes of them.

Quantized values are one FakeQuantize each, weights int8 codes with a scale per channel: the form that the plugin's own
quantizer writes. Codes are those of `Quantized.weights`.
"""

from __future__ import annotations

import collections
import re
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paredown.errors import RejectedError, UsageError, VerificationError
from paredown.export.artifact import SCHEME, Artifact, Check, layer_counts
from paredown.export.conditioning import excuse, hopeless
from paredown.export.distance import Distance
from paredown.export.onnxruntime import distance, onnx_model, write_files
from paredown.export.openvino_graph import executed
from paredown.export.openvino_session import APART, PRECISION, Session, core
from paredown.export.session import answering, has_int8_sums
from paredown.program import Inputs, Program
from paredown.quantize.batches import Batches, each
from paredown.quantize.nouns import Quantized
from paredown.quantize.schemes import DYNAMIC, HALF
from paredown.records import whole_file
from paredown.target import Target

TOLERANCES = {"fp32": 1e-4, "fp16": 1e-2}
"""Scheme → largest error, in parts of the output scale. fp16 rounds weights to 11 bits, which is 5e-4 each."""
Array = NDArray[Any]


def write(thing: Program | Quantized, path: Path, *, target: Target, opset: int) -> Artifact:
    """Convert, tidy, name and write; both files appear whole or not at all."""
    if path.suffix.lower() != target.suffix:
        msg = f"a file for {target.name} must have a name that ends in {target.suffix}. Got {path.name!r}."
        raise UsageError(msg)
    limits = target.limits
    if isinstance(opset, bool) or not isinstance(opset, int) or not limits["opset"] <= opset <= limits["opset_max"]:
        msg = f"opset must be an integer from {limits['opset']} to {limits['opset_max']} for {target.name}. Got {opset!r}."
        raise UsageError(msg)
    if isinstance(thing, Quantized) and thing.scheme in DYNAMIC:
        msg = f"scheme must be one with static activations for {target.name}. Got {thing.scheme!r}. Quantize with scheme='int8'."
        raise UsageError(msg)
    graph = onnx_model(thing, opset, on_codes=False)
    kept = {str(n.name) for n in graph.graph} | ({str(n) for n in graph.graph.initializers} & _parameters(thing))
    with tempfile.TemporaryDirectory() as folder:
        source = write_files(graph, Path(folder) / "model.onnx")[0]
        try:
            model = core().read_model(str(source))
        except Exception as error:
            raise RejectedError(_untranslated(str(error), graph, opset)) from error
        tidy(model, kept)
        if isinstance(thing, Quantized):
            model.set_rt_info(thing.scheme, SCHEME)
        files = _write(model, path)
    return Artifact(files=files, target=target.name, scheme=thing.scheme if isinstance(thing, Quantized) else "fp32")


def _untranslated(said: str, graph: Any, opset: int) -> str:
    """Every op that OpenVINO cannot read, with the nodes that have it; nothing is written by then."""
    found = re.search(r"No conversion rule found for operations?: *([^\n]+)", said)
    ops = [] if found is None else [op.strip().rpartition("-")[0] or op.strip() for op in found.group(1).split(",")]
    if not ops:
        reason = next((line for line in reversed(said.splitlines()) if line.strip()), "no message")[:300]
        return f"the network must be readable by OpenVINO from ONNX opset {opset}. Got: {reason}."
    nodes = [n for n in graph.graph if n.op_type in {op.rpartition(".")[2] for op in ops}]
    listed = "; ".join(
        f"{op} ({len(at)}×{', at ' + ', '.join(at[:3]) if at else ''})"
        for op in ops
        for at in [[str(n.name) for n in nodes if n.op_type == op.rpartition(".")[2]]]
    )
    return f"every op must have a translation to OpenVINO from ONNX opset {opset}. Got {listed}. Replace these ops, keep them out of forward, or take the target onnxruntime-x86."


def _parameters(thing: Program | Quantized) -> set[str]:
    if isinstance(thing, Quantized):
        return set(thing.program.state) if thing.scheme == HALF else set()
    return set(thing.state)


def _write(model: Any, path: Path) -> tuple[Path, ...]:
    """Save beside `path`, take the converter's version and the indentation out, and move both files into place."""
    import openvino

    path.parent.mkdir(parents=True, exist_ok=True)
    side = path.with_suffix(".bin")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export") as folder:
        saved = Path(folder) / "model.xml"
        openvino.save_model(model, str(saved), compress_to_fp16=False)
        text = _compact(saved)
        with whole_file(side) as temporary:
            saved.with_suffix(".bin").replace(temporary)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return (path, side)


def _compact(saved: Path) -> str:
    net = ET.parse(saved).getroot()
    for element in net.iter():
        element.tail = None
        element.text = element.text if (element.text or "").strip() else None
    notes = net.find("rt_info")
    for info in [] if notes is None else list(notes):
        if info.tag not in ("framework", SCHEME):
            notes.remove(info)  # type: ignore[union-attr]
    if notes is not None and not len(notes):
        net.remove(notes)
    return '<?xml version="1.0"?>' + ET.tostring(net, encoding="unicode")


# --------------------------------------------------------------------------------------------------------------- tidy


def tidy(model: Any, kept: set[str]) -> None:
    """Rewrite in place: one op per quantized value and per weight, none that rounds twice, the activations that have kernels."""
    shared: dict[tuple[float, ...], Any] = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Multiply":
            _fold_dequantize(node, shared)
        elif kind == "HardSigmoid":
            _fold_hard_sigmoid(node)
    _reduce_codes(model)
    _drop_repeated(model)
    _part_weights(model)
    _plain_constants(model)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            _uneven_bias(node)
        elif node.get_type_name() in ("Multiply", "Add", "Subtract", "Maximum", "Minimum"):
            _wide_first(node)
    _rename(model, kept)
    model.validate_nodes_and_infer_types()


def _fold_dequantize(node: Any, shared: dict[tuple[float, ...], Any]) -> None:
    """(codes - zero) · scale: into the FakeQuantize that made the codes, or a weight as Convert and Multiply alone."""
    import openvino.opset13 as ops

    found = _dequantized(node)
    if found is None:
        return
    convert, zero, scale = found
    source = convert.input_value(0).get_node()
    if source.get_type_name() == "Constant" and not zero.any():
        constant = ops.constant(scale.astype(np.float32))
        _replace(node, ops.multiply(convert, constant))
    elif source.get_type_name() == "Convert" and source.input_value(0).get_node().get_type_name() == "FakeQuantize":
        quantize = source.input_value(0).get_node()
        ends = _ends(quantize)
        if ends is None or zero.size != 1 or scale.size != 1:
            return
        z, s = float(zero.reshape(())), float(scale.reshape(()))
        limits = [_scalar(v, shared) for v in (*ends[:2], *(float(np.float32((e - z) * s)) for e in ends[2:]))]
        levels = int(quantize.get_attributes()["levels"])
        _replace(node, ops.fake_quantize(quantize.input_value(0), *limits, levels))


def _reduce_codes(model: Any) -> None:
    """The maximum of quantized values in the place of a quantized maximum, which it equals.

    OpenVINO 2026.4 makes one kernel of ReduceMax (or ReduceMin) and the FakeQuantize behind it, whose codes are nonsense.
    """
    import openvino.opset13 as ops

    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize" or _ends(node) is None:
            continue
        reduce = node.input_value(0).get_node()
        if reduce.get_type_name() not in ("ReduceMax", "ReduceMin") or len(reduce.output(0).get_target_inputs()) > 1:
            continue
        levels = int(node.get_attributes()["levels"])
        limits = [node.input_value(n) for n in range(1, 5)]
        first = ops.fake_quantize(reduce.input_value(0), *limits, levels)
        reduce.input(0).replace_source_output(first.output(0))
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(reduce.output(0))


def _part_weights(model: Any) -> None:
    """Codes of its own for every reader of a weight: of layers that share them the plugin runs one or all in float.

    They are those of one layer that is called twice, and of two whose codes are equal (batch norms as depthwise convolutions have nothing
    but 127), which the exporter writes once. The file does not grow: equal constants are saved once.
    """
    import openvino.opset13 as ops

    taken: set[str] = set()
    order = {str(node.get_friendly_name()): number for number, node in enumerate(model.get_ordered_ops())}
    for node in model.get_ordered_ops():
        inputs = [v.get_node() for v in node.input_values()]
        if node.get_type_name() != "Multiply" or [i.get_type_name() for i in inputs] != ["Convert", "Constant"]:
            continue
        codes = inputs[0].input_value(0).get_node()
        if codes.get_type_name() != "Constant":
            continue
        if codes.get_name() in taken:
            inputs[0].input(0).replace_source_output(ops.constant(codes.data.copy()).output(0))
        taken.add(str(codes.get_name()))
        # in no order; what reads the shape alone reads no weight
        readers = [r for r in node.output(0).get_target_inputs() if r.get_node().get_type_name() != "ShapeOf"]
        for reader in sorted(readers, key=lambda r: order[str(r.get_node().get_friendly_name())])[1:]:
            own = ops.convert(ops.constant(codes.data.copy()), "f32")
            again = ops.multiply(own, ops.constant(inputs[1].data.copy()))
            reader.replace_source_output(again.output(0))


def _plain_constants(model: Any) -> None:
    """Float weights, of the same values, for layers that read no input, as those of position codes.

    Once the batch is fixed these are folded, and of codes OpenVINO 2026.4 cannot ("m_element_type.is_static()"; EdgeNeXt).
    """
    import openvino.opset13 as ops

    same: set[str] = set()
    for node in model.get_ordered_ops():
        kind, sources = node.get_type_name(), [v.get_node() for v in node.input_values()]
        if kind in ("Constant", "ShapeOf") or (
            sources and kind != "Parameter" and all(s.get_name() in same for s in sources)
        ):
            same.add(str(node.get_name()))
            found = _dequantized(sources[1]) if kind in _LAYERS and sources[1].get_type_name() == "Multiply" else None
            codes = None if found is None else evaluated(found[0].input_value(0))
            if found is not None and codes is not None:
                node.input(1).replace_source_output(
                    ops.constant((codes.astype(np.float32) - found[1]) * found[2]).output(0)
                )


_LAYERS = ("Convolution", "GroupConvolution", "MatMul")


def _wide_first(node: Any) -> None:
    """column · matrix → matrix · column, and so for sums and extrema; column - matrix → (matrix - column) · -1.

    OpenVINO 2026.4 makes one kernel of quantized dense layers and what reads them, and for one sample, where a column [n, 1] is one
    number, it answers nonsense if that comes first (the gates of a mixture of experts; docs/decisions/check.md).
    """
    import openvino.opset13 as ops

    one, other = node.input_value(0), node.input_value(1)
    shapes = [v.get_partial_shape() for v in (one, other)]
    if any(s.rank.is_dynamic or s.rank.get_length() == 0 for s in shapes) or "Constant" in (
        one.get_node().get_type_name(),
        other.get_node().get_type_name(),
    ):
        return
    last = [s[s.rank.get_length() - 1] for s in shapes]
    if not last[0].is_static or last[0].get_length() != 1 or (last[1].is_static and last[1].get_length() == 1):
        return
    if node.get_type_name() == "Subtract":
        _replace(node, ops.multiply(ops.subtract(other, one), ops.constant(np.float32(-1))))
    else:
        node.input(0).replace_source_output(other)
        node.input(1).replace_source_output(one)


def _uneven_bias(node: Any) -> None:
    """A dense layer of codes whose bias is the same everywhere, or none, gets one that differs by the least there is.

    OpenVINO 2026.4 makes one kernel of several such layers of two axes, and with such a bias it answers nonsense for up to 8 samples on one
    thread (docs/decisions/check.md). 1e-30 beside 0 and one unit in the last place beside anything else change no code.
    """
    import openvino.opset13 as ops

    shape, source = node.get_output_partial_shape(0), node.input_value(1).get_node()
    if len(shape) != 2 or shape[1].is_dynamic or source.get_type_name() != "Multiply" or _dequantized(source) is None:
        return
    add = _bias_of(node)
    bias = None if add is None else _constant(add.input_value(1))
    if add is not None and bias is None:
        return
    old = np.zeros(1, np.float32) if bias is None else bias.astype(np.float32).reshape(-1)
    if (old != old[0]).any() or shape[1].get_length() < 2:
        return
    new = np.full((1, shape[1].get_length()), old[0], np.float32)
    new[:, ::2] = np.nextafter(old[0], np.float32(np.inf)) if old[0] else 1e-30
    if add is not None:
        add.input(1).replace_source_output(ops.constant(new).output(0))
        return
    readers = list(node.output(0).get_target_inputs())
    added = ops.add(node, ops.constant(new))
    for reader in readers:
        reader.replace_source_output(added.output(0))
    if any(r.get_node().get_type_name() == "Result" for r in readers):
        added.output(0).get_tensor().set_names(node.output(0).get_names())


def _bias_of(node: Any) -> Any:
    """The addition of a constant right behind, or behind a factor (alpha of a Gemm); None where there is none."""
    for _ in range(2):
        readers = [r.get_node() for r in node.output(0).get_target_inputs()]
        if len(readers) != 1 or readers[0].get_type_name() not in ("Add", "Multiply"):
            return None
        node = readers[0]
        if node.get_type_name() == "Add":
            return node
    return None


def _constant(output: Any) -> Array | None:
    """As `evaluated`, with a product of two constants (beta of a Gemm)."""
    found, node = evaluated(output), output.get_node()
    if found is None and node.get_type_name() == "Multiply":
        one, two = (evaluated(node.input_value(i)) for i in range(2))
        return None if one is None or two is None else one * two
    return found


def _scalar(value: float, shared: dict[tuple[float, ...], Any]) -> Any:
    import openvino.opset13 as ops

    if (value,) not in shared:
        shared[value,] = ops.constant(np.array(value, np.float32))
    return shared[value,]


def _dequantized(node: Any) -> tuple[Any, Array, Array] | None:
    """(the Convert of the codes, zero point, scale) where a multiplication is the end of a dequantization."""
    scale, inner = evaluated(node.input_value(1)), node.input_value(0).get_node()
    zero: Array | None = np.zeros((), np.float32)
    if inner.get_type_name() == "Subtract":
        zero, inner = evaluated(inner.input_value(1)), inner.input_value(0).get_node()
    if scale is None or zero is None or inner.get_type_name() != "Convert":
        return None
    codes = inner.input_value(0).get_element_type().get_type_name()
    return (inner, zero, scale) if codes in ("i8", "u8") else None


def evaluated(output: Any) -> Array | None:
    """The array behind an output that is a constant, or one that was only converted or reshaped."""
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return np.array(node.data)
    if kind == "Convert":
        array = evaluated(node.input_value(0))
        return None if array is None else array.astype(node.get_element_type().to_dtype())
    if kind in ("Reshape", "Unsqueeze", "Squeeze") and output.get_partial_shape().is_static:
        array = evaluated(node.input_value(0))
        return None if array is None else array.reshape(tuple(output.get_shape()))
    return None


def _fold_hard_sigmoid(node: Any) -> None:
    """min(max(x/6 + 1/2, 0), 1) has a kernel under a name of its own; the general form runs in a reference kernel."""
    import openvino.opset13 as ops

    slope, shift = (evaluated(node.input_value(i)) for i in (1, 2))
    if slope is None or shift is None or abs(float(slope) - 1 / 6) > 1e-6 or float(shift) != 0.5:
        return
    _replace(node, ops.hsigmoid(node.input_value(0)))


def unpack_weights(model: Any) -> None:
    """Every weight as the float32 array that its codes stand for: kernels for packed weights round activations by themselves."""
    import openvino.opset13 as ops

    for node in model.get_ordered_ops():
        found = _dequantized(node) if node.get_type_name() == "Multiply" else None
        codes = None if found is None else evaluated(found[0].input_value(0))
        if found is not None and codes is not None:
            _replace(node, ops.constant((codes.astype(np.float32) - found[1]) * found[2]))


def _replace(old: Any, new: Any) -> None:
    names = old.output(0).get_names()
    for reader in old.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))
    new.output(0).get_tensor().set_names(names)
    new.set_friendly_name(old.get_friendly_name())


MOVES = (
    *(
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "StridedSlice",
        "Slice",
        "Pad",
        "Concat",
        "Split",
        "VariadicSplit",
    ),
    *("Gather", "Broadcast", "Tile", "MaxPool", "DepthToSpace", "SpaceToDepth", "Relu"),
)
"""Ops that put no value between two steps of a grid that has zero on it."""


def _drop_repeated(model: Any) -> None:
    """A FakeQuantize of values that are on its grid already rounds nothing."""
    grids: dict[tuple[str, int], tuple[float, ...]] = {}

    def key(output: Any) -> tuple[str, int]:
        return output.get_node().get_name(), output.get_index()

    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "FakeQuantize":
            grid = _grid(node)
            if grid is None:
                continue
            if grids.get(key(node.input_value(0))) == grid and not _is_output(node):
                for reader in node.output(0).get_target_inputs():
                    reader.replace_source_output(node.input_value(0))
            grids[key(node.output(0))] = grid
        elif kind in MOVES:
            sources = node.input_values() if kind == "Concat" else [node.input_value(0)]
            found = {grids.get(key(s)) for s in sources}
            if len(found) == 1 and (one := found.pop()) is not None:
                grids |= {key(o): one for o in node.outputs()}


def _grid(node: Any) -> tuple[float, ...] | None:
    """(levels, low, high) where what goes in and what comes out have the same ends."""
    ends = _ends(node)
    if ends is None:
        return None
    a, b, c, d = ends
    close = abs(a - c) <= 1e-6 * (b - a) and abs(b - d) <= 1e-6 * (b - a)
    return (float(node.get_attributes()["levels"]), c, d) if close else None


def _ends(quantize: Any) -> tuple[float, float, float, float] | None:
    """(low and high of the input, low and high of the output) of a FakeQuantize with one range for all."""
    found = [evaluated(quantize.input_value(i)) for i in range(1, 5)]
    values = [float(e.reshape(())) for e in found if e is not None and e.size == 1]
    return (values[0], values[1], values[2], values[3]) if len(values) == 4 else None


def _is_output(node: Any) -> bool:
    return any(r.get_node().get_type_name() == "Result" for r in node.output(0).get_target_inputs())


def _rename(model: Any, kept: set[str]) -> None:
    """Names of layers and parameters stay; all others, which count up over a whole process, are numbered anew."""
    counts: collections.Counter[str] = collections.Counter()
    for node in model.get_ordered_ops():
        kind, name = node.get_type_name(), str(node.get_friendly_name())
        ends = kind in ("Parameter", "Result")
        if not ends and name not in kept and name.partition("/")[0] not in kept:
            node.set_friendly_name(f"{kind.lower()}_{counts[kind]}")
            counts[kind] += 1
        for output in node.outputs():
            if not ends and not any(r.get_node().get_type_name() == "Result" for r in output.get_target_inputs()):
                output.get_tensor().set_names(set())


# -------------------------------------------------------------------------------------------------------------- check


def compare(artifact: Artifact, reference: Any, samples: Batches, *, strict: bool) -> Check:
    """Run the file on the samples, at their batch and at batch 1, against PyTorch; float32 wherever it is not int8."""
    session, first = Session(artifact.path), list[dict[str, Any]]()
    tolerance, again = TOLERANCES.get(artifact.scheme), list[dict[str, Any]]()
    excusable = tolerance is None and not has_int8_sums()

    def noted() -> Iterator[dict[str, Any]]:
        for args, kwargs in each(samples):
            batch = {"args": args, "kwargs": kwargs}
            first[:] = first or [batch]
            again.extend([batch] if excusable else [])
            yield batch

    far = distance(answering(session), reference, noted)
    int8_nodes, float_nodes = executed(session, Inputs(first[0]["args"], first[0]["kwargs"]))
    within, notes = far.within(tolerance), [f"OpenVINO computed with INFERENCE_PRECISION_HINT={PRECISION}"]
    notes += _changes_if_free(artifact, session, first, tolerance) if within else []
    if not within and excusable:
        exact = distance(answering(Session(artifact.path, in_float=unpack_weights)), reference, again)
        within = exact.within(tolerance)
        notes.append(_saturates(far, exact))
    if not within and tolerance is None and far.finite and far.in_spread:
        excused = excuse(reference, far.worst, far.cosine, far.answers)
        within, notes = bool(excused), [*notes, *([excused] if excused else [])]
    notes += [] if within else _fused_wrongly(artifact, reference, samples, tolerance)
    check = Check(
        max_error=far.error,
        scale=far.scale,
        cosine=far.cosine,
        int8_nodes=int8_nodes,
        float_nodes=float_nodes,
        holds=within,
        notes=tuple(notes),
        **layer_counts(int8_nodes, float_nodes),
    )
    if strict and not check.holds:
        why = "" if tolerance or not far.finite else hopeless(reference, far.worst, far.cosine)
        msg = f"{artifact.path.name} in its runtime must equal PyTorch {far.told(tolerance)}{why} "
        raise VerificationError(msg + " ".join(f"{n}." for n in notes[1:]), evidence=check)
    return check


def _changes_if_free(artifact: Artifact, session: Session, samples: Batches, tolerance: float | None) -> list[str]:
    """A word of warning where the plugin computes something else when the free axes are left free."""
    if not any(isinstance(d, str) for i in session.get_inputs() for d in i.shape):
        return []
    far = distance(answering(Session(artifact.path, free=True)), artifact, samples)
    if far.within(tolerance):
        return []
    return [
        f"compiled with a free batch, OpenVINO answers otherwise (error {far.error:.3g} at scale {far.scale:.3g}, cosine "
        f"{far.cosine:.6f}): fix the shape first, with model.reshape, as is done here"
    ]


def _fused_wrongly(artifact: Artifact, reference: Any, samples: Batches, tolerance: float | None) -> list[str]:
    """A word where it is the plugin's fused kernel that is wrong, and not the file; what runs it would be wrong all the same."""
    far = distance(answering(Session(artifact.path, apart=True)), reference, samples)
    if not far.within(tolerance):
        return []
    return [
        f"with {' '.join(f'{k}={v}' for k, v in APART.items())} the same file holds (cosine {far.cosine:.6f}): this OpenVINO fuses its dense layers into "
        "one kernel that is wrong for this shape on one thread. Compile with that setting, run more samples at once, or take ONNX Runtime"
    ]


def _saturates(far: Distance, exact: Distance) -> str:
    return (
        "this processor has no VNNI, so that OpenVINO's sums of uint8 × int8 saturate at 16 bit: cosine "
        f"{far.cosine:.6f} here, {exact.cosine:.6f} with the same file executed in float "
        "(LP_TRANSFORMS_MODE=NO, weights unpacked); "
        "what is measured here is worse than where there is VNNI"
    )
