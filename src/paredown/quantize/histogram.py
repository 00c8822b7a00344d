"""One histogram for observers and pages: it sees every value once, and its memory does not grow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paredown.quantize.nouns import Histogram

BINS = 2048
_FEW_BITS = 15
"""Of a call with 2¹⁶ values or more one of every k is counted, k times: 2¹⁵ to 2¹⁶ of them (see `_drawn`)."""
_SAFE_WIDTH = (1e-30, 1e38)
"""Widths of a range in which float32 finds the right bin; others are counted in float64."""


def finite(values: Tensor) -> tuple[Tensor, float, float]:
    """The finite values as one row of float32, the smallest and the largest of them; (empty, 0, 0) where there is none.

    >>> [float(v) for v in finite(torch.tensor([[1.0, float("nan")], [float("inf"), -2.0]]))[1:]]
    [-2.0, 1.0]
    """
    row = values.detach().reshape(-1).float()
    if not row.numel():
        return row, 0.0, 0.0
    low, high = (float(v) for v in row.aminmax())  # NaN anywhere makes both NaN
    if math.isfinite(low) and math.isfinite(high):
        return row, low, high
    return finite(row[torch.isfinite(row)])


def _drawn(values: Tensor, step: int, seed: int) -> Tensor:
    """One value of every `step` that follow each other, at a place drawn anew for each; of a short last run perhaps none.

    Every value is drawn with the same chance. A stride would not do: steps and axes are powers of two more often than not, and
    it would see one pixel of every picture, or a few channels of every token.
    """
    starts = torch.arange(0, values.numel(), step)
    places = starts.add_(torch.randint(step, starts.shape, generator=torch.Generator().manual_seed(seed)))
    if int(places[-1]) >= values.numel():
        places = places[:-1]
    return values.index_select(0, places)


class StreamingHistogram:
    """Counts of the values other than 0, in 2048 equal bins of a range that contains 0 and everything seen.

    The range is that of the first values. Where later ones lie outside, it doubles to that side, and pairs of bins merge
    exactly: a bin is never narrower than half of what the final range needs. Zeros are only counted. Of a large call a part,
    drawn with fixed seeds, is counted for the whole, its smallest and largest value being those of all; `whole` counts every value.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self.whole = whole
        self.low, self.high = 0.0, 0.0
        """Smallest and largest value seen, 0 included."""
        self.left, self.right = 0.0, 0.0
        """Ends of the bins."""
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.zeros = 0
        self.calls = 0

    def add(self, values: Tensor, low: float, high: float) -> None:
        """Count `values`, one row of finite float32, and their smallest and largest (see `finite`)."""
        step = 1 if self.whole else max(1, values.numel() >> _FEW_BITS)
        self.calls += 1
        values = values if step == 1 else _drawn(values, step, self.calls)
        zeros = values.numel() - int(values.count_nonzero())
        self.zeros += zeros * step
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.low == self.high:
            return
        self._widen()
        width = self.right - self.left
        if not _SAFE_WIDTH[0] < width < _SAFE_WIDTH[1]:
            values = values.double()
        counts = torch.histc(values, bins=BINS, min=self.left, max=self.right).double()
        if zeros:  # picking the others out first takes longer than counting all
            counts -= zeros * torch.histc(values.new_zeros(1), bins=BINS, min=self.left, max=self.right).double()
        self.counts += counts * step

    def _widen(self) -> None:
        if self.left == self.right:
            self.left, self.right = self.low, self.high
        while self.high > self.right:
            self.right += self.right - self.left
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), torch.zeros(BINS // 2, dtype=torch.float64)])
        while self.low < self.left:
            self.left -= self.right - self.left
            self.counts = torch.cat([torch.zeros(BINS // 2, dtype=torch.float64), self.counts.view(-1, 2).sum(1)])

    @property
    def width(self) -> float:
        """Of one bin."""
        return (self.right - self.left) / BINS

    def centres(self) -> Tensor:
        """Middles of the bins, float64, shape [2048]."""
        return self.left + (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width

    def quantile(self, share: float) -> float:
        """The value below which that share (0 to 1) of everything seen lies, zeros included; exact to one bin.

        >>> seen = StreamingHistogram()
        >>> seen.add(*finite(torch.arange(1.0, 1001.0)))
        >>> abs(seen.quantile(0.5) - 500) < 1
        True
        """
        edges = self.left + torch.arange(BINS + 1, dtype=torch.float64) * self.width
        below = torch.cat([torch.zeros(1, dtype=torch.float64), self.counts.cumsum(0)])
        # The zeros are a step at 0: the bin that holds it is cut there, its count in proportion.
        at = int(torch.searchsorted(edges, 0.0, right=True))
        inside = 0.0 if at > BINS else float((0.0 - edges[at - 1]) / (edges[at] - edges[at - 1]))
        before = below[at - 1] + (inside * self.counts[at - 1] if at <= BINS else 0.0)
        step = torch.stack([before, before + self.zeros])
        edges = torch.cat([edges[:at], torch.zeros(2, dtype=torch.float64), edges[at:]])
        below = torch.cat([below[:at], step, below[at:] + self.zeros])
        wanted = share * float(below[-1])
        upper = min(max(int(torch.searchsorted(below, wanted)), 1), len(below) - 1)
        low, high = float(below[upper - 1]), float(below[upper])
        part = (wanted - low) / (high - low) if high > low else 0.0
        found = float(edges[upper - 1] + part * (edges[upper] - edges[upper - 1]))
        return min(max(found, self.low), self.high)

    def frozen(self, bins: int = 64) -> Histogram:
        """What a picture needs: the seen range in at most `bins` equal parts, zeros apart."""
        if self.left == self.right:
            return Histogram(low=0.0, high=0.0, counts=(), zeros=self.zeros)
        first = max(0, min(BINS - 1, int((self.low - self.left) / self.width)))
        last = max(first + 1, min(BINS, math.ceil((self.high - self.left) / self.width)))
        merge = -(-(last - first) // bins)
        parts = self.counts[first:last].split(merge)
        return Histogram(
            low=self.left + first * self.width,
            high=self.left + (first + len(parts) * merge) * self.width,
            counts=tuple(int(p.sum()) for p in parts),
            zeros=self.zeros,
        )
