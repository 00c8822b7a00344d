"""The graph realiser: rewrite every size constant of both graphs, then build a module from them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from paredown.couple import recurrent
from paredown.couple.operand import args_of, schema
from paredown.couple.trace import concrete, op_name
from paredown.errors import UsageError
from paredown.program import GraphModel, Program
from paredown.prune.removal import Removal, own, slice_state

Rewrite = Callable[[fx.Node, fx.Node, Removal], None]


def realise_graph(program: Program, removal: Removal) -> GraphModel:
    """A module rebuilt from the exported graphs, without what leaves. Names of parameters stay."""
    state = own(slice_state(program.state, removal.trace.storage, removal.keep), program.state)
    body = rewritten(program.eval_graph.graph_module, removal)
    train_body = rewritten(program.train_graph.graph_module, removal) if program.train_graph is not None else None
    return GraphModel(program.eval_graph, program.train_graph, state, bodies=(body, train_body)).eval()


def rewritten(gm: fx.GraphModule, removal: Removal) -> fx.GraphModule:
    """A copy of a graph in which every size constant is what survives of it."""
    return rewritten_nodes(gm, removal)[0]


def rewritten_nodes(gm: fx.GraphModule, removal: Removal) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """The same, with the node of the copy for each node of the original."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for node, copied in copies.items():
        rewrite = REWRITES.get(op_name(node)) if node.op == "call_function" else None
        if rewrite is not None:
            rewrite(node, copied, removal)
    out = fx.GraphModule(gm, graph)
    out.graph.lint()
    return out, copies


def _set(node: fx.Node, name: str, value: Any) -> None:
    """Replace one argument, wherever it was given."""
    position = [a.name for a in schema(node).arguments].index(name)
    if position < len(node.args):
        node.args = (*node.args[:position], value, *node.args[position + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: value}


def _ids(node: Any, removal: Removal) -> Tensor:
    return removal.trace.of(node)


def _sizes(argument: str) -> Rewrite:
    """view, reshape, expand: each size becomes what survives along its axis; symbolic ones are scaled."""

    def rewrite(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
        lanes = removal.trace.lanes.get(node) or (_ids(node, removal),)
        new = [min(sizes) for sizes in zip(*(removal.shape(ids) for ids in lanes), strict=True)]
        old = list(lanes[0].shape)
        if new != old:
            _set(copied, argument, _scaled(copied, args_of(copied, argument)[0], old, new))

    return rewrite


def _scaled(copied: fx.Node, sizes: Any, old: list[int], new: list[int]) -> list[Any]:
    out = []
    for size, before, after in zip(sizes, old, new, strict=True):
        if before == after or size == -1:
            out.append(size)
        elif isinstance(size, fx.Node):
            common = math.gcd(before, after)
            with copied.graph.inserting_before(copied):
                more = copied.graph.call_function(operator.mul, (size, after // common))
                out.append(copied.graph.call_function(operator.floordiv, (more, before // common)))
        else:
            out.append(after)
    return out


def _unflatten(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
    ids = _ids(node, removal)
    new, old = removal.shape(ids), list(ids.shape)
    axis, parts = args_of(node, "dim", "sizes")
    start = int(axis) % (len(old) - len(parts) + 1)
    stop = start + len(parts)
    if new[start:stop] != old[start:stop]:
        _set(copied, "sizes", _scaled(copied, args_of(copied, "sizes")[0], old[start:stop], new[start:stop]))


def _slice(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
    source: Any = node.args[0]
    axis, start, end, step = args_of(node, "dim", "start", "end", "step")
    alive = removal.positions(source, int(axis or 0) % source.meta["val"].dim())
    if bool(alive.all()) or step not in (None, 1):  # x[1::2]: whole pairs leave, the place in each stays
        return
    count = len(alive)
    for name, bound in (("start", start), ("end", end)):
        at = removal.trace.ids[bound] if isinstance(bound, fx.Node) else bound
        if isinstance(at, int) and 0 < (at + count if at < 0 else at) < count:
            _set(copied, name, int(alive[: at + count if at < 0 else at].sum()))


def _narrow(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
    source: Any = node.args[0]
    axis, start, length = (int(v) for v in args_of(node, "dim", "start", "length"))
    alive = removal.positions(source, axis % source.meta["val"].dim())
    if not bool(alive.all()):
        start = start % len(alive)
        _set(copied, "start", int(alive[:start].sum()))
        _set(copied, "length", int(alive[start : start + length].sum()))


def _pieces(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
    """split, chunk and their kin: the pieces' own surviving sizes."""
    values: Any = node.meta["val"]
    axis = int(args_of(node, "dim")[0]) % values[0].dim()
    old = [concrete(v.shape[axis]) for v in values]
    if node in removal.trace.pieces:
        source: Any = node.args[0]
        new = [int(part.sum()) for part in removal.positions(source, axis).split(old)]
    else:
        out: Any = removal.trace.ids[node]
        new = [removal.shape(p)[axis] for p in out]
    if new != old:
        copied.target = torch.ops.aten.split_with_sizes.default
        copied.args, copied.kwargs = (copied.args[0], new, axis), {}


def _convolution(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
    groups = conv_groups(node, removal)
    if groups is not None:
        _set(copied, "groups", groups)


def conv_groups(node: fx.Node, removal: Removal) -> int | None:
    """The new number of groups of a convolution, None where it stays: depthwise ones lose groups."""
    source, weight, groups = args_of(node, "input", "weight", "groups")
    made = removal.trace.computed.get(weight)
    weight = weight if made is None else made.parameter
    if weight not in removal.trace.parameters or int(groups) == 1:
        return None
    shape = removal.trace.parameters[weight].shape
    transposed = "transpose" in op_name(node)
    if shape[1] != 1 or (transposed and shape[0] != groups):
        return None
    ids = _ids(source, removal)
    alive = removal.survivors(ids, ids.dim() - (len(shape) - 2) - 1)
    return None if bool(alive.all()) else int(alive.sum())


def _last_norm(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
    ids = _ids(node, removal)
    over = len(node.args[1])  # type: ignore[arg-type]
    new = removal.shape(ids)[ids.dim() - over :]
    if new != list(ids.shape[ids.dim() - over :]):
        _set(copied, "normalized_shape", new)


def _group_norm(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
    groups = norm_groups(node, removal)
    if groups is not None:
        _set(copied, "num_groups", groups)


def norm_groups(node: fx.Node, removal: Removal) -> int | None:
    """The new number of groups of a group norm, None where it stays: one channel per group follows the channels."""
    ids = _ids(node.args[0], removal)
    groups = int(args_of(node, "num_groups")[0])
    alive = removal.survivors(ids, 1)
    return int(alive.sum()) if groups == len(alive) and not bool(alive.all()) else None


def _pad(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
    """Padding of channels: as many as survive of those that it makes (or crops)."""
    source, out = _ids(node.args[0], removal), _ids(node, removal)
    pads = list(copied.args[1])  # type: ignore[arg-type]
    changed = False
    for i in range(len(pads) // 2):
        axis = out.dim() - 1 - i
        made, had = removal.survivors(out, axis), removal.survivors(source, axis)
        for at, first in ((2 * i, True), (2 * i + 1, False)):
            count = removal.trace.ids[pads[at]] if isinstance(pads[at], fx.Node) else int(pads[at])
            if count == 0 or (bool(made.all()) and bool(had.all())):
                continue
            pool, sign = (made, 1) if count > 0 else (had, -1)
            edge = pool[: abs(count)] if first else pool[len(pool) - abs(count) :]
            pads[at] = sign * int(edge.sum())
            changed = True
    if changed:
        copied.args = (copied.args[0], pads, *copied.args[2:])


def _attention(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
    """The default scale 1/√d is that of the dense head."""
    queries = _ids(node.args[0], removal)
    if args_of(node, "scale")[0] is None and removal.shape(queries)[-1] != queries.shape[-1]:
        copied.kwargs = {**copied.kwargs, "scale": 1.0 / math.sqrt(queries.shape[-1])}


def _squeeze(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
    """squeeze drops axes of length 1: name those that the dense model dropped, or a channel axis cut to 1 would go too."""
    shape = [concrete(s) for s in node.args[0].meta["val"].shape]  # type: ignore[union-attr]
    asked: Any = node.args[1] if len(node.args) > 1 else range(len(shape))
    axes = [int(a) % max(len(shape), 1) for a in ([asked] if isinstance(asked, int) else asked)]
    copied.target = torch.ops.aten.squeeze.dims
    copied.args, copied.kwargs = (copied.args[0], [a for a in axes if shape[a] == 1]), {}


def _repeat_interleave(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
    if node.kwargs.get("output_size") is not None:
        copied.kwargs = {k: v for k, v in copied.kwargs.items() if k != "output_size"}


def _recurrent(node: fx.Node, copied: fx.Node, removal: Removal) -> None:
    """A constant initial state is as long as the units that survive; a projection must not become as long."""
    out = removal.trace.ids[node]
    every = [out] if isinstance(out, Tensor) else list(out) if op_name(node).endswith("cell") else list(out[1:])
    new = [removal.shape(ids)[-1] for ids in every]
    old = [ids.shape[-1] for ids in every]
    if len(set(new)) != len(set(old)):
        msg = f"an LSTM with projections must keep a hidden size other than its proj_size. Got {new[1]} for both at {node.name}."
        raise UsageError(msg)
    place = [a.name for a in schema(node).arguments].index("hx")
    states: Any = node.args[place]
    states = list(states) if isinstance(states, list | tuple) else [states]
    mine: Any = copied.args[place]
    cut = list(mine) if isinstance(mine, list | tuple) else [mine]
    for at, (state, before, after) in enumerate(zip(states, old, new, strict=True)):
        if before != after and state in removal.trace.values:
            with copied.graph.inserting_before(copied):
                cut[at] = copied.graph.call_function(torch.ops.aten.slice.Tensor, (cut[at], -1, 0, after))
    _set(copied, "hx", cut if isinstance(mine, list | tuple) else cut[0])


REWRITES: dict[str, Rewrite] = {
    "view": _sizes("size"),
    "_unsafe_view": _sizes("size"),
    "reshape": _sizes("shape"),
    "expand": _sizes("size"),
    **dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), _sizes("size")),
    "broadcast_to": _sizes("size"),
    "unflatten": _unflatten,
    "slice": _slice,
    "narrow": _narrow,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _pieces),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution
    ),
    "layer_norm": _last_norm,
    "rms_norm": _last_norm,
    "group_norm": _group_norm,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(recurrent.RULES, _recurrent),
    "squeeze": _squeeze,
    "repeat_interleave": _repeat_interleave,
}
