"""The recipe's quantize.spare: the fewest layers in float for which the metric on held-out data keeps its bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from paredown.errors import NothingToDo, UsageError
from paredown.export import predictor
from paredown.measure import evaluated
from paredown.pipeline.run import Run
from paredown.program import Program
from paredown.prune import Pruned
from paredown.quantize import Quantized, quantize
from paredown.train import Metric, Task

if TYPE_CHECKING:
    from paredown.quantize.culprits import Spared


def quantized_but_few(run: Run, thing: Program | Pruned, dense: nn.Module, shared: Mapping[str, Any]) -> Quantized:
    """What a recipe asks for: the bound is budget.metric_loss against the dense network (see `fewest_in_float`).

    A note says which layers stay in float. Where no number of layers is enough, all are quantized, and the note says so. Raises UsageError without a bound or without held-out data, and for training with rounding, which has other means.
    """
    bound = run.recipe.budget.metric_loss
    missing = (
        "budget.metric_loss"
        if bound is None
        else "choose_batches and evaluate(predict, batches)"
        if run.task.choose is None
        else ""
    )
    if missing or bound is None:
        msg = f"quantize.spare must have {missing}. Got none. Add it, or name layers in quantize.float_layers."
        raise UsageError(msg)
    if run.recipe.quantize.epochs:
        msg = f"quantize.spare must go without quantize.epochs, which train all layers on codes. Got {run.recipe.quantize.epochs} epochs."
        raise UsageError(msg)
    try:
        found, wanted = fewest_in_float(thing, dense, shared, task=run.task, bound=bound)
    except NothingToDo as error:
        quantized = quantize(thing, **shared)
        return replace(quantized, notes=(*quantized.notes, f"spare: all layers are quantized: {error}"))
    return replace(found.quantized, notes=(*found.quantized.notes, told(found, run.task.metric, wanted)))


def fewest_in_float(
    thing: Program | Pruned, reference: nn.Module, shared: Mapping[str, Any], *, task: Task, bound: float
) -> tuple[Spared, float]:
    """Quantized with the options `shared` but for the fewest layers, and the metric of the `reference`, a network in float.

    The metric on the task's choose_batches, which it must have, may be worse than that by `bound`, in its unit. Raises
    NothingToDo where no number of layers is enough: pruning alone has lost more.
    """
    from paredown.quantize.culprits import spare

    assert task.choose is not None  # the caller looked
    metric, value = task.metric, _metric(task.metric.name, task.choose)
    sign = 1.0 if metric.goal == "max" else -1.0
    wanted = value(predictor(reference))
    calibrate = shared["calibrate"]
    found = spare(
        thing,
        evaluate=value,
        meets=lambda reached: sign * (wanted - reached) <= bound + 1e-9,
        **{**shared, "calibrate": calibrate() if callable(calibrate) else calibrate},
    )
    return found, wanted


def told(found: Spared, metric: Metric, wanted: float, reference: str = "dense") -> str:
    """Which layers stay in float, what they cost and what they give back."""
    names, unit = ", ".join(found.float_layers) or "none", metric.unit
    return (
        f"spare: {len(found.float_layers)} layers in float ({names}), {found.extra_bytes:,} bytes more (estimated); {metric.name} on "
        f"held-out data, simulated: {found.before:.4g} {unit} with none, {found.value:.4g} {unit} so, {wanted:.4g} {unit} {reference}"
    )


def _metric(name: str, held_out: Callable[[Any], Any]) -> Callable[[Any], float]:
    return lambda predict: float(evaluated(held_out, predict)[name].mean())
