"""Granularity: which cells of a weight are kept or pruned together. Arithmetic on the matrix view, without torch.

A weight of shape [out, in, *kernel] is seen as the matrix [out, in × kernel]. "2:4" groups consecutive *input channels*
at a fixed kernel position, because that is what hardware reads; "kernel" is one input channel of one filter.

Nothing here knows how a layer reads its weight. Where it is stored [in, out, …] (transposed convolutions, `x @ W`, GPT-2's
Conv1D) axis 1 are outputs: `serves_flipped` says which cells are there what they are called.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from paredown.errors import UsageError

Kind = Literal["element", "n:m", "row", "column", "kernel", "block", "channel", "head", "layer"]
Reduction = Literal["sum", "mean", "max", "l2"]
MASKED = ("element", "n:m", "row", "column", "kernel", "block")
"""Kinds that a mask can show; the others leave physically and belong to coupled spaces or to modules."""
_PLAIN = ("element", "row", "column", "kernel", "channel", "head", "layer")
_SYNONYMS = {"filter": "row", "unstructured": "element", "weight": "element", "depth": "layer", "neuron": "channel"}
_RULE = "element, N:M (2:4), RxC (4x1), row (or filter), column, kernel, channel, head or layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Granularity:
    """One way to cut a weight into cells.

    `a`, `b` are N and M of N:M (N of M consecutive inputs stay), or rows and columns of a block.

    >>> Granularity.parse("4x1")
    Granularity(kind='block', a=4, b=1)
    >>> str(Granularity.parse("2:4"))
    '2:4'
    """

    kind: Kind
    a: int = 1
    b: int = 1

    @classmethod
    def parse(cls, text: object) -> Granularity:
        """Read "element", "2:4", "row", "filter", "column", "kernel", "4x4", "channel", "head" or "layer"."""
        if isinstance(text, Granularity):
            return text
        plain = text.strip().lower().replace("×", "x") if isinstance(text, str) else ""
        plain = _SYNONYMS.get(plain, plain)
        if plain in _PLAIN:
            return cls(kind=plain)  # type: ignore[arg-type]
        pair = re.fullmatch(r"(\d{1,6})\s*([:x])\s*(\d{1,6})", plain)
        if pair is None:
            hint = " Write 2:4 in quotes: YAML reads it as a number of base 60." if isinstance(text, int) else ""
            msg = f"granularity must be {_RULE}. Got {text!r}.{hint}"
            raise UsageError(msg)
        a, b = int(pair[1]), int(pair[3])
        if pair[2] == ":" and not 0 < a < b:
            msg = f"N:M must have 0 < N < M: N of M consecutive inputs stay. Got {text!r}."
            raise UsageError(msg)
        if a < 1 or b < 1:
            msg = f"a block must have at least one row and one column. Got {text!r}."
            raise UsageError(msg)
        return cls(kind="n:m" if pair[2] == ":" else "block", a=a, b=b)

    def __str__(self) -> str:
        return {"n:m": f"{self.a}:{self.b}", "block": f"{self.a}x{self.b}"}.get(self.kind, self.kind)

    @property
    def masked(self) -> bool:
        """Whether a mask over single weights can show it."""
        return self.kind in MASKED

    def serves_flipped(self, shape: tuple[int, ...]) -> bool:
        """Whether the cells of a weight stored [in, out, …] are what their name says, though the axes are the other way round.

        Single weights, kernels and square blocks of a matrix are; N:M, rows, columns and other blocks lie across.

        >>> Granularity.parse("4x4").serves_flipped((8, 12)), Granularity.parse("2:4").serves_flipped((8, 12))
        (True, False)
        """
        square = self.kind == "block" and self.a == self.b and len(shape) == 2
        return self.kind in ("element", "kernel") or square

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the grid of cells of a weight; border blocks may be smaller than the others.

        >>> Granularity.parse("4x4").grid((10, 3, 3, 3))
        (3, 7)
        """
        self._check(shape)
        out, inner = shape[0], math.prod(shape[1:])
        match self.kind:
            case "element" | "n:m":
                return shape
            case "row":
                return (out,)
            case "column":
                return (inner,)
            case "kernel":
                return (out, shape[1])
            case _:
                return (-(-out // self.a), -(-inner // self.b))

    def cell_sizes(self, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """How many weights each cell holds. Shape: the grid's."""
        out, inner = shape[0], math.prod(shape[1:])
        grid = self.grid(shape)
        match self.kind:
            case "element" | "n:m":
                return np.ones(grid, dtype=np.int64)
            case "row":
                return np.full(grid, inner, dtype=np.int64)
            case "column":
                return np.full(grid, out, dtype=np.int64)
            case "kernel":
                return np.full(grid, math.prod(shape[2:]), dtype=np.int64)
            case _:
                rows = np.minimum(self.a, out - self.a * np.arange(grid[0]))
                columns = np.minimum(self.b, inner - self.b * np.arange(grid[1]))
                return np.outer(rows, columns).astype(np.int64)

    def reduce(self, values: NDArray[Any], how: Reduction = "sum") -> NDArray[np.float64]:
        """Element saliency → one number per cell: Σ, mean, max or √Σv². Shape: weight → grid; float64.

        For "n:m" cells are elements; who stays is decided inside each group of M.

        >>> Granularity.parse("2x2").reduce(np.arange(8.0).reshape(2, 4)).tolist()
        [[10.0, 18.0]]
        """
        grid = self.grid(values.shape)
        if self.kind in ("element", "n:m"):
            return np.asarray(values, dtype=np.float64)
        work = np.asarray(values, dtype=np.float64)
        work = work * work if how == "l2" else work
        sums = self._summed(work, np.maximum if how == "max" else np.add, grid)
        if how == "mean":
            return np.asarray(sums / self.cell_sizes(values.shape))
        return np.sqrt(sums) if how == "l2" else sums

    def expand(self, kept: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Kept cells → kept weights. Shape: grid → weight.

        >>> Granularity.parse("row").expand(np.array([True, False]), (2, 2)).tolist()
        [[True, True], [False, False]]
        """
        if kept.shape != self.grid(shape):
            msg = f"kept cells must have the grid's shape {self.grid(shape)}. Got {kept.shape}."
            raise UsageError(msg)
        out, inner = shape[0], math.prod(shape[1:])
        match self.kind:
            case "element" | "n:m":
                full = kept
            case "row":
                full = np.broadcast_to(kept[:, None], (out, inner))
            case "column":
                full = np.broadcast_to(kept[None, :], (out, inner))
            case "kernel":
                full = np.repeat(kept, math.prod(shape[2:]), axis=1)
            case _:
                full = np.repeat(np.repeat(kept, self.a, axis=0)[:out], self.b, axis=1)[:, :inner]
        return np.ascontiguousarray(full.reshape(shape))

    def holds(self, kept: NDArray[np.bool_]) -> bool:
        """Whether a mask has these cells: each all kept or all pruned; for N:M no aligned M inputs hold more than N.

        >>> Granularity.parse("2x1").holds(np.array([[True, False], [True, True]]))
        False
        """
        if self.kind == "element":
            return True
        if not self.masked or kept.ndim < 2 or kept.size == 0:
            return False
        if self.kind == "n:m":
            last = np.moveaxis(kept, 1, -1)
            padded = np.zeros((*last.shape[:-1], -(-last.shape[-1] // self.b) * self.b), dtype=np.bool_)
            padded[..., : last.shape[-1]] = last
            return bool((padded.reshape(-1, self.b).sum(axis=1) <= self.a).all())
        num_kept = self.reduce(kept.astype(np.float64))
        return bool(((num_kept == 0) | (num_kept == self.cell_sizes(kept.shape))).all())

    def keep_n_of_m(self, scores: NDArray[Any]) -> NDArray[np.bool_]:
        """For "n:m": the N highest of every M consecutive input channels; of equal ones the later stays.

        A rest of fewer than M inputs keeps its N highest as well, so no window of M aligned inputs holds more than N.
        Shape: weight → weight. Elsewhere in paredown, too, the lower index leaves first at a tie.

        >>> Granularity.parse("1:2").keep_n_of_m(np.array([[1.0, 2.0, 5.0, 5.0]])).tolist()
        [[False, True, False, True]]
        """
        self._check(scores.shape)
        if self.kind != "n:m":
            msg = f"keep_n_of_m must be used with N:M. Got {self}."
            raise UsageError(msg)
        last = np.moveaxis(np.asarray(scores, dtype=np.float64), 1, -1)
        inputs = last.shape[-1]
        padded = np.full((*last.shape[:-1], -(-inputs // self.b) * self.b), -np.inf)
        padded[..., :inputs] = last
        groups = padded.reshape(-1, self.b)
        # A stable descending order that prefers the later index at a tie, and padding last.
        order = np.argsort(groups, axis=1, kind="stable")[:, ::-1][:, : self.a]
        kept = np.zeros(groups.shape, dtype=np.bool_)
        np.put_along_axis(kept, order, True, axis=1)
        kept = kept.reshape(padded.shape)[..., :inputs]
        return np.ascontiguousarray(np.moveaxis(kept, -1, 1))

    def _summed(self, values: NDArray[np.float64], ufunc: np.ufunc, grid: tuple[int, ...]) -> NDArray[np.float64]:
        out, inner = values.shape[0], math.prod(values.shape[1:])
        matrix = values.reshape(out, inner)
        match self.kind:
            case "row":
                return np.asarray(ufunc.reduce(matrix, axis=1))
            case "column":
                return np.asarray(ufunc.reduce(matrix, axis=0))
            case "kernel":
                return np.asarray(ufunc.reduce(matrix.reshape(out, values.shape[1], -1), axis=2))
            case _:
                rows = ufunc.reduceat(matrix, np.arange(grid[0]) * self.a, axis=0)
                return np.asarray(ufunc.reduceat(rows, np.arange(grid[1]) * self.b, axis=1))

    def _check(self, shape: tuple[int, ...]) -> None:
        if not self.masked:
            msg = f"a mask must be made of element, N:M, RxC, row, column or kernel. Got {self}, which leaves as a whole: use it without a mask."
            raise UsageError(msg)
        if len(shape) < 2 or 0 in shape:
            msg = f"a masked weight must have at least two axes [out, in, …] and hold something. Got shape {shape}."
            raise UsageError(msg)
