from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deploy_nets

pytest.importorskip("torchao")

from paredown.errors import UsageError
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
    program = capture(net, x[:2])
    even = signal(net, quantize(program, calibrate=[x], weights=weights, repair=["equalize"]), x)  # type: ignore[arg-type]
    with torch.no_grad():
        before = net(x)
    uneven(net)
    with torch.no_grad():
        assert torch.allclose(net(x), before, rtol=1e-4, atol=1e-4)  # the same function
    program = capture(net, x[:2])
    broken = signal(net, quantize(program, calibrate=[x], weights=weights), x)  # type: ignore[arg-type]
    mended = signal(net, quantize(program, calibrate=[x], weights=weights, repair=["equalize"]), x)  # type: ignore[arg-type]
    assert broken < even - 6
    assert mended > even - 1.5


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
    program = capture(net, x[:2])
    plain = signal(net, quantize(program, calibrate=[x]), x)
    smoothed = signal(net, quantize(program, calibrate=[x], repair=["smooth"]), x)
    if outliers:
        assert smoothed > plain + 6
    else:
        assert abs(10 ** ((plain - smoothed) / 10) - 1) < 0.15


@pytest.mark.parametrize("kind", ["bias", "bias-fast"])
def test_bias_correction_gives_back_the_mean(kind: str) -> None:
    net, inputs = deploy_nets.made("residual")
    x = torch.cat([inputs(16)["args"][0] for _ in range(8)])
    program = capture(net, x[:2])
    plain = quantize(program, calibrate=[x], scheme="w4a8")
    mended = quantize(program, calibrate=[x], scheme="w4a8", repair=[kind])
    with torch.no_grad():
        wanted = net(x).mean(0)
        before, after = ((q.module(x).mean(0) - wanted).abs().max() for q in (plain, mended))
    assert after < (0.2 if kind == "bias" else 0.9) * before
    for name, packed in plain.weights.items():
        assert torch.equal(packed.codes, mended.weights[name].codes)  # only biases changed


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
    program, batches = capture(net, inputs(2)), [inputs(16)]
    every = quantize(program, calibrate=batches)
    some = quantize(program, calibrate=batches, float_layers=["stem.*", "blocks.1.*"])
    assert set(some.weights) == {n for n in every.weights if not n.startswith(("stem", "blocks.1"))}
    with pytest.raises(UsageError, match=r"'stm.weight'.*matches none.*stem.weight"):
        quantize(program, calibrate=batches, float_layers=["stm.weight"])


CLASHING = [
    ("gptq", "adaround"), ("gptq", "blocks"), ("adaround", "blocks"), ("bias", "bias-fast"),
    *((rounding, means) for rounding in ("gptq", "adaround", "blocks") for means in ("bias", "bias-fast")),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), CLASHING)
def test_repairs_that_do_the_same_work_are_not_combined(one: str, other: str) -> None:
    """What rounds by samples gives back the means, too; a bias taken from what it left would undo it (47.3 to 25.9 dB)."""
    from pydantic import ValidationError

    from paredown.recipe_fields import Quantize

    program = capture(nn.Sequential(nn.Linear(4, 2)), torch.zeros(2, 4))
    for repair in ([one, other], [other, "equalize", one]):
        with pytest.raises(UsageError, match=f"must not hold both '{one}' and '{other}'"):
            quantize(program, calibrate=[torch.zeros(2, 4)], repair=repair)
        with pytest.raises(ValidationError, match=f"quantize.repair must not hold both '{one}' and '{other}'"):
            Quantize(repair=repair)  # type: ignore[arg-type]
    for alone in ([one, "equalize"], [other, "smooth"]):
        assert Quantize(repair=alone).repair == alone  # type: ignore[arg-type]


def test_weights_have_a_scale_per_channel_or_one() -> None:
    program = capture(nn.Sequential(nn.Linear(4, 2)), torch.zeros(2, 4))
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
    program = capture(net, x[:2])
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
        quantize(capture(net, x[:2]), calibrate=[x], repair=[repair])


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_a_pattern_alone_is_one_pattern(scheme: str) -> None:
    net, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(13))).eval(), torch.randn(8, 4)
    more: dict[str, Any] = {} if scheme == "int8-dynamic" else {"calibrate": [x]}
    for given in ("12", ["12"]):
        found = quantize(capture(net, x[:2]), scheme=scheme, float_layers=given, **more)
        assert set(found.weights) == {f"{n}.weight" for n in range(12)}
