"""Rewrites of an ONNX graph after the exporter: same function, fewer bytes, int8 where a runtime can.

All work on `onnx_ir`, in place. Nothing here requantizes: weights stay the codes that they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from paredown.examine.onnx_file import FORMS

# Ops that move or select values: on codes they do the same as on what the codes stand for.
MOVES = (
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Pad", "Concat", "Split", "Gather", "Expand"),
    *("MaxPool", "DepthToSpace", "SpaceToDepth", "Tile", "Identity"),
)
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Defaults that ONNX documents in words only, so that schemas do not list them.
_ALL = {"pads": 0, "strides": 1, "dilations": 1}


def tidy(model: ir.Model, *, on_codes: bool = True, forms: Sequence[str] = ()) -> None:
    """All rewrites that hold for float and quantized graphs; no name changes. Without `on_codes`, none that computes on codes.

    `forms` are those of `Target.forms`.
    """
    from paredown.export import onnx_kernels

    names = [v.name for v in model.graph.outputs]
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.ClearMetadataAndDocStringPass()(model)
    pools(model)
    gelus(model)
    for _ in range(10):  # every round can only shrink the graph; chains of views need a few
        changed = [drop_requantize(model), *((move_on_codes(model), drop_clamps(model)) if on_codes else ())]
        common.IdentityEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
        if not any(changed):
            break
    if on_codes:
        hard_sigmoids(model)
        integer_biases(model)
        stay_float(model)
        onnx_kernels.rewrite(model, forms)
    common.DeduplicateInitializersPass(size_limit=1 << 40)(model)
    own_zero_points(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    own_outputs(model, names)
    own_branches(model)
    drop_defaults(model)
    drop_shapes(model)
    model.producer_name, model.producer_version = "paredown", None
    model.graph.name = "main"
    model.graph.doc_string = model.doc_string = None


def own_outputs(model: ir.Model, names: list[str | None]) -> None:
    """One value that the network returns twice stays two outputs, each by its name: eliminating Identity makes them one of two uses."""
    seen: dict[ir.Value, str | None] = {}
    for number, (value, name) in enumerate(zip(list(model.graph.outputs), names, strict=True)):
        if value not in seen:
            seen[value] = name
            continue
        value.name = seen[value]
        node = ir.node("Identity", [value])
        again = node.outputs[0]
        again.name, again.shape, again.type = name, value.shape, value.type
        model.graph.append(node)
        model.graph.outputs[number] = again


def own_branches(model: ir.Model) -> None:
    """What a branch or a loop gives back is made in it: ONNX Runtime refuses a constant of the graph around it (EmbeddingBag)."""
    for graph in model.graph.subgraphs():
        for number, value in enumerate(list(graph.outputs)):
            producer = value.producer()
            if value not in graph.inputs and (producer is None or producer.graph is not graph):
                node = ir.node("Identity", [value])
                node.outputs[0].name = f"{value.name}_own"
                node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
                graph.append(node)
                graph.outputs[number] = node.outputs[0]


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer, None for anything that is computed."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    array: NDArray[Any] = value.const_value.numpy()
    return array


def root(value: ir.Value | None) -> ir.Value | None:
    """The value itself, or the constant that it is another form of (see onnx_kernels)."""
    first = value
    while first is not None and (made := first.producer()) is not None:
        if made.op_type not in FORMS or made.domain:
            return value
        first = made.inputs[0]
    return first if constant(first) is not None else value


def pools(model: ir.Model) -> int:
    """ReduceMean over height and width → GlobalAveragePool, for which runtimes have an int8 kernel; returns how many."""
    done = 0
    for node in list(model.graph):
        x = node.inputs[0] if node.inputs else None
        if node.op_type != "ReduceMean" or x is None or len(node.inputs) < 2:
            continue
        axes, rank = constant(node.inputs[1]), _rank(x)
        if axes is None or rank != 4 or sorted(int(a) % 4 for a in axes.reshape(-1)) != [2, 3]:
            continue
        keep = node.attributes.get_int("keepdims", 1)
        pool = ir.node("GlobalAveragePool", [x])
        new = [pool] if keep else [pool, ir.node("Flatten", [pool.outputs[0]], {"axis": 1})]
        _replace(model, node, new)
        done += 1
    return done


def gelus(model: ir.Model) -> int:
    """x · (½ · (1 + erf(x/√2))) → (x · (1 + erf(x/√2))) · ½, the order in which ONNX Runtime sees one GELU; returns how many."""
    done = 0
    for node in list(model.graph):
        half = next((i for i, x in enumerate(node.inputs) if node.op_type == "Mul" and _constant_is(x, 0.5)), None)
        grown = node.inputs[1 - half] if half is not None and len(node.inputs) == 2 else None
        add, readers = _producer(grown), [user for user, _ in node.outputs[0].uses()]
        if add is None or add.op_type != "Add" or len(readers) != 1 or readers[0].op_type != "Mul":
            continue
        if not any((source := _producer(x)) is not None and source.op_type == "Erf" for x in add.inputs):
            continue
        (product,) = readers
        other = next((x for x in product.inputs if x is not node.outputs[0]), None)
        if other is None or node.outputs[0].is_graph_output() or product.outputs[0].is_graph_output():
            continue
        inner = ir.node("Mul", [other, grown])
        outer = ir.node("Mul", [inner.outputs[0], node.inputs[half]])
        model.graph.insert_before(product, [inner, outer])
        product.outputs[0].replace_all_uses_with(outer.outputs[0])
        model.graph.remove(product, safe=True)
        model.graph.remove(node, safe=True)
        done += 1
    return done


def drop_requantize(model: ir.Model) -> int:
    """DequantizeLinear → QuantizeLinear with equal scale and zero point gives the same codes back; returns how many."""
    done = 0
    for node in list(model.graph):
        source = _producer(node.inputs[0]) if node.op_type == "QuantizeLinear" else None
        if (
            source is None
            or source.op_type != "DequantizeLinear"
            or _scale(source) is None
            or _scale(source) != _scale(node)
        ):
            continue
        if node.outputs[0].is_graph_output() or source.inputs[0] is None:
            continue
        node.outputs[0].replace_all_uses_with(source.inputs[0])
        model.graph.remove(node, safe=True)
        done += 1
    return done


def move_on_codes(model: ir.Model) -> int:
    """DequantizeLinear → move → QuantizeLinear with one scale: move the codes instead; returns how many."""
    done = 0
    for node in list(model.graph):
        if node.op_type not in MOVES or node.domain:
            continue
        moved = list(node.inputs) if node.op_type == "Concat" else [node.inputs[0]]
        sources = [_producer(x) for x in moved]
        readers = [user for out in node.outputs for user, _ in out.uses()]
        if not readers or any(out.is_graph_output() for out in node.outputs):
            continue
        if any(s is None or s.op_type != "DequantizeLinear" for s in sources) or any(
            r.op_type != "QuantizeLinear" for r in readers
        ):
            continue
        scales = {_scale(n) for n in (*sources, *readers) if n is not None}
        if len(scales) != 1 or None in scales or not _pads_with_zero(model, node, sources[0]):
            continue
        for i, source in enumerate(sources):
            node.replace_input_with(i, source.inputs[0])  # type: ignore[union-attr]
        for out in node.outputs:
            out.type = None
            for reader in {user for user, _ in out.uses()}:
                reader.outputs[0].replace_all_uses_with(out)
                model.graph.remove(reader, safe=True)
        done += 1
    return done


def drop_clamps(model: ir.Model) -> int:
    """Relu or Clip before QuantizeLinear: gone where the codes saturate there anyway, else on the codes; returns how many.

    The second case is an activation that shares its scale with negative values (a dense block's concatenation):
    q(max(x, 0)) = max(q(x), z), so that the layer before still runs in int8.
    """
    done = 0
    for node in list(model.graph):
        if node.op_type not in ("Relu", "Clip") or node.outputs[0].is_graph_output() or node.inputs[0] is None:
            continue
        bounds = _bounds(node)
        readers = list(dict.fromkeys(user for user, _ in node.outputs[0].uses()))
        if bounds is None or not readers or any(r.op_type != "QuantizeLinear" for r in readers):
            continue
        scales = {_scale(r) for r in readers}
        if None in scales or (len(scales) > 1 and not all(_saturates(r, *bounds) for r in readers)):
            continue
        node.outputs[0].replace_all_uses_with(node.inputs[0])
        model.graph.remove(node, safe=True)
        for reader in readers:
            if not _saturates(reader, *bounds):
                _clip_codes(model, reader, *bounds)
        done += 1
    return done


def _clip_codes(model: ir.Model, quantize: ir.Node, low: float, high: float) -> None:
    scale, zero, dtype = _scale(quantize)  # type: ignore[misc]
    limits, old = np.iinfo(dtype), quantize.outputs[0]
    codes = [
        limits.min if low == float("-inf") else _code(low, scale, zero),
        limits.max if high == float("inf") else _code(high, scale, zero),
    ]
    ends = [
        initializer(model, f"{old.name}_{n}", np.array(c, dtype))
        for n, c in zip(("low", "high"), np.clip(codes, limits.min, limits.max), strict=True)
    ]
    clip = ir.node("Clip", [old, *ends])
    model.graph.insert_after(quantize, clip)
    for user, index in list(old.uses()):
        if user is not clip:
            user.replace_input_with(index, clip.outputs[0])


def hard_sigmoids(model: ir.Model) -> int:
    """HardSigmoid between codes → one multiplication of codes, for which ONNX Runtime has an int8 kernel; returns how many.

    With a result of scale 1/256 and zero point 0, clip(x/6 + 1/2, 0, 1) has the codes clip(⌊256 x/6⌉ + 128, 0, 255): those of x · 1/6 with
    zero point 128, which saturate by themselves. So they are written with 128 and read with 0.
    """
    done = 0
    for node in list(model.graph):
        source = _producer(node.inputs[0]) if node.op_type == "HardSigmoid" else None
        readers = list(dict.fromkeys(user for user, _ in node.outputs[0].uses()))
        if source is None or source.op_type != "DequantizeLinear" or node.outputs[0].is_graph_output():
            continue
        slope, middle = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
        plain = abs(slope - 1 / 6) < 1e-6 and middle == 0.5
        if not plain or any(not _writes(r, 1 / 256, 0) or r.outputs[0].is_graph_output() for r in readers):
            continue
        name = str(node.outputs[0].name)
        parts: dict[str, NDArray[Any]] = {
            "sixth": np.array(255, np.uint8), "step": np.array(1 / (6 * 255), np.float32),
            "zero": np.array(0, np.uint8), "middle": np.array(128, np.uint8),
        }  # fmt: skip
        held = {part: initializer(model, f"{name}_{part}", array) for part, array in parts.items()}
        sixth = ir.node("DequantizeLinear", [held["sixth"], held["step"], held["zero"]])
        product = ir.node("Mul", [node.inputs[0], sixth.outputs[0]])
        codes = ir.node("QuantizeLinear", [product.outputs[0], readers[0].inputs[1], held["middle"]])
        model.graph.insert_before(node, [sixth, product, codes])
        for reader in readers:
            reader.outputs[0].replace_all_uses_with(codes.outputs[0])
            model.graph.remove(reader, safe=True)
        model.graph.remove(node, safe=True)
        done += 1
    return done


def stay_float(model: ir.Model) -> int:
    """A layer with float weights that reads and gives codes: a Clip without bounds in front of it; returns how many.

    ONNX Runtime 1.32 quantizes such weights by itself when it loads a file (WeightBiasQuantization), which is not what was asked for and
    what was checked. It looks for DequantizeLinear → layer → QuantizeLinear; a Clip without bounds changes no value and is not taken out.
    """
    done = 0
    for node in list(model.graph):
        weight = constant(node.inputs[1]) if node.op_type in _LAYERS and not node.domain else None
        if weight is None:
            continue
        source = _producer(node.inputs[0])
        readers = [user.op_type for user, _ in node.outputs[0].uses()]
        if source is None or source.op_type != "DequantizeLinear" or "QuantizeLinear" not in readers:
            continue
        clip = ir.node("Clip", [node.inputs[0]])
        model.graph.insert_before(node, clip)
        node.replace_input_with(0, clip.outputs[0])
        done += 1
    return done


def integer_biases(model: ir.Model) -> int:
    """Bias of a layer on codes whose output stays float → int32 codes of scale s_w · s_x; returns how many.

    ONNX Runtime does this by itself where the output is quantized. Where it is not (a last linear layer), it runs
    the layer in int8 only if the bias is integer already.
    """
    done = 0
    for node in list(model.graph):
        sources = [_producer(x) for x in node.inputs[:2]]
        if (
            node.op_type != "Gemm"
            or len(node.inputs) < 3
            or any(s is None or s.op_type != "DequantizeLinear" for s in sources)
        ):
            continue
        bias = constant(node.inputs[2])
        scales = [constant(s.inputs[1]) for s in sources if s is not None]
        if bias is None or bias.dtype != np.float32 or any(s is None for s in scales):
            continue
        if (
            all(user.op_type == "QuantizeLinear" for user, _ in node.outputs[0].uses())
            and not node.outputs[0].is_graph_output()
        ):
            continue
        scale = np.broadcast_to(np.asarray(scales[0] * scales[1], np.float32), bias.shape)  # type: ignore[operator]
        codes = np.rint(bias.astype(np.float64) / scale)
        if np.abs(codes).max(initial=0) >= 2**31:
            continue
        name = str(node.inputs[2].name)
        parts = [
            initializer(model, f"{name}_{n}", a)
            for n, a in (("codes", codes.astype(np.int32)), ("scale", np.ascontiguousarray(scale)))
        ]
        dequantize = ir.node("DequantizeLinear", parts, {"axis": 0})
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(2, dequantize.outputs[0])
        done += 1
    return done


def own_zero_points(model: ir.Model) -> int:
    """A zero point of its own for every int8 weight; returns how many were copied.

    On x86 without VNNI, ONNX Runtime's precise mode rewrites weights and their zero points as uint8, each under a name
    made of the old one: where two weights share a zero point, the second rewrite fails and the file does not load.
    """
    taken: set[str] = set()
    copies = 0
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
            continue
        codes, zero = constant(held := root(node.inputs[0])), constant(node.inputs[2])
        if held is None or codes is None or zero is None or codes.dtype != np.int8:
            continue
        name = str(node.inputs[2].name)
        if name in taken:
            name = next(n for k in itertools.count(1) if (n := f"{held.name}_zero{k}") not in model.graph.initializers)
            node.replace_input_with(2, initializer(model, name, zero))
            copies += 1
        taken.add(name)
    return copies


def drop_defaults(model: ir.Model) -> None:
    """Remove attributes that say what holds without them."""
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            value = attribute.value
            default = (
                _schema_default(node.op_type, name, model.graph.opset_imports.get("", 18)) if not node.domain else None
            )
            listed = name in _ALL and isinstance(value, list | tuple) and all(v == _ALL[name] for v in value)
            scalar = (
                name == "axis" and node.op_type in ("QuantizeLinear", "DequantizeLinear") and _size(node.inputs[1]) == 1
            )
            if listed or scalar or (default is not None and value == default):
                del node.attributes[name]


def drop_shapes(model: ir.Model) -> None:
    """Forget the shapes of values in between, which every runtime infers, and what the exporter noted on values."""
    between = [
        *model.graph.initializers.values(),
        *(out for node in model.graph for out in node.outputs if not out.is_graph_output()),
    ]
    for value in between:
        value.shape = value.type = None
    for value in (*between, *model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
        value.doc_string = None


def shorten(model: ir.Model, names: dict[str, str], *, keep_weights: bool) -> None:
    """Short names inside, kept names at the edge.

    `names` maps initializers to parameter names. Nodes that read a weight (through DequantizeLinear too) are named
    after the module that owns it, so that a report can say where a node comes from; initializers keep parameter names
    where `keep_weights`, else only their codes count. Everything else is numbered in order.
    """
    graph = model.graph
    owners = {v: names[k] for k, v in graph.initializers.items() if k in names}
    kept = {str(v.name) for v in (*graph.inputs, *graph.outputs)}
    _name_nodes(graph, owners)
    new: dict[ir.Value, str] = {}
    if keep_weights:
        for value, name in owners.items():
            if name not in kept:
                new[value] = name
                kept.add(name)
    free = (name for name in _letters() if name not in kept)
    for value in (*graph.initializers.values(), *(out for node in graph for out in node.outputs)):
        if not value.is_graph_input() and not value.is_graph_output() and value not in new:
            new[value] = next(free)
    _rename(graph, new)


def _name_nodes(graph: ir.Graph, owners: dict[ir.Value, str]) -> None:
    used: set[str] = set()
    counts: dict[str, Iterator[int]] = {}
    for node in graph:
        node.name = ""
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        weight = next((owners[s] for x in node.inputs[1:] if (s := _through(x)) in owners), "")
        name = weight.rpartition(".")[0] if weight.endswith((".weight", ".bias")) else weight
        if not name or name in used:
            base = node.op_type.lower()
            number = counts.setdefault(base, itertools.count())
            name = next(n for n in (f"{base}{i}" for i in number) if n not in used)
        used.add(name)
        node.name = name


def _rename(graph: ir.Graph, new: dict[ir.Value, str]) -> None:
    held = [(value, value in graph.initializers.values()) for value in new]
    for value, is_initializer in held:
        if is_initializer:
            del graph.initializers[str(value.name)]
    for value, name in new.items():
        value.name = name
        if value.const_value is not None:
            value.const_value.name = name
    for value, is_initializer in held:
        if is_initializer:
            graph.initializers[str(value.name)] = value


# ------------------------------------------------------------------------------------------------------------- reading


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _through(value: ir.Value | None) -> ir.Value | None:
    """The value itself, or what it dequantizes."""
    source = _producer(value)
    return root(source.inputs[0]) if source is not None and source.op_type == "DequantizeLinear" else value


def _rank(value: ir.Value) -> int | None:
    return len(value.shape) if value.shape is not None else None


def _size(value: ir.Value | None) -> int | None:
    array = constant(value)
    return None if array is None else int(array.size)


def _scale(node: ir.Node) -> tuple[float, int, str] | None:
    """(scale, zero point, dtype of the codes) of a per-tensor quantize or dequantize; None per channel or computed."""
    scale = constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.uint8)
    if scale is None or zero is None or scale.size != 1:
        return None
    return float(scale.reshape(())), int(zero.reshape(())), str(zero.dtype)


def _constant_is(value: ir.Value | None, wanted: float) -> bool:
    array = constant(value)
    return array is not None and array.size == 1 and float(array.reshape(())) == wanted


def _writes(node: ir.Node, scale: float, zero: int) -> bool:
    """Whether a node makes uint8 codes of this scale and zero point."""
    return node.op_type == "QuantizeLinear" and _scale(node) == (scale, zero, "uint8")


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    if node.op_type == "Relu":
        return 0.0, float("inf")
    ends = [constant(x) for x in (*node.inputs[1:], None, None)][:2]
    given = [x is not None for x in (*node.inputs[1:], None, None)][:2]
    if any(g and e is None for g, e in zip(given, ends, strict=True)):
        return None
    low, high = ends
    return float("-inf") if low is None else float(low.reshape(())), float("inf") if high is None else float(
        high.reshape(())
    )


def _code(value: float, scale: float, zero: int) -> int:
    """The code of a value before it is clamped, as the runtime rounds it."""
    return int(np.rint(np.float32(value) / np.float32(scale))) + zero


def _saturates(quantize: ir.Node, low: float, high: float) -> bool:
    """Whether the codes of `low` and `high` are the smallest and the largest there are."""
    read = _scale(quantize)
    if read is None:
        return False
    scale, zero, dtype = read
    limits = np.iinfo(dtype)
    below = low == float("-inf") or _code(low, scale, zero) <= limits.min
    above = high == float("inf") or _code(high, scale, zero) >= limits.max
    return bool(below and above)


def _pads_with_zero(model: ir.Model, node: ir.Node, source: ir.Node | None) -> bool:
    """A padding of 0 becomes a padding of the zero point; any other constant stays float."""
    if node.op_type != "Pad" or source is None or node.attributes.get_string("mode", "constant") != "constant":
        return True
    given = node.inputs[2] if len(node.inputs) > 2 else None
    array = constant(given)
    if given is not None and (array is None or float(array.reshape(())) != 0):
        return False
    zero = source.inputs[2]
    array = constant(zero)
    if array is None:
        return False
    value = initializer(model, f"{node.outputs[0].name}_pad", array.reshape(()))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)
    return True


def _schema_default(op: str, attribute: str, version: int) -> Any:
    import onnx

    try:
        schema = onnx.defs.get_schema(op, version, "")
    except onnx.defs.SchemaError:
        return None
    known = schema.attributes.get(attribute)
    if known is None or not known.default_value.name:
        return None
    value = onnx.helper.get_attribute_value(known.default_value)
    return value.decode() if isinstance(value, bytes) else value


def initializer(model: ir.Model, name: str, array: NDArray[Any]) -> ir.Value:
    """Under this name, or one with a number where it is taken: a layer that is called twice has codes for either call."""
    taken = model.graph.initializers
    name = next(n for k in itertools.count(1) if (n := name if k == 1 else f"{name}_{k}") not in taken)
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def _replace(model: ir.Model, node: ir.Node, new: list[ir.Node]) -> None:
    old, last = node.outputs[0], new[-1].outputs[0]
    last.shape, last.type = old.shape, old.type
    model.graph.insert_after(node, new)
    name = old.name
    if old.is_graph_output():
        graph_outputs = model.graph.outputs
        graph_outputs[[v is old for v in graph_outputs].index(True)] = last
    old.replace_all_uses_with(last)
    model.graph.remove(node, safe=True)
    last.name = name


def _letters() -> Iterator[str]:
    """a, b, …, z, A, …, Z, aa, ab, …"""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return itertools.chain.from_iterable(_words(letters, n) for n in itertools.count(1))


def _words(letters: str, length: int) -> Iterable[str]:
    return ("".join(word) for word in itertools.product(letters, repeat=length))
