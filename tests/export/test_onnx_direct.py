"""The short way to ONNX writes the graph that the exporter's own way does, and leaves alone what it does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import deploy_nets
from paredown.export import onnx_direct
from paredown.export import onnxruntime as runtime
from paredown.models import load_model
from paredown.program import capture
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


def both(quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> list[onnx.ModelProto]:
    """The file by the short way, which must have been taken, and by the long one."""
    import onnx_ir as ir

    taken: list[bool] = []
    real = onnx_direct.convert

    def seen(program: Any, registry: Any) -> Any:
        result = real(program, registry)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(onnx_direct, "convert", seen)
    short = ir.serde.serialize_model(runtime.onnx_model(quantized, 18, packed=True))
    assert taken == [True]
    monkeypatch.setattr(onnx_direct, "convert", lambda program, registry: None)
    return [short, ir.serde.serialize_model(runtime.onnx_model(quantized, 18, packed=True))]


@pytest.mark.parametrize("name", list(deploy_nets.NETS))
def test_both_ways_give_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = deploy_nets.made(name)
    short, long = both(quantize(capture(net, inputs(2)), calibrate=[inputs(32)]), monkeypatch)
    assert len(short.graph.node) > 10
    assert shape_of(short) == shape_of(long)


@pytest.mark.slow
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
def test_both_ways_give_one_graph_of_torchvisions_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = load_model(f"torchvision:{name}")[0].eval()
    x = torch.randn(2, 3, 64, 64)
    short, long = both(quantize(capture(net, x), calibrate=[x]), monkeypatch)
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


@pytest.mark.parametrize(
    ("function", "short"),
    [
        (lambda x: (x * 1.0).relu_() + 1.0, True),
        (read_later, True),  # PyTorch writes that both are one value
        (through_a_view, False),
        (a_view_from_before, False),
        (lambda x: torch.cumsum(x, 1), False),
        (lambda x: x.reshape(x.shape[0], -1).softmax(1), False),
    ],
)
def test_what_it_does_not_know_is_left_to_the_exporter(function: Callable[[Tensor], Tensor], short: bool) -> None:
    program = capture(Calls(function).eval(), torch.randn(2, 3, 5, 5)).eval_graph
    before, x = program.module(check_guards=False), torch.randn(4, 3, 5, 5)
    assert (onnx_direct.convert(program, runtime._translations(18, runtime._num_ops())) is not None) == short
    assert torch.equal(program.module(check_guards=False)(x), before(x))
