"""Curvature: the inverse of a damped Gram matrix and its Cholesky factor, as OBS, SparseGPT and GPTQ need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.errors import RejectedError

_TRIES = (1.0, 10.0, 100.0, 1000.0)
"""Factors on the damping, until Cholesky goes through."""
_COLUMNS = 256
"""Of an inverse factor, that are made at once."""


def damped(gram: Tensor, damping: float) -> Tensor:
    """H + damping × mean(diag H) × I, dead inputs (H_jj = 0) with 1 on the diagonal. Shape [K, K], float64, a copy.

    >>> damped(torch.diag(torch.tensor([2.0, 0.0])).double(), 0.5).diagonal().tolist()
    [2.5, 1.5]
    """
    held = gram.clone()
    diagonal = held.diagonal()
    size = float(diagonal.mean())
    diagonal.masked_fill_(diagonal == 0, 1.0)
    diagonal.add_(damping * size)
    return held


def inverse(gram: Tensor, damping: float = 0.01) -> Tensor:
    """H⁻¹ of the damped Gram matrix. Shape [K, K], float64.

    Where Cholesky fails, the damping is raised tenfold, up to a thousandfold (from 1e-6 where it is 0). Raises
    RejectedError where that does not help: the matrix holds NaN, or no Gram matrix made it.
    """
    return torch.cholesky_inverse(_factor(gram, damping))


def inverse_diagonal(gram: Tensor, damping: float = 0.01) -> Tensor:
    """The diagonal of `inverse`, in less than half of its time. Shape [K], float64.

    With H = L Lᵀ it is Σ_i (L⁻¹)²_ij; columns of L⁻¹ begin at their own row, so that few of them need little of L.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    >>> bool(torch.allclose(inverse_diagonal(gram), inverse(gram).diagonal()))
    True
    """
    lower = _factor(gram, damping)
    parts = []
    for start in range(0, len(lower), _COLUMNS):
        rest = lower[start:, start:]
        ones = torch.eye(len(rest), min(_COLUMNS, len(rest)), dtype=lower.dtype)
        parts.append(torch.linalg.solve_triangular(rest, ones, upper=False).square_().sum(0))
    return torch.cat(parts)


def damping_of(rows: Tensor, damping: float) -> float:
    """λ of H = XᵀX + λ for rows X [positions, K], positions < K: `damping` × mean(diag H), above 0 because XᵀX has no full rank."""
    return max(damping, 10e-6) * float(rows.square().sum()) / rows.shape[1]


def inverse_diagonal_of_rows(rows: Tensor, damping: float = 0.01) -> Tensor:
    """`inverse_diagonal` of H = XᵀX from rows X [positions, K]: positions² × K steps and no K × K matrix. Shape [K], float64.

    By Woodbury, H⁻¹ = (I - Xᵀ (λ + X Xᵀ)⁻¹ X) / λ; inputs that are always 0 have 1 + λ on the diagonal as in `damped`.

    >>> x = torch.randn(3, 5).double()
    >>> bool(torch.allclose(inverse_diagonal_of_rows(x), inverse_diagonal(x.T @ x)))
    True
    """
    parts, ones, amount = _answered(rows, damping)
    return (ones - parts.square_().sum(0)) / amount


def _answered(rows: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """(S, d, λ) with H⁻¹ = (diag d - SᵀS) / λ: S = L⁻¹ X [positions, K], L Lᵀ = λ + X Xᵀ; d [K] is 1 but for inputs that are always 0."""
    amount = damping_of(rows, damping)
    lower = _factor(rows @ rows.T + amount * torch.eye(len(rows), dtype=rows.dtype), 0.0)
    ones = torch.where((rows == 0).all(0), amount / (1 + amount), 1.0).to(rows)  # `damped` has 1 + λ there
    return torch.linalg.solve_triangular(lower, rows, upper=False), ones, amount


@dataclass(frozen=True, slots=True, kw_only=True)
class Curvature:
    """Inputs of a layer as their Gram matrix [K, K], or as rows [positions, K] whose Gram matrix it is, positions < K. float64."""

    gram: Tensor | None = None
    rows: Tensor | None = None

    def quadratic(self, matrix: Tensor, damping: float = 0.01) -> Tensor:
        """w (H + λ) wᵀ of every row w of a matrix [rows, K], λ = damping × mean(diag H). Shape [rows], float64.

        >>> x, w = torch.randn(3, 5).double(), torch.randn(2, 5).double()
        >>> bool(torch.allclose(Curvature(rows=x).quadratic(w), Curvature(gram=x.T @ x).quadratic(w)))
        True
        """
        if self.rows is None:
            assert self.gram is not None
            return ((matrix @ self.gram) * matrix).sum(1) + damping * self.gram.diagonal().mean() * matrix.square().sum(
                1
            )
        amount = damping * float(self.rows.square().sum()) / self.rows.shape[1]
        found: Tensor = (matrix @ self.rows.T).square().sum(1) + amount * matrix.square().sum(1)
        return found

    def inverse_blocks(self, width: int, damping: float = 0.01) -> list[Tensor]:
        """[H⁻¹]_BB of consecutive blocks of columns: all whole ones [blocks, width, width], then what is left [1, rest, rest].

        Of rows by Woodbury, without a K × K matrix.

        >>> x = torch.randn(3, 5).double()
        >>> one, two = (held.inverse_blocks(2) for held in (Curvature(rows=x), Curvature(gram=x.T @ x)))
        >>> [tuple(part.shape) for part in one], all(torch.allclose(a, b) for a, b in zip(one, two))
        ([(2, 2, 2), (1, 1, 1)], True)
        """
        if self.rows is None:
            assert self.gram is not None
            whole = inverse(self.gram, damping)
            return [
                torch.stack([whole[i : i + size, i : i + size] for i in range(start, stop, size)])
                for start, stop, size in _pieces(len(whole), width)
            ]
        parts, ones, amount = _answered(self.rows, damping)
        found = []
        for start, stop, size in _pieces(len(ones), width):
            part = parts[:, start:stop].reshape(len(parts), -1, size).movedim(1, 0)
            diagonal = torch.diag_embed(ones[start:stop].reshape(-1, size))
            found.append((diagonal - part.mT @ part) / amount)
        return found


def _pieces(length: int, width: int) -> list[tuple[int, int, int]]:
    """(start, stop, width of a block) of all whole blocks, and of the rest."""
    whole = length - length % width
    return [p for p in ((0, whole, width), (whole, length, length - whole)) if p[1] > p[0]]


def _factor(gram: Tensor, damping: float) -> Tensor:
    """L of the damped Gram matrix, which is raised where Cholesky fails (see `inverse`)."""
    for factor in _TRIES:
        lower, info = torch.linalg.cholesky_ex(damped(gram, max(damping, 1e-6 if factor > 1 else 0.0) * factor))
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            found: Tensor = lower
            return found
    msg = "a Gram matrix must be positive definite once damped. Got one that is not. Look for NaN in the batches."
    raise RejectedError(msg)


def upper(gram: Tensor, damping: float = 0.01) -> Tensor:
    """U, upper triangular, with H⁻¹ = Uᵀ U of the damped Gram matrix. Shape [K, K], float64.

    U_jj² is [H⁻¹]_jj once all columns before j are settled, for all rows at once.
    """
    held = inverse(gram, damping)
    for factor in (0.0, 1e-12, 1e-10, 1e-8):
        lower, info = torch.linalg.cholesky_ex(held + factor * held.diagonal().mean() * torch.eye(len(held)).to(held))
        if int(info) == 0:
            found: Tensor = lower.T.contiguous()
            return found
    msg = "an inverse Gram matrix must be positive definite. Got one that is not. Raise the damping."
    raise RejectedError(msg)
