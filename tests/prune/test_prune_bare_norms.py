"""Norms without weights in the user's own class: their sizes follow the channels, and nothing warns."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import paredown as pare
from hazards import healthy
from oracle import plan_of, removed_units


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.instance = nn.Conv2d(3, 6, 3, padding=1), nn.InstanceNorm2d(6)
        self.inner, self.head = nn.Linear(6, 10), nn.Linear(10, 2)
        self.layer, self.rms = nn.LayerNorm(10, elementwise_affine=False), nn.RMSNorm(10, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.instance(self.stem(x)).relu().flatten(2).transpose(1, 2))
        return self.head(self.rms(self.layer(x).relu()))


def test_norms_without_weights_stay_in_the_users_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = healthy(Bare()).eval(), torch.randn(2, 3, 5, 5)
    program = pare.capture(model, x)
    coupling = pare.couple(program)
    assert coupling.free_units == 6 + 10
    plan = plan_of(program, coupling, removed_units(coupling, 0))
    pruned, graph = pare.prune(program, plan), pare.prune(program, plan, realiser="graph")
    assert pruned.realiser == "module"
    small = pruned.module
    assert (small.instance.num_features, small.layer.normalized_shape, small.rms.normalized_shape) == (4, (6,), (6,))
    pare.save(pruned, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [m(x) for m in (small, graph.module, pare.load(tmp_path, Bare()).eval())]
    torch.testing.assert_close(found[0], found[1])
    assert torch.equal(found[0], found[2])
