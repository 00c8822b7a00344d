"""Copy: a model from which one space, or some weights, can be taken out and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paredown.allocate.structured import kept_positions
from paredown.couple.space import Coupling, Space
from paredown.couple.trace import trace
from paredown.plan import Plan
from paredown.program import Program
from paredown.prune.graph import realise_graph
from paredown.prune.removal import Removal, removal
from paredown.search.repair import Repair
from paredown.train.loop import private_copy

Bools = NDArray[np.bool_]


class Copy:
    """A private copy of the user's module; `without` gives it with something gone, and then as it was, bit for bit.

    A removed channel is one that nobody reads: the slices that read it are zero. Where channels are read by something
    other than weights (a norm over the channel axis, a product of two activations) the graph is cut instead.
    """

    def __init__(
        self, program: Program, coupling: Coupling, device: torch.device, repair: Repair | None = None
    ) -> None:
        self._repair = repair
        self.module = private_copy(program.module).eval().to(device)
        self._program, self._coupling, self._device = program, coupling, device
        named = (
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        )
        self._tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in named}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter."""
        return tuple(self._tensors[name].shape)

    @contextmanager
    def without(self, name: str, stays: Bools) -> Iterator[nn.Module]:
        """The model without what does not stay: units of the space of that name, or elements of that parameter."""
        space = next((s for s in self._coupling.spaces if s.name == name), None)
        if space is None:
            with self._zeroed({name: torch.from_numpy(~stays)}) as module:
                yield module
            return
        cut = self._cut([(space, ~stays)])
        if cut is not None:
            yield cut
            return
        with self._zeroed(self._slices(space, ~stays)) as module:
            if self._repair is not None:
                for parameter, weight in self._repair.weights(space, ~stays).items():
                    self._tensors[parameter].copy_(weight)
            yield module

    @contextmanager
    def without_all(self, stays: Mapping[str, Bools]) -> Iterator[nn.Module]:
        """The model without what does not stay of several spaces, or of several parameters, at once."""
        spaces = {s.name: s for s in self._coupling.spaces}
        cut = self._cut([(spaces[n], ~s) for n, s in stays.items()]) if stays.keys() <= spaces.keys() else None
        if cut is not None:
            yield cut
            return
        with ExitStack() as stack:
            for name, own in stays.items():
                stack.enter_context(self.without(name, own))
            yield self.module

    @contextmanager
    def rounded(self, name: str, weight: Tensor) -> Iterator[nn.Module]:
        """The model with another weight of the same shape in the place of that parameter."""
        before = self._tensors[name].clone()
        try:
            self._tensors[name].copy_(weight)
            yield self.module
        finally:
            self._tensors[name].copy_(before)

    def weight(self, name: str) -> Tensor:
        """A parameter, as it is now."""
        return self._tensors[name]

    def _slices(self, space: Space, leaves: Bools) -> dict[str, Tensor]:
        """Elements that read removed units, by parameter."""
        found: dict[str, Tensor] = {}
        for f in space.footprints:
            if f.role == "read":
                mask = found.setdefault(f.parameter, torch.zeros(self.shape(f.parameter), dtype=torch.bool))
                mask.index_fill_(f.axis, torch.from_numpy(f.indices[leaves].ravel()), value=True)
        return found

    @contextmanager
    def _zeroed(self, masks: dict[str, Tensor]) -> Iterator[nn.Module]:
        before = {name: self._tensors[name].clone() for name in masks}
        try:
            for name, mask in masks.items():
                self._tensors[name].masked_fill_(mask.to(self._device), 0.0)
            yield self.module
        finally:
            for name, tensor in before.items():
                self._tensors[name].copy_(tensor)

    def _cut(self, leaves: Sequence[tuple[Space, Bools]]) -> nn.Module | None:
        """The graph without the units that leave; None where zeros in the reads of each space do the same."""
        reads = [{f.parameter for f in space.footprints if f.role == "read"} for space, _ in leaves]
        gone = self._removal(leaves)
        plain = all(r and r <= self._tensors.keys() for r in reads) and not _read_without_weights(self._program, gone)
        return None if plain else realise_graph(self._program, gone).to(self._device)

    def _removal(self, leaves: Sequence[tuple[Space, Bools]]) -> Removal:
        of = {space.name: own for space, own in leaves}
        gone = [of.get(s.name, np.zeros(len(s), dtype=np.bool_)) for s in self._coupling.spaces]
        shapes = {name: tuple(t.shape) for name, t in self._program.state.items() if isinstance(t, Tensor)}
        return removal(trace(self._program), Plan(keep=kept_positions(self._coupling, shapes, gone)))


def _read_without_weights(program: Program, gone: Removal) -> bool:
    """Whether a norm, or a product of activations, runs over an axis that loses channels."""
    run = trace(program)
    ids = [*run.norms.values(), *(summed.ids for summed in run.summed.values())]
    return any(not bool(gone.alive(one).all()) for one in ids)
