"""Observers of PT2E: what they keep of the values that pass is small and does not grow with the number of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e import ObserverBase

from paredown.errors import UsageError
from paredown.quantize.histogram import StreamingHistogram, finite
from paredown.quantize.numerics import (
    WEIGHT_MAX,
    WEIGHT_MIN,
    affine,
    symmetric,
    symmetric_of_least_error,
)
from paredown.quantize.pairs import pair_floor
from paredown.quantize.schemes import Levels

_RATIOS = torch.linspace(1.0, 0.2, 81, dtype=torch.float64)


class Ranged(ObserverBase):  # type: ignore[misc]
    """What all observers of activations share: one range per tensor, from which scale and zero point follow.

    A kind of observer says which `range` it takes of what it has seen: a histogram of 2048 bins, or what it keeps instead
    (`reset`, `look`). That does not grow with the number of samples. NaN and infinity are passed on and not looked at.
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
        self.histogram = StreamingHistogram()

    def look(self, values: Tensor, low: float, high: float) -> None:
        """Take in one batch: a row of at least one finite float32, its smallest and its largest value."""
        self.histogram.add(values, low, high)

    def range(self) -> tuple[float, float]:
        """Smallest and largest value that shall have a code: all that were seen, unless a kind knows better."""
        return self.histogram.low, self.histogram.high

    def forward(self, x: Tensor) -> Tensor:
        """Look at `x` and hand it on."""
        values, low, high = finite(x)
        if values.numel():
            self.look(values, low, high)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int64), shape []; 0 is exact."""
        scale, zero_point = affine(*self.range(), self.quant_min, self.quant_max)
        return torch.tensor(scale), torch.tensor(zero_point)


class MinMax(Ranged):
    """Smallest and largest finite value seen; the range of the quantizer is exactly that, with 0 included."""

    def reset(self) -> None:
        """Forget what was seen."""
        self.low, self.high = 0.0, 0.0

    def look(self, values: Tensor, low: float, high: float) -> None:
        """Widen the range where needed."""
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self) -> tuple[float, float]:
        """All values seen."""
        return self.low, self.high


class MovingAverage(Ranged):
    """Moving averages of the batches' smallest and largest values: low ← low + c · (min x - low), c = 0.01 per batch.

    The first batch gives the start. The order of the batches matters, their size too: later outliers hardly count, and
    what lies outside is clipped. As torch.ao's MovingAverageMinMaxObserver.
    """

    def __init__(self, *, averaging_constant: float = 0.01, **spec: Any) -> None:
        super().__init__(**spec)
        self.averaging_constant = averaging_constant

    def reset(self) -> None:
        """Forget what was seen."""
        self.seen: tuple[float, float] | None = None

    def look(self, values: Tensor, low: float, high: float) -> None:
        """Move both ends a little."""
        before = (low, high) if self.seen is None else self.seen
        c = self.averaging_constant
        self.seen = before[0] + c * (low - before[0]), before[1] + c * (high - before[1])

    def range(self) -> tuple[float, float]:
        """The averages."""
        return self.seen or (0.0, 0.0)


class MeanSquaredError(Ranged):
    """Range of least expected squared error, from a histogram of 2048 bins of the values other than 0.

    argmin over [low, high] of Σ count · (x - x̂)², both ends searched in turn over 81 ratios from 1 to 0.2 of the range
    seen. Zeros count for nothing: they are exact in every range that includes 0.
    """

    def range(self) -> tuple[float, float]:
        """The one of least error."""
        seen = self.histogram
        low, high = seen.low, seen.high
        if seen.counts.sum() > 0:
            for _ in range(2):
                high = self._best([(low, seen.high * float(r)) for r in _RATIOS])[1] if seen.high > 0 else high
                low = self._best([(seen.low * float(r), high) for r in _RATIOS])[0] if seen.low < 0 else low
        return low, high

    def _best(self, ranges: list[tuple[float, float]]) -> tuple[float, float]:
        """The range of least error; the widest of equals, because it comes first."""
        used = self.histogram.counts > 0
        x, counts = self.histogram.centres()[used], self.histogram.counts[used]
        parameters = [affine(low, high, self.quant_min, self.quant_max) for low, high in ranges]
        scale = torch.tensor([p[0] for p in parameters], dtype=torch.float64)[:, None]
        zero = torch.tensor([p[1] for p in parameters], dtype=torch.float64)[:, None]
        codes = (torch.round(x / scale) + zero).clamp(self.quant_min, self.quant_max)
        errors = ((x - (codes - zero) * scale).square() * counts).sum(1)
        return ranges[int(errors.argmin())]


class Percentile(Ranged):
    """The range that holds `percentile` per cent of all values, 99.99 by default, half of the rest beyond either end.

    Low and high are the (100 - p)/2-th and the (100 + p)/2-th percentile of the values with their signs, zeros included,
    from a histogram of 2048 bins: exact to one bin. Where that range is empty (nearly all values are 0), all values seen.
    """

    def __init__(self, *, percentile: float = 99.99, **spec: Any) -> None:
        super().__init__(**spec)
        self.percentile = percentile

    def range(self) -> tuple[float, float]:
        """Between the two percentiles."""
        seen, cut = self.histogram, (100 - self.percentile) / 200
        if seen.counts.sum() == 0:
            return seen.low, seen.high
        low, high = min(0.0, seen.quantile(cut)), max(0.0, seen.quantile(1 - cut))
        return (low, high) if high > low else (seen.low, seen.high)


class Entropy(Ranged):
    """The clipping threshold of least Kullback-Leibler divergence between |x| and its quantized self, as in TensorRT.

    From a histogram of 2048 bins of |x|, for i = L … 2048 with L half of the quantizer's levels (128 for 8 bits):
    P = the first i counts, the tail's mass added to the last of them; Q = the same counts without the tail, merged into
    L levels (bin k into level ⌊k·L/i⌋) and spread back evenly over the bins that were not empty. The i of least
    KL(P ‖ Q) gives T = (i + ½) · width, and the range is [-T, T] cut to what was seen.
    S. Migacz, "8-bit inference with TensorRT", GTC 2017. Where we differ: zeros are left out, because they are exact in
    every range that includes 0; counted, they would fill the first bin after a ReLU and decide alone.

    Not for outputs of sigmoid or softmax, whose rare large values are what matters (`quantize` gives them MinMax, see
    fixed.widen_gates), and not for few samples.
    """

    def reset(self) -> None:
        """Forget what was seen."""
        self.low, self.high = 0.0, 0.0
        self.histogram = StreamingHistogram(whole=True)  # one empty bin of the tail more makes the divergence infinite

    def look(self, values: Tensor, low: float, high: float) -> None:
        """Count absolute values."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.histogram.add(values.abs(), 0.0, max(-low, high))

    def range(self) -> tuple[float, float]:
        """Up to the threshold, on either side where there were values."""
        counts = self.histogram.counts
        if counts.sum() == 0:
            return 0.0, 0.0
        divergences = kl_divergences(counts, (self.quant_max - self.quant_min + 1) // 2)
        kept = len(counts) - len(divergences) + 1 + int(divergences.argmin())
        threshold = (kept + 0.5) * self.histogram.width
        return max(self.low, -threshold), min(self.high, threshold)


def kl_divergences(counts: Tensor, levels: int) -> Tensor:
    """KL(P ‖ Q) in nats for every number i = `levels` … len(counts) of bins that are kept; float64, shape [len - levels + 1].

    See `Entropy` for P and Q. Infinite where Q is 0 and P is not. All i at once, from prefix sums: with N = Σ counts,
    KL = (Σ P log P - Σ P log Q)/N + log(Σ Q / N).
    """
    counts = counts.double()
    total = counts.sum()
    kept = torch.arange(levels, len(counts) + 1)
    mass, filled, plain = (_prefix(v) for v in (counts, (counts > 0).double(), torch.special.xlogy(counts, counts)))
    edges = -((-torch.arange(levels + 1) * kept[:, None]) // levels)  # bin k is in level ⌊k·L/i⌋
    sums, sizes = mass[edges].diff(dim=1), filled[edges].diff(dim=1)
    each = torch.where(sizes > 0, sums / sizes.clamp_min(1), 0.0)
    last, tail = counts[kept - 1], total - mass[kept]
    end = last + tail
    own = plain[kept] - torch.special.xlogy(last, last) + torch.special.xlogy(end, end)
    crossed = torch.special.xlogy(sums, each).sum(1)
    last_level = torch.where(last > 0, each[:, -1], 0.0)
    crossed = crossed + torch.where(tail > 0, tail * last_level.log(), 0.0)
    found = (own - crossed) / total + (mass[kept] / total).log()
    return torch.where(mass[kept] > 0, found, torch.inf)


def _prefix(values: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=values.dtype), values.cumsum(0)])


class PerChannel(ObserverBase):  # type: ignore[misc]
    """Symmetric scales of a weight along `ch_axis`.

    Eight bits hold the largest weight; fewer take the scales of least squared error. `floor` keeps an int32 bias from
    overflowing, `pair_sum` two products of neighbours 16 bits (see Target.pair_sum). `fixed` are scales that a repair has chosen; the weight lies on their grid.
    """

    one_scale = False

    def __init__(
        self,
        dtype: torch.dtype,
        qscheme: torch.qscheme,
        ch_axis: int,
        quant_min: int = WEIGHT_MIN,
        quant_max: int = WEIGHT_MAX,
        is_dynamic: bool = False,
        levels: Levels = "integer",
        pair_sum: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.quant_min, self.quant_max, self.qscheme, self.ch_axis = quant_min, quant_max, qscheme, ch_axis
        self.levels = levels
        self.pair_sum = pair_sum
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
        scales = self.fixed
        if scales is None and self.quant_max == WEIGHT_MAX:
            scales = symmetric(self.weight, self.ch_axis, self.lowest())
        elif scales is None:
            scales = symmetric_of_least_error(
                self.weight,
                self.ch_axis,
                self.floor,
                quant_min=self.quant_min,
                quant_max=self.quant_max,
                levels=self.levels,
            )
        return scales, torch.zeros_like(scales, dtype=torch.int64)

    @property
    def limit(self) -> int | None:
        """`pair_sum`, where two codes can be beyond it."""
        beyond = self.pair_sum is not None and 2 * max(-self.quant_min, self.quant_max) > self.pair_sum
        return self.pair_sum if beyond else None

    def lowest(self) -> Tensor | None:
        """The smallest scales that are allowed, [channels]: for the bias, and for sums of two products."""
        if self.limit is None or self.weight is None:
            return self.floor
        floor = pair_floor(self.weight.movedim(self.ch_axis, 0), self.limit)
        return floor if self.floor is None else torch.maximum(self.floor, floor)


class PerChannelOneScale(PerChannel):
    """One scale for the whole weight, written for every channel: what runtimes without per-channel weights do.

    PT2E hands `ch_axis` on only to classes with PerChannel in their name.
    """

    one_scale = True

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Equal scales (float32) and zero points (int64, all 0), shape [channels]."""
        scales, zeros = super().calculate_qparams()
        return (scales if self.fixed is not None else scales.max().expand_as(scales).clone()), zeros


WEIGHT_OBSERVERS = {"channel": PerChannel, "tensor": PerChannelOneScale}
OBSERVERS: dict[str, Any] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "mse": MeanSquaredError,
    "entropy": Entropy,
}
"""By name, for activations; one contract holds for all (tests/quantize/test_quantize_observe.py)."""


def observer_named(name: str) -> Any:
    """The observer of that name, to be made with PT2E's keywords; "percentile=99.9" sets the option of percentile.

    Raises UsageError for another name, and for a percentile that is not above 0 and at most 100.

    >>> spec = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "qscheme": torch.per_tensor_affine}
    >>> observer_named("percentile=99.9")(**spec).percentile
    99.9
    """
    kind, _, option = str(name).partition("=")
    if kind not in OBSERVERS or (option and kind != "percentile") or (not option and "=" in str(name)):
        msg = f"observer must be one of {', '.join(OBSERVERS)}, or percentile=99.9 as an example. Got {name!r}."
        raise UsageError(msg)
    if not option:
        return OBSERVERS[kind]
    try:
        percentile = float(option)
    except ValueError:
        percentile = 0.0
    if not 0 < percentile <= 100:
        msg = f"percentile must be above 0 and at most 100. Got {option!r}."
        raise UsageError(msg)
    return Percentile.with_args(percentile=percentile)
