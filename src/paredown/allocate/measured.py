"""Greedy, knapsack and equal loss: how much each space keeps by what measuring said, corrected on the real meter.

Losses are added over spaces, which is an assumption; costs are not added where it counts: every answer is metered as the
coupled model that it is (a layer that loses inputs and outputs saves less than the sum of both).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paredown.allocate.knapsack import knapsack
from paredown.allocate.levels import Levels
from paredown.allocate.meter import Counts, Floats
from paredown.allocate.search import TOLERANCE, Found, Gap, correct, nearest, within
from paredown.allocate.sensitivity import Sensitivity

_MOST_OPTIONS = 24
"""Levels per space that greedy and knapsack choose from; single steps are tried afterwards."""
_MOST_PAIRS = 60_000
_MOST_ROUNDS = 200
_LINEARISED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The increase at every allowed count of every space; straight between them."""

    allowed: Sequence[Levels]
    values: Sequence[Floats]
    corners: Sequence[Levels]
    """Of the allowed counts those nearest to what was measured: a best choice is usually there."""

    @classmethod
    def of(cls, names: Sequence[str], allowed: Sequence[Levels], seen: Sensitivity) -> Losses:
        """Only counts that were measured, or lie between such, are allowed; a space nobody measured stays whole."""
        offered, values, corners = [], [], []
        for name, level in zip(names, allowed, strict=True):
            worse = seen.at(name, level) if name in seen.increase else np.full(len(level), np.inf)
            known = np.isfinite(worse)
            known[-1] = True
            offered.append(level[known])
            values.append(np.where(np.arange(len(level)) == len(level) - 1, 0.0, worse)[known])
            measured = seen.curve(name)[0] if name in seen.increase else level[-1:].astype(np.float64)
            corners.append(nearest([offered[-1]] * len(measured), measured))
        return cls(allowed=offered, values=values, corners=corners)

    def options(self) -> list[Levels]:
        """Some levels of every space: those that were measured, and others evenly between."""
        return [_thinned(level, corner) for level, corner in zip(self.allowed, self.corners, strict=True)]

    def of_space(self, number: int, counts: Counts) -> Floats:
        """The increase of one space at counts of any shape."""
        return np.asarray(np.interp(counts, self.allowed[number], self.values[number]))

    def total(self, counts: Counts) -> Floats:
        """Σ over spaces for counts [..., spaces]; shape [...]."""
        parts = [self.of_space(n, counts[..., n]) for n in range(len(self.allowed))]
        return np.asarray(np.sum(parts, axis=0))


def equal_loss(losses: Losses, gap: Gap) -> Found:
    """Every space gives what costs no more than one common increase: the least one that meets the budget.

    Where curves are straight, a space that is twice as sensitive gives half the share.
    """
    limits = np.unique(np.concatenate(list(losses.values)))

    def at(limit: float) -> Counts:
        pairs = zip(losses.allowed, losses.values, strict=True)
        return np.array([level[int(np.argmax(values <= limit))] for level, values in pairs], dtype=np.int64)

    low, high = -1, len(limits) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if gap(at(limits[middle])) > 0 else (low, middle)
    answers = [at(limits[high])] + ([at(limits[low])] if low >= 0 else [])
    closest = min(answers, key=lambda counts: abs(float(gap(counts))))
    return within(losses.allowed, correct(losses.allowed, closest, gap), gap)


def greedy(losses: Losses, gap: Gap) -> Found:
    """The step with the least increase per saved amount, again and again, metered anew each time; then improved.

    A step goes from where a space is to any lower level, so that a first step which saves nothing does not block the
    way. What a step saves beyond the budget counts for nothing.
    """
    options = losses.options()
    counts = np.array([level[-1] for level in losses.allowed], dtype=np.int64)
    here = float(gap(counts))
    while here > 0:
        moves, rises = _downward(losses, options, counts)
        if not len(moves):
            break
        saved = here - gap(counts + moves)
        useful = np.flatnonzero(saved > 1e-15)
        if not len(useful):  # several spaces have to shrink before anything is saved
            useful = np.arange(len(moves))
        price = rises[useful] / np.maximum(np.minimum(saved[useful], here), 1e-15)
        best = int(useful[np.lexsort((-saved[useful], price))[0]])
        counts = counts + moves[best]
        here = float(gap(counts))
    return _improved(losses, counts, gap)


def by_knapsack(losses: Losses, gap: Gap, start: Counts) -> Found:
    """The exact knapsack with the savings of each space alone, at the limit whose answer meets the real meter.

    Savings are counted beside what the other spaces keep in the last answer (`start` at first), so that the sum is right
    where it matters. The best answer of a few rounds is improved by single steps and pairs of steps; it is never worse than
    the greedy one.
    """
    options = losses.options()
    values = [losses.of_space(n, level) for n, level in enumerate(options)]
    best: Counts | None = None
    reference = start
    for _ in range(_LINEARISED):
        costs = [_alone(reference, number, level, gap) for number, level in enumerate(options)]
        answer = _at_the_limit(options, costs, values, gap)
        if answer is None:
            break
        if best is None or float(losses.total(answer)) < float(losses.total(best)):
            best = answer
        if (answer == reference).all():
            break
        reference = answer
    found, other = _improved(losses, start if best is None else best, gap), greedy(losses, gap)
    better = losses.total(other.counts) < losses.total(found.counts) and other.gap <= max(found.gap, 0.0)
    return other if better or found.gap > TOLERANCE >= other.gap else found


def _at_the_limit(
    options: Sequence[Levels], costs: Sequence[Floats], values: Sequence[Floats], gap: Gap
) -> Counts | None:
    """The additive limit is halved in on until the knapsack's answer just meets the budget on the meter."""
    low = sum(float(c.min()) for c in costs)
    high = sum(float(c.max()) for c in costs)
    best: Counts | None = None
    for _ in range(24):
        middle = (low + high) / 2
        solved = knapsack(costs, values, middle)
        counts = None if solved is None else np.array([o[i] for o, i in zip(options, solved.chosen, strict=True)])
        if counts is None or gap(counts) > 0:
            low, high = (middle, high) if counts is None else (low, middle)
            continue
        best, low = counts, middle
        if gap(counts) > -TOLERANCE / 20:
            break
    return best


def _alone(reference: Counts, number: int, level: Levels, gap: Gap) -> Floats:
    """What each level of one space costs beside what the others keep."""
    counts = np.repeat(reference[None, :], len(level), axis=0)
    counts[:, number] = level
    return np.asarray(gap(counts) - float(gap(reference)))


def _downward(losses: Losses, options: Sequence[Levels], counts: Counts) -> tuple[Counts, Floats]:
    """Every step of one space to a lower level, and what it adds to the loss."""
    moves, rises = [], []
    for number, level in enumerate(options):
        lower = level[level < counts[number]]
        if len(lower):
            part = np.zeros((len(lower), len(counts)), dtype=np.int64)
            part[:, number] = lower - counts[number]
            moves.append(part)
            rises.append(losses.of_space(number, lower) - losses.of_space(number, counts[number]))
    if not moves:
        return np.zeros((0, len(counts)), dtype=np.int64), np.zeros(0)
    return np.concatenate(moves), np.concatenate(rises)


def _improved(losses: Losses, counts: Counts, gap: Gap) -> Found:
    """Single steps and pairs of them that lower the loss and stay within the budget; then what still fits is kept."""
    for _ in range(_MOST_ROUNDS):
        moves = _steps(losses.allowed, counts)
        here, ceiling = float(losses.total(counts)), max(float(gap(counts)), 0.0)
        better = _best(losses, counts, moves, here, ceiling, gap)
        if better is None:
            break
        counts = better
    counts = _filled(losses, counts, gap)
    found = Found(counts=counts, gap=float(gap(counts)))
    return found if found.gap <= TOLERANCE else within(losses.allowed, correct(losses.allowed, counts, gap), gap)


def _filled(losses: Losses, counts: Counts, gap: Gap) -> Counts:
    """Nothing leaves for nothing: steps up while they fit, most saved loss first, then the one nearest to the budget.

    Where measuring saw no increase (or an improvement, which counts as none) the knapsack has no reason to stop.
    """
    while True:
        moves = _steps(losses.allowed, counts)
        moves = moves[(moves > 0).any(axis=1)]
        gaps = gap(counts + moves) if len(moves) else np.zeros(0)
        fits = np.flatnonzero(gaps <= 0)
        if not len(fits):
            return counts
        gains = float(losses.total(counts)) - losses.total(counts + moves[fits])
        counts = counts + moves[fits[np.lexsort((-gaps[fits], -gains))[0]]]


def _best(losses: Losses, counts: Counts, moves: Counts, here: float, ceiling: float, gap: Gap) -> Counts | None:
    tried = counts + moves
    first, second = np.triu_indices(len(moves), k=1)
    if len(first) <= _MOST_PAIRS:
        apart = ~((moves[first] != 0) & (moves[second] != 0)).any(axis=1)
        tried = np.concatenate([tried, counts + moves[first[apart]] + moves[second[apart]]])
    gains = here - losses.total(tried)
    worth = np.flatnonzero(gains > 1e-12 * max(1.0, abs(here)))
    worth = worth[np.argsort(-gains[worth], kind="stable")]
    for part in np.array_split(worth, max(len(worth) // 512, 1)):
        fits = np.flatnonzero(gap(tried[part]) <= ceiling) if len(part) else part
        if len(fits):
            return np.asarray(tried[part[fits[0]]])
    return None


def _steps(allowed: Sequence[Levels], counts: Counts) -> Counts:
    """One level down or up, or an eighth of the levels, for every space. Shape [moves, spaces]."""
    moves = []
    for number, level in enumerate(allowed):
        at = int(np.searchsorted(level, counts[number]))
        wide = max(len(level) // 8, 1)
        for to in {at - wide, at - 1, at + 1, at + wide}:
            if 0 <= to < len(level) and level[to] != counts[number]:
                move = np.zeros(len(counts), dtype=np.int64)
                move[number] = level[to] - counts[number]
                moves.append(move)
    return np.array(moves, dtype=np.int64).reshape(len(moves), len(counts))


def _thinned(level: Levels, corners: Levels) -> Levels:
    if len(level) <= _MOST_OPTIONS:
        return level
    spread = level[np.round(np.linspace(0, len(level) - 1, _MOST_OPTIONS)).astype(np.int64)]
    return np.unique(np.concatenate([spread, corners]))
