"""Observers: one contract over the table, and an oracle of its own for each of them."""

from __future__ import annotations

import math
import pickle
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchao")

from paredown.cli.quantize import quantize as quantize_command
from paredown.errors import UsageError
from paredown.program import capture
from paredown.quantize import quantize
from paredown.quantize.histogram import BINS, StreamingHistogram, finite
from paredown.quantize.observe import OBSERVERS, MeanSquaredError, MinMax, kl_divergences, observer_named
from paredown.recipe_fields import Quantize

ALL = sorted(OBSERVERS)
COUNTING = ("entropy", "mse", "percentile")


def observer(kind: Any, low: int = 0, high: int = 255, **options: Any) -> Any:
    kind = OBSERVERS[kind] if isinstance(kind, str) else kind
    return kind(dtype=torch.uint8, quant_min=low, quant_max=high, qscheme=torch.per_tensor_affine, **options)


def after(kind: str, *batches: Tensor, **options: Any) -> Any:
    seen = observer(kind, **options)
    for batch in batches:
        assert seen(batch) is batch
    return seen


def parameters(seen: Any) -> tuple[float, int]:
    """Checked as every runtime needs them: float32, finite, positive, and a zero point that is a code."""
    scale, zero = seen.calculate_qparams()
    assert (scale.dtype, zero.dtype) == (torch.float32, torch.int64)
    assert scale.shape == zero.shape == ()
    assert math.isfinite(float(scale))
    assert float(scale) > 0
    assert seen.quant_min <= int(zero) <= seen.quant_max
    return float(scale), int(zero)


def rounded(values: np.ndarray, scale: float, zero: int, low: int = 0, high: int = 255) -> np.ndarray:
    return scale * (np.clip(np.rint(values / scale) + zero, low, high) - zero)


def squared_error(values: np.ndarray, scale: float, zero: int, high: int = 255) -> float:
    return float(((values - rounded(values, scale, zero, 0, high)) ** 2).sum())


def noise(seed: int, count: int = 20_000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- contract

CASES = {
    "constant": torch.full((4, 100), 3.0),
    "a negative constant": torch.full((400,), -0.25),
    "one-sided": noise(1).abs() + 1.0,
    "one-sided below": -noise(1).abs(),
    "after a relu": noise(2).relu().reshape(20, 10, 100),
    "two-sided": noise(3),
    "all zero": torch.zeros(3, 5),
    "nothing": torch.zeros(0, 5),
    "one value": torch.tensor(7.0),
    "denormal": noise(4) * 1e-40,
    "huge": noise(5) * 5e37,
    "huge range": torch.cat([noise(6) * 1e-30, torch.tensor([-3e38, 3e38])]),
    "half": noise(7).half(),
    "double": noise(8).double() * 1e3,
    "integers": torch.arange(-10, 1000),
    "not finite": torch.cat([noise(9), torch.tensor([float("nan"), float("inf"), -float("inf")])]),
    "nothing finite": torch.tensor([float("nan"), float("inf")]),
}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("low", "high"), [(0, 255), (-128, 127), (0, 15), (-8, 7), (0, 1)])
def test_any_values_give_a_usable_grid_with_an_exact_zero(kind: str, case: str, low: int, high: int) -> None:
    values = CASES[case]
    scale, zero = parameters(after(kind, values, low=low, high=high))
    assert rounded(np.zeros(1), scale, zero, low, high)[0] == 0.0
    x = values.double().numpy().ravel()
    x = x[np.isfinite(x) & (np.abs(x) < 3.3e38)]
    grid = scale * (np.array([low, high], dtype=np.float64) - zero)
    if x.size:  # the grid lies where values are: not beyond them by more than a step or two, never on an empty side
        width = max(x.max(), 0.0) - min(x.min(), 0.0)
        if width > 255e-30:
            assert grid[1] - grid[0] <= 1.01 * width
            assert grid[0] >= min(x.min(), 0.0) - scale
            assert grid[1] <= max(x.max(), 0.0) + scale
        assert np.isfinite(rounded(x, scale, zero, low, high)).all()


@pytest.mark.parametrize("kind", ALL)
def test_a_constant_is_met_to_a_step(kind: str) -> None:
    for value in (3.0, -0.25, 1e-6):
        scale, zero = parameters(after(kind, torch.full((64,), value), torch.full((64,), value)))
        assert abs(rounded(np.array([value]), scale, zero)[0] - value) <= scale / 2 * 1.001 + abs(value) / BINS


@pytest.mark.parametrize("kind", ALL)
def test_nothing_seen_and_only_zeros_are_the_same(kind: str) -> None:
    assert parameters(observer(kind)) == parameters(after(kind, torch.zeros(10), torch.zeros(0)))


@pytest.mark.parametrize("kind", ALL)
def test_what_is_not_finite_changes_nothing(kind: str) -> None:
    dirty = torch.cat([noise(9), torch.tensor([float("nan"), float("inf"), -float("inf")])])
    assert parameters(after(kind, dirty)) == parameters(after(kind, noise(9)))


@pytest.mark.parametrize("kind", ALL)
def test_reset_forgets(kind: str) -> None:
    seen = after(kind, noise(1) * 100)
    seen.reset()
    seen(noise(2))
    assert parameters(seen) == parameters(after(kind, noise(2)))


@pytest.mark.parametrize("kind", sorted(set(ALL) - {"moving-average"}))
def test_order_does_not_matter_beyond_a_bin(kind: str) -> None:
    batches = [noise(s, 2000) * (1 + s / 4) for s in range(12)]
    one, other = after(kind, *batches), after(kind, *batches[::-1])
    if kind == "minmax":
        assert parameters(one) == parameters(other)
        return
    if kind == "mse":  # the error is flat around its minimum: many ranges are as good
        everything = torch.cat(batches).double().numpy()
        errors = [squared_error(everything, *parameters(seen)) for seen in (one, other)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)
        return
    bin_width = max(one.histogram.width, other.histogram.width)
    error = 4 * bin_width if kind == "percentile" else 0.1 * one.range()[1]  # KL is flat around its minimum too
    assert np.abs(np.subtract(one.range(), other.range())).max() <= max(error, 4 * bin_width)


def test_the_moving_average_follows_the_order() -> None:
    batches = [noise(0), noise(1) * 10]
    assert after("moving-average", *batches).range() != after("moving-average", *batches[::-1]).range()


@pytest.mark.parametrize("kind", ALL)
def test_batches_of_growing_range_are_all_counted(kind: str) -> None:
    batches = [noise(s, 1000) * s**2 for s in range(1, 40)]
    seen = after(kind, *batches)
    low, high = seen.range()
    everything = torch.cat(batches)
    assert float(everything.min()) <= low < 0 < high <= float(everything.max())
    if kind in COUNTING:
        assert float(seen.histogram.counts.sum()) == int((everything != 0).sum())
        assert seen.histogram.left <= seen.histogram.low
        assert seen.histogram.right >= seen.histogram.high
    assert high > float(batches[0].max())  # an observer that keeps its first range would pass all above


def test_a_range_that_grows_by_many_orders_is_still_counted() -> None:
    seen = StreamingHistogram()
    for exponent in range(-40, 39, 3):
        seen.add(*finite(noise(exponent + 50, 100) * 10.0**exponent))
    assert float(seen.counts.sum()) == 27 * 100
    assert seen.left <= seen.low < seen.high <= seen.right


@pytest.mark.parametrize("kind", ALL)
def test_what_is_kept_does_not_grow(kind: str) -> None:
    def kept(batches: int) -> int:
        seen = observer(kind)
        for s in range(batches):
            seen(noise(s, 256) * (1 + s % 7))
        return len(pickle.dumps(seen.__dict__))

    few, many = kept(100), kept(1000)
    assert many <= few + 64  # counters are written with more digits
    assert many < 64 * BINS


def test_the_names_are_the_same_everywhere() -> None:
    assert set(get_args(get_type_hints(Quantize)["observer"])) == set(OBSERVERS)
    hint = get_type_hints(quantize_command, include_extras=True)["observer"]
    assert set(get_args(get_args(hint)[0])) == set(OBSERVERS)
    for name in OBSERVERS:
        assert observer_named(name) is OBSERVERS[name]


@pytest.mark.parametrize("name", ["kl", "", "mse=3", "percentile=", "percentile=0", "percentile=101", "percentile=x"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="must be"):
        observer_named(name)


# -------------------------------------------------------------------------------------------------------------- min-max


def test_min_max_is_the_range_seen_with_zero_in_it() -> None:
    seen = observer(MinMax)
    for low, high in ((0.5, 1.0), (0.2, 3.0)):
        seen(torch.tensor([low, high]))
    scale, zero = seen.calculate_qparams()
    assert float(scale) == pytest.approx(3.0 / 255)
    assert int(zero) == 0


# ------------------------------------------------------------------------------------------------------- moving average


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_moving_average_is_that_of_torch(shift: float) -> None:
    from torch.ao.quantization.observer import MovingAverageMinMaxObserver

    theirs = MovingAverageMinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine, averaging_constant=0.01)
    seen = observer("moving-average")
    for s in range(50):
        batch = noise(s, 500) * (1 + s / 10) + shift
        seen(batch)
        theirs(batch)
    assert seen.range() == pytest.approx((float(theirs.min_val), float(theirs.max_val)), rel=1e-4)
    scale, zero = theirs.calculate_qparams()
    assert parameters(seen)[0] == pytest.approx(float(scale), rel=1e-4)
    assert abs(parameters(seen)[1] - int(zero)) <= 1
    assert seen.range() != after("minmax", *[noise(s, 500) * (1 + s / 10) + shift for s in range(50)]).range()


# ----------------------------------------------------------------------------------------------------------- percentile


@pytest.mark.parametrize("percentile", [99.99, 99.0, 90.0])
@pytest.mark.parametrize("case", ["normal", "relu", "laplace", "shifted", "mostly zero"])
def test_percentile_is_that_of_numpy(percentile: float, case: str) -> None:
    x = noise(11, 100_000)
    values = {
        "normal": x,
        "relu": x.relu(),
        "laplace": x.sign() * x.abs().square(),
        "shifted": x + 2,
        "mostly zero": torch.where(x > 1, x, 0.0),
    }[case]
    seen = after("percentile", *values.split(7_000), percentile=percentile)
    cut = (100 - percentile) / 2
    low, high = np.percentile(values.double().numpy(), [cut, 100 - cut])
    assert seen.range()[0] == pytest.approx(min(low, 0.0), abs=1.5 * seen.histogram.width)
    assert seen.range()[1] == pytest.approx(max(high, 0.0), abs=1.5 * seen.histogram.width)
    assert seen.range()[1] < float(values.max())


def test_percentile_of_a_hundred_is_all_and_of_nearly_all_zeros_too() -> None:
    assert after("percentile", noise(1), percentile=100.0).range() == pytest.approx(after("minmax", noise(1)).range())
    rare = torch.zeros(1_000_000)
    rare[0] = 5.0
    assert after("percentile", rare).range() == (0.0, 5.0)


# ------------------------------------------------------------------------------------------------------------------ mse


def test_mse_beats_min_max_where_an_outlier_stretches_the_range() -> None:
    x = noise(0, 200_000)
    x[0] = 12.0
    found = {}
    for kind in (MinMax, MeanSquaredError):
        seen = observer(kind)
        for part in x.split(10_000):
            seen(part)
        scale, zero = seen.calculate_qparams()
        found[kind] = squared_error(x.double().numpy(), float(scale), int(zero))
    assert found[MeanSquaredError] < 0.9 * found[MinMax]


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


@pytest.mark.parametrize("case", ["normal", "laplace", "relu", "skewed"])
def test_mse_at_16_levels_is_the_minimum_of_all_ranges(case: str) -> None:
    x = noise(12, 20_000)
    values = {
        "normal": x,
        "laplace": x.sign() * x.abs() ** 1.5,
        "relu": x.relu(),
        "skewed": torch.where(x < 0, x / 5, x),
    }[case]
    scale, zero = parameters(after("mse", *values.split(3_000), high=15))
    a = values.double().numpy()
    lows = np.linspace(a.min(), 0.15 * a.min(), 40) if a.min() < 0 else [0.0]
    best = math.inf
    for low in lows:
        for high in np.linspace(a.max(), 0.15 * a.max(), 60):
            step = (high - low) / 15
            best = min(best, squared_error(a, step, int(np.rint(-low / step)), 15))
    error = squared_error(a, scale, zero, 15)
    assert error <= 1.03 * best
    assert error < 0.9 * squared_error(a, *parameters(after("minmax", values, high=15)), 15)


def test_state_does_not_grow_and_no_value_is_lost_when_the_range_widens() -> None:
    seen, total = observer(MeanSquaredError), 0
    for step in range(1, 40):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(step)) * step**2
        seen(x)
        total += int((x != 0).sum())
        assert seen.histogram.counts.numel() == BINS
    assert float(seen.histogram.counts.sum()) == total
    assert seen.histogram.left <= seen.histogram.low
    assert seen.histogram.right >= seen.histogram.high


# -------------------------------------------------------------------------------------------------------------- entropy


def kl_by_loops(counts: np.ndarray, levels: int) -> np.ndarray:
    """METHODS' algorithm as it is told: build P and Q for every i, then sum p log(p/q)."""
    found = []
    for kept in range(levels, len(counts) + 1):
        p = counts[:kept].astype(np.float64).copy()
        p[-1] += counts[kept:].sum()
        q = np.zeros(kept)
        member = [k * levels // kept for k in range(kept)]
        for level in range(levels):
            bins = [k for k in range(kept) if member[k] == level]
            full = [k for k in bins if counts[k] > 0]
            for k in full:
                q[k] = sum(counts[j] for j in bins) / len(full)
        if q.sum() == 0:
            found.append(math.inf)
            continue
        p, q = p / p.sum(), q / q.sum()
        with np.errstate(divide="ignore"):
            found.append(float(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True) if a > 0)))
    return np.array(found)


@pytest.mark.parametrize("case", ["dense", "sparse", "empty start", "one bin"])
@pytest.mark.parametrize("levels", [8, 32])
def test_kl_is_that_of_plain_loops(case: str, levels: int) -> None:
    rng = np.random.default_rng(5)
    size = 160
    counts = {
        "dense": rng.poisson(1000 * np.exp(-np.arange(size) / 30)),
        "sparse": rng.poisson(20, size) * (rng.random(size) < 0.2),
        "empty start": np.where(np.arange(size) < 40, 0, rng.poisson(30, size)),
        "one bin": np.eye(size, dtype=np.int64)[100] * 7,
    }[case]
    ours, theirs = kl_divergences(torch.from_numpy(counts), levels).numpy(), kl_by_loops(counts, levels)
    assert np.array_equal(np.isinf(ours), np.isinf(theirs))
    known = np.isfinite(theirs)
    assert known.any()
    assert np.allclose(ours[known], theirs[known], rtol=1e-9, atol=1e-9)
    assert int(ours.argmin()) == int(theirs.argmin())


def test_entropy_takes_the_threshold_of_least_divergence() -> None:
    x = noise(13, 200_000)
    x[:20] *= 8  # a long thin tail
    seen = after("entropy", x)
    width = float(x.abs().max()) / BINS
    counts, _ = np.histogram(x.abs().double().numpy(), bins=BINS, range=(0, float(x.abs().max())))
    divergence = {i: kl_by_loops_at(counts, 128, i) for i in range(200, 2049, 56)}
    best = min(divergence.values())
    kept = round(seen.range()[1] / width - 0.5)
    assert kl_by_loops_at(counts, 128, kept) <= best * 1.02
    assert seen.range()[1] < 0.7 * float(x.abs().max())
    assert seen.range()[0] == pytest.approx(-seen.range()[1])
    scale, zero = parameters(seen)
    plain = parameters(after("minmax", x))
    assert squared_error(x.double().numpy(), scale, zero) != squared_error(x.double().numpy(), *plain)


def kl_by_loops_at(counts: np.ndarray, levels: int, kept: int) -> float:
    p = counts[:kept].astype(np.float64).copy()
    p[-1] += counts[kept:].sum()
    member = np.arange(kept) * levels // kept
    sums = np.bincount(member, weights=counts[:kept], minlength=levels)
    sizes = np.bincount(member, weights=counts[:kept] > 0, minlength=levels)
    q = np.where(counts[:kept] > 0, (sums / np.maximum(sizes, 1))[member], 0.0)
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    with np.errstate(divide="ignore"):
        return float((p[some] * np.log(p[some] / q[some])).sum())


def test_entropy_leaves_the_empty_side_alone_and_ignores_zeros() -> None:
    x = noise(14, 50_000).relu()
    seen = after("entropy", x)
    assert seen.range()[0] == 0.0
    assert seen.range() == after("entropy", x[x > 0]).range()


# ----------------------------------------------------------------------------------------------------- in the pipeline


def test_quantize_takes_every_observer() -> None:
    from torch import nn

    from paredown.quantize import quantize

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
    program = capture(net, torch.zeros(2, 3, 8, 8), train=False)
    batches = [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    batches[-1] = batches[-1] * 6  # so that observers differ
    x = batches[0]
    outputs = {}
    for name in [*OBSERVERS, "percentile=90"]:
        outputs[name] = quantize(program, calibrate=batches, observer=name).module(x)
        error = (outputs[name] - net(x)).square().mean() / net(x).square().mean()
        assert 0 < error < 0.02, name
    for one, other in (
        ("minmax", "mse"),
        ("minmax", "entropy"),
        ("minmax", "moving-average"),
        ("percentile", "percentile=90"),
    ):
        assert not torch.equal(outputs[one], outputs[other]), (one, other)
    with pytest.raises(UsageError, match="observer must be one of minmax"):
        quantize(program, calibrate=batches, observer="max")


def test_a_part_of_a_large_call_is_counted_for_the_whole() -> None:
    torch.manual_seed(0)
    x = torch.relu(torch.randn(1 << 21))  # of which every 64th is counted
    x[5] = 40.0
    part, all_ = StreamingHistogram(), StreamingHistogram(whole=True)
    for seen in (part, all_):
        for call in (x, x / 2):
            seen.add(*finite(call))
    assert (part.low, part.high) == (all_.low, all_.high) == (0.0, 40.0)  # these are of all values
    for share in (0.6, 0.9, 0.99, 0.999):
        assert part.quantile(share) == pytest.approx(all_.quantile(share), rel=0.05)
    assert part.zeros + part.counts.sum() == pytest.approx(2 * x.numel(), rel=1e-3)
    assert part.zeros == pytest.approx(all_.zeros, rel=0.02)
    assert all_.zeros == 2 * int((x == 0).sum())
    assert after("mse", x).range()[1] == pytest.approx(
        0.2 * 40.0
    )  # the least that is searched: one value does not decide


@pytest.mark.parametrize("shape", [(32, 64, 768), (32, 1024, 14, 14), (4, 1 << 17), (1, 3, 257, 1021)])
@pytest.mark.parametrize("calls", [1, 3])
def test_the_part_that_is_counted_favours_no_place(shape: tuple[int, ...], calls: int) -> None:
    """A stride would divide the layout: of power-of-two shapes it counted one pixel, or one channel in 48."""
    where = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for axis in range(1, len(shape)):
        length = shape[axis]
        index = torch.div(where, torch.Size(shape[axis + 1 :]).numel(), rounding_mode="floor") % length
        counted = StreamingHistogram()
        for _ in range(calls):
            counted.add(*finite(1.0 + index.float()))
        middles, counts = counted.centres(), counted.counts / counted.counts.sum()
        assert int((counts > 0).sum()) > 0.9 * min(length, 512), axis
        parts = min(length, 16)  # of the axis, each of which holds its share of all values
        for part in range(parts):
            first, last = 1 + part * length // parts, 1 + (part + 1) * length // parts
            share = float(counts[(middles >= first - 0.5) & (middles < last - 0.5)].sum())
            assert share == pytest.approx((last - first) / length, rel=0.2), (axis, part)
        again = StreamingHistogram()
        for _ in range(calls):
            again.add(*finite(1.0 + index.float()))
        assert torch.equal(again.counts, counted.counts)


def test_a_channel_of_large_values_is_seen() -> None:
    """LayerNorm with one large weight: 6.8 dB before, when that channel was not among those counted."""
    from paredown.quantize import quantize

    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256)).eval()
    net[0].weight.data[7] = 30.0
    x, fresh = torch.randn(64, 64, 256), torch.randn(8, 64, 256)
    program = capture(net, x[:2], train=False)
    found = {name: quantize(program, calibrate=[x], observer=name).module for name in ("mse", "minmax")}
    with torch.no_grad():
        wanted = net(fresh)
        errors = {name: float((module(fresh) - wanted).square().mean()) for name, module in found.items()}
    assert errors["mse"] < errors["minmax"]


class Gated(nn.Module):
    """Squeeze and excite, as EfficientNet has it: gates that are nearly always closed, and now and then open; a softmax, too."""

    def __init__(self, gate: Any, moved: bool) -> None:
        super().__init__()
        self.gate, self.moved = gate, moved
        self.into, self.out = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.into.weight.mul_(3)
            self.into.bias.fill_(-5.0)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(self.into(x))
        gate = gate.flip(1) if self.moved else gate
        return self.out(gate)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("gate", [torch.sigmoid, lambda x: (3 * x.relu()).softmax(1)])
def test_entropy_leaves_gates_their_whole_range(gate: Any, moved: bool) -> None:
    torch.manual_seed(0)
    net, x = Gated(gate, moved).eval(), torch.randn(64, 4, 8, 8)
    with torch.no_grad():
        values = net.gate(net.into(x))
    assert (values > 0.5).float().mean() < 0.01 and float(values.max()) > 0.9
    found = quantize(capture(net, x[:2], train=False), calibrate=[x], observer="entropy")
    largest = {
        float(n.args[1]) * (n.args[4] - n.args[2])
        for n in found.module.graph.nodes
        if "quantize_per_tensor" in str(n.target)
    }
    assert any(abs(v - float(values.max())) < 1e-3 for v in largest)
