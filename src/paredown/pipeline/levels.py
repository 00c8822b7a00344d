"""One level of pruning: what leaves is decided, carried out with proof, and trained back; kept on disk."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from paredown.allocate import allocate
from paredown.budget import Budget
from paredown.couple import Coupling, Space, couple
from paredown.errors import UsageError
from paredown.examine import Cost, examine
from paredown.pipeline.folder import key_of
from paredown.pipeline.run import Run
from paredown.plan import Plan
from paredown.program import Program, capture
from paredown.prune import Pruned, compose, prune
from paredown.prune.reconstruct import reconstruct
from paredown.recipe_fields import Level
from paredown.records import whole_file
from paredown.score import TABLE, score
from paredown.train import recover
from paredown.train.task import seed_all


def one_level(
    run: Run, number: int, level: Level, program: Program, before: Pruned | None, teacher: nn.Module
) -> tuple[Pruned, dict[str, Any]] | None:
    """Score, allocate, prune with proof, train. Returns the result and what to record; None where the level is met already."""
    run.say(f"level {number}: couple, score, allocate")
    recipe = run.recipe
    here = program if before is None else capture(before.module, program.inputs)
    coupling, cost = couple(here), examine(here)
    plan = _plan(run, here, coupling, cost, level)
    if plan.made_by.get("already_met"):
        return None
    run.say(f"level {number}: prune and prove")
    step = prune(here, plan, realiser=recipe.prune.realiser, seed=recipe.seed)
    fits: Mapping[str, Any] = {}
    if recipe.prune.reconstruct and plan.keep and run.task.train_batches is not None:
        run.say(f"level {number}: reconstruct")
        step = reconstruct(
            step,
            lambda: _fresh(run.task.train_batches, recipe.seed),
            step=run.task.step,
            num_batches=recipe.prune.score_batches,
            seed=recipe.seed,
        )
        fits = step.fits
    pruned = step if before is None else compose(before, step, seed=recipe.seed)
    tuned, history = _recovered(run, number, pruned, teacher)
    details = {
        "removed": [_removed(s, plan) for s in coupling.spaces],
        "history": history,
        "realiser": tuned.realiser,
        "proof": dataclasses.asdict(tuned.proof),
        "reached": {
            k: v
            for k, v in step.plan.made_by.items()
            if k in ("budget", "reached", "blocked_by", "criterion", "allocation", "granularity")
        },
        "fits": {name: dataclasses.asdict(fit) for name, fit in fits.items()},
    }
    return tuned, details


def check_criterion(criterion: str) -> None:
    """Known to the table of criteria, before any work; raises UsageError with what was probably meant."""
    if criterion not in TABLE:
        near = difflib.get_close_matches(criterion, TABLE, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        msg = f"prune.criterion must be one of {', '.join(TABLE)}. Got {criterion!r}.{hint}"
        raise UsageError(msg)


def _removed(space: Space, plan: Plan) -> dict[str, Any]:
    return {
        "space": space.name,
        "kind": space.kind,
        "before": len(space),
        "after": len(space) - _num_removed(space, plan),
        "parameters": sorted({f.parameter for f in space.footprints})[:8],
    }


def _num_removed(space: Space, plan: Plan) -> int:
    first = space.footprints[0]
    kept = plan.keep.get(first.parameter, {}).get(first.axis)
    if kept is None:
        return 0
    alive = set(kept)
    return sum(int(row[0]) not in alive for row in first.indices)


def _plan(run: Run, program: Program, coupling: Coupling, cost: Cost, level: Level) -> Plan:
    recipe, task = run.recipe, run.task
    options = recipe.prune
    scores = score(
        program,
        coupling,
        options.criterion,
        batches=_fresh(task.train_batches, recipe.seed) if TABLE[options.criterion].needs_data else None,
        loss=task.step,
        num_batches=options.score_batches,
        seed=recipe.seed,
        weights_given=run.weights_given,
    )
    return allocate(
        coupling,
        scores,
        cost,
        Budget(**level.model_dump(exclude_none=True)),
        target=recipe.target,
        allocation=options.allocation,
        normalize=options.normalize,
        include=options.include,
        exclude=options.exclude,
        floor=options.floor,
        align=options.align,
    )


def _fresh(batches: Callable[[], Any] | None, seed: int) -> Any:
    """The user's training batches with the random numbers of a seed."""
    if batches is None:
        return None
    seed_all(seed)
    return batches()


def _recovered(run: Run, number: int, pruned: Pruned, teacher: nn.Module) -> tuple[Pruned, list[dict[str, Any]]]:
    """Batch norm re-estimated, then trained, with the history; kept on disk, since it is the long part."""
    recipe, task, own = run.recipe, run.task, run.task.train is not None
    file = run.folder.steps / f"level-{number}.safetensors"
    key = key_of(recipe.digest, pruned.plan.digest, pruned.program.source_digest, number, run.environment["versions"])
    if file.exists():
        with safe_open(file, framework="pt") as kept:
            known = kept.metadata() or {}
        if known.get("key") == key:
            pruned.module.load_state_dict(load_file(file), strict=True)
            return pruned, json.loads(known["history"])
    run.say(f"level {number}: recover")
    history: list[dict[str, Any]] = []

    def progress(state: Any) -> None:
        history[:] = [{"epoch": e.epoch, "loss": e.loss, "lr": e.lr} for e in state.history]
        run.on_training(f"recover level {number}", state)

    tuned = recover(
        pruned,
        None if own else task.train_batches,
        step=None if own else task.step,
        train=task.train,
        teacher=None if own else teacher,
        seed=recipe.seed + number,
        device=recipe.device,
        checkpoint=None if own else run.folder.steps / f"level-{number}-training.safetensors",
        progress=progress,
        **{**recipe.recover.model_dump(), **({"optimizer": task.optimizer} if task.optimizer is not None else {})},
    )
    state = {n: t.detach().contiguous().clone() for n, t in tuned.module.state_dict().items()}
    with whole_file(file) as temporary:
        save_file(state, temporary, metadata={"key": key, "history": json.dumps(history)})
    return tuned, history
