"""Grids by granularity and bits, and the noise they make: against loops, numpy and theory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("torchao")

from paredown.errors import NothingToDo, RejectedError, UsageError
from paredown.program import capture
from paredown.quantize.noise import BITS, activation_noise, decibels, sqnr, weight_noise
from paredown.quantize.numerics import from_rows, grid_of, levels_of, on_grid, rows_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decibels_of(x: Any, y: Any) -> float:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return float(10 * np.log10((x**2).mean() / ((x - y) ** 2).mean()))


def rounded(x: np.ndarray, bits: int, mapping: str) -> np.ndarray:
    """One row on its grid, in float64 and in plain steps."""
    if mapping == "affine":
        low, high, top = min(x.min(), 0.0), max(x.max(), 0.0), 2**bits - 1
        if low == high:
            return np.zeros_like(x)
        scale = np.float64(np.float32((high - low) / top))
        zero = np.clip(-np.rint(low / scale), 0, top)
        return scale * (np.clip(np.rint(x / scale) + zero, 0, top) - zero)
    if bits == 1:
        return np.where(x < 0, -1.0, 1.0) * np.abs(x).mean()
    low, high = (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    scale = np.float64(np.float32(max(x.max() / high, x.min() / low)))
    return scale * np.clip(np.rint(x / scale), low, high)


# ---------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("mapping", ["symmetric", "affine"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("granularity", "axis"),
    [("tensor", None), ("channel", 0), ("channel", 1), ("group", 0), ("group", 1), ("token", -1), ("token", 1)],
)
def test_every_granularity_is_a_loop_over_rows(mapping: Any, bits: int, granularity: Any, axis: int | None) -> None:
    x = normal(6, 5, 7) * torch.exp(normal(6, 1, 1, seed=1))
    grid = grid_of(x, bits=bits, mapping=mapping, granularity=granularity, axis=axis, group=8)
    a = x.double().numpy()
    rows = {
        "tensor": lambda: [a.ravel()],
        "channel": lambda: list(np.moveaxis(a, axis, 0).reshape(a.shape[axis or 0], -1)),
        "group": lambda: [
            row[i : i + 8]
            for row in np.moveaxis(a, axis, 0).reshape(a.shape[axis or 0], -1)
            for i in range(0, row.size, 8)
        ],
        "token": lambda: list(np.moveaxis(a, axis, -1).reshape(-1, a.shape[axis or 0])),
    }[granularity]()
    assert grid.scales.shape == grid.zero_points.shape == (len(rows), 1)
    want = np.concatenate([rounded(row, bits, mapping) for row in rows])
    got = on_grid(x, grid)
    assert got.shape == x.shape
    plain = np.concatenate([r.numpy() for r in _rows_again(got, granularity, axis)])
    steps = np.concatenate([np.full(row.size, float(s)) for row, s in zip(rows, grid.scales, strict=True)])
    off = np.abs(plain - want) / steps
    assert (off < 1e-3).mean() > 0.995  # a value halfway between levels may go either way in float32
    assert off.max() < 1.001


def _rows_again(x: Tensor, granularity: str, axis: int | None) -> list[Tensor]:
    if granularity == "tensor":
        return [x.reshape(-1)]
    if granularity == "token":
        return list(x.movedim(axis or 0, -1).reshape(-1, x.shape[axis or 0]))
    return list(x.movedim(axis or 0, 0).reshape(x.shape[axis or 0], -1))


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    granularity=st.sampled_from(["tensor", "channel", "group", "token"]),
    axis=st.integers(-1, 3),
    group=st.integers(1, 7),
)
@settings(max_examples=80, deadline=None)
def test_rows_go_back_to_where_they_came_from(shape: Any, granularity: str, axis: int, group: int) -> None:
    x = torch.arange(math.prod(shape)).reshape(shape)
    axis = min(axis, x.dim() - 1)
    assert torch.equal(from_rows(rows_of(x, granularity, axis, group), x, granularity, axis), x)


@pytest.mark.parametrize("mapping", ["symmetric", "affine"])
@pytest.mark.parametrize("bits", BITS)
def test_levels_are_fixed_points_and_zero_is_one_of_them(mapping: Any, bits: int) -> None:
    x = normal(200)
    grid = grid_of(x, bits=bits, mapping=mapping)
    levels = torch.tensor(levels_of(grid))
    assert len(levels) == (2 if bits == 1 else 255 if (mapping, bits) == ("symmetric", 8) else 2**bits)
    assert torch.equal(on_grid(levels, grid), levels)
    if (mapping, bits) != ("symmetric", 1):
        assert float(on_grid(torch.zeros(1), grid)) == 0.0
    inside = (x >= levels.min()) & (x <= levels.max())
    if bits > 1:
        assert inside.float().mean() > 0.8
        assert float((on_grid(x, grid) - x)[inside].abs().max()) <= float(grid.scales) / 2 * 1.001


def test_one_bit_has_the_best_scale_of_two_levels() -> None:
    x = normal(3, 500)
    grid = grid_of(x, bits=1, granularity="channel")
    for row, scale in zip(x.numpy(), grid.scales, strict=True):
        errors = {s: ((row - np.sign(row) * s) ** 2).sum() for s in np.linspace(0.1, 3, 2901)}
        assert float(scale) == pytest.approx(min(errors, key=errors.__getitem__), abs=2e-3)
    tail = normal(1, 10)  # a last group of 2 is not thinned out by what fills it
    scales = grid_of(tail, bits=1, granularity="group", group=8).scales
    assert float(scales[1]) == pytest.approx(float(tail[0, 8:].abs().mean()))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group", "token"])
@pytest.mark.parametrize("mapping", ["symmetric", "affine"])
def test_zeros_and_extremes_give_finite_grids(granularity: Any, mapping: Any) -> None:
    for x in (torch.zeros(3, 5), torch.full((3, 5), 3e38), -torch.full((3, 5), 1e-42), torch.ones(1, 1)):
        for bits in BITS:
            grid = grid_of(x, bits=bits, mapping=mapping, granularity=granularity, group=2)
            assert torch.isfinite(grid.scales).all()
            assert (grid.scales > 0).all()
            assert torch.isfinite(on_grid(x, grid)).all()


@pytest.mark.parametrize(
    "wrong",
    [{"bits": 0}, {"bits": 9}, {"mapping": "log"}, {"granularity": "row"}, {"group": 0}, {"axis": 2}, {"axis": -3}],
)
def test_a_grid_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="a grid must have"):
        grid_of(torch.ones(2, 2), **wrong)
    with pytest.raises(UsageError, match="a grid must have"):
        grid_of(torch.ones(0, 2))


# ---------------------------------------------------------------------------------------------------------------- noise


def test_theory_of_uniform_noise() -> None:
    x = torch.rand(400_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = {b: sqnr(x, on_grid(x, grid_of(x, bits=b, mapping="affine"))) for b in BITS}
    for b in (8, 7, 6, 5, 4):
        assert found[b] == pytest.approx(20 * math.log10(2**b - 1), abs=0.15)  # signal 1/3, noise s²/12
    assert found[8] - found[7] == pytest.approx(6.02, abs=0.1)


def test_ends_of_the_scale() -> None:
    assert decibels(0.0, 1.0) is None
    assert decibels(1.0, 0.0) == math.inf
    assert sqnr(torch.zeros(3), torch.zeros(3)) is None
    assert sqnr(torch.ones(3) * 1e-30, torch.zeros(3)) == pytest.approx(0.0)  # squares below float32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.bare = nn.Conv2d(4, 4, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4, affine=False)
        self.fc, self.tied = nn.Linear(7, 7), nn.Linear(7, 7)
        self.tied.weight = self.fc.weight

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        y = self.norm2(self.bare(self.up(y)))
        return self.tied(self.fc(y)).sum((2, 3)) + self.embed(ids).sum(-1, keepdim=True)


def network() -> tuple[Net, Any]:
    torch.manual_seed(0)
    net = Net().eval()
    for norm in (net.norm, net.norm2):
        norm.running_mean = torch.randn(norm.num_features)
        norm.running_var = torch.rand(norm.num_features) * 3 + 0.1
    with torch.no_grad():
        net.norm.weight.copy_(torch.randn(8))
    return net, capture(net, (torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)), train=False)


def test_weights_with_batch_norm_folded() -> None:
    net, program = network()
    before = {k: v.clone() for k, v in program.state.items()}
    found = {one.name: one for one in weight_noise(program, group=16)}
    assert list(found) == ["conv.weight", "up.weight", "bare.weight", "fc.weight", "embed.weight"]
    assert [one.kind for one in found.values()] == ["conv2d", "conv_transpose2d", "conv2d", "linear", "parameter"]
    factor = (net.norm.weight / torch.sqrt(net.norm.running_var + net.norm.eps)).reshape(-1, 1, 1, 1)
    bare = 1 / torch.sqrt(net.norm2.running_var + net.norm2.eps)
    weights = {
        "conv.weight": (net.conv.weight * factor, 0),
        "up.weight": (net.up.weight, 1),
        "bare.weight": (net.bare.weight * bare.reshape(-1, 1, 1, 1), 0),
        "fc.weight": (net.fc.weight, 0),
        "embed.weight": (net.embed.weight, 0),
    }
    for name, (weight, axis) in weights.items():
        a = weight.detach().double().numpy()
        channels = np.moveaxis(a, axis, 0)
        for bits in BITS:
            tensor = rounded(a.ravel(), bits, "symmetric")
            each = np.stack([rounded(c.ravel(), bits, "symmetric").reshape(c.shape) for c in channels])
            assert found[name].sqnr_db["tensor"][bits] == pytest.approx(decibels_of(a.ravel(), tensor), abs=0.05), name
            assert found[name].sqnr_db["channel"][bits] == pytest.approx(decibels_of(channels, each), abs=0.05), name
        seen = found[name].histogram
        assert sum(seen.counts) + seen.zeros == a.size
        assert seen.low <= a.min()
        assert seen.high >= a.max() - 1e-6
        assert found[name].shape == a.shape
    assert all(torch.equal(before[k], v) for k, v in program.state.items())


def test_finer_scales_lose_less_where_channels_are_uneven() -> None:
    net = nn.Sequential(nn.Conv2d(4, 16, 3))
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-2, 1, 16).reshape(-1, 1, 1, 1))
        net[0].weight[:, :2].mul_(10)
    one = weight_noise(capture(net, torch.zeros(2, 4, 5, 5), train=False), group=9)[0]
    for bits in BITS[:-1]:
        assert one.sqnr_db["channel"][bits] > one.sqnr_db["tensor"][bits]
        assert one.sqnr_db["group"][bits] > one.sqnr_db["channel"][bits]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().flatten(2).transpose(1, 2))


def test_activations_are_those_that_hooks_see() -> None:
    torch.manual_seed(0)
    net = Two().eval()
    batches = [normal(8, 3, 6, 6, seed=s) * (1 + s) for s in range(3)]
    heard: dict[str, list[Tensor]] = {"conv": [], "fc": []}
    for name, values in heard.items():
        getattr(net, name).register_forward_hook(lambda m, args, out, to=values: to.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            net(batch)
    program = capture(_same(net), torch.zeros(2, 3, 6, 6), train=False)
    found = activation_noise(program, batches, observer="minmax")
    assert [one.name for one in found] == ["conv.weight", "fc.weight"]
    for one, name in zip(found, heard, strict=True):
        a = torch.cat([h.reshape(-1) for h in heard[name]]).double().numpy()
        for bits in BITS:
            assert one.sqnr_db["tensor"][bits] == pytest.approx(decibels_of(a, rounded(a, bits, "affine")), abs=0.02)
        assert sum(one.histogram.counts) + one.histogram.zeros == a.size
    tokens = torch.cat([h.reshape(-1, 5) for h in heard["fc"]]).double().numpy()
    each = np.stack([rounded(t, 4, "affine") for t in tokens])
    assert "token" not in found[0].sqnr_db
    assert found[1].sqnr_db["token"][4] == pytest.approx(decibels_of(tokens, each), abs=0.05)
    assert found[1].sqnr_db["token"][4] > found[1].sqnr_db["tensor"][4] + 3


def _same(net: Two) -> Two:
    other = Two().eval()
    other.load_state_dict(net.state_dict())
    return other


def test_observers_and_bad_samples() -> None:
    torch.manual_seed(0)
    program = capture(Two().eval(), torch.zeros(2, 3, 6, 6), train=False)
    x = normal(16, 3, 6, 6)
    x[0, 0, 0, 0] = 50.0
    found = {
        o: activation_noise(program, [x], observer=o, bits=(4,))[0].sqnr_db["tensor"][4] for o in ("minmax", "mse")
    }
    assert found["mse"] > found["minmax"]
    dirty = torch.cat([x, torch.full((2, 3, 6, 6), math.nan)])
    assert activation_noise(program, [dirty], bits=(4,), observer="mse")[0].sqnr_db["tensor"][4] == found["mse"]
    with pytest.raises(RejectedError, match="at least one sample"):
        activation_noise(program, [torch.full((2, 3, 6, 6), math.nan)])
    with pytest.raises(RejectedError, match="must fit"):
        activation_noise(program, [torch.zeros(2, 5, 6, 6)])
    with pytest.raises(UsageError, match="noise must be asked"):
        activation_noise(program, [x], bits=(9,))
    with pytest.raises(UsageError, match="observer must be"):
        activation_noise(program, [x], observer="max")


def test_a_model_without_weights_is_refused() -> None:
    program = capture(nn.ReLU(), torch.zeros(2, 3), train=False)
    with pytest.raises(NothingToDo, match="two axes"):
        weight_noise(program)
    with pytest.raises(NothingToDo, match="linear layer"):
        activation_noise(program, [torch.zeros(2, 3)])
