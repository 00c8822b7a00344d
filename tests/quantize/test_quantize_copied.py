"""The copy of a program is what a new capture gives, shares no tensor with it, and ties stay ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deploy_nets
from paredown.program import capture
from paredown.quantize import quantize
from paredown.quantize.copied import eval_copy


class Tied(nn.Module):
    """Two layers over one weight, a constant, and dropout, which makes the train graph another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.norm(self.a(x)).relu())) * torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("name", ["tied", "vision"])
def test_a_copy_is_what_a_new_capture_gives(name: str) -> None:
    torch.manual_seed(0)
    net, inputs = deploy_nets.made(name) if name != "tied" else (Tied().eval(), lambda batch: torch.randn(batch, 4))
    program = capture(net, inputs(2))
    before = {n: t.clone() for n, t in program.state.items()}
    copied, again = eval_copy(program), capture(net, program.inputs, train=False)
    assert copied.train_graph is None and program.train_graph is not None
    assert copied.eval_graph.graph_module.code == again.eval_graph.graph_module.code
    assert copied.state.keys() == again.state.keys()
    assert all(torch.equal(t, again.state[n]) and t.dtype == again.state[n].dtype for n, t in copied.state.items())
    for state in (copied.state, again.state):
        assert len({t.data_ptr() for t in state.values()}) == len({t.data_ptr() for t in program.state.values()})
    with torch.no_grad():
        for tensor in copied.eval_graph.module(check_guards=False).state_dict().values():
            tensor.zero_()
    assert all(torch.equal(before[n], t) for n, t in program.state.items())
    assert not any(bool(copied.state[n].any()) for n in copied.eval_graph.graph_signature.parameters)


@pytest.mark.parametrize("how", ["in place", "data", "parameter", "assign", "statistics"])
def test_weights_that_a_module_got_after_its_capture_are_quantized(how: str) -> None:
    torch.manual_seed(0)
    x, program = torch.randn(64, 4), capture(Tied().eval(), torch.randn(2, 4))
    net: Any = program.module
    if how == "in place":
        net.a.weight.data.mul_(3)
    elif how == "data":
        net.a.weight.data = torch.randn(4, 4)
    elif how == "parameter":
        net.a.weight = net.b.weight = nn.Parameter(torch.randn(4, 4))
    elif how == "assign":
        net.load_state_dict(Tied().state_dict(), assign=True)
    else:
        net.norm.running_var = torch.full((4,), 0.01)
    expected = net(x).detach()
    error = (quantize(program, calibrate=[x]).module(x) - expected).square().mean()
    assert error < 1e-3 * expected.square().mean()
