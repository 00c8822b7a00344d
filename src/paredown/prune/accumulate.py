"""Adaptive pruning in two readings: what gradients add up to while the network trains.

The source talk says "monitor gradients and prune the weights corresponding to the gradients which move away more". Both
readings are offered:

- accumulated_movement: A = -Σ_t g·w, as in movement pruning (Sanh et al. 2020, eq. 3) but on the weights that train, without
  dense ones behind the mask. The lowest leave: weights that are driven towards zero.
- gradient_drift: D = |Σ_t g|, to the letter. The largest leave: weights whose gradients moved furthest from zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paredown.granularity import Granularity
from paredown.train.loop import Hook, Training

Reading = Literal["accumulated_movement", "gradient_drift"]
READINGS: tuple[Reading, ...] = ("accumulated_movement", "gradient_drift")


class Accumulated:
    """Sums over the steps of one training; `cells` are scores, higher stays."""

    def __init__(self, reading: Reading, names: tuple[str, ...], granularity: Granularity) -> None:
        """`names` are the parameters to watch."""
        self._reading, self._names, self._cut = reading, names, granularity
        self._sums: dict[str, Tensor] = {}

    def hook(self) -> Hook:
        """For `fit`, before the hook that masks: that one zeroes gradients."""
        return Hook(name=self._reading, after_backward=self._add, state=self._state, restore=self._restore)

    def cells(self, module: nn.Module) -> dict[str, NDArray[np.float64]]:
        """Scores of all cells: A summed over a cell, or -√ΣD² of it. Shape: the grid's."""
        parameters = dict(module.named_parameters(remove_duplicate=False))
        found = {}
        for name in self._names:
            total = self._sums.get(name, torch.zeros_like(parameters[name])).detach().cpu().double().numpy()
            drift = self._reading == "gradient_drift"
            found[name] = -self._cut.reduce(np.abs(total), "l2") if drift else self._cut.reduce(total)
        return found

    @torch.no_grad()
    def _add(self, training: Training) -> None:
        parameters = dict(training.module.named_parameters(remove_duplicate=False))
        for name in self._names:
            parameter = parameters[name]
            if parameter.grad is None:
                continue
            new = parameter.grad if self._reading == "gradient_drift" else -parameter.grad * parameter
            before = self._sums.get(name)  # summed in float32 at least: half precision would lose the small steps
            new = new.detach().to(torch.promote_types(new.dtype, torch.float32))
            self._sums[name] = new.clone() if before is None else before.to(new.device) + new

    def _state(self) -> dict[str, Tensor]:
        return dict(self._sums)

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        self._sums = {n: t.clone() for n, t in state.items()}
