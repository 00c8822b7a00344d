"""curve: from a recipe's grid to trials, records, the choice and the report."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paredown.allocate.request import MEASURED
from paredown.environments import python_of
from paredown.errors import Interrupted, MissingError, ParedownError, RejectedError, UsageError
from paredown.pipeline.compress import difference, task_of, versions
from paredown.pipeline.data import changed, remember, settle
from paredown.pipeline.folder import RECORDS, opened
from paredown.pipeline.stages import trains_base
from paredown.pipeline.sweep_display import Shown, sweep_display
from paredown.pipeline.ways import check_rounding, check_ways
from paredown.recipe import Recipe, load_recipe, parse_recipe
from paredown.records import Record, read, write_text
from paredown.report.curve_view import curve_view
from paredown.report.curves import curve_document, write_curve_report
from paredown.score.patterns import matches
from paredown.strict_yaml import read_yaml
from paredown.sweep import local
from paredown.sweep import ray as on_ray
from paredown.sweep.grid import Cell, controls_of, grid
from paredown.sweep.slots import servers_kept
from paredown.sweep.trials import Machine, Outcome, lacks_a_file, of_other_versions, read_results, trial_folder
from paredown.target import named
from paredown.train import Task

WORKER = "paredown.pipeline.trial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curved:
    """What a sweep made: `document` is that of `--json`, with lines, sweet spot and verdict."""

    out: Path
    records: tuple[Record, ...]
    document: Mapping[str, Any]


def curve(
    what: str | Path | Recipe,
    *,
    out: str | Path,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    quiet: bool = False,
    processes: int | None = None,
    retry: bool = False,
    ray: str | None = None,
) -> Curved:
    """Run what is missing of a recipe's curve, choose the sweet spot, compare with the dense controls, write the report.

    Every trial is a process of its own; `processes` of them run at once (default: cores / threads of the recipe). The same
    recipe in the same `out` continues, whatever stopped it, to the same records, and one with more trials (seeds, amounts, controls) or another limit goes on from those that are there; `retry` runs failed trials again, and those whose quantized file failed. `ray`, the
    address of a Ray cluster (or "auto"), has them run there. Writes recipe.yaml, records.jsonl, curve.json, report.html, journal.jsonl and trials/.

    Raises UsageError (2: no `curve`, another recipe in `out`), RejectedError (3: no trial has a result), ResourceError (7),
    MissingError (8: Ray, or its cluster), Interrupted (130, resumable).
    """
    recipe = what if isinstance(what, Recipe) else load_recipe(what, list(overrides))
    task, _, _ = task_of(recipe)
    settle(task, recipe.data_path)
    cells = grid(recipe)
    assert recipe.curve is not None  # else there is no grid
    check_cells(cells, task, later=recipe.curve.controls.at_sweet_spot)
    folder, found = Path(out), versions()
    machine = machine_for(recipe, processes, ray=ray)
    run_missing = local.run_missing if ray is None else on_ray.run_missing
    with servers_kept(), opened(
        folder, recipe.to_yaml(), lambda there: difference(there, recipe, folder), overwrite=overwrite, kind="a curve",
        grows=lambda there: _grows(there, cells, folder, recipe),
    ):  # fmt: skip
        remember(folder, recipe.data_path)
        with sweep_display(len(cells), quiet=quiet) as shown:
            _say_what_is_there(shown, cells, folder, found, retry)
            run_missing(cells, folder, found, machine, retry=retry, progress=shown.event)
        beside = _beside_sweet_spot(recipe, task, cells, folder, found)
        if beside:
            read_by = {digest for cell in beside for _, digest in cell.needs}
            with sweep_display(len(beside), quiet=quiet) as shown:
                shown.also("controls of the sweet spot")
                _say_what_is_there(shown, beside, folder, found, retry)
                asked = (*(c for c in cells if c.digest in read_by), *beside)
                with _counting((*cells, *beside), folder, found, retry):
                    run_missing(asked, folder, found, machine, retry=retry, progress=shown.event)
        return _told(recipe, task, (*cells, *beside), folder, found)


@contextmanager
def _counting(cells: Sequence[Cell], folder: Path, found: Mapping[str, Any], retry: bool) -> Iterator[None]:
    """Of an interruption, how many of all trials are through, not of those of this stretch alone."""
    try:
        yield
    except Interrupted as error:
        done = len(read_results(cells, folder, found))
        if retry or done == len(cells):  # old results of what is to be tried again are no progress
            raise
        msg = f"{done} of {len(cells)} trials are done or marked; the same command goes on with the others."
        raise Interrupted(msg) from error


def _grows(there: str, cells: Sequence[Cell], folder: Path, recipe: Recipe) -> bool:
    """Whether every trial of the sweep that is there is one of this sweep: more seeds or amounts, another limit."""
    if changed(folder, recipe.data_path):
        return False
    try:
        before = grid(parse_recipe(read_yaml(there)))
    except ParedownError:  # written by another version
        return False
    return {c.digest for c in before} <= {c.digest for c in cells}


def _beside_sweet_spot(
    recipe: Recipe, task: Task, cells: Sequence[Cell], folder: Path, found: Mapping[str, Any]
) -> tuple[Cell, ...]:
    """The controls that the chosen point lacks: of its own way and amount, once all others are through. Controls choose nothing."""
    assert recipe.curve is not None
    kinds = recipe.curve.controls.at_sweet_spot
    head, records = _gathered(recipe, task, cells, folder, found)
    if not kinds or not any(r.cell["kind"] == "pruned" for r in records):
        return ()
    seen = curve_view((head, *records))
    chosen = seen.spot.point
    if chosen is None or chosen.kind != "pruned":
        return ()
    there = {c.control for c in seen.comparisons if c.own and (c.line, c.amount) == (seen.spot.line, chosen.amount)}
    return controls_of(recipe, cells, chosen.digests, [k for k in kinds if k not in there])


def check_cells(cells: Sequence[Cell], task: Task, *, later: Collection[str] = ()) -> None:
    """Names, options and ways of all cells, before any work; `later` are kinds of controls that may follow. Raises UsageError."""
    target = named(cells[0].recipe.target)
    if target.environment:
        python_of(target)
    if cells[0].quantized:
        check_rounding(cells[0].recipe, task)
        _check_float_layers(cells, task)
    fresh = {"from-scratch", "scratch", "thin"} & {*later, *(c.kind for c in cells)}
    if fresh and task.train is None and task.step is None:
        msg = "a control must have a way to train: step with train_batches, or train. Got a task with neither."
        raise UsageError(msg)
    seed = cells[0].seed
    for cell in cells:
        if cell.seed == seed and cell.kind in ("pruned", "from-scratch"):
            check_ways(cell.recipe, task)
            _refuse_one_table(cell, cells, task)


def _refuse_one_table(cell: Cell, cells: Sequence[Cell], task: Task) -> None:
    """A measured sensitivity is of one network: the others of a curve would refuse it once each has trained its base."""
    asked = cell.recipe.prune
    seeds = {c.seed for c in cells}
    if asked.sensitivity is None or asked.allocation not in MEASURED or len(seeds) < 2:
        return
    if trains_base(cell.recipe, task):
        msg = f"prune.sensitivity must be of the one network that a curve prunes. Got {asked.sensitivity} with {len(seeds)} seeds, each of which trains its own. Leave it out, and each measures its own, or use one of curve.seeds."
        raise UsageError(msg)


def _check_float_layers(cells: Sequence[Cell], task: Task) -> None:
    """A pattern that no layer has would cost every file in codes; with low rank there may be layers that no one knows yet."""
    asked = cells[0].recipe.quantize.float_layers
    if not asked or any(level.factorize is not None for cell in cells for level in cell.recipe.prune.levels):
        return
    _, model, _ = task_of(cells[0].recipe)
    made = model()
    known = [n for of in (made.named_modules(), made.named_parameters(), made.named_buffers()) for n, _ in of if n]
    for pattern in asked:
        if not matches(known, [pattern]):
            near = difflib.get_close_matches(pattern, known, 3) or known[:3]
            msg = f"quantize.float_layers must match parameters or modules of the network. Got {pattern!r}, which matches none; there are {', '.join(near)}."
            raise UsageError(msg)


def machine_for(recipe: Recipe, processes: int | None, *, ray: str | None = None) -> Machine:
    """How trials of a recipe run, here or on a cluster; one at a time by default where latency is timed, and on each GPU.

    More `processes` than GPUs share them: small networks leave most of one idle.
    """
    assert recipe.curve is not None
    threads, limits, ranks = recipe.threads or 1, recipe.curve.trial, recipe.recover.ranks
    gpus = (
        _gpus(recipe.device, ranks) if ray is None else ("cuda",) * (recipe.device == "cuda")
    )  # there Ray shares them out
    if recipe.device == "cuda" and not gpus:
        msg = f"device cuda must have {ranks} GPUs for a trial of {ranks} ranks. Got fewer that torch can use here: see `paredown doctor`, or use --set device=cpu."
        raise MissingError(msg)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    one_gpu = recipe.device.startswith("cuda:")
    room = on_ray.MANY if ray is not None else len(gpus) or (1 if one_gpu else max(1, cores // (threads * ranks)))
    usual = 1 if recipe.curve.latency else room
    return Machine(
        worker=WORKER, processes=usual if processes is None else processes, threads=threads, seconds=limits.seconds,
        memory_bytes=limits.memory, gpus=gpus, cluster=ray, ranks=ranks,
    )  # fmt: skip


def _gpus(device: str, ranks: int) -> tuple[str, ...]:
    """The GPUs to share out, by their own names, as many together as a trial has ranks, where the recipe says "cuda" and not which."""
    if device != "cuda":
        return ()
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = [str(n) for n in range(torch.cuda.device_count())]
    if seen:  # CUDA sees none of what follows a number below 0
        every = [*itertools.takewhile(lambda name: name and name[0] != "-", map(str.strip, seen.split(",")))]
    return tuple(",".join(every[at : at + ranks]) for at in range(0, len(every) - ranks + 1, ranks))


def _say_what_is_there(
    shown: Shown, cells: Sequence[Cell], folder: Path, found: Mapping[str, Any], retry: bool
) -> None:
    known = read_results(cells, folder, found)
    done = sum(o.status == "done" and not (retry and lacks_a_file(o.record)) for o in known.values())
    failed = 0 if retry else len(known) - done
    if done or failed:
        shown.there(done, failed)
    if len(known) < len(cells):
        others, differ = of_other_versions(cells, folder, found)
        if others:
            shown.other(others, differ)


def _gathered(
    recipe: Recipe, task: Task, cells: Sequence[Cell], folder: Path, found: Mapping[str, Any]
) -> tuple[Record, list[Record]]:
    """(the record that describes the sweep, those of the trials in the order of the grid)."""
    known = read_results(cells, folder, found)
    failed = [_failure(cell, known.get(cell.digest)) for cell in cells if not _done(known.get(cell.digest))]
    records = [o.record for c in cells if (o := known.get(c.digest)) is not None and o.record is not None]
    return _head(recipe, task, cells, failed, found), records


def _told(recipe: Recipe, task: Task, cells: Sequence[Cell], folder: Path, found: Mapping[str, Any]) -> Curved:
    """Records in the order of the grid, the choice, the report."""
    head, records = _gathered(recipe, task, cells, folder, found)
    if not any(r.cell["kind"] == "pruned" for r in records) and not any(
        r.cell["kind"] == "from-scratch" for r in records
    ):
        first = next((f["reason"] for f in head.details["failed"] if f["status"] != "not run"), "no trial ended")
        msg = f"a curve must have at least one pruned model. Got none of {len(cells)} trials: {first.rstrip('.')} (see journal.jsonl in {folder}; --retry runs them again)."
        raise RejectedError(msg)
    write_text(folder / RECORDS, "".join(r.to_json() + "\n" for r in (head, *records)))
    every = tuple(read(folder / RECORDS))  # what `paredown report` will read
    document = curve_document(every)
    write_text(folder / "curve.json", json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")
    write_curve_report(folder, every)
    return Curved(out=folder, records=every, document=document)


def _done(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.status == "done"


def _failure(cell: Cell, outcome: Outcome | None) -> dict[str, Any]:
    """A trial without a record, for the report."""
    told = {**cell.told(), "name": cell.name}
    if outcome is None:
        return {**told, "status": "not run", "reason": "a trial that it needs has no result", "tail": []}
    return {**told, "status": outcome.status, "reason": outcome.reason, "tail": list(outcome.tail)}


def _head(
    recipe: Recipe,
    task: Task,
    cells: Sequence[Cell],
    failed: list[dict[str, Any]],
    found: Mapping[str, Any],
) -> Record:
    """The first record: what the lines are drawn from, beside the trials."""
    assert recipe.curve is not None
    return Record(
        cell={
            "stage": "curve", "title": "Curve", "recipe_digest": recipe.digest, "task": task.name, "target": recipe.target,
        },
        environment={"versions": dict(found)},
        details={
            "name": recipe.name,
            "metric": dataclasses.asdict(task.metric),
            "axis": recipe.curve.axis,
            "limit": recipe.curve.limit,
            "seeds": list(recipe.curve.seeds),
            "cells": len(cells),
            "failed": failed,
            "recipes": {c.digest: str(trial_folder(Path(), c.digest, found) / "recipe.yaml") for c in cells},
        },
    )  # fmt: skip
