"""random: the baseline that any criterion has to beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from paredown.granularity import MASKED, Granularity
from paredown.score.nouns import Cells, Source, UnitScores

KINDS = MASKED


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomOptions:
    """No options."""


def random(source: Source, options: RandomOptions) -> dict[str, UnitScores]:
    """Uniform scores in [0, 1) from the seed and the space's name: the order of spaces does not matter."""
    del options
    return {s.name: _generator(source, s.name).random(len(s)) for s in source.coupling.spaces}


def random_cells(source: Source, options: RandomOptions, granularity: Granularity) -> dict[str, Cells]:
    """The same for cells, from the seed and the parameter's name; float32 where a cell is one element."""
    del options
    single = granularity.kind in ("element", "n:m")
    return {
        name: _generator(source, name).random(
            granularity.grid(tuple(weight.shape)), dtype=np.float32 if single else np.float64
        )
        for name, weight in source.weights.items()
    }


def _generator(source: Source, name: str) -> np.random.Generator:
    return np.random.default_rng([source.seed, zlib.crc32(name.encode())])
