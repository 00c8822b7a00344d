"""Ranking: in which order layers are hurt least, and whether other samples would have given the same order.

A row is a space or a layer; its numbers are increases (how much worse) at several damages, as means over groups of
samples. The row's score is the mean over its damages. Two orders are compared by Kendall's τ-b, which knows ties: 1 is the
same order, 0 is none, -1 the opposite (Kendall 1945, "The treatment of ties in ranking problems").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SPLITS, DRAWS = 200, 200
PAIRS, LEAST_SPLITS = 40_000_000, 20
"""Pairs of rows that are compared in all, about: with very many rows there are fewer splits."""
LEAST_ROWS, LEAST_GROUPS = 3, 4
"""With fewer there is no order, or no halves, to speak of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """Kendall's τ-b between the orders that disjoint halves of the samples give, over many ways to halve them."""

    tau: float
    """Mean over the splits."""
    low: float
    high: float
    """2.5 % and 97.5 % of the splits."""
    splits: int
    groups: int


def kendall(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float | None:
    """τ-b = (concordant - discordant) / √((pairs not tied in a)(pairs not tied in b)); None where one of them is all ties.

    >>> kendall([1, 2, 3, 4], [1, 2, 4, 3]), kendall([1, 2, 3], [3, 2, 1]), kendall([1, 1], [1, 2])
    (0.6666666666666666, -1.0, None)
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    upper = np.triu_indices(len(x), 1)
    dx, dy = np.sign(x[:, None] - x)[upper], np.sign(y[:, None] - y)[upper]
    free = float((dx != 0).sum()) * float((dy != 0).sum())
    return None if not free else float((dx * dy).sum()) / math.sqrt(free)


def stability(groups: Floats, *, splits: int = SPLITS, seed: int = 0) -> Stability | None:
    """How well the orders of two disjoint halves agree. `groups`: scores [rows, groups of samples].

    A half has half of the samples: the order of all of them is at least as stable. None with fewer than three rows or four
    groups, or where halves tell no rows apart.

    >>> rng = np.random.default_rng(0)
    >>> clear = stability(np.arange(5.0)[:, None] + 0.01 * rng.normal(size=(5, 32)))
    >>> clear.tau, clear.low
    (1.0, 1.0)
    >>> abs(stability(rng.normal(size=(20, 32))).tau) < 0.3
    True
    """
    rows, count = groups.shape
    if rows < LEAST_ROWS or count < LEAST_GROUPS:
        return None
    rng, found = np.random.default_rng(seed), []
    splits = min(splits, max(LEAST_SPLITS, PAIRS // (rows * rows)))
    for _ in range(splits):
        order = rng.permutation(count)
        half = count // 2
        tau = kendall(groups[:, order[:half]].mean(1), groups[:, order[half:]].mean(1))
        if tau is not None:
            found.append(tau)
    if len(found) < splits / 2:
        return None
    low, high = np.percentile(found, [2.5, 97.5])
    return Stability(tau=float(np.mean(found)), low=float(low), high=float(high), splits=len(found), groups=count)


def ranks(scores: Sequence[float] | Floats) -> Floats:
    """Rank of each, 1 for the least; equal ones share the mean of theirs.

    >>> ranks([0.5, 0.1, 0.5]).tolist()
    [2.5, 1.0, 2.5]
    """
    _, place, counts = np.unique(np.asarray(scores, dtype=np.float64), return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    return np.asarray((below + (counts + 1) / 2.0)[place])


def rank_intervals(groups: Floats, *, draws: int = DRAWS, seed: int = 0) -> list[tuple[float, float]] | None:
    """2.5 % and 97.5 % of each row's rank over bootstrap samples of the groups; None with fewer than four groups.

    >>> rank_intervals(np.arange(3.0)[:, None] + np.zeros((3, 8)))
    [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    """
    count = groups.shape[1]
    if count < LEAST_GROUPS:
        return None
    rng = np.random.default_rng(seed)
    drawn = np.stack([ranks(groups[:, rng.integers(0, count, count)].mean(1)) for _ in range(draws)])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))
