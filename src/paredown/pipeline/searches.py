"""The searches that a run can make: by channels with the layers' tables, or by ranks; set up from its recipe and task."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from paredown.allocate.request import MEASURED
from paredown.measure.layer_tables import Setting
from paredown.pipeline.folder import key_of
from paredown.pipeline.run import Run
from paredown.pipeline.shrink import joint_error
from paredown.pipeline.ways import Here, Way
from paredown.recipe import Recipe
from paredown.search.budgets import LATENCY, Round, Search, in_a_line
from paredown.search.candidates import maker
from paredown.search.layers import latency_table
from paredown.search.ranks import RankSearch

BYTES = {"int8": 1.0, "w4a8": 0.5, "w4a4": 0.5, "w2": 0.25, "ternary": 0.25, "binary": 0.125}


def search_of(run: Run, way: Way, here: Here, asked: Mapping[str, float]) -> Search:
    """The search by channels (or heads) for a run's limits, from where its levels have come."""
    recipe, bounds, asked_of = run.recipe, run.recipe.budget, run.recipe.prune
    table = None
    if set(LATENCY) & asked.keys():
        setting = Setting(target=recipe.target, threads=recipe.measure.threads, scheme=recipe.quantize.kernels)
        run.say("budget: time the layers")
        table = latency_table(here.program, here.coupling, here.cost, setting, align=_align(recipe))
    scores = way.scores(here)
    measured = bounds.allocation in MEASURED
    return Search(
        **_shared(run, way, here), scores=scores, asked=asked, table=table,
        key=key_of(recipe.digest, here.program.source_digest, run.environment),
        also=("uniform",) if measured else (), joint=functools.partial(joint_error, run, way, here),
        options={
            "target": recipe.target, "allocation": bounds.allocation, "normalize": asked_of.normalize,
            "include": asked_of.include, "exclude": asked_of.exclude, "floor": asked_of.floor, "align": asked_of.align,
            "sensitivity": way.sensitivity(here, scores) if measured else None,
        },
    )  # fmt: skip


def as_it_is(run: Run, way: Way, here: Here, asked: Mapping[str, float]) -> Round:
    """The file of the network as it is against the limits, before layers are timed and spaces measured; the search finds it measured."""
    key = key_of(run.recipe.digest, here.program.source_digest, run.environment)
    search = Search(**_shared(run, way, here), asked=asked, key=key)
    found = search.measured(0, None, {})
    if found.holds:
        run.say(in_a_line(search, found))
    return found


def rank_search_of(run: Run, way: Way, here: Here, by_channels: Search) -> RankSearch:
    """The search by ranks for the same limits, of that network or of what channels have left of it."""
    recipe, asked_of = run.recipe, run.recipe.prune
    options: dict[str, Any] = {} if not isinstance(asked_of.floor, float) else {"floor": asked_of.floor}
    return RankSearch(
        **_shared(run, way, here), program=here.program, scores=by_channels.scores,
        asked=by_channels.asked, key=key_of(recipe.digest, here.program.source_digest, run.environment, "ranks"),
        options={
            **options, "method": "svd", "include": asked_of.include, "exclude": asked_of.exclude,
            "align": asked_of.align, "target": recipe.target,
        },
    )  # fmt: skip


def _shared(run: Run, way: Way, here: Here) -> dict[str, Any]:
    recipe = run.recipe
    return {
        "coupling": here.coupling,
        "cost": here.cost,
        "make": maker(
            here.program, target=recipe.target, scheme=recipe.quantize.scheme, calibrate=run.task.calibration_batches,
            float_layers=recipe.quantize.float_layers, seed=recipe.seed,
        ),
        "dense": run.dense["artifact"],
        "samples": run.task.calibration_batches,
        "folder": run.folder.steps / f"search-{way.number}",
        "bytes_per_parameter": bytes_per_parameter(recipe),
        "threads": recipe.measure.threads,
        "runs": recipe.measure.runs,
        "seconds": recipe.measure.seconds,
        "rounds": recipe.budget.rounds,
        "say": run.say,
    }  # fmt: skip


def bytes_per_parameter(recipe: Recipe) -> float | None:
    """What leaves the file with a parameter; None where some weights stay in float, so that only the file can say."""
    return None if recipe.quantize.float_layers else BYTES.get(recipe.quantize.scheme)


def _align(recipe: Recipe) -> int:
    from paredown.target import named

    return recipe.prune.align or named(recipe.target).alignment
