"""paredown curve: many amounts, methods, schedules and seeds from one recipe, and where the sweet spot is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.compress import safe_name
from paredown.cli.show import beside, emit, only_document, show, table
from paredown.report.wording import interval, quantity

if TYPE_CHECKING:
    from paredown.recipe import Recipe


def curve(
    recipe: Annotated[
        str, Parameter(help="The path of a .yaml file with a section `curve`, or an embedded recipe and --set.")
    ],
    /,
    *,
    out: Annotated[Path | None, Parameter(help="Folder of the sweep; default: runs/NAME-curve of the recipe.")] = None,
    processes: Annotated[
        int | None, Parameter(help="Trials at a time; default: cores / threads, one where latency is timed.")
    ] = None,
    ray: Annotated[
        str | None, Parameter(help="Run the trials on this Ray cluster: auto (the one of this machine) or HOST:PORT.")
    ] = None,
    retry: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="Run trials again that crashed, hit a limit or have no quantized file.",
        ),
    ] = False,
    set_: options.Set = (),
    device: options.Device = None,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Amounts × methods × schedules × seeds with dense controls: the curve, its sweet spot, and whether pruning paid."""
    from paredown.recipe import load_recipe

    made = load_recipe(recipe, [*set_, *([f"device={device}"] if device is not None else [])])
    folder = out if out is not None else Path("runs") / f"{safe_name(made.name)}-curve"
    if dry_run:
        return _dry_run(made, processes, ray, json=json, quiet=quiet)
    from paredown.pipeline.curves import curve as run

    with only_document(json):
        found = run(made, out=folder, overwrite=overwrite, quiet=quiet, processes=processes, retry=retry, ray=ray)
    if json:
        emit(dict(found.document))
    else:
        show(
            *told(dict(found.document)), f"report: {folder / 'report.html'}", *beside(folder, "this curve"), quiet=quiet
        )
    return 0


def _dry_run(recipe: Recipe, processes: int | None, ray: str | None, *, json: bool, quiet: bool) -> int:
    """The grid as a table; nothing is trained or written."""
    from paredown.pipeline.compress import task_of
    from paredown.pipeline.curves import check_cells, machine_for
    from paredown.sweep import grid
    from paredown.sweep.ray import MANY

    with only_document(json):
        cells = grid(recipe)
        later = () if recipe.curve is None else recipe.curve.controls.at_sweet_spot
        check_cells(cells, task_of(recipe)[0], later=later)
        machine = machine_for(recipe, processes, ray=ray)
    if json:
        rows = [{**c.told(), "name": c.name} for c in cells]
        emit(
            {
                "schema": 1,
                "dry_run": True,
                "cells": rows,
                "at_sweet_spot": [*later],
                "processes": machine.processes,
                "threads": machine.threads,
            }
        )
        return 0
    at_once = "as many as the cluster has cores for" if machine.processes == MANY else machine.processes
    counts: dict[tuple[str, str, str], int] = {}
    seeds = {c.seed for c in cells}
    for cell in cells:
        key = (cell.kind, cell.method, cell.schedule if cell.kind in ("pruned", "from-scratch") else "")
        counts[key] = counts.get(key, 0) + 1
    show(
        table(("kind", "method", "schedule", "trials"), [(*key, str(n)) for key, n in counts.items()]),
        f"{len(cells)} trials, {at_once} at a time, {machine.threads} thread(s) each.",
        *(
            [f"What is chosen gets those of {', '.join(later)} that it has not: up to {len(later) * len(seeds)} more."]
            if later
            else []
        ),
        "Dry run: nothing was trained or written.",
        quiet=quiet,
    )
    return 0


def told(document: dict[str, Any]) -> list[Any]:
    """The lines as a table, then what was chosen and the dense verdict."""
    unit = document["metric"]["unit"]
    rows: list[tuple[str, ...]] = []
    dense = set()
    for line in document["lines"]:
        for point in line["points"]:
            if point["kind"] == "base" and line["codes"] in dense:
                continue
            dense |= {line["codes"]} if point["kind"] == "base" else set()
            removed = point["removed"].get(document["axis"])
            name = f"dense{', ' + line['codes'] if line['codes'] else ''}" if point["kind"] == "base" else line["name"]
            rows.append(
                (
                    name,
                    "–" if point["amount"] is None else f"{point['amount']:g}",
                    "not tested" if removed is None else f"{removed:.1f} %".replace("-", "−"),
                    _figure(point["held_out"], unit),
                    _figure(point["test"], unit),
                    str(len(point["seeds"])) + (f" ({len(point['failed'])} failed)" if point["failed"] else ""),
                )
            )
    name = document["metric"]["name"]
    titles = ("line", "remains", f"{document['axis']} removed", f"{name}, held out", f"{name}, test", "seeds")
    trials = document["trials"]
    failed = (
        (f"{trials['failed']} of {trials['cells']} trials have no result: see the report.",) if trials["failed"] else ()
    )
    return [
        table(titles, rows),
        f"sweet spot: {document['sweet_spot']['sentence']}",
        f"dense verdict: {document['dense_verdict']}",
        *failed,
    ]


def _figure(found: dict[str, Any] | None, unit: str) -> str:
    if found is None:
        return "not tested"
    spread = "" if found["low"] is None else f" ({interval(found['low'], found['high'], unit)})"
    return f"{quantity(found['mean'], unit)}{spread}"
