"""One finished run on the other runtimes: the same network, exported for each that is at hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from paredown.errors import ParedownError, RejectedError
from paredown.export import export
from paredown.pipeline.compress import task_of
from paredown.pipeline.folder import RECIPE, RECORDS, STEPS
from paredown.pipeline.stages import BASE, trains_base
from paredown.program import Program, capture
from paredown.prune import Pruned, load_pruned
from paredown.quantize import quantize
from paredown.recipe import Recipe, parse_recipe
from paredown.records import read
from paredown.strict_yaml import read_yaml
from paredown.target import TARGETS, Target
from paredown.train import Task
from paredown.train.task import seed_all

AT_HAND = {"onnxruntime-x86": "onnxruntime", "openvino-x86": "openvino"}
"""Targets whose files are timed on this machine, and what runs them; files for phones are timed through bundles."""


def is_run(folder: Path) -> bool:
    """Whether `paredown compress` wrote and finished it."""
    there = (folder / RECIPE).is_file() and (folder / RECORDS).is_file()
    return there and any(r.cell.get("stage") == "verdict" for r in read(folder / RECORDS))


def files_for_runtimes(folder: Path, out: Path) -> tuple[list[Path], list[str], Callable[[], Any]]:
    """(files, notes, the task's calibration batches): the run's last network in float32 and in its scheme, for every target at hand.

    What a run has trained or searched for its own runtime alone (rounding, layers that stay in float, bits for a budget) is
    not repeated for another one: there the float file is made, and a note says so. Files land in `out`, one folder per target.

    Raises RejectedError (a run without its files), and what loading, capture, `quantize` and `export` raise.
    """
    recipe = parse_recipe(read_yaml(folder / RECIPE))
    task, model, _ = task_of(recipe)
    pruned = (folder / "form.json").is_file()
    program = capture(_dense(recipe, task, model, folder, wanted=not pruned), task.inputs())
    last: Program | Pruned = load_pruned(folder, program) if pruned else program
    files: list[Path] = []
    notes: list[str] = []
    for name, library in AT_HAND.items():
        if importlib.util.find_spec(library) is None:
            notes.append(f"{name}: {library} is not installed, so nothing was made for it")
            continue
        place = out / name
        place.mkdir(parents=True, exist_ok=True)
        try:
            files.append(export(last, place / f"fp32{TARGETS[name].suffix}", target=name).path)
        except ParedownError as error:
            notes.append(f"{name}: no file: {error}")
            continue
        made, why = _in_codes(recipe, task.calibration_batches, last, TARGETS[name], place)
        files += [] if made is None else [made]
        notes += [f"{name}: {why}"] if why else []
    if not files:
        msg = f"a runtime must take the run's network. Got none: {'; '.join(notes)}"
        raise RejectedError(msg)
    return files, notes, task.calibration_batches


def _dense(recipe: Recipe, task: Task, model: Callable[[], nn.Module], folder: Path, *, wanted: bool) -> nn.Module:
    """The run's dense network, read and never trained; where its weights are not `wanted`, any of its class."""
    if not trains_base(recipe, task):
        return model()
    dense, file = task.model(), folder / STEPS / BASE
    if file.exists():
        state = load_file(file)
        if {n: t.shape for n, t in dense.state_dict().items()} == {n: t.shape for n, t in state.items()}:
            dense.load_state_dict(state, strict=True)
            return dense.eval()
    if wanted:
        msg = f"the run must hold its trained dense network. Got {folder} without one that fits the task's model in {STEPS}/{BASE}. Run its recipe again."
        raise RejectedError(msg)
    return dense.eval()


def _in_codes(
    recipe: Recipe, batches: Callable[[], Any], last: Program | Pruned, target: Target, place: Path
) -> tuple[Path | None, str]:
    """(the file of the recipe's scheme, why there is none)."""
    asked = recipe.quantize
    made_by = {"epochs": asked.epochs, "spare": asked.spare, "budget": recipe.budget.size_bytes}
    own = ", ".join(name for name, used in made_by.items() if used)
    if own:
        return (
            None,
            f"no {asked.scheme} file: the run's was made for {recipe.target} by {own}, which is not repeated here",
        )
    seed_all(recipe.seed)
    try:
        small = quantize(
            last, target=target.name, calibrate=batches, scheme=asked.scheme, observer=asked.observer, num_samples=asked.samples,
            repair=asked.repair, float_layers=asked.float_layers, idle_repairs=True,
        )  # fmt: skip
        return export(small, place / f"{asked.scheme}{target.suffix}", target=target.name).path, ""
    except ParedownError as error:
        return None, f"no {asked.scheme} file: {error}"
