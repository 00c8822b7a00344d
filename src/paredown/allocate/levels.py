"""Levels: how many units of a space may be kept, given alignment and floor; and which spaces are free at all."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paredown.couple.space import Coupling, Space
from paredown.errors import UsageError
from paredown.examine.cost import Cost

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
    check_patterns(coupling, cost, (*include, *exclude))
    names = []
    for space in coupling.spaces:
        mine = _names(space)
        wanted = not include or _matches(mine, include)
        if not wanted or _matches(mine, exclude):
            names.append(space.name)
    return Protected(names=tuple(names), everything=bool(coupling.spaces) and len(names) == len(coupling.spaces))


def protected_weights(
    coupling: Coupling, cost: Cost, names: Iterable[str], include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """Which of these parameters the same patterns protect; a space's name stands for all that writes its channels."""
    check_patterns(coupling, cost, (*include, *exclude))
    spaces = _spaces_of(coupling)
    return [
        name
        for name in names
        if (include and not _matches(_of_weight(name, spaces), include)) or _matches(_of_weight(name, spaces), exclude)
    ]


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
    spaces = _spaces_of(coupling)
    return {name: _highest(_of_weight(name, spaces), floor) for name in names}


def check_patterns(coupling: Coupling, cost: Cost, patterns: Sequence[str]) -> None:
    """Raises UsageError for a pattern that matches nothing in the model, with what was probably meant."""
    known = _known(coupling, cost)
    for pattern in patterns:
        if not isinstance(pattern, str) or not any(fnmatch.fnmatchcase(n, pattern) for n in known):
            near = difflib.get_close_matches(str(pattern), known, n=3, cutoff=0.4)
            hint = f" Did you mean {', '.join(repr(n) for n in near)}?" if near else ""
            msg = f"a pattern must match a parameter, module or space. Got {pattern!r}, which matches nothing.{hint}"
            raise UsageError(msg)


def _highest(names: Iterable[str], floor: Mapping[str, float]) -> float:
    mine = list(names)
    return max((float(v) for p, v in floor.items() if _matches(mine, [p])), default=0.0)


def _spaces_of(coupling: Coupling) -> dict[str, set[str]]:
    """Parameter → names of the spaces whose channels it writes."""
    found: dict[str, set[str]] = {}
    for space in coupling.spaces:
        for f in space.footprints:
            if f.role == "write":
                found.setdefault(f.parameter, set()).add(space.name)
    return found


def _of_weight(name: str, spaces: Mapping[str, set[str]]) -> set[str]:
    return {name} | _parents(name) | spaces.get(name, set())


def _matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(n, p) for n in names for p in patterns)


def _names(space: Space) -> set[str]:
    writes = {f.parameter for f in space.footprints if f.role == "write"}
    found = {space.name, space.name.partition("[")[0]} | writes
    for parameter in writes:
        found |= _parents(parameter)
    return found


def _known(coupling: Coupling, cost: Cost) -> list[str]:
    found = {s.name for s in coupling.spaces} | set(cost.parameter_shapes) | set(cost.buffer_shapes)
    for name in (*cost.parameter_shapes, *cost.buffer_shapes):
        found |= _parents(name)
    return sorted(found)


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}
