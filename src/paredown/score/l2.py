"""l2: sum of squared weights, the squared Euclidean norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paredown.score.nouns import Computed, Elements, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class L2Options:
    """No options."""


def l2(source: Source, options: L2Options) -> Iterator[Elements]:
    """Element saliency w²; a unit's score is Σ w² over the elements that produce it."""
    del options
    yield Computed(source.weights, lambda name: source.weights[name].square())
