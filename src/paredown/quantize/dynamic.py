"""Quantization that needs no calibration data: int8-dynamic and w4, as a graph of the ops that a runtime has kernels for."""

from __future__ import annotations

import collections
import difflib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from paredown.errors import NothingToDo, UsageError
from paredown.examine.count import COUNTED, bound
from paredown.examine.count import op_name as counted_name
from paredown.examine.walk import examine
from paredown.program import Program, source_line
from paredown.quantize import simulate  # noqa: F401  (registers torch.ops.paredown)
from paredown.quantize.bags import has_bags, plain_bags
from paredown.quantize.decompose import attach, call, fetch, op_name
from paredown.quantize.nouns import Coverage, Packed, Quantized
from paredown.quantize.numerics import quantize_codes, symmetric, symmetric_of_least_error
from paredown.quantize.schemes import Scheme
from paredown.score.patterns import as_patterns, matches

aten, ops = torch.ops.aten, torch.ops.paredown
_ACTIVATIONS = "both of its factors are activations"
_WIDE_RANGE = "activation ranges are taken over the whole batch at run time, so an output depends a little on what else is in its batch"


def quantize_dynamic(program: Program, *, target: str, scheme: Scheme, float_layers: Sequence[str] = ()) -> Quantized:
    """Weights as integer codes, activations quantized at run time (int8-dynamic) or left in float (w4). No data is read.

    int8-dynamic: s = max|w| / 127 per output channel, codes in [-127, 127], z = 0; linear layers, products with a constant
    matrix, LSTMs and embeddings (s per row). w4: groups of 32 along the inputs, s of least squared error per group, codes in
    [-8, 7]; linear layers and products with a constant matrix. Everything else stays float and is listed in `notes` with the
    reason, and so is what reads a parameter that `float_layers` (fnmatch, of parameters or their modules) matches;
    `coverage` is the share that runs on codes.

    Raises NothingToDo, with the reasons, for a network in which nothing that multiplies is covered; UsageError for a
    pattern in `float_layers` that matches none.
    """
    graph = program.eval_graph.module(check_guards=False)
    if has_bags(graph.graph):
        plain_bags(graph)
    float_layers = as_patterns(float_layers)
    _refuse_unknown(graph, float_layers)
    work = _Work(graph=graph, scheme=scheme)
    for node in list(graph.graph.nodes):
        rewrite = _REWRITES[scheme.name].get(op_name(node))
        asked = rewrite is not None and matches(_names(node), float_layers)
        reason = "asked for" if asked else rewrite(work, node) if rewrite else _why_not(node, scheme)
        if reason:
            work.stayed[(counted_name(node), reason)].append(node)
        elif rewrite:
            work.done.add(node.name)
    stayed = tuple(_listed(work))
    coverage = _coverage(program, work)
    if not coverage.macs:
        msg = f"at least one layer must run on integer codes under {scheme.name}. Got none: {'; '.join(stayed) or 'the network has no weights'}. "
        raise NothingToDo(msg + "Use scheme='int8' with calibration samples, or fp32.")
    _clean(graph)
    share = f"{coverage.macs:.1%} of the MACs and {coverage.weights:.1%} of the weights run on integer codes"
    ranges = (_WIDE_RANGE,) if scheme.activations == "dynamic" else ()
    return Quantized(
        module=graph,
        program=program,
        scheme=scheme.name,
        target=target,
        inputs=program.inputs,
        weights=work.weights,
        notes=(*program.notes, share, *stayed, *work.notes, *ranges),
        coverage=coverage,
    )


def _names(node: fx.Node) -> set[str]:
    """What a pattern may call a node: the parameters that it reads, views of them included, and their modules."""
    found: set[str] = set()
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            found |= {str(source.target), str(source.target).rpartition(".")[0]} - {""}
        elif op_name(source) in _WHOLE:
            found |= _names(source)
    return found


def _refuse_unknown(graph: fx.GraphModule, patterns: Sequence[str]) -> None:
    known = {n for node in graph.graph.nodes for n in _names(node)}
    for pattern in patterns:
        if not matches(known, [pattern]):
            near = difflib.get_close_matches(pattern, known, 3) or sorted(known)[:3]
            msg = f"float_layers must match parameters or modules of the network. Got {pattern!r}, which matches none; there are {', '.join(near)}."
            raise UsageError(msg)


@dataclass(kw_only=True)
class _Work:
    """What is known while a graph is rewritten."""

    graph: fx.GraphModule
    scheme: Scheme
    weights: dict[str, Packed] = field(default_factory=dict)
    held: dict[Any, tuple[str, str, Tensor]] = field(default_factory=dict)
    """Identity of a float weight → names of its codes and scales in the graph, and the weight, so that its identity stays its own."""
    done: set[str] = field(default_factory=set)
    stayed: dict[tuple[str, str], list[fx.Node]] = field(default_factory=lambda: collections.defaultdict(list))
    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- rewrites
# Each takes a node, and returns None where it replaced it, else why it stays float.


def _linear(work: _Work, node: fx.Node) -> str | None:
    x, weight, bias = (*node.args, None)[:3]
    return _product(work, node, x, weight, bias, transposed=False)


def _matmul(work: _Work, node: fx.Node) -> str | None:
    return _product(work, node, node.args[0], node.args[1], None, transposed=True)


def _addmm(work: _Work, node: fx.Node) -> str | None:
    bias, x, weight = node.args[:3]
    if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return "its factors alpha and beta are not 1"
    return _product(work, node, x, weight, bias, transposed=True)


def _product(work: _Work, node: fx.Node, x: Any, weight: Any, bias: Any, *, transposed: bool) -> str | None:
    constant = _constant(work.graph, weight)
    if constant is None:
        return _ACTIVATIONS
    value = x.meta["val"] if isinstance(x, fx.Node) else None
    if constant.dim() != 2 or not isinstance(value, Tensor) or value.dim() < 2:
        return "the runtime's kernel multiplies rows by one matrix"
    if constant.dtype != torch.float32 or value.dtype != torch.float32:
        return f"its numbers are {str(constant.dtype).removeprefix('torch.')}, the runtime's kernel takes float32"
    held = _held(work, node, weight, constant, transposed=transposed)
    group = work.scheme.group
    if group is None:
        new = call(node, ops.dynamic_linear.default, x, *held)
    else:
        new = call(node, ops.group_linear.default, x, *held, group)
    if bias is not None:
        new = call(node, aten.add.Tensor, new, bias)
    node.replace_all_uses_with(new)
    work.graph.graph.erase_node(node)
    return None


def _embedding(work: _Work, node: fx.Node) -> str | None:
    weight, indices = node.args[:2]
    table = _constant(work.graph, weight)
    if table is None or table.dtype != torch.float32:
        return "its table is computed, or not in float32"
    new = call(node, ops.code_rows.default, *_held(work, node, weight, table, transposed=False), indices)
    node.replace_all_uses_with(new)
    work.graph.graph.erase_node(node)
    return None


def _lstm(work: _Work, node: fx.Node) -> str | None:
    args = bound(node)
    if "data" in args:
        return "packed sequences have no translation"
    parameters, biased = args["params"], bool(args["has_biases"])
    count, both = int(args["num_layers"]), bool(args["bidirectional"])
    per = 4 if biased else 2
    if len(parameters) != per * count * (2 if both else 1):
        return "the runtime's kernel has no projections"
    found = [_constant(work.graph, p) for p in parameters]
    tensors = [t for t in found if t is not None and t.dtype == torch.float32]
    if len(tensors) < len(parameters):
        return "its weights are computed, or not in float32"
    matrices = [i for i in range(len(parameters)) if i % per < 2]
    held = [_held(work, node, parameters[i], tensors[i], transposed=False) for i in matrices]
    biases = [p for i, p in enumerate(parameters) if i not in matrices]
    codes, scales = ([h[k] for h in held] for k in (0, 1))
    rest = (count, both, bool(args["batch_first"]))
    new = call(node, ops.dynamic_lstm.default, args["input"], *args["hx"], codes, scales, biases, *rest)
    node.replace_all_uses_with(new)
    work.graph.graph.erase_node(node)
    return None


Rewrite = Callable[[_Work, fx.Node], "str | None"]
_PRODUCTS: Mapping[str, Rewrite] = {"linear": _linear, "matmul": _matmul, "mm": _matmul, "addmm": _addmm}
_REWRITES: Mapping[str, Mapping[str, Rewrite]] = {
    "int8-dynamic": {**_PRODUCTS, "lstm": _lstm, "embedding": _embedding},
    "w4": _PRODUCTS,
}


def _why_not(node: fx.Node, scheme: Scheme) -> str | None:
    """Why a node that multiplies, or reads a table, has no rewrite; None for any other node."""
    name = counted_name(node) if node.op == "call_function" else ""
    if name not in (*COUNTED, "embedding"):
        return None
    if name in ("scaled_dot_product_attention", "bmm", "baddbmm", "matmul", "dot"):
        return _ACTIVATIONS
    if scheme.name == "w4":
        return "the runtime has 4-bit kernels for products with a matrix only"
    if "conv" in name:
        return "the runtime's kernel for it, ConvInteger, is slower than float32; scheme int8 has a fast one"
    return "the runtime has no kernel for it with ranges at run time"


# ---------------------------------------------------------------------------------------------------------------- codes


def pack(weight: Tensor, scheme: Scheme) -> Packed:
    """Codes of a weight [outputs, inputs], scales per output or per group of inputs.

    >>> from paredown.quantize.schemes import SCHEMES
    >>> packed = pack(torch.randn(4, 70), SCHEMES["w4"])
    >>> tuple(packed.codes.shape), tuple(packed.scales.shape)
    ((4, 70), (4, 3))
    """
    low, high = scheme.weight_range
    weight = weight.detach().float()
    if scheme.group is None:
        scales = symmetric(weight, 0, quant_min=low, quant_max=high)
        codes = quantize_codes(weight, scales[:, None], 0, low, high)
    else:
        outputs, inputs = weight.shape
        groups = -(-inputs // scheme.group)
        padded = torch.nn.functional.pad(weight, (0, groups * scheme.group - inputs)).reshape(-1, scheme.group)
        scales = symmetric_of_least_error(padded, 0, quant_min=low, quant_max=high)
        codes = quantize_codes(padded, scales[:, None], 0, low, high).reshape(outputs, -1)[:, :inputs]
        scales = scales.reshape(outputs, groups)
    zeros = torch.zeros(scales.shape, dtype=torch.int64)
    codes = codes.to(torch.int8).contiguous()
    return Packed(codes=codes, scales=scales, zero_points=zeros, bits=scheme.weight_bits, group=scheme.group)


def _held(work: _Work, reader: fx.Node, source: Any, weight: Tensor, *, transposed: bool) -> tuple[fx.Node, fx.Node]:
    """Nodes of the codes and scales of a weight in front of its reader; one weight is packed once, however many read it."""
    matrix = weight.t() if transposed else weight
    key = (matrix.data_ptr(), tuple(matrix.shape), matrix.stride())
    if key not in work.held:
        packed = pack(matrix, work.scheme)
        root, whole = _root(source)
        name = root if whole else f"{root} ({source.name})"
        names = [
            attach(work.graph, f"{root}_{leaf}", tensor)
            for leaf, tensor in (("codes", packed.codes), ("scales", packed.scales))
        ]
        work.held[key] = (names[0], names[1], matrix)
        parameter = fetch(work.graph, root)
        if (whole and tuple(parameter.shape) != tuple(packed.codes.shape)) or (
            whole and transposed and isinstance(source, fx.Node) and source.op == "get_attr"
        ):
            packed = replace(packed, codes=packed.codes.t(), axis=1)
        work.weights[name if name not in work.weights else f"{name} ({reader.name})"] = packed
        short = matrix.shape[1] % (work.scheme.group or 1)
        if short:
            work.notes.append(
                f"{name}: {matrix.shape[1]} inputs are no multiple of {work.scheme.group}, so its last group holds {short} (padded with zeros in the file)"
            )
    mode = reader.meta["val"][0] if isinstance(reader.meta["val"], list | tuple) else reader.meta["val"]
    nodes = []
    for name in work.held[key][:2]:
        with work.graph.graph.inserting_before(reader):
            made = work.graph.graph.get_attr(name)
        made.meta["val"] = mode.fake_mode.from_tensor(fetch(work.graph, name), static_shapes=True)
        nodes.append(made)
    return nodes[0], nodes[1]


def _constant(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """The value of a node that is computed from parameters and buffers alone; None for any other."""
    if not isinstance(node, fx.Node):
        return None
    found = evaluated(graph, node, {})
    return found.detach() if isinstance(found, Tensor) else None


def evaluated(graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of a node; None where an input, chance or an op that is not aten's has a part in it. `known` holds what was found."""
    if node not in known:
        known[node] = _evaluated(graph, node, known)
    return known[node]


def _evaluated(graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return fetch(graph, str(node.target))
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    if node.target is not operator.getitem:
        random = (
            isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        )
        if not op_name(node) or random:
            return None
    values = {n: evaluated(graph, n, known) for n in node.all_input_nodes}
    if any(v is None for v in values.values()):
        return None
    with torch.no_grad():
        return node.target(  # type: ignore[operator]
            *fx.node.map_arg(node.args, values.__getitem__), **fx.node.map_arg(node.kwargs, values.__getitem__)
        )


_WHOLE = ("t", "transpose", "permute", "numpy_T", "mT", "detach", "alias", "clone", "contiguous", "to", "swapaxes")


def _root(node: fx.Node) -> tuple[str, bool]:
    """The parameter that a constant comes from, and whether it is all of it (perhaps transposed)."""
    whole = True
    while node.op != "get_attr":
        whole &= op_name(node) in _WHOLE
        node = node.all_input_nodes[0]
    return str(node.target), whole


def _clean(graph: fx.GraphModule) -> None:
    """Leave no float weight behind whose codes have taken its place."""
    graph.graph.eliminate_dead_code()
    used = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for name in [
        *dict(graph.named_parameters(remove_duplicate=False)),
        *dict(graph.named_buffers(remove_duplicate=False)),
    ]:
        if name not in used:
            path, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(path), leaf)
    graph.recompile()


# -------------------------------------------------------------------------------------------------------------- account


def _listed(work: _Work) -> Iterator[str]:
    for (name, reason), nodes in sorted(work.stayed.items()):
        where = source_line(nodes[0]) or nodes[0].name
        yield f"{name} stays float ({len(nodes)}×, first at {where}): {reason}"


def _coverage(program: Program, work: _Work) -> Coverage:
    cost = examine(program)
    on_codes = sum(c.macs for c in cost.by_node if c.node in work.done)
    shapes = [s for s in cost.parameter_shapes.values() if len(s) > 1]
    total = sum(torch.Size(s).numel() for s in shapes)
    held = sum(p.codes.numel() for p in work.weights.values())
    return Coverage(
        macs=on_codes / cost.macs if cost.macs else 0.0,
        weights=min(held / total, 1.0) if total else 0.0,
    )
