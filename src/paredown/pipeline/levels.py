"""One level of pruning: what leaves is decided, carried out with proof, and trained back; kept on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree as pytree

from paredown.couple import Space
from paredown.pipeline.folder import key_of
from paredown.pipeline.run import Run
from paredown.pipeline.simulated import told
from paredown.pipeline.ways import Here, Way
from paredown.plain import deep_copy
from paredown.plan import Plan
from paredown.program import Program, as_inputs, capture
from paredown.prune import Pruned, compose, prune, take_over
from paredown.prune.given import torch_masks
from paredown.prune.mask import apply_masks
from paredown.prune.reconstruct import reconstruct
from paredown.recipe_fields import SEARCHED, STREAMS, Level
from paredown.records import whole_file
from paredown.train import recover
from paredown.train.distil import check_classes
from paredown.train.task import seed_all, stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run begins with."""

    dense: nn.Module
    program: Program
    before: Pruned | None
    """The masks of torch.nn.utils.prune that the model came with, as the level before the first; None where it has none."""
    notes: tuple[str, ...] = ()


def started(run: Run, model: nn.Module) -> Start:
    """The dense model, captured; the masks that it came with are what every level and training holds at zero."""
    dense, plan = without_torch_masks(model)
    program = capture(dense, run.task.inputs())
    if plan is None:
        return Start(dense=dense, program=program, before=None)
    before = prune(program, plan, realiser=run.recipe.prune.realiser, seed=run.recipe.seed)
    zeros = sum(m.kept.size - m.num_kept for m in plan.masks.values())
    told = f"took over the masks of torch.nn.utils.prune that the model came with: {zeros:,} zeros in {len(plan.masks)} weights, which every training keeps"
    return Start(dense=dense, program=program, before=before, notes=(told, *before.notes))


def without_torch_masks(model: nn.Module) -> tuple[nn.Module, Plan | None]:
    """The model with plain weights, and the masks of torch.nn.utils.prune that prune some of it; as it is where none does."""
    return (model, None) if all(kept.all() for kept in torch_masks(model).values()) else take_over(model)


AT_INITIALISATION = ("snip", "grasp", "synflow")
"""Criteria that were made for networks that nothing has trained yet."""


def without_random_teacher(run: Run, dense: nn.Module) -> tuple[Run, tuple[str, ...]]:
    """The run, without distillation where the dense network is known to be untrained, and what to tell of it.

    Its teacher would be noise. The digest stays that of the recipe that was asked for: the same recipe decides the same.
    A teacher that stays is one that `check_teacher` lets through.
    """
    taught, told = _taught(run, dense)
    check_teacher(taught, dense)
    return taught, told


def _taught(run: Run, dense: nn.Module) -> tuple[Run, tuple[str, ...]]:
    recipe, asked = run.recipe, run.recipe.prune
    if not _distils(run) or _brought_weights(run):
        return run, ()
    why = "its batch norms have never seen a batch" if newborn(dense) else ""
    why = why if run.weights_given else "no weights were given"
    if not why:
        moving = asked.schedule in ("rigl", "set") and asked.criterion == "random"
        if not moving and asked.criterion not in AT_INITIALISATION:
            return run, ()
        what = f"schedule {asked.schedule} with criterion random" if moving else f"criterion {asked.criterion}"
        note = f"{what} is one for untrained networks: if the dense network is one, it teaches noise by recover.distil {recipe.recover.distil}. Then set recover.distil: none."
        return run, (note,)
    recover_ = recipe.recover.model_copy(update={"distil": "none", "distil_layers": []})
    taught = recipe.model_copy(update={"recover": recover_})
    taught.__dict__["digest"] = recipe.digest
    note = f"recover.distil {recipe.recover.distil} was left out: the dense network, which would teach, is untrained ({why}). Give weights, or set recover.distil: none."
    return dataclasses.replace(run, recipe=taught), (note,)


def check_teacher(run: Run, network: nn.Module) -> None:
    """That a network whose answers will be distilled by kl has classes: told before searches and trainings, not by the first step after them.

    Raises UsageError. A network that cannot be called like this while it trains (it wants targets) is left to that step.
    """
    trains = run.task.step is not None and run.task.train_batches is not None
    if run.recipe.recover.distil != "kl" or not trains or not _distils(run):
        return
    args, kwargs = as_inputs(run.task.inputs())
    try:
        with torch.no_grad(), torch.random.fork_rng():
            outputs = pytree.tree_leaves(deep_copy(network).train()(*args, **kwargs))
    except Exception:
        return
    floats = [t for t in outputs if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if floats:
        check_classes(floats[0])


def _distils(run: Run) -> bool:
    """Whether the recipe's teacher teaches in some training."""
    recipe, asked = run.recipe, run.recipe.prune
    pruned = asked.levels or any(getattr(recipe.budget, n) is not None for n in (*SEARCHED, "channels", "density"))
    epochs = (recipe.recover.epochs, *(v.epochs or 0 for v in asked.levels)) if pruned else ()
    trains = any(e > 0 for e in (recipe.quantize.epochs, *epochs))
    return recipe.recover.distil != "none" and trains and run.task.train is None


def _brought_weights(run: Run) -> bool:
    """Whether the dense network was trained by the task's base, or has weights from a file."""
    return run.recipe.weights is not None or (run.task.base is not None and run.recipe.model is None)


def newborn(dense: nn.Module) -> bool:
    """Whether every batch norm still has the statistics that it was made with: training would have moved them."""
    statistics = [
        (m.running_mean, m.running_var)
        for m in dense.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None and m.running_var is not None
    ]
    return bool(statistics) and all(bool((mean == 0).all() and (var == 1).all()) for mean, var in statistics)


def one_level(
    run: Run,
    number: int,
    level: Level,
    program: Program,
    before: Pruned | None,
    teacher: nn.Module,
    given: Plan | None = None,
) -> tuple[Pruned, dict[str, Any]] | None:
    """Prune with proof and train. Returns the result and what to record; None where the level is met already.

    A plan that is `given` was found by a search, and is carried out as it is.
    """
    recipe = run.recipe
    way = Way(
        recipe=recipe, task=run.task, level=level, number=number, weights_given=run.weights_given,
        steps=run.folder.steps,
    )  # fmt: skip
    run.say(f"level {number}: look at the model")
    here = Here.of(program, before)
    if way.in_training and given is None:
        tuned, history = _in_training(run, way, here, before or program, teacher)
        return tuned, {**_told(way, here, tuned, tuned.plan), "history": history}
    if given is None:
        run.say(f"level {number}: score, allocate")
    plan = way.plan(here) if given is None else given
    if plan.made_by.get("already_met"):
        return None
    run.say(f"level {number}: prune and prove")
    step = way.carried_out(here, plan)
    if recipe.prune.reconstruct and plan.keep and run.task.train_batches is not None:
        run.say(f"level {number}: reconstruct")
        step = reconstruct(
            _with_zeros(step, here),
            lambda: _fresh(run.task.train_batches, recipe.seed),
            step=run.task.step,
            num_batches=recipe.prune.score_batches,
            seed=recipe.seed,
        )
        apply_masks(step.module, step.plan.masks)  # weights are fitted beside their zeros, biases are not
    pruned = step if before is None else compose(before, step, seed=recipe.seed)
    tuned, history = _recovered(run, number, level, pruned, teacher)
    fits = {name: dataclasses.asdict(fit) for name, fit in step.fits.items()}
    return tuned, {**_told(way, here, tuned, plan), "history": history, "fits": fits}


def _with_zeros(step: Pruned, here: Here) -> Pruned:
    """The level with what earlier ones hold at zero, so that a fit of its weights keeps it."""
    masks = Plan(keep={}, masks=here.masks).then(step.plan).masks
    return dataclasses.replace(step, plan=dataclasses.replace(step.plan, masks=masks)) if masks else step


def _told(way: Way, here: Here, tuned: Pruned, plan: Plan) -> dict[str, Any]:
    """What a record says of a level."""
    known = {"budget", "reached", "blocked_by", "criterion", "allocation", "granularity", "density", "schedule"}
    known |= {"method", "choice", "remain", "regularize", "update", "energy", "masks", "sha256"}
    return {
        "removed": [_removed(s, plan) for s in here.coupling.spaces] if plan.keep else [],
        "realiser": tuned.realiser,
        "proof": dataclasses.asdict(tuned.proof),
        "reached": {k: v for k, v in plan.made_by.items() if k in known},
        "ranks": {n: {"method": r.method, "ranks": list(r.ranks)} for n, r in plan.ranks.items()},
        "left_out": list(plan.drop_modules),
        "simulated": told(tuned),
        "notes": list(tuned.notes),
    }


def _in_training(
    run: Run, way: Way, here: Here, model: Program | Pruned, teacher: nn.Module
) -> tuple[Pruned, list[dict[str, Any]]]:
    """What leaves is chosen while the model trains; checkpoints of the loop continue it."""
    run.say(f"level {way.number}: prune in training")
    history: list[dict[str, Any]] = []

    def progress(state: Any) -> None:
        history[:] = [{"epoch": e.epoch, "loss": e.loss, "lr": e.lr} for e in state.history]
        run.on_training(f"prune level {way.number}", state)

    checkpoint = run.folder.steps / f"level-{way.number}-training.safetensors"
    return way.trained(here, model, teacher, checkpoint=checkpoint, progress=progress), history


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


def _fresh(batches: Callable[[], Any] | None, seed: int) -> Any:
    """The user's training batches with the random numbers of a seed."""
    if batches is None:
        return None
    seed_all(seed)
    return batches()


def _recovered(
    run: Run, number: int, level: Level, pruned: Pruned, teacher: nn.Module
) -> tuple[Pruned, list[dict[str, Any]]]:
    """Batch norm re-estimated, then trained, with the history; kept on disk, since it is the long part."""
    recipe, task, own = run.recipe, run.task, run.task.train is not None
    file = run.folder.steps / f"level-{number}.safetensors"
    key = key_of(
        recipe.digest, pruned.plan.digest, pruned.program.source_digest, number, run.environment["versions"], STREAMS
    )
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

    if recipe.recover.ranks > 1:
        from paredown.pipeline.ranks import recovered_by_ranks  # which reads recipes and tasks as this does

        tuned = recovered_by_ranks(run, number, level, pruned, teacher, progress)
        _keep(file, tuned, key, history)
        return tuned, history
    tuned = recover(
        pruned,
        None if own else task.train_batches,
        step=None if own else task.step,
        train=task.train,
        teacher=None if own else teacher,
        seed=stream(recipe.seed, number),
        device=recipe.device,
        checkpoint=None if own else run.folder.steps / f"level-{number}-training.safetensors",
        progress=progress,
        **recovery(recipe.of_level(level).model_dump(), task.optimizer),
    )
    _keep(file, tuned, key, history)
    return tuned, history


def recovery(fields: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """The options of `recover` that a recipe gives, with the task's own optimizer where it has one."""
    given = {name: value for name, value in fields.items() if name != "ranks"}
    return given if optimizer is None else {**given, "optimizer": optimizer}


def _keep(file: Path, tuned: Pruned, key: str, history: list[dict[str, Any]]) -> None:
    state = {n: t.detach().contiguous().clone() for n, t in tuned.module.state_dict().items()}
    with whole_file(file) as temporary:
        save_file(state, temporary, metadata={"key": key, "history": json.dumps(history)})
