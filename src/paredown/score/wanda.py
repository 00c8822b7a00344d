"""wanda: size of a weight times the norm of its input (Sun et al. 2024, "Wanda", eq. 1).

S_ij = |W_ij| · √(mean x_j²), to be compared *within each output row*: allocate does so by itself, also where the rows of a
weight stored [in, out] lie along axis 1. Cells and units take √Σ S². Where we differ: all statistics come from one pass
through the dense model. The paper goes layer after layer and sees the inputs that the masked layers before leave, which a
score that knows no density cannot; `prune.obs` does that, and schedules of `prune.sparsify` score the masked weights anew.
Parameters that multiply no activation (norms, biases) have an input of 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from paredown.errors import RejectedError, UsageError
from paredown.score.gradients import wide
from paredown.score.nouns import Computed, Elements, Source
from paredown.statistics.inputs import input_statistics
from paredown.statistics.uses import find_uses


@dataclass(frozen=True, slots=True, kw_only=True)
class WandaOptions:
    """No options."""


def wanda(source: Source, options: WandaOptions) -> Iterator[Elements]:
    """Element saliency (|W| · ‖x‖)², whose root is the score."""
    del options
    names = read_along_one_axis(source, "wanda")
    seen = input_statistics(
        source.program,
        names,
        source.batches or (),
        loss=source.loss,
        gram=False,
        num_batches=source.num_batches,
        module=source.module,
    )
    norms = {
        n: s.along(s.squared_norms.to(wide(source.weights[n]).dtype), tuple(source.weights[n].shape))
        for n, s in seen.items()
    }

    def saliency(name: str) -> Tensor:
        squares = wide(source.weights[name]).square()
        return squares.mul_(norms[name]) if name in norms else squares

    yield Computed(source.weights, saliency)


def read_along_one_axis(source: Source, criterion: str) -> list[str]:
    """The weights whose inputs can be measured; the others are named in a warning and have inputs of 1."""
    if source.batches is None:
        msg = f"{criterion} must be given batches. Got None. Pass batches=… of inputs, or full batches and loss=…."
        raise UsageError(msg)
    wide = [n for n, w in source.weights.items() if w.dim() >= 2]
    uses = find_uses(source.program, wide)
    names = [n for n in wide if len({u.flipped for u in uses[n]}) == 1]
    others = [n for n in wide if n not in names]
    if not names:
        msg = f"{criterion} must find a linear layer or convolution among what is scored. Got none. Use l1 or l2."
        raise RejectedError(msg)
    if others:
        listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        warnings.warn(
            f"{criterion} takes inputs of size 1 where it cannot see them: {listed}.", UserWarning, stacklevel=5
        )
    return names
