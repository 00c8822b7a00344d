"""Source and Scores: what a criterion is given, and what it says about every unit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from paredown.couple.space import Coupling, Footprint, Space
from paredown.granularity import Granularity
from paredown.program import Program

UnitScores = NDArray[np.float64]
Cells = NDArray[Any]
"""One number per cell of a weight: float64, or the weight's own precision where a cell is a single element."""
Elements = Mapping[str, Tensor]
"""Saliency of every element, by parameter name; the shape is the parameter's."""
Group = Literal["write", "all"]
Reduction = Literal["sum", "mean", "max", "l2", "product", "first"]
MemberNorm = Literal["none", "mean", "max", "layer"]
Scope = Literal["layer", "row"]


class Computed(Mapping[str, Tensor]):
    """Elements that are computed when they are read, one parameter at a time: a second copy of the model is never held."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names = tuple(names)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a criterion may look at. It must not change any of it."""

    program: Program
    coupling: Coupling
    weights: Mapping[str, Tensor]
    """The parameters to score, by name: those that units touch, or those that masks may be of."""
    module: nn.Module
    """The model in the user's class; a criterion that runs it runs a copy."""
    batches: Iterable[Any] | None
    loss: Callable[[nn.Module, Any], Tensor] | None
    num_batches: int
    seed: int
    group: Group
    granularity: Granularity
    """What is scored: units, or cells of weights."""
    bias: bool = True
    """Whether biases (of layers and norms) count where group is "all"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """One row of the table. Exactly one of `elements`, `outputs` and `units` is set; the verb reduces what they say."""

    elements: Callable[[Source, Any], Iterator[Elements | tuple[Elements, ...]]] | None = None
    """Yields element saliency once, or once for each batch: scores are averaged over what it yields. Several maps at
    once are reduced one by one and meet in `finish`."""
    outputs: Callable[[Source, Any], dict[tuple[str, int], UnitScores]] | None = None
    """Scores by (parameter, axis) along that axis, for criteria that look at what leaves a layer."""
    units: Callable[[Source, Any], dict[str, UnitScores]] | None = None
    """Scores by space name, for criteria that have neither."""
    cells: Callable[[Source, Any, Granularity], dict[str, Cells]] | None = None
    """A way of its own to score cells, of the kinds in `cell_kinds`."""
    cell_kinds: tuple[str, ...] = ()
    options: type[Any]
    inner: Literal["sum", "max"] = "sum"
    """Over the elements of one unit or cell."""
    finish: Callable[[Sequence[Any], Any, Any], Any] | None = None
    """(reduced maps, number of elements, options) → score, before averaging over what was yielded."""
    root: bool = False
    """Whether the square root of the reduced score is the score (norms)."""
    within: Callable[[Cells], Cells] | None = None
    """Of all cells of one parameter, or all units of one space, at the end."""
    scope: Scope = "layer"
    """ "row": cells are to be compared inside each output row only."""
    needs_data: bool = False
    at_init: bool = False
    """Whether it is meant for weights that nobody trained."""
    of_weights: bool = True
    """Whether scores follow the weights: permuting channels permutes scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One number per unit, higher is more important. Ties are broken by index: the lower index is removed first."""

    criterion: str
    by_space: Mapping[str, UnitScores]
    """Space name → float64 [units]; empty for a granularity of masks."""
    granularity: str = "channel"
    by_cell: Mapping[str, Cells] = field(default_factory=dict)
    """Parameter → the shape of its grid of cells (see paredown.granularity); float64, or where a cell is a single
    element the precision of its weight. Empty for channels."""
    scope: Scope = "layer"
    """Where cells compete: in a layer, or only with those of their own output row (Wanda)."""
    flipped: Mapping[str, int] | None = None
    """Weights of `by_cell` stored [in, out, …], whose output rows lie along axis 1, and the number of their groups (a
    transposed convolution's). None, of scores made by hand: allocate tells by the coupling."""
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


def counted(
    space: Space, weights: Mapping[str, Tensor], group: Group, left_out: Collection[str] = ()
) -> tuple[Footprint, ...]:
    """The footprints whose elements make up a unit's score: its members.

    "write": rows of weights (≥ 2 axes) that produce the unit, the filter norm; where there are none, whatever else
    writes it, then whatever reads it. "all": every parameter element that leaves with the unit, those of `left_out`
    (biases) only where nothing else is there.
    """
    known = tuple(f for f in space.footprints if f.parameter in weights)
    if group == "all":
        return tuple(f for f in known if f.parameter not in left_out) or known
    writes = tuple(f for f in known if f.role == "write")
    return tuple(f for f in writes if weights[f.parameter].dim() >= 2) or writes or known
