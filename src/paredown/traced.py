"""Traced: what torch.export does that a capture can do without: shapes step by step, and checks at each cast.

With a free batch torch works out what a batch norm or an activation returns by running its definition on symbolic shapes, a dozen ops with
sums and fractions of sizes. What it comes to is known: a tensor like the input. A capture takes two thirds of the time, to
the same graph. Tensors that lie in memory in any but the two usual ways, or not on the CPU, go the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

_aten = torch.ops.aten
_LIKE_THE_INPUT = (
    _aten.relu.default, _aten.gelu.default, _aten.silu.default, _aten.sigmoid.default, _aten.tanh.default, _aten.hardtanh.default,
    _aten.hardswish.default, _aten.leaky_relu.default, _aten.elu.default,
)  # fmt: skip
_FORMATS = (torch.contiguous_format, torch.channels_last)


@contextmanager
def known_shapes() -> Iterator[None]:
    """Within it, torch.export with a free batch takes the short way; what torch itself has registered stays.

    All of it is torch's own inside: where a version has it no more, the long way is taken.
    """
    try:
        from torch._decomp import decomposition_table
        from torch._prims_common import is_contiguous_for_memory_format_or_false  # noqa: F401 (that it is there)
        from torch._subclasses.fake_impls import get_fast_op_impls
    except ImportError:
        yield
        return
    table: dict[Any, Callable[..., Any]] = get_fast_op_impls()
    ours = {op: partial(_like_the_input, op) for op in _LIKE_THE_INPUT}
    ours |= {op: partial(_batch_norm, op) for op in _BATCH_NORMS}
    added = {op: known for op, known in ours.items() if op not in table and op in decomposition_table}
    table.update(added)
    try:
        yield
    finally:
        for op in added:
            table.pop(op, None)


def drop_dtype_checks(graph: ExportedProgram) -> None:
    """Without the checks that export leaves at each cast: they would refuse the same network in another dtype."""
    checks = [n for n in graph.graph.nodes if n.target is torch.ops.aten._assert_tensor_metadata.default]
    for node in checks:
        graph.graph.erase_node(node)
    if checks:
        graph.graph_module.recompile()


def _like(mode: Any, tensor: Tensor) -> Tensor | None:
    """An empty tensor like this one; None where how that lies in memory is not plain."""
    from torch._prims_common import is_contiguous_for_memory_format_or_false

    if tensor.device.type != "cpu" or not tensor.dtype.is_floating_point:
        return None
    for kind in _FORMATS:
        if is_contiguous_for_memory_format_or_false(tensor, memory_format=kind):  # type: ignore[no-untyped-call, unused-ignore]
            with mode:
                return torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=kind)
    return None


def _like_the_input(op: Any, mode: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    found = _like(mode, tensor)
    return _long(op, mode, tensor, *args, **kwargs) if found is None else found


def _batch_norm(op: Any, mode: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The output, and mean and scale of the batch: empty in eval mode."""
    found = None if kwargs else _like(mode, tensor)
    if found is None:
        return _long(op, mode, tensor, *args, **kwargs)
    trains = op is _aten._native_batch_norm_legit.default and args[4]
    with mode:
        return found, *(torch.empty(tensor.shape[1] if trains else 0, dtype=tensor.dtype) for _ in range(2))


def _long(op: Any, mode: Any, *args: Any, **kwargs: Any) -> Any:
    from torch._decomp import decomposition_table

    with mode:
        return decomposition_table[op](*args, **kwargs)


_BATCH_NORMS = (_aten._native_batch_norm_legit.default, _aten._native_batch_norm_legit_no_training.default)
