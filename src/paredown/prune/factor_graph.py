"""The graph realiser of ranks: every use of a weight becomes its chain, in the eval and the train graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument

from paredown.couple.operand import args_of
from paredown.couple.trace import op_name
from paredown.plan import Rank
from paredown.program import GraphModel, Program, placeholder_names
from paredown.prune.factors import Conv, Layer, conv_of, factor_names, found, is_transpose, links, walked

Factors = Mapping[str, tuple[Tensor, ...]]
"""Parameter → its factors, in order of execution."""


def realise_factor_graph(
    program: Program, layers: Mapping[str, Layer], ranks: Mapping[str, Rank], factors: Factors
) -> GraphModel:
    """A module rebuilt from the exported graphs with chains of factors; biases keep their names."""
    named = {p: factor_state(layer, program, factors[p]) for p, layer in layers.items()}
    state = _state(program, layers, named)
    made = {n: nn.Parameter(t, requires_grad=t.requires_grad) for group in named.values() for n, t in group.items()}
    graphs = [
        None if graph is None else _factored(graph, layers, ranks, made, program.state)
        for graph in (program.eval_graph, program.train_graph)
    ]
    assert graphs[0] is not None  # a program always has an eval graph
    return GraphModel(graphs[0], graphs[1], state).eval()


def empty_factor_graph(program: Program, ranks: Mapping[str, Rank]) -> GraphModel:
    """The same structure with factors of zeros, for weights that are loaded afterwards."""
    every = found(program)
    layers = {name: every.layer(name) for name in ranks}
    factors = {
        name: tuple(torch.zeros(link.shape) for link in links(layer.shape, layer.conv, ranks[name]))
        for name, layer in layers.items()
    }
    return realise_factor_graph(program, layers, ranks, factors)


def factor_state(layer: Layer, program: Program, factors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Names of the factors under every tied name of the weight → tensors in its dtype."""
    dense = program.state[layer.parameter]
    tensors = [f.detach().to(dense.dtype).contiguous().requires_grad_(dense.requires_grad) for f in factors]
    return {
        name: tensor
        for alias in layer.names
        for name, tensor in zip(factor_names(alias, len(tensors), program.state), tensors, strict=True)
    }


def _state(
    program: Program, layers: Mapping[str, Layer], named: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The state with factors where the weights were; nothing is shared with the program, tied names stay tied."""
    owner = {name: p for p, layer in layers.items() for name in layer.names}
    copies: dict[int, Tensor] = {}
    out: dict[str, Tensor] = {}
    for name, tensor in program.state.items():
        if name in owner:
            out.update(named[owner[name]])
            continue
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        out[name] = copies[id(tensor)]
    return out


def _factored(
    exported: ExportedProgram,
    layers: Mapping[str, Layer],
    ranks: Mapping[str, Rank],
    made: Mapping[str, nn.Parameter],
    dense: Mapping[str, Tensor],
) -> ExportedProgram:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(exported.graph, copies))
    for node, copied in copies.items():
        copied.name = node.name  # a copy renames what is called like a built-in ("input")
    specs = {s.arg.name: [s] for s in exported.graph_signature.input_specs}
    known = placeholder_names(exported)
    for parameter, layer in layers.items():
        for old in [n for n in graph.nodes if n.op == "placeholder" and known.get(n.name) in layer.names]:
            names = factor_names(known[old.name], len(links(layer.shape, layer.conv, ranks[parameter])), dense)
            news = [_placeholder(graph, old, name, made[name]) for name in names]
            _replace_uses(old, news, ranks[parameter])
            specs[old.name] = [
                InputSpec(kind=InputKind.PARAMETER, arg=TensorArgument(name=n.name), target=name)
                for n, name in zip(news, names, strict=True)
            ]
            graph.erase_node(old)
    gone = {name for layer in layers.values() for name in layer.names}
    signature = ExportGraphSignature(
        input_specs=[s for group in specs.values() for s in group],
        output_specs=_output_specs(exported, graph),
    )
    return ExportedProgram(
        root=exported.graph_module,
        graph=graph,
        graph_signature=signature,
        state_dict={n: t for n, t in exported.state_dict.items() if n not in gone} | dict(made),
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        constants=exported.constants,
        verifiers=exported.verifiers,
    )


def _output_specs(exported: ExportedProgram, graph: fx.Graph) -> list[OutputSpec]:
    """The outputs' specs under the names of the nodes that make them now."""
    results: Any = graph.output_node().args[0]
    return [
        dataclasses.replace(spec, arg=TensorArgument(name=value.name))
        if isinstance(spec.arg, TensorArgument) and isinstance(value, fx.Node)
        else spec
        for spec, value in zip(exported.graph_signature.output_specs, results, strict=True)
    ]


def _placeholder(graph: fx.Graph, old: fx.Node, name: str, tensor: Tensor) -> fx.Node:
    """A placeholder for a factor, before that of the weight: order among arguments is order in the graph."""
    with graph.inserting_before(old):
        node = graph.placeholder(f"p_{name.replace('.', '_')}")
    with old.meta["val"].fake_mode:
        node.meta = {"val": torch.empty(tuple(tensor.shape), dtype=tensor.dtype)}
    return node


def _replace_uses(node: fx.Node, factors: list[fx.Node], rank: Rank) -> None:
    """Rewrite everything that multiplies by a weight; its transposes are erased."""
    for user in list(node.users):
        if is_transpose(user):
            _replace_uses(user, factors, rank)
            user.graph.erase_node(user)
        elif op_name(user).startswith("conv"):
            _replace_conv(user, factors, rank)
        else:
            _replace_product(user, factors)


def _replace_product(node: fx.Node, factors: list[fx.Node]) -> None:
    """linear, matmul, mm and addmm as linear layers one after the other."""
    linear = torch.ops.aten.linear.default
    if op_name(node) == "addmm":
        bias, source = node.args[0], node.args[1]
    else:
        source = node.args[0]
        bias = args_of(node, "bias")[0] if op_name(node) == "linear" else None
    vector = bias is None or bias.meta["val"].dim() == 1  # type: ignore[union-attr]
    middle = [*source.meta["val"].shape[:-1], factors[0].meta["val"].shape[0]]  # type: ignore[union-attr]
    value = _call(node, linear, (source, factors[0]), middle)
    whole = (value, factors[1], bias) if bias is not None and vector else (value, factors[1])
    value = _call(node, linear, whole, None)
    if not vector:
        value = _call(node, torch.ops.aten.add.Tensor, (value, bias), None)
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _replace_conv(node: fx.Node, factors: list[fx.Node], rank: Rank) -> None:
    walk = conv_of(node)
    value, bias = args_of(node, "input", "bias")
    weight: Any = args_of(node, "weight")[0]
    chain = links(tuple(int(s) for s in weight.meta["val"].shape), walk, rank)
    for link, factor in zip(chain, factors, strict=True):
        assert link.conv is not None  # a convolution's links walk
        last = factor is factors[-1]
        before = value.meta["val"].shape
        axes = len(link.shape) - 2
        middle = [*before[: len(before) - axes - 1], link.shape[0], *walked(before[len(before) - axes :], link)]
        arguments = (value, factor, bias if last else None, *_walk(link.conv))
        value = _call(node, _overload(node, link.conv), arguments, None if last else middle)
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _walk(conv: Conv) -> tuple[Any, ...]:
    padding = conv.padding if isinstance(conv.padding, str) else list(conv.padding)
    return list(conv.stride), padding, list(conv.dilation), conv.groups


def _overload(node: fx.Node, conv: Conv) -> Any:
    packet = getattr(torch.ops.aten, op_name(node))
    return packet.padding if isinstance(conv.padding, str) else packet.default


def _call(before: fx.Node, target: Any, args: tuple[Any, ...], sizes: list[Any] | None) -> fx.Node:
    """A new node from the place of an old one, with a value of these sizes, or with the old one's own.

    The op is not run on symbolic sizes: that would guard on the batch, and fix it.
    """
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    node.meta = {k: v for k, v in before.meta.items() if k in ("stack_trace", "nn_module_stack", "torch_fn")}
    value = before.meta["val"]
    if sizes is not None:
        with value.fake_mode, torch.no_grad():
            value = torch.empty(sizes, dtype=value.dtype)
    node.meta["val"] = value
    return node
