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


@pytest.mark.parametrize(
    ("conv", "is_changed"),
    [
        (nn.Conv2d(4, 8, 1, 2), True),
        (nn.Conv2d(4, 8, 1, (1, 2), bias=False, padding=1), True),
        (nn.Conv2d(8, 8, 1, 2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, 2), False),
        (nn.Conv2d(8, 8, 1, 2, groups=2), True),  # right in either layout; its weight looks the same
    ],
)
def test_what_is_right_keeps_its_layout(conv: nn.Conv2d, is_changed: bool) -> None:
    conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(2, conv.in_channels, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = conv(x)
        with guarded_layouts(conv):
            found = conv(x)
            op = torch.ops.aten.conv2d.default(
                x, conv.weight, conv.bias, conv.stride, conv.padding, (1, 1), conv.groups
            )
    assert torch.allclose(found, wanted, atol=1e-6) and torch.equal(found, op)
    assert found.is_contiguous() is is_changed
    assert found.is_contiguous(memory_format=torch.channels_last) is not is_changed


def test_a_function_of_ones_own_is_seen_and_a_net_without_such_a_weight_is_not_watched() -> None:
    weight = torch.randn(8, 4, 1, 1)
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    with guarded_layouts(nn.Conv2d(4, 8, 1, 2)):
        assert nn.functional.conv2d(x, weight, stride=2).is_contiguous()
        assert nn.functional.conv2d(input=x, weight=weight, stride=[2, 2]).is_contiguous()
    with guarded_layouts(nn.Conv2d(8, 8, 1, 2)):
        assert not nn.functional.conv2d(x, weight, stride=2).is_contiguous()
