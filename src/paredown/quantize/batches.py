"""Batches of inputs in the forms that users write them: a tensor, args, or {"args": …, "kwargs": …}."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError
from paredown.program import Inputs, Program

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


def as_call(batch: Any) -> Inputs:
    """(args, kwargs) of a batch, tensors detached and on the CPU. Raises RejectedError for anything else.

    >>> args, kwargs = as_call({"args": (torch.zeros(2),), "kwargs": {"mask": torch.ones(2)}})
    >>> len(args), list(kwargs)
    (1, ['mask'])
    """
    if isinstance(batch, Mapping) and batch and set(batch) <= {"args", "kwargs"}:
        args, kwargs = batch.get("args", ()), batch.get("kwargs", {})
        args = (args,) if isinstance(args, Tensor) else args
    elif isinstance(batch, tuple | list):
        args, kwargs = tuple(batch), {}
    else:
        args, kwargs = (batch,), {}
    if not isinstance(args, tuple | list) or not isinstance(kwargs, Mapping) or not tensors_of((args, kwargs)):
        msg = (
            f'a batch must be a tensor, a tuple of arguments or {{"args": …, "kwargs": …}}. Got {type(batch).__name__}.'
        )
        raise RejectedError(msg)
    return pytree.tree_map(lambda v: v.detach().cpu() if isinstance(v, Tensor) else v, (tuple(args), dict(kwargs)))  # type: ignore[no-any-return]


def each(batches: Batches) -> Iterator[Inputs]:
    """(args, kwargs) of every batch, one at a time; a tensor counts as one batch, not as a sequence of samples."""
    if isinstance(batches, Tensor | Mapping):
        batches = [batches]
    source: Any = batches() if callable(batches) else batches
    if not isinstance(source, Iterable):
        msg = f"batches must be an iterable, or a function that returns one. Got {type(source).__name__}."
        raise RejectedError(msg)
    for batch in source:
        yield as_call(batch)


def reusable(batches: Batches, num_samples: int | None = None) -> Batches:
    """Batches that can be gone through more than once: a generator is read, up to `num_samples` finite samples, and kept.

    >>> held = reusable(torch.zeros(2, 3) for _ in range(4))
    >>> [len(list(each(held))) for _ in range(2)]
    [4, 4]
    """
    if not isinstance(batches, Iterator):
        return batches
    held: list[Any] = []
    left = num_samples if isinstance(num_samples, int) else math.inf  # anything else is refused where it is used
    for args, kwargs in each(batches):
        held.append({"args": args, "kwargs": kwargs})
        left -= int(finite_rows((args, kwargs)).sum())
        if left <= 0:
            break
    return held


def tensors_of(inputs: Any) -> list[Tensor]:
    """All tensors in the order in which torch.export flattens them."""
    return [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)]


def length(inputs: Any) -> int:
    """Samples in a batch: axis 0 of the first tensor that has axes; 1 where none has."""
    return next((t.shape[0] for t in tensors_of(inputs) if t.dim()), 1)


def filled(program: Program, part: Any) -> Any:
    """One sample as often as a program with a fixed batch takes; anything else as it is.

    >>> import torch
    >>> from paredown.program import capture
    >>> fixed = capture(torch.nn.Linear(4, 3), torch.zeros(8, 4), dynamic_batch=False)
    >>> length(filled(fixed, ((torch.zeros(1, 4),), {})))
    8
    """
    times = length(program.inputs)
    if program.batch == "dynamic" or length(part) != 1 or times == 1:
        return part
    return pytree.tree_map(
        lambda v: v.repeat(times, *[1] * (v.dim() - 1)) if isinstance(v, Tensor) and v.dim() else v, part
    )


def rows(inputs: Any, index: Any) -> Any:
    """The same inputs with only the samples of that index (a slice or a boolean mask)."""
    size = length(inputs)
    return pytree.tree_map(
        lambda v: v[index] if isinstance(v, Tensor) and v.dim() and v.shape[0] == size else v, inputs
    )


def finite_rows(inputs: Any) -> Tensor:
    """Boolean mask of the samples without NaN or infinity."""
    size = length(inputs)
    mask = torch.ones(size, dtype=torch.bool)
    for tensor in tensors_of(inputs):
        if tensor.dim() and tensor.shape[0] == size and tensor.is_floating_point():
            mask &= torch.isfinite(tensor).reshape(size, tensor.numel() // max(size, 1)).all(1)
    return mask
