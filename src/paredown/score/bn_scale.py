"""bn_scale: |γ| of the batch norms that a unit passes (Liu et al. 2017, "Learning efficient CNNs", network slimming).

Rows of a weight (filters) have the |γ| of the batch norm right behind them.

The L1 penalty of its training is `paredown.prune.regularize.Slimming`. Where we differ: units with several batch norms (residual streams) sum them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from paredown.granularity import Granularity
from paredown.program import Program, placeholder_names
from paredown.score.l1 import L1Options, l1
from paredown.score.nouns import Cells, Source, UnitScores
from paredown.score.reduce import unit_sums
from paredown.statistics.readers import batch_norm_behind
from paredown.statistics.uses import find_uses


@dataclass(frozen=True, slots=True, kw_only=True)
class BnScaleOptions:
    """No options."""


def bn_scale(source: Source, options: BnScaleOptions) -> dict[str, UnitScores]:
    """Score Σ |γ| over a unit's batch norms; a space without one falls back to l1, with a warning that names it."""
    del options
    scales = batch_norm_scales(source.program) & set(source.weights)
    scores: dict[str, UnitScores] = {}
    without = []
    for space in source.coupling.spaces:
        mine = [f for f in space.footprints if f.parameter in scales and f.axis == 0]
        if not mine:
            without.append(space)
            continue
        values = {f.parameter: source.weights[f.parameter].detach().abs().double().numpy() for f in mine}
        scores[space.name] = np.sum([values[f.parameter][f.indices].sum(axis=1) for f in mine], axis=0)
    if without:
        names = ", ".join(s.name for s in without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        warnings.warn(f"bn_scale falls back to l1 where no batch norm is: {names}.", UserWarning, stacklevel=4)
        elements = next(iter(l1(source, L1Options())))
        scores |= unit_sums(without, elements, source.weights, source.group)
    return scores


def bn_scale_rows(source: Source, options: BnScaleOptions, granularity: Granularity) -> dict[str, Cells]:
    """|γ| behind every row; rows of a weight without a batch norm behind fall back to their mean |w|, with a warning."""
    del options, granularity
    uses = find_uses(source.program, source.weights)
    found: dict[str, Cells] = {}
    without = []
    for name, weight in source.weights.items():
        behind = batch_norm_behind(source.program, uses[name], len(weight))
        if behind is None:
            without.append(name)
        rows = weight.detach().double().abs().flatten(1).mean(1) if behind is None else behind.scale
        found[name] = np.array(rows.numpy())
    if without:
        names = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        warnings.warn(f"bn_scale falls back to l1 where no batch norm is: {names}.", UserWarning, stacklevel=4)
    return found


def batch_norm_scales(program: Program) -> set[str]:
    """Names of the weights γ of all batch norms in the eval graph."""
    names = placeholder_names(program.eval_graph)
    found = set()
    for node in program.eval_graph.graph.nodes:
        if (
            getattr(getattr(node.target, "_schema", None), "name", "") == "aten::batch_norm"
            and node.args[1] is not None
        ):
            found.add(names.get(node.args[1].name, ""))
    return found - {""}
