"""Readers: the weights that read the units of a space, as matrices [out, K], and which columns are whose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paredown.couple.space import Space
from paredown.couple.trace import op_name
from paredown.program import Program, placeholder_names
from paredown.statistics.uses import Use, find_uses

MOST_BYTES = 2**30
"""A Gram matrix larger than this is not made: K² float64 numbers, K up to 11,585."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reader:
    """One weight that reads the units of a space along its inputs."""

    parameter: str
    columns: Tensor
    """Columns of the matrix view that read each unit. Shape [units, columns per unit], int64."""
    row_scales: Tensor
    """|γ| / √(σ² + ε) of the batch norm behind each output, 1 where none follows. Shape [out], float64."""


def readers(program: Program, spaces: Sequence[Space]) -> dict[str, list[Reader]]:
    """By space: its linear layers and convolutions of weights [out, in, …] whose inputs can be measured.

    Transposed convolutions, recurrent cells, products with a weight on the left and layers with more than 11,585 inputs
    are left out; a space that only those read has none.
    """
    names = {f.parameter for s in spaces for f in s.footprints if f.role == "read" and f.axis == 1}
    shapes = {n: tuple(program.state[n].shape) for n in names if n in program.state}
    uses = find_uses(program, sorted(shapes))
    fit = {
        n for n, shape in shapes.items() if uses[n] and not any(u.flipped for u in uses[n])
        and 8 * math.prod(shape[1:]) ** 2 <= MOST_BYTES
    }  # fmt: skip
    scales = {n: _row_scales(program, uses[n], shapes[n][0]) for n in fit}
    found: dict[str, list[Reader]] = {}
    for space in spaces:
        columns: dict[str, list[Tensor]] = {}
        for f in space.footprints:
            if f.role == "read" and f.axis == 1 and f.parameter in fit:
                columns.setdefault(f.parameter, []).append(_columns(f.indices, shapes[f.parameter]))
        found[
            space.name
        ] = [  # a unit that is read twice, as behind a concatenation with itself, has the columns of both
            Reader(parameter=name, columns=torch.cat(parts, 1), row_scales=scales[name])
            for name, parts in columns.items()
        ]
    return found


def _columns(indices: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    taps = math.prod(shape[2:])
    first = torch.from_numpy(np.ascontiguousarray(indices)) * taps
    return (first[:, :, None] + torch.arange(taps)).flatten(1)


def _row_scales(program: Program, uses: Sequence[Use], width: int) -> Tensor:
    held = batch_norm_behind(program, uses, width)
    if held is None or held.variance is None:
        return torch.ones(width, dtype=torch.float64)
    return held.scale / torch.sqrt(held.variance.detach().double() + held.epsilon)


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """A batch norm that alone reads what a layer writes."""

    scale: Tensor
    """|γ|, ones where it has none. Shape [out], float64."""
    variance: Tensor | None
    epsilon: float


def batch_norm_behind(program: Program, uses: Sequence[Use], width: int) -> Behind | None:
    """The batch norm over the outputs of a weight; None where there is none, or others read them too."""
    if len(uses) != 1 or len(uses[0].node.users) != 1:
        return None
    (norm,) = uses[0].node.users
    if not op_name(norm).startswith("batch_norm") or uses[0].rows != (0, width):
        return None
    held = _tensors(program, placeholder_names(program.eval_graph), norm.args)
    if any(t is not None and len(t) != width for t in held.values()):
        return None
    ones = torch.ones(width, dtype=torch.float64)
    scale = ones if held["weight"] is None else held["weight"].detach().double().abs()
    epsilon: Any = norm.args[7]
    return Behind(scale=scale, variance=held["var"], epsilon=epsilon)


def _tensors(program: Program, names: Mapping[str, str], args: Sequence[object]) -> dict[str, Tensor | None]:
    def of(node: object) -> Tensor | None:
        tensor = program.state.get(names.get(getattr(node, "name", ""), ""))
        return tensor if isinstance(tensor, Tensor) else None

    return {"weight": of(args[1]), "var": of(args[4])}
