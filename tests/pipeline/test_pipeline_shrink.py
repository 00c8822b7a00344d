"""What a search for bytes takes for the part of a file that is no codes."""

from __future__ import annotations

import torch
from torch import nn

from paredown.couple import couple
from paredown.pipeline.shrink import Shrinking, _float_bytes
from paredown.plan import Plan
from paredown.program import capture
from paredown.prune import prune


def test_float_layers_shrink_with_the_network() -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    program = capture(net, torch.randn(2, 8))
    coded = ["0.weight", "4.weight"]
    assert _float_bytes(program, coded) == 4 * 32 * 16
    keep = {f.parameter: {f.axis: tuple(range(8))} for s in couple(program).spaces[:1] for f in s.footprints}
    small = prune(program, Plan(keep=keep))
    shrinking = Shrinking(limit=10_000, overhead=5_000, widths=(8, 4), float_bytes=_float_bytes(program, coded))
    assert shrinking.overhead_of(program, coded) == 5_000
    assert shrinking.overhead_of(small, coded) == 5_000 - 4 * (32 - 8) * 16
