"""Uses: where the eval graph multiplies an activation by a parameter, and which rows of it, in what walk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.couple.operand import args_of
from paredown.couple.trace import concrete, op_name, sizes
from paredown.program import Program, placeholder_names

CONVOLUTIONS = {"conv1d": 1, "conv2d": 2, "conv3d": 3}
TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
_SAME_PLACE = frozenset(
    "mul div sub add batch_norm layer_norm to _to_copy clone contiguous detach alias type_as float".split()
)
"""Ops that may change a weight's values but not their places: a weight that is standardised or scaled."""
_VIEWS = frozenset("t transpose permute view split split_with_sizes chunk getitem slice select unbind".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How a convolution walks along one axis, in positions."""

    kernel: int
    stride: int
    before: int
    """Padding before the first position."""
    after: int
    dilation: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Use:
    """One node that multiplies an activation by (rows of) a parameter."""

    parameter: str
    node: fx.Node
    source: fx.Node
    """What the weight is multiplied with."""
    weight: fx.Node
    """The parameter as it is used: itself, or what was made of it."""
    rows: tuple[int, int]
    """Outputs of the parameter that this node computes: [first, last + 1)."""
    shape: tuple[int, ...]
    """Of the parameter."""
    flipped: bool
    """Whether the parameter is stored with its inputs along axis 0: [in, out], as transposed convolutions are."""
    groups: int = 1
    spatial: int = 0
    """Axes that a convolution walks along; 0 for a linear layer."""
    window: tuple[Window, ...] = ()
    axis: int = -1
    """Of the inputs in `source`; for convolutions 1 with a batch axis, 0 without."""

    @property
    def width(self) -> int:
        """Outputs of the parameter."""
        if not self.flipped:
            return self.shape[0]
        return self.shape[1] * self.groups if self.spatial else math.prod(self.shape[1:])

    @property
    def length(self) -> int:
        """Inputs K of one group in the matrix view."""
        return self.shape[0] // self.groups if self.flipped else math.prod(self.shape[1:])


def find_uses(program: Program, parameters: Iterable[str]) -> dict[str, list[Use]]:
    """Every linear layer, product and convolution that reads these parameters, in graph order.

    A parameter may be read through views, slices, transposes and what scales or standardises it. Tied names are one.
    Parameters that no such node reads (embeddings, norms, recurrent cells) have an empty list.
    """
    wanted = list(parameters)
    by_tensor = {id(program.state[name]): name for name in reversed(wanted) if name in program.state}
    names = placeholder_names(program.eval_graph)
    places: dict[fx.Node, tuple[str, Any]] = {}
    found: dict[str, list[Use]] = {name: [] for name in wanted}
    for node in program.eval_graph.graph_module.graph.nodes:
        if node.op == "placeholder":
            name = by_tensor.get(id(program.state[names[node.name]])) if node.name in names else None
            if name is not None:
                tensor = program.state[name]
                places[node] = (name, torch.arange(tensor.numel()).reshape(tensor.shape))
        elif node.op == "call_function":
            use = _use(node, places, program)
            if use is not None:
                found[use.parameter].append(use)
            else:
                _follow(node, places)
    for name in wanted:  # other names of a tied tensor
        first = by_tensor.get(id(program.state[name])) if name in program.state else None
        if first is not None and first != name:
            found[name] = found[first]
    return found


def read_as_it_is(use: Use) -> bool:
    """Whether a layer reads a parameter itself or views of it: a change in place is seen by it."""
    node = use.weight
    while node.op != "placeholder":
        inputs = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor | tuple | list)]
        if op_name(node) not in _VIEWS or len(inputs) != 1:
            return False
        node = inputs[0]
    return True


def _follow(node: fx.Node, places: dict[fx.Node, tuple[str, Any]]) -> None:
    """Where a weight's elements lie after an op, as indices into the parameter; None where it cannot be told."""
    origins = [n for n in node.all_input_nodes if n in places]
    if not origins:
        return
    name, held = places[origins[0]]
    if len(origins) > 1 and op_name(node) not in _SAME_PLACE:
        return
    value = node.meta.get("val")
    if op_name(node) in _SAME_PLACE:
        if isinstance(held, Tensor) and isinstance(value, Tensor) and sizes(value) == tuple(held.shape):
            places[node] = (name, held)
        return
    others = [n for n in node.all_input_nodes if n is not origins[0]]
    if any(isinstance(n.meta.get("val"), Tensor) for n in others):
        return
    try:
        args = pytree.tree_map(lambda a: _known(a, places), (node.args, node.kwargs))
        moved = node.target(*args[0], **args[1])  # type: ignore[operator]
    except Exception:  # an op that integers cannot go through: the weight is not followed beyond it
        return
    leaves = [t for t in pytree.tree_leaves(moved) if isinstance(t, Tensor)]
    if leaves and all(t.dtype == torch.int64 for t in leaves):
        places[node] = (name, moved)


def _known(value: Any, places: dict[fx.Node, tuple[str, Any]]) -> Any:
    if not isinstance(value, fx.Node):
        return value
    if value in places:
        return places[value][1]
    return concrete(value.meta.get("val"))  # int() of a symbol would fix the program's batch for ever


def _use(node: fx.Node, places: dict[fx.Node, tuple[str, Any]], program: Program) -> Use | None:
    name = op_name(node)
    if name in CONVOLUTIONS or name in TRANSPOSED:
        return _convolution(node, places, program)
    if name == "linear":
        source, weight = args_of(node, "input", "weight")
        return _product(node, source, weight, places, program, rows_first=True)
    if name in ("matmul", "mm", "addmm"):
        arguments = args_of(node, "mat1", "mat2") if name == "addmm" else list(node.args[:2])
        left, right = arguments
        if right in places:
            return _product(node, left, right, places, program, rows_first=False)
        if left in places:
            return _product(node, right, left, places, program, rows_first=True, axis=-2)
    return None


def _product(
    node: fx.Node,
    source: Any,
    weight: Any,
    places: dict[fx.Node, tuple[str, Any]],
    program: Program,
    *,
    rows_first: bool,
    axis: int = -1,
) -> Use | None:
    """A product with a weight of two axes; `rows_first` where its outputs lie along axis 0 as it is used."""
    if weight not in places or not isinstance(source, fx.Node):
        return None
    parameter, held = places[weight]
    if not isinstance(held, Tensor) or held.dim() != 2 or held.numel() == 0:
        return None
    shape = tuple(program.state[parameter].shape)
    matrix = held if rows_first else held.T  # [outputs, inputs] of indices into the parameter
    dims = source.meta["val"].dim()
    if dims == 1:
        axis = -1
    inner = math.prod(shape[1:])
    rows, columns = matrix // inner, matrix % inner
    if len(shape) >= 2 and matrix.shape[1] == inner and _is_block(rows, columns):
        first = int(rows[0, 0])
        return Use(
            parameter=parameter, node=node, source=source, weight=weight, rows=(first, first + len(rows)), shape=shape, flipped=False, axis=axis
        )  # fmt: skip
    if len(shape) >= 2 and matrix.shape[1] == shape[0] and _is_block(columns.T, rows.T, transposed=True):
        first = int(columns[0, 0])
        return Use(
            parameter=parameter, node=node, source=source, weight=weight, rows=(first, first + len(rows)), shape=shape, flipped=True, axis=axis
        )  # fmt: skip
    return None


def _is_block(rows: Tensor, columns: Tensor, *, transposed: bool = False) -> bool:
    """Whether consecutive whole rows (or, transposed, consecutive columns over all rows) are read in their order."""
    if transposed:  # rows, columns: [inputs, outputs]
        across = torch.arange(rows.shape[1]) + rows[0, 0]
        return bool((rows == across).all()) and bool((columns == torch.arange(rows.shape[0])[:, None]).all())
    down = torch.arange(len(rows))[:, None] + rows[0, 0]
    return bool((rows == down).all()) and bool((columns == torch.arange(rows.shape[1])).all())


def _convolution(node: fx.Node, places: dict[fx.Node, tuple[str, Any]], program: Program) -> Use | None:
    source, weight, groups = args_of(node, "input", "weight", "groups")
    if weight not in places or not isinstance(source, fx.Node):
        return None
    parameter, held = places[weight]
    shape = tuple(program.state[parameter].shape)
    whole = torch.arange(math.prod(shape))
    if not isinstance(held, Tensor) or held.numel() != len(whole) or not torch.equal(held.reshape(-1), whole):
        return None
    name = op_name(node)
    spatial = CONVOLUTIONS.get(name) or TRANSPOSED[name]
    kernel = tuple(int(k) for k in held.shape[2:])
    width = int(held.shape[1]) * int(groups) if name in TRANSPOSED else int(held.shape[0])
    return Use(
        parameter=parameter,
        node=node,
        source=source,
        weight=weight,
        rows=(0, width),
        shape=tuple(held.shape),
        flipped=name in TRANSPOSED,
        groups=int(groups),
        spatial=spatial,
        window=() if name in TRANSPOSED else window_of(node, kernel),
        axis=source.meta["val"].dim() - spatial - 1,
    )


def window_of(node: fx.Node, kernel: tuple[int, ...]) -> tuple[Window, ...]:
    """How a convolution with that kernel walks, axis by axis."""
    stride, padding, dilation = args_of(node, "stride", "padding", "dilation")
    strides, dilations = _per_axis(stride, len(kernel)), _per_axis(dilation, len(kernel))
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilations, strict=True)]
        edges = [(total // 2, total - total // 2) for total in totals]
    else:
        edges = [(p, p) for p in _per_axis(padding, len(kernel))]
    return tuple(
        Window(kernel=k, stride=s, before=before, after=after, dilation=d)
        for k, s, (before, after), d in zip(kernel, strides, edges, dilations, strict=True)
    )


def _per_axis(value: Any, count: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * count if len(values) == 1 else values
