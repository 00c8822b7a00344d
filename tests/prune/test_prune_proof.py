"""The proof itself: it must catch wrong cuts, and must not be satisfied by nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hazards import HAZARDS, Net, conv, healthy, random
from oracle import captured, plan_of, removed_units
from paredown.couple import couple
from paredown.couple.trace import trace
from paredown.errors import ParedownError, UsageError, VerificationError
from paredown.plan import Plan
from paredown.program import Program, capture
from paredown.prune import Pruned, prune
from paredown.prune.graph import realise_graph
from paredown.prune.prove import distance, prove, reference, scale_of
from paredown.prune.removal import removal


def some(name: str, seed: int = 0) -> tuple[Program, Plan]:
    program, coupling = captured(name)
    return program, plan_of(program, coupling, removed_units(coupling, seed))


@pytest.mark.parametrize(
    "name",
    ["residual", "option_a", "channel_shuffle", "fused_qkv", "convnext_block", "tied_embedding", "squeeze_excite"],
)
def test_a_wrong_cut_is_caught(name: str) -> None:
    """The module of another plan with the same sizes: every number fits, the channels are the wrong ones."""
    program, plan = some(name)
    gone = removal(trace(program), plan)
    known = reference(program, gone)
    _, other = some(name, seed=3)
    assert other.keep != plan.keep
    wrong = realise_graph(program, removal(trace(program), other))
    right = realise_graph(program, gone)
    assert [p.shape for p in wrong.parameters()] == [p.shape for p in right.parameters()]
    prove(program, right, gone, known)
    # The proof loads its own weights into the module: a module that reorders channels must differ.
    with pytest.raises(VerificationError) as error:
        prove(program, _Reordered(right), gone, known)
    assert error.value.exit_code == 6
    assert error.value.evidence.max_error > 1e-4 * error.value.evidence.scale


class _Reordered(nn.Module):
    """The same net, but the channels of its first matrix are in another order when it runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["_wrapped"] = module
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, p in module.named_parameters(recurse=False):
            self.register_parameter(name, p)
        for name, b in module.named_buffers(recurse=False):
            self.register_buffer(name, b)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = next(p for p in self._wrapped.parameters() if p.dim() >= 2)
        with torch.no_grad():
            kept = first.clone()
            first.copy_(first.flip(0))
            out = self._wrapped(*args, **kwargs)
            first.copy_(kept)
        return out


def test_a_torn_or_pinned_plan_is_refused() -> None:
    program, coupling = captured("residual")
    with pytest.raises(UsageError, match="together"):
        prune(program, Plan(keep={"stem.weight": {0: tuple(range(7))}}))
    with pytest.raises(UsageError, match="model output"):
        prune(program, Plan(keep={"head.weight": {0: (0, 1)}, "head.bias": {0: (0, 1)}}))
    with pytest.raises(UsageError, match=r"nosuch\.weight"):
        prune(program, Plan(keep={"nosuch.weight": {0: (0, 1)}}))
    with pytest.raises(UsageError, match="axis 3"):
        prune(program, Plan(keep={"stem.weight": {3: (0,)}}))
    plan = plan_of(program, coupling, {1: [0]})
    keep = {p: dict(a) for p, a in plan.keep.items()}
    keep["b.weight"] = {1: (*keep["b.weight"][1][:-1], 6)}
    with pytest.raises(UsageError, match="below the length 6"):
        prune(program, Plan(keep=keep))


def net(run: Any, **parts: Any) -> nn.Module:
    return healthy(Net(run, **parts)).eval()


def pruned_or_refused(model: nn.Module, x: Tensor) -> Pruned | ParedownError:
    program = capture(model, x)
    coupling = couple(program)
    removed = removed_units(coupling, 0)
    assert removed
    try:
        return prune(program, plan_of(program, coupling, removed))
    except ParedownError as error:
        return error


def not_vacuous(result: Pruned | ParedownError) -> None:
    if isinstance(result, Pruned):
        proof = result.proof
        assert 0 < proof.scale < float("inf")
        assert 1e-6 * proof.scale < proof.moved < float("inf")
        assert proof.max_error <= 1e-4 * proof.scale


def test_an_output_that_overflows_proves_nothing() -> None:
    model = net(lambda m, x: torch.exp(torch.exp(40 * m.b(m.a(x)).square() + 30)), a=conv(3, 6), b=conv(6, 3))
    result = pruned_or_refused(model, random(2, 3, 8, 8))
    assert isinstance(result, VerificationError)
    assert "finite" in str(result)


def test_an_output_that_is_constant_proves_nothing() -> None:
    model = net(lambda m, x: torch.sign(m.b(m.a(x)).square() + 1e6), a=conv(3, 6), b=conv(6, 3))
    result = pruned_or_refused(model, random(2, 3, 8, 8))
    assert isinstance(result, VerificationError)
    assert "move" in str(result)


def test_an_output_of_integers_is_compared_as_well() -> None:
    model = net(lambda m, x: m.b(m.a(x)).flatten(1).argmax(1), a=conv(3, 6), b=conv(6, 3))
    result = pruned_or_refused(model, random(2, 3, 8, 8))
    assert isinstance(result, ParedownError) or result.proof.scale > 0


def test_both_parts_of_a_complex_output_are_compared() -> None:
    one, other = torch.tensor([1 + 2j, 3 - 4j]), torch.tensor([1 + 2j, 3 - 1j])
    assert distance([one], [other]) == 3.0
    assert scale_of([one]) == 4.0


def test_a_net_that_is_not_finite_on_random_weights_is_not_passed() -> None:
    model = net(lambda m, x: torch.log(m.b(m.a(x))), a=conv(3, 6), b=conv(6, 3))
    with torch.no_grad():
        model.get_parameter("b.bias").fill_(50.0)
    result = pruned_or_refused(model, random(2, 3, 8, 8))
    assert isinstance(result, VerificationError)


def test_the_proof_does_not_depend_on_the_users_weights() -> None:
    """All-zero weights would make any comparison hold; the proof brings its own."""
    model = HAZARDS["residual"].build().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    result = pruned_or_refused(model, random(2, 3, 8, 8))
    assert isinstance(result, Pruned)
    not_vacuous(result)
    assert result.proof.own_move == 0


def test_proof_numbers_are_the_same_each_time() -> None:
    program, plan = some("residual")
    assert dataclasses.asdict(prune(program, plan).proof) == dataclasses.asdict(prune(program, plan).proof)


def test_the_train_graph_is_held_to_the_same_standard() -> None:
    """What only train mode does with channels must not be wrong in silence."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        if m.training:
            y = y + m.noise * y.roll(1, 1)
        return m.b(y)

    model = net(run, a=conv(3, 6), b=conv(6, 3), noise=nn.Parameter(torch.ones(6, 1, 1)))
    assert couple(capture(model, random(2, 3, 8, 8))).free_units == 0


def test_a_module_under_two_names_keeps_its_own_weights() -> None:
    """functional_call left the proof's random weights in a module that is there under two names."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            block = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
            self.first, self.second = block, block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.second(x + self.first(x))

    torch.manual_seed(0)
    net, x = Twice().eval(), torch.randn(3, 4)
    program = capture(net, x)
    keep = {"first.0.weight": {0: (0, 2, 5)}, "first.0.bias": {0: (0, 2, 5)}, "first.3.weight": {1: (0, 2, 5)}}
    keep |= {f"first.1.{leaf}": {0: (0, 2, 5)} for leaf in ("weight", "bias", "running_mean", "running_var")}
    module, graph = (prune(program, Plan(keep=keep), realiser=r) for r in ("module", "graph"))
    assert torch.equal(module.module.first[0].weight, net.first[0].weight[[0, 2, 5]])  # type: ignore[union-attr, index]
    assert torch.allclose(module.module(x), graph.module(x), atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_one_channel_behind_a_relu_can_always_be_proven(seed: int) -> None:
    """Random weights leave it dead in half of all draws: they are drawn until it shows."""
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3))
    plan = Plan(keep={"0.weight": {0: (1,)}, "0.bias": {0: (1,)}, "2.weight": {1: (1,)}})
    proof = prune(capture(net, random(2, 3), train=False), plan, seed=seed).proof
    assert proof.moved > 1e-3 * proof.scale
