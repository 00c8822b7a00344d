from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("torchao")

from paredown.quantize.observe import BINS, MeanSquaredError, MinMax


def observer(kind: type, low: int = 0, high: int = 255) -> object:
    return kind(dtype=torch.uint8, quant_min=low, quant_max=high, qscheme=torch.per_tensor_affine)


def squared_error(values: np.ndarray, scale: float, zero: int) -> float:
    codes = np.clip(np.rint(values / scale) + zero, 0, 255)
    return float(((values - scale * (codes - zero)) ** 2).sum())


def test_min_max_is_the_range_seen_with_zero_in_it() -> None:
    seen = observer(MinMax)
    for low, high in ((0.5, 1.0), (0.2, 3.0)):
        seen(torch.tensor([low, high]))
    scale, zero = seen.calculate_qparams()
    assert float(scale) == pytest.approx(3.0 / 255)
    assert int(zero) == 0


def test_mse_beats_min_max_where_an_outlier_stretches_the_range() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    x[0] = 12.0
    parameters = {}
    for kind in (MinMax, MeanSquaredError):
        seen = observer(kind)
        for part in x.split(10_000):
            seen(part)
        scale, zero = seen.calculate_qparams()
        parameters[kind] = squared_error(x.double().numpy(), float(scale), int(zero))
    assert parameters[MeanSquaredError] < 0.9 * parameters[MinMax]


def test_mse_is_near_the_best_range_found_by_brute_force() -> None:
    values = torch.distributions.Laplace(0.0, 1.0).sample((50_000,)) if torch.manual_seed(3) else None
    seen = observer(MeanSquaredError)
    seen(values)
    scale, zero = seen.calculate_qparams()
    x = values.double().numpy()
    best = min(
        squared_error(x, (high - low) / 255, int(np.rint(-low / ((high - low) / 255))))
        for low in np.linspace(x.min(), x.min() * 0.2, 25)
        for high in np.linspace(x.max(), x.max() * 0.2, 25)
    )
    assert squared_error(x, float(scale), int(zero)) <= 1.1 * best


def test_state_does_not_grow_and_no_value_is_lost_when_the_range_widens() -> None:
    seen, total = observer(MeanSquaredError), 0
    for step in range(1, 40):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(step)) * step**2
        seen(x)
        total += int((x != 0).sum())
        assert seen.counts.numel() == BINS
    assert float(seen.counts.sum()) == total
    assert seen.left <= seen.low
    assert seen.right >= seen.high


def test_all_zeros_and_nothing_seen() -> None:
    for kind in (MinMax, MeanSquaredError):
        seen = observer(kind)
        seen(torch.zeros(10))
        scale, zero = seen.calculate_qparams()
        assert float(scale) > 0
        assert int(zero) == 0
