"""Examine an .onnx file: parameters, bytes with side files, ops, MACs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paredown.errors import MissingError, RejectedError, ResourceError
from paredown.examine.onnx_macs import MACS, op_of

_MOST_ELEMENTS = 10**11
_MOST_NODES = 10**6
_NEVER_WEIGHTS = ("Shape", "Constant", "ConstantOfShape")


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxCost:
    """What an ONNX file costs. MACs are per sample: free axes of the inputs are 1."""

    path: str
    files: tuple[str, ...]
    """The file and its side files, as seen from the folder of the file."""
    file_bytes: int
    """Bytes of all of them by stat: measured."""
    parameters: int
    """Elements of float initializers and of int8/int4 weights; not of shapes, indices, scales and zero points."""
    parameter_bytes: int
    macs: int
    ops: dict[str, int]
    """Nodes by op, with the domain where it is not ONNX's own."""
    uncounted: tuple[str, ...]
    """Nodes that multiply and whose shapes the file does not tell, ops of foreign domains, and every If, Loop and Scan with
    nodes that multiply: those count once, however often they run."""
    by_node: tuple[tuple[str, str, int], ...]
    """(node, op, MACs) of those that multiply."""
    opset: int

    def to_json(self) -> str:
        """One JSON document."""
        import json

        rows = [{"name": n, "kind": k, "macs": m} for n, k, m in self.by_node]
        document = {
            "schema": 1,
            "model": Path(self.path).name,
            "parameters": self.parameters,
            "macs": self.macs,
            "flops": 2 * self.macs,
            "parameter_bytes": self.parameter_bytes,
            "file_bytes": self.file_bytes,
            "state_dict_bytes": None,
            "peak_activation_bytes": None,
            "ops": self.ops,
            "opset": self.opset,
            "files": list(self.files),
            "uncounted": list(self.uncounted),
            "layers": rows,
        }
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def examine_onnx(path: Path | str) -> OnnxCost:
    """Parameters, bytes, ops and MACs of an ONNX file; tensor data is not read, side files must lie beside the file.

    Raises RejectedError (damaged, side file outside the folder or a link, tensors without the data that they declare),
    ResourceError (declared sizes beyond any use) and MissingError (no onnx).
    """
    path = Path(path)
    model = _load(path)
    graphs = list(_graphs(model.graph, 0))
    nodes = [n for g in graphs for n in g.node]
    if len(nodes) > _MOST_NODES:
        msg = f"a model must have fewer than {_MOST_NODES:,} nodes. Got {len(nodes):,} in {path.name}."
        raise ResourceError(msg)
    weights = _weights(graphs, nodes, path)
    files = _files(path, model)
    shapes = _shapes(model, weights, path)
    ops = Counter(op_of(n) for n in nodes)
    by_node, uncounted = [], [op for op in ops if "::" in op and op not in MACS]
    for index, node in enumerate(nodes):
        count = MACS.get(op_of(node))
        if count is None and not _repeats_products(node):
            continue
        macs = None if count is None else count(node, shapes)
        name = node.name or f"{node.op_type}_{index}"
        if macs is None:
            uncounted.append(name)
        else:
            by_node.append((name, str(node.op_type), macs))
    counted = {n: v for n, v in weights.items() if v[2]}
    packed = list(_packed(nodes, weights, shapes))
    return OnnxCost(
        path=str(path),
        files=tuple(f.relative_to(path.parent).as_posix() for f in files),
        file_bytes=sum(f.stat().st_size for f in files),
        parameters=sum(math.prod(shape) for shape, _, _ in counted.values()) + sum(n for n, _ in packed),
        parameter_bytes=sum(-(-math.prod(shape) * bits // 8) for shape, bits, _ in counted.values())
        + sum(size for _, size in packed),
        macs=sum(m for _, _, m in by_node),
        ops=dict(ops.most_common()),
        uncounted=tuple(uncounted),
        by_node=tuple(by_node),
        opset=next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 0),
    )


def _load(path: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        msg = "examining an .onnx file needs onnx: pip install 'paredown[onnx]'."
        raise MissingError(msg) from error
    if not path.is_file() or path.stat().st_size == 0:
        got = ", which is no file" if path.exists() else ", which does not exist"
        got = ", which has 0 bytes" if path.is_file() else got
        msg = f"an ONNX model must be a file that is not empty. Got {str(path)!r}{got}."
        raise RejectedError(msg)
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own DecodeError, which is private to the installed backend
        msg = (
            f"an ONNX model must be readable. Got {type(error).__name__} in {path.name}. "
            "The file is damaged or not ONNX."
        )
        raise RejectedError(msg) from error
    if not model.graph.node and not model.graph.initializer:
        msg = f"an ONNX model must have a graph. Got none in {path.name}."
        raise RejectedError(msg)
    return model


def _graphs(graph: Any, depth: int) -> Iterator[Any]:
    """The graph and those inside If, Loop and Scan."""
    yield graph
    if depth > 16:
        msg = "graphs may be nested 16 deep. Got more."
        raise ResourceError(msg)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner, depth + 1)


def _repeats_products(node: Any) -> bool:
    """Whether an If, Loop or Scan holds nodes that count: each does so once, however often it runs."""
    inner = [g for a in node.attribute for g in (a.g, *a.graphs) if g.node]
    return any(op_of(n) in MACS for g in inner for graph in _graphs(g, 0) for n in graph.node)


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of the file: sparse ones and those inside functions too, which may name side files like any other."""
    graphs = list(_graphs(model.graph, 0))
    for function in model.functions:
        inner = [g for n in function.node for a in n.attribute for g in (a.g, *a.graphs) if g.node]
        graphs += [function, *(deep for g in inner for deep in _graphs(g, 1))]
    for graph in graphs:
        sparse = [a.sparse_tensor for n in graph.node for a in n.attribute if a.HasField("sparse_tensor")]
        if graph.DESCRIPTOR.name == "GraphProto":
            yield from graph.initializer
            sparse += graph.sparse_initializer
        for one in sparse:
            yield from (one.values, one.indices)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _files(path: Path, model: Any) -> list[Path]:
    """The file and its side files; one that lies outside the folder, or is a link, is refused unread."""
    found = {path: path}
    folder = path.parent.resolve()
    for tensor in _tensors(model):
        if tensor.data_location != 1:  # EXTERNAL
            _refuse_missing_data(tensor, path)
            continue
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        side = path.parent / location
        parts = Path(location).parts
        inside = location and not Path(location).is_absolute() and ".." not in parts and not {*"\\\0"} & {*location}
        if not inside or folder not in side.resolve().parents:
            msg = f"side files of an ONNX model must lie beside it. Got {location!r} at {tensor.name!r} in {path.name}."
            raise RejectedError(msg)
        if side.is_symlink() or (side.is_file() and side.stat().st_nlink > 1):
            msg = (
                f"side files of an ONNX model must be files of their own. Got a link: {location!r} in {path.name}. "
                "Copy it into the folder."
            )
            raise RejectedError(msg)
        if not side.is_file():
            msg = f"side files of an ONNX model must be there. Got no {location!r} beside {path.name}."
            raise RejectedError(msg)
        _refuse_bad_range(tensor, side, path)
        found[side] = side
    return list(found)


def _needed(tensor: Any) -> int | None:
    """Bytes that a tensor's shape and type take as raw data; None for types of no fixed size."""
    from onnx import TensorProto as T

    if tensor.data_type not in T.DataType.values() or tensor.data_type == T.UNDEFINED:
        msg = f"a tensor must have a type that ONNX knows. Got number {tensor.data_type} for {tensor.name!r}. The file is damaged or not ONNX."
        raise RejectedError(msg)
    bits = _bits().get(tensor.data_type)
    return None if bits is None else -(-math.prod(int(d) for d in tensor.dims) * bits // 8)


def _refuse_missing_data(tensor: Any, path: Path) -> None:
    """Data in the file itself: as many bytes as declared, or any of the typed fields."""
    needed = _needed(tensor)
    typed = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    if needed is None or (not tensor.HasField("raw_data") and any(len(t) for t in typed)):
        return
    if len(tensor.raw_data) != needed:
        msg = f"a tensor must hold the data that it declares, {needed:,} bytes. Got {len(tensor.raw_data):,} for {tensor.name!r} in {path.name}."
        raise RejectedError(msg)


def _refuse_bad_range(tensor: Any, side: Path, path: Path) -> None:
    """The part of a side file that a tensor names must lie inside it and be as long as declared."""
    told = {e.key: e.value for e in tensor.external_data}
    needed, size = _needed(tensor), side.stat().st_size
    try:
        offset = int(told.get("offset") or 0)
        length = int(told["length"]) if told.get("length") else (size - offset if needed is None else needed)
    except ValueError:
        offset = length = -1
    if min(offset, length) < 0 or offset + length > size or (needed is not None and length != needed):
        where = f"offset {str(told.get('offset', 0))[:40]} and length {str(told.get('length', 'not given'))[:40]}"
        msg = f"a tensor must find its {needed or 'own'} bytes inside its side file. Got {where} in the {size:,} bytes of {side.name!r} for {tensor.name!r} in {path.name}."
        raise RejectedError(msg)


def _refuse_huge(name: str, shape: tuple[int, ...], path: Path) -> None:
    """A value that a run would make; a small file can ask for any amount of memory."""
    if math.prod(shape) > _MOST_ELEMENTS:
        msg = f"a value must have fewer than {_MOST_ELEMENTS:,} elements. Got {shape} for {name!r} in {path.name}."
        raise ResourceError(msg)


def _bits() -> dict[int, int]:
    """Bits of one element by ONNX's number of the type."""
    from onnx import TensorProto as T

    return {
        T.FLOAT: 32,
        T.DOUBLE: 64,
        T.FLOAT16: 16,
        T.BFLOAT16: 16,
        T.BOOL: 8,
        T.INT8: 8,
        T.UINT8: 8,
        T.INT4: 4,
        T.UINT4: 4,
        T.INT16: 16,
        T.UINT16: 16,
        T.INT32: 32,
        T.UINT32: 32,
        T.INT64: 64,
        T.UINT64: 64,
    }


def _weights(graphs: list[Any], nodes: list[Any], path: Path) -> dict[str, tuple[tuple[int, ...], int, bool]]:
    """Initializers and constants: shape, bits per element, and whether they count as parameters."""
    from onnx import TensorProto as T

    bits = _bits()
    helpers = {i for n in nodes for p in _HELPERS.get(n.op_type, ()) for i in n.input[p : p + 1]}
    helpers |= _dynamic_scales(nodes)
    forms = {n.output[0]: n.input[0] for n in nodes if n.op_type in FORMS and n.input and n.output}
    quantized = {_first(i, forms) for n in nodes for p in _CODES.get(n.op_type, ()) for i in n.input[p : p + 1]}
    packed = {n.input[1]: n for n in nodes if n.op_type == "MatMulNBits" and len(n.input) > 1}
    found: dict[str, tuple[tuple[int, ...], int, bool]] = {}
    constants = [(a.t, n.output[0]) for n in nodes if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    for tensor, name in [*((t, t.name) for g in graphs for t in g.initializer), *constants]:
        shape = tuple(int(d) for d in tensor.dims)
        if any(d < 0 for d in shape):
            msg = f"a tensor's shape must have no negative size. Got {shape} for {name!r} in {path.name}."
            raise RejectedError(msg)
        if math.prod(shape) > _MOST_ELEMENTS:
            msg = f"a tensor must have fewer than {_MOST_ELEMENTS:,} elements. Got {shape} for {name!r} in {path.name}."
            raise ResourceError(msg)
        is_float = tensor.data_type in (T.FLOAT, T.DOUBLE, T.FLOAT16, T.BFLOAT16)
        counts = name not in helpers and (is_float or name in quantized)
        found[name] = (*_unpacked(name, shape, bits.get(tensor.data_type, 64), packed), counts)
    return found


def _first(name: str, made_of: Mapping[str, str]) -> str:
    """What a value is another form of, or the value itself; a damaged file may go round in circles."""
    seen = {name}
    while (before := made_of.get(name)) is not None and before not in seen:
        seen.add(name := before)
    return name


_CODES = {
    **dict.fromkeys(("MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits"), (1,)),
    "DequantizeLinear": (0,), "QLinearMatMul": (3,), "QLinearConv": (3, 8), "QGemm": (3, 6), "DynamicQuantizeLSTM": (1, 2),
}  # fmt: skip
"""Op → which inputs hold the codes of weights, and of biases."""
_HELPERS = {
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), (1, 2)),
    **dict.fromkeys(("MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulNBits"), (2, 3)),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul"), (1, 2, 4, 5, 6, 7)), "QGemm": (1, 2, 4, 5, 7, 8),
    "MatMulIntegerToFloat": (2, 3, 4, 5), "DynamicQuantizeLSTM": (8, 9, 10, 11),
}  # fmt: skip
"""Op → its scales and zero points, which are no parameters."""


def _dynamic_scales(nodes: list[Any]) -> set[str]:
    """What is multiplied with the scale that DynamicQuantizeLinear finds: the scales of the weights in that product."""
    found = {n.output[1] for n in nodes if n.op_type == "DynamicQuantizeLinear" and len(n.output) > 1}
    return {i for n in nodes if n.op_type == "Mul" and found & set(n.input) for i in n.input}


def _unpacked(name: str, shape: tuple[int, ...], bits: int, packed: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """Shape and bits per element; of codes that lie several in a byte those of the matrix that they stand for."""
    node = packed.get(name)
    if node is None:
        return shape, bits
    given = {a.name: a.i for a in node.attribute}
    return (int(given.get("N", 0)), int(given.get("K", 0))), int(given.get("bits", 4))


FORMS = ("Transpose", "Reshape", "Pad", "Slice")
"""What stands between the codes of a weight and the layer that reads them in another form (paredown.export.onnx_kernels)."""
_UNPACKING = ("Cast", "Gather", "Add", *FORMS)


def _packed(
    nodes: list[Any], weights: dict[str, tuple[tuple[int, ...], int, bool]], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[int, int]]:
    """(elements, bytes) of every quantized weight that is unpacked from bytes of the file (paredown.export.onnx_packed)."""
    makers = {out: n for n in nodes for out in n.output}
    for name in {n.input[0] for n in nodes if n.op_type == "DequantizeLinear"} - weights.keys():
        waiting, sizes, constant, seen = [name], list[int](), name in makers, {name}
        while waiting and constant:
            maker = makers.get(waiting.pop())
            if maker is None or maker.op_type not in _UNPACKING:
                constant = False
                break
            for value in maker.input[: None if maker.op_type in ("Gather", "Add") else 1]:
                if value not in weights:
                    if value not in seen:  # a value that is read many times, or by itself
                        seen.add(value)
                        waiting.append(value)
                elif maker.op_type == "Cast":
                    sizes.append(math.prod(weights[value][0]) * weights[value][1] // 8)
        if not constant:
            continue
        lengths = [math.prod(shapes[v]) for v in seen if v in shapes and makers[v].op_type in FORMS]
        if sizes and lengths:
            yield min(lengths), sum(sizes)


def _shapes(
    model: Any, weights: dict[str, tuple[tuple[int, ...], int, bool]], path: Path
) -> dict[str, tuple[int, ...]]:
    """Shapes by value name where all axes are known, free axes of the inputs being 1; as far as shape inference gets."""
    import onnx

    noted = _set_free_axes(model)
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # the checker raises its own types; what is missing becomes "uncounted"
        model.doc_string = f"shape inference failed: {type(error).__name__}"
    shapes = {n: v[0] for n, v in weights.items()}
    for graph in _graphs(model.graph, 0):
        for value in (*graph.input, *graph.value_info, *graph.output):
            dims = value.type.tensor_type.shape.dim
            sizes = tuple(int(d.dim_value) if d.HasField("dim_value") else 1 for d in dims)
            _refuse_huge(value.name, sizes, path)
            known = value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims)
            if known and min(sizes, default=1) >= 1:  # a free length of 1 is too short for some layers
                shapes.setdefault(value.name, sizes)
    for name, shape in noted.items():
        _refuse_huge(name, shape, path)
        shapes.setdefault(name, shape)
    for graph in _graphs(model.graph, 0):
        for node in graph.node:  # a quantized weight has the shape of its codes
            if node.op_type in ("DequantizeLinear", "QuantizeLinear", "Identity") and node.input[0] in shapes:
                shapes.setdefault(node.output[0], shapes[node.input[0]])
    return shapes


def _set_free_axes(model: Any) -> dict[str, tuple[int, ...]]:
    """Free axes of the inputs become 1, so that inference gives an axis that the batch is folded into its length.

    What the file says of other values is taken out: inference would keep it, though it is of the batch that the file was
    made with. Returned is what it says in lengths and names of input axes, for values that inference does not reach.
    """
    free = set()
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                free.add(dim.dim_param)
                dim.dim_value = 1
    noted = {}
    for graph in _graphs(model.graph, 0):
        for value in graph.value_info:
            dims = value.type.tensor_type.shape.dim
            known = all(d.HasField("dim_value") or (d.dim_param and d.dim_param in free) for d in dims)
            if known and value.type.tensor_type.HasField("shape"):
                noted[str(value.name)] = tuple(int(d.dim_value) if d.HasField("dim_value") else 1 for d in dims)
        del graph.value_info[:]
        for value in graph.output:
            for dim in value.type.tensor_type.shape.dim:
                if not dim.HasField("dim_value"):
                    dim.Clear()
    return noted
