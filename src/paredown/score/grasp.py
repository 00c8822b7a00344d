"""grasp: what a weight does for the flow of gradients (Wang, Zhang & Grosse 2020, "GraSP", eq. 8).

The paper scores -θ ⊙ H g and removes the *highest*; ours is θ ⊙ H g, of which the highest stay. g and H are sums over all
batches. Outputs are divided by a temperature, as the authors' code does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from paredown.errors import UsageError
from paredown.score.gradients import Gradients, Mode, wide
from paredown.score.nouns import Computed, Elements, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class GraspOptions:
    """How the model runs."""

    temperature: float = 200.0
    """Outputs are divided by it (logits of a classifier); 1 for a regression."""
    mode: Mode = "train"
    """ "train": batch norms use the batch, as they must where their statistics were never measured."""

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, int | float) and math.isfinite(self.temperature) and self.temperature > 0):
            msg = f"temperature must be a finite number > 0. Got {self.temperature!r}."
            raise UsageError(msg)


def grasp(source: Source, options: GraspOptions) -> Iterator[Elements]:
    """Element saliency w · (H ḡ), signed: negative where removal lets the gradient flow."""
    gradients = Gradients(source, "grasp", mode=options.mode, temperature=options.temperature)
    slopes, curved = gradients.accumulators(), gradients.accumulators()
    batches = list(gradients.batches())
    for number, batch in batches:
        gradients.backward(batch, number)
        for parameter in gradients.distinct:
            if parameter.grad is not None:
                slopes[id(parameter)].add_(parameter.grad)
                parameter.grad = None
    vector = [slopes[id(p)] / len(batches) for p in gradients.distinct]
    for number, batch in batches:
        for found in gradients.hessian_products(batch, number, [vector]):
            for parameter, product in zip(gradients.distinct, found, strict=True):
                curved[id(parameter)].add_(product)

    def saliency(name: str) -> Tensor:
        parameter = gradients.parameters[name]
        return (wide(parameter) * curved[id(parameter)]).div_(len(batches)).cpu()

    yield Computed(source.weights, saliency)
