"""taylor: first-order change of the loss when a unit goes (Molchanov et al. 2019, "Importance estimation", eq. 8).

"squared" is I_m = (Σ_{s in m} g_s w_s)², "abs" |Σ g w| (Molchanov et al. 2017; LLM-Pruner's vector form) and
"elementwise" Σ |g w| (LLM-Pruner's param_first), each averaged over batches. Where we differ: batch norms run in eval
mode on their stored statistics, so that the model is not changed and the score does not depend on what else is in a
batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from paredown.errors import UsageError
from paredown.score.gradients import Gradients, wide
from paredown.score.nouns import Computed, Elements, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class TaylorOptions:
    """What becomes of the sum of g·w."""

    form: Literal["squared", "abs", "elementwise"] = "squared"

    def __post_init__(self) -> None:
        if self.form not in ("squared", "abs", "elementwise"):
            msg = f"form must be squared, abs or elementwise. Got {self.form!r}."
            raise UsageError(msg)


def taylor(source: Source, options: TaylorOptions) -> Iterator[Elements]:
    """Element saliency g·w, signed (|g·w| for "elementwise"), one map for each of the first `num_batches` batches."""
    gradients = Gradients(source, "taylor")

    def product(name: str) -> Tensor:
        parameter = gradients.parameters[name]
        if parameter.grad is None:
            return torch.zeros_like(wide(parameter))
        signed = (wide(parameter.grad) * wide(parameter)).cpu()
        return signed.abs_() if options.form == "elementwise" else signed

    for number, batch in gradients.batches():
        gradients.backward(batch, number)
        yield Computed(source.weights, product)


def finish(parts: Sequence[Any], size: Any, options: TaylorOptions) -> Any:
    """The square or size of a unit's Σ g·w."""
    del size
    return np.square(parts[0]) if options.form == "squared" else np.abs(parts[0])
