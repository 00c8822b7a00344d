"""Rewrites for phones: the same function, without the ops that their converters take badly. Nothing of a phone is needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deploy_nets
from paredown.export.phone import about, exported
from paredown.program import capture
from paredown.quantize.batches import rows, tensors_of
from paredown.quantize.decompose import op_name


class Calls(nn.Module):
    """A network that is one function, behind a linear layer so that something computes."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def heads(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], 6, 2, 4).transpose(1, 2)


def attend(**more: object) -> Callable[[Tensor], Tensor]:
    return lambda x: F.scaled_dot_product_attention(heads(x), heads(x * 2), heads(x + 1), **more)


CASES: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "select": (lambda x: x[:, -2], {"select"}),
    "unbind": (lambda x: torch.sub(*x.reshape(x.shape[0], 6, 2, 4).unbind(2)), {"unbind", "select"}),
    "unbind of one": (lambda x: x[:, :1].unbind(1)[0], {"unbind", "select"}),
    "squeeze": (lambda x: x[:, 1:2].squeeze(1).unsqueeze(2), {"squeeze", "unsqueeze"}),
    "expand": (lambda x: x + x[:, :1].expand(x.shape[0], 1, 8), {"expand"}),
    "mean": (lambda x: x.reshape(x.shape[0], 2, 3, 8).mean((-1, 2)), set()),
    "softplus": (lambda x: F.softplus(x * 30), {"softplus", "where"}),
    "mish": (lambda x: F.mish(x * 9), {"mish", "softplus", "where"}),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.1, -0.2, 0.3, 0.4, 0.5, 0.6])), set()),
    "largest": (
        lambda x: F.adaptive_max_pool2d(x.reshape(x.shape[0], 2, 6, 4), (3, 1)),
        {"adaptive_max_pool2d"},
    ),
    "attention": (attend(), {"scaled_dot_product_attention"}),
    "scale": (attend(scale=0.3), {"scaled_dot_product_attention"}),
    "mask": (attend(attn_mask=torch.linspace(-3, 3, 36).reshape(6, 6)), {"scaled_dot_product_attention"}),
}
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "causal": attend(is_causal=True),
    "truth values": attend(attn_mask=torch.ones(6, 6, dtype=torch.bool).tril()),
    "an expand that repeats": lambda x: x + x[:, :1].expand(x.shape[0], 6, 8),
}


def ops(net: nn.Module, x: Tensor) -> tuple[set[str], float, float]:
    """(ops of the exported program, largest error, largest output)."""
    program = exported(capture(net.eval(), x, train=False))
    one = torch.randn_like(x)[:1]
    with torch.no_grad():
        got, expected = program.module()(one), net(one)
    assert not [n for n in program.graph.nodes if "stack_trace" in n.meta]
    return {op_name(n) for n in program.graph.nodes}, float((got - expected).abs().max()), float(expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_rewritten_and_the_same(name: str) -> None:
    function, gone = CASES[name]
    found, error, scale = ops(Calls(function), torch.randn(2, 6, 8))
    assert not found & gone
    assert "linear" in found
    assert scale > 0.01
    assert error <= 1e-6 * scale


@pytest.mark.parametrize("name", KEPT)
def test_left_to_the_converter_and_the_same(name: str) -> None:
    found, error, scale = ops(Calls(KEPT[name]), torch.randn(2, 6, 8))
    assert found & {"scaled_dot_product_attention", "expand"}
    assert error <= 1e-6 * scale


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(4, 6, 5, padding="same", dilation=2, groups=2), (9,)),
        (nn.Conv2d(4, 4, (4, 3), padding="same", bias=False), (6, 5)),
        (nn.Conv2d(4, 4, 3, 2, padding="valid"), (7, 7)),
    ],
)
def test_a_padding_in_words_becomes_numbers(layer: nn.Module, size: tuple[int, ...]) -> None:
    x = torch.randn(2, 4, *size)
    program = exported(capture(layer.eval(), x, train=False))
    assert not any(isinstance(a, str) for n in program.graph.nodes for a in n.args)
    with torch.no_grad():
        assert torch.allclose(program.module()(x[:1]), layer(x[:1]), rtol=1e-5, atol=1e-6)


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        nn.init.uniform_(self.two.running_var, 2, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.two(self.conv(self.one(self.conv(x)))), None


def test_layers_in_front_of_batch_norms_share_no_weight() -> None:
    net, x = TwoNorms().eval(), torch.randn(2, 4, 5, 5)
    program = exported(capture(net, x, train=False))
    convs = [n for n in program.graph.nodes if op_name(n) == "conv2d"]
    assert len({n.args[1] for n in convs}) == len(convs) == 2
    with torch.no_grad():
        assert torch.allclose(program.module()(x[:1])[0], net(x[:1])[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", deploy_nets.NETS)
def test_whole_networks_for_one_sample(name: str) -> None:
    net, inputs = deploy_nets.made(name)
    program = exported(capture(net, inputs(2), train=False))
    one = inputs(1)
    with torch.no_grad():
        got, expected = (tensors_of(m(*one["args"], **one["kwargs"])) for m in (program.module(), net))
    assert all((a - b).abs().max() <= 1e-6 * b.abs().max() for a, b in zip(got, expected, strict=True))
    assert '"scheme":"fp32"' in about(program, "fp32")


def test_a_fixed_batch_stays(recwarn: pytest.WarningsRecorder) -> None:
    x = torch.randn(4, 6, 8)
    program = capture(Calls(lambda v: v), x, train=False, dynamic_batch=False)
    assert program.batch != "dynamic"
    placeholders = [n for n in exported(program).graph.nodes if n.op == "placeholder"]
    assert tuple(placeholders[-1].meta["val"].shape) == (4, 6, 8)
    assert len(rows(program.inputs, slice(0, 1)).args[0]) == 1


FRESH = """
import sys, torch
from torch import nn
from paredown.export.executorch import _apart
from paredown.export.litert import _unfold
from paredown.program import capture

program = capture(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.zeros(2, 4)).eval_graph
before = str(program.graph)
_apart(program), _unfold(program)
assert str(program.graph) == before
assert not any(name.startswith("torchao") for name in sys.modules)
print("well")
"""


def test_a_float_network_in_a_process_that_quantized_nothing() -> None:
    """There torch knows no quantize and dequantize."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "well", done.stderr
