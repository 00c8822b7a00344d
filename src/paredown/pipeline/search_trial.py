"""Search trial: one trial of a search by all means, in a process of its own: what the run has come to, read and captured anew."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from paredown.errors import InfeasibleError, RejectedError
from paredown.export import Artifact
from paredown.pipeline.apart import DENSE, LEVELS, REQUEST
from paredown.pipeline.budgets import way_of
from paredown.pipeline.compress import task_of
from paredown.pipeline.fitted import Shrinking
from paredown.pipeline.folder import RunFolder
from paredown.pipeline.jointly import Means, means_of
from paredown.pipeline.levels import without_torch_masks
from paredown.pipeline.run import Run
from paredown.pipeline.trial import LOADS, prepare
from paredown.pipeline.ways import Here
from paredown.program import capture
from paredown.prune import load_pruned
from paredown.recipe import parse_recipe
from paredown.search.asking import reason_of
from paredown.strict_yaml import read_yaml

PAREDOWN = Path(__file__).parents[1]
Emit = Callable[[Mapping[str, Any]], None]


def main(request: Mapping[str, Any], emit: Emit) -> None:
    """Answer one question of a search."""
    folder = Path(request["folder"])
    told = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    torch.set_num_threads(told["threads"])
    means = _means(folder, told, emit)
    try:
        losses, more = means.answer(request["values"])
        answer: dict[str, Any] = {"losses": losses, "told": more}
    except Exception as error:  # the run hears of it, and asks the next one
        traceback.print_exc()
        answer = {"failed": _failed(error)}
    lists = {"smallest": means.smallest, "nearest": [plan.to_json() for plan in means.nearest]}
    emit({"answer": {**answer, **lists}})


def _failed(error: Exception) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith((str(PAREDOWN), "<"))]
    last = [*frames, *own][-1]  # the user's own line, where it is one
    nearest = error.nearest if isinstance(error, InfeasibleError) else None
    return {
        "reason": reason_of(error),
        "where": f", at {Path(last.filename).name}:{last.lineno}, in {last.name}",
        "infeasible": isinstance(error, InfeasibleError),
        "nearest": None if nearest is None else nearest.to_json(),
    }


def _means(folder: Path, told: Mapping[str, Any], emit: Emit) -> Means:
    """All that trials share, as the run has it."""
    beside = None if told["beside"] is None else Path(told["beside"])
    recipe = parse_recipe(read_yaml(told["recipe"]), folder=beside)
    recipe.__dict__["digest"] = told["digest"]
    task, model, _ = task_of(recipe)
    artifact = Artifact(**{**told["dense"], "files": tuple(map(Path, told["dense"]["files"]))})
    run = Run(
        recipe=recipe, task=task, folder=RunFolder(path=Path(told["run"])), say=lambda text: emit({"say": text}),
        on_training=lambda name, state: None, weights_given=told["weights_given"], model=model,
        environment=told["environment"], dense={"artifact": artifact},
    )  # fmt: skip
    dense, _ = without_torch_masks(model())
    dense.load_state_dict(load_file(folder / DENSE), strict=True)
    program = capture(dense.eval(), task.inputs())
    here = Here.of(program, load_pruned(folder / LEVELS, program) if (folder / LEVELS).exists() else None)
    if here.program.source_digest != told["network"]:
        msg = "a trial in a process of its own must capture the network of the run. Got another one: model() or inputs() give something else each time. Leave budget.trial out."
        raise RejectedError(msg)
    spare = told["shrinking"]
    shrinking = None if spare is None else Shrinking(**{**spare, "widths": tuple(spare["widths"])})
    return means_of(run, way_of(run, told["number"]), here, told["limits"], shrinking)


__all__ = ["LOADS", "main", "prepare"]
