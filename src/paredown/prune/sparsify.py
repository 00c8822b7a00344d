"""sparsify: prune in the course of a training, by a schedule. Every way of it is hooks of the one loop `fit`.

| schedule (options: paredown.prune.schedule) | |
|---|---|
| "gradual", Gradual (default for masks) | cubic ramp (Zhu & Gupta 2017); `regrow` lets masks grow back by gradient |
| "one-shot", OneShot | all before the training; in rounds for SynFlow |
| "iterative", Iterative | equal rounds with recovery between, geometric or linear |
| "lottery", Lottery | whole trainings with a rewind of weights or of the learning rate between |
| "rigl", "set", Regrowth | constant density, dropped and grown (Evci et al. 2020; Mocanu et al. 2018) |

| criterion | |
|---|---|
| any of `score`, with its options | on the weights as they are at each point of the schedule |
| "movement", "soft_movement", Movement, SoftMovement | scores learnt beside the weights (Sanh et al. 2020) |
| "sr_ste", SrSte | dense weights behind the mask, pulled to zero where masked (Zhou et al. 2021) |
| "accumulated_movement", "gradient_drift" | lowest Σ -g·w, largest |Σ g|, of the weights that train |
| "gates", Gates | channels: gates learnt while the weights stand still (Wang et al. 2020) |

`regularize` (channels): Growing or Slimming, a training with a penalty before the removal. From scratch: capture a model of
`fresh` weights; SNIP, GraSP and SynFlow are criteria, RigL is criterion "random" with allocation "erk" and schedule "rigl".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from paredown.allocate import allocate
from paredown.allocate.request import Allocation, Floor, LeaveOut, Normalize, Scope
from paredown.budget import Budget
from paredown.couple import couple
from paredown.errors import NothingToDo, UsageError, must_be
from paredown.examine import examine
from paredown.granularity import Granularity
from paredown.program import Program, capture
from paredown.prune.accumulate import READINGS
from paredown.prune.changing import Changing, ChangingMasks, Kept
from paredown.prune.gates import Gates
from paredown.prune.job import Cells, Job, accumulation, cells_of, chosen, finished, numbered, trained, with_masks
from paredown.prune.lottery import lottery
from paredown.prune.movement import LEARNT, Learning, Learnt, LearntMasks, Movement, SoftMovement, SrSte, magnitude
from paredown.prune.nouns import Pruned
from paredown.prune.regularize import Regularize
from paredown.prune.remove import compose
from paredown.prune.schedule import Gradual, Iterative, Lottery, OneShot, Regrowth, Schedule, cubic, named_schedule
from paredown.prune.structured import remove_in_training
from paredown.score import TABLE, Scores
from paredown.score.patterns import cut_as_said, stored_in_out
from paredown.statistics.batches import Batches, Given, batches_of, check_whole
from paredown.train.distil import Distil
from paredown.train.loop import Hook, OptimizerChoice, Progress
from paredown.train.loop import Schedule as LearningRates
from paredown.train.task import Step


def sparsify(
    model: Program | Pruned,
    train_batches: Given,
    *,
    step: Step,
    density: float | Sequence[float] | None = None,
    budget: Budget | Sequence[Budget] | None = None,
    granularity: str = "element",
    criterion: str | Learnt | Gates = "l1",
    allocation: Allocation | None = None,
    schedule: Schedule | str | None = None,
    regularize: Regularize | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    leave_out: Sequence[LeaveOut] = (),
    floor: Floor | None = None,
    normalize: Normalize | None = None,
    scope: Scope | None = None,
    align: int | None = None,
    target: str = "onnxruntime-x86",
    score_batches: int = 16,
    epochs: int = 3,
    optimizer: OptimizerChoice = "sgd",
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    clip_norm: float | None = None,
    lr_schedule: LearningRates = "cosine",
    seed: int = 0,
    device: str = "cpu",
    teacher: nn.Module | None = None,
    distil: Distil | None = None,
    temperature: float = 4.0,
    distil_weight: float = 0.9,
    distil_layers: Sequence[str] = (),
    distil_layers_weight: float = 10.0,
    batch_norm_batches: int = 100,
    hooks: Sequence[Hook] = (),
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    max_steps: int | None = None,
    **options: Any,
) -> Pruned:
    """Prune while training: what stays is chosen, trained, chosen again, as a schedule says; zeros stay zero in between.

    `density` is the share of the considered weights that stays (masks; N:M and "soft_movement" bring their own), `budget` a
    Budget for units that leave physically (granularity "channel", "head"). A sequence is levels: each entry is what remains
    of what the level before left, each with all epochs (and a numbered checkpoint). The model is not touched.

    Usual `allocation`: "global" for masks, "erk" for movement, accumulated_movement and gradient_drift, "uniform" for wanda,
    channels and N:M; it and the next up to `target` are those of allocate, `options` those of the criterion, the training's
    those of recover (`lr_schedule`: its `schedule`). With `checkpoint` the same call goes on where it stopped, to the same bits.

    Raises UsageError, NothingToDo, InfeasibleError, VerificationError (a zero came alive), and what its parts raise.

    >>> import torch; program = capture(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.zeros(2, 8))
    >>> data = [(torch.randn(16, 8), torch.randint(4, (16,)))] * 8
    >>> step = lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1])
    >>> sparse = sparsify(program, lambda: data, step=step, density=0.25, epochs=2)
    >>> sum(int((p != 0).sum()) for p in sparse.module.parameters() if p.dim() == 2)
    48
    """
    batches = _checked(model, train_batches, budget, score_batches, batch_norm_batches)
    asked = _Asked.read(granularity, criterion, schedule, regularize)
    amounts = _levels(asked, density, budget, {"leave_out": leave_out, "scope": scope, "align": align})
    where = {
        "allocation": allocation or asked.usual(), "include": include, "exclude": exclude, "floor": floor,
        "normalize": normalize, "target": target,
        **({"leave_out": leave_out, "scope": scope} if asked.cut.masked else {"align": align}),
    }  # fmt: skip
    training = {
        "optimizer": optimizer, "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "clip_norm": clip_norm,
        "schedule": lr_schedule, "device": device, "teacher": teacher, "temperature": temperature,
        "distil": distil or ("none" if teacher is None else "kl"), "distil_weight": distil_weight,
        "distil_layers": distil_layers, "distil_layers_weight": distil_layers_weight, "progress": progress, "max_steps": max_steps,
    }  # fmt: skip
    return _all_levels(
        model, asked, amounts, checkpoint, allocation=where, batches=batches, step=step, options=options, seed=seed,
        epochs=epochs, training=training, score_batches=score_batches, batch_norm_batches=batch_norm_batches, hooks=hooks,
    )  # fmt: skip


def _checked(model: object, batches: Given, budget: object, score_batches: int, batch_norm_batches: int) -> Batches:
    must_be("model", model, Program, Pruned, fix="Use paredown.capture(model, inputs).")
    for amount in budget if isinstance(budget, list | tuple) else () if budget is None else (budget,):
        must_be("budget", amount, Budget, fix="What remains of something, as Budget(macs=0.5).")
    check_whole("score_batches", score_batches)
    check_whole("batch_norm_batches", batch_norm_batches, 0)
    return batches_of(batches, "train_batches")


def check_sparsify(
    *, granularity: str, criterion: str | Learnt | Gates, schedule: Schedule | str | None = None,
    regularize: Regularize | None = None, density: float | Sequence[float] | None = None,
    budget: Budget | Sequence[Budget] | None = None,
) -> None:  # fmt: skip
    """Raises UsageError where these options of sparsify do not fit one another; reads no model and no data."""
    asked = _Asked.read(granularity, criterion, schedule, regularize)
    _levels(asked, density, budget, {"leave_out": (), "scope": None, "align": None})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What decides which way is taken."""

    cut: Granularity
    criterion: str | Learnt | Gates
    schedule: Schedule | str | None
    regularize: Regularize | None

    @classmethod
    def read(cls, granularity: str, criterion: Any, schedule: Any, regularize: Regularize | None) -> _Asked:
        """Names as the options they stand for."""
        known = {**LEARNT, "gates": Gates()}
        named = known.get(criterion, criterion) if isinstance(criterion, str) else criterion
        return cls(cut=Granularity.parse(granularity), criterion=named, schedule=schedule, regularize=regularize)

    def usual(self) -> Allocation:
        """The allocation where none is given.

        Sums of gradients are of different sizes in two layers: their scores are never compared. Neither are those that are
        meant to be compared within each output row (Wanda): a ranking of the model is another, worse method.
        """
        if not self.cut.masked or self.cut.kind == "n:m":
            return "uniform"
        if isinstance(self.criterion, Movement) or self.criterion in READINGS:
            return "erk"
        by_row = isinstance(self.criterion, str) and self.criterion in TABLE and TABLE[self.criterion].scope == "row"
        return "uniform" if by_row else "global"

    def way(self) -> Schedule:
        """The schedule, with the default of the granularity."""
        default = "gradual" if self.cut.masked and self.cut.kind != "n:m" else "one-shot"
        return named_schedule(default if self.schedule is None else self.schedule)


def _all_levels(
    model: Program | Pruned, asked: _Asked, amounts: Sequence[Any], checkpoint: Path | None, **given: Any
) -> Pruned:
    """Level after level, each from what the one before left."""
    given["hooks"] = tuple(given["hooks"])
    result = model
    for number, amount in enumerate(amounts):
        done = _level(_job(result, asked, checkpoint=numbered(checkpoint, 100 * number), **given), asked, amount)
        result = compose(result, done, seed=given["seed"]) if isinstance(result, Pruned) else done
    assert isinstance(result, Pruned)  # there is at least one level
    return result


def _levels(asked: _Asked, density: Any, budget: Any, other_options: dict[str, Any]) -> list[Any]:
    """One amount per level; raises UsageError where options do not fit the granularity."""
    cut = asked.cut
    if cut.kind == "layer":
        msg = "sparsify must be given a granularity of units or cells. Got layer: use Plan(drop_modules=…) and recover."
        raise UsageError(msg)
    soft = isinstance(asked.criterion, SoftMovement)
    given = density if cut.masked else budget
    other, name, wrong = (budget, "density", "budget") if cut.masked else (density, "budget", "density")
    if other is not None or (given is None) != (soft or cut.kind == "n:m"):
        free = "soft_movement" if soft else str(cut)
        wanted = f"no amount, since {free} brings its own" if soft or cut.kind == "n:m" else f"{name}, and no {wrong}"
        msg = f"sparsify must be given {wanted}, for granularity {cut}. Got density={density!r} and budget={budget!r}."
        raise UsageError(msg)
    _check_way(asked, other_options)
    if given is None:
        return [None]
    amounts: list[Any] = [given] if isinstance(given, float | int | Budget) else list(given)
    if cut.masked:
        for amount in amounts:
            if not isinstance(amount, float) or not 0 < amount < 1:
                msg = f"density must be a share in (0, 1), what stays. Got {amount!r}."
                raise UsageError(msg)
        amounts = [float(np.prod(amounts[: k + 1])) for k in range(len(amounts))]
    if not amounts:
        msg = f"{name} must have at least one level. Got none."
        raise UsageError(msg)
    return amounts


def _check_way(asked: _Asked, others: dict[str, Any]) -> None:
    cut, criterion, way = asked.cut, asked.criterion, asked.way()
    learnt = isinstance(criterion, Movement | SoftMovement | SrSte)
    rules = [
        (cut.masked or not (others["leave_out"] or others["scope"]), f"leave_out and scope must be used with masks. Got granularity {cut}."),
        (not cut.masked or others["align"] is None, f"align must be used with channels. Got {others['align']!r} with granularity {cut}."),
        (not cut.masked or asked.regularize is None, f"regularize must be used with channels. Got granularity {cut}."),
        (not cut.masked or (criterion != "gates" and not isinstance(criterion, Gates)), f"gates must be used with channels. Got granularity {cut}."),
        (cut.masked or not (learnt or criterion in READINGS), f"criterion must score units, for granularity {cut}. Got {criterion!r}."),
        (cut.masked or isinstance(way, OneShot), f"schedule must be one-shot with granularity {cut}; give several budgets for levels. Got {way!r}."),
        (not learnt or isinstance(way, Gradual | OneShot), f"schedule must be gradual (or one-shot) with learnt masks. Got {way!r}."),
        (not isinstance(criterion, SoftMovement) or isinstance(way, Gradual), f"schedule must be gradual with soft_movement. Got {way!r}."),
        (criterion not in READINGS or isinstance(way, Gradual | Lottery), f"schedule must be gradual or lottery with {criterion}, which needs gradients before its first choice. Got {way!r}."),
        (cut.kind != "n:m" or isinstance(way, OneShot), f"schedule must be one-shot with N:M, whose density is given. Got {way!r}."),
    ]  # fmt: skip
    for holds, rule in rules:
        if not holds:
            raise UsageError(rule)


def _job(model: Program | Pruned, asked: _Asked, **given: Any) -> Job:
    program = model if isinstance(model, Program) else capture(model.module, model.program.inputs)
    criterion, cut = asked.criterion, asked.cut
    job = Job(
        program=program, coupling=couple(program), cost=examine(program), granularity=cut,
        criterion=criterion if isinstance(criterion, str) else repr(criterion), first={}, **given,
    )  # fmt: skip
    if not cut.masked:
        return job
    before = model.plan.masks if isinstance(model, Pruned) else {}
    shapes = {n: tuple(program.state[n].shape) for n in _masked(job, program)}
    first = {n: before[n].kept if n in before else np.ones(s, dtype=np.bool_) for n, s in shapes.items()}
    return replace(job, first=first, flipped=stored_in_out(program, list(first)))


def _masked(job: Job, program: Program) -> list[str]:
    """The weights that take part, as allocate sees it: linear and convolution weights, less those that patterns spare."""
    names = list(dict.fromkeys(w for node in job.cost.by_node for w in node.weights))
    frozen = {n for n, p in program.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    shapes = {n: s for n, s in job.cost.parameter_shapes.items() if n in names and len(s) >= 2 and n not in frozen}
    flat = Granularity.parse("element") if job.granularity.kind == "n:m" else job.granularity
    scores = Scores(
        criterion="",
        by_space={},
        granularity=str(flat),
        by_cell={n: np.ones(flat.grid(s)) for n, s in shapes.items()},
        flipped={},  # left to `cut_as_said`, which warns of them
    )
    probe = allocate(
        job.coupling, scores, job.cost, Budget(density=0.5), **{**job.allocation, "allocation": "uniform", "floor": 0.0}
    )
    return cut_as_said(program, [n for n in shapes if n not in probe.made_by["left_out"]], job.granularity)


def _level(job: Job, asked: _Asked, amount: Any) -> Pruned:
    if not asked.cut.masked:
        return remove_in_training(
            job, asked.criterion if isinstance(asked.criterion, Gates) else None, asked.regularize, amount
        )
    way = asked.way()
    if isinstance(way, Lottery):
        return lottery(job, way, amount)
    if isinstance(asked.criterion, Movement | SoftMovement | SrSte):
        assert isinstance(way, Gradual | OneShot)  # checked
        return _learnt(job, asked.criterion, way, amount)
    return _changing(job, way, amount)


def _changing(job: Job, way: OneShot | Iterative | Gradual | Regrowth, amount: float | None) -> Pruned:
    """Masks that are chosen on the weights that train."""
    density = job.granularity.a / job.granularity.b if amount is None else amount
    accumulated = accumulation(job)
    now: Kept = job.first
    for share in way.before(density, job.start_density):
        now = chosen(job, cells_of(job, accumulated, with_masks(job, now), share), now, share)
    grow_by = (
        way.by if isinstance(way, Regrowth) else way.regrow_by if isinstance(way, Gradual) and way.regrow else "none"
    )

    def choose(module: nn.Module, kept: Kept, share: float) -> Kept:
        return chosen(job, cells_of(job, accumulated, module, share), kept, share)

    changing = ChangingMasks(
        Changing(
            points=lambda steps: way.points(density, steps, job.start_density),
            choose=(lambda module, kept, share: kept) if isinstance(way, Regrowth) else choose,
            epochs=job.epochs, granularity=job.granularity, moving=way.moving if isinstance(way, Gradual | Regrowth) and grow_by != "none" else None,
            grow_by=grow_by, may=job.first, seed=job.seed, rows=_rows(job, way),
        ),
        now,
    )  # fmt: skip
    hook = changing.hook(_name(job, way, density))
    hooks = [hook] if accumulated is None else [accumulated.hook(), hook]
    module = trained(job, with_masks(job, now), hooks).module
    if isinstance(way, Regrowth) and not changing.moved:
        msg = f"{way} must move at least one connection. Got none: its share of each weight is below one. Give a larger fraction, or keep more."
        raise NothingToDo(msg)
    return finished(job, module, changing.kept, density, way)


def _rows(job: Job, way: Schedule) -> Mapping[str, int] | None:
    """Rows to grow in, where each of them is to keep its own share; a mask of constant density moves freely."""
    wanted = job.allocation.get("scope") or (TABLE[job.criterion].scope if job.criterion in TABLE else "layer")
    flat = job.granularity.kind in ("row", "column", "n:m") or job.allocation["allocation"] == "global"
    if isinstance(way, Regrowth) or wanted != "row" or flat:
        return None
    return {n: job.flipped.get(n, 0) for n in job.first}


def _learnt(job: Job, how: Learnt, way: Gradual | OneShot, amount: float | None) -> Pruned:
    """Masks that are learnt, or chosen anew at each step, with dense weights behind them."""
    density = job.granularity.a / job.granularity.b if job.granularity.kind == "n:m" else amount

    def progress(step: int, steps: int) -> float:
        return way.progress(step, steps) if isinstance(way, Gradual) else 1.0

    def share(step: int, steps: int) -> float:
        assert density is not None  # soft movement does not ask
        return (
            density
            if job.granularity.kind == "n:m"
            else 1 - cubic(1 - job.start_density, 1 - density, progress(step, steps))
        )

    def pick(cells: Cells, share: float) -> Kept:
        return chosen(job, cells, job.first, share)

    weights = {n: p for n, p in job.program.module.named_parameters(remove_duplicate=False) if n in job.first}
    now: Kept = job.first
    if isinstance(how, SrSte):
        now = pick({n: magnitude(w, job.granularity) for n, w in weights.items()}, share(0, 1))
    learning = Learning(
        how=how, pick=pick, density=share, ramp=progress, epochs=job.epochs, granularity=job.granularity
    )
    learnt = LearntMasks(learning, weights, job.first, now)
    module = trained(job, with_masks(job, now), [learnt.hook(_name(job, way, density))]).module
    return finished(job, module, learnt.kept, density, way)


def _name(job: Job, way: Schedule, density: float | None) -> str:
    """All that decides masks, since a checkpoint is continued under the same name only."""
    options = {**job.options, **{k: v for k, v in job.allocation.items() if v}}
    return f"masks {way!r} {density} {job.granularity} {job.criterion} {sorted(options.items())!r}".replace("/", "|")
