"""What it costs to write a number with fewer bits: a plain cast, and a mapping with the right or a wrong zero point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from paredown.errors import UsageError
from paredown.quantize.numerics import affine

KINDS = {
    "float64": (torch.float64, 64),
    "float32": (torch.float32, 32),
    "float16": (torch.float16, 16),
    "bfloat16": (torch.bfloat16, 16),
    "int8": (torch.int8, 8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """One number in one type. Errors are those against the float64 value that was given."""

    kind: str
    bits: int
    kept: float
    """What the type holds of it; infinite where a float type overflows."""
    absolute_error: float
    relative_error: float
    """|kept - value| / |value|, a fraction; 0 for the value 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingError:
    """A range mapped to codes with one zero point, and what comes back."""

    rule: str
    scale: float
    zero_point: float
    largest_error: float
    root_mean_square_error: float
    clipped_share: float
    """Of the range: values whose code lies beyond the ends."""


def cast(value: float, kind: str) -> Cast:
    """`value` in float64, float32, float16, bfloat16 or int8, rounded to the nearest (half to even).

    int8 has no scale here: it holds whole numbers from -128 to 127, and what lies outside becomes the end. Runtimes may
    wrap around instead. Raises UsageError for another kind, NaN or infinity.

    >>> cast(3.141592653589793, "float16").kept, f"{cast(3.141592653589793, 'int8').relative_error:.2%}"
    (3.140625, '4.51%')
    """
    if kind not in KINDS or not math.isfinite(value):
        msg = f"a cast must be of a finite number to one of {', '.join(KINDS)}. Got {value} to {kind!r}."
        raise UsageError(msg)
    dtype, bits = KINDS[kind]
    number = torch.tensor(value, dtype=torch.float64)
    kept = float((number.round().clamp(-128, 127) if dtype == torch.int8 else number).to(dtype).double())
    error = abs(kept - value)
    return Cast(
        kind=kind,
        bits=bits,
        kept=kept,
        absolute_error=error,
        relative_error=error / abs(value) if value else 0.0,
    )


def casts(value: float) -> tuple[Cast, ...]:
    """`value` in all five types, from 64 to 8 bits.

    >>> [c.bits for c in casts(1.0)], max(c.absolute_error for c in casts(1.0))
    ([64, 32, 16, 16, 8], 0.0)
    """
    return tuple(cast(value, kind) for kind in KINDS)


def zero_points(low: float, high: float, quant_min: int = 0, quant_max: int = 255) -> tuple[MappingError, MappingError]:
    """The range [low, high] mapped with the right zero point, and with one that is often told; 10,001 values each.

    q = clamp(round(x/s + z), qmin, qmax), x̂ = s · (q - z), s = (high - low)/(qmax - qmin). Right: z = qmin - round(low/s),
    which sends `low` to qmin. Often told: z = (high + low)/2, the middle of the range; but that is a number in the unit of x,
    and z is added to codes. Then only a part of the range has codes, and the rest is cut off; and 0 has no exact code
    where z is no integer.

    Raises UsageError where low < high does not hold, or qmin < qmax.

    >>> right, told = zero_points(-1.0, 3.0)
    >>> right.zero_point, told.zero_point, round(right.largest_error / right.scale, 2), round(told.largest_error, 2)
    (64.0, 1.0, 0.5, 0.98)
    """
    if not low < high or not quant_min < quant_max or not math.isfinite(high - low):
        msg = f"a mapping must have low < high and quant_min < quant_max. Got [{low}, {high}] and [{quant_min}, {quant_max}]."
        raise UsageError(msg)
    scale, zero = affine(low, high, quant_min, quant_max)
    plain = (high - low) / (quant_max - quant_min)
    return (
        _mapped("z = qmin - round(low / s)", low, high, scale, float(zero), quant_min, quant_max),
        _mapped("z = (high + low) / 2", low, high, plain, (high + low) / 2, quant_min, quant_max),
    )


def _mapped(
    rule: str, low: float, high: float, scale: float, zero: float, quant_min: int, quant_max: int
) -> MappingError:
    x = torch.linspace(low, high, 10_001, dtype=torch.float64)
    wanted = torch.round(x / scale + zero)
    codes = wanted.clamp(quant_min, quant_max)
    error = (scale * (codes - zero) - x).abs()
    return MappingError(
        rule=rule,
        scale=scale,
        zero_point=zero,
        largest_error=float(error.max()),
        root_mean_square_error=float(error.square().mean().sqrt()),
        clipped_share=float((codes != wanted).double().mean()),
    )
