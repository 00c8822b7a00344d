"""Ways: what carries out one level of a recipe: units or masks at once, whole modules, low rank, or a training that prunes."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import warnings
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from paredown.allocate import allocate, foresee
from paredown.allocate.request import MEASURED, Allocation
from paredown.budget import Budget
from paredown.couple import Coupling, couple
from paredown.errors import NothingToDo, UsageError
from paredown.examine import Cost, examine
from paredown.factorize import choose_ranks, factorize
from paredown.granularity import Granularity
from paredown.pipeline.kept_sensitivity import about_units, check_kept, kept_table
from paredown.pipeline.own_masks import own_masks
from paredown.plan import Mask, Plan
from paredown.program import Program, capture
from paredown.prune import Pruned, depth_candidates, drop_lowest, prune, score_depth, sparsify
from paredown.prune.gates import Gates
from paredown.prune.job import as_program, below_the_living
from paredown.prune.mask import apply_masks
from paredown.prune.movement import LEARNT
from paredown.prune.obs import check_obs, obs_on_plan
from paredown.prune.regularize import Growing, Regularize, Slimming
from paredown.prune.schedule import OneShot, Regrowth, Schedule, named_schedule
from paredown.prune.sparsify import check_sparsify
from paredown.quantize.static import refuse_target
from paredown.recipe import Recipe, level_of
from paredown.recipe_fields import IN_TRAINING, Level, Prune
from paredown.score import TABLE, Scores, score
from paredown.score.patterns import maskable
from paredown.search import sensitivity
from paredown.target import named
from paredown.train import Task
from paredown.train.loop import Hook, Training, private_copy
from paredown.train.task import kept_randomness, seed_all, stream

OF_SCORE = ("group", "bias", "reduction", "member_norm")
"""Options of every criterion of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """The model that a level starts from."""

    program: Program
    coupling: Coupling
    cost: Cost
    masks: Mapping[str, Mask]
    """What earlier levels hold at zero."""

    @classmethod
    def of(cls, program: Program, before: Pruned | None) -> Here:
        """The program, or what earlier levels made of it."""
        here = program if before is None else capture(before.module, program.inputs)
        masks = {} if before is None else {n: m for n, m in before.plan.masks.items() if n in here.state}
        return cls(program=here, coupling=couple(here), cost=examine(here), masks=masks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One level of a recipe, with all that decides what leaves."""

    recipe: Recipe
    task: Task
    level: Level
    number: int
    weights_given: bool
    steps: Path | None = None
    """Where measured sensitivities are kept as they come."""

    @property
    def cut(self) -> Granularity:
        """Of this level."""
        return Granularity.parse(self.recipe.prune.granularity_of(self.level))

    @property
    def chooses(self) -> bool:
        """Whether criterion, schedule and allocation decide what leaves: not ranks, nor masks that are given."""
        return self.level.factorize is None and self.level.masks is None

    @property
    def in_training(self) -> bool:
        """Whether what leaves is chosen in the course of a training."""
        asked = self.recipe.prune
        if not self.chooses or self.cut.kind == "layer":
            return False
        chosen_there = asked.schedule != "one-shot" if self.cut.masked else asked.regularize != "none"
        return chosen_there or asked.criterion in IN_TRAINING

    @property
    def updates(self) -> bool:
        """Whether the weights that stay answer for those that a mask takes."""
        at_once = self.cut.masked and self.level.factorize is None and not self.in_training
        return at_once and self.recipe.prune.update != "none"

    @property
    def rounds(self) -> int:
        """In how many rounds masks are chosen at once: one, but where options of the schedule one-shot say otherwise."""
        schedule = self._schedule() if self.cut.masked and self.chooses else None
        return schedule.rounds if isinstance(schedule, OneShot) else 1

    def _check_rounds(self) -> None:
        """Whether masks can be chosen in as many rounds; also refuses options that the schedule does not have."""
        rounds, asked = self.rounds, self.recipe.prune
        if rounds == 1:
            return
        rules = {
            "a density, which N:M brings itself": self.cut.kind != "n:m",
            "a criterion of the table, since those that are learnt never see the mask between two rounds": not self.in_training,
            "allocation uniform, global or erk, since the others measure one network": asked.allocation not in MEASURED,
        }
        for rule, holds in rules.items():
            if not holds:
                got = f"granularity {self.cut}, criterion {asked.criterion!r} and allocation {asked.allocation!r}"
                msg = f"prune.schedule_options rounds above 1 must come with {rule}. Got {rounds} rounds with {got}. Leave rounds out."
                raise UsageError(msg)

    def check(self) -> None:
        """Raises UsageError for what does not fit together, before any work."""
        self._check_rounds()
        if self.updates:
            options = {"block": 128, "damping": 0.01, **self.recipe.prune.update_options}
            check_obs(self.cut, True, num_batches=self.recipe.prune.score_batches, **options)  # type: ignore[arg-type]
        if not self.in_training:
            return
        if "density" in self.recipe.prune.criterion_options:
            msg = f"prune.criterion_options must leave density to the level where a training prunes. Got {self.recipe.prune.criterion_options}."
            raise UsageError(msg)
        if self.cut.masked and self.recipe.prune.update != "none":
            msg = (
                "prune.update must be used with masks that are chosen at once: schedule one-shot and a criterion of the table. Got "
                f"schedule {self.recipe.prune.schedule!r} and criterion {self.recipe.prune.criterion!r}."
            )
            raise UsageError(msg)
        if self.task.train is not None or self.task.step is None or self.task.train_batches is None:
            msg = (
                f"prune.schedule, prune.regularize and criteria such as {', '.join(IN_TRAINING)} must be used with a task's step and "
                f"train_batches: they hang on paredown's own loop. Got a task with {'its own train' if self.task.train else 'neither'}."
            )
            raise UsageError(msg)
        if self.recipe.prune.allocation in MEASURED:
            msg = f"prune.allocation must be uniform, global or erk where a training prunes. Got {self.recipe.prune.allocation!r}."
            raise UsageError(msg)
        amount = None if self.cut.kind == "n:m" or self.recipe.prune.criterion == "soft_movement" else 0.5
        budget = None if self.cut.masked else self.budget()
        check_sparsify(
            granularity=str(self.cut), criterion=self._criterion(), schedule=self._schedule(), regularize=self._regularize(),
            density=amount if self.cut.masked else None, budget=budget,
        )  # fmt: skip
        self._check_moves()

    def _check_moves(self) -> None:
        """Whether the training is long enough for a mask that moves. Its batches are counted as far as that takes, where they have no length."""
        schedule, recover = self._schedule(), self.recipe.of_level(self.level)
        if not isinstance(schedule, Regrowth) or not recover.epochs or self.task.train_batches is None:
            return
        enough = math.ceil((schedule.every + 1) / schedule.end / recover.epochs)
        with kept_randomness():
            batches = self.task.train_batches()
            count = len(batches) if isinstance(batches, Sized) else sum(1 for _ in itertools.islice(batches, enough))
        steps = count if recover.max_steps is None else min(count, recover.max_steps)
        if 0 < steps < enough:  # an epoch without a batch is told where it is trained
            schedule.points(0.5, steps * recover.epochs)

    # ------------------------------------------------------------------------------------------------------- at once

    def plan(self, here: Here) -> Plan:
        """What leaves at once, by the model as it is."""
        if self.level.factorize is not None:
            return self._ranks(here)
        if self.cut.kind == "layer":
            return self._modules(here)
        asked = self.recipe.prune
        if self.level.masks is not None:
            plan = own_masks(asked, self.level, here.program, here.coupling, here.cost)
        else:
            plan = self._allocated(here, self._amount(here)) if self.rounds == 1 else self._in_rounds(here)
        update = {"update": {"verb": asked.update, **asked.update_options}} if self.updates else {}
        return dataclasses.replace(plan, made_by={**plan.made_by, **update})

    @property
    def allocation(self) -> Allocation:
        """That of the recipe, or the usual one."""
        return self.recipe.prune.allocation or self.recipe.prune.usual_allocation(self.level)

    def _allocated(self, here: Here, amount: Budget | None) -> Plan:
        asked, scores = self.recipe.prune, self.scores(here, amount)
        return allocate(
            here.coupling, scores, here.cost, amount, target=self.recipe.target,
            allocation=self.allocation, normalize=asked.normalize, include=asked.include, exclude=asked.exclude,
            floor=asked.floor, align=None if self.cut.masked else asked.align,
            sensitivity=self.sensitivity(here, scores) if asked.allocation in MEASURED else None,
        )  # fmt: skip

    def _in_rounds(self, here: Here) -> Plan:
        """Scored and masked again and again, each time on what the rounds before left, as sparsify's OneShot does."""
        density = self._density(here)
        assert density is not None  # checked
        how = OneShot(rounds=self.rounds)
        kept, module, plan = dict(here.masks), private_copy(here.program.module), None
        for share in how.before(density, self._left(here)):
            now = dataclasses.replace(here, program=as_program(here.program, module), masks=kept)
            try:
                plan = self._allocated(now, Budget(density=share))
            except NothingToDo:  # a round too small to take one more cell
                continue
            kept = dict(Plan(keep={}, masks=kept).then(plan).masks)
            apply_masks(module, kept)
        if plan is None:
            return self._allocated(here, Budget(density=density))  # says why nothing leaves
        masks = {n: m for n, m in kept.items() if n in plan.masks or n not in here.masks}
        return dataclasses.replace(plan, masks=masks, made_by={**plan.made_by, "schedule": repr(how)})

    def foreseen(self, here: Here) -> Plan | None:
        """The plan by the model as it is now. Where a training will choose, its amounts hold, not which cells or units.

        None for soft movement, whose density is what comes out.
        """
        asked = self.recipe.prune
        if not self.in_training:
            return self.plan(here)
        if asked.criterion == "soft_movement":
            return None
        known = asked.criterion not in IN_TRAINING
        plain: dict[str, Any] = {"schedule": "one-shot", "schedule_options": {}, "regularize": "none"}
        plain["allocation"] = self.allocation  # of the training, which another schedule would not say
        plain |= {} if known else {"criterion": "l1", "criterion_options": {}}
        recipe = self.recipe.model_copy(update={"prune": asked.model_copy(update=plain)})
        return dataclasses.replace(self, recipe=recipe).plan(here)

    def carried_out(self, here: Here, plan: Plan) -> Pruned:
        """The plan on the model, proven."""
        if self.updates:
            return self._updated(here, plan)
        options: dict[str, Any] = {"realiser": self.recipe.prune.realiser, "seed": self.recipe.seed}
        if not plan.ranks:
            return prune(here.program, plan, **options)
        return factorize(here.program, plan, batches=self.inputs() if self._reads_data else None, **options)

    def _updated(self, here: Here, plan: Plan) -> Pruned:
        """The masks with the update of obs. Its sweep chooses anew only where no earlier level holds zeros."""
        asked, own = self.recipe.prune, self.task.step is None or self.task.train_batches is None
        options: dict[str, Any] = dict(asked.update_options)
        return obs_on_plan(
            here.program, plan, self.inputs if own else self._batches, step=None if own else self.task.step,
            choose=self._sweep_chooses and not here.masks, num_batches=asked.score_batches, **options,
        )  # fmt: skip

    @property
    def _sweep_chooses(self) -> bool:
        of_obs = self.chooses and self.recipe.prune.criterion == "obs"
        return of_obs and self.cut.kind in ("element", "n:m") and self.rounds == 1

    def budget(self) -> Budget:
        """The amounts of the level, as they are written."""
        return Budget(**self.level.model_dump(exclude_none=True, include={"channels", "parameters", "macs", "density"}))

    def _amount(self, here: Here) -> Budget | None:
        """The amounts; a density as one of all weights that take part, since the level says it of those that are left."""
        if self.cut.kind == "n:m":
            return None
        share = self._density(here)
        return self.budget() if share is None else Budget(density=share)

    def _density(self, here: Here) -> float | None:
        asked = self.level.density
        if asked is None:
            return None
        if isinstance(asked, int):
            total = sum(here.program.state[n].numel() for n in self._taking_part(here))
            return asked / total if asked < total else math.nextafter(1.0, 0.0)  # met already; 1.0 may mean one weight
        return asked * self._left(here)

    def _taking_part(self, here: Here) -> list[str]:
        """The weights that a mask of this level may cover."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # score and sparsify say which weights this cut leaves out
            return maskable(here.program, here.coupling, self.recipe.prune.include, self.recipe.prune.exclude, self.cut)

    def _left(self, here: Here) -> float:
        """Share of the weights that take part which earlier levels left."""
        names = self._taking_part(here)
        total = sum(here.program.state[n].numel() for n in names)
        gone = sum(here.masks[n].kept.size - here.masks[n].num_kept for n in names if n in here.masks)
        return (total - gone) / total

    def scores(self, here: Here, amount: Budget | None = None) -> Scores:
        """Scores of the table; weights that earlier levels took are below all others, whatever the criterion."""
        recipe, asked = self.recipe, self.recipe.prune
        options: dict[str, Any] = dict(asked.criterion_options)
        if options.get("sequential") and self.cut.kind != "n:m" and amount is not None:
            options = {"density": amount.density, **options}
        if self.cut.masked:
            options |= {"include": asked.include, "exclude": asked.exclude}
        data = TABLE[asked.criterion].needs_data
        scores = score(
            here.program, here.coupling, asked.criterion, granularity=str(self.cut),
            batches=self._batches() if data else None, loss=self.task.step, num_batches=asked.score_batches,
            seed=recipe.seed, weights_given=self.weights_given, **options,
        )  # fmt: skip
        gone = {n: m.kept for n, m in here.masks.items() if n in scores.by_cell}
        if not gone:
            return scores
        kept = {n: gone.get(n, np.ones(here.cost.parameter_shapes[n], np.bool_)) for n in scores.by_cell}
        return dataclasses.replace(scores, by_cell=below_the_living(scores.by_cell, kept, self.cut))

    def sensitivity(self, here: Here, scores: Scores) -> Any:
        """How far the outputs move when each space or weight alone keeps less.

        From the folder that the recipe names, where that is of this network; else measured on calibration inputs and kept as
        it comes. What the recipe names must fit its first level; later ones start from another network.
        """
        asked = self.recipe.prune
        repair = asked.reconstruct and not self.cut.masked
        if asked.sensitivity is not None:
            try:
                return kept_table(Path(asked.sensitivity), about_units(here.program, scores, repair=repair), scores)
            except UsageError:
                if self.number == 1 and self.steps is not None:  # without steps: a dry run, the base is not trained yet
                    raise
        return sensitivity(
            here.program, here.coupling, scores, batches=self.inputs(), distance="mse", include=asked.include,
            exclude=asked.exclude, num_batches=asked.score_batches, seed=self.recipe.seed, device=self.recipe.device,
            repair=repair,
            journal=None if self.steps is None else self.steps / f"level-{self.number}-sensitivity.jsonl",
        )  # fmt: skip

    def _modules(self, here: Here) -> Plan:
        """The modules of the least block influence on calibration inputs."""
        assert self.level.modules is not None  # the recipe was checked
        found = depth_candidates(here.program)
        if not found:
            msg = "a level of modules must have residual blocks that may be left out. Got a model without: use channels, or a plan of your own."
            raise NothingToDo(msg)
        influence = score_depth(here.program, self.inputs())
        if self.level.modules >= len(influence):
            return Plan(keep={}, made_by={"verb": "drop_lowest", "already_met": True})
        plan = drop_lowest(influence, self.level.modules)
        gone = [c for c in found if c.path in plan.drop_modules]
        reached = {
            "modules": self.level.modules,
            "parameters": here.cost.parameters - sum(c.parameters for c in gone),
            "macs": here.cost.macs - sum(c.macs for c in gone),
        }
        return dataclasses.replace(plan, made_by={**plan.made_by, "reached": reached})

    def _ranks(self, here: Here) -> Plan:
        asked = self.recipe.prune
        assert self.level.factorize is not None
        options: dict[str, Any] = {} if asked.floor is None else {"floor": asked.floor}
        budget = self.budget() if self.level.energy is None else None
        return choose_ranks(
            here.program, budget, energy=self.level.energy, method=self.level.factorize, include=asked.include,
            exclude=asked.exclude, allocation="uniform" if self.allocation == "uniform" else "global", align=asked.align,
            target=self.recipe.target, batches=self.inputs() if self._reads_data else None, **options,
        )  # fmt: skip

    @property
    def _reads_data(self) -> bool:
        return self.level.factorize in ("asvd", "svd_llm")

    # ------------------------------------------------------------------------------------------------- in a training

    def trained(
        self, here: Here, model: Program | Pruned, teacher: nn.Module, *, checkpoint: Path, progress: Any
    ) -> Pruned:
        """The level pruned in the course of its training; the checkpoint continues it where it was stopped."""
        recipe, asked = self.recipe, self.recipe.prune
        assert self.task.step is not None and self.task.train_batches is not None  # checked
        training: dict[str, Any] = recipe.of_level(self.level).model_dump(exclude={"ranks"})
        training["lr_schedule"] = training.pop("schedule")
        own: dict[str, Any] = asked.criterion_options if asked.criterion in TABLE else {}
        if self.task.optimizer is not None:
            training["optimizer"] = self.task.optimizer
        soft = asked.criterion == "soft_movement"
        return sparsify(
            model, self.task.train_batches, step=self.task.step, granularity=str(self.cut),
            density=None if soft or self.cut.kind == "n:m" else self._density(here),
            budget=None if self.cut.masked else self.budget(), criterion=self._criterion(),
            allocation=None if self.cut.kind == "n:m" else asked.allocation, schedule=self._schedule(),
            regularize=self._regularize(), include=asked.include, exclude=asked.exclude, floor=asked.floor,
            normalize=asked.normalize, align=None if self.cut.masked else asked.align, target=recipe.target,
            score_batches=asked.score_batches, teacher=teacher if recipe.recover.distil != "none" else None,
            seed=stream(recipe.seed, self.number), device=recipe.device, checkpoint=checkpoint, progress=progress,
            hooks=self._holding(here), **training, **own,
        )  # fmt: skip

    def _holding(self, here: Here) -> tuple[Hook, ...]:
        """What keeps zeros of earlier levels that the masks of this training do not: all where units leave, else others' weights."""
        own: set[str] = set()
        if self.cut.masked and here.masks:
            own = set(self._taking_part(here))
        names = frozenset(here.masks) - own
        return (zeros_held(names),) if names else ()

    def _criterion(self) -> Any:
        asked = self.recipe.prune
        if asked.criterion == "gates":
            return made(Gates, asked.criterion_options, "prune.criterion_options")
        if asked.criterion in LEARNT:
            return made(type(LEARNT[asked.criterion]), asked.criterion_options, "prune.criterion_options")
        return asked.criterion

    def _schedule(self) -> Schedule | None:
        asked = self.recipe.prune
        if not self.cut.masked:
            return None
        named = named_schedule(asked.schedule)
        own = {"by": named.by} if isinstance(named, Regrowth) else {}
        options: Schedule = made(type(named), {**own, **asked.schedule_options}, "prune.schedule_options")
        return options

    def _regularize(self) -> Regularize | None:
        asked = self.recipe.prune
        if self.cut.masked or asked.regularize == "none":
            return None
        options = {"epochs": max(1, self.recipe.of_level(self.level).epochs), **asked.regularize_options}
        penalty: Regularize = made(
            Growing if asked.regularize == "growing" else Slimming, options, "prune.regularize_options"
        )
        return penalty

    # ---------------------------------------------------------------------------------------------------------- data

    def _batches(self) -> Any:
        """The user's training batches with the random numbers of the seed."""
        if self.task.train_batches is None:
            return None
        seed_all(self.recipe.seed)
        return self.task.train_batches()

    def inputs(self) -> Any:
        """Calibration inputs."""
        seed_all(self.recipe.seed)
        return self.task.calibration_batches()


def zeros_held(names: frozenset[str]) -> Hook:
    """A hook that keeps what is zero in these parameters as a training begins, whatever shape a removal has left them."""
    seen: list[tuple[nn.Module, list[tuple[nn.Parameter, Tensor]]]] = []

    def pairs(training: Training) -> list[tuple[nn.Parameter, Tensor]]:
        if not seen or seen[0][0] is not training.module:
            parameters = training.module.named_parameters(remove_duplicate=False)
            seen[:] = [(training.module, [(p, p.detach() == 0) for n, p in parameters if n in names])]
        return seen[0][1]

    @torch.no_grad()
    def gradients(training: Training) -> None:
        for parameter, gone in pairs(training):
            if parameter.grad is not None and not parameter.grad.is_sparse:
                parameter.grad.masked_fill_(gone, 0.0)

    @torch.no_grad()
    def weights(training: Training) -> None:
        for parameter, gone in pairs(training):
            parameter.masked_fill_(gone, 0.0)

    return Hook(name="zeros of earlier levels", after_backward=gradients, after_step=weights)


def check_criterion(asked: Prune) -> None:
    """Raises UsageError where nobody knows the criterion, or it has no such option."""
    known = (*TABLE, *IN_TRAINING)
    if asked.criterion not in known:
        near = difflib.get_close_matches(asked.criterion, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        msg = f"prune.criterion must be one of {', '.join(known)}. Got {asked.criterion!r}.{hint}"
        raise UsageError(msg)
    if asked.criterion in TABLE:
        fields = [*OF_SCORE, *(f.name for f in dataclasses.fields(TABLE[asked.criterion].options))]
        _refuse_unknown(asked.criterion_options, fields, "prune.criterion_options")


def check_ways(recipe: Recipe, task: Task) -> None:
    """Criterion, schedule and their options known, and every level able to run; raises UsageError before any work."""
    asked, scheme = recipe.prune, recipe.quantize.scheme
    refuse_target(scheme, named(recipe.target))
    check_criterion(asked)
    alone = level_of(recipe)
    if alone is not None:
        try:
            Prune.model_validate({**asked.model_dump(by_alias=True), "levels": (alone,)})
        except ValidationError as error:
            what = "density" if alone.channels is None else "channels"
            msg = f"budget.{what} must fit what is pruned, of which it is the one level. Got: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
            raise UsageError(msg) from error
    ways = [
        Way(recipe=recipe, task=task, level=level, number=n, weights_given=True)
        for n, level in enumerate(asked.levels or filter(None, [alone]), start=1)
    ]
    of_masks = [w for w in ways if w.cut.masked and w.level.factorize is None]
    chosen = [w for w in of_masks if w.chooses]
    of_units = [w for w in ways if w.cut.kind in ("channel", "head") and w.level.factorize is None]
    for key, given, serves, what in (
        ("schedule", asked.schedule != "one-shot", chosen, "masks that are chosen"),
        ("schedule_options", bool(asked.schedule_options), chosen, "masks that are chosen"),
        ("update", asked.update != "none", of_masks, "masks"),
        (
            "update_options",
            bool(asked.update_options),
            of_masks if asked.update != "none" else [],
            "masks and an update",
        ),
        ("regularize", asked.regularize != "none", of_units, "channels or heads"),
        (
            "regularize_options",
            bool(asked.regularize_options),
            of_units if asked.regularize != "none" else [],
            "channels or heads and a penalty",
        ),
    ):
        if given and not serves:
            msg = f"prune.{key} must be used with a level of {what}. Got {getattr(asked, key)!r}, and no such level."
            raise UsageError(msg)
    _refuse_unknown(asked.update_options, ["block", "damping"], "prune.update_options")
    for way in ways:
        way.check()
    if asked.sensitivity is not None and asked.allocation in MEASURED:
        check_kept(Path(asked.sensitivity))
    if recipe.recover.ranks > 1 and (task.train is not None or any(way.in_training for way in ways)):
        own = "the task's own train()" if task.train is not None else "a level that is pruned in training"
        msg = f"recover.ranks must be 1 with {own}. Got {recipe.recover.ranks}. Leave it out."
        raise UsageError(msg)
    if recipe.recover.ranks > 1 and ":" in recipe.device:
        msg = f"device must be cuda where ranks share a training: each rank has a GPU of its own. Got {recipe.device} with recover.ranks {recipe.recover.ranks}."
        raise UsageError(msg)


def check_rounding(recipe: Recipe, task: Task) -> None:
    """Raises UsageError where the task has nothing to train with rounding by."""
    if recipe.quantize.epochs and (task.step is None or task.train_batches is None):
        msg = "quantize.epochs must have a step(model, batch) in the task module. Got a task that trains by itself. Set quantize.epochs to 0, or add step."
        raise UsageError(msg)


def simulated(tuned: Pruned, program: Program | None = None) -> dict[str, Any]:
    """What masks would save on a runtime that skips zeros, estimated, beside what a dense runtime stores and executes.

    `program` is the capture of the module, where there is one already; its eval graph is enough.
    """
    here = Here.of(program or capture(tuned.module, tuned.program.inputs, train=False), None)
    masks = {n: m for n, m in tuned.plan.masks.items() if n in here.program.state}
    if not masks:
        return {}
    plan = Plan(keep={}, masks=masks)
    weights = {n: {"granularity": m.granularity, "density": m.density} for n, m in masks.items()}
    return {**dataclasses.asdict(foresee(here.coupling, here.cost, plan)), "weights": weights}


def made(kind: type[Any], options: Mapping[str, Any], where: str) -> Any:
    """An options object; raises UsageError for names that it does not have."""
    fields = {f.name: f.default for f in dataclasses.fields(kind)}
    _refuse_unknown(options, [*fields], where)
    for name, value in options.items():
        usual = type(fields[name])
        fits = isinstance(value, (int, float) if usual is float else usual) and isinstance(value, bool) == (
            usual is bool
        )
        if usual in (bool, int, float, str) and not fits:
            what = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[usual]
            msg = f"{where} {name} must be {what}. Got {value!r}."
            raise UsageError(msg)
    return kind(**options)


def _refuse_unknown(options: Mapping[str, Any], known: list[str], where: str) -> None:
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            msg = f"{where} must be among {', '.join(known) or 'none'}. Got {name!r}.{hint}"
            raise UsageError(msg)


__all__ = ["IN_TRAINING", "Here", "Way", "check_rounding", "check_ways", "level_of", "made", "simulated"]
