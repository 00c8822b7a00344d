"""Products of any number of operands, by letters: einsum as it is written, and the bilinear form that torch has an op for.

    out[…] = Σ over letters that `out` lacks  Π over operands

A channel lies along one letter. Operands that have it leave it together; a parameter of two axes or more has a set of channels
for each letter, reads those that activations bring and writes the others. What comes out has channels along one letter only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from paredown.couple.ids import FIXED, along, fixed, laid, varying
from paredown.couple.operand import args_of, precedence, result, unknown
from paredown.couple.trace import Summed, Trace, sizes
from paredown.examine.count import BILINEAR, counted_pairs, indices

Terms = Sequence[Sequence[str]]
"""The letters of every operand, one for each axis."""


def product(node: fx.Node, trace: Trace, terms: Terms, out: Sequence[str], operands: Sequence[fx.Node]) -> Any:
    """The ids of Π over operands, summed over the letters that `out` lacks; what cannot be told is pinned."""
    seen = _Seen.of(trace, terms, operands)
    if seen is None:
        return unknown(node, trace)
    seen.tie(trace)
    if not seen.read(trace, out, node):
        return unknown(node, trace)
    shape = result(node).shape
    _count(trace, node, terms, out, operands, seen.ids)
    free = [c for c in out if c in seen.ids]
    if not free:
        return fixed(shape)
    most = max(free, key=lambda c: precedence(seen.ids[c], trace))
    for letter in free:
        if letter != most:
            trace.pin(seen.ids[letter], "each of them meets every channel of another layer")
    return laid(seen.ids[most], list(out).index(most), shape)


def bilinear(node: fx.Node, trace: Trace) -> Any:
    """y_k = x₁ᵀ W_k x₂ + b_k."""
    first, second, weight, bias = args_of(node, "input1", "input2", "weight", "bias")
    operands = (first, weight, second)
    terms, out = indices(BILINEAR, [sizes_of(trace, o) for o in operands])
    found = product(node, trace, terms, out, operands)
    if isinstance(bias, fx.Node):
        trace.tie(trace.of(bias), along(found, found.dim() - 1), "a computed bias")
    return found


class _Seen:
    """Which channels lie along which letter, as activations and vectors bring them."""

    def __init__(self) -> None:
        self.ids: dict[str, Tensor] = {}
        """Letter → ids [length], where some are channels."""
        self.brought: dict[str, list[tuple[fx.Node, int, Tensor]]] = {}
        """Letter → (operand, axis, ids along it) of everything but weights."""
        self.weights: list[tuple[fx.Node, Sequence[str]]] = []

    @classmethod
    def of(cls, trace: Trace, terms: Terms, operands: Sequence[fx.Node]) -> _Seen | None:
        """None where a letter is there twice in an operand, or its channels lie along several."""
        seen = cls()
        for node, term in zip(operands, terms, strict=True):
            if len({*term}) != len(term):
                return None
            if _is_weight(trace, node):
                seen.weights.append((node, term))
                continue
            ids = trace.forest.canon(trace.of(node))
            across = varying(ids)
            if len(across) > 1:
                return None
            if not across and bool((ids != FIXED).any()):
                trace.pin(ids, "one channel is broadcast over many")
                ids = fixed(ids.shape)
            for axis, letter in enumerate(term):
                if ids.shape[axis] > 1:
                    vector = along(ids, axis) if axis in across else fixed((ids.shape[axis],))
                    seen.brought.setdefault(letter, []).append((node, axis, vector))
        return seen

    def tie(self, trace: Trace) -> None:
        """What lies along one letter leaves together."""
        for letter, each in self.brought.items():
            _, _, first = next((one for one in each if bool((one[2] != FIXED).any())), each[0])
            for _, _, other in each:
                trace.tie(first, other, "a constant as long as the channels is combined with them")
            if bool((first != FIXED).any()):
                self.ids[letter] = first

    def read(self, trace: Trace, out: Sequence[str], node: fx.Node) -> bool:
        """Give weights their channels; False where channels are summed over that no weight reads, along several letters."""
        for weight, term in self.weights:
            for axis, letter in enumerate(term):
                length = trace.parameters[weight].shape[axis]
                if letter in self.ids or letter in self.brought:
                    trace.read(weight, axis, self.ids.get(letter, fixed((length,))), "read by a product")
                elif length > 1:
                    self.ids[letter] = trace.weight(weight, axis, "write")
        read = {c for _, term in self.weights for c in term}
        alone = [c for c in self.ids if c not in out and c not in read]
        if len(alone) > 1:
            return False
        for letter in alone:
            operand, axis, ids = self.brought[letter][0]
            trace.summed[node] = Summed(operand=operand, axis=axis, ids=ids)
        return True


def _is_weight(trace: Trace, node: fx.Node) -> bool:
    """Whether this is all of a learned tensor of two axes or more that nothing reads element by element."""
    seen = trace.parameters.get(node)
    if seen is None or node in trace.values or node in trace.instead or seen.is_part:
        return False
    return len(seen.shape) > 1 and trace.storage[seen.name] not in trace.raw


def sizes_of(trace: Trace, node: fx.Node) -> tuple[int, ...]:
    """The shape of an operand as it is seen, a symbol by its hint."""
    seen = trace.parameters.get(node)
    return sizes(node.meta["val"]) if seen is None else seen.shape


def _count(
    trace: Trace, node: fx.Node, terms: Terms, out: Sequence[str], operands: Sequence[fx.Node], ids: dict[str, Tensor]
) -> None:
    """What the MACs of every pair shrink by, under the names that `examine` gives them."""
    pairs = counted_pairs(terms, out, [sizes_of(trace, o) for o in operands])
    for number, (letters, _) in enumerate(pairs, start=1):
        name = node.name if len(pairs) == 1 else f"{node.name}:{number}"
        vectors = [ids[c] for c in sorted(letters) if c in ids]
        if vectors:
            trace.products[name] = vectors
