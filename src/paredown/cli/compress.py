"""paredown compress: the whole job from a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
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
    masks = [("masks", level.masks) for level in recipe.prune.levels]
    for what, path in (("recipe", source), ("task", task), ("weights", recipe.weights), ("model", code), *masks):
        if path is None or not Path(path).is_file() or (what == "recipe" and is_run):
            continue
        if Path(path).resolve().parent == folder.resolve():
            msg = f"--out must not be the folder of the {what}. Got {str(folder)!r}, which holds {Path(path).name!r}. Choose another --out."
            raise UsageError(msg)
    if recipe.data is not None and Path(recipe.data).resolve() == folder.resolve():
        msg = f"--out must not be the folder of the data. Got {str(folder)!r}. Choose another --out."
        raise UsageError(msg)


# ------------------------------------------------------------------------------------------------------------- dry run


def _planned(recipe: Recipe, *, strict: bool) -> tuple[Any, Any, Any, bool, Any]:
    """Cost, coupling, the plan of the first level on the model as it is before any training, and what a budget without levels foresees."""
    import paredown
    from paredown.pipeline.budgets import check_budget, level_of
    from paredown.pipeline.compress import task_of
    from paredown.pipeline.foreseen import foreseen_budget
    from paredown.pipeline.ways import Here, Way, check_ways
    from paredown.recipe_fields import Level
    from paredown.train.task import seed_all

    task, make, given = task_of(recipe)
    seed_all(recipe.seed)
    model = make()
    untrained = task.base is not None and recipe.weights is None and recipe.model is None
    program = paredown.capture(model, task.inputs())
    coupling, cost = paredown.couple(program, strict=strict), paredown.examine(program, strict=strict, model=task.name)
    check_ways(recipe, task)
    check_budget(recipe)
    here = Here(program=program, coupling=coupling, cost=cost, masks={})
    level = recipe.prune.levels[0] if recipe.prune.levels else level_of(recipe)
    asked = Level(parameters=0.5) if level is None else level
    way = Way(recipe=recipe, task=task, level=asked, number=1, weights_given=given or untrained)
    if level is None:
        budget = foreseen_budget(recipe, way, here)
        return cost, coupling, None if budget is None else budget.plan, given and not untrained, budget
    return cost, coupling, way.foreseen(here), given and not untrained, None


def _dry_run(recipe: Recipe, *, json: bool, quiet: bool, strict: bool) -> int:
    with only_document(json):
        cost, coupling, plan, trained, budget = _planned(recipe, strict=strict)
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
                **({"budget": _amounts(budget)} if budget is not None else {}),
                "plan_digest": None if plan is None else plan.digest,
                "notes": notes,
            }
        )
        return 0
    show(cost, quiet=quiet)
    if budget is not None:
        show(*_foreseen(budget), quiet=quiet)
    if plan is None and recipe.prune.levels:
        show("Level 1 finds its own density in its training: nothing can be said before.", quiet=quiet)
    elif plan is None and budget is not None and budget.amounts:
        show("The budget is foreseen to be met as it is: nothing leaves.", quiet=quiet)
    elif plan is None and budget is None:
        show(
            "No level of pruning is asked for: the model is quantized, exported, checked and measured as it is.",
            quiet=quiet,
        )
    elif plan is not None:
        title = f"Level 1 of {len(recipe.prune.levels)}:" if recipe.prune.levels else "For the budget:"
        show(title, plan_table(coupling, cost, plan), quiet=quiet)
    show(*(f"note: {n}" for n in notes), "Dry run: nothing was trained or written.", quiet=quiet)
    return 0


def _amounts(budget: Any) -> dict[str, Any]:
    """Asked and foreseen, for scripts."""
    rows = {n: {"asked": a, "before": b, "foreseen": f} for n, (a, b, f) in budget.amounts.items()}
    return {"amounts": rows, "badge": "estimated", "feasible": not budget.nearest}


def _foreseen(budget: Any) -> list[Any]:
    """What a budget is foreseen to lead to: amounts, and layers with their steps."""
    amounts = [(n, *(f"{v:,.0f}" if v >= 1000 else f"{v:,.4g}" for v in told)) for n, told in budget.amounts.items()]
    lines: list[Any] = [table(("amount", "asked", "as it is", "foreseen (estimated)"), amounts)] if amounts else []
    if budget.layers:
        total = [max(sum(x.ms[i] for x in budget.layers), 1e-12) for i in (0, 1)]
        rows = [
            (
                x.name,
                f"{x.out_channels[0]} → {x.out_channels[1]}",
                f"{x.in_channels[0]} → {x.in_channels[1]}",
                f"{x.ms[0]:.3f} → {x.ms[1]:.3f}",
                f"{100 * x.ms[1] / total[1]:.1f} %",
                "  ".join(f"{n}: {ms:.3f}" for n, ms in x.steps),
            )
            for x in budget.layers
        ]
        titles = ("layer", "writes", "reads", "ms, alone", "share", "channels written: ms (measured, all read)")
        lines.append(table(titles, rows))
    if budget.nearest:
        lines.append("The budget is foreseen to be out of reach; this is the nearest plan.")
    return [*lines, *([f"note: {budget.note}"] if budget.note else [])]


# ------------------------------------------------------------------------------------------------------------- verdict


def _has_verdict(folder: Path) -> bool:
    from paredown.records import read

    return any(r.cell.get("stage") == "verdict" for r in read(folder / "records.jsonl"))


def told(folder: Path, *, json: bool, quiet: bool) -> None:
    """The verdict of a run from its records: a table, or the document of `report --json`."""
    from paredown.records import read
    from paredown.report import report_json
    from paredown.report.reading import view

    try:
        records = read(folder / "records.jsonl")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"records.jsonl must hold one record per line. Got {type(error).__name__}: {error} in {str(folder)!r}. Was it edited?"
        raise RejectedError(msg) from error
    document = report_json(records)
    if json:
        emit(document)
    else:
        notes = (f"note: {warning}" for warning in view(records).warnings)
        show(*verdict(document), *notes, f"report: {folder / 'report.html'}", quiet=quiet)


def verdict(document: dict[str, Any]) -> list[Any]:
    """A short table out of report_json: one line per file, then what is recommended and what nobody tested."""
    from paredown.report.wording import digits, quantity, whole

    rows = document["rows"]
    dense = rows[0] if rows else None
    lines = []
    for row in rows:
        metric, latency = row["metric"], row["latency_ms"]
        lines.append(
            (
                row["stage"],
                _figure(row["bytes"], whole),
                share(row["bytes"], dense["bytes"]) if dense and row["bytes"] and dense["bytes"] else "–",
                _figure(metric["value"], partial(quantity, unit=str(metric["unit"]))),
                _figure(latency["median"], digits),
                _figure(row["parameters"], whole),
                _figure(row["macs"], whole),
            )
        )
    name = str(dense["metric"]["name"]) if dense else "metric"
    told = document["verdict"]
    met = {True: "all bounds hold", False: "a bound does not hold", None: "no bound was given"}[told["target_met"]]
    if told["recommended"] is None:  # no verdict yet: bounds may well have been given
        met = "not finished"
    titles = ("stage", "bytes", "of dense", name, "ms", "parameters", "MACs")
    return [
        table(titles, lines),
        f"recommended: {told['recommended'] or 'nothing yet'} ({met})",
        *((f"not tested: {'; '.join(told['not_tested'])}",) if told["not_tested"] else ()),
    ]


def _figure(value: float | None, say: Callable[[float], str]) -> str:
    return "not tested" if value is None else say(value)
