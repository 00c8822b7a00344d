"""paredown sensitivity: which layers bear being cut or rounded, and which do not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.compress import safe_name
from paredown.cli.show import beside, emit, only_document, show, table
from paredown.errors import UsageError


def sensitivity(
    recipe: Annotated[str, Parameter(help='An embedded recipe ("digits", "cifar10") or the path of a .yaml file.')],
    /,
    *,
    out: Annotated[Path | None, Parameter(help="Folder; default: runs/NAME-sensitivity of the recipe.")] = None,
    amounts: Annotated[
        str, Parameter(help="What remains of a space, by commas; none leaves spaces out.")
    ] = "0.75,0.5,0.25,0.1",
    bits: Annotated[str, Parameter(help="Bits of a layer's weight, by commas; none leaves layers out.")] = "8,6,4,3,2",
    distance: Annotated[
        Literal["kl", "mse"] | None,
        Parameter(help="How far outputs move; default: kl where the recipe distils class scores, else mse."),
    ] = None,
    set_: options.Set = (),
    weights: options.OtherWeights = None,
    device: options.Device = None,
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """What every space at several amounts and every layer at several bits costs by itself; heat map, ranking, how stable."""
    from paredown.recipe import load_recipe

    own = {"weights": weights, "device": device, "threads": threads}
    made = load_recipe(recipe, [*set_, *(f"{key}={value}" for key, value in own.items() if value is not None)])
    folder = out if out is not None else Path("runs") / f"{safe_name(made.name)}-sensitivity"
    shares, widths = _numbers(amounts, float, "--amounts"), _numbers(bits, int, "--bits")
    from paredown.pipeline.sensitivity import sensitivity as run

    with only_document(json):
        found = run(made, out=folder, amounts=shares, bits=widths, distance=distance, overwrite=overwrite, quiet=quiet)
    if json:
        emit(dict(found.document))
    else:
        show(
            *told(dict(found.document)),
            f"report: {folder / 'report.html'}",
            *beside(folder, "this sensitivity"),
            quiet=quiet,
        )
    return 0


def _numbers(text: str, kind: type[int] | type[float], option: str) -> tuple[Any, ...]:
    """Numbers of one kind by commas; none of "none"."""
    if text.strip() == "none":
        return ()
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        example = "0.75,0.5" if kind is float else "8,4"
        msg = f"{option} must be numbers by commas, as {example}, or none. Got {text!r}."
        raise UsageError(msg) from error


def told(document: dict[str, Any]) -> list[Any]:
    """A table of spaces, one of layers, and the verdict."""
    from paredown.report.sensitivity_document import SAMPLES

    metric = document["metric"]
    shown: list[Any] = []
    for kind, first in (("units", "space"), ("bits", "weight")):
        found = document[kind]
        if found is None:
            continue
        rows = {row["name"]: row for row in found["rows"]}
        columns = [f"{100 - c:g} % out" if kind == "units" else f"{c} bits" for c in found["columns"]]
        head = (f"{first}, least hurt first", *columns, "mean distance", "rank, 95 %")
        missing = [name for name in rows if name not in found["order"]]
        lines = [_line(rows[name], found["columns"], metric) for name in (*found["order"], *missing)]
        shown.append(table(head, lines))
    unit = "" if metric is None else "points" if metric["unit"] == "%" else metric["unit"]
    loss = "" if metric is None else f"loss of {metric['name']}" + (f" in {unit}" if unit else "")
    what = loss or f"output distance ({document['distance']['name']})"
    return [
        *shown,
        f"cells: {what}, on {document['num_samples']:,} {SAMPLES.get(str(document['data']), 'samples')}",
        *(t["sentence"] for t in document["together"]),
        f"verdict: {document['verdict']}",
    ]


def _line(row: dict[str, Any], columns: list[Any], metric: Any) -> tuple[str, ...]:
    at = {p["at"]: p["distance" if metric is None else "metric_loss"] for p in row["points"]}
    cells = ["–" if c not in at else "not tested" if at[c] is None else f"{at[c]:.3g}" for c in columns]
    spread = "not tested" if row["rank_low"] is None else f"{row['rank_low']:.0f} to {row['rank_high']:.0f}"
    mean = "not tested" if row["mean_distance"] is None else f"{row['mean_distance']:.3g}"
    return (row["name"], *cells, mean, spread)
