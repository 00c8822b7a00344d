"""How far a file's outputs are from PyTorch's: of each output by itself, over all samples, and what that means."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paredown.errors import RejectedError, VerificationError
from paredown.export.conditioning import cosine_of

COSINE = 0.999
SPREAD = 1 / 3
"""Of files in codes the error (root of the mean square) may be that share of the reference's own deviation, or one step of
its codes: a cosine says nothing of grams, which are 3,000 give or take."""
_FLOOR = 1e-2
"""Of several outputs, a smaller one's error is compared with this (or with the largest output, where that is smaller)."""
_MOST_VALUES = 256


@dataclass(slots=True)
class _Output:
    """One output over all runs: sums, not samples, are kept."""

    error: float = 0.0
    scale: float = 0.0
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    missed: float = 0.0
    values: set[float] = field(default_factory=set)

    def add(self, got: Tensor, expected: Tensor) -> None:
        """Values of one run, in float64."""
        gap = got - expected
        self.error, self.scale = max(self.error, float(gap.abs().max())), max(self.scale, float(expected.abs().max()))
        self.count += len(gap)
        self.total += float(expected.sum())
        self.squares += float(expected.square().sum())
        self.missed += float(gap.square().sum())
        if len(self.values) <= _MOST_VALUES:
            self.values.update(expected[: 16 * _MOST_VALUES].unique()[: _MOST_VALUES + 1].tolist())

    @property
    def deviation(self) -> float:
        """Of the reference about its own mean."""
        return math.sqrt(max(self.squares / self.count - (self.total / self.count) ** 2, 0.0)) if self.count else 0.0

    @property
    def lost(self) -> float:
        """The error, root of the mean square, as a share of the reference's deviation; 0 where it has none."""
        if self.count < 2 or self.deviation <= 1e-5 * self.scale:  # what float32 makes of equal numbers
            return 0.0
        return math.sqrt(self.missed / self.count) / self.deviation

    @property
    def of_spread(self) -> float:
        """The same, but 0 where the error is no more than a step of the reference's codes."""
        missed = self.lost * self.deviation
        values = sorted(self.values) if len(self.values) <= _MOST_VALUES else []
        step = min((b - a for a, b in itertools.pairwise(values)), default=0.0)
        return 0.0 if missed <= step else self.lost


def of_spread(got: Any, expected: Any) -> float:
    """The error of one output's values (arrays, float64) as a share of what the expected ones differ among themselves."""
    output = _Output()
    if len(got):
        output.add(torch.from_numpy(got), torch.from_numpy(expected))
    return output.of_spread


class Distance:
    """How far outputs are from the reference, output by output; the batch of the smallest cosine is kept, with the file's answers."""

    def __init__(self) -> None:
        self.cosine, self.finite, self.runs = 1.0, True, 0
        self.worst: Any = None
        self.answers: list[Tensor] = []
        self._outputs: list[_Output] = []

    def add(self, got: list[Tensor], expected: list[Tensor]) -> None:
        """One run. Raises VerificationError where shapes differ, RejectedError where the reference is not a number."""
        shapes = [tuple(t.shape) for t in got], [tuple(t.shape) for t in expected]
        if shapes[0] != shapes[1]:
            msg = f"outputs must have the shapes of PyTorch's: {shapes[1]}. Got {shapes[0]}."
            raise VerificationError(msg)
        self.runs += 1
        self._outputs = self._outputs or [_Output() for _ in got]
        for number, (a, b) in enumerate(zip(got, expected, strict=True)):
            x, y = a.double().reshape(-1), b.double().reshape(-1)
            if bool((y.isnan() | (y == torch.inf)).any()):  # two overflows are equal whatever the rest of the file says
                got_what = "NaN" if bool(y.isnan().any()) else "infinity"
                msg = f"PyTorch's own outputs must be numbers. Got {got_what} in output {number}. Look for NaN in the samples, or for a division by zero or an overflow in the network."
                raise RejectedError(msg)
            differ = ~(y.isinf() & (x == y))  # minus infinity is what a mask writes
            x, y = x[differ], y[differ]
            if not x.numel():
                continue
            if not bool(x.isfinite().all() & y.isfinite().all()):
                self.finite = False
                continue
            self._outputs[number].add(x, y)
            self.cosine = min(self.cosine, cosine_of(x, y))

    @property
    def error(self) -> float:
        """Largest error of the output that is farthest off beside its own scale."""
        return self._farthest().error

    @property
    def scale(self) -> float:
        """The largest value of that output."""
        return self._farthest().scale

    def within(self, tolerance: float | None) -> bool:
        """Whether every output is near enough: by its error against its scale, or, of files in codes, by its cosine and spread."""
        if not self.finite:
            return False
        if tolerance is None:
            return self.cosine >= COSINE and self.in_spread
        return all(o.error <= tolerance * self._beside(o) for o in self._outputs)

    @property
    def lost(self) -> float:
        """The largest error of an output, root of the mean square, as a share of what its values differ among themselves."""
        return max((o.lost for o in self._outputs), default=0.0)

    @property
    def in_spread(self) -> bool:
        """Whether no output misses by more than a third of what its values differ among themselves."""
        return all(o.of_spread <= SPREAD for o in self._outputs)

    def told(self, tolerance: float | None) -> str:
        """What was asked and what was found, for a message."""
        rule = f"within {tolerance:g} of each output's scale" if tolerance else f"cosine ≥ {COSINE}"
        got = f"an error of {self.error:.3g} at scale {self.scale:.3g}, cosine {self.cosine:.6f}"
        if tolerance is None and not self.in_spread:
            rule += f", and an error of at most {SPREAD:.2g} of what an output's values differ among themselves"
            got += f", an error of {max(o.of_spread for o in self._outputs):.2g} of that"
        return f"({rule}). Got {got}{'' if self.finite else ', NaN or infinity'}."

    def _beside(self, output: _Output) -> float:
        return max(output.scale, min(_FLOOR, max(o.scale for o in self._outputs)))

    def _farthest(self) -> _Output:
        return max(self._outputs, key=lambda o: o.error / max(self._beside(o), 1e-300), default=_Output())
