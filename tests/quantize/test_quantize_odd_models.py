"""Networks that quantization meets now and then: masks in attention and in weights, computed biases, splits, grouped transposed layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torchao")

from paredown.plan import Mask, Plan
from paredown.program import capture
from paredown.prune import prune
from paredown.quantize import quantize, train_quantized
from paredown.quantize.blocks import blocks_of
from paredown.quantize.static import calibrated


def noise(reference: nn.Module, module: nn.Module, x: Tensor) -> float:
    """Power of the error over that of the output, means included."""
    with torch.no_grad():
        wanted = reference(x)
        return float((module(x) - wanted).square().sum() / wanted.square().sum())


class Causal(nn.Module):
    """Attention by hand; the mask is a saved table, as tutorials have it."""

    def __init__(self, hidden: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("mask", torch.triu(torch.full((10, 10), hidden), 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).reshape(b, n, 2, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / 8**0.5
        scores = scores + self.mask[:n, :n]
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, 16))


@pytest.mark.parametrize("target", ["onnxruntime-x86", "openvino-x86", "executorch-xnnpack"])
@pytest.mark.parametrize("hidden", [float("-inf"), -1e9])
def test_a_mask_still_hides_what_comes_later(hidden: float, target: str) -> None:
    torch.manual_seed(0)
    net, x = Causal(hidden).eval(), 3 * torch.randn(32, 10, 16)
    found = quantize(capture(net, x[:2]), calibrate=[x], target=target)
    later = x.clone()
    later[:, 5:] = 3 * torch.randn(32, 5, 16)
    with torch.no_grad():
        assert torch.equal(found.module(x)[:, :5], found.module(later)[:, :5])
        assert not torch.equal(found.module(x)[:, 5:], found.module(later)[:, 5:])
    assert noise(net, found.module, x) < 2e-3


@pytest.mark.parametrize("repair", ["gptq", "adaround", "blocks"])
@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
def test_repairs_leave_pruned_weights_at_zero_and_help(repair: str, scheme: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 8)
    ).eval()
    x = torch.randn(64, 3, 8, 8).relu()
    rng, masks = np.random.default_rng(0), {}
    for name in ("0.weight", "2.weight", "5.weight"):
        shape = tuple(net.get_parameter(name).shape)
        masks[name] = Mask.of(rng.random(shape) > 0.5, "element")
    pruned = prune(capture(net, x[:2]), Plan(keep={}, masks=masks))
    plain = quantize(pruned, calibrate=[x], scheme=scheme)
    found = quantize(pruned, calibrate=[x], scheme=scheme, repair=[repair])
    for name, mask in masks.items():
        codes = found.weights[name].codes
        assert not bool(codes[~torch.from_numpy(mask.kept)].any()), name
        assert bool(codes[torch.from_numpy(mask.kept)].any())
    if scheme == "w4a8":
        assert noise(pruned.module, found.module, x) < 0.8 * noise(pruned.module, plain.module, x)


class Joined(nn.Module):
    """The bias of three projections is put together at every call; what is read has a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)
        self.q, self.v = (nn.Parameter(2 + torch.randn(16)) for _ in range(2))
        self.register_buffer("k", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.relu() + 1, self.qkv.weight, torch.cat([self.q, self.k, self.v]))


@pytest.mark.parametrize("repair", ["gptq", "adaround", "blocks"])
def test_a_bias_that_is_put_together_is_added_once(repair: str) -> None:
    torch.manual_seed(0)
    net, x = Joined().eval(), torch.randn(256, 16)
    found = quantize(capture(net, x[:2]), calibrate=[x], repair=[repair])
    assert noise(net, found.module, x) < 1e-3


class Split(nn.Module):
    """A C2f block: one half goes on, the other through two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.c1(x).relu().chunk(2, 1)
        return self.head(torch.cat([p, self.c3(self.c2(q).relu()).relu()], 1))


class Viewed(nn.Module):
    """The length of the batch is read at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu()).relu()
        return self.c(y.view(x.size(0), -1))


@pytest.mark.parametrize(("kind", "num_blocks"), [(Split, 3), (Viewed, 3)])
def test_blocks_end_where_one_tensor_is_alive(kind: Any, num_blocks: int) -> None:
    torch.manual_seed(0)
    net, x = kind().eval(), torch.randn(48, 3, 8, 8)
    program = capture(net, x[:2])
    base = calibrated(program, target="onnxruntime-x86", calibrate=[x], scheme="w4a8")
    assert len(blocks_of(base.prepared)) == num_blocks
    plain = quantize(program, calibrate=[x], scheme="w4a8")
    found = quantize(program, calibrate=[x], scheme="w4a8", repair=["blocks"])
    assert noise(net, found.module, x) < noise(net, plain.module, x)


def test_a_scale_that_a_kernel_fixes_is_not_trained(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from paredown.export import check, export

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 4, 3)), torch.randn(16, 3, 8, 8)
    wanted = net(x).detach() * 1.2
    found = train_quantized(
        capture(net.eval(), x[:2]),
        lambda: [x],
        step=lambda m, b: (m(b) - wanted).square().mean(),
        calibrate=[x],
        epochs=4,
        lr=0.05,
    )
    verdict = check(export(found, tmp_path / "a.onnx"), found, [x])
    assert verdict.holds and not [n for n in verdict.float_nodes if "HardSigmoid" in n]


@pytest.mark.parametrize("scheme", ["int8", "w2"])
@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2), nn.ConvTranspose2d(6, 6, 4, 2, 1, groups=6, bias=False)]
)
def test_a_batch_norm_behind_a_grouped_transposed_convolution(layer: nn.ConvTranspose2d, scheme: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(layer.out_channels)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.running_mean)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), layer, norm, nn.ReLU(), nn.Conv2d(layer.out_channels, 4, 1)
    ).eval()
    x = torch.randn(16, 3, 8, 8)
    found = quantize(capture(net, x[:2]), calibrate=[x], scheme=scheme)
    assert noise(net, found.module, x) < (1e-3 if scheme == "int8" else 0.7)


class Windows(nn.Module):
    """Sizes that are asked of the input, two inputs, and windows of a picture as samples of their own: no block may begin or end among these."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.table = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(5, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        y = torch.relu(self.image(x)) * self.table(table)[:, :, None, None]
        batch = y.shape[0]
        tokens = y.reshape(batch, 8, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 8)
        tokens = torch.relu(self.down(torch.relu(self.up(tokens))))
        return self.head(tokens.view(batch, 16, 8).mean(1))


def test_blocks_of_a_network_that_asks_for_its_batch_and_has_two_inputs() -> None:
    torch.manual_seed(4)
    net, inputs = Windows().eval(), (torch.randn(96, 3, 4, 4), torch.randn(96, 5))
    program = capture(net, tuple(v[:2] for v in inputs), train=False)
    assert program.batch == "dynamic"
    one = quantize(
        program, calibrate=[tuple(v[i : i + 32] for v in inputs) for i in (0, 32, 64)], scheme="w4a8", repair=["blocks"]
    )
    plain = quantize(program, calibrate=[inputs], scheme="w4a8")
    with torch.no_grad():
        wanted = net(*inputs)
        errors = [float((q.module(*inputs) - wanted).square().mean()) for q in (one, plain)]
    assert errors[0] < errors[1]


class Scaled(nn.Module):
    """A learned number for every branch, picked out of one tensor: it has no axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Parameter(torch.tensor([1.5, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x)) * self.scale[0] + torch.relu(self.b(x)) * self.scale[1]


def test_a_number_without_an_axis_is_rounded_in_training() -> None:
    torch.manual_seed(4)
    x = torch.randn(8, 3, 4, 4)
    one = train_quantized(
        capture(Scaled().eval(), x, train=False),
        lambda: [x],
        step=lambda model, batch: model(batch).square().mean(),
        calibrate=[x],
        epochs=1,
    )
    assert {"a.weight", "b.weight"} <= one.weights.keys()


class Stream(nn.Module):
    """A residual stream that is normalised and added to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.norm = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 2), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head((x + x.mean((1, 2), keepdim=True)).mean((1, 2)))


@pytest.mark.parametrize("target", ["onnxruntime-x86", "openvino-x86", "litert"])
def test_sums_between_ops_in_float_stay_float(target: str) -> None:
    torch.manual_seed(2)
    net, x = Stream().eval(), torch.randn(16, 3, 8, 8)
    program = capture(net, x[:2], train=False)
    one = quantize(program, calibrate=[x], target=target, float_layers=["stem", "down", "head"])
    assert sorted(one.weights) == ["up.weight"]
    sums = [n for n in one.module.graph.nodes if "add" in str(n.target)]
    assert len(sums) >= 2
    assert not [a for n in sums for a in n.all_input_nodes if "dequantize" in str(a.target)]
    if target != "openvino-x86":  # which takes sums into the layers in front of them
        whole = quantize(program, calibrate=[x], target=target)
        inputs = [a for n in whole.module.graph.nodes if "add" in str(n.target) for a in n.all_input_nodes]
        assert [a for a in inputs if "dequantize" in str(a.target)]


@pytest.mark.parametrize("target", ["onnxruntime-x86", "openvino-x86", "executorch-xnnpack", "litert"])
def test_an_adaptive_maximum_is_taken_of_codes(target: str) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveMaxPool2d((2, 1)), nn.Flatten(), nn.Linear(12, 3)).eval()
    x = torch.randn(16, 3, 8, 8)
    graph = quantize(capture(net, x[:2], train=False), calibrate=[x], target=target).module.graph
    (pool,) = [n for n in graph.nodes if "max_pool2d" in str(n.target)]
    assert "adaptive" not in str(pool.target)
    before, (after,) = pool.args[0], pool.users
    assert [str(n.target).partition(".")[2] for n in (before, after)] == [
        "dequantize_per_tensor.default",
        "quantize_per_tensor.default",
    ]
    assert before.args[1:3] == after.args[1:3]
