"""Rehearsal: what needs no training is told before the base is trained, on the network as the task makes it.

A base may take hours, and a task that is mended after it is another one, which trains its base again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy

from paredown.allocate import allocate
from paredown.budget import Budget
from paredown.errors import NothingToDo, ParedownError, RejectedError
from paredown.export import predictor
from paredown.measure import evaluated
from paredown.measure.quality import Values
from paredown.pipeline.budgets import by_bits, by_units
from paredown.pipeline.insight import checked_slices
from paredown.pipeline.levels import check_teacher, without_torch_masks
from paredown.pipeline.run import Run
from paredown.pipeline.ways import Here
from paredown.program import Program, capture
from paredown.score import score
from paredown.search.asking import reason_of
from paredown.train import Task
from paredown.train.shares import refuse_no_share

Asks = Literal["teacher", "evaluate", "slices", "budget"]
COUNTED = ("parameters", "macs")
SECONDS = 60.0
"""For which an evaluate is rehearsed: a large test set is one to wait for once."""


class _Enough(BaseException):
    """The rehearsal has taken long enough; no Exception, which an evaluate may handle."""


def rehearse(run: Run, model: nn.Module, asked: tuple[Asks, ...]) -> None:
    """Capture the untrained `model`; where they are `asked`, see that it can teach, have the task's evaluate and slices answer for it, and see that what is
    counted can be reached.

    What an untrained network may be the reason of is left to the trained one: a metric that is no number, an evaluate that raises (it is
    said), one that takes longer than SECONDS. Raises CaptureError, RejectedError, UsageError, InfeasibleError with the nearest plan.
    """
    if "teacher" in asked:
        check_teacher(run, model)
    if any(is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        return  # its shapes come with the training
    run.say("look at the untrained network")
    dense, _ = without_torch_masks(model)
    program = capture(dense, run.task.inputs())
    if "evaluate" in asked:
        _answers(run, program, slices="slices" in asked)
    if "budget" in asked:
        _reach(run, program)


def _answers(run: Run, program: Program, *, slices: bool) -> None:
    """Whether evaluate and slices return what they must, before anything is trained for them."""
    predict, began = predictor(program), time.monotonic()

    def within(*args: Any, **kwargs: Any) -> Any:
        if time.monotonic() - began > SECONDS:
            raise _Enough
        return predict(*args, **kwargs)

    try:
        values = answered(run.task, within, finite=False)
    except _Enough:
        return
    except ParedownError:
        raise  # what it returned
    except Exception as error:
        run.say(
            f"evaluate cannot be asked of an untrained network ({reason_of(error)}): it is asked after the training"
        )
        return
    if slices:
        checked_slices(run, len(values) if values.ndim else None)


def answered(task: Task, predict: Callable[..., Any], *, finite: bool = True) -> Values:
    """What the task's evaluate returns for its metric: one value, or one per sample. Raises RejectedError for anything else."""
    found, name = evaluated(task.evaluate, predict, finite=finite), task.metric.name
    if name not in found:
        msg = f"evaluate must return the metric {name!r} that METRIC names. Got {sorted(found)}."
        raise RejectedError(msg)
    refuse_no_share(task.metric, found[name])
    return found[name]


def _reach(run: Run, program: Program) -> None:
    """Whether floor and alignment allow the counts that the budget asks for: no weight decides that. By channels alone, where nothing else may help."""
    recipe, bounds = run.recipe, run.recipe.budget
    asked = {n: v for n in COUNTED if (v := getattr(bounds, n)) is not None}
    others = bounds.together or (by_bits(recipe) and bounds.low_rank)
    if not asked or others or recipe.prune.levels or not bounds.rounds or not by_units(recipe):
        return
    here, prune = Here.of(program, None), recipe.prune
    whole = {"parameters": here.cost.parameters, "macs": here.cost.macs}
    counts = {n: max(2, int(v * whole[n] if isinstance(v, float) else v)) for n, v in asked.items()}
    scores = score(here.program, here.coupling, "l1", granularity=prune.granularity)
    with suppress(NothingToDo):  # held as it is
        allocate(
            here.coupling, scores, here.cost, Budget(**counts), target=recipe.target, allocation="uniform", include=prune.include,
            exclude=prune.exclude, floor=prune.floor, align=prune.align, normalize=prune.normalize,
        )  # fmt: skip
