"""What a proof runs on: few samples of the example's kind, enough of them that every unit that stays is seen at work."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paredown.program import Program, least_batch

ROWS, DECISIONS = 16, 256
"""Samples, at most; where all outputs are integers, which show a difference now and then only."""
_NUMBERS, _PRODUCTS = 2**17, 2**22
"""Inputs that are looked at, and parameters times samples: a large network shows all that it has in one sample."""


def own_example(program: Program) -> Any:
    """The example inputs, cut to one sample where the batch is free and one is enough for the graph."""
    return _of_length(program, least_batch(program)) if program.batch == "dynamic" else program.inputs


def healthy_inputs(program: Program, seed: int) -> Any:
    """Some samples: the user's example where it is integer, boolean or a mask, else seeded noise of its scale.

    In one sample all that stays of a small layer may be dead behind its ReLU, and a wrong cut of it would show nothing.
    """
    generator = torch.Generator().manual_seed(seed + 1)

    def noisy(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.nan_to_num(
            0.0, math.inf, -math.inf
        )  # a hole in the user's example proves nothing; a mask's infinities stay
        if not bool(torch.isfinite(value).all()):
            return value
        if bool(((value == 0) | (value == 1)).all()) and bool((value == 1).any()):
            return value  # a mask
        spread = float(value.std()) if value.numel() > 1 else 0.0
        return value + torch.randn(value.shape, generator=generator) * (spread if spread > 1e-6 else 1.0)

    example = _of_length(program, _rows(program)) if program.batch == "dynamic" else program.inputs
    return pytree.tree_map(noisy, example)


def _rows(program: Program) -> int:
    least = least_batch(program)
    decides = not any(t.is_floating_point() for t in _outputs(program))
    room = ROWS if decides else 1
    inputs = sum(t.numel() for t in pytree.tree_leaves(own_example(program)) if isinstance(t, Tensor)) // least
    parameters = sum(t.numel() for t in program.state.values())
    rows = min(
        DECISIONS if decides else ROWS, room * _NUMBERS // max(inputs, 1), room * _PRODUCTS // max(parameters, 1)
    )
    return max(rows // least, 1) * least


def _outputs(program: Program) -> list[Tensor]:
    output = next(n for n in program.eval_graph.graph.nodes if n.op == "output")
    found = (n.meta.get("val") for n in pytree.tree_leaves(output.args) if hasattr(n, "meta"))
    return [t for t in found if isinstance(t, Tensor)]


def _of_length(program: Program, count: int) -> Any:
    """The example's samples, the first so many or all of them over and over."""
    length = next(t for t in pytree.tree_leaves(program.inputs) if isinstance(t, Tensor)).shape[0]
    at = torch.arange(count) % length

    def taken(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == length
        return value[at] if batched else value

    return pytree.tree_map(taken, program.inputs)
