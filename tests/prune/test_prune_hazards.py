"""Pruned nets against an oracle made of the user's own class: every hazard, both realisers, train mode, twice over."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hazards import HAZARDS, built, fresh
from oracle import captured, digest, distance, doubled, floats, plain, plan_of, removed_units, run, scale, zeroed
from paredown.couple import couple
from paredown.errors import NothingToDo, UsageError
from paredown.plan import Plan
from paredown.program import capture
from paredown.prune import Pruned, compose, load, prune, save

NAMES = sorted(HAZARDS)


@functools.cache
def pruned_case(name: str, realiser: Any = "graph", seed: int = 0) -> tuple[Pruned, nn.Module]:
    """The pruned net and its oracle."""
    program, coupling = captured(name)
    removed = removed_units(coupling, seed)
    if not removed:
        pytest.skip("nothing may leave")
    plan = plan_of(program, coupling, removed)
    return prune(program, plan, realiser=realiser), zeroed(built(name), coupling, removed, HAZARDS[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_equals_the_original_with_the_reads_zeroed(name: str) -> None:
    hazard = HAZARDS[name]
    before = digest(built(name))
    pruned, oracle = pruned_case(name)
    assert pruned.realiser == "graph"
    assert digest(built(name)) == before
    _agrees(name, pruned, oracle)
    for parameter, axes in pruned.plan.keep.items():
        tensor = pruned.module.state_dict().get(parameter)
        for axis, kept in axes.items():
            assert tensor is None or tensor.shape[axis] == len(kept)
    if hazard.double:
        exact, inputs = copy.deepcopy(pruned.module).double(), doubled(hazard.inputs(3))
        expected = run(copy.deepcopy(oracle).double(), inputs)
        assert distance(run(exact, inputs), expected) <= 1e-9 * scale(expected)


@pytest.mark.parametrize("name", NAMES)
def test_whatever_realiser_fits_equals_the_original_with_the_reads_zeroed(name: str) -> None:
    pruned, oracle = pruned_case(name, "auto", seed=1)
    if pruned.realiser == "module":
        assert type(pruned.module) is type(built(name))
    _agrees(name, pruned, oracle)


def _agrees(name: str, pruned: Pruned, oracle: nn.Module) -> None:
    """At three batch sizes; and the removal moves the output, so that agreement means something."""
    proof = pruned.proof
    assert proof.max_error <= 1e-4 * proof.scale
    assert proof.moved > 1e-3 * proof.scale
    for batch in (1, 3, 5):
        inputs = HAZARDS[name].inputs(batch)
        dense, expected, got = (run(m, inputs) for m in (plain(built(name)), oracle, pruned.module))
        assert distance(got, expected) <= 1e-4 * scale(dense), f"batch {batch}"
        assert distance(dense, expected) > 1e-3 * scale(dense)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("realiser", ["graph", "auto"])
def test_a_pruned_net_trains(name: str, realiser: str) -> None:
    pruned, oracle = pruned_case(name, realiser, seed=0 if realiser == "graph" else 1)
    hazard, model, oracle = HAZARDS[name], copy.deepcopy(pruned.module).train(), copy.deepcopy(oracle).train()
    args, kwargs = hazard.inputs(4)
    statistics = {n: b.clone() for n, b in model.named_buffers() if "running_" in n}
    outputs = floats(model(*args, **kwargs))
    sum(o.square().mean() for o in outputs).backward()  # type: ignore[union-attr]
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert set(missing) <= set(hazard.unused)
    assert any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
    after = dict(model.named_buffers())
    assert all(bool((after[n] != b).any()) for n, b in statistics.items())
    if hazard.stochastic:
        again = [run(model, (args, kwargs), seed) for seed in (1, 2)]
        assert distance(*again) > 1e-3 * scale(again[0])
    else:  # batch statistics included, train mode is the oracle's as well
        expected = run(oracle, (args, kwargs))
        assert distance([o.detach() for o in outputs], expected) <= 1e-4 * scale(expected)
        for n, b in oracle.named_buffers():
            if n in statistics and n in after:
                kept = pruned.plan.keep.get(n, {}).get(0)
                assert torch.allclose(after[n], b[list(kept)] if kept else b, atol=1e-4, rtol=1e-4), n
    still = copy.deepcopy(model).eval()
    assert distance(run(still, (args, kwargs), 1), run(still, (args, kwargs), 2)) == 0


FINER = (
    "bert", "complex_rotary", "computed_bias", "distilbert", "encoder_layer", "fused_qkv", "grouped", "mha", "rotary_pairs", "vit", "window_attention",
)  # fmt: skip
"""Nets in which one head (or one channel per group, or one pair) is left, so that the second coupling is finer than the first."""
SAVED = (*FINER, "residual", "lstm", "squeezed")
AGAIN = {*SAVED, *NAMES[::6]}
"""Pruned twice in the everyday suite: a second capture costs as much as all else that is done with a net."""


@pytest.mark.parametrize("name", [n if n in AGAIN else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_pruning_again_composes_and_can_be_loaded(name: str, tmp_path: Path) -> None:
    program, coupling = captured(name)
    first, _ = pruned_case(name)
    args, kwargs = HAZARDS[name].inputs(2)
    second_program = capture(first.module, {"args": args, "kwargs": kwargs}, train=program.train_graph is not None)
    assert second_program.batch == program.batch
    left = couple(second_program)
    left_over = coupling.free_units - sum(len(u) for u in removed_units(coupling, 0).values())
    lone = sum(1 for s, u in removed_units(coupling, 0).items() if len(coupling.spaces[s]) - len(u) == 1)
    assert name in FINER or left_over - lone <= left.free_units <= left_over
    removed = removed_units(left, seed=7, share=0.3)
    if not removed:
        return
    second = prune(second_program, plan_of(second_program, left, removed), realiser="graph")
    levels = compose(first, second)
    inputs = HAZARDS[name].inputs(3)
    expected = run(second.module, inputs)
    if name in FINER:
        with pytest.raises(UsageError, match="a plan must"):
            prune(program, levels.plan, realiser="graph")
    else:  # once is as good as twice
        at_once = prune(program, first.plan.then(second.plan), realiser="graph")
        assert levels.plan.keep == at_once.plan.keep
        assert distance(run(at_once.module, inputs), expected) <= 1e-5 * scale(expected)
    assert Plan.from_json(levels.plan.to_json()).digest == levels.plan.digest
    if name in SAVED:
        save(levels, tmp_path)
        loaded = load(tmp_path, fresh(name), {"args": args, "kwargs": kwargs})
        assert distance(run(loaded, inputs), expected) == 0


def test_an_unpruned_axis_stays_bit_identical() -> None:
    program, coupling = captured("same_size_uncoupled")
    removed = {0: [1, 2]}
    small = prune(program, plan_of(program, coupling, removed), realiser="graph").module
    state, original = small.state_dict(), built("same_size_uncoupled").state_dict()
    for name in ("b.weight", "b.bias", "d.weight", "c.bias"):
        assert torch.equal(state[name], original[name])


def test_a_tie_is_kept() -> None:
    pruned, _ = pruned_case("tied_convolutions")
    assert pruned.module.get_submodule("2").weight is pruned.module.get_submodule("4").weight
    pruned, _ = pruned_case("tied_convolutions", "module")
    assert pruned.module[2].weight is pruned.module[4].weight  # type: ignore[index]


def test_frozen_stays_frozen() -> None:
    for realiser in ("graph", "module"):
        pruned, _ = pruned_case("frozen", realiser)
        frozen = {n for n, p in pruned.module.named_parameters() if not p.requires_grad}
        assert frozen == {"a.weight"}


def test_a_plan_that_keeps_all_is_nothing_to_do() -> None:
    program, _ = captured("conv_chain")
    with pytest.raises(NothingToDo):
        prune(program, Plan(keep={}))


@pytest.mark.parametrize("realiser", ["graph", "module"])
def test_nothing_is_shared_with_the_users_model(realiser: str) -> None:
    before = digest(built("residual"))
    pruned, _ = pruned_case("residual", realiser)
    theirs = {t.data_ptr() for t in (*built("residual").parameters(), *built("residual").buffers())}
    mine = {t.data_ptr() for t in (*pruned.module.parameters(), *pruned.module.buffers())}
    assert not theirs & mine
    model = copy.deepcopy(pruned.module).train()
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    model(HAZARDS["residual"].inputs(2)[0][0]).sum().backward()
    step.step()
    assert digest(built("residual")) == before
