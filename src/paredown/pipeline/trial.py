"""Trial: one cell of a curve, in a process of its own: trained, exported, checked and measured by the stages of compress.

What a trial reads of others lies in their folders: the base as its seed trained it, and for controls the pruned model.
Killed at any time, the same request goes on: trainings from their checkpoints, the rest anew. `result.json` is last.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from paredown.allocate import allocate
from paredown.budget import Budget
from paredown.couple import couple
from paredown.errors import ParedownError, RejectedError, UsageError
from paredown.examine import examine
from paredown.export import Artifact, check, export, predictor
from paredown.export.onnxruntime import load_translations
from paredown.measure import evaluated, machine, machine_text, measure, sizes, summarize
from paredown.pipeline.compress import task_of, versions
from paredown.pipeline.folder import LOCK, RunFolder, files_digest
from paredown.pipeline.levels import Start, one_level, started, without_random_teacher
from paredown.pipeline.run import Run, device_told
from paredown.pipeline.stages import accepted, base_of, metric_of, quantized_of, trains_base
from paredown.pipeline.ways import Here, Way, simulated
from paredown.plan import Mask
from paredown.program import GraphModel, Program, capture
from paredown.prune import Pruned, compose, fresh, load_pruned, prune, save
from paredown.prune.scratch import fresh_graph
from paredown.recipe import Recipe, parse_recipe
from paredown.records import Measured, Record, locked, sweep_stale, write_text
from paredown.score import score
from paredown.strict_yaml import read_yaml
from paredown.sweep.trials import RESULT, lacks_a_file, write_result
from paredown.target import named
from paredown.train import Task, check_roles, recover
from paredown.train.shares import refuse_no_share, share_note

Emit = Callable[[Mapping[str, Any]], None]
LOADS = (
    "torch._dynamo",
    "torch.export._trace",
    "torch.export._unlift",
    "torch._export.non_strict_utils",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torch.onnx._internal.exporter._core",
    "networkx",
    "sklearn.datasets",
)
"""What the first capture and the first export load. Only imported: a tensor would start threads, which forks lose."""
RECIPE, TRAINING = "recipe.yaml", "training.json"
_SAY_EVERY_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One cell as a trial sees it."""

    run: Run
    kind: str
    epochs: int | None
    """Training of a control whose base cannot be trained again."""
    latency: bool
    quantized: bool
    needs: Mapping[str, Path]


def prepare() -> None:
    """In the server: what every trial's export would make anew."""
    load_translations()


def main(request: Mapping[str, Any], emit: Emit) -> None:
    """Do what a cell says and write result.json; `emit` tells how far it is."""
    started, place = time.perf_counter(), Path(request["folder"])
    _check_versions(request["versions"])
    held = f"a trial must have its folder to itself. {place} is in use by another process. Wait for it."
    with locked(place / LOCK, writable="the folder of the sweep must be writable", held=held):
        sweep_stale(place)
        steps = place / "steps"
        steps.mkdir(exist_ok=True)
        beside = Path(request["beside"]) if request["beside"] else None
        recipe = parse_recipe(read_yaml(request["cell"]["recipe"]), folder=beside)
        write_text(place / RECIPE, request["cell"]["recipe"])
        torch.set_num_threads(recipe.threads or 1)
        asked = _asked(request, recipe, place, emit)
        record = _TRIALS[asked.kind](asked)
        spent = Measured(value=time.perf_counter() - started, unit="s", timing=True, protocol="since it was last begun")
        told = {k: v for k, v in request["cell"].items() if k not in ("recipe", "epochs", "latency", "quantized")}
        cell = {**record.cell, **told, "recipe_digest": recipe.digest}
        measured = {**record.measured, "seconds": spent}
        record = dataclasses.replace(record, cell=cell, measured=measured)
        write_result(place, record)
        if asked.kind != "base" and not lacks_a_file(
            record
        ):  # checkpoints; those of a base, and of what a retry repeats, stay
            shutil.rmtree(steps, ignore_errors=True)


def _check_versions(asked: Mapping[str, str | None]) -> None:
    """Those that the result is filed under must be those that make it: on another machine they may be others."""
    here = versions()
    different = [f"{name} {asked.get(name)} there, {here[name]} here" for name in here if asked.get(name) != here[name]]
    if different:
        msg = f"a trial must run with the versions of who asks for it. Got {'; '.join(different)}. Install the same on every machine."
        raise UsageError(msg)


def _asked(request: Mapping[str, Any], recipe: Recipe, place: Path, emit: Emit) -> Asked:
    task, model, given = task_of(recipe)
    said = [0.0]

    def on_training(name: str, state: Any) -> None:
        own = getattr(state, "training", "")  # a level may hold several trainings; a task's own scratch() may tell less
        _note_training(
            place / "steps" / TRAINING, f"{name}, {own}" if own else name, int(state.epochs), int(state.steps)
        )
        now = time.monotonic()
        if now - said[0] > _SAY_EVERY_S:
            said[0] = now
            emit({"training": name, "done": state.epoch * state.steps + state.step, "of": state.epochs * state.steps})

    run = Run(
        recipe=recipe, task=task, folder=RunFolder(path=place), say=lambda text: emit({"say": text}),
        on_training=on_training, weights_given=given, model=model,
        environment={
            "versions": dict(request["versions"]), "machine": machine(), "threads": recipe.threads, "seed": recipe.seed,
            "device": device_told(recipe.device),
        },
    )  # fmt: skip
    cell = request["cell"]
    needs = {role: Path(folder) for role, folder in request["needs"].items()}
    return Asked(
        run=run, kind=cell["kind"], epochs=cell["epochs"], latency=cell["latency"], quantized=cell["quantized"], needs=needs
    )  # fmt: skip


def _note_training(file: Path, name: str, epochs: int, steps: int) -> None:
    """How long a training is, on disk: one that was finished before a kill is not seen again."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if known.get(name) != [epochs, steps]:
        write_text(file, json.dumps({**known, name: [epochs, steps]}, sort_keys=True))


# --------------------------------------------------------------------------------------------------------------- kinds


def _base(asked: Asked) -> Record:
    """The dense model of a seed: trained by the task's `base`, or as it was given."""
    run = asked.run
    roles = check_roles(run.task)
    dense = base_of(run, asked=("evaluate",))
    program = capture(dense, run.task.inputs())
    details = {
        "test_data": roles.test_digest,
        "network": program.source_digest,
        "warnings": [*roles.warnings],
        "trained_here": trains_base(run.recipe, run.task),
        "metric": dataclasses.asdict(run.task.metric),
    }
    record = _recorded(asked, program, None, details)
    odd = share_note(run.task.metric, record.measured["metric"].value)
    return (
        dataclasses.replace(record, details={**record.details, "warnings": [*roles.warnings, odd]}) if odd else record
    )


def _pruned(asked: Asked) -> Record:
    """The levels of the recipe on the base, as compress does them; random is this by another criterion."""
    start = _start(asked)
    run, untaught = without_random_teacher(asked.run, start.dense)
    tuned, details = start.before, dict[str, Any]()
    for number, level in enumerate(run.recipe.prune.levels, start=1):
        done = one_level(run, number, level, start.program, tuned, start.dense)
        if done is not None:
            tuned, details = done
    if tuned is None or tuned is start.before:
        msg = f"a trial must remove something. Got {run.recipe.prune.levels[0].model_dump(exclude_none=True)}, which the model meets as it is: fewer channels than the alignment, or nothing free."
        raise RejectedError(msg)
    save(tuned, run.folder.path)
    details["notes"] = [*start.notes, *untaught, *details["notes"]]
    told = ("proof", "realiser", "reached", "notes")
    return _recorded(asked, tuned, tuned, {k: v for k, v in details.items() if k in told}, teacher=start.dense)


def _from_scratch(asked: Asked) -> Record:
    """Chosen on fresh weights, then trained as long as base and recovery together."""
    run = asked.run
    recipe, start = run.recipe, _start(asked)
    program = capture(fresh(start.dense, seed=recipe.seed), run.task.inputs())
    way = Way(recipe=recipe, task=run.task, level=recipe.prune.levels[0], number=1, weights_given=True)
    before = None if start.before is None else prune(program, start.before.plan, seed=recipe.seed)
    here = Here.of(program, before)
    small = way.carried_out(here, way.plan(here))
    small = small if before is None else compose(before, small, seed=recipe.seed)
    return _trained_anew(asked, small, recipe.recovery_epochs)


def _scratch(asked: Asked) -> Record:
    """The shape of the pruned model (or its mask), from fresh weights."""
    run, record = asked.run, _needed(asked, "pruned")
    small = load_pruned(asked.needs["pruned"], _start(asked).program)
    return _trained_anew(asked, _anew(small, run.recipe.seed), _recovery_epochs(record))


def _thin(asked: Asked) -> Record:
    """Every layer narrowed alike until the MACs are those of the pruned model, from fresh weights."""
    run, record = asked.run, _needed(asked, "pruned")
    program = capture(fresh(_start(asked).dense, seed=run.recipe.seed), run.task.inputs())
    coupling, cost = couple(program), examine(program)
    wanted = record.measured["effective_macs"].value
    assert wanted is not None
    scores = score(program, coupling, "random", seed=run.recipe.seed)
    plan = allocate(
        coupling,
        scores,
        cost,
        Budget(macs=int(wanted)),
        target=run.recipe.target,
        allocation="uniform",
        align=1,
        floor=0.0,
    )
    small = prune(program, plan, seed=run.recipe.seed)
    if "scratch" in asked.needs and _same_shape(small, load_pruned(asked.needs["pruned"], program)):
        return _as_scratch(asked)
    return _trained_anew(asked, _anew(small, run.recipe.seed), _recovery_epochs(record))


def _anew(small: Pruned, seed: int) -> Pruned:
    """The same shape and masks with fresh weights."""
    module = fresh_graph(small, seed) if isinstance(small.module, GraphModel) else fresh(small.module, seed=seed)
    with torch.no_grad():
        for name, mask in small.plan.masks.items():
            module.get_parameter(name).mul_(torch.from_numpy(mask.kept))
    return dataclasses.replace(small, module=module)


class _Kept(nn.Module):
    """A weight with its masked cells at zero, as a parametrization."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, masked; so is its gradient."""
        return weight * self.kept


def _masked_through(train: Callable[[nn.Module], nn.Module], model: nn.Module, masks: Mapping[str, Mask]) -> nn.Module:
    """Train with masks in a loop that may train a copy, which hooks on this model's optimizer would not see."""
    if not masks:
        return train(model)
    held = copy.deepcopy(model)
    for name, mask in masks.items():
        path, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(held.get_submodule(path), leaf, _Kept(torch.from_numpy(mask.kept)))
    trained = train(held)
    for name in masks:
        path, _, leaf = name.rpartition(".")
        parametrize.remove_parametrizations(trained.get_submodule(path), leaf, leave_parametrized=True)
    return trained


def _same_shape(one: Pruned, other: Pruned) -> bool:
    """Whether two models have the same tensors, and no mask."""
    shapes = [{n: tuple(t.shape) for n, t in p.module.state_dict().items()} for p in (one, other)]
    return shapes[0] == shapes[1] and not one.plan.masks and not other.plan.masks


def _as_scratch(asked: Asked) -> Record:
    """The record of scratch: pruned alike everywhere, the thinner network has its shape, and would train to the same bits."""
    record = _needed(asked, "scratch")
    for file in asked.needs["scratch"].glob("model.*"):
        shutil.copyfile(file, asked.run.folder.path / file.name)
    return dataclasses.replace(record, details={**record.details, "same_as": "scratch"})


_TRIALS: dict[str, Callable[[Asked], Record]] = {
    "base": _base,
    "pruned": _pruned,
    "random": _pruned,
    "from-scratch": _from_scratch,
    "scratch": _scratch,
    "thin": _thin,
}


# ------------------------------------------------------------------------------------------------- what they are made of


def _start(asked: Asked) -> Start:
    """The base of this seed, from the folder of the trial that trained it; nothing is trained again."""
    place = asked.needs["base"]
    recipe = parse_recipe(read_yaml(place / RECIPE), folder=asked.run.recipe.folder)
    run = dataclasses.replace(asked.run, recipe=recipe, folder=RunFolder(path=place), on_training=lambda *_: None)
    return started(asked.run, base_of(run).eval())


def _needed(asked: Asked, role: str) -> Record:
    return Record.from_json((asked.needs[role] / RESULT).read_text(encoding="utf-8"))


def _recovery_epochs(record: Record) -> int:
    """Epochs of all levels together."""
    return sum(int(epochs) for epochs, _ in record.details["training"].values())


def _trained_anew(asked: Asked, small: Pruned, extra_epochs: int) -> Record:
    """A model of fresh weights, trained as the base was and `extra_epochs` longer, or as long as the recipe affords."""
    run = asked.run
    task, recipe = run.task, run.recipe
    shared: dict[str, Any] = {
        "step": task.step, "seed": recipe.seed, "device": recipe.device, "batch_norm_batches": recipe.recover.batch_norm_batches,
    }  # fmt: skip
    progress: dict[str, Any] = {"progress": lambda p: run.on_training("train from scratch", p)}
    checkpoint: dict[str, Any] = {"checkpoint": run.folder.steps / "scratch.safetensors"}
    scratch, why = (
        task.scratch,
        "" if trains_base(run.recipe, run.task) else "the base came trained, and its training cannot be repeated here",
    )
    if scratch is not None:
        options = {"seed": recipe.seed, "device": recipe.device, "extra_epochs": extra_epochs, **progress, **checkpoint}
        options |= recipe.base.model_dump(exclude_none=True)
        options |= {"epochs": asked.epochs, "extra_epochs": 0} if why and asked.epochs else {}
        given = accepted(scratch, options, first="model")
        why = why or _shorter(task, given, extra_epochs)
        tuned = recover(
            small,
            task.train_batches,
            train=lambda m: _masked_through(lambda held: scratch(held, **given), m, small.plan.masks),
            **shared,
        )
    elif task.train is not None:
        why = "the task's own train() is what a recovery is: how its base was trained is not known"
        tuned = recover(small, task.train_batches, train=task.train, **shared)
    else:
        why = why or "the task has no scratch(model, …) that trains another shape as its base"
        own: dict[str, Any] = recipe.recover.model_dump(
            exclude={"epochs", "distil", "distil_layers", "batch_norm_batches", "ranks"}
        )
        own |= {} if task.optimizer is None else {"optimizer": task.optimizer}
        epochs = max(1, asked.epochs or extra_epochs)
        tuned = recover(
            small, task.train_batches, epochs=epochs, distil="none", **own, **shared, **progress, **checkpoint
        )
    return _recorded(asked, tuned, tuned, {"not_comparable": why, "proof": dataclasses.asdict(tuned.proof)})


def _shorter(task: Task, given: Mapping[str, Any], extra_epochs: int) -> str:
    """Why scratch(), with these options, did not train as long as base and recovery together, where no count of steps shows it."""
    if task.train is not None:
        return "the recovery is the task's own train(), which tells no length: it was trained as the base alone"
    if extra_epochs and "extra_epochs" not in given:
        return "the task's scratch() takes no extra_epochs: it was trained as the base alone"
    return ""


def _recorded(
    asked: Asked,
    thing: Program | Pruned,
    tuned: Pruned | None,
    details: Mapping[str, Any],
    *,
    teacher: nn.Module | None = None,
) -> Record:
    """Export in float32, check in the runtime, measure on held-out and on test data; the same in codes where the curve asks."""
    run = asked.run
    run.say("export and check")
    path = run.folder.path / f"model{named(run.recipe.target).suffix}"
    artifact = export(thing, path, target=run.recipe.target)
    program = thing if isinstance(thing, Program) else capture(thing.module, thing.program.inputs, train=False)
    checked = check(artifact, program, run.task.calibration_batches)
    run.say("measure")
    where, cost = machine_text(), examine(program)
    counted = "counted in the exported graph"
    found = {
        **sizes(artifact.files, where),
        **_with_zeros(cost.parameters, cost.macs, tuned),
        "parameters": Measured(value=cost.parameters, unit="", protocol=counted),
        "macs": Measured(value=cost.macs, unit="MAC", protocol=f"{counted}, one sample"),
        **_scored(asked, artifact),
    }
    training = run.folder.steps / TRAINING
    kept = {
        "file": path.name,
        "digest": files_digest(artifact.files),
        "shapes": _shapes(thing.module, {} if tuned is None else tuned.plan.masks),
        "check": {"max_error": checked.max_error, "scale": checked.scale, "cosine": checked.cosine},
        "training": json.loads(training.read_text(encoding="utf-8")) if training.exists() else {},
        **details,
    }
    if asked.quantized:
        codes, kept["quantized"] = _in_codes(asked, thing, teacher, artifact)
        found |= {f"quantized_{name}": value for name, value in codes.items()}
    plan = None if tuned is None else tuned.plan.digest
    return run.record("trial", "", plan_digest=plan, measured=found, details=kept)


def _scored(asked: Asked, artifact: Artifact, dense: Artifact | None = None) -> dict[str, Measured]:
    """A file's metric on test and on held-out data, and its latency where it is asked for, in turns with the dense file."""
    run, where, predict = asked.run, machine_text(), predictor(artifact)
    name, unit = run.task.metric.name, run.task.metric.unit
    found = {
        "metric": summarize(metric_of(run, predict), unit, where),
        "held_out": Measured(value=None, unit=unit, badge="not tested", protocol="the task has no choose_batches"),
        **(_timed(run, asked, artifact, dense) if asked.latency else {}),
    }
    if run.task.choose is not None:
        held_out = evaluated(run.task.choose, predict)[name]
        refuse_no_share(run.task.metric, held_out)
        found["held_out"] = summarize(held_out, unit, where)
    return found


def _in_codes(
    asked: Asked, thing: Program | Pruned, teacher: nn.Module | None, plain: Artifact
) -> tuple[dict[str, Measured], dict[str, Any]]:
    """(figures, details) of a second file by the recipe's `quantize`; where none comes about, none and why: the float file's stay."""
    # Its training is none of the recovery's, whose length that of the controls follows: it is not noted.
    run = dataclasses.replace(asked.run, on_training=lambda *_: None)
    scheme = run.recipe.quantize.scheme
    path = plain.path.with_name(f"model.{scheme}{plain.path.suffix}")
    try:
        quantized = quantized_of(run, thing, teacher)
        run.say(f"{scheme}: export, check and measure")
        artifact = export(quantized, path, target=run.recipe.target)
        checked = check(artifact, quantized, run.task.calibration_batches)
        scored = _scored(asked, artifact, plain if asked.kind == "base" else None)
    except Exception as error:  # the float file is done, whatever it is that ends this one
        for left in path.parent.glob(f"{path.stem}.*"):  # what failed its check is no file to ship
            left.unlink()
        why = str(error) if isinstance(error, ParedownError) else f"{type(error).__name__}: {error}"
        return {}, {"scheme": scheme, "failed": why}
    found = {**sizes(artifact.files, machine_text()), **scored}
    told = {"max_error": checked.max_error, "scale": checked.scale, "cosine": checked.cosine}
    return found, {
        "scheme": scheme,
        "file": path.name,
        "digest": files_digest(artifact.files),
        "check": told,
        "notes": [*quantized.notes],
    }


def _shapes(module: nn.Module, masks: Mapping[str, Mask]) -> str:
    """A digest of the shapes of all tensors, and of the masks: two ways of pruning may leave one shape."""
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    told = json.dumps([shapes, {name: mask.digest for name, mask in masks.items()}], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _with_zeros(parameters: int, macs: int, tuned: Pruned | None) -> dict[str, Measured]:
    """What is not masked, and the MACs a runtime that skips zeros would execute."""
    found = {"nonzero_parameters": parameters, "effective_macs": macs}
    masked = tuned is not None and bool(tuned.plan.masks)
    if tuned is not None and masked:
        told = simulated(tuned)
        found = {name: told.get(name, value) for name, value in found.items()}
    how = "less what the masks hold at zero"
    return {
        "nonzero_parameters": Measured(value=found["nonzero_parameters"], unit="", protocol=f"counted, {how}"),
        "effective_macs": Measured(
            value=found["effective_macs"], unit="MAC", protocol=how, badge="estimated" if masked else "measured"
        ),
    }


def _timed(run: Run, asked: Asked, artifact: Artifact, baseline: Artifact | None) -> dict[str, Measured]:
    """Latency and memory, in turns with the dense file of the seed."""
    options = run.recipe.measure
    if "base" in asked.needs:
        dense = asked.needs["base"] / f"model{artifact.path.suffix}"  # in float, whichever file this is
        files = (dense, dense.with_suffix(".bin")) if dense.suffix == ".xml" else (dense,)
        baseline = Artifact(files=files, target=run.recipe.target, scheme="fp32")
    return measure(
        artifact, run.task.calibration_batches, baseline=baseline, threads=options.threads, runs=options.runs,
        seconds=options.seconds,
    )  # fmt: skip
