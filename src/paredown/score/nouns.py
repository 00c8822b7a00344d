"""Source and Scores: what a criterion is given, and what it says about every unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from paredown.couple.space import Coupling, Footprint, Space
from paredown.program import Program

UnitScores = NDArray[np.float64]
Elements = Mapping[str, Tensor]
"""Saliency of every element, by parameter name; the shape is the parameter's."""
Group = Literal["write", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a criterion may look at. It must not change any of it."""

    program: Program
    coupling: Coupling
    weights: Mapping[str, Tensor]
    """The parameters that units touch, by name."""
    module: nn.Module
    """The model in the user's class; a criterion that runs it runs a copy."""
    batches: Iterable[Any] | None
    loss: Callable[[nn.Module, Any], Tensor] | None
    num_batches: int
    seed: int
    group: Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """One row of the table. Exactly one of `elements` and `units` is set."""

    elements: Callable[[Source, Any], Iterator[Elements]] | None = None
    """Yields element saliency once, or once for each batch; the scores of a unit are averaged over what it yields."""
    units: Callable[[Source, Any], dict[str, UnitScores]] | None = None
    """Scores by space name, for criteria that have no element saliency."""
    options: type[Any]
    squared: bool = False
    """Whether the sum over a unit's elements is squared before averaging (first-order Taylor)."""
    needs_data: bool = False
    of_weights: bool = True
    """Whether scores follow the weights: permuting channels permutes scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One number per unit, higher is more important. Ties are broken by index: the lower index is removed first."""

    criterion: str
    by_space: Mapping[str, UnitScores]
    """Space name → float64 [units]; empty for a granularity of masks."""
    granularity: str = "channel"
    by_cell: Mapping[str, UnitScores] = field(default_factory=dict)
    """Parameter → float64, the shape of its grid of cells (see paredown.granularity); empty for channels."""
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    notes: tuple[str, ...] = ()
    """What the criterion had to do differently for some spaces."""

    def normalized(self, how: Literal["mean", "max", "none"] = "mean") -> dict[str, UnitScores]:
        """Scores comparable across spaces: divided by the space's mean (or largest) absolute score.

        >>> Scores(criterion="l1", by_space={"a": np.array([1.0, 3.0])}).normalized()["a"].tolist()
        [0.5, 1.5]
        """
        if how == "none":
            return {n: s.copy() for n, s in self.by_space.items()}
        scale = {
            n: float(np.abs(s).mean() if how == "mean" else np.abs(s).max()) if len(s) else 0.0
            for n, s in self.by_space.items()
        }
        return {n: s / scale[n] if scale[n] > 0 else np.zeros_like(s) for n, s in self.by_space.items()}


def counted(space: Space, weights: Mapping[str, Tensor], group: Group) -> tuple[Footprint, ...]:
    """The footprints whose elements make up a unit's score.

    "write": rows of weights (≥ 2 axes) that produce the unit, the filter norm; where there are none, whatever else
    writes it, then whatever reads it. "all": every parameter element that leaves with the unit.
    """
    known = tuple(f for f in space.footprints if f.parameter in weights)
    if group == "all":
        return known
    writes = tuple(f for f in known if f.role == "write")
    return tuple(f for f in writes if weights[f.parameter].dim() >= 2) or writes or known
