"""compress: the whole job, from a recipe or from a notebook."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paredown.budget import Budget
from paredown.environments import python_of
from paredown.errors import UsageError, must_be
from paredown.measure import machine
from paredown.pipeline.budgets import check_budget, check_training
from paredown.pipeline.data import changed, changed_sensitivity, remember, remember_sensitivity, settle
from paredown.pipeline.display import Display, display
from paredown.pipeline.folder import RunFolder, opened
from paredown.pipeline.run import Run, device_told
from paredown.pipeline.stages import Compressed, run_stages
from paredown.pipeline.ways import check_rounding, check_ways
from paredown.recipe import Recipe, diff, load_recipe, parse_recipe
from paredown.statistics.batches import Given, batches_of
from paredown.target import named
from paredown.train import Metric, Task, task_from_module
from paredown.train.given import given_digests

_VERSIONS = ("paredown", "torch", "torchao", "onnx", "onnxruntime", "onnxscript", "openvino", "numpy")


def compress(
    what: str | Path | Recipe | nn.Module,
    inputs: Any = None,
    *,
    out: str | Path,
    train: Callable[[nn.Module], nn.Module | None] | None = None,
    train_batches: Given | None = None,
    step: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    calibrate: Given | None = None,
    evaluate: Callable[..., Any] | None = None,
    metric: Metric | Mapping[str, str] | None = None,
    budget: Budget | None = None,
    target: str = "onnxruntime-x86",
    options: Mapping[str, Any] | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    overwrite: bool = False,
    quiet: bool = False,
) -> Compressed:
    """Take a trained model to a proven, measured INT8 file with a report.

    From a recipe: `compress("digits", out="runs/digits")`, an embedded name, a path or a Recipe, with `overrides`
    ("prune.criterion=l2"). From a notebook: `compress(model, inputs, train=…, calibrate=…, evaluate=…, metric=…,
    budget=Budget(macs=0.5), out=…)`: `train(model)` is your own loop, or give `train_batches` and `step`; `calibrate`
    yields inputs (each a function of batches, a list or a DataLoader); `evaluate(predict)` returns {metric: value or one
    value per sample} on test data; `budget` says what remains after one level of pruning (without it nothing is pruned)
    and may bound `metric_loss`; `options` are recipe keys ({"prune": {"criterion": "taylor"}}).

    The same recipe in the same `out` continues a killed run, to the same model, plan and export, byte for byte; so does
    the same cell of a notebook. Functions that changed (their code, or what they reach by name) are refused with what
    is different, unless `overwrite`. Writes recipe.yaml, plan.json, records.jsonl, report.html, model.safetensors and one
    file per export.

    Raises UsageError (2), RejectedError (3), InfeasibleError (4), GateError (5: the metric bound does not hold; the
    report is written), VerificationError (6), ResourceError (7), MissingError (8), Interrupted (130, resumable).
    """
    if isinstance(what, nn.Module):
        if budget is not None:
            must_be("budget", budget, Budget, fix="What remains of something, as Budget(macs=0.5).")
        task = _notebook_task(what, inputs, train, train_batches, step, calibrate, evaluate, metric)
        functions = {
            "train": train, "train_batches": train_batches, "step": step, "calibrate": calibrate, "evaluate": evaluate,
        }  # fmt: skip
        recipe = _notebook_recipe(budget, target, options, {**given_digests(functions), **_told(task.metric)})
        return _run(recipe, task, lambda: what, True, Path(out), overwrite=overwrite, quiet=quiet)
    if any(v is not None for v in (inputs, train, train_batches, step, calibrate, evaluate, metric, budget, options)):
        msg = "compress must be given a recipe alone, or a model with its functions. Got a recipe and functions. Put them in the recipe's task."
        raise UsageError(msg)
    recipe = what if isinstance(what, Recipe) else load_recipe(what, overrides)
    task, model, given = task_of(recipe)
    return _run(recipe, task, model, given, Path(out), overwrite=overwrite, quiet=quiet)


def task_of(recipe: Recipe) -> tuple[Task, Callable[[], nn.Module], bool]:
    """The recipe's task, how to make its model with weights, and whether weights were given."""
    from paredown.models import is_library, load_model, load_task_module
    from paredown.weights import load_into, read_weights

    module = load_task_module(recipe.task, recipe.folder)
    task = task_from_module(module, data=recipe.data_path)
    base = Path(recipe.folder) if recipe.folder else None

    def model() -> nn.Module:
        if recipe.model is not None:
            return load_model(recipe.model, weights=recipe.weights_path, base_dir=base)[0]
        made = task.model()
        if recipe.weights_path is not None:
            load_into(made, read_weights(recipe.weights_path))
        return made

    given = recipe.model is None or recipe.weights is not None or not is_library(recipe.model)
    return task, model, given


def _told(metric: Metric) -> dict[str, str]:
    return {"metric": f"{metric.name} in {metric.unit}, {metric.goal}"}


def _notebook_recipe(
    budget: Budget | None, target: str, options: Mapping[str, Any] | None, functions: Mapping[str, str]
) -> Recipe:
    given = budget.given() if budget is not None else {}
    level = {k: v for k, v in given.items() if k in ("channels", "parameters", "macs", "density")}
    bounds = {k: v for k, v in given.items() if k not in level}
    asked: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in (options or {}).items()}
    prune, more = {**asked.pop("prune", {})}, {**asked.pop("budget", {})}
    twice = sorted({*bounds} & {*more}) + (["prune.levels"] if level and "levels" in prune else [])
    if twice:
        msg = f"budget and options must not say the same. Got {', '.join(twice)} in both."
        raise UsageError(msg)
    return parse_recipe(
        {
            "schema": 1,
            "name": "notebook",
            "task": "notebook",
            "target": target,
            "prune": {"levels": [level] if level else [], **prune},
            "budget": {**bounds, **more},
            **asked,
            "given": dict(functions),
        }
    )


def _notebook_task(
    model: nn.Module,
    inputs: Any,
    train: Callable[[nn.Module], nn.Module | None] | None,
    train_batches: Given | None,
    step: Callable[[nn.Module, Any], torch.Tensor] | None,
    calibrate: Given | None,
    evaluate: Callable[..., Any] | None,
    metric: Metric | Mapping[str, str] | None,
) -> Task:
    missing = [
        n
        for n, v in (("inputs", inputs), ("calibrate", calibrate), ("evaluate", evaluate), ("metric", metric))
        if v is None
    ]
    if missing or calibrate is None or evaluate is None or metric is None:
        msg = f'compress(model, …) must be given inputs, calibrate, evaluate and metric={{"name", "unit", "goal"}}. Got no {", ".join(missing)}.'
        raise UsageError(msg)
    return Task(
        name=type(model).__name__,
        model=lambda: model,
        inputs=lambda: inputs,
        calibration_batches=batches_of(calibrate, "calibrate"),
        evaluate=evaluate,
        metric=_metric(metric),
        train_batches=None if train_batches is None else batches_of(train_batches, "train_batches"),
        step=step,
        train=train,
    )


def _metric(given: Metric | Mapping[str, str]) -> Metric:
    if isinstance(given, Metric):
        return given
    if not isinstance(given, Mapping) or set(given) != {"name", "unit", "goal"}:
        msg = f'metric must be {{"name": "accuracy", "unit": "%", "goal": "max"}}, or a Metric. Got {given!r}. paredown does not guess which direction is better.'
        raise UsageError(msg)
    return Metric(name=given["name"], unit=given["unit"], goal=given["goal"])  # type: ignore[arg-type]


def _run(
    recipe: Recipe, task: Task, model: Callable[[], nn.Module], given: bool, out: Path, *, overwrite: bool, quiet: bool
) -> Compressed:
    target = named(recipe.target)
    if target.environment:
        python_of(target)  # now, not after hours of training
    check_ways(recipe, task)
    check_rounding(recipe, task)
    check_budget(recipe)
    check_training(recipe, task)
    settle(task, recipe.data_path)
    threads = torch.get_num_threads()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        with (
            opened(out, recipe.to_yaml(), lambda there: _difference(there, recipe, out), overwrite=overwrite) as folder,
            display(quiet=quiet) as shown,
        ):
            remember(out, recipe.data_path)
            remember_sensitivity(out, recipe.prune.sensitivity)
            return run_stages(run_of(recipe, task, model, given, folder, shown))
    finally:
        torch.set_num_threads(threads)


def difference(there: str, recipe: Recipe, folder: Path) -> str:
    """How the recipe in a run folder, or its data, differ from those asked for; "" where they do not."""
    asked = recipe.to_yaml()
    return "\n".join(filter(None, ("" if there == asked else diff(there, asked), changed(folder, recipe.data_path))))


def _difference(there: str, recipe: Recipe, folder: Path) -> str:
    """`difference`, and how the sensitivity that a run reads differs."""
    told = (difference(there, recipe, folder), changed_sensitivity(folder, recipe.prune.sensitivity))
    return "\n".join(filter(None, told))


def run_of(
    recipe: Recipe, task: Task, model: Callable[[], nn.Module], given: bool, folder: RunFolder, shown: Display
) -> Run:
    """A run in an opened folder."""
    return Run(
        recipe=recipe,
        task=task,
        folder=folder,
        say=shown.say,
        on_training=shown.training,
        weights_given=given,
        model=model,
        environment={
            "versions": versions(),
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "seed": recipe.seed,
            "device": device_told(recipe.device),
        },
    )


def versions() -> dict[str, str | None]:
    """What a result depends on, by name; None where it is not installed."""
    return {name: _version(name) for name in _VERSIONS}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None  # shown as missing in the provenance
