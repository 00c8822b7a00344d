"""From element saliency to scores: of units over the footprints of their space, of cells over a weight's grid."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paredown.couple.space import Footprint, Space
from paredown.errors import UsageError
from paredown.granularity import Granularity
from paredown.program import placeholder_names
from paredown.score.nouns import (
    Cells,
    Criterion,
    Elements,
    Group,
    MemberNorm,
    Reduction,
    Source,
    UnitScores,
    counted,
)

Along = Mapping[tuple[str, int], UnitScores]
"""(parameter, axis) → one number per index of that axis."""
_AT_ONCE = 1 << 16
"""Scores whose shares are worked out at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """How the members of a coupled unit (the parameter axes that it touches) become one score."""

    reduction: Reduction
    norm: MemberNorm

    @classmethod
    def of(cls, criterion: Criterion, reduction: Reduction | None, norm: MemberNorm) -> Members:
        """The request, with the criterion's own reduction where none is given; raises UsageError for other names."""
        if reduction is not None and reduction not in get_args(Reduction):
            msg = f"reduction must be one of {', '.join(get_args(Reduction))}. Got {reduction!r}."
            raise UsageError(msg)
        if norm not in get_args(MemberNorm):
            msg = f"member_norm must be one of {', '.join(get_args(MemberNorm))}. Got {norm!r}."
            raise UsageError(msg)
        own: Reduction = "mean" if criterion.outputs else "max" if criterion.inner == "max" else "sum"
        return cls(reduction=reduction or own, norm=norm)

    @property
    def joint(self) -> bool:
        """Whether all elements of a unit are summed as if they were one member."""
        return self.reduction == "sum" and self.norm == "none"

    def reduced(self, members: Sequence[UnitScores]) -> UnitScores:
        """Scores [units] of every member → of the unit."""
        each = np.stack([_normalized(m, self.norm) for m in members])
        match self.reduction:
            case "sum":
                return np.asarray(each.sum(axis=0))
            case "mean":
                return np.asarray(each.mean(axis=0))
            case "max":
                return np.asarray(each.max(axis=0))
            case "l2":
                return np.asarray(np.sqrt(np.square(each).sum(axis=0)))
            case "first":
                return np.asarray(each[0])
        if (each < 0).any():
            msg = "reduction 'product' must be used with scores ≥ 0. Got negative ones. Use sum or mean."
            raise UsageError(msg)
        return np.asarray(np.log(np.maximum(each, np.finfo(np.float64).tiny)).sum(axis=0))


def _normalized(member: UnitScores, how: MemberNorm) -> UnitScores:
    if how == "none" or not len(member):
        return member
    if how == "layer":
        return np.asarray(share_of_larger(member))
    scale = float(np.abs(member).mean() if how == "mean" else np.abs(member).max())
    return member / scale if scale > 0 else np.zeros_like(member)


def share_of_larger(scores: Cells) -> Cells:
    """s / Σ of all scores that are at least s: the layer's energy that is left when only larger ones are (LAMP).

    Of equal scores each counts the others. Zeros stay zero. Shape and dtype are kept.

    >>> share_of_larger(np.array([1.0, 4.0, 3.0])).tolist()
    [0.125, 1.0, 0.42857142857142855]
    """
    flat = scores.reshape(-1)
    if flat.dtype == np.float32 and 0 < len(flat) < 2**32 and bool((flat >= 0).all()):
        return _shares_by_keys(flat).reshape(scores.shape)
    order = np.argsort(flat, kind="stable")
    ascending = flat[order].astype(np.float64)
    left = _from_here_up(ascending, 0.0)
    shares = np.empty_like(flat)
    shares[order] = np.divide(ascending, left, out=ascending, where=left > 0)
    return shares.reshape(scores.shape)


def _shares_by_keys(flat: Cells) -> Cells:
    """The same for float32 scores ≥ 0, which sort as their bits do.

    Keys of (score, position) sort several times quicker than an argsort; blocks from the largest scores down stay in the
    cache, and add up in the same order as one sum would.
    """
    keys = np.empty(len(flat), dtype="<u8")
    halves = keys.view("<u4").reshape(-1, 2)  # position, then score: the more significant one
    halves[:, 0] = np.arange(len(flat), dtype=np.uint32)
    np.add(flat, np.float32(0.0), out=halves[:, 1].view("<f4"))  # -0.0 becomes 0.0
    keys.sort()
    shares = np.zeros_like(flat)
    stop, above = len(keys) if keys[-1] >> np.uint64(32) else 0, 0.0  # all zeros stay zero
    while stop:
        lowest = keys[max(0, stop - _AT_ONCE)] >> np.uint64(32) << np.uint64(32)
        start = int(np.searchsorted(keys, lowest))  # equal scores stay in one block
        ascending = halves[start:stop, 1].view("<f4").astype(np.float64)
        left = _from_here_up(ascending, above)
        shares[halves[start:stop, 0]] = ascending / left
        stop, above = start, float(left[0])
    return shares


def _from_here_up(ascending: NDArray[np.float64], above: float) -> NDArray[np.float64]:
    """Σ of each score, all larger ones and `above`; of equal scores each counts the others."""
    if not len(ascending):
        return ascending
    sums = ascending[::-1].copy()
    sums[0] += above
    left = np.cumsum(sums, out=sums)[::-1]
    differs = ascending[1:] > ascending[:-1]
    if differs.all():
        return left
    starts = np.flatnonzero(np.concatenate([[True], differs]))
    return np.repeat(left[starts], np.diff(np.append(starts, len(left))))


def unit_sums(
    spaces: Iterable[Space], elements: Elements, weights: Mapping[str, Tensor], group: Group
) -> dict[str, UnitScores]:
    """Σ of element saliency over each unit, by space. Every axis of a parameter is summed once, for all its spaces."""
    spaces = list(spaces)
    members = {s.name: counted(s, weights, group) for s in spaces}
    along = sums_along(elements, members.values(), "sum")
    return {name: np.sum([at(along, f, "sum") for f in parts], axis=0) for name, parts in members.items()}


def sums_along(elements: Elements, members: Iterable[Iterable[Footprint]], inner: Literal["sum", "max"]) -> Along:
    """Sums (or largest) over all other axes, for each parameter axis that a member has; each parameter is read once."""
    axes: dict[str, set[int]] = {}
    for parts in members:
        for f in parts:
            axes.setdefault(f.parameter, set()).add(f.axis)
    found = {}
    for name, wanted in axes.items():
        values = elements[name].detach()
        for axis in wanted:
            others = [d for d in range(values.dim()) if d != axis]
            if inner == "max":
                rows = values.amax(dim=others) if others else values
            else:
                rows = values.sum(dim=others, dtype=torch.float64) if others else values
            found[name, axis] = rows.double().numpy()
    return found


def at(along: Along, f: Footprint, inner: Literal["sum", "max"]) -> UnitScores:
    """One member's scores. Shape [units]."""
    picked = along[f.parameter, f.axis][f.indices]
    return np.asarray(picked.max(axis=1) if inner == "max" else picked.sum(axis=1))


def num_elements(f: Footprint, weights: Mapping[str, Tensor]) -> int:
    """Elements of one member that leave with one unit."""
    shape = weights[f.parameter].shape
    return int(f.indices.shape[1]) * weights[f.parameter].numel() // max(int(shape[f.axis]), 1)


def cells_of(values: Tensor, granularity: Granularity, how: Literal["sum", "max"]) -> Cells:
    """Element saliency by cell. float64, but of the elements' own precision where a cell is one of them."""
    plain = values.detach()
    if granularity.kind in ("element", "n:m"):
        held = plain if plain.dtype in (torch.float32, torch.float64) else plain.float()
        return np.asarray(held.numpy())
    return granularity.reduce(plain.double().numpy(), how)


def over_cells(cells: Cells, sizes: NDArray[np.int64] | int, reduction: str, root: bool) -> Cells:
    """What is left to do once a cell's sum is finished: the mean over its weights, and the root of a norm."""
    scores = cells / sizes if reduction == "mean" and not (isinstance(sizes, int) and sizes == 1) else cells
    return np.sqrt(scores) if root else scores


def left_out(source: Source) -> Collection[str]:
    """With bias=False the parameters that the graph only adds: the argument "bias" of layers and norms, and no other."""
    if source.bias or source.group != "all":
        return ()
    graph = source.program.eval_graph
    names = placeholder_names(graph)
    as_bias: set[str] = set()
    otherwise: set[str] = set()
    for node in graph.graph_module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        arguments = [a.name for a in schema.arguments] if schema is not None else []
        given = list(zip(arguments, node.args, strict=False)) + list(node.kwargs.items())
        for argument, value in given:
            name = names.get(getattr(value, "name", ""))
            if name is not None:
                (as_bias if argument == "bias" else otherwise).add(name)
    return as_bias - otherwise
