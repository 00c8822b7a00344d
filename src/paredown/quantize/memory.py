"""What repairs will keep in memory, estimated from the first batch, and refused before they take more than there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.errors import ResourceError
from paredown.machine_memory import available_bytes
from paredown.program import Inputs
from paredown.quantize.batches import length, tensors_of
from paredown.quantize.lanes import Lane, cloned, layers_of

LANES = ("gptq", "adaround", "blocks", "bias", "bias-fast")
"""Repairs that walk through the network with all samples in step, in float and as quantized."""
_MATRICES = 4
"""Of K × K float64 that a rounding has at a time: products of inputs, their inverse, and what is taken off them."""
_OF_BLOCK = 3
"""Copies of what a block reads and gives, beside those of the lanes."""


class Estimate:
    """Bytes that repairs keep, *estimated*: samples, live activations of both lanes, and the matrices of one layer."""

    def __init__(self, prepared: fx.GraphModule, call: Inputs, repair: Sequence[str], total: int | None) -> None:
        """`call` is the first batch; `total` the samples that will come, where that is known."""
        size = max(1, length(call))
        inputs = sum(t.nbytes for t in tensors_of(call)) / size
        self.repair, self.total, self.available = tuple(repair), total, available_bytes()
        self.fixed_bytes, self.sample_bytes = 0.0, inputs
        if any(r in LANES for r in repair):
            live, largest = (n / size for n in _live_bytes(prepared, call))
            self.sample_bytes = 3 * inputs + 2 * live + (_OF_BLOCK * largest if "blocks" in repair else 0)
        if any(r in ("gptq", "adaround", "blocks") for r in repair):
            self.fixed_bytes = max(
                (_matrices_bytes(layer.use.shape, layer.groups) for layer in layers_of(prepared)), default=0
            )

    def bytes_for(self, samples: int) -> float:
        """Of so many samples."""
        return self.fixed_bytes + samples * self.sample_bytes

    def refuse_more(self, samples: int) -> None:
        """Raises ResourceError where samples that are held by now, or that will come, do not fit in what is free."""
        samples = max(samples, self.total or 0)
        if self.available is None or self.bytes_for(samples) <= self.available:
            return
        most = int((self.available - self.fixed_bytes) // max(self.sample_bytes, 1))
        fix = f"Take at most {most:,} samples (num_samples, --samples), or leave" if most > 0 else "Leave"
        msg = (
            f"what repairs keep must fit in memory. Got some {_gb(self.bytes_for(samples))} for {samples:,} samples (estimated: {_mb(self.sample_bytes)} each), "
            f"with {_gb(self.available)} free. {fix} out {' and '.join(self.repair)}."
        )
        raise ResourceError(msg)

    def told(self, samples: int) -> str:
        """One sentence for the notes; with a warning where more than half of what is free is needed."""
        need = self.bytes_for(samples)
        tight = self.available is not None and need > self.available / 2
        more = f": more than half of the {_gb(self.available or 0)} that were free" if tight else ""
        return f"memory: some {_mb(need)} for the repairs, {samples:,} samples and their activations (estimated){more}"


def known_total(calibrate: Any, num_samples: int | None) -> int | None:
    """How many samples will come, where that can be told without drawing them: a tensor, or a list of batches."""
    if isinstance(calibrate, Tensor):
        held = length(calibrate)
    elif isinstance(calibrate, list | tuple):
        held = sum(length(batch) for batch in calibrate)
    else:
        return None
    return held if num_samples is None else min(held, num_samples)


def _live_bytes(prepared: fx.GraphModule, call: Inputs) -> tuple[int, int]:
    """(most bytes of values that are alive at once, the largest value), of what is computed from one batch in float."""
    run = Lane(prepared, pytree.tree_leaves(pytree.tree_map(cloned, call)), None)
    most = largest = 0
    given: set[int] = set()
    with torch.no_grad():
        for node in prepared.graph.nodes:
            if node.op == "output":
                break
            run.env[node] = run.run_node(node)
            if node.op in ("placeholder", "get_attr"):  # and whatever hands them on
                given |= {place for place, _ in _storages(run.env[node])}
            held = {place: size for value in run.env.values() for place, size in _storages(value) if place not in given}
            most, largest = max(most, sum(held.values())), max([largest, *held.values()])
            run.drop_after(node)
    return most, largest


def _storages(value: Any) -> Iterator[tuple[int, int]]:
    """(where, bytes) of the memory of every tensor."""
    for t in pytree.tree_leaves(value):
        if isinstance(t, Tensor):
            yield t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()


def _matrices_bytes(shape: Sequence[int], groups: int) -> float:
    """Of a weight [out, in / groups, …]: K × K of every group, and the products of outputs and inputs."""
    columns = 1
    for n in shape[1:]:
        columns *= n
    return 8.0 * (groups * columns**2 * (1 + (_MATRICES - 1) / groups) + shape[0] * columns)


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _mb(size: float) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e9 else _gb(size)
