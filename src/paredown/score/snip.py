"""snip: |g·w|, the slope of the loss in a gate on every connection (Lee et al. 2019, "SNIP", eq. 6).

Where we differ: the scores are not divided by their sum, which changes no ranking; and the weights that are scored are
those that will be trained (a known implementation draws new ones first).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from paredown.score.gradients import Gradients, Mode, wide
from paredown.score.nouns import Computed, Elements, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class SnipOptions:
    """How the model runs."""

    mode: Mode = "train"
    """ "train": batch norms use the batch, as they must where their statistics were never measured."""


def snip(source: Source, options: SnipOptions) -> Iterator[Elements]:
    """Element saliency |ḡ w|, ḡ the mean gradient over batches."""
    gradients = Gradients(source, "snip", mode=options.mode)
    slopes = gradients.accumulators()

    def take(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        slopes[id(parameter)].add_(parameter.grad)

    passes = gradients.streamed(take)

    def saliency(name: str) -> Tensor:
        parameter = gradients.parameters[name]
        return (wide(parameter) * slopes[id(parameter)]).abs_().div_(passes).cpu()

    yield Computed(source.weights, saliency)
