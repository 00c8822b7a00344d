"""Which cells leave: exact counts of the lowest scores, one rule for ties, and little memory beside the scores.

A global ranking of 25 million weights would sort for seconds and hold every score twice. The threshold is found
instead by counting the leading 16 bits of each score, then the next 16 among those that are still in question.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Keys = NDArray[np.int64]

_DIGIT = 16
_FEW = 1 << 16
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

    def comparable(self) -> Floats:
        """Scores as float64, flat; -0 is 0, so that equal scores have equal bits."""
        values = np.asarray(self.scores, dtype=np.float64).ravel()
        return values / self.scale + 0.0 if self.scale != 1.0 else values + 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Cells below `score` leave, and `num_ties` of those that equal it: in layer order, then the lower index first."""

    score: float
    num_ties: int
    saved: int
    """What leaves in all."""

    def kept(self, layers: Sequence[Cells]) -> Iterator[Bools]:
        """The cells that stay, layer after layer. Shapes: the grids'."""
        left = self.num_ties
        for layer in layers:
            stays = np.empty(layer.scores.size, dtype=np.bool_)
            for number, piece in enumerate(layer.pieces()):
                values = piece.comparable()
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
    pieces = [piece for layer in layers for piece in layer.pieces()]
    key, below = _threshold(pieces, target)
    score = float(_floats(np.array([key], dtype=np.int64))[0])
    num_ties, saved = _ties(pieces, score, target - below, at_most=at_most)
    return Cut(score=score, num_ties=num_ties, saved=below + saved)


def _threshold(layers: Sequence[Cells], target: int) -> tuple[int, int]:
    """The key with Σ saves below it ≤ target < Σ saves up to it, and the first of the two sums."""
    prefix, below = 0, 0
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, dtype=np.int64)
        sums = np.zeros(1 << _DIGIT, dtype=np.int64)
        least, most = np.iinfo(np.int64).max, np.iinfo(np.int64).min
        for layer in layers:
            keys, saves = _candidates(layer, prefix, shift)
            if not len(keys):
                continue
            least, most = min(least, int(keys.min())), max(most, int(keys.max()))
            digits = (keys >> shift) + (1 << (_DIGIT - 1)) if shift == 64 - _DIGIT else (keys >> shift) & 0xFFFF
            found = np.bincount(digits, minlength=1 << _DIGIT)
            counts += found
            # Sums of integers in float64 are exact below 2⁵³.
            weighted = found * saves if isinstance(saves, int) else np.bincount(digits, saves, minlength=1 << _DIGIT)
            sums += weighted.astype(np.int64)
        if least == most:  # all that are in question are equal
            return least, below
        reached = below + np.cumsum(sums)
        digit = int(np.searchsorted(reached, target, side="right"))
        below = int(reached[digit] - sums[digit])
        high = digit - (1 << (_DIGIT - 1)) if shift == 64 - _DIGIT else digit
        prefix = (prefix << _DIGIT) + high
        if shift == 0:
            break
        if counts[digit] <= _FEW:
            return _sorted_out(layers, prefix, shift, target, below)
    return prefix, below


def _candidates(layer: Cells, prefix: int, shift: int) -> tuple[Keys, int | NDArray[np.int64]]:
    """Keys whose leading digits, above those at `shift`, are the prefix; and what they save."""
    keys = _keys(layer.comparable())
    if shift == 64 - _DIGIT:
        return keys, layer.saves if isinstance(layer.saves, int) else layer.saves.ravel()
    mine = (keys >> (shift + _DIGIT)) == prefix
    return keys[mine], layer.saves if isinstance(layer.saves, int) else layer.saves.ravel()[mine]


def _sorted_out(layers: Sequence[Cells], prefix: int, shift: int, target: int, below: int) -> tuple[int, int]:
    """The threshold among the few keys that share a prefix, by sorting them."""
    parts = [_candidates(layer, prefix, shift - _DIGIT) for layer in layers]
    keys = np.concatenate([k for k, _ in parts])
    saves = np.concatenate([np.full(len(k), s) if isinstance(s, int) else s for k, s in parts])
    distinct, where = np.unique(keys, return_inverse=True)
    sums = np.bincount(where, saves).astype(np.int64)
    reached = below + np.cumsum(sums)
    at = int(np.searchsorted(reached, target, side="right"))
    return int(distinct[at]), int(reached[at] - sums[at])


def _ties(layers: Sequence[Cells], score: float, missing: int, *, at_most: bool) -> tuple[int, int]:
    """How many of the cells with this very score leave, in order, and what they save: nearest to what is missing."""
    number, saved = 0, 0
    for layer in layers:
        ties = np.flatnonzero(layer.comparable() == score)
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


def _keys(values: Floats) -> Keys:
    """Integers in the order of the numbers: the bits, with those below the sign turned where it is set."""
    bits = values.view(np.int64)
    return np.asarray(bits ^ ((bits >> 63) & np.int64(0x7FFFFFFFFFFFFFFF)))


def _floats(keys: Keys) -> Floats:
    return np.asarray((keys ^ ((keys >> 63) & np.int64(0x7FFFFFFFFFFFFFFF))).view(np.float64))


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
