"""l1: sum of absolute weights (Li et al. 2017, "Pruning filters for efficient ConvNets", section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paredown.score.nouns import Computed, Elements, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class L1Options:
    """No options."""


def l1(source: Source, options: L1Options) -> Iterator[Elements]:
    """Element saliency |w|; a unit's score is Σ |w| over the elements that produce it."""
    del options
    yield Computed(source.weights, lambda name: source.weights[name].abs())
