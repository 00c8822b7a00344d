from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deploy_nets

pytest.importorskip("torchao")

from paredown.errors import NothingToDo, UsageError
from paredown.program import capture
from paredown.quantize import quantize

# A repair against nothing at all must not harm, and against a net made for it must help.


class Separable(nn.Module):
    """Pointwise, depthwise, pointwise, with ReLU or ReLU6 between and a head."""

    def __init__(self, clamp: bool = False) -> None:
        super().__init__()
        self.clamp = clamp
        self.point, self.deep, self.last = (
            nn.Conv2d(3, 16, 1),
            nn.Conv2d(16, 16, 3, 1, 1, groups=16),
            nn.Conv2d(16, 8, 1),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        act = F.relu6 if self.clamp else F.relu
        x = act(self.deep(act(self.point(x))))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.last(x)), 1).flatten(1))


def uneven(net: Separable) -> Separable:
    """The same function with channels 10^-2 to 10^2 times as large inside."""
    scales = torch.logspace(-2, 2, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        net.point.weight.mul_(scales.reshape(-1, 1, 1, 1))
        net.point.bias.mul_(scales)  # type: ignore[union-attr]
        net.deep.bias.mul_(scales.flip(0))  # type: ignore[union-attr]
        net.deep.weight.mul_((scales.flip(0) / scales).reshape(-1, 1, 1, 1))
        net.last.weight.div_(scales.flip(0).reshape(1, -1, 1, 1))
    return net


def signal(net: nn.Module, quantized: Any, x: Tensor) -> float:
    """Signal over quantization noise at the output, in dB."""
    with torch.no_grad():
        wanted, got = net(x), quantized.module(x)
    wanted, got = wanted - wanted.mean(0), got - got.mean(0)
    return float(10 * torch.log10(wanted.square().mean() / (wanted - got).square().mean()))


@pytest.fixture
def separable() -> tuple[Separable, Tensor]:
    torch.manual_seed(3)
    return Separable(), torch.randn(64, 3, 8, 8)


@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_equalization_brings_back_what_uneven_channels_cost(separable: tuple[Separable, Tensor], weights: str) -> None:
    net, x = separable
    program = capture(net, x[:2], train=False)
    even = signal(net, quantize(program, calibrate=[x], weights=weights, repair=["equalize"]), x)  # type: ignore[arg-type]
    with torch.no_grad():
        before = net(x)
    uneven(net)
    with torch.no_grad():
        assert torch.allclose(net(x), before, rtol=1e-4, atol=1e-4)  # the same function
    program = capture(net, x[:2], train=False)
    broken = signal(net, quantize(program, calibrate=[x], weights=weights), x)  # type: ignore[arg-type]
    mended = signal(net, quantize(program, calibrate=[x], weights=weights, repair=["equalize"]), x)  # type: ignore[arg-type]
    assert broken < even - 6
    assert mended > even - 1.5


def test_equalization_brings_the_accuracy_of_a_trained_network_back() -> None:
    """One scale per weight on a depthwise network with uneven channels: points of accuracy go, and come back within one of float."""
    torch.manual_seed(0)
    net, generator = Separable(), torch.Generator().manual_seed(1)
    prototypes = torch.randn(5, 3, 8, 8)

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 5, (count,), generator=generator)
        return prototypes[y] + torch.randn(count, 3, 8, 8, generator=generator), y

    (x, y), (fresh, truth) = drawn(1024), drawn(2000)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(16):
        for a, b in zip(x.split(128), y.split(128), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(net(a), b).backward()
            optimizer.step()

    def points(predict: Any) -> float:
        with torch.no_grad():
            return 100 * float((predict(fresh).argmax(1) == truth).float().mean())

    trained = points(net)
    program = capture(uneven(net), x[:2], train=False)
    dense = points(net)
    assert dense == pytest.approx(trained, abs=0.1) and dense > 70  # five classes, the same function
    broken, mended = (
        points(quantize(program, calibrate=[x[:256]], weights="tensor", repair=r).module) for r in ([], ["equalize"])
    )
    assert broken < dense - 30
    assert mended > dense - 1


def test_equalization_keeps_the_function(separable: tuple[Separable, Tensor]) -> None:
    from paredown.quantize.equalize import equalize, pairs_of

    net, x = uneven(separable[0]), separable[1]
    prepared = _prepared(net, x)
    pairs = list(pairs_of(prepared))
    assert [(p.first.weight.split(".")[0], p.second.weight.split(".")[0]) for p in pairs] == [
        ("point", "deep"),
        ("deep", "last"),
    ]
    with torch.no_grad():
        before = prepared(x)
        scales = equalize(prepared, [((x,), {})])
        assert torch.allclose(prepared(x), before, rtol=1e-4, atol=1e-5)
    assert max(scales.values()) > 2
    ranges = [dict(prepared.named_parameters())[f"{n}.weight"].detach() for n in ("point", "deep", "last")]
    out, mid = ranges[0].abs().flatten(1).amax(1), ranges[1].abs().flatten(1).amax(1)
    assert torch.allclose(out, mid, rtol=0.02) and torch.allclose(
        mid, ranges[2].abs().flatten(2).amax((0, 2)), rtol=0.02
    )


def _prepared(net: nn.Module, x: Tensor) -> Any:
    from paredown.quantize.annotate import TableQuantizer
    from paredown.quantize.schemes import scheme_named
    from paredown.quantize.static import _prepared as make
    from paredown.target import named

    program = capture(net, x[:2], train=False)
    quantizer = TableQuantizer(named("onnxruntime-x86"), "mse", scheme_named("int8"))
    return make(program.eval_graph.module(check_guards=False), quantizer, program)[0]


@pytest.mark.parametrize("cuts", [False, True])
def test_a_relu6_is_opened_only_where_it_cuts_nothing(cuts: bool) -> None:
    from paredown.quantize.decompose import op_name
    from paredown.quantize.equalize import equalize

    torch.manual_seed(4)
    net, x = Separable(clamp=True), torch.randn(32, 3, 8, 8) * (20 if cuts else 1)
    prepared = _prepared(net, x)
    with torch.no_grad():
        before = prepared(x)
        assert (float(F.relu(net.point(x)).max()) > 6) is cuts
        equalize(prepared, [((x,), {})])
        assert torch.allclose(prepared(x), before, rtol=1e-4, atol=1e-5)
    left = [n for n in prepared.graph.nodes if op_name(n) in ("relu6", "hardtanh", "hardtanh_")]
    assert bool(left) is cuts


@pytest.mark.parametrize("outliers", [True, False])
def test_smoothing_moves_outliers_of_a_norm_into_the_weights(outliers: bool) -> None:
    """Without outliers there is nothing to move: the negative control of the layer oracles, within 15 % of the noise."""
    torch.manual_seed(5)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.gate = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(32, 48)
            self.down = nn.Linear(48, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.down(F.relu(self.up(x)) + self.gate(x))

    net, x = Net(), torch.randn(64, 10, 32)
    with torch.no_grad():  # the injection fixture: gains of four channels × 30, their columns ÷ 30
        for channel in (3, 9, 17, 30) if outliers else ():
            net.norm.weight[channel] *= 30
            net.up.weight[:, channel] /= 30
            net.gate.weight[:, channel] /= 30
    program = capture(net, x[:2], train=False)
    plain = signal(net, quantize(program, calibrate=[x]), x)
    smoothed = signal(net, quantize(program, calibrate=[x], repair=["smooth"]), x)
    if outliers:
        assert smoothed > plain + 6
    else:
        assert abs(10 ** ((plain - smoothed) / 10) - 1) < 0.15


def smoothed(kind: str, seed: int) -> tuple[float, float]:
    """Relative output error of W8A8, per channel and per token, of one layer behind a norm: as it is, and smoothed."""
    from test_quantize_rounding import layer

    from paredown.quantize.equalize import smooth
    from paredown.quantize.numerics import grid_of, on_grid

    weight, x = layer(kind, seed)
    net = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256))
    norm: Any = net[0]
    with torch.no_grad():
        net[1].weight.copy_(weight)  # type: ignore[union-attr,operator]
        if kind == "correlated":  # the norm's gains have the outliers, as in transformers
            largest = x.abs().amax(0)
            norm.weight[largest > 5 * largest.median()] *= 15
            x = x / norm.weight
    prepared = _prepared(net.eval(), x.float())
    held = dict(prepared.named_parameters())

    def both() -> tuple[Tensor, Tensor]:
        w, gain, shift = (held[n].detach() for n in ("1.weight", "0.weight", "0.bias"))
        return w, F.layer_norm(x.float(), (256,), gain, shift)

    found, before = [], both()
    for step in range(2):
        if step:
            smooth(prepared, [((x.float(),), {})])
            (w, y), (w0, y0) = both(), before
            scales = y0.abs().amax(0).sqrt() / w0.abs().amax(0).sqrt()  # the paper's, at α = ½
            assert torch.allclose(y0 / y, scales.expand_as(y), rtol=1e-3) and torch.allclose(
                w / w0, scales.expand_as(w)
            )
        w, y = both()
        coded, rows = on_grid(w, grid_of(w, granularity="channel")), on_grid(y, grid_of(y, granularity="token"))
        wanted = (y @ w.T).double()
        found.append(float((rows @ coded.T - wanted).square().sum() / wanted.square().sum()))
    return found[0], found[1]


def test_layer_oracle_of_smoothing() -> None:
    """256 × 256 weights, 4096 tokens: .00066 falls to .00010 with outliers; without, nothing may be won (METHODS 12.1)."""
    for seed in range(2):
        plain, smooth = smoothed("correlated", seed)
        assert 0.0003 < plain < 0.0015 and smooth < 0.3 * plain and smooth < 0.00015
        plain, smooth = smoothed("white", seed)
        assert abs(smooth / plain - 1) < 0.15 and 0.00008 < plain < 0.00012


class Attention(nn.Module):
    """nn.MultiheadAttention on batches first, which turns batch and positions before its linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class Windows(nn.Module):
    """A shifted window as Swin has it: padded, rolled, cut into windows and permuted before its linear layer."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value, self.norm, self.qkv, self.head = value, nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.norm(x.reshape(-1, 2, 5, 32)), (0, 0, 0, 1, 0, 2), value=self.value)
        y = torch.roll(y, shifts=(-1, -1), dims=(1, 2))
        y = y.view(-1, 2, 2, 3, 2, 32).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 32)
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        return self.head((q @ k.transpose(-2, -1) / 32).softmax(-1) @ v)


def injected(net: Any) -> nn.Module:
    """Gains of four channels × 30, the columns that read them ÷ 30: the same function."""
    weight = net.attention.in_proj_weight if hasattr(net, "attention") else net.qkv.weight
    with torch.no_grad():
        for channel in (3, 9, 17, 30):
            net.norm.weight[channel] *= 30
            weight[:, channel] /= 30
    return net.eval()


@pytest.mark.parametrize("kind", [Attention, Windows])
def test_smoothing_goes_through_what_leaves_channels_where_they_are(kind: Any) -> None:
    torch.manual_seed(6)
    net, x = injected(kind()), torch.randn(64, 10, 32)
    program = capture(net, x[:2], train=False)
    plain, smoothed = (quantize(program, calibrate=[x], repair=r) for r in ([], ["smooth"]))
    if kind is Windows:
        assert signal(net, smoothed, x) > signal(net, plain, x) + 6
    assert any(n.startswith("repair smooth: channels of 1 norms scaled, by up to") for n in smoothed.notes)
    assert not any(n.startswith("repair") for n in plain.notes)


class Moved(nn.Module):
    """A norm, one op, and a linear layer, on [N, 8, 8, 8]."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op, self.norm, self.up = op, nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.op(self.norm(x)))


STAYS: dict[str, Any] = {
    "transpose": lambda x: x.transpose(1, 2),
    "swapaxes": lambda x: x.swapaxes(-3, -2),
    "permute": lambda x: x.permute(0, 2, 1, 3),
    "pad": lambda x: F.pad(x, (0, 0, 1, 1)),
    "roll": lambda x: x.roll(2, 1),
    "flip": lambda x: x.flip(1, 2),
    "slice": lambda x: x[:, 1:, :5],
    "select": lambda x: x[:, 0],
    "unsqueeze": lambda x: x.unsqueeze(1),
    "view": lambda x: x.reshape(-1, 64, 8),
}
MOVES: dict[str, Any] = {
    "transpose": lambda x: x.transpose(-1, 2),
    "permute": lambda x: x.permute(0, 1, 3, 2),
    "pad": lambda x: F.pad(x[..., 1:], (1, 0)),
    "pad with a value": lambda x: F.pad(x, (0, 0, 1, 1), value=0.5),
    "roll": lambda x: x.roll(2, -1),
    "roll all": lambda x: x.roll(2),
    "flip": lambda x: x.flip(-1),
    "select": lambda x: x[..., 0],
}


@pytest.mark.parametrize(("name", "stays"), [*((n, True) for n in STAYS), *((n, False) for n in MOVES)])
def test_only_what_leaves_channels_where_they_are_is_gone_through(name: str, stays: bool) -> None:
    torch.manual_seed(7)
    net, x = Moved((STAYS if stays else MOVES)[name]).eval(), torch.randn(16, 8, 8, 8)
    with torch.no_grad():
        net.norm.weight[3] *= 30
    program = capture(net, x[:2], train=False)
    if stays:
        found = quantize(program, calibrate=[x], repair=["smooth"])  # which proves that the function stays
        assert any(n.startswith("repair smooth: channels of 1 norms") for n in found.notes)
    else:
        with pytest.raises(NothingToDo, match="the repair smooth must have a layer norm"):
            quantize(program, calibrate=[x], repair=["smooth"])


class Alone(nn.Module):
    """One layer without a bias: no pair, no norm, nothing to give back."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


class Tied(nn.Module):
    """One weight that two layers read: no repair may change it for one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.w)), self.w)


@pytest.mark.parametrize(
    ("net", "repair"),
    [
        *((Alone, r) for r in ("equalize", "smooth", "bias", "bias-fast")),
        *((Tied, r) for r in ("gptq", "adaround", "blocks", "bias")),
    ],
)
def test_a_repair_that_touches_nothing_is_refused(net: Any, repair: str) -> None:
    x = torch.randn(16, 4)
    with pytest.raises(NothingToDo, match=rf"the repair {repair} must have .*Got none.*Leave it out"):
        quantize(capture(net().eval(), x[:2], train=False), calibrate=[x], repair=[repair])


def test_a_search_for_layers_in_float_goes_on_where_nothing_is_left_to_repair() -> None:
    """With one of two layers in float there is no pair to equalize: that is no reason to take it for a network in float."""
    from paredown.quantize import spare

    torch.manual_seed(8)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(), torch.randn(64, 8)
    program, wanted = capture(net, x[:2], train=False), net(x).detach()

    def off(predict: Any) -> float:
        return float((predict(x) - wanted).square().mean())

    both = off(quantize(program, calibrate=[x], scheme="w4a8", repair=["equalize"]).module)
    found = spare(
        program, evaluate=off, meets=lambda v: v < 0.8 * both, calibrate=[x], scheme="w4a8", repair=["equalize"]
    )
    assert len(found.float_layers) == len(found.quantized.weights) == 1
    assert "repair equalize: nothing to do" in found.quantized.notes
    assert found.value == pytest.approx(off(found.quantized.module)) and found.value > 0


def test_every_repair_says_what_it_did(separable: tuple[Separable, Tensor]) -> None:
    net, x = separable
    found = quantize(capture(net, x[:2], train=False), calibrate=[x], scheme="w4a8", repair=["gptq", "equalize"])
    told = [n for n in found.notes if n.startswith("repair")]
    assert told[0].startswith("repair equalize: channels of 2 layers scaled, by up to ")
    assert told[1] == "repair gptq: codes of 4 layers chosen"
    found = quantize(capture(net, x[:2], train=False), calibrate=[x], repair=["bias"])
    assert "repair bias: 4 biases moved" in found.notes


@pytest.mark.parametrize("kind", ["bias", "bias-fast"])
def test_bias_correction_gives_back_the_mean(kind: str) -> None:
    net, inputs = deploy_nets.made("residual")
    x = torch.cat([inputs(16)["args"][0] for _ in range(8)])
    program = capture(net, x[:2], train=False)
    plain = quantize(program, calibrate=[x], scheme="w4a8")
    mended = quantize(program, calibrate=[x], scheme="w4a8", repair=[kind])
    with torch.no_grad():
        wanted = net(x).mean(0)
        before, after = ((q.module(x).mean(0) - wanted).abs().max() for q in (plain, mended))
    assert after < (0.2 if kind == "bias" else 0.9) * before
    for name, packed in plain.weights.items():
        assert torch.equal(packed.codes, mended.weights[name].codes)  # only biases changed


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_means_are_given_back_after_codes_were_chosen(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel by channel, layer by layer, by running the float and the quantized network: the mean error of every layer is 0 after
    it; the codes are those of the rounding. Without it, of a rounding that read a few positions, the mean is off."""
    from paredown.quantize import rounding as module

    monkeypatch.setattr(module, "_ROWS", 64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    x = torch.randn(64, 3, 10, 10)
    program = capture(net, x[:2], train=False)
    plain = quantize(program, calibrate=[x], scheme="w4a8", repair=[rounding])
    mended = quantize(program, calibrate=[x], scheme="w4a8", repair=["bias", rounding])
    assert {n: p.codes.tolist() for n, p in plain.weights.items()} == {
        n: p.codes.tolist() for n, p in mended.weights.items()
    }
    with torch.no_grad():
        wanted = net(x)
        off, left = ((q.module(x) - wanted).mean((0, 2, 3)).abs().max() / wanted.std() for q in (plain, mended))
        whole, after = ((q.module(x) - wanted).square().mean() for q in (plain, mended))
    assert left < min(0.004, 0.6 * off)  # the last result has codes of its own, a 255th of its range apart
    assert after < whole
    assert any(n.startswith("repair bias: 3 biases moved") for n in mended.notes)


def test_adaround_beats_the_nearest_on_the_layer_it_sees() -> None:
    from test_quantize_rounding import layer, lost

    from paredown.quantize.numerics import symmetric_of_least_error
    from paredown.quantize.rounding import adaround

    weight, x = layer("correlated", 0, size=64, tokens=1024)
    scales = symmetric_of_least_error(weight, 0, quant_min=-4, quant_max=3).double()
    codes = adaround(weight, x.T @ x / len(x), scales, -4, 3, iterations=300)
    nearest = torch.round(weight / scales[:, None]).clamp(-4, 3)
    assert bool(
        ((codes - weight / scales[:, None]).abs() < 1 + 1e-6)[(nearest > -4) & (nearest < 3)].all()
    )  # up or down
    assert lost(weight, codes * scales[:, None], x) < 0.75 * lost(weight, nearest * scales[:, None], x)


def test_layers_by_pattern_stay_in_float() -> None:
    net, inputs = deploy_nets.made("residual")
    program, batches = capture(net, inputs(2), train=False), [inputs(16)]
    every = quantize(program, calibrate=batches)
    some = quantize(program, calibrate=batches, float_layers=["stem.*", "blocks.1.*"])
    assert set(some.weights) == {n for n in every.weights if not n.startswith(("stem", "blocks.1"))}
    with pytest.raises(UsageError, match=r"'stm.weight'.*matches none.*stem.weight"):
        quantize(program, calibrate=batches, float_layers=["stm.weight"])


CLASHING = [
    ("gptq", "adaround"), ("gptq", "blocks"), ("adaround", "blocks"), ("bias", "bias-fast"),
    *((rounding, "bias-fast") for rounding in ("gptq", "adaround", "blocks")), ("blocks", "bias"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), CLASHING)
def test_repairs_that_do_the_same_work_are_not_combined(one: str, other: str) -> None:
    """What rounds by samples gives back the means, too; bias-fast would add what the weights' rounding takes once more."""
    from pydantic import ValidationError

    from paredown.recipe_fields import Quantize

    program = capture(nn.Sequential(nn.Linear(4, 2)), torch.zeros(2, 4), train=False)
    for repair in ([one, other], [other, "equalize", one]):
        with pytest.raises(UsageError, match=f"must not hold both '{one}' and '{other}'"):
            quantize(program, calibrate=[torch.zeros(2, 4)], repair=repair)
        with pytest.raises(ValidationError, match=f"quantize.repair must not hold both '{one}' and '{other}'"):
            Quantize(repair=repair)  # type: ignore[arg-type]
    for alone in ([one, "equalize"], [other, "smooth"]):
        assert Quantize(repair=alone).repair == alone  # type: ignore[arg-type]


def test_weights_have_a_scale_per_channel_or_one() -> None:
    program = capture(nn.Sequential(nn.Linear(4, 2)), torch.zeros(2, 4), train=False)
    with pytest.raises(UsageError, match="weights must be"):
        quantize(program, calibrate=[torch.zeros(2, 4)], weights="group")  # type: ignore[arg-type]


class OddBias(nn.Module):
    """Three convolutions; the bias of the first is another's too, or computed from a parameter."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        with torch.no_grad():
            self.a.weight[0] *= 30
            self.a.bias.uniform_(-1, 1)  # type: ignore[union-attr]
        if kind == "shared":
            self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        bias = self.a.bias * 2 + 1 if self.kind == "computed" else self.a.bias
        return self.c(F.relu(self.b(F.relu(F.conv2d(x, self.a.weight, bias, padding=1)))))


@pytest.mark.parametrize("kind", ["shared", "computed"])
def test_equalization_leaves_a_layer_alone_whose_bias_it_cannot_scale(kind: str) -> None:
    from paredown.quantize.equalize import equalize, pairs_of

    net, x = OddBias(kind).eval(), torch.randn(16, 3, 8, 8)
    prepared = _prepared(net, x)
    firsts = [p.first.weight for p in pairs_of(prepared)]
    assert firsts == ([] if kind == "shared" else ["b.weight"])
    with torch.no_grad():
        before = prepared(x)
        equalize(prepared, [((x,), {})])
        assert torch.allclose(prepared(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["shared", "computed"])
@pytest.mark.parametrize("repair", ["equalize", "gptq", "adaround", "blocks", "bias", "bias-fast"])
def test_no_repair_harms_a_network_with_an_odd_bias(kind: str, repair: str) -> None:
    net, x = OddBias(kind).eval(), torch.randn(16, 3, 8, 8)
    program = capture(net, x[:2], train=False)
    if (kind, repair) == ("shared", "equalize"):
        with pytest.raises(NothingToDo, match="must have two layers"):
            quantize(program, calibrate=[x], repair=[repair])
        return
    plain, mended = (quantize(program, calibrate=[x], scheme="w4a8", repair=r) for r in ([], [repair]))
    assert signal(net, mended, x) > signal(net, plain, x) - 0.5


@pytest.mark.parametrize("repair", ["equalize", "smooth"])
def test_a_repair_that_changes_the_function_is_refused(repair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from paredown.errors import VerificationError

    def wrong(prepared: Any, calls: Any) -> dict[str, float]:
        next(iter(prepared.parameters())).data *= 1.1
        return {}

    monkeypatch.setattr(importlib.import_module("paredown.quantize.equalize"), repair, wrong)
    net, x = Separable(), torch.randn(16, 3, 8, 8)
    with pytest.raises(VerificationError, match=f"{repair} must leave the function as it is"):
        quantize(capture(net, x[:2], train=False), calibrate=[x], repair=[repair])


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_a_pattern_alone_is_one_pattern(scheme: str) -> None:
    net, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(13))).eval(), torch.randn(8, 4)
    more: dict[str, Any] = {} if scheme == "int8-dynamic" else {"calibrate": [x]}
    for given in ("12", ["12"]):
        found = quantize(capture(net, x[:2], train=False), scheme=scheme, float_layers=given, **more)
        assert set(found.weights) == {f"{n}.weight" for n in range(12)}
