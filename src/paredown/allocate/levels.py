"""Levels: how many units of a space may be kept, given alignment and floor; and which spaces are free at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paredown.couple.space import Coupling, Space
from paredown.examine.cost import Cost
from paredown.score.patterns import as_patterns, check_patterns, matches, names_of_weight, parents, spaces_of
from paredown.score.patterns import protected_weights as protected_weights  # noqa: PLC0414  (levels are asked for it too)

Levels = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Protected:
    """Spaces that patterns leave alone."""

    names: tuple[str, ...]
    """By exclude, or not by include."""
    everything: bool


def levels(space: Space, *, align: int, floor: float) -> Levels:
    """Unit counts that may be kept, ascending; the last is all of them.

    A unit removes `width` channels, so units leave in steps of align / gcd(align, width). Where a step would be more
    than half of the space, it is halved until it is not: a space too small for the alignment is aligned to what it
    can. At least max(1, floor × units) stay.

    >>> from paredown.couple.space import Footprint
    >>> f = Footprint(parameter="w", axis=0, indices=np.arange(20).reshape(20, 1), role="write")
    >>> levels(Space(name="s", footprints=(f,)), align=8, floor=0.1).tolist()
    [8, 16, 20]
    """
    units = len(space)
    step = align // math.gcd(align, space.width)
    while step > 1 and step > units // 2:
        step = step // 2 if step % 2 == 0 else 1
    least = max(1, math.ceil(floor * units - 1e-9))
    first = -(-least // step) * step
    return np.array([*range(first, units, step), units], dtype=np.int64)


def protected(coupling: Coupling, cost: Cost, include: Sequence[str], exclude: Sequence[str]) -> Protected:
    """Which spaces the patterns protect. Exclude wins over include.

    Patterns (fnmatch) are compared with parameter names, with the names of the modules that hold them and of their
    parents, and with space names. A space is excluded where a pattern matches anything that writes its channels.
    Raises UsageError for a pattern that matches nothing in the model.
    """
    include, exclude = as_patterns(include), as_patterns(exclude)
    check_patterns(coupling, cost, (*include, *exclude))
    names = []
    for space in coupling.spaces:
        mine = _names(space)
        wanted = not include or matches(mine, include)
        if not wanted or matches(mine, exclude):
            names.append(space.name)
    return Protected(names=tuple(names), everything=bool(coupling.spaces) and len(names) == len(coupling.spaces))


def floors(coupling: Coupling, cost: Cost, floor: float | Mapping[str, float]) -> dict[str, float]:
    """The least share of every space: one for all, or by pattern, the highest that matches; else 0.

    Raises UsageError for a pattern that matches nothing.
    """
    if not isinstance(floor, Mapping):
        return {s.name: float(floor) for s in coupling.spaces}
    check_patterns(coupling, cost, tuple(floor))
    return {s.name: _highest(_names(s), floor) for s in coupling.spaces}


def weight_floors(
    coupling: Coupling, cost: Cost, names: Iterable[str], floor: float | Mapping[str, float]
) -> dict[str, float]:
    """The same for parameters."""
    if not isinstance(floor, Mapping):
        return {name: float(floor) for name in names}
    check_patterns(coupling, cost, tuple(floor))
    spaces = spaces_of(coupling)
    return {name: _highest(names_of_weight(name, spaces), floor) for name in names}


def _highest(names: Iterable[str], floor: Mapping[str, float]) -> float:
    mine = list(names)
    return max((float(v) for p, v in floor.items() if matches(mine, [p])), default=0.0)


def _names(space: Space) -> set[str]:
    writes = {f.parameter for f in space.footprints if f.role == "write"}
    found = {space.name, space.name.partition("[")[0]} | writes
    for parameter in writes:
        found |= parents(parameter)
    return found
