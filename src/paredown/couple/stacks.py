"""Matrices stacked in one parameter: experts [experts, in, out], applied by one product.

Each of them reads the same channels and writes the same hidden units, so that a unit leaves all of them. How many there
are stays: a softmax shares out among them. Stacked projections of heads are read the other way, element by element, where
that leaves more freedom: `trace` compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from paredown.couple.ids import along, fixed, laid, varying

if TYPE_CHECKING:
    from paredown.couple.trace import Trace


def product(trace: Trace, a: Any, b: Any, shape: Any) -> Tensor | None:
    """a @ b where one of them is a stack and the channels of the other lie along the summed axis only; None where not."""
    for stack, other, from_end, read_axis, write_axis in ((b, a, 1, 1, 2), (a, b, 2, 2, 1)):
        if not _is_stack(trace, stack) or _is_stack(trace, other):
            continue
        ids = trace.forest.canon(trace.of(other))
        axis = ids.dim() - from_end
        if axis < 0 or {*varying(ids)} - {axis}:
            return None
        read = along(ids, axis)
        trace.read(stack, read_axis, read, "read by a stack of matrices")
        wrote = trace.weight(stack, write_axis, "write")
        if trace.parameters[stack].is_part and trace.node is not None:
            trace.products[trace.node.name] = [read, wrote]  # MACs are not counted by elements of a part
        return laid(wrote, len(shape) - (3 - write_axis), shape)
    return None


def einsum(
    trace: Trace, letters: tuple[Sequence[str], Sequence[str], Sequence[str]], operands: list[Any], shape: Any
) -> Tensor | None:
    """The same in letters: one that is summed is read, the last that is new is written, the others count matrices."""
    left, right, out = letters
    for stack, mine, other, theirs in (
        (operands[1], right, operands[0], left),
        (operands[0], left, operands[1], right),
    ):
        if not _is_stack(trace, stack) or _is_stack(trace, other):
            continue
        ids = trace.forest.canon(trace.of(other))
        across = [theirs[axis] for axis in varying(ids)]
        summed = [c for c in mine if c in theirs and c not in out]
        new = [c for c in mine if c not in theirs]
        read = across or summed[-1:]
        if len(read) != 1 or read[0] not in summed or not new:
            return None
        axis = theirs.index(read[0])
        seen = along(ids, axis) if across else fixed((ids.shape[axis],))
        trace.read(stack, mine.index(read[0]), seen, "read by a stack of matrices")
        return laid(trace.weight(stack, mine.index(new[-1]), "write"), out.index(new[-1]), shape)
    return None


def _is_stack(trace: Trace, node: Any) -> bool:
    """Whether this is a stack of matrices that nothing reads element by element, and stacks count in this run."""
    if not isinstance(node, fx.Node) or node not in trace.parameters:
        return False
    seen = trace.parameters[node]
    if len(seen.shape) != 3 or node in trace.values or trace.storage[seen.name] in trace.raw:
        return False
    trace.has_stacks = True
    return trace.stacks
