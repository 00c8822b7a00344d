"""bn_scale: |γ| of the batch norms that a unit passes (Liu et al. 2017, "Learning efficient CNNs", network slimming).

The L1 penalty of its training is `paredown.prune.regularize.Slimming`. Where we differ: units with several batch norms (residual streams) sum them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from paredown.program import Program, placeholder_names
from paredown.score.l1 import L1Options, l1
from paredown.score.nouns import Source, UnitScores
from paredown.score.reduce import unit_sums


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
