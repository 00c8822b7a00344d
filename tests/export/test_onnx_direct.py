"""The short way to ONNX writes the graph that the exporter's own way does, and leaves alone what it does not know."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import deploy_nets
from paredown.export import check, export, onnx_direct
from paredown.export import onnxruntime as runtime
from paredown.models import load_model
from paredown.program import Program, capture
from paredown.quantize import Quantized, quantize


def shape_of(model: onnx.ModelProto) -> list[Any]:
    """Every node by its op, its attributes and where its inputs come from; names play no part.

    A reshape that copies the first axis (0) is one that leaves it over (-1).
    """
    arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    for node in model.graph.node:
        shape = arrays.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is not None and shape[0] == 0 and -1 not in shape:
            arrays[node.input[1]] = np.array([-1, *shape[1:]])
    known: dict[str, Any] = {name: array.tobytes() for name, array in arrays.items()}
    known |= {i.name: f"input {n}" for n, i in enumerate(model.graph.input)}
    found = []
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name != "allowzero"}
        entry = (node.op_type, str(sorted(attributes.items())), tuple(known.get(i, "") for i in node.input))
        found.append(entry)
        known |= {o: hash((entry, n)) for n, o in enumerate(node.output)}
    return [sorted(map(repr, found)), [known[o.name] for o in model.graph.output]]


def both(thing: Program | Quantized, monkeypatch: pytest.MonkeyPatch) -> list[onnx.ModelProto]:
    """The file by the short way, which must have been taken, and by the long one."""
    import onnx_ir as ir

    taken: list[bool] = []
    real = onnx_direct.convert

    def seen(program: Any, registry: Any) -> Any:
        result = real(program, registry)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(onnx_direct, "convert", seen)
    short = ir.serde.serialize_model(runtime.onnx_model(thing, 18, packed=True))
    assert taken == [True]
    monkeypatch.setattr(onnx_direct, "convert", lambda program, registry: None)
    return [short, ir.serde.serialize_model(runtime.onnx_model(thing, 18, packed=True))]


class Shuffled(nn.Module):
    """Half of the channels passes by, the other half is computed, then both are mixed: a block of ShuffleNet. Last, parts of 3, 3 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        kept, changed = x.chunk(2, dim=1)
        x = torch.cat([kept, self.norm(self.point(changed)).relu_()], 1)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(batch, -1, height, width)
        first, second, last = x.chunk(3, 1)
        return F.adaptive_avg_pool2d(torch.cat([last, first * 2.0, second], 1), 1).flatten(1)


@functools.cache
def captured(name: str) -> Program:
    if name == "shuffled":
        torch.manual_seed(0)
        return capture(Shuffled().eval(), torch.randn(2, 3, 8, 8), train=False)
    net, inputs = deploy_nets.made(name)
    return capture(net, inputs(2), train=False)


@pytest.mark.parametrize("name", [*deploy_nets.NETS, "shuffled"])
def test_both_ways_give_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.randn(32, 3, 8, 8) if name == "shuffled" else deploy_nets.made(name)[1](32)
    short, long = both(quantize(captured(name), calibrate=[samples]), monkeypatch)
    assert len(short.graph.node) > 10
    assert shape_of(short) == shape_of(long)


@pytest.mark.parametrize("name", [*deploy_nets.NETS, "shuffled"])
def test_both_ways_give_one_graph_of_floats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = captured(name)
    code, metas = program.eval_graph.graph_module.code, [sorted(n.meta) for n in program.eval_graph.graph.nodes]
    short, long = both(program, monkeypatch)
    assert len(short.graph.node) > 5
    assert shape_of(short) == shape_of(long)
    assert [t.name for t in short.graph.input] == [t.name for t in long.graph.input]
    assert sorted(t.name for t in short.graph.initializer) == sorted(t.name for t in long.graph.initializer)
    assert program.eval_graph.graph_module.code == code
    assert [sorted(n.meta) for n in program.eval_graph.graph.nodes] == metas


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "regnet_y_400mf",
    ],
)
def test_both_ways_give_one_graph_of_torchvisions_networks(
    name: str, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = load_model(f"torchvision:{name}")[0].eval()
    x = torch.randn(2, 3, 64, 64)
    program = capture(net, x, train=False)
    short, long = both(quantize(program, calibrate=[x]) if quantized else program, monkeypatch)
    assert shape_of(short) == shape_of(long)


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def read_later(x: Tensor) -> Tensor:
    y = x * 1.0
    z = y.relu_()
    return z + y


def through_a_view(x: Tensor) -> Tensor:
    y = x * 1.0
    y.view(-1).relu_()
    return y + 1.0


def a_view_from_before(x: Tensor) -> Tensor:
    y = x * 1.0
    view = y.reshape(y.shape[0], -1)
    return y.relu_().mean() + view


def handed_on(x: Tensor) -> Tensor:
    y = x * 1.0
    z = F.dropout(y, 0.5, training=False)  # y itself, though the op does not say so
    return z.relu_() + y


def permuted(x: Tensor) -> Tensor:
    y = x * 1.0
    return torch.einsum("abcd->abdc", y).relu_().sum() + y


def wider(x: Tensor) -> Tensor:
    return (x * 1.0).add_(torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("function", "short"),
    [
        (lambda x: (x * 1.0).relu_() + 1.0, True),
        (read_later, True),  # PyTorch writes that both are one value
        (through_a_view, False),
        (a_view_from_before, False),
        (handed_on, False),
        (permuted, False),
        (wider, False),
        (lambda x: (x * 1.0).copy_(x[:, :, :1] * 2.0), False),
        (lambda x: torch.cumsum(x, 1), True),
        (lambda x: x.reshape(x.shape[0], -1).softmax(1), True),
        (lambda x: torch.fft.rfft(x).abs(), False),
        (lambda x: F.batch_norm(x, None, None, training=True), False),
        (lambda x: F.adaptive_avg_pool2d(x, 2), False),
    ],
)
def test_what_it_does_not_know_is_left_to_the_exporter(function: Callable[[Tensor], Tensor], short: bool) -> None:
    program = capture(Calls(function).eval(), torch.randn(2, 3, 5, 5), train=False).eval_graph
    before, code, x = program.module(check_guards=False), program.graph_module.code, torch.randn(2, 3, 5, 5)
    assert (onnx_direct.convert(program, runtime._translations(18, runtime._num_ops())) is not None) == short
    assert program.graph_module.code == code
    assert torch.equal(program.module(check_guards=False)(x), before(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * 1.0).squeeze(1),
        lambda x: (x.mean(2, keepdim=True) * 2.0).squeeze((1, 2)),
        lambda x: (x.mean((2, 3), keepdim=True) * 2.0).squeeze((-1, 2)),
        lambda x: (x.mean(3, keepdim=True) * 2.0).squeeze(-1),
        lambda x: (x * 1.0).squeeze((1, -1)),
    ],
)
def test_a_squeeze_leaves_axes_that_are_longer_than_one(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """ONNX refuses to squeeze them; torch does nothing."""
    program, x = capture(Calls(function).eval(), torch.randn(2, 3, 5, 5), train=False), torch.randn(4, 3, 5, 5)
    assert onnx_direct.convert(program.eval_graph, runtime._translations(18, runtime._num_ops())) is not None
    assert check(export(program, tmp_path / "net.onnx"), program, [x]).max_error <= 1e-6
