from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paredown.quantize import affine, bias_floor, dequantize_codes, quantize_codes, symmetric

finite = st.floats(-1e6, 1e6, allow_nan=False, width=32)


@given(finite, finite)
def test_every_representable_value_is_a_fixed_point(a: float, b: float) -> None:
    scale, zero = affine(min(a, b), max(a, b), 0, 255)
    codes = torch.arange(256, dtype=torch.int32)
    values = dequantize_codes(codes, scale, zero)
    assert torch.equal(quantize_codes(values, scale, zero, 0, 255), codes)


@given(finite, finite, st.integers(0, 2**31))
def test_rounding_error_is_at_most_half_a_step_inside_the_range(a: float, b: float, seed: int) -> None:
    low, high = min(a, b), max(a, b)
    scale, zero = affine(low, high, 0, 255)
    low, high = min(low, 0.0), max(high, 0.0)
    x = np.random.default_rng(seed).uniform(low, high, 200)  # float64 oracle, independent of torch
    codes = quantize_codes(torch.from_numpy(x), scale, zero, 0, 255).numpy()
    error = np.abs(x - scale * (codes.astype(np.float64) - zero))
    # Half a step, and where the zero point was rounded, the end of the range can lie another half step outside.
    inside = (x >= -scale * zero) & (x <= scale * (255 - zero))
    assert (error[inside] <= scale / 2 * (1 + 1e-5)).all()
    assert (error <= scale * (1 + 1e-5)).all()


@given(finite, finite)
def test_zero_is_exact_and_order_is_kept(a: float, b: float) -> None:
    scale, zero = affine(min(a, b), max(a, b), 0, 255)
    assert float(dequantize_codes(quantize_codes(torch.zeros(1), scale, zero, 0, 255), scale, zero)) == 0.0
    assert 0 <= zero <= 255
    x = torch.linspace(min(a, b) - 1, max(a, b) + 1, 301)
    assert (quantize_codes(x, scale, zero, 0, 255).diff() >= 0).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_per_channel_is_a_loop_of_per_tensor(axis: int) -> None:
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    scales = symmetric(weight, axis)
    assert scales.shape == (weight.shape[axis],)
    for i in range(weight.shape[axis]):
        one = np.abs(weight.select(axis, i).numpy()).max() / 127
        assert float(scales[i]) == pytest.approx(one, rel=1e-6)


def test_symmetric_weights_use_the_whole_range_and_never_minus_128() -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    codes = quantize_codes(weight, symmetric(weight, 0)[:, None], 0, -127, 127)
    assert codes.abs().amax(1).tolist() == [127] * 6


def test_a_channel_of_zeros_and_an_empty_range_have_a_sane_scale() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    assert symmetric(weight, 0)[0] == pytest.approx(1 / 127)
    scale, zero = affine(0.0, 0.0, 0, 255)
    assert scale > 0
    assert zero == 0


def test_floor_keeps_the_bias_in_int32() -> None:
    weight, bias, activation = torch.full((1, 4), 1e-12), torch.tensor([3.0]), 0.01
    plain = symmetric(weight, 0)
    assert abs(float(bias / (plain * activation))) > 2**31  # without the floor it would wrap around
    safe = symmetric(weight, 0, bias_floor(bias, activation))
    assert abs(float(bias / (safe * activation))) <= 2**30 * (1 + 1e-6)
