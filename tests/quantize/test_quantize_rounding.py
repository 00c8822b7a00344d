from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deploy_nets

pytest.importorskip("torchao")

from paredown.errors import UsageError
from paredown.export import export, predictor
from paredown.program import capture
from paredown.quantize import quantize
from paredown.quantize.numerics import scales_of_least_error, symmetric, symmetric_of_least_error
from paredown.quantize.rounding import fitted, gptq


def layer(kind: str, seed: int, size: int = 256, tokens: int = 4096) -> tuple[Tensor, Tensor]:
    """A weight [size, size] and inputs [tokens, size]: power-law correlated with 4 outlier channels × 15, or white."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    if kind == "correlated":
        basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        x = (x * torch.arange(1, size + 1, dtype=torch.float64) ** -0.5) @ basis
        x[:, torch.randperm(size, generator=generator)[:4]] *= 15
    return torch.randn(size, size, generator=generator, dtype=torch.float64), x


def lost(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float((x @ (weight - rounded).T).square().sum() / (x @ weight.T).square().sum())


def errors(kind: str, bits: int, seed: int) -> tuple[float, float]:
    """Output error of rounding to the nearest and of gptq, on one set of scales."""
    weight, x = layer(kind, seed)
    high = 2 ** (bits - 1) - 1
    scales = symmetric_of_least_error(weight, 0, quant_min=-high - 1, quant_max=high).double()
    nearest = torch.round(weight / scales[:, None]).clamp(-high - 1, high)
    codes = gptq(weight, x.T @ x / len(x), scales, -high - 1, high)
    assert torch.equal(codes, codes.round()) and codes.min() >= -high - 1 and codes.max() <= high
    return lost(weight, nearest * scales[:, None], x), lost(weight, codes * scales[:, None], x)


@pytest.mark.parametrize("bits", [3, 4])
def test_layer_oracle_on_correlated_inputs(bits: int) -> None:
    pairs = np.array([errors("correlated", bits, seed) for seed in range(2)])
    nearest, ours = pairs.mean(0)
    assert ours <= 0.65 * nearest
    if bits == 4:
        assert 0.004 < nearest < 0.02  # the published order of size: 0.0118


@pytest.mark.parametrize("bits", [3, 4])
def test_layer_oracle_negative_control_on_white_inputs(bits: int) -> None:
    nearest, ours = np.array([errors("white", bits, seed) for seed in range(2)]).mean(0)
    assert abs(ours / nearest - 1) < 0.15


def test_layer_oracle_with_scales_that_hold_all() -> None:
    """Rounding to the nearest at four bits on absmax scales: gptq wins on correlated inputs alone, at the same scales."""
    for kind in ("correlated", "white"):
        weight, x = layer(kind, 0)
        scales = symmetric(weight, 0, quant_min=-8, quant_max=7).double()
        assert bool((weight / scales[:, None] > -8 - 1e-5).all() and (weight / scales[:, None] < 7 + 1e-5).all())
        nearest = torch.round(weight / scales[:, None]).clamp(-8, 7) * scales[:, None]
        ours = gptq(weight, x.T @ x / len(x), scales, -8, 7) * scales[:, None]
        plain, best = lost(weight, nearest, x), lost(weight, ours, x)
        assert 0.01 < plain < 0.02  # of white inputs the error of the weight itself: about 0.015 for rows of 256
        assert best <= 0.65 * plain if kind == "correlated" else abs(best / plain - 1) < 0.15


def test_scales_that_hold_all_lose_the_more_the_longer_the_row() -> None:
    """Mean squared error of rows from N(0, 1) at four bits, beside the table's for max|w| / 7 (METHODS 12.1)."""
    generator = torch.Generator().manual_seed(0)
    for length, table in ((64, 0.0117), (128, 0.0140), (1024, 0.0204), (4096, 0.0248)):
        rows = torch.randn(256, length, generator=generator)

        def error(scales: Tensor, low: int, rows: Tensor = rows) -> float:
            return float((torch.round(rows / scales[:, None]).clamp(low, 7) * scales[:, None] - rows).square().mean())

        assert error(symmetric(rows, 0, quant_min=-7, quant_max=7), -7) == pytest.approx(table, rel=0.03)
        ours = error(symmetric(rows, 0, quant_min=-8, quant_max=7), -8)  # -8 is a code, so steps are a little finer
        least = error(symmetric_of_least_error(rows, 0, quant_min=-8, quant_max=7), -8)
        assert 0.88 * table < ours < table and least < 0.012


@pytest.mark.parametrize("seed", range(6))
def test_small_layers_end_where_no_single_code_could_be_better(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64) @ torch.randn(5, 5, generator=generator).double()
    every = torch.tensor(list(itertools.product(range(-4, 4), repeat=5)), dtype=torch.float64)
    losses = (x @ (weight - 0.5 * every).T).square().mean(0)  # of all 8⁵ roundings
    codes = gptq(weight, x.T @ x / 40, torch.tensor([0.5], dtype=torch.float64), -4, 3, sweeps=50)
    found = float((x @ (weight - 0.5 * codes).T).square().mean())
    nearest = float((x @ (weight - 0.5 * torch.round(weight / 0.5).clamp(-4, 3)).T).square().mean())
    assert float(losses.min()) - 1e-12 <= found <= nearest + 1e-12
    neighbours = (every != codes).sum(1) == 1
    assert int(neighbours.sum()) == 35 and float(losses[neighbours].min()) >= found - 1e-12


def test_dead_inputs_and_dead_rows_are_rounded_to_something_finite() -> None:
    weight, x = layer("white", 3, size=16, tokens=64)
    x[:, 4], weight[5] = 0.0, 0.0
    gram = x.T @ x / len(x)
    scales = scales_of_least_error(weight, -8, 7, gram=gram)
    codes = gptq(weight, gram, scales, -8, 7)
    assert bool(torch.isfinite(codes).all()) and bool((scales > 0).all()) and not codes[5].any()


def test_best_scales_lose_no_more_than_the_scale_that_holds_all() -> None:
    weight, x = layer("correlated", 5, size=64, tokens=512)
    gram = x.T @ x / len(x)
    whole = (torch.maximum(weight.amax(1) / 7, weight.amin(1) / -8)).float().double()
    scales = scales_of_least_error(weight, -8, 7, gram=gram)
    ours, theirs = (
        lost(weight, torch.round(weight / s[:, None]).clamp(-8, 7) * s[:, None], x) for s in (scales, whole)
    )
    assert ours < theirs
    floor = whole * 2
    assert bool((scales_of_least_error(weight, -8, 7, gram=gram, floor=floor) >= floor.float()).all())


def test_fitted_weights_answer_to_other_inputs() -> None:
    weight, x = layer("white", 1, size=8, tokens=400)
    seen = x @ torch.diag(torch.linspace(0.5, 2, 8, dtype=torch.float64))  # the inputs came out scaled
    found = fitted(weight, seen.T @ seen / 400, (x @ weight.T).T @ seen / 400, ridge=0.0)
    assert torch.allclose(seen @ found.T, x @ weight.T, atol=1e-6)


@pytest.mark.parametrize("name", list(deploy_nets.NETS))
def test_a_rounded_network_is_closer_and_its_file_holds_its_codes(name: str, tmp_path: object) -> None:
    net, inputs = deploy_nets.made(name)
    program, batches = capture(net, inputs(2), train=False), [inputs(16) for _ in range(4)]
    plain = quantize(program, calibrate=batches, scheme="w4a8")
    ours = quantize(program, calibrate=batches, scheme="w4a8", repair=["gptq"])
    layers = [n for n, p in ours.weights.items() if p.axis is not None]
    assert layers
    for n in layers:
        packed = ours.weights[n]
        assert packed.bits == 4 and int(packed.codes.min()) >= -8 and int(packed.codes.max()) <= 7
        assert len(packed.codes.unique()) > 4  # not collapsed
    assert any(not torch.equal(ours.weights[n].codes, plain.weights[n].codes) for n in layers)

    def away(quantized: object) -> float:
        got, wanted = [], []
        for batch in batches:
            with torch.no_grad():
                got += _flat(quantized.module(*batch["args"], **batch["kwargs"]))  # type: ignore[attr-defined]
                wanted += _flat(net(*batch["args"], **batch["kwargs"]))
        return float(torch.cat(got).sub(torch.cat(wanted)).square().sum())

    assert away(ours) < 0.9 * away(plain)
    file = predictor(export(ours, tmp_path / "net.onnx"))  # type: ignore[operator]
    batch = inputs(4)
    with torch.no_grad():
        simulated = torch.cat(_flat(ours.module(*batch["args"], **batch["kwargs"])))
    assert F.cosine_similarity(torch.cat(_flat(file(*batch["args"], **batch["kwargs"]))), simulated, 0) > 0.998


def _flat(out: object) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out.detach().float().flatten()]
    parts = out.values() if isinstance(out, dict) else out
    return [t for part in parts for t in _flat(part)]  # type: ignore[union-attr]


def test_grouped_and_one_dimensional_convolutions() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(8, 16, 3, groups=4), nn.ReLU(), nn.Conv1d(16, 4, 3, stride=2, padding=1, dilation=2))
    x = torch.randn(64, 8, 20)
    plain = quantize(capture(net, x[:2], train=False), calibrate=[x], scheme="w4a8")
    ours = quantize(capture(net, x[:2], train=False), calibrate=[x], scheme="w4a8", repair=["gptq"])
    with torch.no_grad():
        assert (ours.module(x) - net(x)).square().sum() < 0.8 * (plain.module(x) - net(x)).square().sum()


def test_repairs_are_named() -> None:
    net = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(UsageError, match="repair must be a list of"):
        quantize(capture(net, torch.zeros(2, 4), train=False), calibrate=[torch.zeros(2, 4)], repair="gptq")
    with pytest.raises(UsageError, match="'magic'"):
        quantize(capture(net, torch.zeros(2, 4), train=False), calibrate=[torch.zeros(2, 4)], repair=["magic"])
