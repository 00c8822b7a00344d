"""score: how important every unit, or every cell of every weight, is by one criterion of the table."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from paredown.couple.space import Coupling, Footprint, Space
from paredown.errors import RejectedError, UsageError, must_be
from paredown.granularity import Granularity
from paredown.program import Program
from paredown.score.nouns import (
    Cells,
    Criterion,
    Elements,
    Group,
    MemberNorm,
    Reduction,
    Scores,
    Source,
    UnitScores,
    counted,
)
from paredown.score.patterns import as_patterns, maskable, stored_in_out
from paredown.score.reduce import Along, Members, at, cells_of, left_out, num_elements, over_cells, sums_along
from paredown.score.table import TABLE
from paredown.statistics.batches import Given, check_whole, once


def score(
    program: Program,
    coupling: Coupling,
    criterion: str = "l1",
    *,
    granularity: str | Granularity = "channel",
    batches: Given | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    module: nn.Module | None = None,
    num_batches: int = 16,
    seed: int = 0,
    group: Group = "write",
    bias: bool = True,
    reduction: Reduction | None = None,
    member_norm: MemberNorm = "none",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    weights_given: bool = True,
    **options: Any,
) -> Scores:
    """Score every unit of every space, or every cell of every weight; higher is more important. Deterministic.

    Criteria, by what they look at. Weights: l1 Σ|w|, l2 Σw², linf max|w|, lamp, bn_scale Σ|γ|, geometric_median, synflow.
    Gradients (`batches`, and `loss(model, batch)` a scalar tensor): taylor (Σ g·w)², taylor2 Σ|g·w - ½F·w²|, fisher Σ½F·w²,
    hessian_trace, snip Σ|g·w|, grasp Σ w·Hg. Activations (`batches` of inputs, or with `loss`): wanda, obs, apoz,
    mean_activation, refit (least squares of what reads a channel). And random. Each one's file says its formula, source
    and options. The model is not changed.

    granularity "channel" (or "head": heads alone) fills `by_space`, float64 [units]. Members of a coupled unit are
    the parameter axes that it touches: with group="write" the weights that produce it, with group="all" everything
    that leaves with it, biases only where `bias`. Each member's scores are divided by `member_norm` over the space
    ("mean", "max", "layer": by what is at least as large, as LAMP) and then reduced: "sum" (all elements as one
    member), "mean", "max", "l2", "product" (Σ of logs), "first". None is the criterion's own ("sum"; "max" for linf,
    "mean" for activations). Torch-Pruning's GroupMagnitudeImportance is "l2" with group="all", bias=False and
    reduction="mean", over what allocate's normalize="mean" divides by.

    Granularities of masks fill `by_cell`, {weight: grid}: all weights with at least two axes that carry MACs and that
    `include` and `exclude` leave (patterns as in allocate); those stored [in, out] (`x @ W`, transposed convolutions) only where
    cells lie the same way there: not for N:M, rows, columns and blocks that are not square, with a note. `reduction` is over the elements of a cell: "mean" (what a
    cell is worth per weight that its removal saves; the default), "sum", "max" or "l2".

    `module` is the model to run where it is not the captured one.

    Raises UsageError (unknown criterion, option or pattern, a granularity that the criterion does not have, no
    batches or loss), RejectedError (NaN or infinite scores, with the layer; no batch in `batches`; a data-dependent
    criterion on random weights, with weights_given=False).

    >>> import torch; from paredown.couple import couple; from paredown.program import capture
    >>> program = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.zeros(2, 3, 8, 8))
    >>> score(program, couple(program), "l2").by_space["0.weight[0]"].shape
    (8,)
    >>> score(program, couple(program), "l2", granularity="4x4").by_cell["0.weight"].shape
    (2, 7)
    """
    _check_nouns(program, coupling, loss, num_batches)
    row = _row(criterion)
    chosen = _options(criterion, row, options)
    cut = Granularity.parse(granularity)
    members = Members.of(row, reduction, member_norm)
    _check(criterion, row, cut, group, members, reduction)
    _check_fit(criterion, row, cut, weights_given, [*as_patterns(include), *as_patterns(exclude)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = maskable(program, coupling, include, exclude, cut) if cut.masked else _touched(program, coupling)
        source = Source(
            program=program, coupling=_heads(coupling) if cut.kind == "head" else coupling,
            weights={n: program.state[n].detach() for n in names}, module=module if module is not None else program.module, granularity=cut,
            batches=None if batches is None else once(batches), loss=loss, num_batches=num_batches, seed=seed, group=group, bias=bias,
        )  # fmt: skip
        by_cell = _cells(row, source, chosen, cut, reduction) if cut.masked else {}
        by_space = {} if cut.masked else _units(row, source, chosen, members)
    notes = tuple(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    _refuse_bad({**by_space, **by_cell}, criterion)
    return Scores(
        criterion=criterion, by_space=by_space, granularity=str(cut), by_cell=by_cell, scope=row.scope,
        flipped=stored_in_out(program, by_cell) if cut.masked else None,
        options=_recorded(row, source, chosen, reduction, member_norm), seed=seed, notes=notes,
    )  # fmt: skip


def _recorded(
    row: Criterion, source: Source, chosen: Any, reduction: Reduction | None, member_norm: MemberNorm
) -> dict[str, Any]:
    """The options as Scores keeps them: those that decide something, and only where they are not the default."""
    later = {
        f.name
        for f in dataclasses.fields(chosen)
        if f.metadata.get("came_later") and getattr(chosen, f.name) == f.default
    }
    kept = {"group": source.group, **{n: v for n, v in dataclasses.asdict(chosen).items() if n not in later}}
    kept |= {"num_batches": source.num_batches} if row.needs_data else {}
    kept |= {n: v for n, v in (("reduction", reduction), ("member_norm", member_norm)) if v not in (None, "none")}
    return kept if source.bias else {**kept, "bias": False}


# ---------------------------------------------------------------------------------------------------------------- units


def _units(row: Criterion, source: Source, options: Any, members: Members) -> dict[str, UnitScores]:
    if row.units is not None:
        return row.units(source, options)
    if row.outputs is not None:
        return _of_outputs(row.outputs(source, options), source, members)
    assert row.elements is not None  # a row has one of the three
    biases = left_out(source)
    spaces = source.coupling.spaces
    parts = {s.name: counted(s, source.weights, source.group, biases) for s in spaces}
    needed = {f.parameter for each in parts.values() for f in each}
    fewer = dataclasses.replace(source, weights={n: w for n, w in source.weights.items() if n in needed})
    totals: dict[str, list[UnitScores]] = {}
    count = 0
    for yielded in row.elements(fewer, options):
        maps = yielded if isinstance(yielded, tuple) else (yielded,)
        along = [sums_along(elements, parts.values(), row.inner) for elements in maps]
        for name, each in parts.items():
            found = _finished(row, along, each, source.weights, options, joint=members.joint)
            old = totals.get(name)
            totals[name] = found if old is None else [a + b for a, b in zip(old, found, strict=True)]
        count += 1
    scores = {}
    for name, each_total in totals.items():
        means = [np.sqrt(t / count) if row.root else t / count for t in each_total]
        unit = means[0] if members.joint else members.reduced(means)
        scores[name] = row.within(unit) if row.within is not None else unit
    return scores


def _finished(
    row: Criterion, along: Sequence[Along], footprints: Sequence[Footprint], weights: Mapping[str, Tensor], options: Any,
    *, joint: bool,
) -> list[UnitScores]:  # fmt: skip
    """Scores [units] of every member of a space, or of all of them as one."""
    maps = [[at(one, f, row.inner) for f in footprints] for one in along]
    sizes = [num_elements(f, weights) for f in footprints]
    if joint:
        maps = [[np.sum(one, axis=0)] for one in maps]
        sizes = [sum(sizes)]
    if row.finish is None:
        return maps[0]
    return [row.finish([one[m] for one in maps], size, options) for m, size in enumerate(sizes)]


def _of_outputs(found: Along, source: Source, members: Members) -> dict[str, UnitScores]:
    """Averages over a unit's channels, for every layer that writes its space."""
    scores: dict[str, UnitScores] = {}
    without: list[Space] = []
    for space in source.coupling.spaces:
        each = [
            found[f.parameter, f.axis][f.indices].mean(axis=1)
            for f in space.footprints
            if f.role == "write" and (f.parameter, f.axis) in found
        ]
        if each:
            scores[space.name] = members.reduced(each)
        else:
            without.append(space)
            scores[space.name] = np.ones(len(space))
    if without:
        names = ", ".join(s.name for s in without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        warnings.warn(
            f"every unit counts the same where no layer's output can be seen: {names}.", UserWarning, stacklevel=3
        )
    return scores


def _touched(program: Program, coupling: Coupling) -> list[str]:
    """Parameters that units touch."""
    parameters = set(program.eval_graph.graph_signature.parameters)
    return sorted({f.parameter for s in coupling.spaces for f in s.footprints} & parameters)


def _heads(coupling: Coupling) -> Coupling:
    spaces = tuple(s for s in coupling.spaces if s.kind == "head")
    if not spaces:
        msg = "granularity head must be used with attention. Got a model without a space of heads. Use channel."
        raise UsageError(msg)
    return dataclasses.replace(coupling, spaces=spaces)


# ---------------------------------------------------------------------------------------------------------------- cells


def _cells(
    row: Criterion, source: Source, options: Any, cut: Granularity, reduction: Reduction | None
) -> dict[str, Cells]:
    if row.cells is not None and cut.kind in row.cell_kinds:
        return row.cells(source, options, cut)
    if row.outputs is not None:  # rows alone, as was checked
        found = row.outputs(source, options)
        return {n: found[n, 0] for n in source.weights if (n, 0) in found}
    assert row.elements is not None
    how = reduction or ("max" if row.inner == "max" else "mean")
    sizes = {n: _sizes(cut, tuple(w.shape)) for n, w in source.weights.items()}
    totals: dict[str, Cells] = {}
    count = 0
    for yielded in row.elements(source, options):
        maps = yielded if isinstance(yielded, tuple) else (yielded,)
        for name in source.weights:
            found_cells = _one(row, maps, name, cut, how, sizes[name], options)
            if name in totals:
                totals[name] += found_cells
            else:
                totals[name] = found_cells if count == 0 and found_cells.flags.writeable else found_cells.copy()
        count += 1
    for name, total in totals.items():
        mean = total if count == 1 else np.divide(total, count, out=total)
        cells = over_cells(mean, sizes[name], how, row.root)
        totals[name] = row.within(cells) if row.within is not None else cells
    return totals


def _one(
    row: Criterion, maps: Sequence[Elements], name: str, cut: Granularity, how: str, sizes: Any, options: Any
) -> Cells:
    """The cells of one weight for what was yielded once."""
    inner = "max" if how == "max" or row.inner == "max" else "sum"
    if how == "l2":
        values = [e[name] for e in maps]
        cells = values[0] if row.finish is None else row.finish([v.numpy() for v in values], 1, options)
        return np.sqrt(cells_of(_tensor(cells).double().square(), cut, "sum"))
    parts = [cells_of(e[name], cut, inner) for e in maps]  # type: ignore[arg-type]
    return parts[0] if row.finish is None else row.finish(parts, 1 if inner == "max" else sizes, options)


def _tensor(values: Any) -> Tensor:
    import torch

    return values if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))


def _sizes(cut: Granularity, shape: tuple[int, ...]) -> Any:
    return 1 if cut.kind in ("element", "n:m") else cut.cell_sizes(shape)


# --------------------------------------------------------------------------------------------------------------- checks


def _row(criterion: str) -> Criterion:
    if criterion in TABLE:
        return TABLE[criterion]
    near = difflib.get_close_matches(str(criterion), TABLE, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    msg = f"criterion must be one of {', '.join(TABLE)}. Got {criterion!r}.{hint}"
    raise UsageError(msg)


def _options(criterion: str, row: Criterion, given: dict[str, Any]) -> Any:
    known = [f.name for f in dataclasses.fields(row.options)]
    unknown = [n for n in given if n not in known]
    if unknown:
        msg = f"options of {criterion} must be among {', '.join(known) or 'none'}. Got {unknown[0]!r}."
        raise UsageError(msg)
    return row.options(**given)


def _check(
    criterion: str, row: Criterion, cut: Granularity, group: str, members: Members, reduction: Reduction | None
) -> None:
    if group not in ("write", "all"):
        msg = f"group must be 'write' or 'all'. Got {group!r}."
        raise UsageError(msg)
    if cut.kind == "layer":
        msg = "score must be given a granularity of units or cells. Got layer: use paredown.score_depth for whole modules."
        raise UsageError(msg)
    own = row.elements is None and row.outputs is None
    if own and not cut.masked and (reduction is not None or members.norm != "none"):
        msg = f"reduction and member_norm must be used with criteria that have members. Got them with {criterion}, which scores units as a whole."
        raise UsageError(msg)
    if not cut.masked:
        return
    if reduction in ("product", "first") or members.norm != "none":
        msg = (
            f"reduction over a cell must be mean, sum, max or l2, without member_norm. Got {reduction}, {members.norm}."
        )
        raise UsageError(msg)
    kinds = row.cell_kinds if row.elements is None and row.outputs is None else ("row",) if row.outputs else ()
    if row.elements is None and cut.kind not in kinds:
        also = f", {' or '.join(kinds)}" if kinds else ""
        msg = f"criterion {criterion!r} must be used with channel{also}: it has no saliency of single weights. Got {cut}. Use l2, wanda or fisher for it."
        raise UsageError(msg)


def _check_nouns(program: Program, coupling: Coupling, loss: object, num_batches: int) -> None:
    """Another model's coupling names other parameters, or channels that are not there."""
    must_be("program", program, Program, fix="Use paredown.capture(model, inputs).")
    must_be("coupling", coupling, Coupling, fix="Use paredown.couple(program).")
    if loss is not None:
        must_be("loss", loss, Callable)  # type: ignore[arg-type]
    check_whole("num_batches", num_batches)
    for space in coupling.spaces:
        for f in space.footprints:
            shape = tuple(program.state[f.parameter].shape) if f.parameter in program.state else ()
            if f.axis < len(shape) and (not f.indices.size or int(f.indices.max()) < shape[f.axis]):
                continue
            found = f"only {shape[f.axis]} of them" if f.axis < len(shape) else "none there"
            msg = f"the coupling must be of this program, couple(program). Got one with {int(f.indices.max()) + 1} channels along axis {f.axis} of {f.parameter}, and {found}."
            raise UsageError(msg)


def _check_fit(criterion: str, row: Criterion, cut: Granularity, weights_given: bool, patterns: Sequence[str]) -> None:
    if row.needs_data and not row.at_init and not weights_given:
        msg = (
            f"criterion {criterion!r} needs trained weights. Got a model without given weights, which is random. "
            "Pass --weights; in Python weights_given=True says that it is meant."
        )
        raise RejectedError(msg)
    if patterns and not cut.masked:
        msg = "include and exclude must be used with masks. Got them for units, which allocate leaves out."
        raise UsageError(msg)


def _refuse_bad(scores: Mapping[str, Cells], criterion: str) -> None:
    """NaN sorts as largest: it would be kept as the most important."""
    bad = [name for name, values in scores.items() if not np.isfinite(values).all()]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        msg = f"scores must be finite. Got NaN or infinity from {criterion} in {', '.join(bad[:3])}{more}."
        raise RejectedError(msg)
