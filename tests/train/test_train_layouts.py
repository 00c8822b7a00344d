"""Networks pruned to few channels are trained to the end where a step hands its pictures on in channels_last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from paredown.layouts import guarded_layouts


@pytest.mark.parametrize("width", [4, 7])
def test_a_narrow_strided_shortcut_trains_in_either_layout_to_the_same(width: int) -> None:
    """In a process of its own: torch's kernel wrote beyond the gradient's end, which ends a process now or later."""
    script = Path(__file__).with_name("narrow_nets.py")
    done = subprocess.run([sys.executable, str(script), str(width)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    trained, *layouts, largest, scores = map(float, done.stdout.split())
    assert trained > 0.01 and largest > 0
    assert max(layouts) < 1e-4
    assert scores < 1e-4 * largest


def test_what_is_right_keeps_its_layout() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 8, 1, 2), nn.Conv2d(8, 8, 1, 2), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, 2), nn.Conv2d(1, 8, 1, 2)
    )
    net = net.to(memory_format=torch.channels_last)
    values = [p.detach().clone() for p in net.parameters()]
    with guarded_layouts(net):
        guarded = [bool(m._forward_pre_hooks) for m in net]
        assert net[0].weight.stride() == (4, 1, 1, 1)  # type: ignore[union-attr]
        assert net[1].weight.stride() == (8, 1, 8, 8)  # type: ignore[union-attr]
    assert guarded == [True, False, False, False, False]
    assert not any(m._forward_pre_hooks for m in net)
    assert all(torch.equal(a, b) for a, b in zip(values, net.parameters(), strict=True))
