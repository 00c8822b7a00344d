"""random: the baseline that any criterion has to beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from paredown.score.nouns import Source, UnitScores


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomOptions:
    """No options."""


def random(source: Source, options: RandomOptions) -> dict[str, UnitScores]:
    """Uniform scores in [0, 1) from the seed and the space's name: the order of spaces does not matter."""
    del options
    return {
        s.name: np.random.default_rng([source.seed, zlib.crc32(s.name.encode())]).random(len(s))
        for s in source.coupling.spaces
    }
