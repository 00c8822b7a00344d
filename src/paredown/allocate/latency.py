"""LayerLatency: one layer's milliseconds by the channels that it writes and reads, on a grid that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paredown.errors import UsageError

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How long one axis of a weight is by what its spaces keep: dense - Σ removed units × positions per unit.

    >>> Length(dense=8, per={"a": 2.0}).of({"a": 4}, {"a": np.array([4, 1])}).tolist()
    [8.0, 2.0]
    """

    dense: int
    per: Mapping[str, float] = field(default_factory=dict)
    """Space → positions that one of its units takes with it."""

    def of(self, units: Mapping[str, int], kept: Mapping[str, NDArray[np.int64] | Floats]) -> Floats:
        """The length for kept counts of any shape."""
        out = np.asarray(float(self.dense))
        for name, per in self.per.items():
            out = out - (units[name] - np.asarray(kept[name], dtype=np.float64)) * per
        return np.asarray(out)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerLatency:
    """Milliseconds of one layer; straight between the points of the grid, and beyond its ends as at the end."""

    name: str
    writes: Length
    reads: Length
    out_channels: tuple[int, ...]
    """Ascending."""
    in_channels: tuple[int, ...]
    """Ascending; as long as the axis of the weight, so those of one group."""
    ms: Floats
    """Shape [out_channels, in_channels]."""

    def __post_init__(self) -> None:
        shape = (len(self.out_channels), len(self.in_channels))
        values = np.asarray(self.ms, dtype=np.float64)
        if values.shape != shape or not np.isfinite(values).all() or (values < 0).any():
            msg = f"a layer's milliseconds must be numbers ≥ 0 of shape {shape}. Got shape {values.shape} for {self.name}."
            raise UsageError(msg)
        object.__setattr__(self, "ms", values)

    def at(self, out_channels: ArrayLike, in_channels: ArrayLike) -> Floats:
        """Milliseconds at any lengths, bilinear.

        >>> table = LayerLatency(
        ...     name="conv", writes=Length(dense=16), reads=Length(dense=8), out_channels=(8, 16), in_channels=(4, 8),
        ...     ms=np.array([[1.0, 2.0], [2.0, 4.0]]),
        ... )
        >>> float(table.at(12, 8))
        3.0
        """
        rows, row = _place(self.out_channels, out_channels)
        columns, column = _place(self.in_channels, in_channels)
        low = self.ms[rows, columns] * (1 - column) + self.ms[rows, _next(columns, self.in_channels)] * column
        above = _next(rows, self.out_channels)
        high = self.ms[above, columns] * (1 - column) + self.ms[above, _next(columns, self.in_channels)] * column
        return np.asarray(low * (1 - row) + high * row)

    def of(self, units: Mapping[str, int], kept: Mapping[str, NDArray[np.int64] | Floats]) -> Floats:
        """Milliseconds for the counts that each space keeps."""
        return self.at(self.writes.of(units, kept), self.reads.of(units, kept))


def _place(points: tuple[int, ...], values: ArrayLike) -> tuple[NDArray[np.int64], Floats]:
    """The point at or below, and how far from there to the next."""
    known = np.asarray(points, dtype=np.float64)
    wanted = np.clip(np.asarray(values, dtype=np.float64), known[0], known[-1])
    at = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, max(len(known) - 2, 0)).astype(np.int64)
    step = known[_next(at, points)] - known[at]
    return at, np.asarray((wanted - known[at]) / np.where(step > 0, step, 1.0))


def _next(at: NDArray[np.int64], points: tuple[int, ...]) -> NDArray[np.int64]:
    return np.minimum(at + 1, len(points) - 1)
