"""The uniform quantizer: q = clamp(round(x / s) + z, qmin, qmax), x̂ = s · (q - z). Pure functions on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from paredown.errors import UsageError
from paredown.quantize.schemes import Levels, weight_range

WEIGHT_MIN, WEIGHT_MAX = -127, 127
"""Symmetric int8 weights leave out -128: the range is symmetric and products cannot saturate alone."""
Granularity = Literal["tensor", "channel", "group", "token"]
GRANULARITIES = ("tensor", "channel", "group", "token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A uniform grid per row of `rows_of`: x̂ = scales · (q - zero_points), q from quant_min to quant_max."""

    scales: Tensor
    """float32, shape [rows, 1]."""
    zero_points: Tensor
    """int64, same shape; 0 for a symmetric mapping."""
    quant_min: int
    quant_max: int
    bits: int
    mapping: str
    granularity: str
    axis: int
    group: int


def affine(low: float, high: float, quant_min: int, quant_max: int) -> tuple[float, int]:
    """Scale and zero point of the range [low, high], which is widened to include 0 so that 0 is exact.

    s = (high - low) / (quant_max - quant_min), z = round(quant_min - low / s). An empty range (always 0) gets
    scale 1 / (quant_max - quant_min). Scales are float32 values.

    >>> affine(0.0, 2.55, 0, 255)[1]
    0
    """
    low, high = min(low, 0.0), max(high, 0.0)
    levels = quant_max - quant_min
    width = high - low if high > low else 1.0
    largest = torch.finfo(torch.float32).max  # two levels for the whole of float32 want more
    scale = float(torch.tensor(min(max(width / levels, 1e-30), largest), dtype=torch.float32))
    zero_point = quant_min - round(low / scale)
    return scale, max(quant_min, min(quant_max, zero_point))


def symmetric(
    weight: Tensor, axis: int, floor: Tensor | None = None, *, quant_min: int = WEIGHT_MIN, quant_max: int = WEIGHT_MAX
) -> Tensor:
    """Scales of symmetric codes, one per index of `axis`, that hold every weight; float32, shape [channels].

    s = max(max w / quant_max, min w / quant_min), which is max|w| / 127 for eight bits. A channel of zeros gets
    1 / quant_max. `floor` (same shape) is the smallest scale allowed: see `bias_floor`.
    """
    rows = weight.detach().float().movedim(axis, 0).reshape(weight.shape[axis], -1)
    largest = torch.maximum(rows.amax(dim=1) / quant_max, rows.amin(dim=1) / quant_min)
    scales = torch.where(largest > 0, largest, torch.full_like(largest, 1.0 / quant_max)).clamp_min(1e-30)
    return scales if floor is None else torch.maximum(scales, floor)


RATIOS = torch.linspace(1.0, 0.4, 61, dtype=torch.float64)
"""Of the scale that holds the largest weight: those that are tried."""
FEW_RATIOS = torch.linspace(1.0, 0.1, 91, dtype=torch.float64)
"""Those for balanced, ternary and binary levels: with four levels or fewer most of a channel lies beyond the best scale's last one."""


def snap(places: Tensor, quant_min: int, quant_max: int, levels: Levels = "integer") -> Tensor:
    """The nearest code of every w / s, in the dtype of `places`.

    Integer and ternary: clamp(round(w / s)), half to even. Balanced and binary: clamp(2 ⌊w / 2s⌋ + 1), the nearest odd number.

    >>> snap(torch.tensor([-9.0, -0.1, 0.0, 2.1]), -3, 3, "balanced").tolist()
    [-3.0, -1.0, 1.0, 3.0]
    """
    if levels in ODD:
        return (2 * torch.floor(places / 2) + 1).clamp(quant_min, quant_max)
    return torch.round(places).clamp(quant_min, quant_max)


ODD = ("balanced", "binary")
"""Levels without 0."""


def symmetric_of_least_error(
    weight: Tensor,
    axis: int,
    floor: Tensor | None = None,
    *,
    quant_min: int,
    quant_max: int,
    levels: Levels = "integer",
) -> Tensor:
    """Scales of least Σ (w - s·q)² per index of `axis`, among `RATIOS` of those of `symmetric`; float32, shape [channels].

    Few levels want a scale that cuts the largest weights off; with eight bits it hardly differs.
    """
    rows = weight.detach().float().movedim(axis, 0).reshape(weight.shape[axis], -1)
    return scales_of_least_error(rows, quant_min, quant_max, floor=floor, levels=levels).float()


def scales_of_least_error(
    rows: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    gram: Tensor | None = None,
    floor: Tensor | None = None,
    levels: Levels = "integer",
) -> Tensor:
    """Scales [out] of least error of rounding to the nearest: argmin over s of (w - ŵ) G (w - ŵ)ᵀ per row.

    Tried: `RATIOS` (`FEW_RATIOS`) of the scale that holds the row's largest weight. rows [out, K]; gram G [K, K] is the mean of x xᵀ, or
    None for the identity. `floor` is the smallest scale allowed (see bias_floor). The result has the dtype of `rows` and is a
    float32 value: scales are stored as such, so that codes must be rounded on what is stored.
    """
    whole = symmetric(rows, 0, quant_min=quant_min, quant_max=quant_max).to(rows.dtype)
    if levels in ODD:  # there is no code for 0: a row of zeros has levels that are next to it
        whole = torch.where((rows == 0).all(dim=1), 1e-12, whole)
    best, least = whole.clone(), torch.full_like(whole, torch.inf)
    for ratio in (RATIOS if levels == "integer" else FEW_RATIOS).tolist():
        scales = whole * ratio if floor is None else torch.maximum(whole * ratio, floor)
        away = rows - scales[:, None] * snap(rows / scales[:, None], quant_min, quant_max, levels)
        errors = (away if gram is None else away @ gram).mul(away).sum(dim=1)
        better = errors < least
        best, least = torch.where(better, scales, best), torch.where(better, errors, least)
    return best.float().to(rows.dtype)


def bias_floor(bias: Tensor, activation_scale: float) -> Tensor:
    """The smallest weight scale per channel for which the bias, an int32 of scale s_w · s_x, cannot overflow.

    s_w ≥ |b| / (2³⁰ · s_x). Runtimes store the bias like that; with a nearly dead channel it would wrap around.
    """
    return bias.detach().abs().float() / (2.0**30 * activation_scale)


def quantize_codes(
    values: Tensor, scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int
) -> Tensor:
    """Codes of `values`, int32, rounding half to even. `scale` and `zero_point` broadcast against `values`."""
    return (torch.round(values / scale) + zero_point).clamp(quant_min, quant_max).to(torch.int32)


def dequantize_codes(codes: Tensor, scale: Tensor | float, zero_point: Tensor | int) -> Tensor:
    """x̂ = s · (q - z), float32."""
    return (codes - zero_point).to(torch.float32) * scale


def fake_quantize(values: Tensor, observer: Any, parameters: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x̂ of `values` by the `parameters` that an observer has found, per tensor or along its `ch_axis`; float32."""
    scale, zero_point = observer.calculate_qparams() if parameters is None else parameters
    axis = getattr(observer, "ch_axis", None)
    if axis is not None and scale.dim():
        shape = [1] * values.dim()
        shape[axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    levels: Levels = getattr(observer, "levels", "integer")
    if levels != "integer":
        return snap(values / scale, observer.quant_min, observer.quant_max, levels) * scale
    codes = quantize_codes(values, scale, zero_point, observer.quant_min, observer.quant_max)
    return dequantize_codes(codes, scale, zero_point)


def rows_of(values: Tensor, granularity: str, axis: int, group: int) -> Tensor:
    """The values that share a scale as rows [scales, values]; a short last group is filled with zeros. A view where possible.

    tensor: one row. channel: one per index of `axis`. group: `group` neighbours along each channel's other axes. token: one
    per position of all axes but `axis`, that of the features.
    """
    if granularity == "tensor":
        return values.reshape(1, -1)
    if granularity == "token":
        return values.movedim(axis, -1).reshape(-1, values.shape[axis])
    rows = values.movedim(axis, 0).reshape(values.shape[axis], -1)
    if granularity == "channel":
        return rows
    filled = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group))
    return filled.reshape(-1, group)


def from_rows(rows: Tensor, like: Tensor, granularity: str, axis: int) -> Tensor:
    """Rows of `rows_of` in the shape of the values that they came from."""
    if granularity == "tensor":
        return rows.reshape(like.shape)
    if granularity == "token":
        return rows.reshape(like.movedim(axis, -1).shape).movedim(-1, axis)
    moved = like.movedim(axis, 0)
    inner = moved[0].numel()
    return rows.reshape(moved.shape[0], -1)[:, :inner].reshape(moved.shape).movedim(0, axis)


def grid_of(
    values: Tensor,
    *,
    bits: int = 8,
    mapping: Literal["symmetric", "affine"] = "symmetric",
    granularity: Granularity = "tensor",
    axis: int | None = None,
    group: int = 128,
) -> Grid:
    """The uniform grid that holds all `values`, one scale and zero point per tensor, channel, group or token; bits 8 to 1.

    symmetric: z = 0, s = max(max x / qmax, min x / qmin), codes -127 … 127 for 8 bits and -2^(b-1) … 2^(b-1)-1 below. One
    bit has the levels ±s with s = mean|x|, the scale of least error for two of them (Rastegari et al. 2016, XNOR-Net, eq. 6).
    affine: codes 0 … 2^b - 1, s = (max - min)/(2^b - 1) of the range with 0 in it, z = -round(min/s); 0 is exact.
    Scales float32, zero points int64, shape [scales, 1], in the order of `rows_of`. `axis` is that of the channels (0), or
    for tokens that of the features (the last). Rows of zeros get a scale of a range of 1.

    Raises UsageError: bits, mapping, granularity, axis or group that are none; values without elements.

    >>> grid_of(torch.tensor([[-1.0, 0.5], [0.0, 3.0]]), bits=4, granularity="channel").scales.ravel().tolist()
    [0.125, 0.4285714328289032]
    """
    wrong = bits not in range(1, 9) or mapping not in ("symmetric", "affine") or granularity not in GRANULARITIES
    axis = (-1 if granularity == "token" else 0) if axis is None else axis
    if wrong or group < 1 or not values.numel() or not -values.dim() <= axis < max(values.dim(), 1):
        msg = (
            f"a grid must have values, 1 to 8 bits, a symmetric or affine mapping, a granularity of {', '.join(GRANULARITIES)}, "
            f"an axis of the values and a group ≥ 1. Got {tuple(values.shape)}, {bits}, {mapping!r}, {granularity!r}, {axis}, {group}."
        )
        raise UsageError(msg)
    rows = rows_of(values.detach().float(), granularity, axis, group)
    if mapping == "affine":
        low, high = 0, 2**bits - 1
        scales, zeros = _affine_rows(rows, high)
    elif bits == 1:
        low, high = -1, 1
        filled = rows.numel() != values.numel()
        counted = rows_of(torch.ones_like(values, dtype=torch.float32), granularity, axis, group) if filled else rows
        count = counted.sum(1) if filled else torch.full((rows.shape[0],), float(rows.shape[1]))
        mean = (rows.abs().sum(1, dtype=torch.float64) / count).float()
        scales, zeros = torch.where(mean > 0, mean, 1.0).clamp_min(1e-30), torch.zeros(rows.shape[0])
    else:
        low, high = weight_range(bits)
        scales, zeros = symmetric(rows, 0, quant_min=low, quant_max=high), torch.zeros(rows.shape[0])
    return Grid(
        scales=scales[:, None],
        zero_points=zeros.long()[:, None],
        quant_min=low,
        quant_max=high,
        bits=bits,
        mapping=mapping,
        granularity=granularity,
        axis=axis,
        group=group,
    )


def _affine_rows(rows: Tensor, quant_max: int) -> tuple[Tensor, Tensor]:
    """`affine` for every row."""
    low, high = rows.amin(1).clamp_max(0).double(), rows.amax(1).clamp_min(0).double()
    width = torch.where(high > low, high - low, 1.0)
    scales = (width / quant_max).clamp(1e-30, torch.finfo(torch.float32).max).float()
    return scales, (-torch.round(low / scales.double())).clamp(0, quant_max)


def on_grid(values: Tensor, grid: Grid) -> Tensor:
    """x̂: every value on the nearest level of its grid (see `grid_of`), float32, in the shape of `values`.

    >>> weight = torch.tensor([[-1.0, 0.5], [0.1, 3.0]])
    >>> on_grid(weight, grid_of(weight, bits=1, granularity="channel")).tolist()
    [[-0.75, 0.75], [1.5499999523162842, 1.5499999523162842]]
    """
    rows = rows_of(values.detach().float(), grid.granularity, grid.axis, grid.group)
    if grid.bits == 1 and grid.mapping == "symmetric":
        rounded = torch.where(rows < 0, -grid.scales, grid.scales)
    else:
        codes = quantize_codes(rows, grid.scales, grid.zero_points, grid.quant_min, grid.quant_max)
        rounded = dequantize_codes(codes, grid.scales, grid.zero_points)
    return from_rows(rounded, values, grid.granularity, grid.axis)


def levels_of(grid: Grid, row: int = 0) -> tuple[float, ...]:
    """The values that one row of a grid can hold, ascending.

    >>> levels_of(grid_of(torch.tensor([-1.0, 3.0]), bits=2, mapping="affine"))
    (-1.3333333730697632, 0.0, 1.3333333730697632, 2.6666667461395264)
    """
    step = 2 if grid.bits == 1 and grid.mapping == "symmetric" else 1
    codes = torch.arange(grid.quant_min, grid.quant_max + 1, step)
    return tuple(dequantize_codes(codes, grid.scales[row], grid.zero_points[row]).tolist())


def observes_weight(observer: Any) -> bool:
    """Whether an observer is one of a weight (quantize.observe.PerChannel), told without importing torchao."""
    return hasattr(observer, "ch_axis") and hasattr(observer, "floor")
