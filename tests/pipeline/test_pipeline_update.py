"""A plan carried out with the update of obs: weights that no sweep can settle, and plans that are none of masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paredown as pare
from paredown.errors import UsageError
from paredown.plan import Mask, Plan
from paredown.prune.obs import obs_on_plan


class Scaled(nn.Module):
    """The second weight is computed before it is used: a change in place would not be what the layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(10, 12), nn.Linear(8, 3)
        self.weight = nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.linear(self.first(x).relu(), self.weight * 2.0).relu())


def test_what_no_sweep_can_settle_is_masked_and_named() -> None:
    torch.manual_seed(0)
    net, x = Scaled().eval(), torch.randn(256, 10) @ torch.randn(10, 10)
    program = pare.capture(net, x[:4])
    generator = np.random.default_rng(0)
    masks = {
        n: Mask.of(generator.random(tuple(net.get_parameter(n).shape)) > 0.5, "element")
        for n in ("weight", "first.weight", "last.weight")
    }
    done = obs_on_plan(program, Plan(keep={}, masks=masks, made_by={"verb": "mine"}), lambda: [x])
    assert done.plan == Plan(keep={}, masks=masks, made_by={"verb": "mine"})
    state = dict(done.module.named_parameters())
    for name, mask in masks.items():
        np.testing.assert_array_equal(state[name].detach().numpy()[~mask.kept], 0.0)
    kept = masks["weight"].kept
    np.testing.assert_array_equal(state["weight"].detach().numpy()[kept], net.weight.detach().numpy()[kept])
    assert set(done.fits) == {"first.weight", "last.weight"}
    assert any(n.startswith("weight is masked without an update") for n in done.notes)
    plain = pare.prune(program, Plan(keep={}, masks={n: masks[n] for n in done.fits}))
    with torch.no_grad():
        hidden = [m.first(x) - net.first(x) for m in (done.module, plain.module)]  # type: ignore[operator, union-attr]
    assert float(hidden[0].square().mean()) < float(hidden[1].square().mean())


def test_other_plans_are_refused() -> None:
    net, x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), torch.randn(8, 6)
    for plan in (Plan(keep={}), Plan(keep={"0.weight": {0: (0, 1)}, "0.bias": {0: (0, 1)}, "1.weight": {1: (0, 1)}})):
        with pytest.raises(UsageError, match="a plan of masks alone"):
            obs_on_plan(pare.capture(net, x), plan, lambda: [x])
