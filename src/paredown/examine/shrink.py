"""Which layers must shrink, and by how much, to reach a size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paredown.errors import UsageError
from paredown.examine.cost import Shrink, ShrinkPlan

if TYPE_CHECKING:
    from paredown.examine.cost import Cost


def shrink_to(cost: Cost, target_bytes: int, *, fixed_bytes: int = 0) -> ShrinkPlan:
    """Cut the largest layers down to one common cap so that Σ parameter bytes ≤ target: the fewest layers touched.

    Water from above: layers above the cap are lowered to it, layers below stay whole; the cap solves
    Σ min(bytes, cap) = target - fixed, where `fixed_bytes` is what does not shrink (a file's header, buffers).
    It is an estimate of what to aim at, not a plan: removing channels shrinks neighbours together.
    Raises UsageError for a target below 1 byte.

    >>> from paredown.examine.cost import Cost, NodeCost
    >>> def layer(name, size):
    ...     return NodeCost(name=name, node=name, kind="linear", parameters=size // 4, parameter_bytes=size)
    >>> nodes = (layer("a", 800), layer("b", 400), layer("c", 80))
    >>> totals = {"macs": 0, "parameters": 320, "activation_bytes": 0, "peak_activation_bytes": 0}
    >>> cost = Cost(**totals, parameter_bytes=1280, by_node=nodes)
    >>> [(s.name, s.to_bytes) for s in shrink_to(cost, 680).layers]
    [('a', 300), ('b', 300)]
    """
    if isinstance(target_bytes, bool) or not isinstance(target_bytes, int) or target_bytes < 1:
        msg = f"target_bytes must be an integer ≥ 1. Got {target_bytes!r}. Write 30 MB as 30_000_000."
        raise UsageError(msg)
    layers = sorted((c for c in cost.layers if c.parameter_bytes), key=lambda c: -c.parameter_bytes)
    room = target_bytes - fixed_bytes
    if room >= sum(c.parameter_bytes for c in layers):
        return ShrinkPlan(target_bytes=target_bytes, cap_bytes=layers[0].parameter_bytes if layers else 0, layers=())
    if room <= 0:
        return ShrinkPlan(target_bytes=target_bytes, cap_bytes=0, layers=(), reachable=False)
    left, cap = room, 0
    for index, layer in enumerate(reversed(layers)):
        others = len(layers) - index
        cap = left // others
        if layer.parameter_bytes > cap:
            break
        left -= layer.parameter_bytes
    found = []
    for layer in layers:
        if layer.parameter_bytes <= cap:
            break
        item = max(layer.parameter_bytes // max(layer.parameters, 1), 1)
        found.append(Shrink(name=layer.name, parameter_bytes=layer.parameter_bytes, to_bytes=cap // item * item))
    return ShrinkPlan(
        target_bytes=target_bytes, cap_bytes=cap, layers=tuple(found), reachable=all(s.to_bytes > 0 for s in found)
    )
