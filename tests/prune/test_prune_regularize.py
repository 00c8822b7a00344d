"""Penalties on coupled groups and channel gates: what they push, by how much, and what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import paredown as pare
from hazards import HAZARDS, Net
from paredown.errors import UsageError
from paredown.prune.gates import ChannelGates, Gates
from paredown.prune.regularize import Growing, Slimming, elements, growing, slimming
from paredown.train import fit
from paredown.train.loop import Hook, Training
from sparse_task import BATCHES, assert_resumes, batches, program, small_net, sparse, step

CHANNELS: dict[str, Any] = {"granularity": "channel", "density": None, "budget": pare.Budget(channels=0.5), "align": 1}


def half() -> pare.Plan:
    """Half of the channels, by l1."""
    coupling = pare.couple(program())
    return pare.allocate(
        coupling, pare.score(program(), coupling), pare.examine(program()), pare.Budget(channels=0.5), align=1
    )


def leaving(plan: pare.Plan) -> dict[str, torch.Tensor]:
    """1 for each element that the plan removes, by hand from its kept indices."""
    found = {}
    for name, parameter in small_net().named_parameters():
        stays = torch.ones_like(parameter)
        for axis, kept in plan.keep.get(name, {}).items():
            gone = [i for i in range(parameter.shape[axis]) if i not in kept]
            stays.index_fill_(axis, torch.tensor(gone), 0.0)
        found[name] = 1 - stays
    return found


def test_growing_adds_lambda_w_to_whole_groups() -> None:
    plan, how = half(), Growing(epochs=2, most=3.0, ramp=0.5)
    coupling = pare.couple(program())
    before: list[dict[str, torch.Tensor]] = []
    after: list[dict[str, torch.Tensor]] = []

    def grads(training: Training) -> dict[str, torch.Tensor]:
        return {n: p.grad.clone() for n, p in training.module.named_parameters()}

    hooks = [
        Hook(name="a", after_backward=lambda t: before.append(grads(t))),
        growing(coupling, how, plan),
        Hook(name="b", after_backward=lambda t: after.append({**grads(t), **{f"w {n}": p.detach().clone() for n, p in t.module.named_parameters()}})),
    ]  # fmt: skip
    fit(small_net(), batches, step, epochs=2, lr=0.01, hooks=hooks)
    assert len(after) == 2 * BATCHES
    gone = leaving(plan)
    assert sum(int(g.sum()) for g in gone.values()) > 600
    for t in (0, 3, 7, 8, 15):
        weight = 3.0 * min(1.0, t / 8)
        for name, share in gone.items():
            assert torch.allclose(after[t][name], before[t][name] + weight * share * after[t][f"w {name}"], atol=1e-6)


def test_what_is_chosen_fades_and_the_rest_does_not() -> None:
    plan = half()
    hook = growing(pare.couple(program()), Growing(epochs=6, most=5.0), plan)
    done = fit(small_net(), batches, step, epochs=6, lr=0.05, hooks=[hook]).module
    start = dict(small_net().named_parameters())
    gone = leaving(plan)
    for name in ("0.weight", "3.weight"):
        now, then, share = dict(done.named_parameters())[name].detach(), start[name].detach(), gone[name].bool()
        assert float(now[share].norm()) < 0.05 * float(then[share].norm())
        assert float(now[~share].norm()) > 0.5 * float(then[~share].norm())


def test_all_units_of_a_residual_stream_are_one_group() -> None:
    hazard = HAZARDS["residual"]
    net, (args, kwargs) = hazard.build(), hazard.inputs(2)
    found = pare.capture(net, {"args": args, "kwargs": kwargs})
    coupling = pare.couple(found)
    cut = elements(coupling, None)
    space = max(coupling.spaces, key=lambda s: len(s.footprints))
    assert len({f.parameter for f in space.footprints if f.role == "write"}) > 1
    assert {f.parameter for f in space.footprints} <= cut.keys()


def test_slimming_pulls_scales_by_their_sign() -> None:
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    hooks = [
        Hook(name="a", after_backward=lambda t: before.append(t.module[1].weight.grad.clone())),
        slimming(program(), pare.couple(program()), Slimming(strength=0.25)),
        Hook(name="b", after_backward=lambda t: after.append(t.module[1].weight.grad.clone())),
    ]
    net = small_net()
    with torch.no_grad():
        net[1].weight[::2] *= -1
    fit(net, batches, step, epochs=1, lr=1e-4, hooks=hooks)
    sign = torch.tensor([-1.0, 1.0]).repeat(4)
    assert torch.allclose(after[0] - before[0], 0.25 * sign, atol=1e-6)


def test_slimming_needs_batch_norms() -> None:
    found = pare.capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.zeros(2, 8))
    with pytest.raises(UsageError, match="batch norms"):
        slimming(found, pare.couple(found), Slimming())


@pytest.mark.parametrize(
    "options",
    [
        {"regularize": Growing(epochs=1)},
        {"regularize": Growing(epochs=1, chosen="last")},
        {"regularize": Slimming(epochs=1), "criterion": "bn_scale"},
        {"criterion": Gates(epochs=1)},
    ],
    ids=["growing", "growing, chosen last", "slimming", "gates"],
)
def test_units_leave_with_proof_and_resume(options: dict[str, Any], tmp_path: Path) -> None:
    result = sparse(**CHANNELS, **options, epochs=2)
    assert result.proof.moved > 0 and result.proof.max_error <= 1e-4 * result.proof.scale
    assert sum(p.numel() for p in result.module.parameters()) < 0.6 * sum(p.numel() for p in small_net().parameters())
    assert result.program is program()
    assert_resumes(tmp_path, BATCHES + 3, **CHANNELS, **options, epochs=2)


def test_a_penalty_makes_the_removal_smaller() -> None:
    """What has faded moves the output less when it goes: that is what the penalty is for."""
    moves = [
        sparse(**CHANNELS, regularize=r, epochs=0, batch_norm_batches=0, lr=0.05).proof.own_move
        for r in (Growing(epochs=6, most=5.0), Growing(epochs=6, most=1e-9))
    ]
    assert moves[0] < 0.5 * moves[1]


# ----------------------------------------------------------------------------------------------------------------- gates


def gated(net: nn.Sequential, gates: dict[str, torch.Tensor]):
    """The network with gates after its batch norms, written out."""

    def run(x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(net[1](net[0](x)) * gates["first"][:, None, None])
        x = torch.relu(net[4](net[3](x)) * gates["second"][:, None, None])
        return net[8](torch.flatten(net[6](x), 1))

    return run


def test_gates_learn_by_autograd_after_batch_norm() -> None:
    """5 steps of Adam on gates written out after each batch norm, with the pull to the ratio."""
    net = small_net().train()
    gates = {"first": torch.full((8,), 0.5, requires_grad=True), "second": torch.full((16,), 0.5, requires_grad=True)}
    optimizer = torch.optim.Adam(gates.values(), lr=0.05)
    torch.manual_seed(0)
    data = list(batches())[:5]
    for x, y in data:
        optimizer.zero_grad()
        mean = torch.cat(list(gates.values())).mean()
        (nn.functional.cross_entropy(gated(net, gates)(x), y) + 2.0 * (mean - 0.3) ** 2).backward()
        optimizer.step()
        with torch.no_grad():
            for gate in gates.values():
                gate.clamp_(0, 1)
    coupling = pare.couple(program())
    channel = ChannelGates(program(), coupling, Gates(epochs=1, lr=0.05, ratio=0.3, balance=2.0))
    module = small_net()
    channel.set(module)
    done = fit(module, lambda: data, step, epochs=1, lr=123.0, hooks=[channel.hook()]).module
    found = channel.scores().by_space
    assert np.allclose(found["0.weight[0]"], gates["first"].detach().numpy(), atol=1e-5)
    assert np.allclose(found["3.weight[0]"], gates["second"].detach().numpy(), atol=1e-5)
    assert found["0.weight[0]"].std() > 0.01
    for number in (0, 3, 8):  # weights stood still, whatever the learning rate
        assert torch.equal(done[number].weight, small_net()[number].weight)
    assert torch.allclose(done[1].weight, small_net()[1].weight * gates["first"].detach(), atol=1e-5)


def test_gates_on_rows_where_no_batch_norm_is() -> None:
    """Two gates act on one weight here: its rows and its columns belong to different spaces."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    found = pare.capture(net, torch.zeros(2, 6))
    channel = ChannelGates(found, pare.couple(found), Gates(epochs=1, lr=0.02, balance=0.0))
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(16, 6, generator=g), torch.randint(3, (16,), generator=g)) for _ in range(4)]
    first, second = torch.full((8,), 0.5, requires_grad=True), torch.full((5,), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([first, second], lr=0.02)
    for x, y in data:
        optimizer.zero_grad()
        h = torch.relu(net[0](x) * first)
        nn.functional.cross_entropy(net[4](torch.relu(net[2](h) * second)), y).backward()
        optimizer.step()
    module = nn.Sequential(*list(net))
    channel.set(module)
    fit(module, lambda: data, step, epochs=1, hooks=[channel.hook()])
    scores = channel.scores().by_space
    assert np.allclose(scores["0.weight[0]"], first.detach().numpy(), atol=1e-5)
    assert np.allclose(scores["2.weight[0]"], second.detach().numpy(), atol=1e-5)


def test_gates_find_the_channels_that_carry_something() -> None:
    """A random network of which half the channels are dead weight: their gates fall behind."""
    net = small_net(3)
    with torch.no_grad():
        net[8].weight[:, ::2] = 0.0
    found = pare.capture(net, torch.zeros(2, 3, 8, 8))
    result = sparse(model=found, **CHANNELS, criterion=Gates(epochs=6, lr=0.05, ratio=0.3, balance=2.0), epochs=0)
    kept = result.plan.keep["3.weight"][0]
    assert sum(i % 2 for i in kept) >= 0.75 * len(kept)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Growing(epochs=0),
        lambda: Growing(most=0.0),
        lambda: Growing(ramp=0.0),
        lambda: Growing(chosen="middle"),
        lambda: Slimming(strength=0.0),
        lambda: Gates(epochs=0),
        lambda: Gates(ratio=1.0),
        lambda: Gates(start=0.0),
    ],
)
def test_bad_options_are_refused(make) -> None:
    with pytest.raises(UsageError, match="must"):
        make()


@pytest.mark.parametrize(
    "how",
    [
        {**CHANNELS, "regularize": Growing(epochs=1)},
        {"granularity": "row", "density": 0.5, "schedule": "one-shot"},
    ],
    ids=["growing", "rows"],
)
def test_a_net_that_only_a_graph_fits_trains_on(how: dict[str, Any]) -> None:
    """What was trained before the removal lost its requires_grad, and then nothing could be trained any more."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.head(m.scale * torch.relu(m.a(x)).view(-1, 6))

    net = Net(forward, a=nn.Linear(5, 6), scale=nn.Parameter(torch.ones(6)), head=nn.Linear(6, 3))
    net.head.bias.requires_grad_(False)  # type: ignore[union-attr]
    torch.manual_seed(0)
    data = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(3)]
    small = sparse(model=pare.capture(net, torch.zeros(2, 5)), train_batches=lambda: data, epochs=1, **how)
    assert small.realiser == "graph"
    trainable = {n: p.requires_grad for n, p in small.module.named_parameters()}
    assert trainable == {n: n != "head.bias" for n in ("a.weight", "a.bias", "scale", "head.weight", "head.bias")}
    assert small.module.get_parameter("a.weight").shape == (3, 5)
