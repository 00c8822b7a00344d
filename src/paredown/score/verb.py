"""score: how important every unit is, by one criterion of the table."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn

from paredown.couple.space import Coupling
from paredown.errors import RejectedError, UsageError
from paredown.program import Program
from paredown.score.nouns import Criterion, Group, Scores, Source, UnitScores, counted
from paredown.score.reduce import unit_sums
from paredown.score.table import TABLE


def score(
    program: Program,
    coupling: Coupling,
    criterion: str = "l1",
    *,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    module: nn.Module | None = None,
    num_batches: int = 16,
    seed: int = 0,
    group: Group = "write",
    weights_given: bool = True,
    **options: Any,
) -> Scores:
    """Score every unit of every space; higher is more important. Deterministic; the model is not changed.

    Criteria: l1 Σ|w|, l2 Σw², bn_scale Σ|γ|, taylor (Σ g·w)² averaged over `num_batches` batches with
    `loss(model, batch)` a scalar tensor, random. Sums run over the elements that produce a unit (group="write": rows of
    weights with ≥ 2 axes) or over all that leave with it (group="all"). `module` is the model to run where it is not
    the captured one. Returns float64 [units] for each space.

    Raises UsageError (unknown criterion or option, no batches or loss), RejectedError (NaN or infinite scores, with
    the layer; no batch in `batches`; a data-dependent criterion on random weights, with weights_given=False).

    >>> import torch; from paredown.couple import couple; from paredown.program import capture
    >>> program = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.zeros(2, 3, 8, 8))
    >>> score(program, couple(program), "l2").by_space["0.weight[0]"].shape
    (8,)
    """
    row = _row(criterion)
    chosen = _options(criterion, row, options)
    if group not in ("write", "all"):
        msg = f"group must be 'write' or 'all'. Got {group!r}."
        raise UsageError(msg)
    if row.needs_data and not weights_given:
        msg = (
            f"criterion {criterion!r} needs trained weights. Got a model without given weights, which is random. "
            "Pass --weights, or say that it is meant with weights_given=True."
        )
        raise RejectedError(msg)
    parameters = set(program.eval_graph.graph_signature.parameters)
    touched = {f.parameter for s in coupling.spaces for f in s.footprints}
    weights = {n: program.state[n].detach() for n in sorted(touched & parameters)}
    source = Source(
        program=program,
        coupling=coupling,
        weights=weights,
        module=module if module is not None else program.module,
        batches=batches,
        loss=loss,
        num_batches=num_batches,
        seed=seed,
        group=group,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        by_space = _units(row, source, chosen)
    notes = tuple(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    _refuse_bad(coupling, by_space, criterion)
    kept = {"group": group, **dataclasses.asdict(chosen), **({"num_batches": num_batches} if row.needs_data else {})}
    return Scores(criterion=criterion, by_space=by_space, options=kept, seed=seed, notes=notes)


def _units(row: Criterion, source: Source, options: Any) -> dict[str, UnitScores]:
    if row.units is not None:
        return row.units(source, options)
    assert row.elements is not None  # a row has one of the two
    total: dict[str, UnitScores] = {}
    count = 0
    spaces = source.coupling.spaces
    needed = {f.parameter for s in spaces for f in counted(s, source.weights, source.group)}
    part = dataclasses.replace(source, weights={n: w for n, w in source.weights.items() if n in needed})
    for elements in row.elements(part, options):
        sums = unit_sums(spaces, elements, source.weights, source.group)
        for name, values in sums.items():
            total[name] = total.get(name, 0.0) + (values**2 if row.squared else values)
        count += 1
    return {name: values / count for name, values in total.items()}


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


def _refuse_bad(coupling: Coupling, by_space: dict[str, UnitScores], criterion: str) -> None:
    """NaN sorts as largest: it would be kept as the most important."""
    bad = [s.name for s in coupling.spaces if not np.isfinite(by_space[s.name]).all()]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        msg = f"scores must be finite. Got NaN or infinity from {criterion} in {', '.join(bad[:3])}{more}."
        raise RejectedError(msg)
