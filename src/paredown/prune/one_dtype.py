"""Proofs run in one floating dtype, whatever dtypes the network casts to: rounding to half would hide what they are about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from paredown.program import Program


@contextlib.contextmanager
def one_dtype(program: Program, dtype: torch.dtype) -> Iterator[None]:
    """Within it every cast to a floating dtype, and every tensor made of one or of none, is of `dtype`.

    Casts only where the program has dtypes of its own: the weights are not all float32, or an op names one.
    """
    before = torch.get_default_dtype()  # that of torch.zeros and its like where none is named
    torch.set_default_dtype(dtype)
    try:
        with _OneDtype(dtype) if _has_dtypes(program) else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


class _OneDtype(TorchDispatchMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map(self._swapped, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    def _swapped(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value.is_floating_point else value


def _has_dtypes(program: Program) -> bool:
    if any(t.is_floating_point() and t.dtype != torch.float32 for t in program.state.values()):
        return True
    graphs = [g for g in (program.eval_graph, program.train_graph) if g is not None]
    return any(_names_dtype(n) for graph in graphs for n in graph.graph.nodes if n.op == "call_function")


def _names_dtype(node: torch.fx.Node) -> bool:
    given = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return any(isinstance(v, torch.dtype) and v.is_floating_point for v in given)
