"""Lines: what a file will weigh or take, from what files of the same network did; straight near the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEAR = 0.05
"""Distance from the answer, as a share of it, at which a file counts half as much."""
MOST = 3.0
"""A slope this many times above or below the expected one is noise: the expected one is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """y = slope · x + offset."""

    slope: float
    offset: float

    def of(self, x: float) -> float:
        """What is foreseen."""
        return self.slope * x + self.offset

    def inverse(self, y: float) -> float:
        """Where y is reached."""
        return (y - self.offset) / self.slope


def fitted(points: Sequence[tuple[float, float]], near: float, slope: float) -> Line:
    """The line by weighted least squares, through the point whose y is nearest to `near`.

    `points` are (x foreseen, y measured), at least one; `slope` is expected where one point, or noise, says nothing.

    >>> line = fitted([(1.0, 3.0), (2.0, 5.0)], near=4.0, slope=1.0)
    >>> round(line.slope, 6), round(line.of(1.5), 6)
    (2.0, 4.0)
    """
    x, y = (np.array(v, dtype=np.float64) for v in zip(*points, strict=True))
    away = np.abs(y - near) / max(abs(near), 1e-12)
    weights = 1 / (NEAR + away)
    middle_x, middle_y = np.average(x, weights=weights), np.average(y, weights=weights)
    spread = float(np.sum(weights * (x - middle_x) ** 2))
    found = float(np.sum(weights * (x - middle_x) * (y - middle_y))) / spread if spread > 0 else slope
    if not slope / MOST <= found <= slope * MOST:
        found = slope
    nearest = int(np.argmin(away))
    return Line(slope=found, offset=float(y[nearest] - found * x[nearest]))
