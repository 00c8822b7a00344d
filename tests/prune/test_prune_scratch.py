"""From scratch: fresh weights, and criteria of pruning at initialisation on them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import paredown as pare
from paredown.errors import RejectedError
from paredown.prune.scratch import fresh
from paredown.train.loop import Hook
from sparse_task import WEIGHTS, batches, small_net, sparse, step


def test_fresh_is_seeded_and_new_everywhere() -> None:
    net = small_net()
    net[1].running_mean.fill_(3.0)
    before = copy.deepcopy(net.state_dict())
    a, b, c = fresh(net, seed=1), fresh(net, seed=1), fresh(net, seed=2)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    for name in WEIGHTS:
        values = [dict(m.named_parameters())[name] for m in (net, a, c)]
        assert not torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])
    assert not a[1].running_mean.any() and type(a) is nn.Sequential
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_fresh_leaves_global_randomness_alone() -> None:
    net = nn.Linear(2, 2)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    fresh(net, seed=9)
    assert torch.equal(torch.rand(3), wanted)


def test_tied_weights_stay_tied_and_attention_resets_itself() -> None:
    net = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(4, 4), nn.Linear(4, 4))
    net[2].weight = net[1].weight
    new = fresh(net)
    assert new[2].weight is new[1].weight
    assert not torch.equal(new[0].in_proj_weight, net[0].in_proj_weight)


def test_parameters_of_ones_own_need_an_init() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    with pytest.raises(RejectedError, match="scale"):
        fresh(nn.Sequential(nn.Linear(3, 3), Own()))

    def init(model: nn.Module) -> None:
        for parameter in model.parameters():
            nn.init.uniform_(parameter)

    assert float(fresh(Own(), init=init).scale.detach().sum()) != 3.0


def test_random_erk_is_a_fixed_mask_of_that_shape() -> None:
    """Densities of Erdős–Rényi with kernels, by hand: eps × (sum of axes) / (product of axes), 1 at most."""
    program = pare.capture(fresh(small_net(), seed=4), torch.zeros(2, 3, 8, 8))
    result = sparse(model=program, criterion="random", allocation="erk", schedule="one-shot", floor=0.0, epochs=1)
    # Sums of the axes: 8+3+3+3, 16+8+3+3, 4+16. The linear layer would be above 1 and is dense: 64 of 358 weights.
    assert "8.weight" not in result.plan.masks
    for name, axes in (("0.weight", 17), ("3.weight", 30)):
        assert abs(result.plan.masks[name].num_kept - (358 - 64) * axes / (17 + 30)) <= 1


def test_the_mask_is_of_the_weights_that_are_trained() -> None:
    """SNIP's old fault: scoring one random network and training another. Here survivors start where they were scored."""
    program = pare.capture(fresh(small_net(), seed=4), torch.zeros(2, 3, 8, 8))
    seen: list[dict[str, torch.Tensor]] = []

    def look(training) -> None:
        if training.step == 0:
            seen.append({n: p.detach().clone() for n, p in training.module.named_parameters()})

    result = sparse(model=program, schedule="one-shot", epochs=1, hooks=[Hook(name="look", after_backward=look)])
    for name in WEIGHTS:
        kept = torch.from_numpy(result.plan.masks[name].kept)
        assert torch.equal(seen[0][name], program.state[name].detach() * kept)
    assert np.isfinite(float(step(result.module, next(batches())).detach()))
