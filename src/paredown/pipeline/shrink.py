"""A variant of the network while a search weighs it: pruned, fitted, rounded, and how far its output moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from paredown.export import predictor
from paredown.pipeline.fitted import Shrinking, Weighing, fitted_bits, with_rounding
from paredown.pipeline.kept_sensitivity import kept_bits
from paredown.pipeline.run import Run
from paredown.pipeline.ways import Here, Way
from paredown.plan import Plan
from paredown.program import Program
from paredown.prune import Pruned, compose
from paredown.prune.reconstruct import reconstruct
from paredown.quantize import Quantized, quantize
from paredown.quantize.culprits import some
from paredown.quantize.mixed import Errors, error_of
from paredown.target import named
from paredown.train import Task, recover
from paredown.train.task import metric_values, seed_all

Thing = Program | Pruned


def prepared(run: Run, way: Way, here: Here, plan: Plan, *, before: Pruned | None = None) -> Pruned:
    """The plan carried out, and what stays fitted to the dense activations; after an earlier level, both together."""
    step, task, recipe = way.carried_out(here, plan), run.task, run.recipe
    if plan.keep and task.train_batches is not None and task.step is not None:
        seed_all(recipe.seed)
        step = reconstruct(
            step, task.train_batches, step=task.step, num_batches=recipe.prune.score_batches, seed=recipe.seed
        )
    return step if before is None else compose(before, step, seed=recipe.seed)


def can_train(task: Task) -> bool:
    """Whether what is pruned can be trained back; a notebook may give neither way."""
    return task.train is not None or (task.step is not None and task.train_batches is not None)


def recovered(run: Run, dense: Program, pruned: Pruned) -> Pruned:
    """Batch norm re-estimated, and trained for budget.trial_epochs; as it is where the task trains by itself."""
    task, recipe = run.task, run.recipe
    if task.train_batches is None or task.step is None:
        return pruned
    options = {**recipe.recover.model_dump(exclude={"ranks"}), "epochs": recipe.budget.trial_epochs}
    if task.optimizer is not None:
        options["optimizer"] = task.optimizer
    return recover(
        pruned, task.train_batches, step=task.step, teacher=dense.module, seed=recipe.seed, device=recipe.device, **options
    )  # fmt: skip


def plain_options(run: Run) -> dict[str, Any]:
    """How files are quantized while they are only weighed."""
    return {
        "target": run.recipe.target,
        "calibrate": run.task.calibration_batches,
        "scheme": run.recipe.quantize.scheme,
        "observer": "minmax",
        "float_layers": run.recipe.quantize.float_layers,
        "idle_repairs": True,
    }


def repair_of(run: Run) -> list[str]:
    """Codes of few bits are rounded by what they do to the output."""
    return with_rounding(run.recipe.quantize.repair)


def joint_error(run: Run, way: Way, here: Here, plan: Plan) -> float:
    """How far a plan as a whole moves the output, in float: carried out, fitted, batch norm measured anew; on calibration data.

    Σ‖y - y⁰‖² / Σ‖y⁰‖², y⁰ of the network that the plan starts from.
    """
    variant = recovered(run, here.program, prepared(run, way, here, plan))
    calls = some(run.task.calibration_batches)
    return error_of(variant, calls, _outputs(here.program.module, calls))


def rounded(run: Run, variant: Thing, bits: Mapping[str, int], repair: Sequence[str]) -> Quantized:
    """The variant in codes of these widths, simulated."""
    given: dict[str, Any] = {"bits": dict(bits)} if bits else {}
    return quantize(variant, **{**plain_options(run), "repair": [*repair]}, **given)


def moved(run: Run, dense: Program, quantized: Quantized) -> float:
    """How far the quantized variant's output is from the dense one's, on calibration data."""
    calls = some(run.task.calibration_batches)
    return error_of(quantized, calls, _outputs(dense.module, calls))


def held_out(run: Run, quantized: Quantized) -> float | None:
    """The metric of a variant, simulated, on the task's choose_batches; None where it has none."""
    task = run.task
    return None if task.choose is None else metric_values(task.metric, task.choose(predictor(quantized)))[0]


def _outputs(module: torch.nn.Module, calls: Sequence[Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [t.double() for args, kwargs in calls for t in _tensors(module(*args, **kwargs))]


def _tensors(value: Any) -> list[torch.Tensor]:
    from paredown.quantize.batches import tensors_of

    return [t for t in tensors_of(value) if t.is_floating_point()]


def known_bits(run: Run, thing: Thing) -> tuple[Errors | None, str]:
    """(What the folder of prune.sensitivity says of this very network's bits, or None; the unit of that)."""
    folder = run.recipe.prune.sensitivity
    found = None if folder is None or isinstance(thing, Pruned) else kept_bits(Path(folder), thing.source_digest)
    return (None, "") if found is None else found


def bits_for(run: Run, thing: Thing, shrinking: Shrinking) -> dict[str, int]:
    """Bits per layer for which the run's file holds the limit (see `fitted.fitted_bits`)."""
    path = run.folder.steps / f"weighed{named(run.recipe.target).suffix}"
    known, _ = known_bits(run, thing)
    how = Weighing(options=plain_options(run), repair=repair_of(run), path=path, say=run.say, known=known)
    return fitted_bits(thing, shrinking, how)


__all__ = [
    "Shrinking",
    "Thing",
    "bits_for",
    "can_train",
    "held_out",
    "joint_error",
    "moved",
    "plain_options",
    "prepared",
    "recovered",
    "repair_of",
    "rounded",
]
