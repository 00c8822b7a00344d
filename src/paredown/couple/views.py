"""Parts of a matrix that serve as weights by themselves: a packed projection that the forward cuts up.

nn.MultiheadAttention with other keys than queries multiplies by the first third of its weight and by the rest of it;
a recurrent layer by hand has one matrix for all gates. Each part is a window on the axes of the whole.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import fx

from paredown.couple.operand import args_of

if TYPE_CHECKING:
    from paredown.couple.trace import Parameter, Trace

_CUTS = frozenset(("split", "split_with_sizes", "chunk", "slice", "narrow"))
_PICKS = frozenset(("select", "unbind"))
_MOVES = frozenset(("permute", "transpose", "t", "numpy_T", "swapdims", "adjoint", "mT", "operator.getitem"))
_PRODUCTS = frozenset(("linear", "matmul", "mm", "bmm", "addmm", "baddbmm"))


def cut(node: fx.Node, trace: Trace) -> bool:
    """Whether the node cuts a matrix (or a stack of them) into parts that are all read as weights; they are then known as such."""
    from paredown.couple.trace import op_name, sizes

    source: Any = node.args[0]
    name, seen = op_name(node), trace.parameters.get(source)
    if seen is None or name not in _CUTS | _PICKS or source in trace.values:
        return False
    dims = len(seen.shape)
    if dims not in (2, 3) or (name in _PICKS and dims == 2) or not _weights_only(node, source):
        return False
    trace.has_stacks |= dims == 3
    if (dims == 3 and not trace.stacks) or trace.storage[seen.name] in trace.raw:
        return False
    if name == "slice" and args_of(node, "step")[0] not in (None, 1):
        return False
    axis = int(args_of(node, "dim")[0]) % dims
    value = node.meta["val"]
    several = isinstance(value, list | tuple)
    at = 0 if several else _start(node, trace, seen.shape[axis])
    parts = []
    for one in value if several else (value,):
        if name in _PICKS:
            parts.append(_picked(seen, axis, at))
            at += 1
            continue
        starts, shape = list(seen.starts or (0,) * dims), sizes(one)
        starts[axis] += at
        at += shape[axis]
        parts.append(dataclasses.replace(seen, shape=shape, starts=tuple(starts)))
    if several:
        trace.pieces[node] = tuple(parts)
    else:
        trace.parameters[node] = parts[0]
    return True


def _picked(seen: Parameter, axis: int, index: int) -> Parameter:
    """One matrix of a stack."""
    without = [i for i in range(len(seen.shape)) if i != axis]
    at = index + (seen.starts[axis] if seen.starts else 0)
    return dataclasses.replace(
        seen,
        shape=tuple(seen.shape[i] for i in without),
        axes=tuple(seen.axes[i] for i in without),
        starts=tuple(seen.starts[i] for i in without) if seen.starts else (),
        picked=(*seen.picked, (seen.axes[axis], at)),
    )


def _start(node: fx.Node, trace: Trace, length: int) -> int:
    """Where the part begins along the axis."""
    from paredown.couple.trace import op_name

    given: Any = args_of(node, "index" if op_name(node) == "select" else "start")[0] or 0
    start = int(trace.ids[given] if isinstance(given, fx.Node) else given)
    return max(start + length, 0) if start < 0 else min(start, length)


def _weights_only(node: fx.Node, source: fx.Node) -> bool:
    """Whether all that comes of it is multiplied by, as the second operand."""
    from paredown.couple.trace import op_name

    for user in node.users:
        name = op_name(user)
        if name in _PRODUCTS:
            second = user.args[2] if name in ("addmm", "baddbmm") else user.args[1]
            if second is not node or [*user.all_input_nodes].count(node) != 1 or user.args[0] is node:
                return False
        elif name not in _MOVES | _CUTS | _PICKS or not _weights_only(user, source):
            return False
    return bool(node.users)
