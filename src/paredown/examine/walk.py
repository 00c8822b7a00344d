"""examine: one pass over the exported graph for MACs, parameters and activation memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError
from paredown.examine.cost import Cost, NodeCost, Uncounted
from paredown.examine.count import COUNTED, ZERO, Call, Shape, attention_parts, bound, op_name, pair_macs
from paredown.examine.shrink import shrink_to
from paredown.examine.size import file_size, state_size
from paredown.program import Program, least_batch, module_path, placeholder_names, source_line
from paredown.records import Badge

_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
_SYMBOLIC = frozenset(("_operator", "operator", "math", "builtins", "torch.sym_int"))
# They return their input where its memory allows it, and copy it otherwise; the schema of most of them calls it a view.
_VIEW_IF_STRIDES_FIT = frozenset(("reshape", "flatten", "reshape_as", "ravel", "contiguous"))
_VIEW_IF_SAME_DTYPE = frozenset(("to", "type_as", "_to_copy", "float"))
_NO_OP_IN_EVAL = frozenset(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"))


def examine(
    program: Program,
    *,
    target_bytes: int | None = None,
    strict: bool = False,
    model: str = "",
    file: Path | str | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Cost:
    """Count parameters, MACs, bytes and activation memory of a program, per layer and in total.

    MACs are those of conv, linear, matrix products, attention (query·key and weights·value) and recurrent ops; other
    known ops count 0; unknown ones count 0 and are listed in `Cost.uncounted`. Bytes are of the captured dtypes.
    With `file` (.pt, .pth, .safetensors) its size is measured and compared with the tensors in it; without one it is
    estimated. `state` is the user's own state_dict, where the original differs from what was captured (saved views,
    masks). With `target_bytes` the answer says which layers must shrink (see shrink_to).

    Raises RejectedError with strict=True where an op is uncounted, and for a file that cannot be read.

    >>> import torch, paredown.program
    >>> cost = examine(paredown.program.capture(torch.nn.Conv2d(3, 8, 3), torch.zeros(2, 3, 8, 8), train=False))
    >>> cost.parameters, cost.macs
    (224, 7776)
    """
    walk = _Walk(program)
    nodes, uncounted = walk.nodes()
    if strict and uncounted:
        first = uncounted[0]
        where = ", ".join(first.where[:3])
        msg = f"every op must be countable with strict=True. Got {first.op!r} at {where}. Without strict it counts 0."
        raise RejectedError(msg)
    held = state_size(state if state is not None else _module_state(program))
    found = file_size(file) if file is not None else None
    badge: Badge = "estimated" if found is None else "measured"
    cost = Cost(
        macs=sum(n.macs for n in nodes),
        parameters=sum(n.parameters for n in nodes),
        parameter_bytes=sum(n.parameter_bytes for n in nodes),
        activation_bytes=sum(n.activation_bytes for n in nodes),
        peak_activation_bytes=walk.peak(),
        by_node=tuple(nodes),
        uncounted=tuple(uncounted),
        model=model or type(program.module).__name__,
        samples=walk.samples(program.inputs),
        state_dict_bytes=held.unique_bytes,
        file_bytes=held.safetensors_bytes if found is None else found.file_bytes,
        file_badge=badge,
        alarms=tuple(dict.fromkeys(held.alarms + (found.alarms if found is not None else ()))),
        dtypes=walk.dtypes(),
        parameter_shapes={n: tuple(t.shape) for n, t in walk.parameters.items() if walk.first[n] == n},
        buffer_shapes={
            n: tuple(t.shape) for n, t in program.state.items() if isinstance(t, Tensor) and n not in walk.parameters
        },
    )
    if target_bytes is None:
        return cost
    fixed_bytes = max(held.safetensors_bytes - cost.parameter_bytes, 0)  # buffers and a file's header
    return replace(cost, shrink=shrink_to(cost, target_bytes, fixed_bytes=fixed_bytes))


def _module_state(program: Program) -> Mapping[str, Tensor]:
    return {n: t for n, t in program.module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}


class _Walk:
    """Facts about every node of one graph: shape at the smallest batch, storage it lives in, parameter it is a view of."""

    def __init__(self, program: Program) -> None:
        self.graph = program.eval_graph
        self.names = placeholder_names(self.graph)
        self.parameters = {n: t for n, t in program.state.items() if n in set(self.graph.graph_signature.parameters)}
        names: dict[int, str] = {}
        self.first = {n: names.setdefault(id(t), n) for n, t in self.parameters.items()}  # tied names → the first
        self._sizes: dict[Any, int] = {}
        self._batch = least_batch(program)
        self.whole: dict[fx.Node, str] = {}  # node → parameter that it is a (permuted) whole view of
        self.storage: dict[fx.Node, fx.Node] = {}  # node → node that allocated its memory
        self.bytes: dict[fx.Node, int] = {}
        for node in self.graph.graph.nodes:
            self._note(node)

    # -------------------------------------------------------------------------------------------------------- shapes

    def size(self, value: Any) -> int:
        """A length as an integer, the batch being the smallest that there is."""
        if not isinstance(value, torch.SymInt):
            return int(value)
        expression = value.node.expr
        if expression not in self._sizes:
            least = expression.subs(dict.fromkeys(expression.free_symbols, self._batch))
            self._sizes[expression] = int(least) if least.is_number else int(value.node.hint)
        return self._sizes[expression]

    def shape(self, node: Any) -> Shape:
        """Shape of a node's tensor; () for anything else."""
        value = node.meta.get("val") if isinstance(node, fx.Node) else node
        return tuple(self.size(s) for s in value.shape) if isinstance(value, Tensor) else ()

    def _tensor_bytes(self, value: Any) -> int:
        tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
        return sum(math.prod(self.size(s) for s in t.shape) * t.element_size() for t in tensors)

    def samples(self, inputs: Any) -> int:
        """1 where the batch is free, or more where the network folds samples into groups; else the length of axis 0 that the graph was fixed to."""
        users = set(self.graph.graph_signature.user_inputs)
        values = [n.meta.get("val") for n in self.graph.graph.nodes if n.op == "placeholder" and n.name in users]
        lengths: list[Any] = [v.shape[0] for v in values if isinstance(v, Tensor) and v.dim() > 0]
        if not lengths or any(isinstance(s, torch.SymInt) and s.node.expr.free_symbols for s in lengths):
            return self._batch
        first = next(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
        return int(first.shape[0]) if first.dim() > 0 else 1

    # ------------------------------------------------------------------------------------------------------- storage

    def _note(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.op == "placeholder":
            self.storage[node] = node
            name = self.names.get(node.name)
            self.bytes[node] = 0 if name is not None else self._tensor_bytes(value)
            if name in self.parameters:
                self.whole[node] = str(name)
            return
        if node.op != "call_function" or not any(isinstance(t, Tensor) for t in pytree.tree_leaves(value)):
            return
        source = self._source(node)
        if source is None or source not in self.storage:
            self.storage[node], self.bytes[node] = node, self._tensor_bytes(value)
            return
        if self._copies(node, source):
            self.storage[node], self.bytes[node] = node, self._tensor_bytes(value)
        else:
            self.storage[node], self.bytes[node] = self.storage[source], 0
        if (
            source in self.whole
            and isinstance(value, Tensor)
            and math.prod(self.shape(node)) == math.prod(self.shape(source))
        ):
            self.whole[node] = self.whole[source]

    def _source(self, node: fx.Node) -> fx.Node | None:
        """The argument whose memory this node's result is a view of, or a copy where it must be; None for new values."""
        first = next((a for a in node.args if isinstance(a, fx.Node)), None)
        schema = getattr(node.target, "_schema", None)
        if schema is None or first is None:
            return first if getattr(node.target, "__name__", "") == "getitem" else None
        given = bound(node)
        split = [a.name for a in schema.arguments if a.alias_info is not None and "*" in a.alias_info.after_set]
        if split:  # (a -> *): a list of views, of which the returns say nothing
            return given.get(split[0])
        shared = {s for r in schema.returns if r.alias_info is not None for s in r.alias_info.before_set}
        if shared:
            names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.before_set & shared]
            return next((given[n] for n in names if isinstance(given.get(n), fx.Node)), None)
        return first if _returns_its_input(node, first.meta.get("val"), node.meta["val"]) else None

    def _copies(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether an op that may return its input has to copy it, in memory laid out as at the smallest batch."""
        old, new = source.meta.get("val"), node.meta["val"]
        if not isinstance(old, Tensor) or not isinstance(new, Tensor):
            return False
        op, given = op_name(node), bound(node)
        if op in _VIEW_IF_SAME_DTYPE:
            return old.dtype != new.dtype or bool(given.get("copy"))
        if op not in _VIEW_IF_STRIDES_FIT:
            return False
        strides = [self.size(s) for s in old.stride()]
        laid_out = torch.empty_strided(self.shape(source), strides, dtype=old.dtype, device="meta")
        if op == "contiguous":
            return not laid_out.is_contiguous(memory_format=given.get("memory_format", torch.contiguous_format))
        try:
            laid_out.view(self.shape(node))
        except RuntimeError:
            return True
        return False

    def peak(self) -> int:
        """Largest number of activation bytes alive at once."""
        nodes = list(self.graph.graph.nodes)
        last: dict[fx.Node, int] = {}
        born: dict[fx.Node, int] = {}
        for index, node in enumerate(nodes):
            for read in node.all_input_nodes:
                if read in self.storage:
                    last[self.storage[read]] = index
            if node in self.storage and self.storage[node] is node:
                born[node] = -1 if node.op == "placeholder" else index
        change: dict[int, int] = defaultdict(int)
        for node, start in born.items():
            change[start] += self.bytes[node]
            change[max(last.get(node, start), start) + 1] -= self.bytes[node]
        alive = most = 0
        for index in sorted(change):
            alive += change[index]
            most = max(most, alive)
        return most

    # --------------------------------------------------------------------------------------------------------- costs

    def nodes(self) -> tuple[list[NodeCost], list[Uncounted]]:
        """Cost of every op that does something, then parameters that no op reads; and what is unknown."""
        owners, unused = self._owners()
        costs: list[NodeCost] = []
        unknown: dict[str, list[str]] = defaultdict(list)
        for node in self.graph.graph.nodes:
            if node.op != "call_function" or _is_symbolic(node):
                continue
            macs, weights = self._macs(node, unknown)
            own = owners.get(node, [])
            allocated = self.bytes.get(node, 0)
            if not (macs or own or allocated):
                continue
            costs += self._parts(
                node,
                NodeCost(
                    name=self._name(node, weights or tuple(own)),
                    node=node.name,
                    kind=op_name(node),
                    output_shape=self._output_shape(node),
                    parameters=sum(self.parameters[n].numel() for n in own),
                    macs=macs,
                    parameter_bytes=_bytes(self.parameters[n] for n in own),
                    activation_bytes=allocated,
                    weights=tuple(self.first[w] for w in weights),
                ),
            )
        for name in unused:
            tensor = self.parameters[name]
            costs.append(
                NodeCost(
                    name=_owner(name),
                    node="",
                    kind="unused",
                    parameters=tensor.numel(),
                    parameter_bytes=_bytes([tensor]),
                )
            )
        return costs, [Uncounted(op=op, count=len(where), where=tuple(where)) for op, where in unknown.items()]

    def dtypes(self) -> dict[str, int]:
        """Number of parameters by dtype; tied ones once."""
        found: dict[str, int] = defaultdict(int)
        for tensor in {id(t): t for t in self.parameters.values()}.values():
            found[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        return dict(found)

    def _parts(self, node: fx.Node, cost: NodeCost) -> list[NodeCost]:
        """Attention as its two products, which shrink on their own, and so several pairs of an einsum; anything else as it is."""
        if cost.kind in ("einsum", "bilinear") and len(each := pair_macs(self._call(node))) > 1:
            first = replace(cost, node=f"{node.name}:1", macs=each[0])
            alone = replace(cost, parameters=0, parameter_bytes=0, activation_bytes=0)
            return [first, *(replace(alone, node=f"{node.name}:{n}", macs=m) for n, m in enumerate(each[1:], start=2))]
        if cost.kind != "scaled_dot_product_attention":
            return [cost]
        scores, values = attention_parts(self._call(node))
        first = replace(cost, node=f"{node.name}:scores", macs=scores, activation_bytes=0)
        return [first, replace(cost, node=f"{node.name}:values", macs=values, parameters=0, parameter_bytes=0)]

    def _call(self, node: fx.Node) -> Call:
        out = self._output_shape(node)
        return Call(node=node, arguments=bound(node), shape_of=self.shape, weight_of=self._weight, out=out)

    def _macs(self, node: fx.Node, unknown: dict[str, list[str]]) -> tuple[int, tuple[str, ...]]:
        op = op_name(node)
        count = COUNTED.get(op)
        if count is None:
            if op not in ZERO:
                unknown[op].append(_where(node))
            return 0, ()
        if any(_is_unbacked(n.meta.get("val")) for n in (node, *node.all_input_nodes)):
            unknown[f"{op} of a size that depends on data"].append(_where(node))
        return count(self._call(node))

    def _weight(self, node: Any) -> str | None:
        return self.whole.get(node) if isinstance(node, fx.Node) else None

    def _output_shape(self, node: fx.Node) -> Shape:
        first = next((t for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)), None)
        return self.shape(first)

    def _owners(self) -> tuple[dict[fx.Node, list[str]], list[str]]:
        """Which node is the first to read which parameter, through views; and the parameters that none reads."""
        owners: dict[fx.Node, list[str]] = defaultdict(list)
        seen: set[int] = set()
        waiting: dict[str, fx.Node] = {}
        for node in self.graph.graph.nodes:
            if node.op != "call_function" or _is_symbolic(node):
                continue
            for read in node.all_input_nodes:
                name = self.whole.get(read)
                if name is None or id(self.parameters[name]) in seen:
                    continue
                if node in self.whole:
                    waiting.setdefault(name, node)
                    continue
                seen.add(id(self.parameters[name]))
                owners[node].append(name)
        for name, node in waiting.items():  # only ever viewed, as by an output
            if id(self.parameters[name]) not in seen:
                seen.add(id(self.parameters[name]))
                owners[node].append(name)
        unused = []
        for name, tensor in self.parameters.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                unused.append(name)
        return owners, unused

    def _name(self, node: fx.Node, parameters: tuple[str, ...]) -> str:
        if parameters:
            return _owner(parameters[0])
        path = module_path(node)
        return path if path and path != _NO_MODULE else node.name


def _owner(parameter: str) -> str:
    """Module that holds a parameter; the parameter itself where that is the root."""
    return parameter.rpartition(".")[0] or parameter


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _where(node: fx.Node) -> str:
    line = source_line(node)
    return f"{node.name} ({line})" if line else node.name


def _returns_its_input(node: fx.Node, old: Any, new: Any) -> bool:
    """Whether an op whose schema knows of no view gives back its input."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return False
    op = op_name(node)
    if op in _NO_OP_IN_EVAL:
        return not bound(node).get("train")
    return op in _VIEW_IF_SAME_DTYPE and old.dtype == new.dtype


def _is_symbolic(node: fx.Node) -> bool:
    """Arithmetic on sizes, and taking an item: no work."""
    module = getattr(node.target, "__module__", "") or ""
    return module in _SYMBOLIC or getattr(node.target, "__name__", "").startswith("sym_")


def _is_unbacked(value: Any) -> bool:
    lengths: list[Any] = [d for t in pytree.tree_leaves(value) if isinstance(t, Tensor) for d in t.shape]
    symbols = {s for d in lengths if isinstance(d, torch.SymInt) for s in d.node.expr.free_symbols}
    return any(str(s).startswith("u") for s in symbols)
