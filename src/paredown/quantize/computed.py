"""Weights that are computed from parameters alone, as by weight standardisation: held as what they come to, so that they can be codes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.quantize.decompose import attach, call, fetch, op_name
from paredown.quantize.dynamic import evaluated
from paredown.quantize.products import FROM, OF, as_buffer, drop_unread, is_turn

_WEIGHT = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear", "matmul", "mm"), 1),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 1),
    "addmm": 2,
}
"""Op → position of its weight."""
_SAME = ("alias", "detach", "contiguous", "clone", "lift_fresh_copy")
"""What hands a parameter on as it is (see decompose): nothing is computed then."""


def hold_computed(graph: fx.GraphModule) -> None:
    """Put a tensor in place of every weight of a convolution, a linear layer or a product that no input and no chance decides.

    It is evaluated once, in float32, by the ops of the graph, and is a parameter (a buffer where none of its sources is one).
    Its node's meta has the parameter that it comes from, the largest of them; a second weight that comes from the same one has the
    name of its op behind it. Parameters that nothing else reads are dropped. Where an op writes in place into what a weight comes
    from, its value depends on the order of ops, and it is left as it is.
    """
    constants = _constants(graph)
    known: dict[fx.Node, Any] = {}
    held: dict[fx.Node, fx.Node] = {}
    sources: set[str] = set()
    names = {str(w.target) for n in graph.graph.nodes if (w := _weight(n)) is not None and w.op == "get_attr"}
    for node in list(graph.graph.nodes):
        weight = _weight(node)
        if weight is None or weight not in constants or not _is_computed(weight, node):
            continue
        if weight not in held:
            value = evaluated(graph, weight, known)
            if not isinstance(value, Tensor):
                continue
            held[weight] = _holder(graph, weight, value, names)
            sources |= {str(s.target) for s in _sources(weight)}
        node.update_arg(_WEIGHT[op_name(node)], held[weight])
    if held:
        drop_unread(graph, sources)


def scales_into_layers(graph: fx.GraphModule) -> None:
    """Multiply constant factors per channel, as of ConvNeXt's layer scale, into the weight and the bias of the layer before them.

    (W x + b) · c = (c · W) x + c · b: exact but for rounding, an op less in float, and no op left between two that run on codes. Between layer and factor
    may lie what only moves axes, if nothing else reads it. The weight becomes one that is computed from parameters (see hold_computed).
    """
    constants = _constants(graph)
    known: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.target is not torch.ops.aten.mul.Tensor or len(node.args) != 2:
            continue
        factors = [a for a in node.args if isinstance(a, fx.Node) and a in constants]
        others = [a for a in node.args if isinstance(a, fx.Node) and a not in constants]
        if len(factors) != 1 or len(others) != 1:
            continue
        found = _layer_before(others[0])
        value = None if found is None else evaluated(graph, factors[0], known)
        if found is None or not isinstance(value, Tensor) or value.dtype != torch.float32:
            continue
        layer, axis, channels = found
        scale = _per_channel(value.detach(), others[0].meta["val"].dim(), axis, channels)
        if scale is not None:
            _scale(graph, layer, scale)
            node.replace_all_uses_with(others[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _layer_before(moved: fx.Node) -> tuple[fx.Node, int, int] | None:
    """The layer that wrote this, the axis that its channels are on by now, and how many; None where there is none or others read it too."""
    path = []
    while op_name(moved) in (*_SAME, "dropout", "permute", "transpose") and len(moved.users) == 1:
        path.append(moved)
        moved = moved.all_input_nodes[0]
    weight = _weight(moved)
    if op_name(moved) not in ("linear", "conv1d", "conv2d", "conv3d") or weight is None or len(moved.users) != 1:
        return None
    bias = moved.args[2] if len(moved.args) > 2 else None
    own = [p for p in (weight, bias) if isinstance(p, fx.Node)]
    if any(p.op != "get_attr" or len(p.users) != 1 for p in own) or weight.meta["val"].dtype != torch.float32:
        return None
    dims = moved.meta["val"].dim()
    axis = dims - 1 if op_name(moved) == "linear" else 1
    for step in reversed(path):
        args: Any = step.args
        if op_name(step) == "permute":
            axis = [int(d) % dims for d in args[1]].index(axis)
        elif op_name(step) == "transpose":
            one, other = (int(d) % dims for d in args[1:3])
            axis = {one: other, other: one}.get(axis, axis)
    return moved, axis, int(weight.meta["val"].shape[0])


def _per_channel(value: Tensor, dims: int, axis: int, channels: int) -> Tensor | None:
    """A factor as one number per channel, [channels]; None where it differs along another axis or adds one."""
    if value.dim() > dims:
        return None
    shape = [1] * (dims - value.dim()) + list(value.shape)
    if any(n != 1 for d, n in enumerate(shape) if d != axis) or shape[axis] not in (1, channels):
        return None
    return value.reshape(-1).expand(channels)


def _scale(graph: fx.GraphModule, layer: fx.Node, scale: Tensor) -> None:
    weight = layer.args[1]
    assert isinstance(weight, fx.Node)
    sized = scale.reshape(-1, *[1] * (weight.meta["val"].dim() - 1)).clone()
    name = attach(graph, f"{weight.target}_factor", sized)
    as_buffer(graph, name)
    with graph.graph.inserting_before(layer):
        factor = graph.graph.get_attr(name)
    factor.meta["val"] = weight.meta["val"].fake_mode.from_tensor(sized, static_shapes=True)
    layer.update_arg(1, call(layer, torch.ops.aten.mul.Tensor, weight, factor))
    bias = layer.args[2] if len(layer.args) > 2 else None
    if isinstance(bias, fx.Node):
        name = attach(graph, f"{bias.target}_scaled", fetch(graph, str(bias.target)).detach() * scale)
        with graph.graph.inserting_before(layer):
            made = graph.graph.get_attr(name)
        made.meta |= {"val": bias.meta["val"], FROM: str(bias.meta.get(FROM, bias.target))}
        layer.update_arg(2, made)


def _weight(node: fx.Node) -> fx.Node | None:
    position = _WEIGHT.get(op_name(node), len(node.args))
    weight = node.args[position] if position < len(node.args) else None
    return weight if isinstance(weight, fx.Node) else None


def _is_computed(weight: fx.Node, reader: fx.Node) -> bool:
    value = weight.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() < 2:
        return False
    if is_turn(weight) and weight.all_input_nodes[0].op == "get_attr" and op_name(reader) != "linear":
        return False  # a product with Wᵀ is a linear layer of W (see products)
    while op_name(weight) in _SAME:
        weight = weight.all_input_nodes[0]
    return weight.op != "get_attr"


def _constants(graph: fx.GraphModule) -> set[fx.Node]:
    """What parameters and buffers alone decide, and no op writes into."""
    found: set[fx.Node] = set()
    written: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            found.add(node)
        elif node.op == "call_function" and node.all_input_nodes and all(n in found for n in node.all_input_nodes):
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                written |= {node, *_behind(node)}
            elif node.target is operator.getitem or op_name(node):
                found.add(node)
    for node in graph.graph.nodes:
        if node in written or any(n in written for n in node.all_input_nodes):
            written.add(node)
    return found - written


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """All that a node is computed from."""
    seen, waiting = set[fx.Node](), list(node.all_input_nodes)
    while waiting:
        source = waiting.pop(0)
        if source not in seen:
            seen.add(source)
            waiting += source.all_input_nodes
            yield source


def _sources(weight: fx.Node) -> list[fx.Node]:
    return [n for n in _behind(weight) if n.op == "get_attr"]


def _holder(graph: fx.GraphModule, weight: fx.Node, value: Tensor, names: set[str]) -> fx.Node:
    sources = _sources(weight)
    trained = any(isinstance(fetch(graph, str(s.target)), nn.Parameter) for s in sources)
    main = max(sources, key=lambda s: fetch(graph, str(s.target)).numel())
    name = str(main.target) if str(main.target) not in names else f"{main.target} ({weight.name})"
    names.add(name)
    made_as = attach(graph, f"{main.target}_computed", value.detach().clone(memory_format=torch.contiguous_format))
    if not trained:
        as_buffer(graph, made_as)
    with graph.graph.inserting_after(weight):
        made = graph.graph.get_attr(made_as)
    made.meta["val"] = weight.meta["val"]
    turned = is_turn(weight) and value.dim() == 2 and weight.all_input_nodes[0] is main and name == str(main.target)
    made.meta[OF if turned else FROM] = name
    return made
