from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchao")

from paredown.errors import NothingToDo
from paredown.program import capture
from paredown.quantize import quantize
from paredown.quantize.culprits import Mixed, _smallest_prefix, spare
from paredown.quantize.lanes import Changes
from paredown.quantize.static import calibrated


class Chain(nn.Module):
    """Six convolutions; between two of them channels are of very different size, which no range per tensor fits."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        torch.manual_seed(bad)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            scales = torch.logspace(0, 3, 8)
            self.layers[bad - 1].weight.mul_(scales.reshape(-1, 1, 1, 1))
            self.layers[bad - 1].bias.mul_(scales)  # type: ignore[union-attr,operator]
            self.layers[bad].weight.div_(scales.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.head(x.mean((2, 3)))


def noise(net: nn.Module, x: Tensor) -> Any:
    """Relative error of the output: the metric of these tests, lower is better."""
    with torch.no_grad():
        wanted = net(x)

    def evaluate(predict: Any) -> float:
        return float((predict(x) - wanted).square().sum() / wanted.square().sum())

    return evaluate


@pytest.mark.parametrize("bad", [3, 4])
def test_the_layer_that_does_the_harm_is_found_and_it_alone_is_spared(bad: int) -> None:
    net, x = Chain(bad), torch.randn(32, 8, 8, 8)
    program, evaluate = capture(net, x[:2]), noise(net, x)
    plain = evaluate(quantize(program, calibrate=[x]).module)
    found = spare(program, evaluate=evaluate, meets=lambda v: v <= plain / 4, calibrate=[x])
    around = (f"layers.{bad - 1}.weight", f"layers.{bad}.weight")  # the value between them does the harm
    assert found.ranking[0].layers == around and found.ranking[0].share > 0.5
    assert set(found.float_layers) == set(around)
    assert found.value <= plain / 4 < found.before
    assert evaluate(found.quantized.module) <= plain / 3  # the real thing, not the rehearsal
    assert set(found.quantized.weights) == {f"layers.{i}.weight" for i in range(6)} - set(around) | {"head.weight"}
    assert found.extra_bytes == 2 * 3 * 8 * 8 * 9


def test_nothing_is_spared_where_the_bound_is_met_and_refused_where_nothing_helps() -> None:
    net, x = Chain(2), torch.randn(32, 8, 8, 8)
    program, evaluate = capture(net, x[:2]), noise(net, x)
    met = spare(program, evaluate=evaluate, meets=lambda v: v < 100, calibrate=[x])
    assert met.float_layers == () and met.tried == 1 and met.extra_bytes == 0
    with pytest.raises(NothingToDo, match=r"with 2 of 7 layers in float"):
        spare(program, evaluate=evaluate, meets=lambda v: v < 1e-12, calibrate=[x], most=2)


def test_the_rehearsal_equals_the_converted_network() -> None:
    net, x = Chain(3), torch.randn(16, 8, 8, 8)
    base = calibrated(capture(net, x[:2]), target="onnxruntime-x86", calibrate=[x])
    with torch.no_grad():
        real = quantize(capture(net, x[:2]), calibrate=[x]).module(x)
        assert float((Mixed(base, frozenset(), Changes())(x) - real).abs().max()) <= 0.02 * float(real.abs().max())
        every = frozenset(f"layers.{i}.weight" for i in range(6)) | {"head.weight"}
        whole = Mixed(base, every, Changes())(x)
    assert float((whole - net(x)).norm()) < 0.5 * float((real - net(x)).norm())  # its input is in codes still


@pytest.mark.parametrize("first", range(1, 9))
def test_the_smallest_prefix_is_found_with_few_trials(first: int) -> None:
    tried: list[int] = []

    def holds(part: Any) -> bool:
        tried.append(len(part))
        return len(part) >= first

    assert _smallest_prefix(list("abcdefgh"), holds) == first
    assert len(tried) <= 6
    assert _smallest_prefix(list("abc"), lambda _: False) is None
