"""What a budget will lead to, by tables and counts alone: for a dry run. Nothing is trained, exported or kept but the layers' times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paredown.allocate import Latency, allocate, predict
from paredown.allocate.latency import LayerLatency
from paredown.allocate.request import MEASURED
from paredown.budget import Budget, parse_latency
from paredown.errors import InfeasibleError
from paredown.measure.layer_tables import Setting
from paredown.pipeline.budgets import by_bits
from paredown.pipeline.ways import Here, Way
from paredown.plan import Plan
from paredown.recipe import Recipe
from paredown.recipe_fields import SEARCHED
from paredown.search.budgets import LATENCY
from paredown.search.candidates import kept_units
from paredown.search.layers import latency_table
from paredown.target import named


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForeseen:
    """One layer in the tables. Milliseconds are *measured* for the layer alone; between points of the grid *estimated*."""

    name: str
    out_channels: tuple[int, int]
    """Before and after."""
    in_channels: tuple[int, int]
    """Those of one group."""
    ms: tuple[float, float]
    steps: tuple[tuple[int, float], ...]
    """(channels written, milliseconds) at all channels read, at the points that were measured: where they stand still, fewer
    channels buy nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeseenBudget:
    """A budget as tables and counts foresee it."""

    plan: Plan | None
    """None where nothing has to leave."""
    amounts: Mapping[str, tuple[float, float, float]]
    """Name → asked, foreseen as it is, foreseen after the plan; all *estimated* but parameters and macs, which are exact."""
    layers: tuple[LayerForeseen, ...] = ()
    nearest: bool = False
    """Whether the plan is only the nearest: the least that floor and alignment allow."""
    note: str = ""


def foreseen_budget(recipe: Recipe, way: Way, here: Here) -> ForeseenBudget | None:
    """The plan that tables and counts alone would give; None where the budget asks for nothing that is searched.

    Bytes are one per parameter (INT8), memory is left out: both are known only when files are exported.
    Raises what the tables, sensitivities and `allocate` raise.
    """
    asked = {n: v for n in SEARCHED if (v := getattr(recipe.budget, n)) is not None and n != "peak_ram_bytes"}
    if not asked or not recipe.budget.rounds:
        return None
    whole = {"parameters": here.cost.parameters, "macs": here.cost.macs, "size_bytes": here.cost.state_dict_bytes}
    limits = {n: float(v * whole[n]) if n in whole and isinstance(v, float) else v for n, v in asked.items()}
    table, dense_ms = _tables(recipe, here) if set(LATENCY) & asked.keys() else (None, 0.0)
    if "latency" in limits:
        value = limits.pop("latency")
        limits["latency_ms"] = parse_latency(value) if isinstance(value, str) else float(value) * dense_ms
    note = "Bits per layer are chosen after the training; fewer than 8 leave more channels." if by_bits(recipe) else ""
    before = _amounts(limits, here, table, None)
    if all(before[n] <= limit for n, limit in limits.items()):
        return ForeseenBudget(plan=None, amounts={n: (v, before[n], before[n]) for n, v in limits.items()}, note=note)
    plan, nearest = _plan(recipe, way, here, limits, table)
    after = _amounts(limits, here, table, plan)
    return ForeseenBudget(
        plan=plan, amounts={n: (v, before[n], after[n]) for n, v in limits.items()}, nearest=nearest, note=note,
        layers=() if table is None else tuple(_layer(layer, here, plan) for layer in table.layers),
    )  # fmt: skip


def _tables(recipe: Recipe, here: Here) -> tuple[Latency, float]:
    """The layers' table in the recipe's number type, and the sum of the dense layers' float32 times."""
    align = recipe.prune.align or named(recipe.target).alignment
    shared: dict[str, Any] = {"target": recipe.target, "threads": recipe.measure.threads}
    table = latency_table(
        here.program, here.coupling, here.cost, Setting(scheme=recipe.quantize.kernels, **shared), align=align
    )
    dense = latency_table(here.program, here.coupling, here.cost, Setting(scheme="fp32", **shared), align=align)
    return table, float(dense.total(*_counts(here, None)))


def _counts(here: Here, plan: Plan | None) -> tuple[dict[str, int], dict[str, Any]]:
    return {s.name: len(s) for s in here.coupling.spaces}, kept_units(here.coupling, plan)


def _amounts(limits: Mapping[str, float], here: Here, table: Latency | None, plan: Plan | None) -> dict[str, float]:
    parameters, macs = predict(here.coupling, here.cost, plan or Plan(keep={}))
    known = {"parameters": float(parameters), "macs": float(macs), "size_bytes": float(parameters)}
    if table is not None:
        known["latency_ms"] = float(table.total(*_counts(here, plan)))
    return {n: known[n] for n in limits}


def _plan(
    recipe: Recipe, way: Way, here: Here, limits: Mapping[str, float], table: Latency | None
) -> tuple[Plan | None, bool]:
    counts: dict[str, Any] = {n: int(limits[n]) for n in ("parameters", "macs") if n in limits}
    if "size_bytes" in limits:
        counts["parameters"] = min(counts.get("parameters", int(limits["size_bytes"])), int(limits["size_bytes"]))
    scores, asked = way.scores(here), recipe.prune
    try:
        return allocate(
            here.coupling, scores, here.cost, Budget(latency_ms=limits.get("latency_ms"), **counts),
            target=recipe.target, allocation=recipe.budget.allocation, include=asked.include, exclude=asked.exclude,
            floor=asked.floor, align=asked.align, normalize=asked.normalize, latency=table,
            sensitivity=way.sensitivity(here, scores) if recipe.budget.allocation in MEASURED else None,
        ), False  # fmt: skip
    except InfeasibleError as error:
        if error.nearest is None:
            raise
        return error.nearest, True


def _layer(layer: LayerLatency, here: Here, plan: Plan | None) -> LayerForeseen:
    lengths = [
        (int(layer.writes.of(units, kept)), int(layer.reads.of(units, kept)), float(layer.of(units, kept)))
        for units, kept in (_counts(here, None), _counts(here, plan))
    ]
    (out0, in0, ms0), (out1, in1, ms1) = lengths
    steps = tuple((n, float(layer.at(n, np.array(in0)))) for n in layer.out_channels)
    return LayerForeseen(name=layer.name, out_channels=(out0, out1), in_channels=(in0, in1), ms=(ms0, ms1), steps=steps)
