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
