"""Which option of every layer: the least loss within a limit. Pure numpy, knows nothing of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STATES = 4096
"""Limits are counted in this many steps at most by `knapsack`: exact where they are no more, else rounded up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What one layer can become: costs ascending, losses strictly descending; the last is the layer as it is."""

    costs: Ints
    losses: Floats
    index: Ints
    """Where each option stood in what `frontier` was given."""


def frontier(costs: Sequence[int] | Ints, losses: Sequence[float] | Floats) -> Options:
    """The options that no other one beats in both cost and loss.

    >>> frontier([5, 3, 4, 9], [2.0, 4.0, 4.5, 0.0]).costs.tolist()
    [3, 5, 9]
    """
    cost, loss = np.asarray(costs, dtype=np.int64), np.asarray(losses, dtype=np.float64)
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    stays = np.concatenate(([True], best[1:] < best[:-1]))
    kept = order[stays]
    return Options(costs=cost[kept], losses=loss[kept], index=kept.astype(np.int64))


def least_loss(options: Sequence[Options], limit: int) -> list[int] | None:
    """One option of every layer, Σ cost ≤ limit, with the least Σ loss found; None where no choice fits.

    The better of two: steps along the lower convex hulls in order of loss per cost (optimal wherever it ends on a step;
    for σ² this is sorting them by what they save), and an exact table where the limit is small enough to count.
    """
    if sum(int(o.costs[0]) for o in options) > limit:
        return None
    answers = [_by_steps(options, limit), knapsack(options, limit)]
    return min(answers, key=lambda chosen: sum(float(o.losses[c]) for o, c in zip(options, chosen, strict=True)))


def uniform(options: Sequence[Options], limit: int) -> list[int] | None:
    """The largest one fraction of each layer's own cost for which Σ cost ≤ limit; None where no choice fits."""
    if sum(int(o.costs[0]) for o in options) > limit:
        return None
    fractions = np.unique(np.concatenate([o.costs / o.costs[-1] for o in options]))

    def at(fraction: float) -> list[int]:
        return [max(0, int((o.costs <= fraction * o.costs[-1] + 1e-9).sum()) - 1) for o in options]

    low, high = 0, len(fractions)  # the cost grows with the fraction: bisect
    while low < high:
        middle = (low + high) // 2
        fits = sum(int(o.costs[c]) for o, c in zip(options, at(fractions[middle]), strict=True)) <= limit
        low, high = (middle + 1, high) if fits else (low, middle)
    return at(float(fractions[max(low - 1, 0)])) if low else [0] * len(options)


def _by_steps(options: Sequence[Options], limit: int) -> list[int]:
    steps = []
    for layer, o in enumerate(options):
        corners = _hull(o)
        for a, b in pairwise(corners):
            gain = (o.losses[a] - o.losses[b]) / (o.costs[b] - o.costs[a])
            steps.append((-float(gain), layer, b))
    chosen = [0] * len(options)
    left = limit - sum(int(o.costs[0]) for o in options)
    blocked: set[int] = set()
    for _, layer, to in sorted(steps):  # within a layer gains fall, so its steps come in order
        o = options[layer]
        price = int(o.costs[to] - o.costs[chosen[layer]])
        if layer in blocked or price > left:
            blocked.add(layer)
        else:
            chosen[layer], left = to, left - price
    return _filled(options, chosen, left)


def _filled(options: Sequence[Options], chosen: list[int], left: int) -> list[int]:
    """Spend what is left: the step of any layer that gains most per cost, as long as one fits."""
    while True:
        best: tuple[float, int, int] | None = None
        for layer, o in enumerate(options):
            now = chosen[layer]
            fits = int(np.searchsorted(o.costs, o.costs[now] + left, side="right")) - 1
            if fits > now:
                gains = (o.losses[now] - o.losses[now + 1 : fits + 1]) / (o.costs[now + 1 : fits + 1] - o.costs[now])
                at = int(np.argmax(gains))
                if best is None or gains[at] > best[0]:
                    best = (float(gains[at]), layer, now + 1 + at)
        if best is None:
            return chosen
        _, layer, to = best
        left -= int(options[layer].costs[to] - options[layer].costs[chosen[layer]])
        chosen[layer] = to


def _hull(o: Options) -> list[int]:
    """Corners of the lower convex hull of loss over cost."""
    corners: list[int] = []
    for i in range(len(o.costs)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            # b is above the line from a to i
            if (o.losses[a] - o.losses[b]) * (o.costs[i] - o.costs[a]) <= (o.losses[a] - o.losses[i]) * (
                o.costs[b] - o.costs[a]
            ):
                corners.pop()
            else:
                break
        corners.append(i)
    return corners


def knapsack(options: Sequence[Options], limit: int) -> list[int]:
    """One option of every layer by a table over what is spent; exact where the limit is at most STATES steps.

    >>> a = frontier([1, 4], [5.0, 0.0])
    >>> b = frontier([1, 3], [3.0, 0.0])
    >>> knapsack([a, b], 5), knapsack([a, b], 4)
    ([1, 0], [0, 1])
    """
    least = sum(int(o.costs[0]) for o in options)
    common = int(np.gcd.reduce(np.concatenate([o.costs - o.costs[0] for o in options]))) or 1
    step = common * max(1, -(-(limit - least) // (STATES * common)))
    size = (limit - least) // step + 1
    best = np.zeros(size)
    tables = []
    for o in options:
        prices = -(-(o.costs - o.costs[0]) // step)
        found = np.full(size, np.inf)
        taken = np.zeros(size, dtype=np.int64)
        for i, (price, loss) in enumerate(zip(prices.tolist(), o.losses.tolist(), strict=True)):
            if price >= size:
                break
            value = best[: size - price] + loss
            better = value < found[price:]
            found[price:][better] = value[better]
            taken[price:][better] = i
        best = found
        tables.append((prices, taken))
    chosen = []
    at = size - 1
    for prices, taken in reversed(tables):
        i = int(taken[at])
        chosen.append(i)
        at -= int(prices[i])
    return chosen[::-1]
