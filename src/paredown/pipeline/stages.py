"""The stages of a run, in order: each is kept under its key, so that a killed run continues to the same result."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree as pytree

from paredown.couple import couple
from paredown.errors import UsageError, VerificationError
from paredown.examine import Cost, examine
from paredown.export import Artifact, Check, check, export, predictor
from paredown.granularity import Granularity
from paredown.measure import measure, paired, summarize
from paredown.measure.quality import keep_values, kept_values
from paredown.measure.watched import Watch, another_range, by_batches, oddities, range_of
from paredown.pipeline import verdict as verdicts
from paredown.pipeline.budgets import searched
from paredown.pipeline.folder import file_digest, files_digest, key_of
from paredown.pipeline.insight import STAGE as INSIGHT
from paredown.pipeline.insight import checked_slices, insight
from paredown.pipeline.levels import one_level, started, without_random_teacher
from paredown.pipeline.own_masks import check_own_masks
from paredown.pipeline.rehearsal import Asks, answered, rehearse
from paredown.pipeline.run import Run, random_note
from paredown.pipeline.shrink import bits_for, repair_of
from paredown.pipeline.spared import quantized_but_few
from paredown.pipeline.unchanged import unchanged
from paredown.pipeline.ways import check_rounding
from paredown.plan import Plan
from paredown.program import Program, capture
from paredown.prune import Pruned, save
from paredown.quantize import Quantized, quantize
from paredown.recipe import Recipe
from paredown.recipe_fields import STREAMS
from paredown.records import Measured, Record, whole_file
from paredown.target import named
from paredown.train import Roles, Task, check_roles
from paredown.train.given import given_notes
from paredown.train.roles import Remembered
from paredown.train.shares import share_note
from paredown.train.task import seed_all

BASE = "base-trained.safetensors"
"""The dense network that a run has trained itself, under its steps."""
TITLES = {
    "int8": "INT8", "w4a8": "W4A8", "w4a4": "W4A4", "int8-dynamic": "dynamic INT8", "w4": "W4", "w2": "W2", "ternary": "ternary", "binary": "binary", "fp16": "FP16",
}  # fmt: skip
"""Scheme to what its stage is called."""
PARITY, AT_MOST = 0.2, 1.0
"""Largest distance of the file's metric from its simulation: points where the unit is %, else % of the metric; the second where
the paired interval over the samples holds 0, as it does with few samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """What a run made. `recommended` is the file to ship; `verdict` says by which bounds."""

    out: Path
    module: nn.Module
    plan: Plan
    artifact: Artifact
    recommended: str
    """Stage of the recommended file: the scheme ("int8"), a level, or "dense"."""
    verdict: Mapping[str, Any]
    records: tuple[Record, ...]

    def _repr_html_(self) -> str:
        """The report, in a frame of its own."""
        import html

        text = (self.out / "report.html").read_text(encoding="utf-8")
        return f'<iframe srcdoc="{html.escape(text)}" style="width:100%;height:80vh;border:0" sandbox></iframe>'


def run_stages(run: Run) -> Compressed:
    """All stages of one run, in order."""
    recipe, task = run.recipe, run.task
    roles = check_roles(task)
    start = started(run, base_of(run, asked=("teacher", "evaluate", "slices", "budget")))
    dense, program, tuned = start.dense, start.program, start.before
    run, untaught = without_random_teacher(run, dense)
    roles = dataclasses.replace(roles, warnings=(*roles.warnings, *given_notes(recipe.given), *untaught))
    _stage_examine(run, program, (*roles.warnings, *start.notes))
    run.dense["networks"] = [dense, program.module]
    _stage_float(run, 1, "dense", "Dense FP32", program, None, {})
    roles = roles.beside(run.dense["read"])
    values = run.dense["values"]
    run.dense["slices"] = checked_slices(run, len(values) if values.ndim else None)
    for number, level in enumerate(recipe.prune.levels, start=1):
        done = one_level(run, number, level, program, tuned, dense)
        if done is not None:
            tuned, details = done
            run.dense["networks"] = [dense, program.module, tuned.module]
            title = f"Pruned, level {number}, FP32"
            _stage_float(run, 10 + number, f"level-{number}", title, tuned, tuned.plan, details)
    tuned = _for_the_budget(run, program, tuned, dense)
    last: Program | Pruned = tuned or program
    quantized = quantized_of(run, last, dense)
    run.dense["quantized"] = quantized
    scheme = recipe.quantize.scheme
    _stage_int8(run, 50, scheme, TITLES[scheme], quantized, tuned)
    _twin(run, last)
    if tuned is not None:
        save(tuned, run.folder.path)
    records, verdict = _verdict(run, program, roles)
    recommended = str(verdict["recommended"])
    result = Compressed(
        out=run.folder.path,
        module=tuned.module if tuned is not None else dense,
        plan=tuned.plan if tuned is not None else Plan(keep={}),
        artifact=_artifact(run, recommended),
        recommended=recommended,
        verdict=verdict,
        records=records,
    )
    nearest = run.dense.get("nearest") or (None if tuned is None else tuned.plan)
    verdicts.gates(records, verdict, nearest, run.dense.get("advice", ""))
    return result


def _for_the_budget(run: Run, program: Program, tuned: Pruned | None, dense: nn.Module) -> Pruned | None:
    """One more level, where the budget asks for more than the recipe's levels gave."""
    asked, known = run.recipe.prune, tuned
    number = len(asked.levels) + 1
    of_masks = [v for v in asked.levels if v.factorize is None and Granularity.parse(asked.granularity_of(v)).masked]
    if (
        tuned is not None and not of_masks
    ):  # beside zeros that the model came with units are searched for, if not beside a recipe's
        known = dataclasses.replace(tuned, plan=dataclasses.replace(tuned.plan, masks={}))
    found = searched(run, number, program, known)
    if found is None:
        return tuned
    run.dense["search"] = found.told
    if found.shrinking is not None:
        run.dense["shrinking"] = found.shrinking
    if found.level is None:
        return tuned
    last = number
    for step in found.before:  # channels that ranks follow: only fitted, the training comes after both
        given = one_level(run, last, step.level, program, tuned, dense, step.plan)
        tuned, last = (tuned if given is None else given[0]), last + 1
    done = one_level(run, last, found.level, program, tuned, dense, found.plan)
    if done is None:
        return tuned
    pruned, details = done
    run.dense["searched_epochs"] = run.recipe.of_level(found.level).epochs
    title = "Pruned for the budget, FP32"
    _stage_float(run, 10 + number, f"level-{number}", title, pruned, pruned.plan, {**details, "search": found.told})
    return pruned


# ---------------------------------------------------------------------------------------------------- dense and levels


def trains_base(recipe: Recipe, task: Task) -> bool:
    """Whether the dense network is trained by the task's `base`, and not given."""
    return task.base is not None and recipe.weights is None and recipe.model is None


def base_of(run: Run, *, asked: tuple[Asks, ...] = ()) -> nn.Module:
    """The trained dense model: the user's, with weights where given, or trained by the task's own `base`, once what is `asked` was rehearsed."""
    run.say("load the model")
    seed_all(run.recipe.seed)
    if not trains_base(run.recipe, run.task):
        given = run.model()
        check_own_masks(run.recipe, given)
        return given
    assert run.task.base is not None
    options = {
        "seed": run.recipe.seed,
        "device": run.recipe.device,
        "checkpoint": run.folder.steps / "base.safetensors",
        "progress": lambda p: run.on_training("train the base", p),
    }
    wanted = run.recipe.base.model_dump(exclude_none=True)
    taken = accepted(run.task.base, {**options, **wanted})
    refused = wanted.keys() - taken.keys()
    if refused:
        msg = f"base.{min(refused)} must be an option of the task's base function. Got {wanted[min(refused)]!r}, which it does not take."
        raise UsageError(msg)
    if any(v.masks is not None for v in run.recipe.prune.levels):  # told now, not after the training
        check_own_masks(run.recipe, run.task.model())
        seed_all(run.recipe.seed)
    key = key_of(run.recipe.digest, run.environment["versions"], run.environment["threads"], STREAMS)
    kept = _kept_base(run, key)
    if kept is not None:
        return kept
    rehearse(run, run.task.model(), asked)
    seed_all(run.recipe.seed)
    trained = run.task.base(**taken)
    state = {n: t.detach().contiguous().clone() for n, t in trained.state_dict().items()}
    with whole_file(run.folder.steps / BASE) as temporary:
        save_file(state, temporary, metadata={"key": key})
    return trained


def _kept_base(run: Run, key: str) -> nn.Module | None:
    """The base as an earlier attempt trained it, where the task's model() has its shape; else it is trained again."""
    file = run.folder.steps / BASE
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as kept:
        if (kept.metadata() or {}).get("key") != key:
            return None
    model, state = run.task.model(), load_file(file)
    if {n: t.shape for n, t in model.state_dict().items()} != {n: t.shape for n, t in state.items()}:
        return None
    model.load_state_dict(state, strict=True)
    return model.eval()


def accepted(function: Callable[..., Any], options: Mapping[str, Any], *, first: str = "") -> dict[str, Any]:
    """The options that a user's function takes, besides what it is given `first`; UsageError where it must have others."""
    parameters = inspect.signature(function).parameters
    needed = [
        p.name for p in parameters.values() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    missing = [n for n in needed[bool(first) :] if n not in options]
    if missing:
        name, takes = (
            getattr(function, "__name__", "function"),
            ", ".join(filter(None, (first, *(f"{n}=…" for n in options)))),
        )
        hint = " It makes the model that it trains." if name == "base" else ""
        msg = f"the task's {name} must be callable as {name}({takes}), options it does not name left out. Got {missing[0]!r} without a default.{hint}"
        raise UsageError(msg)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(options)
    return {k: v for k, v in options.items() if k in parameters}


def _stage_examine(run: Run, program: Program, warnings: tuple[str, ...]) -> None:
    def make() -> Record:
        run.say("examine")
        cost, coupling = examine(program), couple(program)
        details = {
            **_layers(cost),
            "peak_activation_bytes": cost.peak_activation_bytes,
            "uncounted": [u.op if hasattr(u, "op") else str(u) for u in cost.uncounted],
            "pinned": [{"reason": p.reason, "units": p.units, "where": p.where} for p in coupling.pinned],
            "unknown_ops": coupling.unknown_ops,
            "spaces": len(coupling.spaces),
            "free_units": coupling.free_units,
            "batch": program.batch,
            "network": program.source_digest,
            "notes": [*program.notes, *warnings, *random_note(run)],
        }
        return run.record("examine", "The dense model", details=details)

    run.folder.stage(0, "examine", key_of(run.recipe.digest, program.source_digest, run.environment), make)


# -------------------------------------------------------------------------------------------------------------- stages


def _stage_float(
    run: Run, order: int, name: str, title: str, thing: Program | Pruned, plan: Plan | None, details: Mapping[str, Any]
) -> None:
    """Export in float32, check, measure."""
    run.say(f"{name}: export and check")
    artifact = export(thing, _model_file(run, name), target=run.recipe.target)
    reference = thing if isinstance(thing, Program) else capture(thing.module, thing.program.inputs, train=False)

    def make() -> Record:
        checked = check(artifact, reference, run.task.calibration_batches)
        return _measured(run, name, title, artifact, reference, checked, plan, details)

    run.folder.stage(order, name, _key(run, artifact), make)
    if name == "dense":
        run.dense["artifact"] = artifact
        if "values" not in run.dense:  # the stage was there already
            run.dense["values"], run.dense["watch"] = _seen(run, artifact)
        verdicts.refuse_another_base(run, run.dense["values"])


def _stage_int8(run: Run, order: int, name: str, title: str, quantized: Quantized, tuned: Pruned | None) -> None:
    """Export in codes, check against the simulation, measure."""
    run.say(f"{name}: export and check")
    artifact = export(quantized, _model_file(run, name), target=run.recipe.target)

    def make() -> Record:
        checked = check(artifact, quantized, run.task.calibration_batches)
        simulated = metric_of(run, predictor(quantized))
        details: dict[str, Any] = {"notes": list(quantized.notes)}
        if tuned is not None:
            details |= {"realiser": tuned.realiser, "proof": dataclasses.asdict(tuned.proof)}
        plan = tuned.plan if tuned is not None else None
        record = _measured(run, name, title, artifact, quantized.program, checked, plan, details)
        unit, file = run.task.metric.unit, kept_values(run.folder.path, name)
        measured = {**record.measured, "simulated_metric": summarize(simulated, unit)}
        pruned = kept_values(run.folder.path, run.recipe.quantize.scheme) if name.startswith("twin-") else None
        for key, other in (("simulated_change", simulated), ("change_from_pruned", pruned)):
            if file is not None and other is not None and file.shape == other.shape:
                measured[key] = paired(other, file, unit)
        return dataclasses.replace(record, measured=measured)

    record = run.folder.stage(order, name, _key(run, artifact), make)
    _refuse_far(run, record)


def _refuse_far(run: Run, record: Record) -> None:
    """The file in codes must score as its simulation does."""
    file, simulated = record.measured["metric"].value, record.measured["simulated_metric"].value
    assert file is not None and simulated is not None
    unit = run.task.metric.unit
    change = record.measured.get("simulated_change")
    # Codes that fall the other way at a tie move single samples in both directions: no difference, within bounds.
    noise = change is not None and change.low is not None and change.low <= 0 <= (change.high or 0)
    allowed = (AT_MOST if noise else PARITY) * (1 if unit == "%" else abs(simulated) / 100)
    if abs(file - simulated) > allowed + 1e-9:
        msg = f"the {TITLES[run.recipe.quantize.scheme]} file's {run.task.metric.name} must be within {allowed:.3g} {unit} of its simulation. Got {file:.4g} and {simulated:.4g}."
        raise VerificationError(msg, record)


def _measured(
    run: Run,
    name: str,
    title: str,
    artifact: Artifact,
    program: Program,
    checked: Check,
    plan: Plan | None,
    details: Mapping[str, Any],
) -> Record:
    run.say(f"{name}: measure")
    cost = examine(program)
    baseline = run.dense.get("artifact")
    options = run.recipe.measure
    found = measure(
        artifact, run.task.calibration_batches, baseline=baseline, baseline_ms=run.folder.least_dense_ms(),
        threads=options.threads, runs=options.runs, seconds=options.seconds,
    )  # fmt: skip
    values, watch = _seen(run, artifact)
    if values.ndim:
        keep_values(run.folder.path, name, values)
    if name == "dense":
        run.dense["values"], run.dense["watch"] = values, watch
        odd = [
            *another_range(range_of(_calibration_inputs(run)), watch),
            *(by_batches(len(values), watch) if values.ndim else ()),
            *filter(None, [share_note(run.task.metric, values.mean())]),
        ]
    else:
        odd = list(oddities(run.dense["watch"], watch))
    unit = run.task.metric.unit
    found |= {
        "stripped_bytes": _stripped(artifact),
        "metric": summarize(values, unit, found["bytes"].machine),
        "parameters": Measured(value=cost.parameters, unit="", protocol="counted in the exported graph"),
        "macs": Measured(value=cost.macs, unit="MAC", protocol="counted in the exported graph, one sample"),
    }
    if name != "dense" and values.ndim and run.dense["values"].ndim:
        found["metric_change"] = paired(run.dense["values"], values, unit, found["bytes"].machine)
    return run.record(
        name,
        title,
        plan_digest=plan.digest if plan is not None else None,
        measured=found,
        details={
            "file": artifact.path.name,
            "files": [f.name for f in artifact.files],
            "digest": files_digest(artifact.files),
            **({"digests": [file_digest(f) for f in artifact.files]} if len(artifact.files) > 1 else {}),
            "float_nodes": list(checked.float_nodes),
            "int8_nodes": list(checked.int8_nodes),
            "check": {"max_error": checked.max_error, "scale": checked.scale, "cosine": checked.cosine},
            **({"check_notes": list(checked.notes)} if checked.notes else {}),
            **({"float_reasons": dict(checked.reasons)} if checked.reasons else {}),
            **_on_codes(checked),
            **_layers(cost),
            **details,
            **({"notes": [*details.get("notes", ()), *odd], "alarms": odd} if odd else {}),
        },
    )


def _on_codes(checked: Check) -> dict[str, Any]:
    """How many of the layers that multiply with weights run on codes, where there are any and the runtime's graph tells."""
    if checked.layer_share is None:
        return {}
    return {"layers_on_codes": {"on_codes": checked.num_layers_on_codes, "of": checked.num_layers}}


def _seen(run: Run, artifact: Artifact) -> tuple[Any, Watch]:
    """The metric of a file, and what its evaluation did."""
    watch = Watch(predictor(artifact))
    if "read" in run.dense:
        return metric_of(run, watch), watch
    run.dense["read"] = Remembered(watch)
    return metric_of(run, run.dense["read"]), watch


def _calibration_inputs(run: Run) -> Iterator[torch.Tensor]:
    for batch in islice(run.task.calibration_batches(), 100):
        yield from (t for t in pytree.tree_leaves(batch) if isinstance(t, torch.Tensor))


def _stripped(artifact: Artifact) -> Measured:
    """Bytes of the files without metadata: names of outputs that are a dict are all that exports carry."""
    if artifact.path.suffix != ".onnx":
        what = f"stat: nothing is stripped of a {artifact.path.suffix} file"
        return Measured(value=artifact.size_bytes, unit="B", protocol=what)
    import onnx

    model = onnx.load(artifact.path, load_external_data=False)
    del model.metadata_props[:]
    sides = sum(f.stat().st_size for f in artifact.files[1:])
    return Measured(value=model.ByteSize() + sides, unit="B", protocol="serialised again without metadata")


def metric_of(run: Run, predict: Any) -> Any:
    """The task's metric on its test data: one value, or one per sample."""
    with unchanged(run.dense.get("networks", ())):
        return answered(run.task, predict)


def _layers(cost: Cost) -> dict[str, Any]:
    rows = [
        {
            "name": n.name,
            "kind": n.kind,
            "parameters": n.parameters,
            "macs": n.macs,
            "parameter_bytes": n.parameter_bytes,
            "activation_bytes": n.activation_bytes,
        }
        for n in cost.by_node
        if n.parameters or n.macs
    ]
    return {"layers": rows, "parameters": cost.parameters, "macs": cost.macs}


def _key(run: Run, artifact: Artifact) -> str:
    return key_of(run.recipe.digest, [file_digest(f) for f in artifact.files], run.environment)


# -------------------------------------------------------------------------------------------------- quantize, the twin


def quantized_of(run: Run, thing: Program | Pruned, teacher: nn.Module | None) -> Quantized:
    """In codes, by the recipe's `quantize`; with epochs trained with rounding, taught by `teacher` where there is one."""
    run.say("quantize")
    options = run.recipe.quantize
    seed_all(run.recipe.seed)
    shared: dict[str, Any] = {
        "target": run.recipe.target,
        "calibrate": run.task.calibration_batches,
        "scheme": options.scheme,
        "observer": options.observer,
        "num_samples": options.samples,
        "repair": options.repair,
        "float_layers": options.float_layers,
        "idle_repairs": True,  # noted: after hours of training it is no reason to end without a file
    }
    if "shrinking" in run.dense and teacher is not None:
        shared |= {"repair": repair_of(run), "bits": bits_for(run, thing, run.dense["shrinking"])}
    if options.spare and teacher is not None:
        return quantized_but_few(run, thing, teacher, shared)
    if not options.epochs:
        return quantize(thing, **shared)
    check_rounding(run.recipe, run.task)
    assert run.task.train_batches is not None and run.task.step is not None
    from paredown.quantize.qat import train_quantized

    name = "qat" if teacher is not None else "qat-twin"
    return train_quantized(
        thing,
        run.task.train_batches,
        step=run.task.step,
        epochs=options.epochs,
        lr=options.lr,
        teacher=teacher,
        distil=None if teacher is None else run.recipe.recover.distil,
        seed=run.recipe.seed,
        device=run.recipe.device,
        checkpoint=run.folder.steps / f"{name}.safetensors",
        max_steps=run.recipe.recover.max_steps,
        progress=lambda p: run.on_training("train with rounding", p),
        **shared,
    )


def _twin(run: Run, last: Program | Pruned) -> None:
    """A dense network of equal size, trained as long in all: would it do as well?"""
    if not run.recipe.dense_twin.enabled or run.task.twin is None or not isinstance(last, Pruned):
        return  # where nothing left the network, the dense file is the answer already
    run.say("train the equal-size dense network")
    module = last.module
    options = {
        "seed": run.recipe.seed,
        "device": run.recipe.device,
        # a level that a search added trained too: without its epochs the rival would train less than the pruned network
        "extra_epochs": run.recipe.recovery_epochs + run.dense.get("searched_epochs", 0),
        "checkpoint": run.folder.steps / "twin.safetensors",
        "progress": lambda p: run.on_training("train the dense twin", p),
        **run.recipe.base.model_dump(exclude_none=True),  # else a base of other length has no equal
    }
    twin = run.task.twin(
        sum(p.numel() for p in module.parameters()), **accepted(run.task.twin, options, first="parameters")
    )
    quantized = quantized_of(run, capture(twin, run.task.inputs(), train=False), None)
    scheme = run.recipe.quantize.scheme
    _stage_int8(run, 60, f"twin-{scheme}", f"Equal-size dense network, {TITLES[scheme]}", quantized, None)


# ------------------------------------------------------------------------------------------------------------- verdict


def _verdict(run: Run, program: Program, roles: Roles) -> tuple[tuple[Record, ...], dict[str, Any]]:
    from paredown.records import read

    run.folder.write_records()
    records = read(run.folder.path / "records.jsonl")
    by_stage = {str(r.cell["stage"]): r for r in records if r.cell["stage"] not in ("verdict", INSIGHT)}
    bounds = verdicts.bounds(run, by_stage)
    met = all(b["met"] for b in bounds)
    # Nothing in here is drawn from timings, so that two runs give the same verdict; the report adds what they say.
    otherwise = verdicts.fallback(run, by_stage, met=met)
    recommended = run.recipe.quantize.scheme if met else otherwise
    _closer(run, by_stage, recommended, program)

    details = verdicts.details(run, by_stage, bounds, recommended, otherwise, program, roles)
    record = run.folder.stage(
        90,
        "verdict",
        key_of(details, [r.to_json() for r in by_stage.values()]),
        lambda: run.record("verdict", "Verdict", details=details),
    )
    from paredown.report import write_report

    write_report(run.folder.path)
    return (*by_stage.values(), record), details


def _closer(run: Run, by_stage: Mapping[str, Record], recommended: str, program: Program) -> None:
    """What else is to be seen of the recommended file; where that is the dense one, of the quantized one."""
    subject = recommended if recommended != "dense" else run.recipe.quantize.scheme
    files = [by_stage[n].details["digest"] for n in ("dense", subject)]
    key = key_of(run.recipe.digest, subject, files, run.environment, run.dense["slices"])
    run.folder.stage(80, INSIGHT, key, lambda: insight(run, subject, program, lambda name: _artifact(run, name)))


def _model_file(run: Run, stage: str) -> Path:
    return run.folder.path / f"{stage}{named(run.recipe.target).suffix}"


def _artifact(run: Run, stage: str) -> Artifact:
    path = _model_file(run, stage)
    files = (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)
    return Artifact(files=files, target=run.recipe.target, scheme=stage if stage in TITLES else "fp32")
