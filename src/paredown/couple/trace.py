"""Trace: run a program's graph on ids, one rule per op; what has no rule pins what reaches it."""

from __future__ import annotations

import operator
import weakref
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from paredown.couple import growing
from paredown.couple.computed import Computed, find
from paredown.couple.ids import FIXED, IdForest, along, compact, fixed, laid, tidy, varying
from paredown.couple.space import Role
from paredown.program import Program, placeholder_names, source_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Ids that may not be removed, and why."""

    ids: Tensor
    reason: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A placeholder that holds a parameter, buffer or constant, possibly seen through transposes."""

    name: str
    shape: tuple[int, ...]
    """As seen."""
    axes: tuple[int, ...]
    """Position i as seen is this axis of the stored tensor."""
    starts: tuple[int, ...] = ()
    """Where the part that is seen begins along each axis as seen; empty for all of it."""
    picked: tuple[tuple[int, int], ...] = ()
    """Axes of the stored tensor of which one position is seen, and which."""

    @property
    def is_part(self) -> bool:
        """Whether this is not all of the stored tensor."""
        return bool(self.starts or self.picked)


_ONE_NUMBER = growing.ONE_NUMBER
_SAME = frozenset(("to", "_to_copy", "clone", "detach", "contiguous"))

_TRACES: weakref.WeakKeyDictionary[Program, Trace] = weakref.WeakKeyDictionary()
"""A trace must not refer to its program: as a value here it would keep it, and the weights, for ever."""


def trace(program: Program) -> Trace:
    """The trace of a program; made once, since both are immutable."""
    if program not in _TRACES:
        run = Trace(program)
        if run.has_stacks:
            run = max((run, Trace(program, stacks=True)), key=_free_positions)  # of equals the first
        run = _grown_along(program, run)
        if run.keeps_tables:
            run = max((run, run.again(program, whole_tables=False)), key=_free_positions)
        if run.crossed:
            run = max((run, _grown_along(program, run.again(program, plain=run.crossed))), key=_free_positions)
        _TRACES[program] = run
    return _TRACES[program]


def _grown_along(program: Program, run: Trace) -> Trace:
    """The best of this run and those in which constants that met channels leave with them: those that were met as they are
    first, then those behind a view or an expand as well."""
    first = run
    for grown in (first.stiff, {**first.loose, **first.stiff}):
        if grown and grown != run.grown:
            run = max((run, run.again(program, grown=grown)), key=_free_positions)
    return run


def lockstep(program: Program) -> Trace | None:
    """The trace in which tables that several heads share leave with their channels, where `trace` is another."""
    run = trace(program)
    return run.again(program, whole_tables=False) if run.keeps_tables else None


def _free_positions(run: Trace) -> int:
    """How many positions of all parameter axes may leave; of tables a tenth more, since whole heads are what people remove."""
    from paredown.couple.assemble import parameter_axes, pinned_roots  # which are about finished traces

    pins, axes = list(run.pins), parameter_axes(run)
    fixed_roots = np.array([FIXED, *pinned_roots(run, axes)])
    run.pins[:] = pins
    free = sum(int((~np.isin(a.classes, fixed_roots)).sum()) for a in axes)
    return free + free // 10 if run.keeps_tables else free


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed:
    """A product of activations sums over channels: removed ones are read there, not by a weight."""

    operand: fx.Node
    axis: int
    ids: Tensor
    """Along that axis of the operand."""


class Trace:
    """One run of both graphs on ids over one forest: ids per node, real values of constants, pins, deferred checks.

    The train graph is run as well: it may read channels that the eval graph does not (auxiliary heads).
    """

    def __init__(
        self,
        program: Program,
        *,
        whole_tables: bool = True,
        grown: Mapping[fx.Node, int] | None = None,
        stacks: bool = False,
        plain: Collection[str] = (),
    ) -> None:
        self.stacks, self.has_stacks = stacks, False
        """Whether matrices stacked in one parameter are weights, with one set of channels for all; whether there are any."""
        self.whole_tables, self.grown, self.plain = whole_tables, dict(grown or {}), frozenset(plain)
        """Whether a table that several heads share stays as it is, so that heads can leave; constants of one number (the
        zeros that a recurrent state begins with) → the axis along which they have channels; and saved tensors that are numbers
        and no channels, whatever they meet."""
        self.stiff: dict[fx.Node, int] = {}  # such constants that met channels as they are, and where
        self.loose: dict[fx.Node, int] = {}
        """And those from which what met channels was made, by views and sums of fixed values."""
        self.forest = IdForest()
        self.ids: dict[fx.Node, Any] = {}
        """Id tensor (or nested tuple of them, or int for sizes) of each node."""
        self.values: dict[fx.Node, Tensor] = {}
        """Constants computed for real."""
        self.parameters: dict[fx.Node, Parameter] = {}
        self.pieces: dict[fx.Node, tuple[Parameter, ...]] = {}
        """What split and chunk cut a weight into."""
        self.weights: dict[str, dict[int, Tensor]] = {}
        """Parameters used as weights: ids along an axis. Name is that of the storage."""
        self.raw: dict[str, Tensor] = {}
        """Parameters used element by element: ids of every element."""
        self.roles: dict[tuple[str, int], Role] = {}
        self.pins: list[Pin] = []
        self.unknown: Counter[str] = Counter()
        self.products: dict[str, list[Tensor]] = {}
        self.heads: list[Tensor] = []
        self.norms: dict[fx.Node, Tensor] = {}
        """Norms over a channel axis: ids of what is normalised together."""
        self.filled: list[Tensor] = []
        """Channels that padding made of a number other than zero: no weight writes them, and yet they are read."""
        self.summed: dict[fx.Node, Summed] = {}
        self.computed: dict[fx.Node, Computed] = {}
        """Weights of convolutions that are computed from a parameter of their shape."""
        self.lanes: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        """What lies between: ids of the channels that such a weight writes, and of those that it reads."""
        self.instead: dict[fx.Node, Tensor] = {}
        """Ids of parameters while a lane is run."""
        self._learned: set[int] = set()
        """Origins of the ids of parameters that are read element by element."""
        self._saved: dict[int, str] = {}
        """Origins of the ids of buffers that are read element by element → which."""
        # crossed: saved tensors that met channels along another axis, as a mask that was expanded to all heads
        self._kept, self.crossed = False, set[str]()
        self._tables, self._chunks = list[Tensor](), list[Tensor]()
        self._fragile: list[tuple[Tensor, int, Tensor, str, str]] = []
        self.storage = _storages(program.state)
        """Every name → the first name of the same storage."""
        self._state = program.state
        self.node: fx.Node | None = None
        self._run_both(program)
        self._conflicts()
        self._settle()
        self._after_ties()

    def _after_ties(self) -> None:
        self._equal_chunks()
        self._check_fragile()
        self._pin_unwritten()

    def _run_both(self, program: Program) -> None:
        """The eval graph, whose MACs are counted, then the train graph."""
        self._run(program.eval_graph)
        products, unknown, self.unknown = dict(self.products), self.unknown, Counter[str]()
        self.eval_names = frozenset(self.weights.keys() | self.raw.keys())
        """Parameters that the eval graph uses."""
        if program.train_graph is not None:
            self._run(program.train_graph)
        self.products = products  # MACs are counted on the eval graph
        self.unknown |= unknown

    def again(
        self,
        program: Program,
        *,
        whole_tables: bool | None = None,
        grown: Mapping[fx.Node, int] | None = None,
        plain: Collection[str] | None = None,
    ) -> Trace:
        """Another run of the same program, of which one thing is different."""
        return Trace(
            program,
            whole_tables=self.whole_tables if whole_tables is None else whole_tables,
            grown=self.grown if grown is None else grown,
            stacks=self.stacks,
            plain=self.plain if plain is None else plain,
        )

    # ------------------------------------------------------------------------------------------------ what rules use

    def of(self, node: Any) -> Tensor:
        """The id tensor of an operand; a parameter becomes raw (an id for each element)."""
        if not isinstance(node, fx.Node):
            return fixed(())
        if node in self.instead:
            return self.instead[node]
        seen = self.parameters.get(node)
        if seen is None:
            value = self.ids[node]
            return value if isinstance(value, Tensor) else fixed(())
        ids = self._raw(seen.name)
        for axis, index in seen.picked:
            ids = ids.narrow(axis, index, 1)
        ids = ids.permute((*seen.axes, *(axis for axis, _ in seen.picked)))
        for axis, start in enumerate(seen.starts):
            ids = ids.narrow(axis, start, seen.shape[axis])
        return ids.reshape(seen.shape)

    def tie(self, a: Tensor, b: Tensor, why: str) -> None:
        """a[i] and b[i] live or die together; beside a fixed one the other is pinned. Shapes broadcast."""
        a, b = torch.broadcast_tensors(a, b)
        self.forest.unite(a, b)
        lone = ((a == FIXED) & (b != FIXED)) | ((b == FIXED) & (a != FIXED))
        if bool(lone.any()):
            self.pin(torch.where(a != FIXED, a, b)[lone], why)

    def pin(self, ids: Tensor, reason: str) -> None:
        """These ids may not be removed."""
        ids = compact(ids).reshape(-1).unique()
        ids = ids[ids != FIXED]
        if len(ids):
            self.pins.append(Pin(ids=ids, reason=reason, where=self.where()))

    def where(self) -> str:
        """The node at hand and the user's line."""
        if self.node is None:
            return ""
        line = source_line(self.node)
        return f"{self.node.name} ({line})" if line else self.node.name

    def vector(self, ids: Tensor, axis: int, why: str) -> Tensor:
        """Ids along an axis; where they differ across the other axes they are tied. Shape [length]."""
        ids = self.forest.canon(ids)
        if any(a != axis % ids.dim() for a in varying(ids)):
            first = along(ids, axis)
            view = [1] * ids.dim()
            view[axis] = -1
            self.tie(compact(ids), first.reshape(view), why)
            ids = self.forest.canon(ids)
        return along(ids, axis)

    def weight(self, node: fx.Node, axis: int, role: Role) -> Tensor:
        """Ids along an axis (as seen) of a parameter used as a weight; made on first use."""
        seen = self.parameters[node]
        name, stored = self.storage[seen.name], seen.axes[axis]
        axes = self.weights.setdefault(name, {})
        if stored not in axes:
            axes[stored] = self.forest.fresh(self._state[name].shape[stored])
        key = (name, stored)
        self.roles[key] = "read" if "read" in (role, self.roles.get(key)) else "write"
        return self.seen_part(seen, axis)

    def seen_part(self, seen: Parameter, axis: int) -> Tensor:
        """Ids along an axis of what is seen of a parameter that is used as a weight; fixed where nothing is known. Shape [length]."""
        whole = self.weights.get(self.storage[seen.name], {}).get(seen.axes[axis])
        if whole is None:
            return fixed((seen.shape[axis],))
        return whole.narrow(0, seen.starts[axis], seen.shape[axis]) if seen.starts else whole

    def read(self, node: fx.Node, axis: int, ids: Tensor, why: str) -> None:
        """A weight axis consumes these channels."""
        seen = self.parameters[node]
        name, stored = self.storage[seen.name], seen.axes[axis]
        axes = self.weights.setdefault(name, {})
        if bool((ids == FIXED).all()):
            self.stiffen(1 - len(seen.shape), len(ids))  # channels lie before the kernel's axes, or last
        if stored not in axes and seen.starts and self._state[name].shape[stored] != len(ids):
            axes[stored] = self.forest.fresh(self._state[name].shape[stored])
        if stored in axes:
            self.tie(self.seen_part(seen, axis), ids, why)
        else:
            axes[stored] = ids
        self.roles[(name, stored)] = "read"

    def stiffen(self, axis: int, length: int) -> None:
        """Constants of one number that the node at hand reads and that are as long as channels along this axis, from the last."""
        for source in self.node.all_input_nodes if self.node is not None else ():
            node = source
            while node in self.values and op_name(node) in _SAME:
                node = node.all_input_nodes[0]
            value = self.values.get(node)
            if value is None or op_name(node) not in _ONE_NUMBER or value.dim() < -axis or value.shape[axis] != length:
                for made, along_axis in growing.candidates(self, source, length).items():
                    self.loose.setdefault(made, along_axis)
                continue
            if value.is_floating_point():  # whole numbers may be looked up by: as many are read as there are
                self.stiff.setdefault(node, axis % value.dim())

    def later(self, ids: Tensor, axis: int, at_stake: Tensor, reason: str) -> None:
        """If `ids` still vary along `axis` when all ties are known, pin `at_stake`."""
        self._fragile.append((compact(ids), axis % max(ids.dim(), 1), compact(at_stake), reason, self.where()))

    def are_heads(self, ids: Tensor) -> bool:
        """Whether some of these are rows that something tied whole."""
        if not self.heads:
            return False
        heads = np.unique(np.concatenate([numbers(self.forest, head).ravel() for head in self.heads]))
        mine = np.unique(numbers(self.forest, compact(ids)))
        return bool(np.isin(mine[mine != FIXED], heads).any())

    def is_saved(self, ids: Tensor) -> bool:
        """Whether all of these are elements of buffers to which no channel is tied (the oldest of a class is its root)."""
        return set(self.forest.origins(compact(self.forest.canon(ids))).unique().tolist()) <= self._saved.keys()

    def cross(self, ids: Tensor) -> None:
        """Remember the saved tensors whose elements these are, all of them."""
        if self.is_saved(ids):
            origins = self.forest.origins(compact(self.forest.canon(ids))).unique().tolist()
            self.crossed |= {self._saved[o] for o in origins}

    def are_elements(self, origins: Tensor) -> Tensor:
        """Which of these origins are parameters read element by element: a learned token is no head. Same shape, bool."""
        return torch.isin(origins, torch.tensor(sorted(self._learned), dtype=origins.dtype))

    def keep_table(self, ids: Tensor, reason: str) -> None:
        """A saved table of which nothing leaves."""
        self._kept = True
        self.pin(ids, reason)

    @property
    def keeps_tables(self) -> bool:
        """Whether there is such a table."""
        return self._kept

    def chunks(self, stacked: Tensor) -> None:
        """Pieces of one axis, stacked: kept equal where that leaves enough freedom."""
        self._chunks.append(compact(stacked))

    def table(self, ids: Tensor) -> None:
        """The survivors of this tensor must form a rectangle: remember it for settling."""
        if len(varying(ids)) > 1:
            self._tables.append(compact(ids))

    # -------------------------------------------------------------------------------------------------------- the run

    def _raw(self, name: str) -> Tensor:
        stored = self.storage[name]
        if stored not in self.raw:
            tensor = self._state[name]
            shape = tuple(tensor.shape)
            floating = tensor.is_floating_point() and tensor.dim() > 0 and stored not in self.plain
            if floating and isinstance(tensor, torch.nn.Parameter):
                self._learned.add(self.forest.next_origin)
            elif floating:
                self._saved[self.forest.next_origin] = stored
            ids = self.forest.fresh(tensor.numel()).reshape(shape) if floating else fixed(shape)
            self.raw[stored] = ids
            self.table(ids)
        return self.raw[stored]

    def _run(self, graph: ExportedProgram) -> None:
        from paredown.couple.operand import unknown  # rules are written over Trace
        from paredown.couple.rules import RULES
        from paredown.couple.shape import is_constant

        names = placeholder_names(graph)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, names.get(node.name))
        made = find(graph.graph, self.parameters)
        self.computed |= made
        later = {n for one in made.values() for n in one.between}
        for node in graph.graph.nodes:
            self.node = node
            if node in later:
                self.ids[node] = None  # see computed.follow
            elif node.op == "placeholder":
                continue
            elif node.op == "output":
                self._pin_outputs(node)
            elif node.op == "call_function":
                if node in self.grown:
                    self.ids[node] = self._grown(node)
                    continue
                if is_constant(node, self):
                    self._constant(node)
                    continue
                rule = RULES.get(op_name(node), unknown)
                self.ids[node] = out = rule(node, self)
                for leaf in pytree.tree_leaves(out):
                    if isinstance(leaf, Tensor):
                        self.table(leaf)
            elif node.op == "get_attr":
                self.ids[node] = None
        self.node = None

    def _placeholder(self, node: fx.Node, name: str | None) -> None:
        value = node.meta.get("val")
        if name is None:
            self.ids[node] = fixed(sizes(value)) if isinstance(value, torch.Tensor) else concrete(value)
            return
        tensor = self._state[name]
        if isinstance(tensor, Tensor):
            self.parameters[node] = Parameter(name=name, shape=tuple(tensor.shape), axes=tuple(range(tensor.dim())))
            if not tensor.is_floating_point() or self.storage[name] in self.plain:
                self.values[node] = tensor
        self.ids[node] = None

    def _constant(self, node: fx.Node) -> None:
        """Compute a node that depends on no activation and no learned number."""
        args = fx.node.map_arg(
            node.args, lambda n: self.values[n].clone() if n in self.parameters else self._scalar_or_value(n)
        )
        kwargs = fx.node.map_arg(
            node.kwargs, lambda n: self.values[n].clone() if n in self.parameters else self._scalar_or_value(n)
        )
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        out = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(out, Tensor):
            self.values[node] = out
            self.ids[node] = fixed(out.shape)
        elif isinstance(out, list | tuple) and all(isinstance(o, Tensor) for o in out):
            self.ids[node] = tuple(fixed(o.shape) for o in out)
            self.values[node] = out  # type: ignore[assignment]
        else:
            self.ids[node] = out

    def _grown(self, node: fx.Node) -> Tensor:
        shape, axis = sizes(node.meta["val"]), self.grown[node]
        return laid(self.forest.fresh(shape[axis]), axis, shape)

    def _scalar_or_value(self, node: fx.Node) -> Any:
        return self.values[node] if node in self.values else self.ids[node]

    def _pin_outputs(self, node: fx.Node) -> None:
        for leaf in pytree.tree_leaves(node.args):
            if isinstance(leaf, fx.Node) and isinstance(self.ids.get(leaf), Tensor):
                self.pin(self.ids[leaf], "model output")
            elif isinstance(leaf, fx.Node) and leaf in self.parameters:
                self.pin(self.of(leaf), "model output")

    def _pin_unwritten(self) -> None:
        """Channels of a grown constant that belong to no unit: only weights that read the constant would lose by them."""
        made = [w for n, axes in self.weights.items() for at, w in axes.items() if self.roles[(n, at)] == "write"]
        units = np.unique(
            np.concatenate([[FIXED], *(numbers(self.forest, t).ravel() for t in (*made, *self.raw.values()))])
        )
        for node in self.grown:
            ids = along(self.ids[node], self.grown[node])
            alone = torch.from_numpy(~np.isin(numbers(self.forest, ids), units))
            self.node = node
            self.pin(ids[alone], "a constant that no unit is combined with")
        self.node = None

    # ----------------------------------------------------------------------------------------------------- settlement

    def _settle(self) -> None:
        """Tie until the survivors of every tensor form a rectangle, whichever classes are removed.

        A table that varies along several axes is tied along all but the last: heads in lockstep where nothing tied
        whole heads before, tokens where a class token was put in front. Beside a fixed position a tie pins instead, so
        what is left of the variation never leaves; each axis is tied once.
        """
        for table in self._tables:
            ids, tied = self.forest.canon(table), set[int]()
            while open_axes := [a for a in varying(ids)[:-1] if a not in tied]:
                tied.add(open_axes[0])
                self.tie(ids, ids.narrow(open_axes[0], 0, 1), "beside a fixed position")
                ids = self.forest.canon(ids)

    def _equal_chunks(self) -> None:
        """Keep the pieces of a chunk equal, so that the user's own class can cut the pruned tensor again.

        Where that would cost units elsewhere too (a channel shuffle ties everything with everything), the pieces may
        differ: then only the graph realiser fits.
        """
        if not self._chunks:
            return
        before = self.forest.snapshot()
        expected = [self._num_classes(table) // table.shape[0] for table in self._chunks]
        for table in self._chunks:
            ids = self.forest.canon(table)
            if len(varying(ids)) > 1:
                self.tie(ids, ids.narrow(0, 0, 1), "cut into equal chunks")
        self._tables += self._chunks
        self._settle()
        if any(self._num_classes(table) < want * 3 // 4 for table, want in zip(self._chunks, expected, strict=True)):
            self.forest.restore(before)

    def _num_classes(self, ids: Tensor) -> int:
        return len(np.unique(numbers(self.forest, ids)))

    def _check_fragile(self) -> None:
        for ids, axis, at_stake, reason, where in self._fragile:
            if axis in varying(self.forest.canon(ids)):
                stake = at_stake.reshape(-1).unique()
                self.pins.append(Pin(ids=stake[stake != FIXED], reason=reason, where=where))

    def _conflicts(self) -> None:
        """A matrix used both as a weight and element by element cannot say what a channel of it is."""
        for name in self.weights.keys() & self.raw.keys():
            for ids in (*self.weights[name].values(), self.raw[name]):
                self.pin(ids, f"{name} is used as a weight and element by element")


def sizes(value: torch.Tensor) -> tuple[int, ...]:
    """Concrete sizes of a fake tensor: symbols by their hint."""
    return tuple(concrete(s) for s in value.shape)


def concrete(value: Any) -> Any:
    """A symbolic size as the number it had in the example."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value


def _storages(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name → the first name of the same storage."""
    first: dict[tuple[Any, ...], str] = {}
    return {
        name: first.setdefault((t.data_ptr(), tuple(t.shape), t.stride(), t.dtype) if t.numel() else (name,), name)
        for name, t in state.items()
    }


def op_name(node: fx.Node) -> str:
    """ "conv2d" for aten.conv2d.default; "operator.getitem" for Python operators."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::")
    if getattr(target, "__module__", "") in ("_operator", "math", "builtins") or target is operator.getitem:
        return f"operator.{getattr(target, '__name__', target)}"
    return str(getattr(target, "__name__", target))


def numbers(forest: IdForest, ids: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Roots of a vector of ids as a numpy array."""
    return forest.find(np.ascontiguousarray(tidy(ids).numpy()))
