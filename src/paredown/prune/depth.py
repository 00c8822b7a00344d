"""Depth: modules left out, their input in the place of their output, in the user's class or in the graphs, proven."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from paredown.errors import UsageError, VerificationError
from paredown.plan import Plan
from paredown.program import GraphModel, Program, placeholder_names
from paredown.prune.example import healthy_inputs
from paredown.prune.nouns import Proof, Pruned
from paredown.prune.one_dtype import one_dtype
from paredown.prune.prove import (
    Reference,
    arguments,
    compare,
    healthy,
    holds,
    in_dtype,
    own_move,
    run_dense,
    same_in_train,
    tells,
)
from paredown.prune.removal import own
from paredown.train.loop import private_copy

Realiser = Literal["auto", "module", "graph"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """One call of a module in a graph: what it gets, what it gives, and the nodes between."""

    source: fx.Node
    result: fx.Node
    inside: tuple[fx.Node, ...]
    sizes: tuple[tuple[fx.Node, int], ...] = ()
    """Sizes that are taken inside and used outside, and the axis of the source that has the same size."""


def drop(program: Program, paths: Iterable[str], *, realiser: Realiser = "auto", seed: int = 0) -> Pruned:
    """The model without some modules: each passes its input on. See prune with Plan(drop_modules=…).

    Module realiser: nn.Identity at the path in a copy of the user's class. Graph realiser: uses of the module's output
    become uses of its input in both graphs, and what nothing reads any more leaves with its parameters.

    Proven against the dense graph run without the modules' nodes, on seeded random weights of healthy scale, to the
    tolerance of prove. Raises UsageError (no such module, or one that cannot be left out, with the reason) and
    VerificationError.
    """
    chosen = outermost(paths)
    spans = [call for path in chosen for call in calls_of(program, path)]
    plan = Plan(keep={}, drop_modules=chosen, made_by={"verb": "prune"})
    known = _reference(program, spans, seed, torch.float32)
    refused: VerificationError | None = None
    if realiser != "graph":
        try:
            module = _as_module(program, chosen, known, seed)
            proof = _proven(program, module, spans, known, seed)
            return Pruned(module=module, program=program, plan=plan, realiser="module", proof=proof)
        except VerificationError as error:
            refused = error
        if realiser == "module":
            raise refused
    module = realise_without(program, chosen)
    proof = _proven(program, module, spans, known, seed)
    return Pruned(module=module, program=program, plan=plan, realiser="graph", proof=proof)


def outermost(paths: Iterable[str]) -> tuple[str, ...]:
    """Each path once, without those inside another one."""
    given = tuple(dict.fromkeys(paths))
    return tuple(p for p in given if not any(p != q and p.startswith(f"{q}.") for q in given))


def calls_of(program: Program, path: str, *, train: bool = False) -> tuple[Call, ...]:
    """All calls of a module in a graph; raises UsageError where it cannot be left out, with the reason."""
    if isinstance(program.module, GraphModel):
        msg = f"modules can be left out of the user's own class only. Got {path!r} and a model that was rebuilt from graphs. Leave modules out before units."
        raise UsageError(msg)
    known = dict(program.module.named_modules(remove_duplicate=False))
    if path not in known or not path:
        near = difflib.get_close_matches(path, [n for n in known if n], n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        msg = f"a module to leave out must be one of the model. Got {path!r}.{hint}"
        raise UsageError(msg)
    graph = program.train_graph if train else program.eval_graph
    if graph is None:
        return ()
    aliases = {n for n, m in known.items() if m is known[path]}
    groups = grouped(graph)
    calls = [nodes for p in sorted(aliases) for nodes in groups.get(p, ())]
    every = {n for nodes in calls for n in nodes}
    spans = [_call(program, graph, nodes, every, path, train) for nodes in calls]
    if not spans:
        msg = f"a module to leave out must be called by forward. Got {path}, which is not."
        raise UsageError(msg)
    return tuple(spans)


def grouped(graph: ExportedProgram) -> dict[str, list[list[fx.Node]]]:
    """Module path → nodes of each of its calls, in order."""
    out: dict[str, dict[str, list[fx.Node]]] = {}
    for node in graph.graph.nodes:
        for key, (path, *_) in (node.meta.get("nn_module_stack") or {}).items():
            out.setdefault(str(path), {}).setdefault(str(key), []).append(node)
    return {path: list(by_key.values()) for path, by_key in out.items()}


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes hold tensors of the same shape and dtype."""
    one, other = a.meta.get("val"), b.meta.get("val")
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one.dtype == other.dtype and tuple(map(str, one.shape)) == tuple(map(str, other.shape))


def ends(
    graph: ExportedProgram, nodes: list[fx.Node], every: set[fx.Node]
) -> tuple[list[fx.Node], fx.Node | None, str]:
    """What a call reads and gives: candidates for its input, its output, and why there are none.

    `every` are the nodes of all calls of the module: they leave together, counters that they hand on as well.
    """
    inside, state = set(nodes), placeholder_names(graph)
    entering = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside and i.name not in state)
    leaving = [n for n in nodes if not is_size(n) and any(u not in inside for u in n.users)]
    leaving = [n for n in leaving if not (_counts(n, state) and all(u in every for u in n.users))]
    if len(leaving) != 1:
        return [], None, f"it gives {len(leaving)} results, and one can take the place of its input"
    fits = [n for n in entering if same_shape(n, leaving[0])]
    if any(_axis_of(n, leaving[0]) is None for n in _taken(nodes, _needed(nodes))):
        return [], None, "a size that only a tensor inside has is used outside"
    return fits, leaving[0], "" if fits else "its output has not the shape and dtype of an input"


def _counts(node: fx.Node, state: Mapping[str, str]) -> bool:
    """Whether a node changes a buffer in place: a counter that the next call of the module counts on."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        if not getattr(node.target, "_schema", None) or not node.target._schema.is_mutable:  # type: ignore[union-attr]
            return False
        node = node.args[0]
    return node.name in state


def is_size(node: fx.Node) -> bool:
    """Whether a node is a symbolic number: a size, or arithmetic on sizes."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def _axis_of(size: fx.Node, tensor: fx.Node) -> int | None:
    """The axis of a tensor that has, by its symbol, the size that a node holds."""
    shape = [str(s) for s in tensor.meta["val"].shape]
    wanted = str(size.meta["val"])
    return shape.index(wanted) if wanted in shape else None


def realise_without(program: Program, paths: Iterable[str]) -> GraphModel:
    """A module rebuilt from the exported graphs without the calls of some modules, and without what only they read."""
    chosen = outermost(paths)
    eval_spans = [c for p in chosen for c in calls_of(program, p)]
    train_spans = [c for p in chosen for c in calls_of(program, p, train=True)]
    gone = left_out(program, chosen)
    graphs = (
        _without(program.eval_graph, eval_spans, gone),
        _without(program.train_graph, train_spans, gone) if program.train_graph is not None else None,
    )
    state = own({n: t for n, t in program.state.items() if n not in gone}, program.state)
    return GraphModel(graphs[0], graphs[1], state).eval()


def left_out(program: Program, paths: Iterable[str]) -> set[str]:
    """Names in the state that leave with modules: under their paths, and read by nothing else in either graph."""
    chosen = outermost(paths)
    every = [(program.eval_graph, False)] + ([(program.train_graph, True)] if program.train_graph else [])
    used: set[str] = set()
    for graph, train in every:
        inside = {n for p in chosen for c in calls_of(program, p, train=train) for n in c.inside}
        names = placeholder_names(graph)
        used |= {names[n.name] for n in graph.graph.nodes if n.name in names and any(u not in inside for u in n.users)}
    known = dict(program.module.named_modules(remove_duplicate=False))
    modules = {id(known[p]) for p in chosen}
    under = tuple(f"{n}." for n, m in known.items() if id(m) in modules)
    return {n for n in program.state if n.startswith(under) and n not in used}


def identity_module(model: nn.Module, paths: Iterable[str]) -> nn.Module:
    """A copy of the user's model with nn.Identity in the place of modules, under every path that they have."""
    known = dict(model.named_modules(remove_duplicate=False))
    missing = [p for p in paths if p not in known]
    if missing:
        msg = f"the model must have the modules that the plan leaves out. Got none called {missing[0]!r} in {type(model).__name__}."
        raise UsageError(msg)
    chosen = {id(known[p]): known[p] for p in paths}
    aliases = [n for n, m in known.items() if id(m) in chosen]
    out = copy.deepcopy(model)
    for path in aliases:
        out.set_submodule(path, nn.Identity())
    return out


# ------------------------------------------------------------------------------------------------------------- realised


def _call(
    program: Program, graph: ExportedProgram, nodes: list[fx.Node], every: set[fx.Node], path: str, train: bool
) -> Call:
    fits, result, reason = ends(graph, nodes, every)
    if len(fits) > 1 and not train:
        fits = _first_argument(program, path, fits)
        reason = "several inputs have its output's shape, and none of them is known as its first argument"
    elif len(fits) > 1:
        fits = _as_in_eval(program, path, fits)
        reason = "several inputs of its train graph have its output's shape"
    if result is None or len(fits) != 1:
        msg = f"a module to leave out must give what it gets in shape and dtype. Got {path}: {reason}."
        raise UsageError(msg)
    needed = _needed(nodes)
    taken = _taken(nodes, needed)
    axes = [(n, axis) for n in taken if (axis := _axis_of(n, fits[0])) is not None]
    inside = tuple(n for n in nodes if n not in needed or n in taken)
    return Call(source=fits[0], result=result, inside=inside, sizes=tuple(axes))


def _needed(nodes: list[fx.Node]) -> set[fx.Node]:
    """Sizes inside that are used outside, and the sizes they are made of: torch.export computes a size once for all."""
    inside = set(nodes)
    todo = [n for n in nodes if is_size(n) and any(u not in inside for u in n.users)]
    out: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in out:
            out.add(node)
            todo += [i for i in node.all_input_nodes if i in inside and is_size(i)]
    return out


def _taken(nodes: list[fx.Node], needed: set[fx.Node]) -> list[fx.Node]:
    """Those that are read off a tensor inside."""
    inside = set(nodes)
    return [n for n in nodes if n in needed and any(i in inside and not is_size(i) for i in n.all_input_nodes)]


def _first_argument(program: Program, path: str, fits: list[fx.Node]) -> list[fx.Node]:
    """Of several nodes, those that hold the module's first positional argument, by value on the example."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.append(args[0].detach().clone())

    module = private_copy(program.module).eval()
    handle = module.get_submodule(path).register_forward_pre_hook(note)
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, program.inputs)
    with torch.no_grad():
        module(*args, **kwargs)
        handle.remove()
        values = _Values(program.eval_graph.graph_module, set(fits))
        values.run(*arguments(program, program.state, program.inputs), enable_io_processing=False)
    return [n for n in fits if any(s.shape == values.seen[n].shape and torch.equal(s, values.seen[n]) for s in seen)]


def _as_in_eval(program: Program, path: str, fits: list[fx.Node]) -> list[fx.Node]:
    """The input of the train graph that has the name of the one in the eval graph."""
    names = {c.source.name for c in calls_of(program, path)}
    return [n for n in fits if n.name in names]


class _Values(fx.Interpreter):
    """Runs a graph and keeps copies of some of its values (they may be overwritten in place later)."""

    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(gm)
        self.wanted = {n.name: n for n in wanted}
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.seen[self.wanted[n.name]] = value.clone()
        return value


class _Without(fx.Interpreter):
    """Runs a graph without the nodes of some calls: their input stands for their output."""

    def __init__(self, gm: fx.GraphModule, spans: Iterable[Call]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        spans = tuple(spans)
        self.inside = {n for c in spans for n in c.inside}
        self.source = {c.result: c.source for c in spans}
        self.sizes = {n: (c.source, axis) for c in spans for n, axis in c.sizes}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.sizes:
            source, axis = self.sizes[n]
            return self.env[source].shape[axis]
        if n in self.inside:
            return self.env[self.source[n]] if n in self.source else None
        return super().run_node(n)


def _as_module(program: Program, paths: tuple[str, ...], known: Reference, seed: int) -> nn.Module:
    """The user's class with identities, or a VerificationError that says why it cannot be."""
    try:
        module = identity_module(program.module, paths).eval()
        graph = realise_without(program, paths)
        if same_in_train(program, module, graph, known, seed=seed):
            return module
        why = "other outputs in train mode than its graph"
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError, KeyError) as error:
        # nn.Identity takes one argument, gives one tensor and has no attributes: the parent may ask for more.
        why = f"{type(error).__name__}: {error}"
    msg = f"the class must run with nn.Identity in the place of {', '.join(paths)}. Got {why}. Use the graph realiser."
    raise VerificationError(msg)


def _without(exported: ExportedProgram, spans: Iterable[Call], gone: set[str]) -> ExportedProgram:
    """A graph without some calls; placeholders of `gone` leave with their specs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(exported.graph, copies))
    for node, copied in copies.items():
        copied.name = node.name  # a copy renames what is called like a built-in ("input")
    stands: dict[fx.Node, fx.Node] = {}
    inside: set[fx.Node] = set()
    for call in spans:
        source = copies[call.source]
        while source in stands:
            source = stands[source]
        mine = {copies[n] for n in call.inside}
        for size, axis in call.sizes:
            with graph.inserting_before(copies[size]):
                again = graph.call_function(torch.ops.aten.sym_size.int, (source, axis))
            again.meta = dict(copies[size].meta)
            copies[size].replace_all_uses_with(again)
        result = copies[call.result]
        result.replace_all_uses_with(source, delete_user_cb=lambda user, mine=mine: user not in mine)  # type: ignore[misc]
        stands[result] = source
        inside |= mine
    for node in reversed(list(graph.nodes)):
        if node in inside:
            graph.erase_node(node)
    names = placeholder_names(exported)
    for node in list(graph.nodes):
        if node.op == "placeholder" and names.get(node.name) in gone:
            graph.erase_node(node)
    results: Any = graph.output_node().args[0]
    signature = ExportGraphSignature(
        input_specs=[s for s in exported.graph_signature.input_specs if s.target not in gone or s.target is None],
        output_specs=[_renamed(s, v) for s, v in zip(exported.graph_signature.output_specs, results, strict=True)],
    )
    return ExportedProgram(
        root=exported.graph_module,
        graph=graph,
        graph_signature=signature,
        state_dict={n: t for n, t in exported.state_dict.items() if n not in gone},
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        constants={n: t for n, t in exported.constants.items() if n not in gone},
        verifiers=exported.verifiers,
    )


def _renamed(spec: OutputSpec, value: Any) -> OutputSpec:
    """The spec of an output under the name of the node that makes it now."""
    if isinstance(spec.arg, TensorArgument) and isinstance(value, fx.Node):
        return dataclasses.replace(spec, arg=TensorArgument(name=value.name))
    return spec


# --------------------------------------------------------------------------------------------------------------- proven


def _reference(program: Program, spans: list[Call], seed: int, dtype: torch.dtype) -> Reference:
    """The dense graph on random weights, and again without the modules."""
    inputs = pytree.tree_map(lambda t: in_dtype(t, dtype), healthy_inputs(program, seed))
    state: Mapping[str, Tensor] = {n: in_dtype(t, dtype) for n, t in healthy(program, seed).items()}
    with torch.no_grad():
        dense = run_dense(program, state, inputs, None, dtype)
        without = _Without(program.eval_graph.graph_module, spans)
        with torch.random.fork_rng(devices=[]), one_dtype(program, dtype):
            torch.manual_seed(0)
            masked = list(without.run(*arguments(program, state, inputs), enable_io_processing=False))
    if not tells(dense, masked):
        msg = "the output must be finite and must move when modules are left out, or a proof would be empty. Got one that stays: they do nothing."
        raise VerificationError(msg)
    return Reference(state=state, inputs=inputs, dense=dense, masked=masked, dtype=dtype, program=program)


def _proven(program: Program, module: nn.Module, spans: list[Call], known: Reference, seed: int) -> Proof:
    try:
        proof = compare(module, known)
        if not holds(proof):
            proof = compare(module, _reference(program, spans, seed, torch.float64))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError, KeyError) as error:
        msg = f"the model must run without the modules. Got {type(error).__name__}: {error}."
        raise VerificationError(msg) from error
    if not holds(proof):
        msg = f"the model without the modules must equal its graph without them. Got a difference of {proof.max_error:.2e} at output scale {proof.scale:.2e}."
        raise VerificationError(msg, proof)
    return dataclasses.replace(proof, shown=("depth",), own_move=own_move(program, module))
