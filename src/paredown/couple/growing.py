"""Constants that may become shorter with the channels they meet: zeros behind a view, a mask expanded to all heads.

Such a value is the same for every channel, so it can be made for as many as are left. Where it was made is found by
walking back over views, casts and sums of values without channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from paredown.couple.ids import FIXED, compact

if TYPE_CHECKING:
    from paredown.couple.trace import Trace

ONE_NUMBER = frozenset(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"))
_THROUGH = frozenset(
    "view reshape unsqueeze squeeze permute transpose chunk split split_with_sizes slice select unbind unflatten flatten operator.getitem "
    "to _to_copy clone detach contiguous expand add mul sub masked_fill where logical_or logical_and logical_not "
    "bitwise_or bitwise_and bitwise_not".split()
)
_MOST = 64
"""Nodes that are walked over."""


def candidates(trace: Trace, source: fx.Node, length: int) -> dict[fx.Node, int]:
    """Nodes where a constant of so many channels (or a divisor or multiple of them) is made → the axis along which it is."""
    found: dict[fx.Node, int] = {}
    ahead, seen = [source], {source}
    while ahead and len(seen) < _MOST:
        node = ahead.pop()
        axis = _made_here(trace, node, length)
        if axis is not None:
            found[node] = axis
        elif _name(node) in _THROUGH and _without_channels(trace, node):
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            ahead += new
    return found


def _made_here(trace: Trace, node: fx.Node, length: int) -> int | None:
    """The axis of that many equal values, where this node makes them."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not _without_channels(trace, node):
        return None
    new = [
        a for a, n in enumerate(value.shape) if isinstance(n, int) and n > 1 and (length % n == 0 or n % length == 0)
    ]
    if _name(node) == "expand":
        source: Any = node.args[0]
        before = (1,) * (value.dim() - source.meta["val"].dim()) + tuple(source.meta["val"].shape)
        new = [a for a in new if before[a] == 1 and length % int(value.shape[a]) == 0]
    elif _name(node) not in ONE_NUMBER or not value.is_floating_point():
        return None
    return max(new, key=lambda a: (value.shape[a] == length, a), default=None)


def _without_channels(trace: Trace, node: fx.Node) -> bool:
    ids = trace.ids.get(node)
    if isinstance(ids, tuple | list):
        return all(isinstance(i, Tensor) and bool((compact(i) == FIXED).all()) for i in ids)
    return isinstance(ids, Tensor) and bool((compact(ids) == FIXED).all())


def _name(node: fx.Node) -> str:
    from paredown.couple.trace import op_name

    return op_name(node) if node.op == "call_function" else ""
