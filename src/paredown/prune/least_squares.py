"""Ridge regression towards weights that are there, from streamed batches, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Fitted weight [out, K] and bias [out], and Σ of squared errors before and after, over all positions and outputs."""

    weight: Tensor
    bias: Tensor
    before: float
    after: float
    spread: float
    """Σ ‖t - mean t‖²: what the errors are to be compared with."""


class Normal:
    """Streamed sums over positions of inputs x [K] and targets t [out]: all that least squares needs.

    The first K positions are kept as they are, so that a wide layer on few samples takes positions × K numbers and not
    K²; beyond that they are folded into Σ x xᵀ, Σ t xᵀ, Σ ‖t‖², Σ x and Σ t.
    """

    def __init__(self, inputs: int) -> None:
        self.count = 0
        self._inputs = inputs
        self._rows: list[tuple[Tensor, Tensor]] | None = []
        self._sums: tuple[Tensor, ...] = ()

    def add(self, x: Tensor, t: Tensor) -> None:
        """Inputs [positions, K] and targets [positions, out]."""
        x, t = x.double(), t.double()
        self.count += len(x)
        if self._rows is not None:
            self._rows.append((x, t))
            if self.count <= self._inputs:
                return
            x, t = self.rows()
            self._rows = None
            self._sums = tuple(torch.zeros((), dtype=torch.float64) for _ in range(5))
        parts = x.T @ x, t.T @ x, t.square().sum(0), x.sum(0), t.sum(0)
        self._sums = tuple(total + part for total, part in zip(self._sums, parts, strict=True))

    def rows(self) -> tuple[Tensor, Tensor]:
        """All positions so far, where they are still kept."""
        assert self._rows is not None
        return torch.cat([x for x, _ in self._rows]), torch.cat([t for _, t in self._rows])

    def solve(
        self, weight: Tensor, bias: Tensor, *, intercept: bool, ridge: float, support: Tensor | None = None
    ) -> Solution:
        """argmin Σ ‖t - W' x - b'‖² + λ ‖W' - W‖², λ = ridge × mean of the diagonal of Σ x xᵀ (centred with b').

        weight W [out, K] and bias [out] float64; without `intercept` b' = bias. `support` [out, K] bool: W' is 0 where
        it is False, as W must be. With λ = 0 and a Gram matrix without full rank it is the solution nearest to W.
        """
        before = self._centred(torch.zeros(self._inputs, dtype=torch.float64), bias)
        problem = self._centred(self._means()[0], self._means()[1]) if intercept else before
        new = weight + problem.change(weight, ridge, support)
        mean_x, mean_t = self._means()
        return Solution(
            weight=new,
            bias=mean_t - new @ mean_x if intercept else bias,
            before=before.error(weight),
            after=problem.error(new),
            spread=self._centred(torch.zeros_like(mean_x), mean_t).error(torch.zeros_like(weight)),
        )

    def _means(self) -> tuple[Tensor, Tensor]:
        if self._rows is not None:
            x, t = self.rows()
            return x.mean(0), t.mean(0)
        return self._sums[3] / self.count, self._sums[4] / self.count

    def _centred(self, shift_x: Tensor, shift_t: Tensor) -> _Rows | _Sums:
        if self._rows is not None:
            x, t = self.rows()
            return _Rows(x=x - shift_x, t=t - shift_t)
        gram, cross, square, sum_x, sum_t = self._sums
        mixed = torch.outer(sum_x, shift_x)
        return _Sums(
            gram=gram - mixed - mixed.T + self.count * torch.outer(shift_x, shift_x),
            cross=cross
            - torch.outer(sum_t, shift_x)
            - torch.outer(shift_t, sum_x)
            + self.count * torch.outer(shift_t, shift_x),
            square=float((square - 2 * shift_t * sum_t + self.count * shift_t.square()).sum()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """min ‖t - W x‖² with at most as many positions as inputs: solved in the space of positions."""

    x: Tensor
    """[positions, K]."""
    t: Tensor
    """[positions, out]."""

    def error(self, weight: Tensor) -> float:
        return float((self.t - self.x @ weight.T).square().sum())

    def change(self, weight: Tensor, ridge: float, support: Tensor | None) -> Tensor:
        """What to add to W: Δ = Rᵀ (X Xᵀ + λ)⁻¹ X with the residual R = T - X Wᵀ."""
        residual = self.t - self.x @ weight.T
        amount = ridge * float(self.x.square().sum()) / max(self.x.shape[1], 1)
        out = torch.zeros_like(weight)
        for rows, columns in _patterns(weight, support):
            x = self.x[:, columns]
            out[rows[:, None], columns] = _inverse_times(x @ x.T, residual[:, rows], amount).T @ x
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """min ‖t - W x‖² by its normal equations."""

    gram: Tensor
    cross: Tensor
    square: float

    def error(self, weight: Tensor) -> float:
        # By W G Wᵀ - 2 W Cᵀ + Σt²; rounding can take it below 0 where the fit is exact.
        return max(self.square + float((weight @ self.gram * weight - 2 * weight * self.cross).sum()), 0.0)

    def change(self, weight: Tensor, ridge: float, support: Tensor | None) -> Tensor:
        """What to add to W: Δ = (C - W G) (G + λ)⁻¹."""
        residual = self.cross - weight @ self.gram
        amount = ridge * float(self.gram.diagonal().mean())
        out = torch.zeros_like(weight)
        for rows, columns in _patterns(weight, support):
            gram = self.gram[columns[:, None], columns]
            out[rows[:, None], columns] = _inverse_times(gram, residual[rows][:, columns].T, amount).T
        return out


def _patterns(weight: Tensor, support: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, columns) of the weights that may change, rows of one support together."""
    if support is None:
        yield torch.arange(weight.shape[0]), torch.arange(weight.shape[1])
        return
    patterns, number = support.unique(dim=0, return_inverse=True)
    for at, pattern in enumerate(patterns):
        columns = pattern.nonzero()[:, 0]
        if len(columns):
            yield (number == at).nonzero()[:, 0], columns


_RANK = 1e-12
"""Eigenvalues below this share of the largest are rounding."""


def _inverse_times(gram: Tensor, right: Tensor, amount: float) -> Tensor:
    """(G + amount)⁻¹ right for a positive semidefinite G; its pseudo-inverse where it has no full rank."""
    gram = (gram + gram.T) / 2
    if amount > 0:
        factor, failed = torch.linalg.cholesky_ex(gram + amount * torch.eye(len(gram), dtype=gram.dtype))
        if not int(failed):
            solved: Tensor = torch.cholesky_solve(right, factor)
            return solved
    values, vectors = torch.linalg.eigh(gram)
    values = values + amount
    inverse = torch.where(values > _RANK * values.max().clamp(min=1e-300), 1 / values, torch.zeros_like(values))
    pseudo: Tensor = vectors @ (inverse[:, None] * (vectors.T @ right))
    return pseudo
