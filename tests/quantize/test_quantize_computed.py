"""Weights that are computed from parameters: held as what they come to, with codes, names and files like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchao")

from paredown.export import check, export
from paredown.plan import Mask, Plan
from paredown.program import capture
from paredown.prune import prune
from paredown.quantize import quantize, train_quantized
from paredown.quantize.computed import scales_into_layers
from paredown.quantize.noise import activation_noise, folded_weights, sqnr


class Standard(nn.Conv2d):
    """timm's StdConv2d: the weight has mean 0 and variance 1 per output channel, by a batch norm in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    """timm's ScaledStdConv2d: that, times a gain that is learned, over the square root of how many inputs there are."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(1 + 0.3 * torch.rand(self.out_channels, 1, 1, 1))
        self.scale = 1.7 * self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        rows, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * self.scale).view(-1)
        weight = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        weight = weight.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Net(nn.Module):
    """Standardised, scaled, depthwise; a batch norm behind one of them; a linear layer of weight norm (which capture resolves) and a product with 2 W."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = Standard(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.last = Scaled(8, 8, 3, padding=1, groups=8), Scaled(8, 16, 1)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(16, 12))
        self.end = nn.Parameter(0.2 * torch.randn(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.last(F.relu(self.deep(x))))
        return F.relu(self.head(x.mean((2, 3)))) @ (self.end * 2)


def made() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(64, 3, 8, 8)
    net(x)  # statistics of the batch norm
    return net.eval(), x


NAMES = {"stem.weight", "deep.weight", "last.weight", "head.weight", "end"}


@pytest.mark.parametrize("target", ["onnxruntime-x86", "openvino-x86", "executorch-xnnpack", "litert"])
def test_they_have_codes_by_the_name_of_their_parameter(target: str) -> None:
    net, x = made()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    found = quantize(capture(net, x[:2]), calibrate=[x], target=target)
    assert set(found.weights) == NAMES
    assert not [n for n in found.notes if "conv2d stays float" in n or "linear stays float" in n or "matmul" in n]
    rows = net.last.weight.detach().flatten(1)
    weight = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    weight = (weight * (net.last.gain.flatten(1) * net.last.scale)).reshape(16, 8, 1, 1).detach()
    packed = found.weights["last.weight"]
    steps = packed.scales.reshape(-1, 1, 1, 1)
    assert bool(((packed.unpack() - weight).abs() <= 0.5 * steps + 1e-5).all())  # the nearest codes
    assert found.weights["end"].codes.shape == net.end.shape
    left = {n for n, _ in found.module.named_parameters()} | {n for n, _ in found.module.named_buffers()}
    assert (
        not left & set(before) & {"stem.weight", "deep.weight", "end", "deep.gain"}
    )  # no float weight is carried along
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    with torch.no_grad():
        error = (found.module(x) - net(x)).square().mean() / net(x).square().mean()
    assert error < 1e-3


def test_the_file_runs_on_codes_alone(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net, x = made()
    found = quantize(capture(net, x[:2]), calibrate=[x])
    told = check(export(found, tmp_path / "net.onnx"), found, [x])
    layers = ("Conv", "Gemm", "MatMul", "BatchNorm", "ReduceMean", "InstanceNorm")
    assert told.holds and not [n for n in told.float_nodes if any(k in n for k in layers)]
    assert sum("QLinearConv" in n for n in told.int8_nodes) == 3 and sum("Gemm" in n for n in told.int8_nodes) == 2


def test_patterns_and_noise_know_them_by_that_name() -> None:
    net, x = made()
    program = capture(net, x[:2])
    some = quantize(program, calibrate=[x], float_layers=["last.*"], bits={"deep.weight": 4}, scheme="int8")
    assert set(some.weights) == NAMES - {"last.weight"} and some.weights["deep.weight"].bits == 4
    whole = quantize(program, calibrate=[x]).weights
    for name, kind, weight, _ in folded_weights(program):
        if name in whole and name != "end":
            assert kind in ("conv2d", "linear") and (sqnr(weight, whole[name].unpack()) or 0) > 35
    heard = activation_noise(program, [x], bits=(8,))
    assert {one.name for one in heard} >= NAMES - {"end"}


@pytest.mark.parametrize("repair", ["equalize", "gptq", "bias"])
def test_repairs_take_them_like_any_other(repair: str) -> None:
    net, x = made()
    program = capture(net, x[:2])
    plain, mended = (quantize(program, calibrate=[x], scheme="w4a8", repair=r) for r in ([], [repair]))
    with torch.no_grad():
        errors = [float((q.module(x) - net(x)).square().mean()) for q in (plain, mended)]
    assert errors[1] < 1.1 * errors[0] and set(mended.weights) == NAMES


def test_training_goes_on_from_what_they_come_to_and_masks_do_not_change_it() -> None:
    """A mask on a standardised weight says nothing about the zeros of what it comes to; on a scaled one it does."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Standard(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(self.a(x)).mean((2, 3)), self.b.weight * 0.5, self.b.bias)

    torch.manual_seed(1)
    net, x = Two().eval(), torch.randn(32, 3, 8, 8)
    rng = np.random.default_rng(0)
    masks = {
        n: Mask.of(rng.random(tuple(net.get_parameter(n).shape)) < 0.5, "element") for n in ("a.weight", "b.weight")
    }
    pruned = prune(capture(net, x[:2]), Plan(keep={}, masks=masks))
    wanted = pruned.module(x).detach()

    def step(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch), wanted)

    for epochs in (0, 1):
        found = train_quantized(pruned, lambda: [x], step=step, calibrate=[x], epochs=epochs, lr=0.01)
        assert bool((found.weights["a.weight"].codes != 0).float().mean() > 0.9)
        assert not found.weights["b.weight"].codes[torch.from_numpy(~masks["b.weight"].kept)].any()
        with torch.no_grad():
            assert float((found.module(x) - wanted).square().mean() / wanted.square().mean()) < 1e-3


class Twice(nn.Module):
    """One parameter under two weights, and one layer that adds noise to its weight."""

    def __init__(self, noisy: bool) -> None:
        super().__init__()
        self.noisy, self.w, self.c = noisy, nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.w.t() * 2))
        x = F.relu(F.linear(x, self.w.t()))
        weight = self.c.weight - 0 * torch.rand(3, 6) if self.noisy else self.c.weight * 3
        return F.linear(x, weight, self.c.bias)


@pytest.mark.parametrize("noisy", [False, True])
def test_names_stay_apart_and_chance_is_left_alone(noisy: bool) -> None:
    torch.manual_seed(2)
    net, x = Twice(noisy).eval(), torch.randn(32, 6)
    found = quantize(capture(net, x[:2]), calibrate=[x])
    names = list(found.weights)
    assert names[0] == "w" and names[1].startswith("w (")
    assert names[2:] == ([] if noisy else ["c.weight"])
    with torch.no_grad():
        assert float((found.module(x) - net(x)).square().mean() / net(x).square().mean()) < 1e-3


class LayerScale(nn.Module):
    """Factors per channel behind a convolution, and behind linear layers along the last axis, moved and not; as ConvNeXt and CaiT have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Linear(8, 8),
            nn.Linear(8, 8, bias=False),
            nn.Linear(8, 4),
        )
        self.a, self.b = nn.Parameter(torch.randn(1, 8, 1, 1)), nn.Parameter(torch.randn(8, 1, 1))
        self.c, self.everywhere = nn.Parameter(torch.randn(8)), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) * self.a
        x = x + self.b * self.one(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x.flatten(2).transpose(1, 2)
        return self.everywhere * self.head(x + self.two(x) * self.c)


def test_factors_per_channel_go_into_the_layers_before_them() -> None:
    torch.manual_seed(0)
    net, samples = LayerScale().eval(), [torch.randn(4, 3, 8, 8) for _ in range(4)]
    graph = capture(net, samples[0][:2]).eval_graph.module(check_guards=False)
    wanted = graph(samples[0])
    scales_into_layers(graph)
    products = [n for n in graph.graph.nodes if n.op == "call_function" and "mul" in str(n.target)]
    assert len(products) == 4 and all(p.args[0].op == p.args[1].op == "get_attr" for p in products), "of weights alone"
    torch.testing.assert_close(graph(samples[0]), wanted)
    quant = quantize(capture(net, samples[0][:2]), target="onnxruntime-x86", calibrate=samples)
    assert set(quant.weights) == {"conv.weight", "one.weight", "two.weight", "head.weight"}
    assert not any("mul stays float" in n for n in quant.notes)
    packed = quant.weights["one.weight"]
    held = packed.codes.float() * packed.scales.reshape(-1, 1)
    rows = net.one.weight.detach() * net.b.detach().reshape(-1, 1)
    assert (held - rows).abs().max() <= 0.51 * packed.scales.max()
    error = float((quant.module(samples[0]) - net(samples[0])).abs().max() / net(samples[0]).abs().max())
    assert error < 0.1


class Beside(nn.Module):
    """What may not go into the layer: its output is read elsewhere, its weight too, or the factor differs along another axis."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(6, 6)
        self.c = nn.Parameter(
            torch.randn(5, 1) if kind == "tokens" else torch.randn(2, 1, 6) if kind == "batch" else torch.randn(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.kind == "read":
            return y * self.c + y
        if self.kind == "twice":
            return y * self.c + self.layer(x.tanh())
        return y * self.c


@pytest.mark.parametrize("kind", ["read", "twice", "tokens", "batch"])
def test_factors_that_others_would_notice_stay(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    graph = capture(Beside(kind).eval(), x).eval_graph.module(check_guards=False)
    wanted = graph(x)
    scales_into_layers(graph)
    torch.testing.assert_close(graph(x), wanted)
    assert sum(n.op == "call_function" and "mul" in str(n.target) for n in graph.graph.nodes) == 1
