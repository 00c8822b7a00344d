"""What stays float in a prepared graph, and why."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from paredown.errors import NothingToDo
from paredown.program import source_line
from paredown.quantize.decompose import fetch, op_name
from paredown.quantize.schemes import WEIGHTS, is_narrow
from paredown.score.patterns import matches
from paredown.target import Target, why_float
from paredown.target.reasons import NEIGHBOURS

_ONLY_WEIGHTS = "weights alone are codes: what computes is float32"
_IN_BYTES = (
    "activations of 4 bits stand in bytes: the runtime's kernels of 8 bits execute the file, with the results that kernels of 4 bits would have and "
    "in the time of w4a8"
)


def told_of(scheme: str, prepared: fx.GraphModule, table: Target) -> tuple[str, ...]:
    """What computes in float and why, and what computes in wider codes than those of the scheme."""
    if scheme in WEIGHTS:
        return (_ONLY_WEIGHTS,)
    return (*stayed_float(prepared, table), *((_IN_BYTES,) if is_narrow(scheme) else ()))


def stayed_float(prepared: fx.GraphModule, table: Target) -> Iterator[str]:
    """One line per kind of op that computes in float and reason, with where the first is."""
    free = (
        *table.fusions,
        *(op for op, kind in table.ops.items() if kind == "shared"),
        "sym_size",
        "_assert_tensor_metadata",
        *("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"),  # these compute nothing
    )
    kinds: dict[tuple[str, str], list[fx.Node]] = collections.defaultdict(list)
    for node in prepared.graph.nodes:
        value = node.meta.get("val")
        if op_name(node) in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            value = value[0]
        computes = (
            isinstance(value, Tensor) and value.is_floating_point() and "quantization_annotation" not in node.meta
        )
        if computes and op_name(node) and op_name(node) not in free:
            kinds[op_name(node), _why(node, table)].append(node)
    for (name, reason), nodes in sorted(kinds.items()):
        where = source_line(nodes[0]) or nodes[0].name
        yield f"{name} stays float ({len(nodes)}×, first at {where}): {reason}"


def _why(node: fx.Node, table: Target) -> str:
    """Why an op has no codes: what the annotation asks of it and did not find, else what the runtime has no kernel for."""
    from paredown.quantize.annotate import _leads_to_softmax, is_constant, is_float

    name = op_name(node)
    kind, args = table.ops.get(name), [_observed(a) for a in node.args[:2]]
    if kind in ("weighted", "binary") and any(isinstance(v, fx.Node) for v in node.kwargs.values()):
        return "a tensor is passed to it by keyword"
    if kind == "weighted" and len(args) == 2:
        if not is_constant(args[1]):
            return "its weight is computed"
        return "asked for by float_layers" if is_float(args[0]) else "its numbers are not float32"
    if kind != "binary":
        return why_float(table, name)
    if _leads_to_softmax(node):
        return "sums before a softmax stay float: a mask's minus infinity has no code"
    if any(is_constant(a) for a in args):
        return "a constant for every channel does not survive one scale for all"
    if node.kwargs:
        return f"no integer kernel adds with {' and '.join(node.kwargs)}"
    if len(args) < 2 or not all(is_float(a) for a in args):
        return "what it joins is not two float32 tensors"
    return NEIGHBOURS


def _observed(value: Any) -> Any:
    """What an observer in front of an op looks at."""
    while isinstance(value, fx.Node) and value.op == "call_module" and value.all_input_nodes:
        value = value.all_input_nodes[0]
    return value


def refuse_empty(prepared: fx.GraphModule, table: Target, scheme: str, float_layers: Sequence[str]) -> None:
    """Raises NothingToDo, with the reasons, where no parameter and no constant will be codes: such a network is not quantized."""
    observers = [n for n in prepared.graph.nodes if n.op == "call_module" and n.all_input_nodes]
    if any(
        n.all_input_nodes[0].op == "get_attr" and hasattr(fetch(prepared, str(n.target)), "calculate_qparams")
        for n in observers
    ):
        return
    kinds: dict[tuple[str, str], list[fx.Node]] = collections.defaultdict(list)
    for node, reason in _float_layers(prepared, table, float_layers):
        kinds[op_name(node), reason].append(node)
    stayed = "; ".join(
        f"{name} stays float ({len(nodes)}×, first at {source_line(nodes[0]) or nodes[0].name}): {reason}"
        for (name, reason), nodes in sorted(kinds.items())
    )
    msg = f"at least one weight must be quantized under {scheme} for {table.name}. Got none: {stayed or 'the network has no weights'}. "
    raise NothingToDo(msg + "Use another scheme or target, or export it in fp32.")


def _float_layers(
    prepared: fx.GraphModule, table: Target, float_layers: Sequence[str]
) -> Iterator[tuple[fx.Node, str]]:
    """Ops that read a matrix, a kernel or a table that no input decides, each with why it is in float."""
    from paredown.quantize.annotate import layer_names

    active: set[fx.Node] = set()
    for node in prepared.graph.nodes:
        if node.op != "placeholder" and not any(a in active for a in node.all_input_nodes):
            continue
        active.add(node)
        held = [a for a in node.all_input_nodes if a not in active and _is_matrix(a)]
        if not held or not op_name(node):
            continue
        if matches(layer_names(node), float_layers):
            yield node, "asked for"
        elif table.ops.get(op_name(node)) != "weighted":
            yield node, "there are no codes for its weight on this target"
        else:
            computed = any(a.op != "get_attr" for a in held)
            yield node, "its weight is computed" if computed else "its numbers are not float32"


def _is_matrix(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
