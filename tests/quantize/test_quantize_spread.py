"""With few calibration samples, how far the ranges rest on single ones is told, and it is what leaving each out really does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

from paredown.program import capture
from paredown.quantize import quantize


def said(x: torch.Tensor, *batches: torch.Tensor) -> str:
    """The note on the spread of one network; "" where there is none."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU())
    notes = quantize(capture(net, x[:2]), calibrate=[*batches] or [x]).notes
    return next((n for n in notes if "leaving one sample out" in n), "")


def test_the_spread_is_that_of_leaving_each_sample_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 4)
    x[3] *= 7
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU())
    found = next(n for n in quantize(capture(net, x[:2]), calibrate=[x]).notes if "leaving one sample out" in n)
    moved = []
    for values in (x, net(x).detach()):
        whole = values.max().clamp(min=0) - values.min().clamp(max=0)
        without = [torch.cat((values[:i], values[i + 1 :])) for i in range(10)]
        moved.append(1 - min(float((v.max().clamp(min=0) - v.min().clamp(max=0)) / whole) for v in without))
    assert f"up to {max(moved):.0%}, of half of them by {min(moved):.0%} or more" in found
    assert max(moved) > 0.5


def test_batches_of_any_size_say_the_same() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 4)
    assert said(x) == said(x, *x.split(1)) == said(x, *x.split(4)) != ""


def test_many_samples_and_a_lone_one_have_no_spread() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    assert said(x) == "" and said(x[:2], x[:1]) == ""


class Empty(nn.Module):
    """An activation without elements, as of a list of boxes that is empty or a slice of width 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(torch.cat([y[:, :0], y], 1).relu())


def test_an_activation_without_elements_has_no_range() -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 8)
    notes = quantize(capture(Empty().eval(), x[:2], train=False), calibrate=[x]).notes
    assert any("leaving one sample out" in n for n in notes)


def test_no_percent_is_not_told() -> None:
    """Both ends of all ranges stand in two samples; then those of the inputs alone, each of which the network takes for another."""
    assert said(torch.cat([torch.full((1, 4), v) for v in (-1.0, -1.0, 1.0, 1.0)])) == ""
    told = said(torch.tensor([[-1.0, 1.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]]))
    assert "by up to" in told and "half" not in told
