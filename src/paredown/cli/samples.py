"""Inputs on the command line: arrays of a file as batches of a network, or seeded noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paredown.errors import RejectedError

if TYPE_CHECKING:
    from paredown.program import Program

RANDOM_SAMPLES = "CALIBRATED ON RANDOM NUMBERS: the ranges are not those of your data. For a try of size and speed only, never to ship."


def as_batches(read: dict[str, Any], program: Program, option: str) -> list[Any]:
    """Arrays as batches of 32 samples in the structure of the example inputs: by name where all names fit, else in order.

    Where the network's batch is fixed, a batch has its length, and samples that do not fill one are left out.
    """
    import torch
    from torch import Tensor
    from torch.utils import _pytree as pytree

    leaves, structure = pytree.tree_flatten(program.inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    names = [str(n) for n in program.inputs.kwargs]
    order = list(read)
    if names and len(read) == len(names) == len(places) and set(read) == set(names):
        order = names
    if len(order) != len(places):
        msg = f"{option} must hold one array for each of the model's {len(places)} inputs. Got {len(order)}: {', '.join(order)}."
        raise RejectedError(msg)
    tensors = [_fitting(read[name], leaves[at], name, option) for name, at in zip(order, places, strict=True)]
    size, total = 32, min((len(t) for t in tensors if t.dim()), default=0)
    if program.batch != "dynamic":
        size = next(int(leaves[at].shape[0]) for at in places if leaves[at].dim())
        if total < size:
            msg = f"{option} must hold at least one batch of {size}, which the network's batch is fixed to. Got {total} samples."
            raise RejectedError(msg)
        tensors = [t[: total - total % size] for t in tensors]
    batches = []
    for parts in zip(*(torch.split(t, size) for t in tensors), strict=True):
        filled = list(leaves)
        for at, part in zip(places, parts, strict=True):
            filled[at] = part
        args, kwargs = pytree.tree_unflatten(filled, structure)
        batches.append({"args": args, "kwargs": kwargs})
    return batches


def _fitting(array: Any, example: Any, name: str, option: str) -> Any:
    """The array as a tensor of the example's dtype. Whole numbers are not taken for normalised inputs."""
    import torch

    if example.is_floating_point() and array.dtype.kind != "f":
        msg = f"{option} must hold the model's own inputs, normalised, as floats. Got {array.dtype} in {name!r}."
        raise RejectedError(msg)
    if array.dtype.kind not in "fiub" or (not example.is_floating_point() and array.dtype.kind == "f"):
        msg = f"{option} must hold numbers of the kind {example.dtype}. Got {array.dtype} in {name!r}."
        raise RejectedError(msg)
    if tuple(array.shape[1:]) != tuple(example.shape[1:]):
        msg = f"{option} must hold samples of the shape {tuple(example.shape[1:])}. Got {tuple(array.shape[1:])} in {name!r}."
        raise RejectedError(msg)
    native = array.astype(array.dtype.newbyteorder("="))  # torch reads no foreign byte order
    return torch.from_numpy(native).to(example.dtype)


def random_batches(program: Program) -> list[Any]:
    """32 samples of seeded noise in the form of the example inputs; integers repeat the example."""
    import torch
    from torch import Tensor
    from torch.utils import _pytree as pytree

    generator = torch.Generator().manual_seed(0)

    def noise(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.randn(leaf.shape, generator=generator).to(leaf.dtype)

    made = [pytree.tree_map(noise, program.inputs) for _ in range(16)]
    return [{"args": args, "kwargs": kwargs} for args, kwargs in made]
