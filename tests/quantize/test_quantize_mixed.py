"""Bits per layer within a budget: the program against trying everything, the table against direct measurement."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deploy_nets

pytest.importorskip("torchao")

from paredown.errors import NothingToDo, RejectedError, UsageError
from paredown.export import check, export
from paredown.program import Program, capture
from paredown.quantize.mixed import Allotment, allot
from paredown.quantize.packed import save_packed


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Program, Tensor]:
    torch.manual_seed(1)
    net, _ = deploy_nets.made("residual")
    x = torch.randn(64, 1, 8, 8)
    return net.eval(), capture(net, x[:2], train=False), x


@pytest.fixture(scope="module")
def found(case: tuple[nn.Module, Program, Tensor]) -> Allotment:
    _, program, x = case
    return allot(program, calibrate=[x], as_uniform=4, widths=(8, 4, 3, 2))


def test_no_other_choice_is_better(found: Allotment) -> None:
    groups = [list(g) for _, g in itertools.groupby(found.widths, key=lambda w: w.layer)]
    assert len(groups) == 6 and all(len(g) == 4 for g in groups)
    fitting = [c for c in itertools.product(*groups) if sum(w.size_bytes for w in c) <= found.budget]
    assert 1 < len(fitting) < 4**6
    least = min(sum(w.error for w in c) for c in fitting)
    assert found.exact and found.mixed.predicted_error == pytest.approx(least, rel=1e-9)
    assert found.mixed.size_bytes <= found.budget and found.uniform is not None
    assert set(found.uniform.bits.values()) == {4} and found.uniform.size_bytes == found.budget


def test_it_is_measured_as_a_whole_and_beats_the_uniform_one(
    found: Allotment, case: tuple[nn.Module, Program, Tensor]
) -> None:
    net, _, x = case
    with torch.no_grad():
        wanted, got = net(x), found.quantized.module(x)
    error = float((got - wanted).double().square().sum() / wanted.double().square().sum())
    assert found.mixed.error == pytest.approx(error, rel=1e-4)
    assert found.uniform is not None and found.mixed.error < found.uniform.error
    assert len(set(found.mixed.bits.values())) > 1
    assert {n: p.bits for n, p in found.quantized.weights.items()} == dict(found.mixed.bits)
    assert found.plan.schemes == {n: f"w{b}a8" for n, b in found.mixed.bits.items()}


def test_the_table_says_what_a_layer_alone_does_and_costs(
    found: Allotment, case: tuple[nn.Module, Program, Tensor], tmp_path: Path
) -> None:
    net, _, x = case
    head = {w.bits: w for w in found.widths if w.layer == "head.weight"}
    assert head[2].error > head[4].error > head[8].error > 0
    assert [head[b].size_bytes for b in (8, 4, 2)] == [160 + 40, 80 + 40, 40 + 40]
    assert head[4].bops == 160 * 4 * 8
    stem = next(w for w in found.widths if w.layer == "stem.weight" and w.bits == 3)
    assert stem.bops == 64 * 8 * 9 * 3 * 8  # 8 × 8 positions, 8 channels, 9 inputs
    packed = found.quantized.weights["head.weight"]
    one = next(w for w in found.widths if w.layer == "head.weight" and w.bits == packed.bits)
    with torch.no_grad():
        wanted, kept = net(x), net.head.weight.clone()  # type: ignore[union-attr,operator]
        net.head.weight.copy_(packed.unpack())  # type: ignore[union-attr,operator]
        alone = float((net(x) - wanted).double().square().sum() / wanted.double().square().sum())
        net.head.weight.copy_(kept)  # type: ignore[union-attr,operator]
    assert one.error == pytest.approx(alone, rel=1e-3)
    size = save_packed(found.quantized.weights, tmp_path / "w.safetensors")
    assert size.codes_bytes + size.scales_bytes == found.mixed.size_bytes


def test_the_table_measures_one_scale_where_one_is_asked_for(case: tuple[nn.Module, Program, Tensor]) -> None:
    """Else the program chooses by errors that the result does not have: channels of the head differ thirtyfold."""
    net, _, x = case
    kept = net.head.weight.detach().clone()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        net.head.weight[0] *= 30  # type: ignore[union-attr,index]
        program, wanted = capture(net, x[:2], train=False), net(x)
    try:
        found = allot(program, calibrate=[x], as_uniform=4, widths=(4,), weights="tensor")
        packed = found.quantized.weights["head.weight"]
        assert len(set(packed.scales.tolist())) == 1
        with torch.no_grad():
            net.head.weight.copy_(packed.unpack())  # type: ignore[union-attr,operator]
            alone = float((net(x) - wanted).double().square().sum() / wanted.double().square().sum())
    finally:
        with torch.no_grad():
            net.head.weight.copy_(kept)  # type: ignore[union-attr,operator]
    one = next(w for w in found.widths if w.layer == "head.weight")
    assert one.error == pytest.approx(alone, rel=1e-3)


def test_bit_operations_as_the_budget_and_a_file_that_runs(
    case: tuple[nn.Module, Program, Tensor], tmp_path: Path
) -> None:
    _, program, x = case
    most = allot(program, calibrate=[x], bops=4_000_000, widths=(8, 4, 2), repair=("gptq",))
    assert most.kind == "bops" and most.mixed.bops <= 4_000_000 < sum(w.bops for w in most.widths if w.bits == 8)
    assert check(export(most.quantized, tmp_path / "net.onnx"), most.quantized, [x]).holds


def test_a_budget_that_nothing_keeps_names_the_nearest_plan(case: tuple[nn.Module, Program, Tensor]) -> None:
    _, program, x = case
    with pytest.raises(NothingToDo, match=r"must hold the narrowest widths, [\d,]+ size_bytes. Got 100") as caught:
        allot(program, calibrate=[x], size_bytes=100, widths=(8, 2))
    assert set(caught.value.nearest.schemes.values()) == {"w2a8"} and caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "exactly one"),
        ({"size_bytes": 10, "bops": 10}, "exactly one"),
        ({"size_bytes": 0.5}, "an integer"),
        ({"bops": 10, "widths": (9,)}, "from 1 to 8"),
        ({"as_uniform": 5}, "one of the widths"),
    ],
)
def test_wrong_requests(asked: dict[str, Any], says: str, case: tuple[nn.Module, Program, Tensor]) -> None:
    _, program, x = case
    with pytest.raises(UsageError, match=says):
        allot(program, calibrate=[x], **asked)


def test_a_generator_of_samples_is_gone_through_as_often_as_needed() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 16)
    program = capture(net, x[:2], train=False)
    once = allot(program, calibrate=(part for part in x.split(16)), as_uniform=4)
    again = allot(program, calibrate=list(x.split(16)), as_uniform=4)
    assert once.mixed == again.mixed and once.uniform == again.uniform
    spent = iter([x])
    with pytest.raises(RejectedError, match="fresh iterable"):
        allot(program, calibrate=lambda: spent, as_uniform=4)


def test_errors_that_are_known_take_the_place_of_measuring(
    found: Allotment, case: tuple[nn.Module, Program, Tensor]
) -> None:
    """The same numbers choose the same bits; others choose others; a hole is refused."""
    _, program, x = case
    known: dict[str, dict[int, float]] = {}
    for width in found.widths:
        known.setdefault(width.layer, {})[width.bits] = width.error
    again = allot(program, calibrate=[x], as_uniform=4, widths=(8, 4, 3, 2), sensitivity=known)
    assert (again.mixed.bits, again.widths) == (found.mixed.bits, found.widths)
    first = next(iter(known))
    heavy = {**known, first: {b: 1e6 * (8 - b) for b in known[first]}}
    assert allot(program, calibrate=[x], as_uniform=4, widths=(8, 4, 3, 2), sensitivity=heavy).mixed.bits[first] == 8
    with pytest.raises(UsageError, match=f"Got none for {first} at 3 bits"):
        allot(program, calibrate=[x], as_uniform=8, widths=(8, 3), sensitivity={**known, first: {8: 0.0}})
