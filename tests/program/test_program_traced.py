"""A capture that knows what batch norms and activations return is the capture that works it out, to the last shape."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_impls import get_fast_op_impls
from torch.utils import _pytree as pytree

from paredown import program as capturing
from paredown.program import Program, capture
from paredown.traced import known_shapes


def nodes(program: Program) -> list[Any]:
    """Every node of both graphs with the shape, strides and dtype of what it returns, and what was assumed of the batch."""
    found: list[Any] = [program.batch]
    for graph in (program.eval_graph, program.train_graph):
        assert graph is not None
        for node in graph.graph.nodes:
            leaves = pytree.tree_leaves(node.meta.get("val"))
            shapes = [(str(t.shape), str(t.stride()), t.dtype) if isinstance(t, Tensor) else str(t) for t in leaves]
            found.append((node.name, str(node.target), str(node.args), str(node.kwargs), shapes))
        found += [str(graph.range_constraints), str(graph.graph_signature)]
    return found


class Turned(nn.Module):
    """Batch norm and activations of a tensor that lies in memory in neither of the usual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(x.transpose(1, 3)).relu())


ACTIVATIONS = (
    nn.ReLU(),
    nn.GELU(),
    nn.SiLU(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Hardtanh(),
    nn.Hardswish(),
    nn.LeakyReLU(),
    nn.ELU(),
)
PLAIN = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *ACTIVATIONS, nn.BatchNorm2d(4, affine=False))
NO_STATISTICS = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (PLAIN, torch.zeros(2, 3, 6, 6)),
        (PLAIN, torch.zeros(2, 3, 6, 6).to(memory_format=torch.channels_last)),
        (NO_STATISTICS, torch.zeros(2, 3, 6, 6)),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()), torch.zeros(3, 3)),
        (nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.GELU()).double(), torch.zeros(2, 3, 5).double()),
        (Turned(), torch.zeros(2, 5, 6, 4)),
    ],
    ids=["images", "channels last", "no statistics", "rows", "float64", "turned"],
)
def test_the_graph_is_the_one_of_the_long_way(net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    short = nodes(capture(net, x))
    monkeypatch.setattr(capturing, "known_shapes", nullcontext)
    assert short == nodes(capture(net, x))


def test_torch_is_as_it_was_afterwards() -> None:
    before = dict(get_fast_op_impls())
    with known_shapes():
        assert torch.ops.aten.relu.default in get_fast_op_impls()
    assert get_fast_op_impls() == before
