"""How far the ranges of activations depend on single samples, where there are few of them."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx

from paredown.quantize.decompose import fetch

_TOLD = 0.005
"""What would be rounded to 0 % says nothing."""


class Spread:
    """Smallest and largest value of every observed activation, sample by sample; no more is kept once there are `most` samples.

    Of n samples, each left out in turn: 1 - width of the range without it / width with it, where a range holds 0. As a context it
    listens to the observers of a prepared graph, and stops at its end.
    """

    def __init__(self, prepared: fx.GraphModule, most: int) -> None:
        self._most, self._seen, self._size = most, 0, 0
        self._ends: dict[str, list[Tensor]] = {}
        self._batch: dict[str, Tensor] = {}
        names = {
            str(n.target)
            for n in prepared.graph.nodes
            if n.op == "call_module" and n.all_input_nodes and n.all_input_nodes[0].op != "get_attr"
        }
        observers: dict[str, Any] = {name: fetch(prepared, name) for name in sorted(names)}
        self._hooks = [
            module.register_forward_pre_hook(self._listener(name))
            for name, module in observers.items()
            if hasattr(module, "calculate_qparams")
        ]

    def __enter__(self) -> Spread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def expect(self, size: int) -> None:
        """The batch before has passed; the next one has so many samples."""
        for name, ends in self._batch.items():
            self._ends.setdefault(name, []).append(ends)
        self._batch, self._size = {}, size
        self._seen += size
        if self._seen >= self._most:
            self._ends = {}

    def _listener(self, name: str) -> Callable[[Any, Any], None]:
        def listen(_: Any, args: Any) -> None:
            value = args[0]
            if (
                self._seen >= self._most
                or not isinstance(value, Tensor)
                or not value.numel()
                or value.dim() < 1
                or value.shape[0] != self._size
            ):
                return
            flat = value.detach().reshape(self._size, -1)
            ends = torch.stack((flat.amin(1), flat.amax(1)))
            known = self._batch.get(name)
            if known is not None:  # several values share this range
                ends = torch.stack((torch.minimum(known[0], ends[0]), torch.maximum(known[1], ends[1])))
            self._batch[name] = ends

        return listen

    def told(self) -> str:
        """How much narrower ranges are without one of the samples; "" where there are many, or one alone, or none matters."""
        self.expect(0)
        every = [_moved(torch.cat(ends, 1)) for ends in self._ends.values()]
        moved = [m for m in every if m is not None]
        if max(moved, default=0.0) < _TOLD:
            return ""
        median = float(torch.tensor(moved).median())
        half = f", of half of them by {median:.0%} or more" if median >= _TOLD else ""
        return f"calibration: leaving one sample out narrows the range of an activation by up to {max(moved):.0%}{half}"


def _moved(ends: Tensor) -> float | None:
    """The largest share of a range that rests on one sample alone. `ends`: smallest and largest value by sample, [2, n]."""
    low, high = ends[0].clamp(max=0), ends[1].clamp(min=0)
    if len(low) < 2 or not bool(torch.isfinite(ends).all()):
        return None
    width = float(high.max() - low.min())
    if width <= 0:
        return None
    first, last = low.topk(2, largest=False), high.topk(2)
    left = []
    for i in range(len(low)):
        bottom = first.values[1] if int(first.indices[0]) == i else first.values[0]
        top = last.values[1] if int(last.indices[0]) == i else last.values[0]
        left.append(float(top - bottom))
    return 1 - min(left) / width
