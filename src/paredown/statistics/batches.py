"""Batches as users have them: a function that yields them anew, a list, a DataLoader; refused in words where they are not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from paredown.errors import RejectedError, UsageError
from paredown.program import Program, call_inputs

Batches = Callable[[], Iterable[Any]]
Given = Batches | Iterable[Any]
"""What users may write."""


def batches_of(given: object, name: str = "batches") -> Batches:
    """A function that yields the batches anew at each call, whatever they were given as.

    Raises UsageError where they are neither such a function nor something to iterate over more than once.

    >>> list(batches_of([1, 2])()), list(batches_of(lambda: iter("ab"))())
    ([1, 2], ['a', 'b'])
    """
    if callable(given) and not isinstance(given, nn.Module):
        return given
    batches = once(given, name)
    if isinstance(batches, Iterator):
        msg = f"{name} must be there for more than one pass: a function that returns batches, a list or a DataLoader. Got {type(given).__name__}, which is empty after one pass. Pass the function that makes it, or list(…)."
        raise UsageError(msg)
    return lambda: batches


def once(given: object, name: str = "batches") -> Iterable[Any]:
    """The batches for a single pass, whatever they were given as; a generator is enough. Raises UsageError for anything else.

    >>> list(once(lambda: [1, 2])), list(once(n for n in (3, 4)))
    ([1, 2], [3, 4])
    """
    found = given() if callable(given) and not isinstance(given, nn.Module) else given
    if isinstance(found, Tensor | np.ndarray | Mapping | str | bytes | nn.Module) or not isinstance(found, Iterable):
        got = type(found).__name__
        hint = " One batch is [batch]." if isinstance(found, Tensor | np.ndarray | Mapping) else ""
        hint = " Wrap it in a DataLoader." if isinstance(found, Dataset) else hint
        msg = f"{name} must be a function that returns batches, a list or a DataLoader. Got {got}{' from the function' if found is not given else ''}.{hint}"
        raise UsageError(msg)
    return found


def reseeded(source: Any, seed: int) -> Any:
    """The source; of a DataLoader its own generator, and that of its sampler, starts at `seed`: an epoch that is repeated, or continued in
    another process, must see the same batches."""
    loader = getattr(source, "source", source)  # behind what watches for late batches
    if isinstance(loader, DataLoader):
        for holder in (loader, loader.sampler, loader.batch_sampler):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
    return source


def apart(source: Any) -> Any:
    """The source; of a DataLoader with persistent workers a copy, since all passes over it share one iterator."""
    loader = getattr(source, "source", source)
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return source
    copied = copy.copy(loader)
    vars(copied).update(persistent_workers=False, _iterator=None)
    return copied


def taken(batches: Iterable[Any], most: int | None, name: str = "batches") -> Iterator[Any]:
    """The first `most` batches; None takes all.

    Raises RejectedError for one without a sample, since means over nothing look like zeros, and UsageError where `most`
    is no whole number ≥ 0.
    """
    if most is not None:
        check_whole("num_batches", most, 0)
    for number, batch in enumerate(islice(batches, most)):
        lengths = [t.shape[0] for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim() > 0]
        if lengths and not any(lengths):
            msg = f"a batch must hold at least one sample. Got tensors of length 0 in batch {number} of {name}. Look at the filters of the data, and leave empty batches out."
            raise RejectedError(msg)
        yield batch


def as_call(program: Program, batch: object, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a batch of inputs, keywords in the captured order.

    Raises UsageError where the batch has another structure than the program's inputs, as one with labels has.
    """
    args, kwargs = call_inputs(batch)
    spec = program.eval_graph.call_spec.in_spec
    order = spec.child(1).context or []
    if set(order) == set(kwargs):
        kwargs = {name: kwargs[name] for name in order}
    leaves, structure = pytree.tree_flatten((args, kwargs))
    if structure != spec:
        tensors = sum(isinstance(v, Tensor) for v in leaves)
        msg = f"batches must be the model's inputs alone where no loss or step is given: {spec.num_leaves} as captured. Got {type(batch).__name__} with {tensors or 'no'} tensor{'s' * (tensors != 1)} in batch {number}. Leave the labels out, or pass a function of (model, batch)."
        raise UsageError(msg)
    return args, kwargs


def as_number(loss: object, number: int) -> float:
    """The loss of a batch. Raises RejectedError where it is not one number."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss)
    if isinstance(loss, int | float):
        return float(loss)
    got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    msg = f"a loss must be one number. Got {got} at batch {number}. Take the mean over the samples."
    raise RejectedError(msg)


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raises UsageError for anything but a whole number ≥ `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        msg = f"{name} must be a whole number ≥ {least}. Got {value!r}."
        raise UsageError(msg)
