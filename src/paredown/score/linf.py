"""linf: the largest absolute weight of a unit or cell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paredown.score.nouns import Computed, Elements, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class LinfOptions:
    """No options."""


def linf(source: Source, options: LinfOptions) -> Iterator[Elements]:
    """Element saliency |w|; a unit's score is the largest over the elements that produce it."""
    del options
    yield Computed(source.weights, lambda name: source.weights[name].abs())
