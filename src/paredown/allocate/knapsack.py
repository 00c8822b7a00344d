"""One option of every group, the least loss within a limit: the multiple-choice knapsack, solved exactly.

Groups are taken one after another; of all partial choices only those stay that no other beats in both cost and loss,
and whose loss plus a lower bound for the rest (the linear relaxation) can still beat the best known answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
MOST_STATES = 200_000
"""Partial choices that are followed; beyond it the least promising are dropped, and the answer is no longer exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A choice, and whether it is certain that none is better."""

    chosen: tuple[int, ...]
    """The option of each group, as numbered in what was given."""
    cost: float
    loss: float
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Options that no other one beats: costs ascending, losses descending."""

    costs: Floats
    losses: Floats
    index: NDArray[np.int64]


def knapsack(
    costs: Sequence[ArrayLike], losses: Sequence[ArrayLike], limit: float, *, most_states: int = MOST_STATES
) -> Solved | None:
    """min Σ losses[g][o_g] over one option o_g per group with Σ costs[g][o_g] ≤ limit; None where nothing fits.

    Costs and losses are any finite numbers; sums of integers below 2⁵³ are exact, others within their rounding. Of equal answers the cheaper one wins.
    The dynamic program over non-dominated states is that of Nemhauser & Ullmann 1969, with the bound of Sinha &
    Zoltners 1979.

    >>> knapsack([[1, 4], [1, 3]], [[5.0, 0.0], [3.0, 0.0]], 5)
    Solved(chosen=(1, 0), cost=5.0, loss=3.0, exact=True)
    """
    groups = [_frontier(c, loss) for c, loss in zip(costs, losses, strict=True)]
    if sum(float(g.costs[0]) for g in groups) > limit:
        return None
    bounds = [_Bound.of(groups[n:]) for n in range(len(groups) + 1)]
    best = _by_steps(groups, limit)
    slack = 1e-12 * (1.0 + sum(float(np.abs(g.losses).max()) for g in groups))
    room = limit + _rounding(groups, limit)
    cost, loss = np.zeros(1), np.zeros(1)
    parents: list[tuple[Any, Any]] = []
    exact = True
    for number, group in enumerate(groups):
        all_costs = (cost[:, None] + group.costs).ravel()
        all_losses = (loss[:, None] + group.losses).ravel()
        rest = bounds[number + 1]
        hope = all_losses + rest.at(room - all_costs)
        alive = np.flatnonzero((all_costs + rest.least <= room) & (hope <= best + slack))
        order = alive[np.lexsort((all_losses[alive], all_costs[alive]))]
        lowest = np.minimum.accumulate(all_losses[order])
        stays = order[np.concatenate(([True], lowest[1:] < lowest[:-1]))]
        if len(stays) > most_states:
            promising = np.sort(np.argsort(hope[stays], kind="stable")[:most_states])
            stays, exact = stays[promising], False
        parents.append((stays // len(group.costs), stays % len(group.costs)))
        cost, loss = all_costs[stays], all_losses[stays]
    at = int(np.argmin(loss))
    answer = (float(cost[at]), float(loss[at]))
    chosen = []
    for group, (parent, option) in zip(reversed(groups), reversed(parents), strict=True):
        chosen.append(int(group.index[option[at]]))
        at = int(parent[at])
    return Solved(chosen=tuple(reversed(chosen)), cost=answer[0], loss=answer[1], exact=exact)


def _rounding(groups: Sequence[_Group], limit: float) -> float:
    """How far a sum of costs may be off by the order of its terms; 0 where all are integers, whose sums are exact."""
    if float(limit).is_integer() and all((g.costs == np.floor(g.costs)).all() for g in groups):
        return 0.0
    largest = abs(limit) + sum(float(np.abs(g.costs).max()) for g in groups)
    return 4 * len(groups) * float(np.finfo(np.float64).eps) * largest


def _frontier(costs: ArrayLike, losses: ArrayLike) -> _Group:
    cost, loss = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    kept = order[np.concatenate(([True], best[1:] < best[:-1]))]
    return _Group(costs=cost[kept], losses=loss[kept], index=kept.astype(np.int64))


def hull(costs: Floats, losses: Floats) -> list[int]:
    """Corners of the lower convex hull of loss over cost; costs ascending, losses descending.

    >>> hull(np.array([0.0, 1.0, 2.0]), np.array([4.0, 3.0, 0.0]))
    [0, 2]
    """
    corners: list[int] = []
    for i in range(len(costs)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (losses[a] - losses[b]) * (costs[i] - costs[a]) > (losses[a] - losses[i]) * (costs[b] - costs[a]):
                break
            corners.pop()
        corners.append(i)
    return corners


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bound:
    """No choice of these groups loses less than `at(what may be spent)`."""

    spent: Floats
    loss: Floats
    least: float

    @classmethod
    def of(cls, groups: Sequence[_Group]) -> _Bound:
        steps = sorted(
            (
                (g.losses[b] - g.losses[a]) / (g.costs[b] - g.costs[a]),
                g.costs[b] - g.costs[a],
                g.losses[b] - g.losses[a],
            )
            for g in groups
            for a, b in pairwise(hull(g.costs, g.losses))
        )
        least = float(sum(g.costs[0] for g in groups))
        start = float(sum(g.losses[0] for g in groups))
        return cls(
            spent=least + np.cumsum([0.0, *(s[1] for s in steps)]),
            loss=start + np.cumsum([0.0, *(s[2] for s in steps)]),
            least=least,
        )

    def at(self, spend: Floats) -> Floats:
        return np.asarray(np.interp(spend, self.spent, self.loss))


def _by_steps(groups: Sequence[_Group], limit: float) -> float:
    """The loss of a good choice: steps along the hulls, most saved loss per cost first, as long as they fit."""
    steps = []
    for number, g in enumerate(groups):
        for a, b in pairwise(hull(g.costs, g.losses)):
            steps.append(((g.losses[b] - g.losses[a]) / (g.costs[b] - g.costs[a]), number, a, b))
    at = [0] * len(groups)
    left = limit - float(sum(g.costs[0] for g in groups))
    for _, number, a, b in sorted(steps):
        g = groups[number]
        if at[number] == a and g.costs[b] - g.costs[a] <= left:
            at[number], left = b, left - float(g.costs[b] - g.costs[a])
    return float(sum(g.losses[i] for g, i in zip(groups, at, strict=True)))
