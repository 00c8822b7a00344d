"""taylor2: first- and second-order change of the loss, element by element (Ma et al. 2023, LLM-Pruner, "param_mix").

|g w - ½ w² F| with g the mean gradient and F the mean of squared per-sample gradients (empirical Fisher). Where we
differ: LLM-Pruner's own attention branch drops the absolute value by mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from paredown.score.gradients import Gradients, wide
from paredown.score.nouns import Computed, Elements, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Taylor2Options:
    """How gradients are taken."""

    per_sample: bool = True
    """One backward pass per sample, else one per batch: quicker, and no longer the Fisher."""


def taylor2(source: Source, options: Taylor2Options) -> Iterator[Elements]:
    """Element saliency |ḡ w - ½ F w²|, means over samples."""
    gradients = Gradients(source, "taylor2")
    slopes, squares = gradients.accumulators(), gradients.accumulators()

    def take(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        slope = wide(parameter.grad)
        slopes[id(parameter)].add_(slope)
        squares[id(parameter)].addcmul_(slope, slope)

    passes = gradients.streamed(take, per_sample=options.per_sample)

    def saliency(name: str) -> Tensor:
        parameter = gradients.parameters[name]
        weight = wide(parameter)
        change = weight * slopes[id(parameter)]
        change.addcmul_(weight * squares[id(parameter)], weight, value=-0.5)
        return change.abs_().div_(passes).cpu()

    yield Computed(source.weights, saliency)
