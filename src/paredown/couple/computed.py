"""Weights of convolutions and linear layers that are computed from a parameter of their shape: standardised, scaled, at every call.

Such a weight has two kinds of channels at once: those that it writes along axis 0 and those that it reads along axis 1.
One id for each element cannot say both, so what lies between the parameter and the layer is run twice, once for
each axis (a lane), by the same rules as everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.couple.ids import fixed, laid, varying

if TYPE_CHECKING:
    from paredown.couple.trace import Trace

_OPS = frozenset(
    "view reshape reshape_as view_as batch_norm mean var std var_mean sum sub add mul div rsqrt sqrt square pow neg rsub "
    "reciprocal clamp clamp_min to _to_copy clone detach contiguous operator.getitem _assert_tensor_metadata "
    "linalg_vector_norm norm abs expand expand_as unsqueeze flatten exp softplus tanh sigmoid".split()
)
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A weight that is a function of one parameter of its shape (or of [out, in, …], laid out in rows), and of others that are shorter."""

    parameter: fx.Node
    weight: fx.Node
    between: tuple[fx.Node, ...]
    """All nodes that only serve to compute it, in order; the weight is the last but for assertions."""


def find(graph: fx.Graph, learned: Mapping[fx.Node, Any]) -> dict[fx.Node, Computed]:
    """Weight node of a layer → how it is computed, where every step on the way is known and serves nothing else."""
    out: dict[fx.Node, Computed] = {}
    for node in graph.nodes:
        weight = node.args[1] if _is_layer(node) else None
        if isinstance(weight, fx.Node) and weight.op == "call_function" and weight not in out:
            made = _computed(graph, weight, learned)
            if made is not None:
                out[weight] = made
    return out


def _is_layer(node: fx.Node) -> bool:
    from paredown.couple.trace import op_name

    if node.op != "call_function" or len(node.args) < 2 or not isinstance(node.args[1], fx.Node):
        return False
    name = op_name(node)
    return name in _CONVOLUTIONS or (name == "linear" and node.args[1].meta["val"].dim() == 2)


def _computed(graph: fx.Graph, weight: fx.Node, learned: Mapping[fx.Node, Any]) -> Computed | None:
    from paredown.couple.trace import op_name

    between: set[fx.Node] = set()
    leaves: set[fx.Node] = set()
    ahead = [weight]
    while ahead:
        node = ahead.pop()
        if node in between or node in leaves:
            continue
        if node.op == "call_function" and op_name(node) in _OPS:
            between.add(node)
            ahead += node.all_input_nodes
        elif node in learned:
            leaves.add(node)
        else:
            return None
    between |= {u for n in between for u in n.users if op_name(u).startswith("_assert")}
    for node in between:
        if any(u not in between and not (node is weight and _reads(u, weight)) for u in node.users):
            return None
    shape = tuple(weight.meta["val"].shape)
    whole = [n for n in leaves if _fills(tuple(learned[n].shape), shape)]
    if len(whole) != 1 or any(u not in between for u in whole[0].users):
        return None
    order = tuple(n for n in graph.nodes if n in between)
    return Computed(parameter=whole[0], weight=weight, between=order)


def _fills(parameter: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether they are of one shape, or the parameter's rows laid out are the weight's: [out, in, …] and [out, in · …]."""
    in_rows = len(weight) == 2 and len(parameter) > 2 and parameter[0] == weight[0]
    return parameter == weight or (in_rows and math.prod(parameter) == math.prod(weight))


def _reads(node: fx.Node, weight: fx.Node) -> bool:
    """Whether a layer has it as its weight and as nothing else."""
    return _is_layer(node) and node.args[1] is weight and [*node.all_input_nodes].count(weight) == 1


def follow(made: Computed, trace: Trace) -> None:
    """Run what lies between, once for each axis; pin the parameter's channels where the two do not stay apart."""
    if trace.ids[made.weight] is not None:
        return  # a second convolution with the same weight
    name = trace.storage[trace.parameters[made.parameter].name]
    shape = trace.parameters[made.parameter].shape
    axes = trace.weights[name]
    before = set(trace.norms)
    lanes = []
    beside = _beside(made, trace)
    for axis, role in ((0, "write"), (1, "read")):
        starts = {made.parameter: laid(axes[axis], axis, shape) if axis in axes else fixed(shape)}
        for node in beside if axis in axes else ():
            starts[node] = laid(trace.weight(node, axis, role), axis, trace.parameters[node].shape)  # type: ignore[arg-type]
        lanes.append(_lane(made, starts, trace, others=axis == 0))
        if axis == 0 and set(trace.norms) - before:
            lanes = []  # a statistic over what is written: it would have to be over both at once
            break
    if not lanes or not _apart(made, lanes, axes, trace):
        for ids in axes.values():
            trace.pin(ids, "a weight that is computed from all of its parameter")
        return
    for node in made.between:
        one, two = (lane[node] for lane in lanes)
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            trace.lanes[node] = (one, two)


def _beside(made: Computed, trace: Trace) -> list[fx.Node]:
    """Other parameters with a number for each output and input (scales of splines): they lose rows and columns alike."""
    axes = trace.parameters[made.parameter].shape[:2]
    inputs = dict.fromkeys(n for node in made.between for n in node.all_input_nodes if n in trace.parameters)
    return [
        n
        for n in inputs
        if n is not made.parameter
        and trace.parameters[n].shape[:2] == axes
        and all(u in made.between for u in n.users)
        and trace.storage[trace.parameters[n].name] not in trace.raw
    ]


def _lane(made: Computed, starts: dict[fx.Node, Tensor], trace: Trace, *, others: bool) -> dict[fx.Node, Any]:
    """Ids of every node between; other parameters than those of `starts` take part in the first lane only (`others`)."""
    from paredown.couple.operand import unknown
    from paredown.couple.rules import RULES
    from paredown.couple.trace import op_name

    at = trace.node
    trace.instead = dict(starts)
    if not others:
        inputs = {n for node in made.between for n in node.all_input_nodes}
        trace.instead |= {
            n: fixed(trace.parameters[n].shape) for n in inputs if n in trace.parameters and n not in starts
        }
    out: dict[fx.Node, Any] = {}
    for node in made.between:
        trace.node = node
        trace.ids[node] = out[node] = RULES.get(op_name(node), unknown)(node, trace)
        for leaf in pytree.tree_leaves(out[node]):
            if isinstance(leaf, Tensor):
                trace.table(leaf)
    trace.instead, trace.node = {}, at
    return out


def _apart(made: Computed, lanes: list[dict[fx.Node, Any]], axes: Mapping[int, Tensor], trace: Trace) -> bool:
    """Whether the lanes never lie along one axis, and the weight's channels are the parameter's."""
    canon = trace.forest.canon
    for node in made.between:
        one, two = (lane[node] for lane in lanes)
        if isinstance(one, Tensor) and isinstance(two, Tensor) and {*varying(canon(one))} & {*varying(canon(two))}:
            return False
    shape = trace.parameters[made.parameter].shape
    starts = [laid(axes[axis], axis, shape) if axis in axes else fixed(shape) for axis in range(len(lanes))]
    ends = [canon(lane[made.weight]) for lane in lanes]
    return all(torch.equal(end, canon(start.reshape(end.shape))) for start, end in zip(starts, ends, strict=True))
