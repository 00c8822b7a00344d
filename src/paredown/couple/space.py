"""Unit, Space, Pinned, Coupling: which channels must live or die together, and which may not die."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["write", "read"]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Indices of one parameter axis. role "write": these produce or scale the channel; "read": these consume it."""

    parameter: str
    axis: int
    indices: tuple[int, ...]
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One channel (or head, or group of channels in lockstep) with everything that must leave with it."""

    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """One parameter axis as seen by all units of a space: `indices[u]` leave with unit u. Shape [units, per unit]."""

    parameter: str
    axis: int
    indices: Indices
    role: Role


@dataclass(frozen=True, kw_only=True)
class Space:
    """Units that compete: equal in which parameter axes they touch and how much of each."""

    name: str
    """The first weight that writes these channels, as "features.0.weight[0]"."""
    footprints: tuple[Footprint, ...]
    kind: str = "channel"
    """ "channel", or "head" where a unit is a whole attention head."""

    def __len__(self) -> int:
        return len(self.footprints[0].indices)

    @cached_property
    def width(self) -> int:
        """Channels that one unit removes from the tensor it lives in (1; more for heads and lockstep groups)."""
        writes = [f.indices.shape[1] for f in self.footprints if f.role == "write"]
        return int(max(writes, default=1))

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units one by one, in the order of their first index."""
        return tuple(self._units())

    def _units(self) -> Iterator[Unit]:
        for u in range(len(self)):
            yield Unit(
                slices=tuple(
                    Slice(parameter=f.parameter, axis=f.axis, indices=tuple(f.indices[u].tolist()), role=f.role)
                    for f in self.footprints
                )
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """Channels that may not be removed, by reason. `units` counts them."""

    reason: str
    units: int
    where: str
    """Node and source line, as "linear (model.py:12)"."""
    parameters: tuple[str, ...] = ()
    """Parameter axes they belong to, as "fc.weight[0]"."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Coupling:
    """All spaces of a program, what is pinned and why, and the ops that had no rule."""

    spaces: tuple[Space, ...]
    pinned: tuple[Pinned, ...]
    unknown_ops: dict[str, int]
    products: Mapping[str, tuple[Indices, ...]] = field(default_factory=dict)
    """Products of two activations (matmul, attention) by node name: per axis that can shrink, [length, 2] of
    (space number, unit number), -1 where a position is fixed. Their MACs scale with the surviving share of each axis."""
    seconds: float = 0.0

    def __repr__(self) -> str:
        """Counts, and why what is pinned is pinned: the indices would fill pages."""
        reasons: Counter[str] = Counter()
        for pinned in self.pinned:
            reasons[pinned.reason] += pinned.units
        why = "; ".join(f"{reason}: {units:,}" for reason, units in reasons.most_common())
        told = f", ops without a rule: {dict(self.unknown_ops)}" if self.unknown_ops else ""
        return f"Coupling({len(self.spaces)} spaces, {self.free_units:,} units free, {self.pinned_units:,} pinned ({why}){told})"

    def __getitem__(self, name: str) -> Space:
        return next(s for s in self.spaces if s.name == name)

    @property
    def free_units(self) -> int:
        """Units that may be removed."""
        return sum(len(s) for s in self.spaces)

    @property
    def pinned_units(self) -> int:
        """Units that may not."""
        return sum(p.units for p in self.pinned)
