"""Captured graphs on another device than that of the capture: here one without memory, which has shapes and devices alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from paredown.placed import placed
from paredown.program import GraphModel, capture


class Tables(nn.Module):
    """Makes tensors where its input lies."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.register_buffer("scale", torch.full((8,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.arange(8, device=x.device) + torch.ones(8, dtype=x.dtype, device=x.device).to(x.device)
        return self.norm(self.inner(x)) * ramp * self.scale


@pytest.mark.parametrize("training", [False, True])
def test_a_graph_runs_where_its_tensors_are(training: bool) -> None:
    torch.manual_seed(0)
    program, x = capture(Tables(), torch.randn(4, 6)), torch.randn(4, 6)
    graph = GraphModel(program.eval_graph, program.train_graph, program.state).train(training)
    expected = copy.deepcopy(graph)(x)
    elsewhere = copy.deepcopy(graph).to("meta")
    found = elsewhere(x.to("meta"))
    assert found.device.type == "meta" and found.shape == expected.shape
    assert torch.equal(copy.deepcopy(graph)(x), expected)  # copies share their bodies: the CPU's is as it was


def test_a_graph_that_says_no_device_is_not_copied() -> None:
    program = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.zeros(2, 3))
    body = program.eval_graph.graph_module
    assert placed(body, torch.device("meta")) is body
    tables = capture(Tables(), torch.zeros(2, 6)).eval_graph.graph_module
    assert "cpu" in tables.code and placed(tables, torch.device("cpu")) is tables
    assert "cpu" not in placed(tables, torch.device("meta")).code and "cpu" in tables.code
