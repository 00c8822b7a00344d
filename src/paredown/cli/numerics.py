"""paredown numerics: what casts, mappings, bits and granularity cost, on one page; of a model, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.quantize import check_out_file
from paredown.cli.samples import RANDOM_SAMPLES, as_batches, random_batches
from paredown.cli.show import emit, only_document, say, show, table
from paredown.cli.sources import arrays, loaded
from paredown.errors import UsageError

if TYPE_CHECKING:
    from paredown.cli.sources import Loaded


def numerics(
    model: Annotated[
        str | None, Parameter(help="As for the other commands; without it the page has examples only.")
    ] = None,
    /,
    *,
    input: options.OptionalInput = None,
    out: Annotated[Path | None, Parameter(name="--out", help="The page to write, as page.html.")] = None,
    calibrate: Annotated[
        str | None,
        Parameter(help=".npz or .npy of inputs, for the activations; or the word random. Without it: weights only."),
    ] = None,
    observer: Annotated[
        Literal["mse", "minmax", "moving-average", "percentile", "entropy"],
        Parameter(help="How the range of an activation is chosen."),
    ] = "mse",
    weights: options.Weights = None,
    strip_prefix: options.StripPrefix = None,
    pruned: options.From = None,
    threads: options.Threads = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """What quantization costs, as a page: casts, mapping, granularity, bits, and the noise in every layer of a model."""
    _refuse(model, out, {"--input": input, "--calibrate": calibrate, "--weights": weights, "--pruned": pruned}, json)
    if out is not None:
        check_out_file(out, {"weights": weights, "calibration": calibrate}, overwrite=overwrite)
    read = None if calibrate in (None, "random") else arrays(Path(str(calibrate)), "--calibrate")
    with only_document(json):
        found = None
        if model is not None:
            found = loaded(
                model,
                str(input),
                weights=weights,
                strip_prefix=strip_prefix,
                pruned=pruned,
                train=False,
                threads=threads,
                device=device,
            )
        say("measuring the noise", quiet=quiet or json)
        facts = _measured(found, calibrate, read, observer)
        if out is not None:
            from paredown.report.numerics import write_numerics

            write_numerics(facts, out)
            say(f"wrote {out}", quiet=quiet or json)
    if json:
        emit(facts)
    else:
        show(*_tables(facts), quiet=quiet)
    return 0


def _refuse(model: str | None, out: Path | None, of_model: dict[str, Any], json: bool) -> None:
    """Options that have nothing to work on."""
    if out is None and not json:
        msg = "numerics must be given --out page.html, or --json for the numbers. Got neither."
        raise UsageError(msg)
    given = [name for name, value in of_model.items() if value is not None]
    if model is None and given:
        msg = f"{', '.join(given)} must go with a MODEL. Got none."
        raise UsageError(msg)
    if model is not None and of_model["--input"] is None:
        msg = f"numerics must be given --input with a model, as --input 1x3x224x224. Got none with {model!r}."
        raise UsageError(msg)


def _measured(
    found: Loaded | None, calibrate: str | None, read: dict[str, Any] | None, observer: str
) -> dict[str, Any]:
    """The facts, with what a person must know of the model and its samples."""
    from paredown.quantize.facts import numerics_facts

    if found is None:
        return numerics_facts()
    batches = None if read is None else as_batches(read, found.program, "--calibrate")
    if calibrate == "random":
        batches = random_batches(found.program)
    facts = numerics_facts(found.program, batches, name=found.name, observer=observer)
    notes = [*((RANDOM_SAMPLES,) if calibrate == "random" else ()), *found.notes]
    facts["model"] |= {"weights": found.weights, "notes": notes}
    return facts


def _tables(facts: dict[str, Any]) -> list[Any]:
    """π in five types and, of a model, the layers that lose most."""
    rows = [
        (r["kind"], r["bits"], f"{r['kept']:.10g}", f"{100 * r['relative_error']:.3g} %")
        for r in facts["casts"]["rows"]
    ]
    tables = [table(("π as", "bits", "keeps", "off by"), rows)]
    model = facts["model"]
    if model is not None:
        layers = [(one, one["weight"]["channel"]) for one in model["layers"]]
        layers.sort(key=lambda pair: pair[1]["8"] if pair[1]["8"] is not None else float("inf"))
        shown = [
            (
                one["name"],
                one["kind"],
                *(_db(of[b]) for b in ("8", "4")),
                _db((one["activation"] or {}).get("tensor", {}).get("8")),
            )
            for one, of in layers[:10]
        ]
        heads = ("lowest SQNR, dB", "op", "weight, 8 bits", "weight, 4 bits", "input, 8 bits")
        tables += [table(heads, shown, left=2), *(f"note: {n}" for n in model["notes"])]
    return tables


def _db(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
