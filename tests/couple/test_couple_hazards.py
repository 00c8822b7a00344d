"""Coupling of every hazard: what is free and pinned, counted by hand; and units that can trade places."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hazards import HAZARDS, built
from oracle import captured, distance, plain, run, scale
from paredown.couple import Coupling, couple
from paredown.errors import RejectedError
from paredown.program import capture

NAMES = sorted(HAZARDS)


def footprints(coupling: Coupling, space: int) -> dict[tuple[str, int], tuple[str, list[list[int]]]]:
    return {(f.parameter, f.axis): (f.role, f.indices.tolist()) for f in coupling.spaces[space].footprints}


# A linear layer over tokens lets the channels through and keeps its own size: the mixer's 7 hidden tokens stay. To be won.
COARSER = {"mixer"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.xfail(n in COARSER, reason="coarser than need be", strict=True)) for n in NAMES],
)
def test_what_is_free_and_what_is_pinned(name: str) -> None:
    hazard = HAZARDS[name]
    _, coupling = captured(name)
    if hazard.free is not None:
        assert coupling.free_units == hazard.free
    if hazard.spaces is not None:
        assert len(coupling.spaces) == hazard.spaces
    told = " ".join(f"{p.reason} {p.where}" for p in coupling.pinned)
    for text in hazard.because:
        assert text in told
    if hazard.unknown:
        assert any(hazard.unknown in op for op in coupling.unknown_ops)
    assert coupling.free_units > 0 or coupling.pinned_units > 0
    assert all(p.reason and p.units > 0 for p in coupling.pinned)


@pytest.mark.parametrize("name", NAMES)
def test_units_are_disjoint_and_in_range(name: str) -> None:
    program, coupling = captured(name)
    taken: dict[tuple[str, int], list[int]] = {}
    for space in coupling.spaces:
        for f in space.footprints:
            assert f.indices.shape[0] == len(space)
            taken.setdefault((f.parameter, f.axis), []).extend(f.indices.ravel().tolist())
        assert space.units[0].slices
        assert any(f.role == "write" for f in space.footprints) or any(f.role == "read" for f in space.footprints)
    for (parameter, axis), indices in taken.items():
        assert len(indices) == len(set(indices))
        assert 0 <= min(indices) <= max(indices) < program.state[parameter].shape[axis]
    assert len({s.name for s in coupling.spaces}) == len(coupling.spaces)


@pytest.mark.parametrize("name", [n for n in NAMES if HAZARDS[n].permutable])
def test_units_of_a_space_can_trade_places(name: str) -> None:
    """The symmetry behind coupling, without any zeroing: permuted everywhere at once, the function stays."""
    _, coupling = captured(name)
    if not coupling.spaces:
        pytest.skip("nothing may leave")
    model = plain(built(name))
    moved = copy.deepcopy(model)
    tensors = {
        **dict(moved.named_parameters(remove_duplicate=False)),
        **dict(moved.named_buffers(remove_duplicate=False)),
    }
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for space in coupling.spaces:
            if all(f.parameter in tensors for f in space.footprints):
                _trade(tensors, space.footprints, rng.permutation(len(space)))
    inputs = HAZARDS[name].inputs(2)
    expected = run(model, inputs)
    assert distance(run(moved, inputs), expected) <= 1e-5 * scale(expected)


def _trade(tensors: dict[str, Tensor], prints: Any, order: Any) -> None:
    for f in prints:
        tensor = tensors[f.parameter]
        to, source = (torch.from_numpy(i.ravel().copy()) for i in (f.indices, f.indices[order]))
        tensor.index_copy_(f.axis, to, tensor.index_select(f.axis, source))


@pytest.mark.parametrize("name", ["residual", "mha", "shuffle_unit", "tied_embedding", "window_attention"])
def test_the_answer_does_not_depend_on_weights_or_the_run(name: str) -> None:
    program, coupling = captured(name)
    model = copy.deepcopy(built(name))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-3.0)
    args, kwargs = HAZARDS[name].inputs(3)
    other = couple(capture(model, {"args": args, "kwargs": kwargs}))
    assert [s.name for s in other.spaces] == [s.name for s in coupling.spaces]
    for one, two in zip(coupling.spaces, other.spaces, strict=True):
        assert all(
            np.array_equal(a.indices, b.indices) and a.role == b.role
            for a, b in zip(one.footprints, two.footprints, strict=True)
        )
    assert couple(program).pinned == coupling.pinned


# ------------------------------------------------------------------------------------------- key hazards, one by one


def test_a_residual_ties_both_writers_and_all_readers() -> None:
    _, coupling = captured("residual")
    stream = footprints(coupling, 0)
    ones = [[i] for i in range(8)]
    assert stream == {
        ("stem.weight", 0): ("write", ones),
        ("stem.bias", 0): ("write", ones),
        ("a.weight", 1): ("read", ones),
        ("b.weight", 0): ("write", ones),
        ("b.bias", 0): ("write", ones),
        ("head.weight", 1): ("read", ones),
    }
    inner = footprints(coupling, 1)
    assert {p for p, _ in inner} == {
        "a.weight",
        "a.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "b.weight",
    }


def test_concatenated_channels_stay_apart_and_know_their_place() -> None:
    _, coupling = captured("concat")
    assert footprints(coupling, 0)[("head.weight", 1)] == ("read", [[0], [1], [2], [3]])
    assert footprints(coupling, 1)[("head.weight", 1)] == ("read", [[4], [5], [6], [7], [8], [9]])
    assert footprints(coupling, 1)[("norm.running_var", 0)][1] == [[4], [5], [6], [7], [8], [9]]


def test_depthwise_follows_its_input() -> None:
    _, coupling = captured("depthwise")
    assert footprints(coupling, 0)[("3.weight", 0)] == ("write", [[i] for i in range(8)])
    assert ("3.weight", 1) not in footprints(coupling, 0)
    _, coupling = captured("depthwise_multiplier")
    assert footprints(coupling, 0)[("1.weight", 0)][1] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert coupling.spaces[0].width == 3


def test_option_a_shortcuts_meet_at_an_offset() -> None:
    _, coupling = captured("option_a")
    shared = footprints(coupling, 0)
    assert shared[("stem.weight", 0)][1] == [[0], [1], [2], [3]]
    assert shared[("a.weight", 0)][1] == [[2], [3], [4], [5]]
    assert shared[("norm.weight", 0)][1] == [[2], [3], [4], [5]]
    assert footprints(coupling, 1)[("a.weight", 0)][1] == [[0], [1], [6], [7]]


def test_a_shuffled_channel_is_read_where_it_went() -> None:
    _, coupling = captured("channel_shuffle")
    assert footprints(coupling, 0)[("a.weight", 0)][1] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert footprints(coupling, 0)[("b.weight", 1)][1] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_flatten_expands_a_channel_into_its_pixels() -> None:
    _, coupling = captured("flatten_linear")
    reads = footprints(coupling, 0)[("4.weight", 1)][1]
    assert reads == [list(range(49 * c, 49 * (c + 1))) for c in range(6)]


def test_heads_leave_whole() -> None:
    _, coupling = captured("fused_qkv")
    heads = next(s for s in coupling.spaces if s.kind == "head")
    by = {(f.parameter, f.axis): f.indices.tolist() for f in heads.footprints}
    assert len(heads) == 2
    assert by[("qkv.weight", 0)][0] == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    assert by[("proj.weight", 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    _, coupling = captured("grouped_query")
    by = footprints(coupling, 0)
    assert by[("k.weight", 0)][1] == [[0, 1], [2, 3], [4, 5]]
    assert by[("q.weight", 0)][1] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    _, coupling = captured("window_attention")
    assert all("table" not in p for p in {f.parameter for s in coupling.spaces for f in s.footprints} - {"table"})


def test_same_size_is_not_coupled() -> None:
    _, coupling = captured("same_size_uncoupled")
    assert [{f.parameter for f in s.footprints} for s in coupling.spaces] == [
        {"a.weight", "a.bias", "c.weight"},
        {"b.weight", "b.bias", "d.weight"},
    ]


def test_tied_weights_are_one_decision() -> None:
    _, coupling = captured("tied_convolutions")
    by = footprints(coupling, 0)
    assert by[("2.weight", 0)] == by[("2.weight", 1)] or {by[("2.weight", 0)][0], by[("2.weight", 1)][0]} == {
        "write",
        "read",
    }
    assert by[("2.weight", 0)][1] == by[("2.weight", 1)][1] == [[i] for i in range(8)]
    _, coupling = captured("tied_embedding")
    stream = next(s for s in coupling.spaces if len(s) == 8)
    assert {f.parameter: f.role for f in stream.footprints}["table.weight"] == "read"


def test_outputs_are_pinned_with_a_reason() -> None:
    _, coupling = captured("conv_chain")
    (pin,) = coupling.pinned
    assert (pin.reason, pin.units, set(pin.parameters)) == ("model output", 4, {"5.weight[0]", "5.bias[0]"})
    _, coupling = captured("hidden_output")
    assert {p for pin in coupling.pinned if pin.reason == "model output" for p in pin.parameters} >= {
        "a.weight[0]",
        "c.weight[0]",
    }


def test_an_unknown_op_is_named_with_its_line_and_refused_when_strict() -> None:
    program, coupling = captured("custom_op")
    pin = next(p for p in coupling.pinned if "swap_pairs" in p.reason)
    assert pin.units == 6
    assert "hazards.py:" in pin.where
    assert "a.weight[0]" in pin.parameters
    with pytest.raises(RejectedError, match="swap_pairs"):
        couple(program, strict=True)
    couple(captured("residual")[0], strict=True)


def test_a_net_without_weights_has_nothing_to_couple() -> None:
    coupling = couple(capture(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(2, 3, 4)))
    assert (coupling.free_units, coupling.pinned_units, coupling.spaces) == (0, 0, ())


def test_channels_go_through_a_layer_over_the_tokens() -> None:
    """Each channel is mixed over the tokens by itself; what was pinned is the layer's own size, not the stream."""
    _, coupling = captured("mixer")
    assert {s.name: len(s) for s in coupling.spaces} == {"inner.weight[0]": 8, "c.weight[0]": 12}
    stream = footprints(coupling, 0)
    assert {p for p, _ in stream} >= {"one.weight", "two.weight", "c.weight", "d.weight", "head.weight"}
    assert not {p for p, _ in stream} & {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert {p.units for p in coupling.pinned if "another axis" in p.reason} == {7, 6}


def test_a_coupling_tells_itself_in_a_line() -> None:
    assert repr(captured("residual")[1]) == "Coupling(2 spaces, 14 units free, 4 pinned (model output: 4))"
    assert "ops without a rule: {'paredown_tests.swap_pairs.default': 1}" in repr(captured("custom_op")[1])
