"""paredown compress: the whole job from a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.show import counts_after, emit, only_document, plan_table, share, show, table
from paredown.errors import GateError, InfeasibleError, RejectedError, UsageError

if TYPE_CHECKING:
    from paredown.recipe import Recipe


def compress(
    recipe: Annotated[str, Parameter(help='An embedded recipe ("digits", "cifar10") or the path of a .yaml file.')],
    /,
    *,
    out: Annotated[Path | None, Parameter(help="Folder of the run; default: runs/NAME of the recipe.")] = None,
    set_: options.Set = (),
    weights: options.OtherWeights = None,
    device: options.Device = None,
    threads: options.Threads = None,
    strict: options.Strict = False,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Take a trained model to a proven, measured INT8 file with a report; the same command continues a killed run."""
    from paredown.recipe import load_recipe

    own = {"weights": weights, "device": device, "threads": threads}
    made = load_recipe(recipe, [*set_, *(f"{key}={value}" for key, value in own.items() if value is not None)])
    folder = out if out is not None else Path("runs") / safe_name(made.name)
    _refuse_inputs_folder(folder, recipe, made, overwrite=overwrite)
    if dry_run:
        return _dry_run(made, json=json, quiet=quiet, strict=strict)
    from paredown.pipeline import compress as run

    with only_document(json):
        if strict:
            _planned(made, strict=True)
        missed: GateError | InfeasibleError | None = None
        try:
            run(made, out=folder, overwrite=overwrite, quiet=quiet)
        except (GateError, InfeasibleError) as error:  # the report is written where the bounds were looked at
            missed = error
            if not _has_verdict(folder):
                raise
    told(folder, json=json, quiet=quiet)
    if missed is not None:
        raise missed
    return 0


def safe_name(name: str) -> str:
    """A folder's name out of any text: no separators, no leading dot or dash, at most 80 characters.

    >>> safe_name("../my run: 50 %"), safe_name("-rf")
    ('my-run-50', 'rf')
    """
    return re.sub(r"[^\w.]+", "-", name).strip(".-_")[:80] or "run"


def _refuse_inputs_folder(folder: Path, source: str, recipe: Recipe, *, overwrite: bool) -> None:
    """A run deletes what an earlier one left in its folder: it may not be the folder of the user's own files."""
    is_run = (folder / "steps").is_dir() and not overwrite  # the recipe that a run wrote down may continue that run
    task = recipe.task if recipe.task.endswith(".py") else None
    code = recipe.model.rpartition(":")[0] if recipe.model and ".py:" in recipe.model else None
    for what, path in (("recipe", source), ("task", task), ("weights", recipe.weights), ("model", code)):
        if path is None or not Path(path).is_file() or (what == "recipe" and is_run):
            continue
        if Path(path).resolve().parent == folder.resolve():
            msg = f"--out must not be the folder of the {what}. Got {str(folder)!r}, which holds {Path(path).name!r}. Choose another --out."
            raise UsageError(msg)
    if recipe.data is not None and Path(recipe.data).resolve() == folder.resolve():
        msg = f"--out must not be the folder of the data. Got {str(folder)!r}. Choose another --out."
        raise UsageError(msg)


# ------------------------------------------------------------------------------------------------------------- dry run


def _planned(recipe: Recipe, *, strict: bool) -> tuple[Any, Any, Any, bool]:
    """Cost, coupling and the plan of the first level, on the model as it is before any training."""
    import paredown
    from paredown.pipeline.compress import task_of
    from paredown.pipeline.ways import Here, Way, check_ways
    from paredown.train.task import seed_all

    task, make, given = task_of(recipe)
    seed_all(recipe.seed)
    model = make()
    untrained = task.base is not None and recipe.weights is None and recipe.model is None
    program = paredown.capture(model, task.inputs())
    coupling, cost = paredown.couple(program, strict=strict), paredown.examine(program, strict=strict, model=task.name)
    if not recipe.prune.levels:
        return cost, coupling, None, given and not untrained
    check_ways(recipe, task)
    way = Way(recipe=recipe, task=task, level=recipe.prune.levels[0], number=1, weights_given=given or untrained)
    plan = way.foreseen(Here(program=program, coupling=coupling, cost=cost, masks={}))
    return cost, coupling, plan, given and not untrained


def _dry_run(recipe: Recipe, *, json: bool, quiet: bool, strict: bool) -> int:
    with only_document(json):
        cost, coupling, plan, trained = _planned(recipe, strict=strict)
        if plan is not None:
            after = counts_after(coupling, cost, plan)
    notes = [] if trained else ["The model is not trained yet: counts hold, which channels leave will differ."]
    if json:
        reached = (
            [[cost.parameters, after[0]], [cost.macs, after[1]]]
            if plan is not None
            else [[cost.parameters] * 2, [cost.macs] * 2]
        )
        emit(
            {
                "schema": 1,
                "dry_run": True,
                "parameters": reached[0],
                "macs": reached[1],
                "badge": "estimated",
                "levels": len(recipe.prune.levels),
                "plan_digest": None if plan is None else plan.digest,
                "notes": notes,
            }
        )
        return 0
    show(cost, quiet=quiet)
    if plan is None and recipe.prune.levels:
        show("Level 1 finds its own density in its training: nothing can be said before.", quiet=quiet)
    elif plan is None:
        show(
            "No level of pruning is asked for: the model is quantized, exported, checked and measured as it is.",
            quiet=quiet,
        )
    else:
        show(f"Level 1 of {len(recipe.prune.levels)}:", plan_table(coupling, cost, plan), quiet=quiet)
    show(*(f"note: {n}" for n in notes), "Dry run: nothing was trained or written.", quiet=quiet)
    return 0


# ------------------------------------------------------------------------------------------------------------- verdict


def _has_verdict(folder: Path) -> bool:
    from paredown.records import read

    return any(r.cell.get("stage") == "verdict" for r in read(folder / "records.jsonl"))


def told(folder: Path, *, json: bool, quiet: bool) -> None:
    """The verdict of a run from its records: a table, or the document of `report --json`."""
    from paredown.records import read
    from paredown.report import report_json

    try:
        records = read(folder / "records.jsonl")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"records.jsonl must hold one record per line. Got {type(error).__name__}: {error} in {str(folder)!r}. Was it edited?"
        raise RejectedError(msg) from error
    document = report_json(records)
    if json:
        emit(document)
    else:
        show(*verdict(document), f"report: {folder / 'report.html'}", quiet=quiet)


def verdict(document: dict[str, Any]) -> list[Any]:
    """A short table out of report_json: one line per file, then what is recommended and what nobody tested."""
    rows = document["rows"]
    dense = rows[0] if rows else None
    lines = []
    for row in rows:
        metric, latency = row["metric"], row["latency_ms"]
        lines.append(
            (
                row["stage"],
                _figure(row["bytes"], "{:,}"),
                share(row["bytes"], dense["bytes"]) if dense and row["bytes"] and dense["bytes"] else "–",
                _figure(metric["value"], "{:.2f} " + str(metric["unit"]).replace("{", "{{").replace("}", "}}")),
                _figure(latency["median"], "{:.3f}"),
                _figure(row["parameters"], "{:,}"),
                _figure(row["macs"], "{:,}"),
            )
        )
    name = str(dense["metric"]["name"]) if dense else "metric"
    told = document["verdict"]
    met = {True: "all bounds hold", False: "a bound does not hold", None: "no bound was given"}[told["target_met"]]
    titles = ("stage", "bytes", "of dense", name, "ms", "parameters", "MACs")
    return [
        table(titles, lines),
        f"recommended: {told['recommended'] or 'nothing yet'} ({met})",
        *((f"not tested: {'; '.join(told['not_tested'])}",) if told["not_tested"] else ()),
    ]


def _figure(value: float | None, form: str) -> str:
    return "not tested" if value is None else form.format(value)
