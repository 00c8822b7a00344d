"""refit: what a unit still costs the layers that read it, once all that is left was fitted anew by least squares.

The units of a space leave one after the other, each time the one whose loss the others can make up for best. With
H = mean x xᵀ of a reader's inputs (damped), B the columns of a unit and W as the units before it have left it

    cost = Σ over readers  tr(W_B ([H⁻¹]_BB)⁻¹ W_Bᵀ) / tr(W H Wᵀ),   then  W -= W_B ([H⁻¹]_BB)⁻¹ [H⁻¹]_B,:   (and H⁻¹ likewise)

which is OBS for groups of columns (Hassibi & Stork 1993, eq. 5). Rows of W are scaled by the batch norm behind them. The
score of a unit is the cost of all that has left when it leaves, a share of what the readers compute; so a score grows with
the place in the order. `prune.reconstruct` does the fit. Where we differ from He, Zhang & Sun 2017 (a LASSO on channels):
the order is greedy from the dense layer down. Up to a share `at_once` of the units leaves in one step, each at what it costs after
those before it, and none that has by then become twice as costly as the best of those that stay.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paredown.couple.space import Space
from paredown.errors import RejectedError, UsageError
from paredown.score.l2 import L2Options, l2
from paredown.score.nouns import Source, UnitScores
from paredown.score.reduce import unit_sums
from paredown.statistics.batches import taken
from paredown.statistics.curvature import damping_of, inverse
from paredown.statistics.inputs import InputStatistics, input_statistics
from paredown.statistics.readers import MOST_BYTES, Reader, readers

_EMPTY = 0.125
"""Share of the places whose unit has left, above which the others move together."""
_DEARER = 2.0
"""A unit does not leave with others that make it so many times as costly as the best of those that stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitOptions:
    """How the order is found."""

    damping: float = 1e-3
    """Added to the diagonal of H, as a share of its mean."""
    at_once: float = 1 / 8
    """Share of the units still there that may leave in one step; at least one does."""
    positions_per_sample: int = 64
    """Patches of a convolution that are looked at in each sample, at most."""

    def __post_init__(self) -> None:
        for name, value, most in (("damping", self.damping, float("inf")), ("at_once", self.at_once, 1.0)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < most:
                msg = f"{name} must be a number in [0, {most:g}). Got {value!r}."
                raise UsageError(msg)
        if isinstance(self.positions_per_sample, bool) or self.positions_per_sample < 1:
            msg = f"positions_per_sample must be an integer ≥ 1. Got {self.positions_per_sample!r}."
            raise UsageError(msg)


def refit(source: Source, options: RefitOptions) -> dict[str, UnitScores]:
    """Score by space; a space whose readers cannot be measured falls back to l2, with a warning that names it."""
    if source.batches is None:
        msg = "refit must be given batches. Got None. Pass batches=… of inputs, or full batches and loss=…."
        raise UsageError(msg)
    batches = list(taken(source.batches, source.num_batches))
    by_space = readers(source.program, source.coupling.spaces)
    scores: dict[str, UnitScores] = {}
    for some in _chunks(source, by_space):
        names = sorted({r.parameter for s in some for r in by_space[s.name]})
        seen = input_statistics(
            source.program, names, batches, loss=source.loss, num_batches=source.num_batches, module=source.module,
            positions_per_sample=options.positions_per_sample, rows=True,
        )  # fmt: skip
        for space in some:
            scores[space.name] = _eliminated(source, by_space[space.name], seen, len(space), options)
    without = [s for s in source.coupling.spaces if s.name not in scores]
    if without:
        listed = ", ".join(s.name for s in without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        warnings.warn(f"refit falls back to l2 where it cannot see what reads: {listed}.", UserWarning, stacklevel=4)
        scores |= unit_sums(without, next(iter(l2(source, L2Options()))), source.weights, source.group)
    return scores


def _chunks(source: Source, by_space: dict[str, list[Reader]]) -> Iterator[list[Space]]:
    """Spaces that are measured in one pass: their Gram matrices are held together."""
    held: list[Space] = []
    size = 0
    for space in source.coupling.spaces:
        if not by_space[space.name]:
            continue
        needs = sum(_gram_bytes(source.program.state[r.parameter]) for r in by_space[space.name])
        if held and size + needs > MOST_BYTES:
            yield held
            held, size = [], 0
        held, size = [*held, space], size + needs
    if held:
        yield held


def _gram_bytes(weight: Tensor) -> int:
    return 8 * int(weight[0].numel()) ** 2


class _Matrix:
    """One reader's weight [out, K] while units leave, and the inverse [K, K] of the damped Gram matrix of one group.

    The weight is float32, in which its error stays what rounding made it; H⁻¹ in float32 would stop being positive
    definite. Rows of what has left are zeros, until so many have that the others move together: to move them in each step
    takes longer than the arithmetic.
    """

    def __init__(self, reader: Reader, weight: Tensor, total: float, inverse_gram: Tensor) -> None:
        units, self._taps = reader.columns.shape
        first = reader.columns.flatten()
        others = torch.ones(weight.shape[1], dtype=torch.bool)
        others[first] = False
        self._order = torch.cat([first, torch.nonzero(others).flatten()])
        """Columns of a unit lie side by side; those of no unit of the space come last."""
        self._here, self._there = torch.arange(units), torch.ones(units, dtype=torch.bool)
        """By place: which unit's columns are there, and whether it has not left."""
        self._tried: tuple[Tensor, Tensor, Tensor] | None = None
        self._weights = weight.T.contiguous()[self._order]
        """As the units that left have left it. Shape [K, out], float32."""
        self._total = max(total, 1e-30)
        if len(inverse_gram):
            inverse_gram = inverse_gram[self._order[:, None], self._order]
        self._inverse = inverse_gram

    def add_costs(self, costs: Tensor) -> None:
        """Add the cost of each unit that is still there, if it left alone, to costs [units] float64."""
        units = len(self._here)
        weights, blocks = self._weights[: units * self._taps].view(units, self._taps, -1), self._blocks(units)
        if self._taps == 1:
            found = torch.linalg.vecdot(weights, weights).flatten() / blocks.flatten()
        else:
            products = (weights @ weights.transpose(1, 2)).double()
            found = torch.linalg.solve(blocks, products).diagonal(dim1=1, dim2=2).sum(1)
        costs[self._here] += found / self._total

    def given(self, units: Tensor) -> Tensor:
        """The cost of each of these units when those before it in the list have left. Shape [len(units)], float64.

        With [H⁻¹]_BB = L Lᵀ of all their columns it is the squares of L⁻¹ W_Bᵀ in the rows of the unit.
        """
        places = torch.empty(int(self._here.max()) + 1, dtype=torch.int64)
        places[self._here] = torch.arange(len(self._here))
        at = (places[units][:, None] * self._taps + torch.arange(self._taps)).flatten()
        factor = _factor(self._corner(at))
        written = torch.linalg.solve_triangular(factor, self._weights[at].double(), upper=False)
        self._tried = at, factor, written
        costs: Tensor = written.square().sum(1).view(len(units), self._taps).sum(1) / self._total
        return costs

    def leave(self, count: int) -> None:
        """Fit what is left to what the first so many of the units of `given` wrote."""
        assert self._tried is not None  # `given` comes before
        columns = count * self._taps
        at, factor, written = self._tried  # of the first columns each is that of the first rows
        at = at[:columns]
        self._answer(at, factor[:columns, :columns], written[:columns])
        self._weights[at] = 0.0
        self._there[at[:: self._taps] // self._taps] = False
        if len(self._there) - int(self._there.sum()) > _EMPTY * len(self._there):
            stay = torch.ones(len(self._weights), dtype=torch.bool)
            stay[: len(self._there) * self._taps] = self._there.repeat_interleave(self._taps)
            self._move(torch.nonzero(stay).flatten())
            self._here, self._there = self._here[self._there], self._there[self._there]

    def _blocks(self, units: int) -> Tensor:
        """[H⁻¹]_BB of the units of the first places; regular where one left. Shape [units, columns, columns], float64."""
        at = torch.arange(units * self._taps).view(units, self._taps)
        return self._inverse[at[:, :, None], at[:, None, :]]

    def _corner(self, at: Tensor) -> Tensor:
        """[H⁻¹]_BB of these columns."""
        return self._inverse[at[:, None], at]

    def _answer(self, at: Tensor, factor: Tensor, written: Tensor) -> None:
        """What changes when these columns leave, whose [H⁻¹]_BB = L Lᵀ, and L⁻¹ W_Bᵀ is written."""
        step = torch.linalg.solve_triangular(factor, self._inverse[at], upper=False)
        self._weights.addmm_(step.T.to(self._weights.dtype), written.to(self._weights.dtype), alpha=-1)
        self._inverse.addmm_(step.T, step, alpha=-1)
        self._inverse[at] = self._inverse[:, at] = 0.0
        self._inverse[at, at] = 1.0  # the block of a unit that left stays regular

    def _move(self, left: Tensor) -> None:
        """Only these columns go on."""
        self._weights = self._weights[left]
        if len(self._inverse):
            self._inverse = self._inverse[left[:, None], left]


class _FewPositions(_Matrix):
    """The same from fewer positions X than inputs: H⁻¹ = D - Xᵀ M X / λ, with M = (λ + X Xᵀ)⁻¹ and D = 1/λ.

    M X changes as the weight does when columns leave, and no K × K matrix is made.
    """

    def __init__(self, reader: Reader, weight: Tensor, total: float, rows: Tensor, damping: float) -> None:
        super().__init__(reader, weight, total, rows[:0])
        self._amount = damping_of(rows, damping)
        held = rows @ rows.T + self._amount * torch.eye(len(rows), dtype=rows.dtype)
        self._x = rows.T.contiguous()[self._order]
        self._products = self._x @ torch.cholesky_inverse(torch.linalg.cholesky(held))
        """(M X)ᵀ. Shape [K, positions], float64."""
        alone = torch.where((rows == 0).all(0), 1 / (1 + self._amount), 1 / self._amount)
        self._alone = alone[self._order]

    def _blocks(self, units: int) -> Tensor:
        blocks: Tensor
        shape = units, self._taps
        x, products = (m[: units * self._taps].view(*shape, -1) for m in (self._x, self._products))
        alone = self._alone[: units * self._taps].view(shape)
        if self._taps == 1:
            blocks = alone[:, :, None] - torch.linalg.vecdot(x, products)[:, :, None] / self._amount
        else:
            blocks = torch.diag_embed(alone) - x @ products.transpose(1, 2) / self._amount
        return blocks

    def _corner(self, at: Tensor) -> Tensor:
        return torch.diag(self._alone[at]) - self._x[at] @ self._products[at].T / self._amount

    def _answer(self, at: Tensor, factor: Tensor, written: Tensor) -> None:
        # [H⁻¹]_B,: is -X_Bᵀ M X / λ, but for the columns B themselves, which leave: whichever order of the products is shorter.
        both = torch.cat([self._x[at], self._products[at]], 1)
        x, products = torch.linalg.solve_triangular(factor, both, upper=False).tensor_split(2, 1)
        x, kind = x / self._amount, self._weights.dtype
        if x.shape[0] > x.shape[1]:
            self._weights.addmm_(self._products.to(kind), (x.T @ written).to(kind))
            self._products += self._products @ (x.T @ products)
        else:
            step = self._products @ x.T
            self._weights.addmm_(step.to(kind), written.to(kind))
            self._products.addmm_(step, products)
        self._products[at] = 0.0

    def _move(self, left: Tensor) -> None:
        super()._move(left)
        self._x, self._products, self._alone = self._x[left], self._products[left], self._alone[left]


def _factor(corner: Tensor) -> Tensor:
    """L of a block of H⁻¹, which is positive definite but for rounding."""
    size = corner.diagonal().mean()
    for share in (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        held = corner if not share else corner + share * size * torch.eye(len(corner), dtype=corner.dtype)
        lower, failed = torch.linalg.cholesky_ex(held)
        if not int(failed):
            found: Tensor = lower
            return found
    msg = "inputs of a layer must be finite and not all alike. Got a block of H⁻¹ that is not positive definite. Raise damping."
    raise RejectedError(msg)


def _eliminated(
    source: Source, found: Sequence[Reader], seen: dict[str, InputStatistics], num_units: int, options: RefitOptions
) -> UnitScores:
    matrices = [m for r in found for m in _matrices(source, r, seen[r.parameter], options)]
    alive = torch.arange(num_units)
    scores, spent = np.zeros(num_units), 0.0
    while len(alive):
        costs = torch.zeros(num_units, dtype=torch.float64)
        for matrix in matrices:
            matrix.add_costs(costs)
        order = alive[torch.argsort(costs[alive], stable=True)]
        leaving = order[: max(1, int(len(alive) * options.at_once))]
        given: Any = sum(m.given(leaving) for m in matrices)
        # Of two units that can each say what the other says both are cheap, until one has left.
        others = float(costs[order[len(leaving)]]) if len(leaving) < len(order) else math.inf
        dear = torch.nonzero(given > _DEARER * others).flatten()
        count = max(1, int(dear[0])) if len(dear) else len(leaving)
        for unit, cost in zip(leaving[:count].tolist(), given[:count].tolist(), strict=True):
            spent += max(cost, 0.0)
            scores[unit] = spent
        alive = order[count:].sort().values
        if len(alive):
            for matrix in matrices:
                matrix.leave(count)
    return scores


def _matrices(source: Source, reader: Reader, seen: InputStatistics, options: RefitOptions) -> Iterator[_Matrix]:
    groups = len(seen.squared_norms)
    weight = source.weights[reader.parameter].detach().float()
    weight = weight.reshape(groups, weight.shape[0] // groups, -1)
    alive = seen.squared_norms > 0  # what reads an input that is always 0 costs nothing, though damping says otherwise
    scaled = weight * reader.row_scales.float().reshape(groups, -1)[:, :, None] * alive[:, None, :]
    for g in range(groups):
        if seen.rows is not None:
            total = float((scaled[g] @ seen.rows[g].T.float()).double().square().sum())
            yield _FewPositions(reader, scaled[g], total, seen.rows[g], options.damping)
        else:
            assert seen.gram is not None
            total = float((scaled[g].double() @ seen.gram[g] * scaled[g]).sum())
            yield _Matrix(reader, scaled[g], total, inverse(seen.gram[g], options.damping))
