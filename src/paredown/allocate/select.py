"""Which cells leave: exact counts of the lowest scores, one rule for ties, and little memory beside the scores.

A global ranking of 25 million weights would sort for seconds and hold every score twice. A seeded sample says instead
between which two scores the threshold must lie; what is below is counted, and only what lies between is sorted. Where the
sample was wrong, the side that holds the threshold is sorted: the answer never depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]

_FEW = 1 << 16
"""Cells that are sorted without further ado, and the size of the sample where there are more."""
_SPREAD = 2.5
"""Half the width of what is sorted, as a share of all times √sample: five standard deviations of a median."""
_AT_ONCE = 1 << 18
"""Cells that are looked at at once: what is worked with beside the scores stays small, and in the cache."""
_ROWS_AT_ONCE = 1 << 20
"""Elements of rows that are ranked at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """The cells of one layer, in C order, and what removing one saves."""

    scores: NDArray[Any]
    """Finite; any float dtype. Shape: the grid's."""
    saves: int | NDArray[np.int64]
    """What leaves with each cell (weights, MACs): one number for all, or one per cell in the scores' shape."""
    scale: float = 1.0
    """Scores are divided by it before they are compared with those of other layers."""

    @property
    def total(self) -> int:
        """What all cells save together."""
        if isinstance(self.saves, int):
            return self.saves * self.scores.size
        return int(self.saves.sum())

    def pieces(self) -> Iterator[Cells]:
        """The same cells, flat, few at a time; views."""
        scores = self.scores.reshape(-1)
        saves = self.saves if isinstance(self.saves, int) else self.saves.reshape(-1)
        for first in range(0, len(scores), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            mine = saves if isinstance(saves, int) else saves[part]
            yield Cells(scores=scores[part], saves=mine, scale=self.scale)

    def comparable(self, kind: type[np.floating[Any]]) -> NDArray[Any]:
        """Scores of this dtype (see `_kind`), divided by the scale; flat, and a view where nothing changes."""
        values = np.asarray(self.scores, dtype=kind).ravel()
        return values / self.scale if self.scale != 1.0 else values


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Cells below `score` leave, and `num_ties` of those that equal it: in layer order, then the lower index first."""

    score: float
    num_ties: int
    saved: int
    """What leaves in all."""

    def kept(self, layers: Sequence[Cells]) -> Iterator[Bools]:
        """The cells that stay, layer after layer. Shapes: the grids'."""
        left, kind = self.num_ties, _kind(layers)
        for layer in layers:
            stays = np.empty(layer.scores.size, dtype=np.bool_)
            for number, piece in enumerate(layer.pieces()):
                values = piece.comparable(kind)
                part = stays[number * _AT_ONCE : number * _AT_ONCE + len(values)]
                np.greater_equal(values, self.score, out=part)
                if left:
                    ties = np.flatnonzero(values == self.score)[:left]
                    part[ties] = False
                    left -= len(ties)
            yield stays.reshape(layer.scores.shape)


def cut(layers: Sequence[Cells], target: int, *, at_most: bool = False) -> Cut:
    """The lowest scores of all layers that together save `target`: exactly where cells are single weights.

    Elsewhere as near to it as whole cells allow, fewer at a tie, and never more with `at_most`.

    >>> layer = Cells(scores=np.array([3.0, 1.0, 1.0, 2.0]), saves=1)
    >>> [k.tolist() for k in cut([layer], 1).kept([layer])]
    [[True, False, True, True]]
    """
    total = sum(layer.total for layer in layers)
    if target <= 0:
        return Cut(score=-math.inf, num_ties=0, saved=0)
    if target >= total:
        return Cut(score=math.inf, num_ties=0, saved=total)
    pieces, kind = [piece for layer in layers for piece in layer.pieces()], _kind(layers)
    score, below = _threshold(pieces, target, kind)
    num_ties, saved = _ties(pieces, score, target - below, kind, at_most=at_most)
    return Cut(score=score, num_ties=num_ties, saved=below + saved)


def _kind(layers: Sequence[Cells]) -> type[np.floating[Any]]:
    """float32 where all scores are of it and compared as they are, else float64: both order scores as they are."""
    plain = all(layer.scores.dtype == np.float32 and layer.scale == 1.0 for layer in layers)
    return np.float32 if plain else np.float64


def _threshold(pieces: Sequence[Cells], target: int, kind: type[np.floating[Any]]) -> tuple[float, int]:
    """The score with Σ saves below it ≤ target < Σ saves up to it, and the first of the two sums."""
    low, high = _bracket(pieces, target, kind)
    while True:
        below, values, saves = _between(pieces, low, high, kind)
        reached = below + np.cumsum(saves)
        if below <= target and len(values) and target < reached[-1]:
            score = values[np.searchsorted(reached, target, side="right")]
            first = int(np.searchsorted(values, score, side="left"))
            return float(score), int(reached[first] - saves[first])
        low, high = (-math.inf, low) if below > target else (high, math.inf)


def _bracket(pieces: Sequence[Cells], target: int, kind: type[np.floating[Any]]) -> tuple[float, float]:
    """Two scores between which the threshold almost surely lies, by a sample of every piece."""
    number = sum(piece.scores.size for piece in pieces)
    if number <= _FEW or not _FEW:
        return -math.inf, math.inf
    generator = np.random.default_rng(0)
    values, weights = [], []
    for piece in pieces:
        picked = generator.integers(piece.scores.size, size=max(1, _FEW * piece.scores.size // number))
        saves = piece.saves if isinstance(piece.saves, int) else piece.saves[picked]
        values.append(Cells(scores=piece.scores[picked], saves=saves, scale=piece.scale).comparable(kind))
        weights.append(np.full(len(picked), 1.0) * saves * (piece.scores.size / len(picked)))
    sample, weight = np.concatenate(values), np.concatenate(weights)
    order = np.argsort(sample)
    sample, reached = sample[order], np.cumsum(weight[order])
    margin = _SPREAD * math.sqrt(float(np.square(weight).sum())) / reached[-1]
    at = target / sum(piece.total for piece in pieces)
    low, high = np.searchsorted(reached, reached[-1] * np.array([at - margin, at + margin]))
    return (
        float(sample[low]) if at > margin else -math.inf,
        float(sample[high]) if high < len(sample) else math.inf,
    )


def _between(
    pieces: Sequence[Cells], low: float, high: float, kind: type[np.floating[Any]]
) -> tuple[int, NDArray[Any], NDArray[np.int64]]:
    """What all cells below `low` save together, and the scores from `low` to `high`, ascending, with what each saves."""
    below, parts, savings = 0, [], []
    for piece in pieces:
        values = piece.comparable(kind)
        less, inside = values < low, values <= high
        below += (
            int(np.count_nonzero(less)) * piece.saves if isinstance(piece.saves, int) else int(piece.saves[less].sum())
        )
        inside &= ~less
        parts.append(values[inside])
        savings.append(np.full(len(parts[-1]), piece.saves) if isinstance(piece.saves, int) else piece.saves[inside])
    found, saves = np.concatenate(parts), np.concatenate(savings)
    order = np.argsort(found)
    return below, found[order], saves[order]


def _ties(
    layers: Sequence[Cells], score: float, missing: int, kind: type[np.floating[Any]], *, at_most: bool
) -> tuple[int, int]:
    """How many of the cells with this very score leave, in order, and what they save: nearest to what is missing."""
    number, saved = 0, 0
    for layer in layers:
        ties = np.flatnonzero(layer.comparable(kind) == score)
        if not len(ties):
            continue
        saves = np.full(len(ties), layer.saves) if isinstance(layer.saves, int) else layer.saves.ravel()[ties]
        reached = saved + np.cumsum(saves)
        if reached[-1] < missing:
            number, saved = number + len(ties), int(reached[-1])
            continue
        first = int(np.searchsorted(reached, missing, side="left"))
        before = int(reached[first] - saves[first])
        over = int(reached[first]) - missing
        if over == 0 or (over < missing - before and not at_most):
            return number + first + 1, int(reached[first])
        return number + first, before
    return number, saved


def kept_in_rows(scores: NDArray[Any], saves: int | NDArray[np.int64], share: float) -> Bools:
    """In every row the lowest cells leave until round(share × row) weights have; the lower index first at a tie.

    At least one cell of each row stays. Shapes: scores and result [rows, cells] (further axes count as cells).

    >>> kept_in_rows(np.array([[1.0, 2.0], [4.0, 3.0]]), 1, 0.5).tolist()
    [[False, True], [True, False]]
    """
    table = scores.reshape(len(scores), -1)
    cells = table.shape[1]
    kept = np.ones(table.shape, dtype=np.bool_)
    step = max(1, _ROWS_AT_ONCE // max(cells, 1))
    weights = None if isinstance(saves, int) else saves.reshape(table.shape)
    for first in range(0, len(table), step):
        part = slice(first, first + step)
        if weights is None:
            kept[part] = _rows(table[part], min(rounded(share, cells), cells - 1))
        else:
            kept[part] = _weighted_rows(table[part], weights[part], share)
    return kept.reshape(scores.shape)


def _rows(table: NDArray[Any], num_removed: int) -> Bools:
    if num_removed <= 0:
        return np.ones(table.shape, dtype=np.bool_)
    at = np.partition(table, num_removed - 1, axis=1)[:, num_removed - 1 : num_removed]
    kept = table > at
    ties = table == at
    room = num_removed - (table < at).sum(axis=1)
    torn = ties.sum(axis=1) > room
    kept[torn] |= ties[torn] & (np.cumsum(ties[torn], axis=1) > room[torn][:, None])
    return np.asarray(kept)


def _weighted_rows(table: NDArray[Any], weights: NDArray[np.int64], share: float) -> Bools:
    order = np.argsort(table, axis=1, kind="stable")
    reached = np.concatenate(
        [np.zeros((len(table), 1), dtype=np.int64), np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1)],
        axis=1,
    )
    wanted = np.array([rounded(share, int(n)) for n in reached[:, -1]])
    number = np.argmin(np.abs(reached[:, :-1] - wanted[:, None]), axis=1)  # the first, so fewer, at a tie
    leaves = np.arange(table.shape[1])[None, :] < number[:, None]
    kept = np.empty(table.shape, dtype=np.bool_)
    np.put_along_axis(kept, order, ~leaves, axis=1)
    return kept


def rounded(share: float, number: int) -> int:
    """round(share × number), half to even as torch.nn.utils.prune has it, blind to noise in the share's last digits.

    >>> rounded(0.29, 100), rounded(0.5, 5), rounded(1 - 0.9, 5)
    (29, 2, 0)
    """
    return round(round(share * number, 6))
