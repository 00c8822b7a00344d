"""Search: keep counts that hit a budget, uniform or by global ranking, then corrected one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paredown.allocate.levels import Levels
from paredown.allocate.meter import Counts, Floats

TOLERANCE = 0.01
"""Of the dense amount."""
_CLOSE = 0.0025
_MOST_MOVES = 400
_MOST_PAIRS = 40_000

Gap = Callable[[NDArray[np.int64]], Floats]
"""How far keep counts [..., spaces] are above the budget, as a fraction of the dense amount; negative is below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Keep counts, and the step that stands between them and the budget."""

    counts: Counts
    gap: float
    blocked_by: tuple[int, int, float] | None = None
    """(space, step in units, change of the gap) of the smallest step that jumps over the budget."""


def nearest(allowed: Sequence[Levels], wanted: NDArray[np.floating[Any]]) -> Counts:
    """The allowed count nearest to what is wanted, for each space; the larger one at a tie."""
    out = np.empty(len(allowed), dtype=np.int64)
    for number, (level, want) in enumerate(zip(allowed, wanted, strict=True)):
        at = int(np.searchsorted(level, want))
        low, high = level[max(at - 1, 0)], level[min(at, len(level) - 1)]
        out[number] = high if high - want <= want - low or at == 0 else low
    return out


def uniform(allowed: Sequence[Levels], units: Counts, gap: Gap) -> Found:
    """One ratio for all spaces, halved in on the budget; then single steps.

    Steps between the counts of the ratio below the budget and of the one above come first: each space then keeps one
    of two neighbours of the common ratio. Any others only where these do not come near enough.
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if gap(nearest(allowed, middle * units)) > 0:
            high = middle
        else:
            low = middle
    below, above = nearest(allowed, low * units), nearest(allowed, high * units)
    between = [level[(a <= level) & (level <= b)] for level, a, b in zip(allowed, below, above, strict=True)]
    found = correct(between, _nearer(gap, below, above), gap)
    return found if abs(found.gap) <= TOLERANCE else correct(allowed, found.counts, gap)


def ranked(allowed: Sequence[Levels], units: Counts, gap: Gap, scores: Sequence[Floats]) -> Found:
    """Remove the lowest scores of all spaces until the budget is met; ties by space, then by index; then single steps."""
    spaces = np.repeat(np.arange(len(units)), units)
    order = np.lexsort((np.concatenate([np.arange(n) for n in units]), spaces, np.concatenate(list(scores))))
    spaces = spaces[order]

    def after(removed: int) -> Counts:
        gone = np.bincount(spaces[:removed], minlength=len(units))
        return nearest(allowed, (units - gone).astype(np.float64))

    low, high = 0, len(spaces)  # after(high) is the floor everywhere
    while high - low > 1:
        middle = (low + high) // 2
        if gap(after(middle)) > 0:
            low = middle
        else:
            high = middle
    return correct(allowed, _nearer(gap, after(low), after(high)), gap)


def correct(allowed: Sequence[Levels], counts: Counts, gap: Gap) -> Found:
    """Move one space by one step at a time while that comes nearer; at the end two at once; first space at a tie."""
    here = float(gap(counts))
    for _ in range(_MOST_MOVES):
        if abs(here) <= _CLOSE:
            break
        moves = _steps(allowed, counts)
        if not len(moves):
            break
        gaps = gap(counts + moves)
        best = int(np.argmin(np.abs(gaps)))
        if abs(gaps[best]) >= abs(here) - 1e-12:
            if abs(here) <= TOLERANCE:
                break
            pair = _pair(counts, moves, gap)
            if pair is None or abs(float(gap(pair))) >= abs(here) - 1e-12:
                return Found(counts=counts, gap=here, blocked_by=_blocking(moves, gaps, here))
            counts, here = pair, float(gap(pair))
            continue
        counts, here = counts + moves[best], float(gaps[best])
    return Found(counts=counts, gap=here)


def within(allowed: Sequence[Levels], found: Found, gap: Gap) -> Found:
    """Not above the budget by more than its tolerance, where that can be: single steps down, the nearest that fits."""
    counts, here = found.counts, found.gap
    while here > TOLERANCE:
        moves = _steps(allowed, counts)
        moves = moves[(moves < 0).any(axis=1)]
        if not len(moves):
            break
        gaps = gap(counts + moves)
        fits = gaps <= TOLERANCE
        best = int(np.argmax(np.where(fits, gaps, -np.inf))) if fits.any() else int(np.argmin(gaps))
        if gaps[best] >= here:
            break
        counts, here = counts + moves[best], float(gaps[best])
    return Found(counts=counts, gap=here, blocked_by=found.blocked_by)


def _nearer(gap: Gap, a: Counts, b: Counts) -> Counts:
    return a if abs(float(gap(a))) <= abs(float(gap(b))) else b


def _steps(allowed: Sequence[Levels], counts: Counts) -> Counts:
    """Every move of one space to its next level down or up. Shape [moves, spaces]."""
    moves = []
    for number, level in enumerate(allowed):
        at = int(np.searchsorted(level, counts[number]))
        for to in (at - 1, at + 1):
            if 0 <= to < len(level):
                move = np.zeros(len(counts), dtype=np.int64)
                move[number] = level[to] - counts[number]
                moves.append(move)
    return np.array(moves, dtype=np.int64).reshape(len(moves), len(counts))


def _pair(counts: Counts, moves: Counts, gap: Gap) -> Counts | None:
    """The best two moves of different spaces at once, or None where there are too many to try."""
    first, second = np.triu_indices(len(moves), k=1)
    apart = (
        ~((moves[first] != 0) & (moves[second] != 0)).any(axis=1) if len(first) <= _MOST_PAIRS else np.zeros(0, bool)
    )
    if not apart.any():
        return None
    both = counts + moves[first[apart]] + moves[second[apart]]
    gaps = np.concatenate([gap(part) for part in np.array_split(both, max(len(both) // 512, 1))])
    return np.asarray(both[int(np.argmin(np.abs(gaps)))])


def _blocking(moves: Counts, gaps: Floats, here: float) -> tuple[int, int, float] | None:
    """The smallest step towards the budget; it jumps over it."""
    towards = np.flatnonzero((gaps - here) * here < 0)
    if not len(towards):
        return None
    best = int(towards[np.argmin(np.abs(gaps[towards] - here))])
    space = int(np.flatnonzero(moves[best])[0])
    return space, int(abs(moves[best, space])), float(abs(gaps[best] - here))


def lowest(scores: Mapping[str, Floats], name: str, num_removed: int) -> NDArray[np.bool_]:
    """Which units of a space leave: the lowest scores, the lower index first at a tie. Shape [units]."""
    values = scores[name]
    leaving = np.zeros(len(values), dtype=np.bool_)
    leaving[np.argsort(values, kind="stable")[:num_removed]] = True
    return leaving
