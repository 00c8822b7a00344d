from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchao")

from paredown.errors import NothingToDo, RejectedError, UsageError
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
        with torch.no_grad():
            return float((predict(x) - wanted).square().sum() / wanted.square().sum())

    return evaluate


@pytest.mark.parametrize("bad", [3, 4])
def test_the_layer_that_does_the_harm_is_found_and_it_alone_is_spared(bad: int) -> None:
    net, x = Chain(bad), torch.randn(32, 8, 8, 8)
    program, evaluate = capture(net, x[:2], train=False), noise(net, x)
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
    program, evaluate = capture(net, x[:2], train=False), noise(net, x)
    met = spare(program, evaluate=evaluate, meets=lambda v: v < 100, calibrate=[x])
    assert met.float_layers == () and met.tried == 1 and met.extra_bytes == 0
    with pytest.raises(NothingToDo, match=r"with 2 of 7 layers in float"):
        spare(program, evaluate=evaluate, meets=lambda v: v < 1e-12, calibrate=[x], most=2)


def test_the_rehearsal_equals_the_converted_network() -> None:
    net, x = Chain(3), torch.randn(16, 8, 8, 8)
    base = calibrated(capture(net, x[:2], train=False), target="onnxruntime-x86", calibrate=[x])
    with torch.no_grad():
        real = quantize(capture(net, x[:2], train=False), calibrate=[x]).module(x)
        assert float((Mixed(base, frozenset(), Changes())(x) - real).abs().max()) <= 0.02 * float(real.abs().max())
        every = frozenset(f"layers.{i}.weight" for i in range(6)) | {"head.weight"}
        whole = Mixed(base, every, Changes())(x)
        assert torch.allclose(whole, net(x), rtol=1e-5, atol=1e-6)  # the input is in float with the layer that reads it


@pytest.mark.parametrize("first", range(1, 9))
def test_the_smallest_prefix_is_found_with_few_trials(first: int) -> None:
    tried: list[int] = []

    def holds(part: Any) -> bool:
        tried.append(len(part))
        return len(part) >= first

    assert _smallest_prefix(list("abcdefgh"), holds) == first
    assert len(tried) <= 6
    assert _smallest_prefix(list("abc"), lambda _: False) is None


def test_a_culprit_at_the_input_is_found_and_spared() -> None:
    """One feature is 10,000 times as large: the input's own range does the harm, and it is float with the first layer."""
    torch.manual_seed(0)
    size = torch.tensor([1e4] + [1.0] * 9)
    hidden = [m for _ in range(2) for m in (nn.Linear(32, 32), nn.ReLU())]
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), *hidden, nn.Linear(32, 1)).eval()
    net[0].weight.data /= size
    x = torch.randn(256, 10) * size
    program, evaluate = capture(net, x[:2], train=False), noise(net, x)
    assert evaluate(quantize(program, calibrate=[x], float_layers=["0.weight"]).module) < 0.01
    found = spare(program, evaluate=evaluate, meets=lambda v: v < 0.01, calibrate=[x])
    assert found.float_layers == ("0.weight",) and found.before > 0.05
    assert found.value == evaluate(found.quantized.module) < 0.01


def test_a_culprit_at_the_output_is_found_and_spared() -> None:
    class Heads(nn.Module):
        """Two channels in one output, the first 2,000 times as large."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
            self.head.weight.data[0] *= 2000

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.body(x)))

    torch.manual_seed(0)
    net, x = Heads().eval(), torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        wanted = net(x)[:, 1]
    found = spare(
        capture(net, x[:2], train=False),
        evaluate=lambda predict: float((predict(x)[:, 1] - wanted).abs().mean().numpy() / wanted.std()),  # no gradient
        meets=lambda v: v < 0.05,
        calibrate=[x],
    )
    assert "head.weight" in found.float_layers and found.value < 0.05 < found.before


@pytest.mark.parametrize("place", ["behind a norm", "before a softmax"])
def test_values_of_ops_that_stay_in_float_are_float_with_their_layer(place: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x)) if place == "behind a norm" else F.log_softmax(self.layer(x), -1)

    net, x = Net().eval(), torch.randn(16, 16)
    base = calibrated(capture(net, x[:2], train=False), target="onnxruntime-x86", calibrate=[x])
    with torch.no_grad():
        assert torch.allclose(Mixed(base, frozenset({"layer.weight"}), Changes())(x), net(x), atol=1e-6)


def test_the_real_network_decides_where_the_rehearsal_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal that lifts nothing: what the quantizer itself leaves in float counts, before anything is refused."""
    monkeypatch.setattr(sys.modules[Mixed.__module__], "skipped", lambda *_: frozenset())
    net, x = Chain(3), torch.randn(32, 8, 8, 8)
    program, evaluate = capture(net, x[:2], train=False), noise(net, x)
    plain = evaluate(quantize(program, calibrate=[x]).module)
    found = spare(program, evaluate=evaluate, meets=lambda v: v <= plain / 4, calibrate=[x])
    assert evaluate(found.quantized.module) == found.value <= plain / 4
    with pytest.raises(NothingToDo, match=r"with 7 of 7 layers in float"):
        spare(program, evaluate=evaluate, meets=lambda v: v < 0, calibrate=[x])


def test_a_network_all_of_which_would_be_float_is_refused_with_what_that_reaches() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(32, 8)
    evaluate = noise(net, x)
    with pytest.raises(NothingToDo, match=r"Got 0 with 2 of 2 layers in float, .* with none"):
        spare(capture(net, x[:2], train=False), evaluate=evaluate, meets=lambda v: v < 1e-9, calibrate=[x])


@pytest.mark.parametrize("value", [None, [0.5], {"accuracy": 0.5}, "0.5"], ids=["None", "list", "dict", "str"])
def test_a_metric_that_is_no_number_is_refused(value: Any) -> None:
    net, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(8, 4)
    with pytest.raises(UsageError, match=r"evaluate must return a number\. Got"):
        spare(capture(net, x[:2], train=False), evaluate=lambda _: value, meets=bool, calibrate=[x])


def test_a_generator_of_samples_is_gone_through_as_often_as_needed() -> None:
    net, x = Chain(3), torch.randn(32, 8, 8, 8)
    program, evaluate = capture(net, x[:2], train=False), noise(net, x)
    plain = evaluate(quantize(program, calibrate=[x]).module)
    options: Any = {"evaluate": evaluate, "meets": lambda v: v <= plain / 4}
    once = spare(program, calibrate=(part for part in x.split(8)), **options)
    again = spare(program, calibrate=list(x.split(8)), **options)
    assert once.float_layers == again.float_layers and once.value == again.value
    spent = iter([x])
    with pytest.raises(RejectedError, match="fresh iterable"):
        spare(program, calibrate=lambda: spent, **options)


@pytest.mark.parametrize("repair", [["gptq"], ["bias"]])
def test_a_layer_in_float_has_its_own_weights_again_whatever_a_repair_made_of_them(repair: list[str]) -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)),
        torch.randn(64, 8),
    )
    program, evaluate = capture(net, x[:2], train=False), noise(net, x)
    base = calibrated(program, target="onnxruntime-x86", calibrate=[x], scheme="ternary", repair=repair)
    names = frozenset(n for n, p in net.named_parameters() if p.dim() > 1)
    for predict in (Mixed(base, frozenset(), None), Mixed(base, names, Changes())):
        assert evaluate(predict) < 1e-10
    plain = evaluate(Mixed(base, frozenset(), Changes()))
    assert plain == pytest.approx(
        evaluate(quantize(program, calibrate=[x], scheme="ternary", repair=repair).module), rel=1e-3
    )
    found = spare(
        program, evaluate=evaluate, meets=lambda v: v <= plain / 3, calibrate=[x], scheme="ternary", repair=repair
    )
    assert 1 <= len(found.float_layers) < 3 and found.value <= plain / 3
    assert evaluate(found.quantized.module) == pytest.approx(found.value)
