"""Repair: the weights that read a space, fitted anew to what the units that are left can still say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paredown.couple.space import Space
from paredown.program import Program
from paredown.statistics.inputs import input_statistics
from paredown.statistics.readers import Reader, readers
from paredown.train.task import Step

POSITIONS_PER_SAMPLE = 64
RIDGE = 1e-3
"""As in `prune.reconstruct`: of the mean of the Gram matrix's diagonal."""


@dataclass(slots=True, kw_only=True)
class Repair:
    """Least squares on the dense model's inputs, per reader: W' = argmin E‖W x - W' x_left‖² + λ‖W' - W‖².

    The Gram matrices of one space are held, those of the space that was asked for last.
    """

    program: Program
    batches: Sequence[Any]
    step: Step | None
    _space: str = ""
    _readers: list[Reader] = field(default_factory=list)
    _grams: dict[str, Tensor] = field(default_factory=dict)

    def weights(self, space: Space, leaves: NDArray[np.bool_]) -> dict[str, Tensor]:
        """By parameter the whole weight, zero where it reads what leaves. Empty where no reader can be measured."""
        self._look_at(space)
        gone: dict[str, Tensor] = {}
        for reader in self._readers:
            columns = gone.setdefault(
                reader.parameter, torch.zeros(len(self._grams[reader.parameter][0]), dtype=torch.bool)
            )
            columns[reader.columns[torch.from_numpy(leaves)].flatten()] = True
        return {
            name: _fitted(self.program.state[name].detach(), self._grams[name], columns)
            for name, columns in gone.items()
        }

    def _look_at(self, space: Space) -> None:
        if space.name == self._space:
            return
        found = readers(self.program, [space])[space.name]
        seen = {}
        if found:
            seen = input_statistics(
                self.program, [r.parameter for r in found], self.batches, loss=self.step, num_batches=len(self.batches),
                positions_per_sample=POSITIONS_PER_SAMPLE,
            )  # fmt: skip
        self._space, self._readers = space.name, found
        self._grams = {name: s.gram for name, s in seen.items() if s.gram is not None}


def _fitted(weight: Tensor, grams: Tensor, gone: Tensor) -> Tensor:
    """`weight` [out, …] without the columns `gone` [K] of its matrix view; one Gram matrix [K, K] per group."""
    matrix = weight.double().reshape(len(grams), weight.shape[0] // len(grams), -1)
    new = torch.zeros_like(matrix)
    left, none = (~gone).nonzero()[:, 0], gone.nonzero()[:, 0]
    for g, gram in enumerate(grams):
        block = gram[left[:, None], left]
        ridge = RIDGE * float(gram.diagonal().mean())
        block = block + max(ridge, 1e-12) * torch.eye(len(left), dtype=torch.float64)
        lost = matrix[g][:, none] @ gram[none[:, None], left]
        new[g][:, left] = matrix[g][:, left] + torch.linalg.solve(block, lost.T).T
    return new.reshape(weight.shape).to(weight.dtype)
