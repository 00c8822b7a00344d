"""What a budget will lead to, by tables, counts and the file of the network as it is: for a dry run. Nothing is trained, or kept but the layers' times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from paredown.allocate import Latency, allocate, predict
from paredown.allocate.latency import LayerLatency
from paredown.allocate.request import MEASURED
from paredown.budget import Budget, parse_latency
from paredown.errors import InfeasibleError
from paredown.export import export
from paredown.measure.layer_tables import Setting
from paredown.pipeline.budgets import by_bits
from paredown.pipeline.searches import BYTES, bytes_per_parameter
from paredown.pipeline.ways import Here, Way
from paredown.plan import Plan
from paredown.quantize import quantize
from paredown.recipe import Recipe
from paredown.recipe_fields import SEARCHED
from paredown.score.patterns import matches, parents
from paredown.search.asking import reason_of
from paredown.search.budgets import LATENCY
from paredown.search.candidates import kept_units
from paredown.search.layers import latency_table
from paredown.target import named

LINEAR = ("int8-dynamic", "w4")
"""Schemes that leave convolutions in float."""


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

    Bytes are those of this network's own file in the scheme, weighed once, less those of the scheme for every parameter that leaves; memory is
    left out, since only files say it.
    Raises what the tables, sensitivities and `allocate` raise.
    """
    asked = {n: v for n in SEARCHED if (v := getattr(recipe.budget, n)) is not None}
    if not asked or not recipe.budget.rounds:
        return None
    unknown = asked.pop("peak_ram_bytes", None)
    notes = ["Nothing is foreseen of peak_ram_bytes, which files say."] if unknown is not None else []
    whole = {"parameters": here.cost.parameters, "macs": here.cost.macs, "size_bytes": here.cost.state_dict_bytes}
    each, beside = _bytes_each(recipe, here), 0.0
    if "size_bytes" in asked:
        try:
            whole["size_bytes"], coded = _weighed(recipe, way, here)
            beside = coded - each * here.cost.parameters
        except Exception as error:  # data of the task that are not here are no reason against a dry run
            notes.append(
                f"Bytes are of weights alone, a file has some more: it could not be written ({reason_of(error)})."
            )
    limits = {n: float(v * whole[n]) if n in whole and isinstance(v, float) else v for n, v in asked.items()}
    table, dense_ms = _tables(recipe, here) if set(LATENCY) & asked.keys() else (None, 0.0)
    if "latency" in limits:
        value = limits.pop("latency")
        limits["latency_ms"] = parse_latency(value) if isinstance(value, str) else float(value) * dense_ms
    if table is not None and not table.shrinks:
        del limits["latency_ms"]
        notes.append("Nothing is foreseen of latency: no layer that can shrink is timed alone, files say it.")
    if by_bits(recipe):
        notes.append("Bits per layer are chosen after the training; fewer than 8 leave more channels.")
    note = " ".join(notes)
    before = _amounts(limits, here, table, None, each, beside)
    if all(before[n] <= limit for n, limit in limits.items()):
        return ForeseenBudget(plan=None, amounts={n: (v, before[n], before[n]) for n, v in limits.items()}, note=note)
    plan, nearest = _plan(recipe, way, here, limits, table, each, beside)
    after = _amounts(limits, here, table, plan, each, beside)
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


def _bytes_each(recipe: Recipe, here: Here) -> float:
    """Bytes of a file for each of its parameters: what the scheme makes of its weights, four for all that it leaves in float."""
    known, scheme = bytes_per_parameter(recipe), recipe.quantize.scheme
    if known is not None:
        return known
    codes = {"int8-dynamic": 1.0, "w4": 0.5 + 4 / 32, "fp16": 2.0}.get(scheme) or BYTES[scheme]
    total = 4.0 * here.cost.parameters
    coded = {n for v in here.cost.by_node for n in v.weights if scheme not in LINEAR or not v.kind.startswith("conv")}
    for name in coded:
        if not matches({name, *parents(name)}, recipe.quantize.float_layers):
            total -= (4.0 - codes) * math.prod(here.cost.parameter_shapes[name])
    return total / max(here.cost.parameters, 1)


def _weighed(recipe: Recipe, way: Way, here: Here) -> tuple[int, int]:
    """Bytes of the network's files as it is, in float32 and in the recipe's scheme: weights do not matter to them."""
    float_layers, target = recipe.quantize.float_layers, recipe.target
    quantized = quantize(
        here.program, target=target, calibrate=way.task.calibration_batches, scheme=recipe.quantize.scheme, observer="minmax",
        float_layers=float_layers, idle_repairs=True,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        dense = export(here.program, Path(folder, f"dense{named(target).suffix}"), target=target).size_bytes
        coded = export(quantized, Path(folder, f"coded{named(target).suffix}"), target=target).size_bytes
    return dense, coded


def _amounts(
    limits: Mapping[str, float], here: Here, table: Latency | None, plan: Plan | None, each: float, beside: float
) -> dict[str, float]:
    parameters, macs = predict(here.coupling, here.cost, plan or Plan(keep={}))
    known = {"parameters": float(parameters), "macs": float(macs), "size_bytes": beside + each * parameters}
    if table is not None:
        known["latency_ms"] = float(table.total(*_counts(here, plan)))
    return {n: known[n] for n in limits}


def _plan(
    recipe: Recipe,
    way: Way,
    here: Here,
    limits: Mapping[str, float],
    table: Latency | None,
    each: float,
    beside: float,
) -> tuple[Plan | None, bool]:
    counts = {n: max(2, int(limits[n])) for n in ("parameters", "macs") if n in limits}  # 1 would be ambiguous
    if "size_bytes" in limits:
        by_size = max(2, int((limits["size_bytes"] - beside) / each))
        counts["parameters"] = min(counts.get("parameters", by_size), by_size)
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
