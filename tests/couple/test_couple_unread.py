"""Rows and columns on which no output hangs: left alone with the reason, since removing them alone would move nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paredown as pare
from hazards import Net, healthy, random
from oracle import plan_of


def _cut_off(m: Any, x: Tensor) -> Tensor:
    return m.head(m.a(x)[:, :5].relu())  # type: ignore[no-any-return]


def _half_forgotten(m: Any, x: Tensor) -> Tensor:
    return m.head(m.a(x)[:, :5].relu() + F.linear(m.b(x), m.w[:, :4]))  # type: ignore[no-any-return]


def _padded(value: float) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: m.head(F.pad(m.b(x), (0, 1), value=value).relu())


def _padded_twice(m: Any, x: Tensor) -> Tensor:
    """A shortcut whose zeros meet channels."""
    return m.head(F.pad(m.b(x), (0, 1)) + m.c(x))  # type: ignore[no-any-return]


def _summed(m: Any, x: Tensor) -> Tensor:
    """Read by a statistic and by a product of activations, by no weight."""
    return m.b(x).sum(1, keepdim=True) * (m.a(x) @ m.a(x).T).mean(1, keepdim=True)  # type: ignore[no-any-return]


def _wide() -> dict[str, Any]:
    return {
        "a": nn.Linear(6, 8),
        "b": nn.Linear(6, 4),
        "c": nn.Linear(6, 5),
        "w": nn.Parameter(random(5, 7)),
        "head": nn.Linear(5, 3),
    }


NOWHERE, NOTHING = "no output hangs on it", "it reads nothing"
CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], int, dict[str, tuple[int, str]]]] = {
    "cut off": (_cut_off, 5, {NOWHERE: (3, "a.weight[0]")}),
    "columns without a use": (_half_forgotten, 5 + 4, {NOWHERE: (3, "a.weight[0]"), NOTHING: (3, "w[1]")}),
    "zeros behind channels": (_padded(0.0), 4, {NOTHING: (1, "head.weight[1]")}),
    "ones behind channels": (_padded(1.0), 5, {}),
    "zeros that meet channels": (_padded_twice, 5, {}),
    "read by no weight": (_summed, 8 + 4, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_nothing_hangs_on_is_left_out_with_the_reason(name: str) -> None:
    run, free, reasons = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = healthy(Net(run, **_wide())).eval()
    program = pare.capture(model, random(3, 6))
    coupling = pare.couple(program)
    assert coupling.free_units == free
    found = {p.reason: p for p in coupling.pinned}
    assert {r for r in found if r in (NOWHERE, NOTHING)} == set(reasons)
    for reason, (units, parameter) in reasons.items():
        assert found[reason].units == units
        assert parameter in found[reason].parameters and found[reason].where == parameter
    for number in range(len(coupling.spaces)):  # each unit alone moves the output
        assert pare.prune(program, plan_of(program, coupling, {number: [0]})).proof.moved > 0


def test_a_net_of_nothing_else_has_nothing_to_remove() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.a(x)[:, :2]  # type: ignore[no-any-return]

    program = pare.capture(Net(run, a=nn.Linear(6, 8)).eval(), random(3, 6))
    coupling = pare.couple(program)
    with pytest.raises(pare.errors.NothingToDo, match="no output hangs on it"):
        pare.allocate(coupling, pare.score(program, coupling, "l1"), pare.examine(program), pare.Budget(channels=0.5))
