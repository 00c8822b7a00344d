"""chord_distances: how far the points of a curve lie above the straight line between its ends."""

from __future__ import annotations

import math

import numpy as np

from paredown.bootstrap import Floats


def chord_distances(x: Floats, y: Floats) -> Floats:
    """Distance above the chord from the point with the least x to that with the most, both axes scaled to 0–1.

    d = ((y - y₀)(x₁ - x₀) - (x - x₀)(y₁ - y₀)) / √((x₁ - x₀)² + (y₁ - y₀)²); negative below the chord.

    >>> chord_distances(np.array([0.0, 50.0, 100.0]), np.array([9.0, 9.0, 5.0])).round(3).tolist()
    [0.0, 0.354, 0.0]
    """
    u, v = _scaled(x), _scaled(y)
    first, last = int(np.argmin(x)), int(np.argmax(x))
    across, up = u[last] - u[first], v[last] - v[first]
    length = math.hypot(across, up)
    if length == 0:
        return np.zeros(len(u))
    distances: Floats = ((v - v[first]) * across - (u - u[first]) * up) / length
    return np.where(np.abs(distances) < 1e-12, 0.0, distances)


def _scaled(values: Floats) -> Floats:
    span = float(np.ptp(values))
    return (values - values.min()) / span if span > 0 else np.zeros(len(values))
