"""Shares: which density every layer gets, so that the whole meets its target. Pure arithmetic on arrays of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from paredown.allocate.knapsack import hull, knapsack

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Curve = tuple[Floats, Floats]
"""Densities ascending up to 1 and the increase at each, falling to 0."""


def erk(shapes: Sequence[tuple[int, ...]]) -> Floats:
    """Densities of Erdős–Rényi with kernels, up to one factor: Σ of the axes / Π of the axes.

    For a convolution (n_in + n_out + kh + kw) / (n_in n_out kh kw), for a linear layer (n_in + n_out) / (n_in n_out);
    n_in counts the inputs of one group. Source: Evci et al. 2020 (RigL), arXiv 1911.11134, section 3.
    """
    return np.array([sum(s) / np.prod(np.array(s, dtype=np.float64)) for s in shapes], dtype=np.float64)


def scaled(raw: Floats, amounts: Floats, lows: Floats, target: float) -> Floats:
    """Densities min(1, max(low, ε × raw)) with the one ε for which Σ amounts × density = target.

    Layers that would be above 1 are dense and ε is solved again for the rest, as is done for ERK; here in closed form,
    because the sum is straight between the ε at which a layer reaches its floor or becomes dense.

    >>> scaled(np.array([1.0, 4.0]), np.array([10.0, 10.0]), np.zeros(2), 14.0).tolist()
    [0.4, 1.0]
    """
    corners = np.unique(np.concatenate([[0.0], lows / raw, 1.0 / raw]))

    def at(factor: float) -> Floats:
        return np.asarray(np.minimum(1.0, np.maximum(lows, factor * raw)))

    sums = np.array([float(amounts @ at(c)) for c in corners])
    i = min(int(np.searchsorted(sums, target, side="left")), len(corners) - 1)
    if i == 0 or sums[i] <= sums[i - 1]:
        return at(float(corners[i]))
    part = min((target - float(sums[i - 1])) / float(sums[i] - sums[i - 1]), 1.0)
    return at(float(corners[i - 1] + part * (corners[i] - corners[i - 1])))


def equal_increase(curves: Sequence[Curve], amounts: Floats, lows: Floats, target: float) -> Floats:
    """The least density of every layer whose increase is within one common limit, the one that meets the target."""

    def at(limit: float) -> Floats:
        return np.array([max(low, _least_density(c, limit)) for c, low in zip(curves, lows, strict=True)])

    return _between(at, amounts, target, high=max(float(c[1][0]) for c in curves))


def _least_density(curve: Curve, limit: float) -> float:
    density, worse = curve
    first = int(np.argmax(worse <= limit))
    if first == 0:
        return float(density[0])
    part = (worse[first - 1] - limit) / (worse[first - 1] - worse[first])
    return float(density[first - 1] + part * (density[first] - density[first - 1]))


def _between(at: Callable[[float], Floats], amounts: Floats, target: float, high: float) -> Floats:
    """Densities fall with the limit; where they jump over the target, the straight line between both sides."""
    if amounts @ at(0.0) <= target:  # more may be removed at no cost than is asked: in equal parts
        above, below = np.ones(len(amounts)), at(0.0)
    else:
        low = 0.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if amounts @ at(middle) > target else (low, middle)
        above, below = at(low), at(high)
    most, least = float(amounts @ above), float(amounts @ below)
    return np.asarray(below + (above - below) * ((target - least) / (most - least) if most > least else 0.0))


def by_price(curves: Sequence[Curve], amounts: Floats, lows: Floats, target: float, *, exact: bool) -> Floats:
    """Densities of the least Σ increase found for Σ amounts × density = target.

    Along the lower convex hull of each curve, most saved increase per amount first, the last step in part: optimal where
    curves are convex. With `exact` the knapsack over the measured densities as well, what it leaves spent in the same
    way, and the better of the two.
    """
    cut = [_from(c, low) for c, low in zip(curves, lows, strict=True)]
    answers = [_spent(cut, amounts, np.array([c[0][0] for c in cut]), target)]
    if exact:
        costs = [c[0] * a for c, a in zip(cut, amounts, strict=True)]
        solved = knapsack(costs, [c[1] for c in cut], target)
        if solved is not None:
            start = np.array([c[0][i] for c, i in zip(cut, solved.chosen, strict=True)])
            answers.append(_spent(cut, amounts, start, target))
    return min(answers, key=lambda d: sum(float(np.interp(x, *c)) for x, c in zip(d, cut, strict=True)))


def _from(curve: Curve, low: float) -> Curve:
    density, worse = curve
    inside = density > low
    return np.concatenate([[low], density[inside]]), np.concatenate([[np.interp(low, density, worse)], worse[inside]])


def _spent(curves: Sequence[Curve], amounts: Floats, start: Floats, target: float) -> Floats:
    """From densities upwards, most saved increase per amount first, until the target is spent."""
    steps = []
    for number, ((density, worse), amount, first) in enumerate(zip(curves, amounts, start, strict=True)):
        inside = density >= first
        d, w = density[inside], worse[inside]
        for a, b in pairwise(hull(d, w)):
            steps.append(((w[b] - w[a]) / max(amount * (d[b] - d[a]), 1e-300), number, float(d[b] - d[a])))
    out, left = start.copy(), target - float(amounts @ start)
    for _, number, rise in sorted(steps):
        if left <= 0:
            break
        part = min(rise, left / float(amounts[number]))
        out[number] += part
        left -= part * float(amounts[number])
    return np.minimum(out, 1.0)


def in_whole_numbers(wanted: Floats, most: Ints, total: int) -> Ints:
    """Integers near `wanted`, at most `most`, whose sum is `total`: the largest fractions are rounded up.

    >>> in_whole_numbers(np.array([1.5, 2.25, 3.25]), np.array([9, 9, 9]), 7).tolist()
    [2, 2, 3]
    """
    low = np.minimum(np.floor(wanted + 1e-9).astype(np.int64), most)
    for position in np.argsort(-(wanted - low), kind="stable"):
        if low.sum() >= total:
            break
        low[position] += int(low[position] < most[position])
    return low
