"""The recipe's budget as a level: what no level of the recipe reaches is searched for, on files that are measured."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paredown.budget import parse_latency
from paredown.errors import InfeasibleError, UsageError
from paredown.examine import examine
from paredown.granularity import Granularity
from paredown.measure.layer_tables import Setting
from paredown.pipeline.fitted import Shrinking
from paredown.pipeline.folder import files_digest, key_of
from paredown.pipeline.jointly import Step, by_bits, is_joint, jointly
from paredown.pipeline.run import Run
from paredown.pipeline.searches import as_it_is, search_of
from paredown.pipeline.shrink import can_train
from paredown.pipeline.ways import Here, Way, level_of
from paredown.plan import Plan
from paredown.program import Program
from paredown.prune import Pruned
from paredown.recipe import Recipe
from paredown.recipe_fields import SEARCHED, Level
from paredown.records import write_text
from paredown.score import TABLE
from paredown.search.budgets import LATENCY, Met, Round, meet
from paredown.train import Task

ALONE = ("channels", "density")
"""Amounts that a level takes as they are: counting is all that they need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What a budget adds to the levels of a recipe."""

    level: Level | None
    """None where the budget is met already."""
    plan: Plan | None = None
    """What the search found; None where the level's amount is allocated as that of any level."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """For the records: limits, rounds, shares of the layers."""
    shrinking: Shrinking | None = None
    """Where bits per layer are still to be chosen, after the training: what for."""
    before: tuple[Step, ...] = ()
    """Levels that come before this one, without a training of their own: channels, where it is one of ranks."""


def check_budget(recipe: Recipe) -> None:
    """The budget's keys fit the recipe; raises UsageError before any work."""
    bounds = recipe.budget
    given = bounds.model_dump(exclude_none=True)
    alone = [n for n in ALONE if n in given]
    if alone and recipe.prune.levels:
        msg = f"budget.{alone[0]} must come without prune.levels, which say it level by level. Got both. Set prune.levels to []."
        raise UsageError(msg)
    asked = [n for n in SEARCHED if n in given]
    if by_bits(recipe) and bounds.rounds and recipe.quantize.spare:
        msg = "quantize.spare must go without budget.size_bytes and bits, which both choose how layers are quantized. Got both. Set budget.bits to [8]."
        raise UsageError(msg)
    if bounds.trial.limits:
        _check_trial(recipe)
    several = [n for n in ("together", "front") if getattr(bounds, n)]
    if several and not (asked and bounds.rounds):
        got = "rounds 0, which turns the search off" if asked else "none of them"
        msg = f"budget.{several[0]} must come with an amount that is searched: {', '.join(SEARCHED)}. Got {got}."
        raise UsageError(msg)
    if not asked or not bounds.rounds:
        return
    if recipe.prune.levels:
        _check_after_levels(recipe, asked)
        return
    granularity = recipe.prune.granularity
    if granularity not in ("channel", "head"):
        msg = f"budget.{asked[0]} must be met by channels or heads. Got prune.granularity {granularity!r}: masks change neither bytes nor latency. Give budget.density, or prune.levels."
        raise UsageError(msg)
    if recipe.prune.criterion not in TABLE:
        msg = f"a budget that is searched must have a criterion of the table ({', '.join(TABLE)}). Got {recipe.prune.criterion!r}, which is learnt in a training."
        raise UsageError(msg)
    if set(LATENCY) & set(asked):
        Setting(target=recipe.target, threads=recipe.measure.threads, scheme=recipe.quantize.kernels)


def _check_trial(recipe: Recipe) -> None:
    if not is_joint(recipe) or not recipe.budget.rounds:
        msg = "budget.trial must come with trials: with budget.together or front, or size_bytes and bits. Got a search without them. Leave it out."
        raise UsageError(msg)
    if recipe.given:
        msg = "budget.trial must be used with a recipe and its task module, which a process of its own can import. Got functions of a notebook. Leave it out."
        raise UsageError(msg)
    if recipe.budget.trial.memory is not None and sys.platform != "linux":
        msg = f"budget.trial.memory must be used on Linux. Got {sys.platform}. Leave it out."
        raise UsageError(msg)


TRAINING = "Give train, or train_batches and step: what is pruned must be trained back."


def check_training(recipe: Recipe, task: Task) -> None:
    """Levels come with a way to train; raises UsageError before any work."""
    if (recipe.prune.levels or level_of(recipe) is not None) and not can_train(task):
        msg = f"a level of pruning must be followed by a training. Got none. {TRAINING}"
        raise UsageError(msg)


def _check_after_levels(recipe: Recipe, asked: Sequence[str]) -> None:
    """What levels leave is searched on where they are of units: layers that cannot be timed are no news for after the training."""
    cuts = [Granularity.parse(recipe.prune.granularity_of(v)) for v in recipe.prune.levels if v.factorize is None]
    if not set(LATENCY) & set(asked) or not by_units(recipe) or any(cut.masked for cut in cuts):
        return
    try:
        Setting(target=recipe.target, threads=recipe.measure.threads, scheme=recipe.quantize.kernels)
    except UsageError as error:
        msg = (
            f"{error} Or set budget.rounds to 0: the bound is then looked at, and nothing is searched after the levels."
        )
        raise UsageError(msg) from error


def searched(run: Run, number: int, program: Program, tuned: Pruned | None) -> Searched | None:
    """What is still to be done for the budget after the recipe's levels; None where it asks for nothing that is searched.

    Raises InfeasibleError with the nearest plan where no file holds the budget and the recipe has no levels of its own; with
    levels the run goes on, its verdict says what was missed, and the nearest plan is kept for the error that ends it.
    """
    recipe, bounds = run.recipe, run.recipe.budget
    alone = level_of(recipe)
    if alone is not None:
        return Searched(level=alone)
    asked = limits(run, program)
    if not asked or not bounds.rounds or (tuned is not None and tuned.plan.masks) or not by_units(recipe):
        return None
    if not can_train(run.task) and not by_bits(recipe):
        run.say(f"budget: nothing is searched. {TRAINING}")
        run.dense["advice"] = TRAINING
        return None
    kept = _kept(run, number, asked, program, tuned)
    if kept is not None:
        return kept
    try:
        result = _found(run, number, asked, program, tuned)
    except InfeasibleError as error:
        if not recipe.prune.levels:
            raise
        run.dense["nearest"] = _after(tuned, error.nearest)
        run.say(f"budget: {error}")
        return None
    _keep(run, number, asked, program, tuned, result)
    return result


def _after(tuned: Pruned | None, plan: Plan | None) -> Plan | None:
    """A plan for what the levels left, as one for the dense network."""
    if tuned is None or plan is None or tuned.plan.ranks or tuned.plan.drop_modules:  # later plans name factors
        return plan
    return tuned.plan.then(plan)


def limits(run: Run, program: Program) -> dict[str, float]:
    """The amounts that are searched, absolute; a latency as a fraction of the dense file's stays one."""
    bounds, cost, dense = run.recipe.budget, examine(program), run.dense["artifact"]
    whole = {"parameters": cost.parameters, "macs": cost.macs, "size_bytes": dense.size_bytes}
    out: dict[str, float] = {}
    for name in SEARCHED:
        value = getattr(bounds, name)
        if name == "latency" and isinstance(value, str):
            out["latency_ms"] = parse_latency(value)
        elif value is not None:
            relative = name in whole and isinstance(value, float)
            out[name] = float(value * whole[name] if relative else value)
    return out


def by_units(recipe: Recipe) -> bool:
    """Whether a budget is searched by channels or heads, in an order that a criterion of the table gives."""
    return recipe.prune.granularity in ("channel", "head") and recipe.prune.criterion in TABLE


def way_of(run: Run, number: int) -> Way:
    """How a search for the budget decides what leaves, after so many levels."""
    prune = run.recipe.prune.model_copy(update={"allocation": run.recipe.budget.allocation})
    return Way(
        recipe=run.recipe.model_copy(update={"prune": prune}), task=run.task, level=Level(parameters=0.5), number=number,
        weights_given=run.weights_given, steps=run.folder.steps,
    )  # fmt: skip


def _found(run: Run, number: int, asked: Mapping[str, float], program: Program, tuned: Pruned | None) -> Searched:
    recipe = run.recipe
    run.say(f"budget: search for {', '.join(asked)}")
    here = Here.of(program, tuned)
    way = way_of(run, number)
    (run.folder.steps / f"search-{number}").mkdir(exist_ok=True)
    if not is_joint(recipe):
        held = as_it_is(run, way, here, asked)  # before layers are timed and spaces measured
        if held.holds:
            return _as_level(Met(plan=None, asked=dict(asked), rounds=(held,), chosen=held), run)
        return _as_level(meet(search_of(run, way, here, asked)), run)
    found = jointly(run, way, here, asked, program=program, before=tuned)
    if found is None or found.told["already_met"]:
        run.say("budget: met already, nothing leaves")
        return Searched(level=None, told={"asked": dict(asked), "already_met": True} if found is None else found.told)
    last = found.steps[-1] if found.steps else None
    return Searched(
        level=None if last is None else last.level, plan=None if last is None else last.plan, told=found.told,
        shrinking=found.shrinking, before=found.steps[:-1],
    )  # fmt: skip


def _as_level(found: Met, run: Run) -> Searched:
    told = {
        "asked": dict(found.asked),
        "rounds": [_round(r) for r in found.rounds],
        "chosen": found.chosen.number,
        "shares": dict(found.shares),
        "already_met": found.already_met,
    }
    if found.plan is None:
        run.say("budget: met already, nothing leaves")
        return Searched(level=None, told=told)
    return Searched(level=Level(parameters=int(found.chosen.measured["parameters"])), plan=found.plan, told=told)


def _round(found: Round) -> dict[str, Any]:
    return {
        "number": found.number, "foreseen": dict(found.foreseen), "measured": dict(found.measured), "holds": found.holds,
        "by": found.by, "error": found.error, "why": found.why, "plan_digest": None if found.plan is None else found.plan.digest,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- resume


def _key(run: Run, asked: Mapping[str, float], program: Program, tuned: Pruned | None) -> str:
    plan = None if tuned is None else tuned.plan.digest
    dense = files_digest(run.dense["artifact"].files)
    return key_of(run.recipe.digest, program.source_digest, plan, dense, dict(asked), run.environment)


def _kept(run: Run, number: int, asked: Mapping[str, float], program: Program, tuned: Pruned | None) -> Searched | None:
    """What an earlier attempt found: a search reads a clock, and would find another plan the second time."""
    file = run.folder.steps / f"search-{number}.json"
    if not file.exists():
        return None
    known = json.loads(file.read_text(encoding="utf-8"))
    if known["key"] != _key(run, asked, program, tuned):
        return None
    plan = None if known["plan"] is None else Plan.from_json(known["plan"])
    level = None if known["level"] is None else Level(**known["level"])
    shrinking = None if known["shrinking"] is None else Shrinking(**known["shrinking"])
    before = tuple(Step(level=Level(**b["level"]), plan=Plan.from_json(b["plan"])) for b in known.get("before", ()))
    return Searched(level=level, plan=plan, told=known["told"], shrinking=shrinking, before=before)


def _keep(
    run: Run, number: int, asked: Mapping[str, float], program: Program, tuned: Pruned | None, result: Searched
) -> None:
    known = {
        "key": _key(run, asked, program, tuned),
        "plan": None if result.plan is None else result.plan.to_json(),
        "level": None if result.level is None else result.level.model_dump(exclude_none=True),
        "told": result.told,
        "shrinking": None if result.shrinking is None else dataclasses.asdict(result.shrinking),
        **({"before": [_written(b) for b in result.before]} if result.before else {}),
    }
    write_text(run.folder.steps / f"search-{number}.json", json.dumps(known, sort_keys=True) + "\n")


def _written(step: Step) -> dict[str, Any]:
    return {"level": step.level.model_dump(exclude_none=True), "plan": step.plan.to_json()}


__all__ = [
    "ALONE",
    "Searched",
    "by_bits",
    "by_units",
    "check_budget",
    "check_training",
    "level_of",
    "limits",
    "searched",
    "way_of",
]
