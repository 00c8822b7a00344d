"""Masks that empty whole units: removed physically with proof, or said to be simulated and why."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paredown as pare
from hazards import HAZARDS, built
from oracle import captured
from paredown.couple import Coupling, couple
from paredown.errors import NothingToDo, UsageError, VerificationError
from paredown.plan import Mask, Plan
from paredown.program import Program, capture
from paredown.prune import compose, condense, load, prune, save
from paredown.train import fit


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.b(self.a(x).relu()))


def masked(program: Program, cells: dict[str, tuple[int, list[int]]], granularity: str) -> Plan:
    """{parameter: (axis, pruned indices)} as masks."""
    masks = {}
    for name, (axis, gone) in cells.items():
        kept = np.ones(tuple(program.state[name].shape), dtype=bool)
        np.moveaxis(kept, axis, 0)[gone] = False
        masks[name] = Mask.of(kept, granularity)
    return Plan(keep={}, masks=masks)


def test_columns_that_nobody_reads_leave_and_nothing_moves() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    program = capture(net, x)
    plan = masked(program, {"2.weight": (1, [1, 4])}, "column")
    held, small = prune(program, plan, condense=False), prune(program, plan)
    assert small.module[0].weight.shape == (4, 4) and small.module[2].weight.shape == (3, 4)  # type: ignore[index, union-attr]
    assert small.plan.masks == {} and small.plan.keep["0.weight"][0] == (0, 2, 3, 5)
    assert small.notes == ("removed: 2 units that masks left without weights",)
    assert small.proof.shown == ("structure",) and small.proof.moved > 0
    assert torch.allclose(small.module(x), held.module(x), atol=1e-6)  # reads were zero: the same function


def test_rows_leave_with_their_bias_and_the_output_says_so() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4)
    program = capture(net, x)
    plan = masked(program, {"0.weight": (0, [1, 4])}, "row")
    small = prune(program, plan)
    oracle = copy.deepcopy(net)
    with torch.no_grad():
        oracle[2].weight[:, [1, 4]] = 0.0  # type: ignore[index]
    assert small.module[0].weight.shape == (4, 4) and torch.allclose(small.module(x), oracle(x), atol=1e-6)  # type: ignore[index, union-attr]
    assert prune(program, plan, condense=False).module[0].weight.shape == (6, 4)  # type: ignore[index, union-attr]


def test_a_residual_stream_leaves_only_where_all_of_its_writers_are_masked() -> None:
    program = capture(Residual(), torch.randn(3, 6))
    one = prune(program, masked(program, {"b.weight": (0, [2, 5])}, "row"))
    assert one.plan.keep == {} and one.module.b.weight.shape == (8, 8)  # type: ignore[union-attr]
    assert one.notes == (
        "simulated: 16 of 64 weights of b.weight are zeros; 2 whole rows and 0 whole columns among them: "
        "coupled to channels that are not masked",
    )
    both = prune(program, masked(program, {"b.weight": (0, [2, 5]), "stem.weight": (0, [5, 7])}, "row"))
    assert both.module.b.weight.shape == (7, 8) and both.module.head.weight.shape == (3, 7)  # type: ignore[union-attr]
    assert {n: int((~m.kept).sum()) for n, m in both.plan.masks.items()} == {"b.weight": 8, "stem.weight": 6}
    assert both.notes[0] == "removed: 1 units that masks left without weights" and len(both.notes) == 3
    assert both.proof.shown == ("structure", "masks") and both.proof.num_zeros == 14


def test_outputs_stay_and_are_simulated_with_the_reason() -> None:
    program = capture(nn.Linear(6, 4), torch.randn(3, 6))
    small = prune(program, masked(program, {"weight": (0, [1])}, "row"))
    assert small.plan.keep == {} and "1 whole rows" in small.notes[0] and "output" in small.notes[0]


def test_zeros_of_a_bias_are_no_rows() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    kept = np.ones((6, 4), dtype=bool)
    kept[0] = False
    masks = {"0.weight": Mask.of(kept, "row"), "0.bias": Mask.of(np.array([1, 0, 1, 1, 1, 1], dtype=bool), "element")}
    small = prune(capture(net, torch.randn(3, 4)), Plan(keep={}, masks=masks))
    assert [n for n in small.notes if "bias" in n] == ["simulated: 1 of 5 weights of 0.bias are zeros"]


def test_of_a_space_that_is_dead_as_a_whole_one_unit_stays() -> None:
    program = capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 4))
    cells = {"0.weight": (0, [0, 1, 2]), "2.weight": (1, [3, 4, 5])}
    small = prune(program, masked(program, cells, "row"))
    assert small.module[0].weight.shape == (1, 4)  # type: ignore[index, union-attr]


def test_depthwise_kernels_do_not_keep_a_channel_alive_but_leave_with_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    program = capture(net, torch.randn(2, 3, 6, 6))
    small = prune(program, masked(program, {"0.weight": (0, [0, 6])}, "row"))
    assert small.module[1].weight.shape == (6, 1, 3, 3) and small.module[1].groups == 6  # type: ignore[index, union-attr]
    only = prune(program, masked(program, {"1.weight": (0, [0, 6])}, "row"))
    assert only.plan.keep == {} and only.notes  # the kernel's rows are zero, its input is not


def test_condense_after_training_and_after_a_removal_and_saved(tmp_path: Any) -> None:
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(16, 4)
    program = capture(net, x)
    axes = {"0.weight": {0: (0, 1, 2, 4, 5, 7)}, "0.bias": {0: (0, 1, 2, 4, 5, 7)}, "2.weight": {1: (0, 1, 2, 4, 5, 7)}}
    kept = np.ones((6, 4), dtype=bool)
    kept[[1, 3]] = False
    held = prune(program, Plan(keep=axes, masks={"0.weight": Mask.of(kept, "row")}), condense=False)
    assert held.module[0].weight.shape == (6, 4)  # type: ignore[index, union-attr]
    tuned = copy.copy(held)
    small = condense(tuned)
    at_once = prune(program, Plan(keep=axes, masks={"0.weight": Mask.of(kept, "row")}))
    for one in (small, at_once):
        assert one.plan.keep["0.weight"][0] == (0, 2, 5, 7) and one.plan.masks == {}
        assert one.module[0].weight.shape == (4, 4)  # type: ignore[index, union-attr]
    assert torch.equal(small.module(x), at_once.module(x))
    save(small, tmp_path)
    assert torch.equal(load(tmp_path, net)(x), small.module(x))
    with pytest.raises(UsageError, match="masks"):
        condense(small)


def test_condense_without_a_dead_unit_says_why() -> None:
    program = capture(Residual(), torch.randn(3, 6))
    held = prune(program, masked(program, {"b.weight": (0, [2])}, "element"))
    with pytest.raises(NothingToDo, match="coupled to channels that are not masked"):
        condense(held)
    with torch.no_grad():
        held.module.b.weight += 1  # type: ignore[operator, union-attr]
    with pytest.raises(VerificationError, match=r"8 of 8 in b\.weight alive"):
        condense(held)


HEADS = (
    "mha",
    "encoder_layer",
    "fused_qkv",
    "separate_qkv",
    "grouped_query",
    "grouped_query_expanded",
)


def heads(coupling: Coupling) -> Any:
    return next(s for s in coupling.spaces if s.kind == "head" and len(s) > 1)


@pytest.mark.parametrize("name", HEADS)
def test_masked_heads_leave_physically(name: str) -> None:
    """nn.MultiheadAttention, fused and separate q, k, v as in timm, and groups of heads that share keys (GQA)."""
    net, (args, kwargs) = built(name), HAZARDS[name].inputs(2)
    program, coupling = captured(name)
    space = heads(coupling)
    cells = {}
    for f in space.footprints:
        if program.state[f.parameter].dim() >= 2:
            axis, gone = cells.setdefault(f.parameter, (f.axis, []))
            assert axis == f.axis
            gone += f.indices[-1].tolist()
    small = prune(program, masked(program, cells, "row"))
    assert small.notes[0] == "removed: 1 units that masks left without weights" and small.plan.masks == {}
    assert small.proof.max_error <= 1e-4 * small.proof.scale and small.proof.moved > 0
    for f in space.footprints:
        assert (
            len(small.plan.keep[f.parameter][f.axis]) == program.state[f.parameter].shape[f.axis] - f.indices.shape[1]
        )
    # The oracle: what reads the head is zero in the user's own class.
    oracle = copy.deepcopy(net)
    with torch.no_grad():
        for f in space.footprints:
            if f.role == "read":
                oracle.get_parameter(f.parameter).movedim(f.axis, 0)[f.indices[-1]] = 0.0
    got, want = small.module(*args, **kwargs), oracle(*args, **kwargs)
    got, want = (o[0] if isinstance(o, tuple) else o for o in (got, want))
    assert float((got - want).detach().abs().max()) <= 1e-4 * float(want.detach().abs().max())


def test_zeros_of_an_earlier_level_stay_zero_through_compose() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(8, 4)
    first = prune(capture(net, x), masked(capture(net, x), {"2.weight": (0, [1])}, "element"))
    program = capture(first.module, x)
    axes = {"0.weight": {0: (1, 3)}, "0.bias": {0: (1, 3)}, "2.weight": {1: (1, 3)}}
    second = prune(program, Plan(keep=axes))
    both = compose(first, second)
    assert both.plan.masks["2.weight"].shape == (3, 2) and both.proof.num_zeros == 2
    data = [(x, torch.zeros(8, dtype=torch.long))]
    alive = fit(second.module, lambda: data, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), epochs=1).module
    import dataclasses

    with pytest.raises(VerificationError, match="alive"):
        compose(first, dataclasses.replace(second, module=alive))


def test_cells_that_a_removal_tears_are_called_single_weights() -> None:
    """2:4 over inputs 0 … 7 is no 2:4 over those that are left: no format for it may be claimed."""
    kept = np.tile([True, True, False, False, False, False, True, True], (4, 1))
    first = Plan(keep={}, masks={"w": Mask.of(kept, "2:4"), "v": Mask.of(kept, "row")})
    torn = first.then(Plan(keep={"w": {1: (0, 1, 6, 7)}}))
    assert set(torn.masks) == {"v"}  # nothing is pruned in what is left of w
    some = first.then(Plan(keep={"w": {1: (0, 1, 2, 6, 7)}}))
    assert some.masks["w"].granularity == "element" and some.masks["w"].kept[0].tolist() == [
        True,
        True,
        False,
        True,
        True,
    ]
    whole = first.then(Plan(keep={"w": {0: (1, 2), 1: (0, 1, 2, 3)}}))
    assert whole.masks["w"].granularity == "2:4" and whole.masks["w"].shape == (2, 4)


@pytest.mark.parametrize("name", ["mha", "fused_qkv", "grouped_query"])
def test_heads_chosen_by_score_leave_and_channels_stay(name: str) -> None:
    program, coupling = captured(name)
    scores = pare.score(program, coupling, "l1", granularity="head")
    small = prune(program, pare.allocate(coupling, scores, pare.examine(program), pare.Budget(channels=0.5)))
    space = heads(coupling)
    assert small.proof.max_error <= 1e-4 * small.proof.scale and small.proof.moved > 0
    assert set(small.plan.keep) == {f.parameter for f in space.footprints}
    for f in space.footprints:
        gone = program.state[f.parameter].shape[f.axis] - len(small.plan.keep[f.parameter][f.axis])
        assert gone > 0 and gone % f.indices.shape[1] == 0


@pytest.mark.parametrize("text", ["element", "2:4", "row", "column", "kernel", "4x4"])
def test_masks_chosen_by_score_are_carried_out(text: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    program = capture(net, torch.randn(2, 4, 8, 8))
    coupling = couple(program)
    scores = pare.score(program, coupling, "l1", granularity=text)
    budget = None if text == "2:4" else pare.Budget(density=0.5)
    plan = pare.allocate(coupling, scores, pare.examine(program), budget)
    assert {m.granularity for m in plan.masks.values()} == {text}
    small = prune(program, plan)
    left = sum(int(np.count_nonzero(p.detach().numpy())) for p in small.module.parameters() if p.dim() > 1)
    assert 0.2 < left / sum(p.numel() for p in net.parameters() if p.dim() > 1) < 0.6
    assert ("structure" in small.proof.shown) == (text == "row")
