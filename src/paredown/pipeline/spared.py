"""The recipe's quantize.spare: the fewest layers in float for which the metric on held-out data keeps its bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from paredown.errors import NothingToDo, UsageError
from paredown.export import predictor
from paredown.measure import evaluated
from paredown.pipeline.run import Run
from paredown.program import Program
from paredown.prune import Pruned
from paredown.quantize import Quantized, quantize


def quantized_but_few(run: Run, thing: Program | Pruned, dense: nn.Module, shared: Mapping[str, Any]) -> Quantized:
    """Quantized with the options `shared`; a note says which layers stay in float, what they cost and what they give back.

    The bound is budget.metric_loss against the dense network, on the task's choose_batches. Where no number of
    layers is enough (pruning alone has lost more), all are quantized, and the note says so. Raises UsageError without
    a bound or without held-out data, and for training with rounding, which has other means.
    """
    from paredown.quantize.culprits import spare

    bound, held_out = run.recipe.budget.metric_loss, run.task.choose
    missing = (
        "budget.metric_loss"
        if bound is None
        else "choose_batches and evaluate(predict, batches)"
        if held_out is None
        else ""
    )
    if missing or bound is None or held_out is None:
        msg = f"quantize.spare must have {missing}. Got none. Add it, or name layers in quantize.float_layers."
        raise UsageError(msg)
    if run.recipe.quantize.epochs:
        msg = f"quantize.spare must go without quantize.epochs, which train all layers on codes. Got {run.recipe.quantize.epochs} epochs."
        raise UsageError(msg)
    metric, value = run.task.metric, _metric(run, held_out)
    sign = 1.0 if metric.goal == "max" else -1.0
    wanted = value(predictor(dense))
    calibrate = shared["calibrate"]
    try:
        found = spare(
            thing,
            evaluate=value,
            meets=lambda reached: sign * (wanted - reached) <= bound + 1e-9,
            **{**shared, "calibrate": calibrate() if callable(calibrate) else calibrate},
        )
    except NothingToDo as error:
        quantized = quantize(thing, **shared)
        return replace(quantized, notes=(*quantized.notes, f"spare: all layers are quantized: {error}"))
    unit = metric.unit
    names = ", ".join(found.float_layers) or "none"
    note = (
        f"spare: {len(found.float_layers)} layers in float ({names}), {found.extra_bytes:,} bytes more (estimated); {metric.name} on "
        f"held-out data, simulated: {found.before:.4g} {unit} with none, {found.value:.4g} {unit} so, {wanted:.4g} {unit} dense"
    )
    return replace(found.quantized, notes=(*found.quantized.notes, note))


def _metric(run: Run, held_out: Callable[[Any], Any]) -> Callable[[Any], float]:
    name = run.task.metric.name
    return lambda predict: float(evaluated(held_out, predict)[name].mean())
