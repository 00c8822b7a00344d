"""sensitivity: of a recipe's network, what each space and each layer costs by itself, as records, a table and a page."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paredown.couple import Coupling
from paredown.errors import NothingToDo, UsageError
from paredown.pipeline.compress import difference, run_of, task_of
from paredown.pipeline.data import remember, settle
from paredown.pipeline.display import display
from paredown.pipeline.folder import RECORDS, opened
from paredown.pipeline.kept_sensitivity import STAGE, about_units, order_of
from paredown.pipeline.run import Run, random_note
from paredown.pipeline.stages import base_of
from paredown.pipeline.ways import IN_TRAINING, Here, Way, check_criterion
from paredown.program import Program, capture
from paredown.recipe import Recipe, load_recipe
from paredown.recipe_fields import Level
from paredown.records import Record, read, write_text
from paredown.report.sensitivity import sensitivity_csv, sensitivity_document, write_sensitivity_report
from paredown.report.sensitivity_document import SAMPLES
from paredown.search.damage import AMOUNTS, BITS, Hurt, Measuring, check_bits, hurts, record_of
from paredown.search.probe import UNITS, Distance, Probe, probe_key, usual_distance
from paredown.search.repair import Repair
from paredown.search.sensitivity import check_amounts
from paredown.train import check_roles
from paredown.train.shares import share_note

JOURNAL = "journal.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensed:
    """What a measurement of sensitivities made: `document` is that of `--json`, with rankings and verdict."""

    out: Path
    records: tuple[Record, ...]
    document: Mapping[str, Any]
    measured_now: int
    """Points that were not in the journal."""


def sensitivity(
    what: str | Path | Recipe,
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    amounts: Sequence[float] = AMOUNTS,
    bits: Sequence[int] = BITS,
    distance: Distance | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Sensed:
    """What every coupled space at each of `amounts` (fractions that remain) and every layer at each of `bits` costs by itself.

    Measured on the task's held-out data (`choose_batches` by `evaluate(predict, batches)`; never on test data): how much
    worse the metric is, and how far the outputs moved ("kl" where the recipe distils by it and there are classes, else
    "mse"; see `search.Probe`). The units that leave are those that the recipe's criterion ranks lowest. Nothing is
    retrained. A task without held-out data has distances alone, on its calibration inputs.

    Every point is in `out`/journal.jsonl as soon as it is known; the same call goes on where it was stopped, and with
    other weights, data, versions or options measures anew. Writes recipe.yaml, records.jsonl, sensitivity.json,
    sensitivity.csv and report.html. `prune.sensitivity: OUT` in a recipe lets `paredown compress` allocate by it.

    Raises UsageError (2), RejectedError (3), NothingToDo (4), Interrupted (130, resumable).
    """
    recipe = _alone(what if isinstance(what, Recipe) else load_recipe(what, list(overrides)))
    if not amounts and not bits:
        msg = "sensitivity must be given amounts or bits. Got neither."
        raise UsageError(msg)
    check_amounts(amounts)
    check_bits(bits)
    check_criterion(recipe.prune)
    task, model, given = task_of(recipe)
    settle(task, recipe.data_path)
    threads = torch.get_num_threads()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        with (
            opened(
                Path(out),
                recipe.to_yaml(),
                lambda there: difference(there, recipe, Path(out)),
                overwrite=overwrite,
                kind="a sensitivity",
            ) as folder,  # fmt: skip
            display(quiet=quiet) as shown,
        ):
            remember(folder.path, recipe.data_path)
            run = run_of(recipe, task, model, given, folder, shown)
            return _sensed(run, Path(out), tuple(dict.fromkeys(amounts)), tuple(bits), distance, shown.measuring)
    finally:
        torch.set_num_threads(threads)


def _alone(recipe: Recipe) -> Recipe:
    """The recipe without its curve, which a measurement does not read: another curve leaves what was measured as it is."""
    alone = recipe.model_copy(update={"curve": None})
    alone.__dict__.pop("digest", None)  # of the whole recipe, where somebody asked for it
    return alone


def _sensed(
    run: Run, out: Path, amounts: Sequence[float], bits: Sequence[int], distance: Distance | None,
    shown: Callable[[int, int, str], None],
) -> Sensed:  # fmt: skip
    roles = check_roles(run.task)
    program = capture(base_of(run), run.task.inputs())
    run.say("look at the model, score its units")
    way, notes = _way(run)
    if amounts and way.cut.kind == "n:m":
        amounts = (way.cut.a / way.cut.b,)  # no other one is to be had
    here = Here.of(program, None)
    scores, asked = way.scores(here), run.recipe.prune
    repair = (
        Repair(program=program, batches=[*way.inputs()], step=None)
        if asked.reconstruct and not way.cut.masked
        else None
    )
    probe = Probe(
        run.task, program.module, distance or _usual(program, run.recipe), device=run.recipe.device,
        seed=run.recipe.seed, folder=run.folder.steps,
    )  # fmt: skip
    with contextlib.closing(probe):
        about = about_units(program, scores, repair=repair is not None)
        key = probe_key(probe, [run.recipe.digest, run.environment["versions"], run.environment["threads"], about])
        fresh = 0

        def progress(state: Measuring) -> None:
            nonlocal fresh
            fresh += state.fresh
            shown(state.done, state.total, state.damage.name)

        run.say(f"measure on {probe.num_samples:,} {SAMPLES[_data(run)]}")
        found = hurts(
            program, here.coupling, scores, probe, amounts=amounts, bits=bits, include=asked.include,
            exclude=asked.exclude, repair=repair, journal=out / JOURNAL, key=key, progress=progress,
        )  # fmt: skip
    if all(h.seen is None for h in found):
        msg = f"a sensitivity must have at least one number. Got none of {len(found)}: {found[0].why}."
        raise NothingToDo(msg)
    odd = share_note(run.task.metric, probe.dense)
    told = [*notes, *roles.warnings, *([odd] if odd else []), *random_note(run), *program.notes]
    head = _head(run, here, probe, {**about, "order": order_of(scores)}, amounts, told)
    head = dataclasses.replace(head, details={**head.details, "test_data": roles.test_digest})
    return _written(out, head, found, key, probe, fresh)


def _written(out: Path, head: Record, found: Sequence[Hurt], key: str, probe: Probe, fresh: int) -> Sensed:
    points = [record_of(h, key, probe.metric_unit, UNITS[probe.distance], probe.num_samples) for h in found]
    write_text(out / RECORDS, "".join(r.to_json() + "\n" for r in (head, *points)))
    records = tuple(read(out / RECORDS))  # what `paredown report` will read
    document = sensitivity_document(records)
    write_text(out / "sensitivity.json", json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")
    write_text(out / "sensitivity.csv", sensitivity_csv(records))
    write_sensitivity_report(out, records)
    return Sensed(out=out, records=records, document=document, measured_now=fresh)


def _way(run: Run) -> tuple[Way, list[str]]:
    """What ranks the units: the recipe's criterion and granularity, where they rank units of the model as it is."""
    recipe, asked, notes = run.recipe, run.recipe.prune, []
    if asked.criterion in IN_TRAINING:
        notes.append(f"The criterion {asked.criterion} is learnt in a training: units are ranked by l1 here.")
        asked = asked.model_copy(update={"criterion": "l1", "criterion_options": {}})
    of_units = (v for v in asked.levels if v.factorize is None and v.modules is None and v.masks is None)
    level = next(of_units, None) or Level(channels=0.5)
    if asked.granularity_of(level) == "layer":
        notes.append("Spaces of channels are measured; the recipe's granularity is whole modules.")
        asked = asked.model_copy(update={"granularity": "channel"})
    way = Way(
        recipe=recipe.model_copy(update={"prune": asked}), task=run.task, level=level, number=1,
        weights_given=run.weights_given, steps=run.folder.steps,
    )  # fmt: skip
    return way, notes


def _usual(program: Program, recipe: Recipe) -> Distance:
    with torch.no_grad():
        out = program.module(*program.inputs.args, **program.inputs.kwargs)
    leaves = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    return usual_distance(leaves[0], recipe.recover.distil) if len(leaves) == 1 else "mse"


def _head(
    run: Run, here: Here, probe: Probe, about: Mapping[str, Any], amounts: Sequence[float], notes: list[str]
) -> Record:
    """The first record: what the points are of."""
    metric = None if run.task.choose is None else dataclasses.asdict(run.task.metric)
    details = {
        "name": run.recipe.name,
        "metric": metric,
        "dense": probe.dense,
        "distance": probe.distance,
        "num_samples": probe.num_samples,
        "data": _data(run),
        "units": dict(about),
        "amounts": list(amounts),
        "spaces": {s.name: {"kind": s.kind, "units": len(s)} for s in here.coupling.spaces},
        "parameters": _parameters(here.coupling, here.program),
        "weights": sum(t.numel() for n, t in here.program.module.named_parameters()),
        "notes": notes,
    }
    return run.record(STAGE, "Sensitivity", details=details)


def _data(run: Run) -> str:
    """What a probe reads of the task."""
    return "calibration_batches" if run.task.choose is None else "choose_batches"


def _parameters(coupling: Coupling, program: Program) -> dict[str, int]:
    """Parameters that one unit of each space takes along, times its units; and the size of every parameter."""
    sizes = {name: int(t.numel()) for name, t in program.state.items() if isinstance(t, torch.nn.Parameter)}
    touched = {}
    for space in coupling.spaces:
        per_axis = [
            sizes[f.parameter] // program.state[f.parameter].shape[f.axis] * f.indices.size
            for f in space.footprints
            if f.parameter in sizes
        ]
        touched[space.name] = sum(per_axis)
    return {**sizes, **touched}
