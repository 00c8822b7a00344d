"""Constants beside channels: which grow with them, which do not, and what hangs on a position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hazards import Net
from oracle import plan_of, removed_units
from paredown.couple import couple
from paredown.program import capture
from paredown.prune import prune


def _empty_list(m: Any, x: Tensor) -> Tensor:
    found = torch.zeros(0)
    for part in (x, -x):
        found = torch.cat([found, m.a(part)], 1)
    return m.wide(found)


def _read_once(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros(x.shape[0], 6)
    return m.o(torch.tanh(m.a(x) + m.b(state)))


def _read_and_given_back(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.tanh(m.a(x) + m.b(torch.zeros(x.shape[0], 6)))
    return m.o(state), state


def _looked_up(m: Any, x: Tensor) -> Tensor:
    first = torch.zeros(6, dtype=torch.long)
    hidden = torch.tanh(m.a(x) + first)
    return m.o(hidden) + m.u[first].sum() * hidden[:, :1]


def _lower_triangle(m: Any, x: Tensor) -> Tensor:
    return m.o(torch.tril(m.a(x)))


@pytest.mark.parametrize(
    ("run", "free", "realiser"),
    [
        (_empty_list, 6, "module"),
        (_read_once, 6, "module"),  # the units that are computed; not the zeros that one weight reads
        (_read_and_given_back, 0, ""),
        (_looked_up, 0, ""),
        (_lower_triangle, 0, ""),
    ],
)
def test_constants_that_do_not_grow(run: Callable[..., Any], free: int, realiser: str) -> None:
    torch.manual_seed(0)
    model = Net(
        run, a=nn.Linear(8, 6), b=nn.Linear(6, 6), o=nn.Linear(6, 3), wide=nn.Linear(12, 3),
        u=nn.Parameter(torch.randn(5)),
    ).eval()  # fmt: skip
    program = capture(model, torch.randn(4, 8))
    coupling = couple(program)
    assert coupling.free_units == free
    if free:
        pruned = prune(program, plan_of(program, coupling, removed_units(coupling, 0)))
        assert pruned.realiser == realiser
