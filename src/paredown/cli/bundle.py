"""paredown bundle: a folder to carry to a phone or board, whose results `paredown measure --import` reads back."""

from __future__ import annotations

import json as text
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.measure import file_batches
from paredown.cli.show import emit, only_document, show, table
from paredown.cli.sources import arrays
from paredown.errors import RejectedError, UsageError

MOST_BYTES = 2**20


def bundle(
    what: Annotated[Path, Parameter(help="A model file (.onnx, .xml), or the folder of a run: its recommended file.")],
    /,
    *,
    samples: Annotated[
        Path, Parameter(help=".npz or .npy of inputs, samples along the first axis; they travel with it.")
    ],
    out: Annotated[Path, Parameter(help="The folder to write.")],
    golden: Annotated[int, Parameter(help="Samples that are kept with their outputs.")] = 8,
    max_error: Annotated[
        float | None, Parameter(help="Largest error of an output on the device, in parts of the largest golden value.")
    ] = None,
    cosine: Annotated[float | None, Parameter(help="Instead: smallest cosine of an output to the golden one.")] = None,
    preprocessing: Annotated[
        Path | None, Parameter(help="A JSON file that says how inputs are made from raw data; it travels as it is.")
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Write a folder that runs a model on a phone or board over adb, ssh or there, with golden outputs to hold it to."""
    with only_document(json):
        from paredown.measure import Tolerance, artifact_at
        from paredown.measure import bundle as make

        file, said, seen = _model_of(what)
        given = said if preprocessing is None else _document(preprocessing)
        artifact = artifact_at(file)
        if max_error is None and cosine is None:
            cosine, because = _excused(seen, artifact.scheme)
        else:
            because = ""
        limit = None if max_error is None and cosine is None else Tolerance(max_error_of_scale=max_error, cosine=cosine)
        made = make(
            artifact,
            file_batches(arrays(samples, "--samples"), artifact),
            out=out,
            num_golden=golden,
            tolerance=limit,
            preprocessing=given,
            overwrite=overwrite,
        )
        because = because or made.manifest.get("tolerance_because", "")
    if json:
        emit(
            {
                "schema": 1,
                "out": str(out),
                "source": str(file),
                "model": dict(made.files),
                "runtime": made.runtime,
                "scheme": made.scheme,
                "golden": made.num_golden,
                "tolerance": made.manifest["tolerance"],
                "tolerance_because": because,
                "preprocessing": made.manifest["preprocessing"],
                "bytes": made.size_bytes,
            }
        )
        return 0
    rule = ", ".join(f"{k} {v:g}" for k, v in made.manifest["tolerance"].items())
    rows = [
        ("model", f"{file} ({made.scheme}, {made.runtime})"),
        ("golden samples", f"{made.num_golden}, inputs included"),
        ("tolerance", f"{rule} ({because})" if because else rule),
        ("preprocessing", "not given" if made.manifest["preprocessing"] == "not given" else "given"),
        ("bytes", f"{made.size_bytes:,} (measured)"),
    ]
    show(table(("", str(out)), rows, left=2), *_next_steps(out, made), quiet=quiet)
    return 0


def _next_steps(out: Path, made: Any) -> list[str]:
    program = made.manifest["program"]
    phone = f"{out}/run_adb.sh PATH/TO/{program} [SERIAL]" if program else "over adb: no benchmark program is known"
    return [
        f"on this machine: {out}/run_local.sh",
        f"over ssh: {out}/run_ssh.sh HOST",
        f"on an Android phone: {phone}",
        f"then: paredown measure {out} --import {out}/results.json",
    ]


def _excused(cosine: float | None, scheme: str) -> tuple[float | None, str]:
    """A smaller cosine for the device, and why, where the run's check excused its file for a network that amplifies rounding."""
    from paredown.export.conditioning import cosine_between_runtimes
    from paredown.measure.bundle import default_tolerance

    usual = default_tolerance(scheme).cosine
    if cosine is None or usual is None or cosine >= usual:
        return None, ""
    return cosine_between_runtimes(cosine), f"not {usual:g}: this file is at {cosine:.6f} of its own simulation"


def _model_of(what: Path) -> tuple[Path, str | None, float | None]:
    """The file to bundle; what the run says of its inputs, and its cosine to the simulation."""
    if not what.is_dir():
        if not what.is_file():
            msg = (
                f"what to bundle must be a model file or the folder of a run. Got {str(what)!r}, which does not exist."
            )
            raise RejectedError(msg)
        return what, None, None
    from paredown.report import read_run
    from paredown.report.reading import entry, mapping, number
    from paredown.report.reading import text as plain

    run = read_run(what)
    best = run.stage(run.recommended)
    file = what / plain(entry(best, "file")) if best is not None and entry(best, "file") else None
    if file is None or not file.is_file():
        msg = f"the run must name a recommended file that is there. Got {str(what)!r} with {run.recommended or 'no verdict'}. Give the file itself."
        raise UsageError(msg)
    said = plain(entry(run.verdict, "normalisation"), 2000) or None
    return file, said, number(mapping(entry(best, "check")).get("cosine"))


def _document(path: Path) -> Any:
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        msg = f"--preprocessing must be a JSON file of at most {MOST_BYTES:,} bytes. Got {str(path)!r}."
        raise UsageError(msg)
    try:
        return text.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        msg = f"--preprocessing must be a JSON file. Got {type(error).__name__} at {str(path)!r}: {error}."
        raise RejectedError(msg) from error
