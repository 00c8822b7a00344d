"""fisher: second-order change of the loss, the Hessian being the empirical Fisher's diagonal (OBD).

LeCun, Denker & Solla 1990 ("Optimal brain damage") with F in the place of ∂²L/∂w², as Theis et al. 2018. One gradient per
sample by default: a batch's mean gradient squared is another, smaller number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from paredown.score.gradients import Gradients, wide
from paredown.score.nouns import Computed, Elements, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class FisherOptions:
    """How gradients are taken."""

    per_sample: bool = True
    """One backward pass per sample, else one per batch: quicker, and no longer the Fisher."""


def fisher(source: Source, options: FisherOptions) -> Iterator[Elements]:
    """Element saliency ½ F w², F = mean of g² over samples."""
    gradients = Gradients(source, "fisher")
    squares = gradients.accumulators()

    def take(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        slope = wide(parameter.grad)
        squares[id(parameter)].addcmul_(slope, slope)

    passes = gradients.streamed(take, per_sample=options.per_sample)

    def saliency(name: str) -> Tensor:
        parameter = gradients.parameters[name]
        return wide(parameter).square().mul_(squares[id(parameter)]).mul_(0.5 / passes).cpu()

    yield Computed(source.weights, saliency)
