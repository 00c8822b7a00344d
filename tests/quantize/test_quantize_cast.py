"""Casts and zero points: what is kept, against numpy and against the bits themselves."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paredown.errors import UsageError
from paredown.quantize.cast import KINDS, cast, casts, zero_points

numbers = st.floats(allow_nan=False, allow_infinity=False)


def test_what_pi_costs() -> None:
    found = {c.kind: c for c in casts(math.pi)}
    assert {k: c.bits for k, c in found.items()} == {
        "float64": 64,
        "float32": 32,
        "float16": 16,
        "bfloat16": 16,
        "int8": 8,
    }
    assert {k: c.kept for k, c in found.items()} == {
        "float64": math.pi,
        "float32": 3.1415927410125732,
        "float16": 3.140625,
        "bfloat16": 3.140625,
        "int8": 3.0,
    }
    percent = {k: float(f"{100 * c.relative_error:.3g}") for k, c in found.items()}
    assert percent == {"float64": 0.0, "float32": 2.78e-6, "float16": 3.08e-2, "bfloat16": 3.08e-2, "int8": 4.51}
    assert found["int8"].absolute_error == pytest.approx(0.14159265)


def bfloat16_by_bits(value: float) -> float:
    """float32 with the lower half of its bits rounded away, half to even."""
    with np.errstate(over="ignore"):
        (bits,) = struct.unpack("<I", np.float32(value).tobytes())
    bits += 0x7FFF + ((bits >> 16) & 1)
    return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])


@given(numbers)
def test_casts_are_those_of_numpy(value: float) -> None:
    with np.errstate(over="ignore"):
        want = {"float64": value, "float32": float(np.float32(value)), "float16": float(np.float16(value))}
    for kind, kept in want.items():
        assert cast(value, kind).kept == kept
    assert cast(value, "int8").kept == min(127, max(-128, round(value)))


@given(st.floats(-(2.0**100), 2.0**100, width=32))  # a double would be rounded twice by the oracle
def test_bfloat16_is_the_upper_half_of_float32(value: float) -> None:
    assert cast(value, "bfloat16").kept == bfloat16_by_bits(value)


@given(numbers)
def test_errors_are_those_of_what_is_kept(value: float) -> None:
    for one in casts(value):
        if math.isfinite(one.kept):
            assert one.absolute_error == abs(one.kept - value)
            assert one.relative_error == (abs(one.kept - value) / abs(value) if value else 0.0)
    assert cast(value, "float64").absolute_error == 0


def test_a_cast_can_overflow_or_saturate() -> None:
    assert cast(1e6, "float16").kept == math.inf
    assert cast(1e6, "bfloat16").relative_error < 2**-8
    assert cast(-1e6, "int8").kept == -128


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "float16"), (math.inf, "int8"), (1.0, "int4")])
def test_what_cannot_be_cast_is_refused(value: float, kind: str) -> None:
    with pytest.raises(UsageError, match="a cast must be"):
        cast(value, kind)
    assert kind in KINDS or kind == "int4"


# ---------------------------------------------------------------------------------------------------------- zero points


def through(x: np.ndarray, scale: float, zero: float, low: int, high: int) -> np.ndarray:
    return scale * (np.clip(np.rint(x / scale + zero), low, high) - zero)


@pytest.mark.parametrize(("quant_min", "quant_max"), [(0, 255), (-128, 127), (0, 15)])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 6.0), (-7.0, 0.5), (-1e-3, 2e-3)])
def test_the_right_zero_point_errs_by_a_step_and_the_other_cuts_the_range(
    low: float, high: float, quant_min: int, quant_max: int
) -> None:
    right, told = zero_points(low, high, quant_min, quant_max)
    x = np.linspace(low, high, 5_001)
    for one in (right, told):
        error = np.abs(through(x, one.scale, one.zero_point, quant_min, quant_max) - x)
        assert one.largest_error == pytest.approx(error.max(), rel=1e-2)
        assert one.root_mean_square_error == pytest.approx(np.sqrt((error**2).mean()), rel=2e-2)
    assert right.zero_point == int(right.zero_point)
    assert right.largest_error <= right.scale * 1.001
    assert right.clipped_share < 1.5 / (quant_max - quant_min)
    assert told.zero_point == pytest.approx((low + high) / 2)
    middle = (quant_min - low / told.scale) - told.zero_point  # how far the codes are from where they should be
    assert told.clipped_share == pytest.approx(
        min(1.0, abs(middle) / (quant_max - quant_min)), abs=2 / (quant_max - quant_min)
    )
    assert told.largest_error >= right.largest_error * 0.99


def test_the_talks_zero_point_loses_the_negative_half() -> None:
    right, told = zero_points(-1.0, 3.0)
    assert (right.zero_point, told.zero_point) == (64.0, 1.0)
    assert right.largest_error < 0.008
    assert told.largest_error > 0.98
    assert told.clipped_share == pytest.approx(0.246, abs=0.005)


def test_it_is_right_only_where_codes_and_range_are_even() -> None:
    right, told = zero_points(-1.0, 1.0, -127, 127)
    assert told.zero_point == right.zero_point == 0
    assert told.largest_error == pytest.approx(right.largest_error, rel=1e-5)


@pytest.mark.parametrize("arguments", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (0.0, 1.0, 5, 5)])
def test_empty_ranges_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="low < high"):
        zero_points(*arguments)  # type: ignore[arg-type]
