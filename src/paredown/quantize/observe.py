"""Observers of PT2E: what they keep of the values that pass is small and does not grow with the number of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e import ObserverBase

from paredown.quantize.numerics import (
    WEIGHT_MAX,
    WEIGHT_MIN,
    affine,
    symmetric,
    symmetric_of_least_error,
)

BINS = 2048
_RATIOS = torch.linspace(1.0, 0.2, 81, dtype=torch.float64)


class MinMax(ObserverBase):  # type: ignore[misc]
    """Smallest and largest finite value seen; the range of the quantizer is exactly that, with 0 included."""

    def __init__(
        self,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        is_dynamic: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.quant_min, self.quant_max, self.qscheme = quant_min, quant_max, qscheme
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self.low, self.high = 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Look at `x` and hand it on."""
        if x.numel():
            low, high = x.detach().aminmax()
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int64), shape []."""
        scale, zero_point = affine(self.low, self.high, self.quant_min, self.quant_max)
        return torch.tensor(scale), torch.tensor(zero_point)


class MeanSquaredError(ObserverBase):  # type: ignore[misc]
    """Range of least expected squared error, from a histogram of 2048 bins of the values other than 0.

    argmin over [low, high] of Σ count · (x - x̂)², both ends searched in turn over 81 ratios from 1 to 0.2 of the range
    seen. The histogram's range starts with the first batch; when a later batch exceeds it, it doubles, and pairs
    of bins merge exactly. Memory is 2048 counts, whatever the number of samples.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        is_dynamic: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.quant_min, self.quant_max, self.qscheme = quant_min, quant_max, qscheme
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self.low, self.high = 0.0, 0.0
        self.left, self.right = 0.0, 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """Count `x` and hand it on. Zeros are left out: they are exact in every range that includes 0."""
        values = x.detach().reshape(-1).float()
        values = values[values != 0]
        if values.numel():
            low, high = (float(v) for v in values.aminmax())
            self.low, self.high = min(self.low, low), max(self.high, high)
            self._widen()
            self.counts += torch.histc(values, bins=BINS, min=self.left, max=self.right).double()
        return x

    def _widen(self) -> None:
        if self.left == self.right:
            self.left, self.right = self.low, self.high
        while self.high > self.right:
            self.right += self.right - self.left
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), torch.zeros(BINS // 2, dtype=torch.float64)])
        while self.low < self.left:
            self.left -= self.right - self.left
            self.counts = torch.cat([torch.zeros(BINS // 2, dtype=torch.float64), self.counts.view(-1, 2).sum(1)])

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int64), shape []."""
        low, high = self.low, self.high
        if self.counts.sum() > 0:
            for _ in range(2):
                high = self._best([(low, self.high * float(r)) for r in _RATIOS])[1] if self.high > 0 else high
                low = self._best([(self.low * float(r), high) for r in _RATIOS])[0] if self.low < 0 else low
        scale, zero_point = affine(low, high, self.quant_min, self.quant_max)
        return torch.tensor(scale), torch.tensor(zero_point)

    def _best(self, ranges: list[tuple[float, float]]) -> tuple[float, float]:
        """The range of least error; the widest of equals, because it comes first."""
        width = (self.right - self.left) / BINS
        centres = self.left + (torch.arange(BINS, dtype=torch.float64) + 0.5) * width
        used = self.counts > 0
        x, counts = centres[used], self.counts[used]
        parameters = [affine(low, high, self.quant_min, self.quant_max) for low, high in ranges]
        scale = torch.tensor([p[0] for p in parameters], dtype=torch.float64)[:, None]
        zero = torch.tensor([p[1] for p in parameters], dtype=torch.float64)[:, None]
        codes = (torch.round(x / scale) + zero).clamp(self.quant_min, self.quant_max)
        errors = ((x - (codes - zero) * scale).square() * counts).sum(1)
        return ranges[int(errors.argmin())]


class PerChannel(ObserverBase):  # type: ignore[misc]
    """Symmetric scales of a weight along `ch_axis`.

    Eight bits hold the largest weight; fewer take the scales of least squared error. `floor` keeps an int32 bias from
    overflowing. `fixed` are scales that a repair has chosen; the weight lies on their grid.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        qscheme: torch.qscheme,
        ch_axis: int,
        quant_min: int = WEIGHT_MIN,
        quant_max: int = WEIGHT_MAX,
        is_dynamic: bool = False,
        **_: Any,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.quant_min, self.quant_max, self.qscheme, self.ch_axis = quant_min, quant_max, qscheme, ch_axis
        self.weight: Tensor | None = None
        self.floor: Tensor | None = None
        self.fixed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Remember the weight (no copy) and hand it on."""
        self.weight = x
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scales (float32) and zero points (int64, all 0), shape [channels]."""
        if self.weight is None:
            msg = "weight observer was never run"
            raise RuntimeError(msg)
        find = symmetric if self.quant_max == WEIGHT_MAX else symmetric_of_least_error
        scales = self.fixed
        if scales is None:
            scales = find(self.weight, self.ch_axis, self.floor, quant_min=self.quant_min, quant_max=self.quant_max)
        return scales, torch.zeros_like(scales, dtype=torch.int64)


OBSERVERS = {"minmax": MinMax, "mse": MeanSquaredError}
