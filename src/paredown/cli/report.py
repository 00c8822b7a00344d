"""paredown report: the report of a run, again, from its records alone."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.compress import told
from paredown.cli.curve import told as told_curve
from paredown.cli.sensitivity import told as told_sensitivity
from paredown.cli.show import emit, show
from paredown.cli.sources import existing_folder
from paredown.errors import UsageError


def report(
    folder: Annotated[Path, Parameter(help="The folder of a run.")],
    /,
    *,
    tensorboard: Annotated[
        Path | None, Parameter(help="Write the records as event files of TensorBoard into this folder, too.")
    ] = None,
    mlflow: Annotated[
        str | None,
        Parameter(help="Make an MLflow run of each record at this URI, too: sqlite:///FILE.db, http://HOST."),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Write report.html of a run from records.jsonl alone, and print the verdict."""
    existing_folder(folder, "DIR")
    if not (folder / "records.jsonl").is_file():
        near = sorted(str(p.parent) for p in folder.glob("*/records.jsonl"))[:5]
        hint = f" Runs in it: {', '.join(near)}." if near else ""
        msg = f"DIR must be the folder of a run, with records.jsonl. Got {str(folder)!r}.{hint}"
        raise UsageError(msg)
    from paredown.report import write_report
    from paredown.report.curve_document import curve_document
    from paredown.report.curve_view import is_curve
    from paredown.report.page import read_records
    from paredown.report.sensitivity_document import is_sensitivity, sensitivity_document

    if not json:
        write_report(folder)
    records = read_records(folder)
    if is_curve(records):
        document, lines = curve_document(records), told_curve
    elif is_sensitivity(records):
        document, lines = sensitivity_document(records), told_sensitivity
    else:
        told(folder, json=json, quiet=quiet)
        return _tracked(folder, tensorboard, mlflow, quiet=quiet or json)
    if json:
        emit(document)
    else:
        show(*lines(document), f"report: {folder / 'report.html'}", quiet=quiet)
    return _tracked(folder, tensorboard, mlflow, quiet=quiet or json)


def _tracked(folder: Path, tensorboard: Path | None, mlflow: str | None, *, quiet: bool) -> int:
    """The records told to the trackers that were asked for."""
    from paredown.report.trackers import to_mlflow, to_tensorboard

    if tensorboard is not None:
        files = to_tensorboard(folder, tensorboard)
        show(f"TensorBoard: {len(files)} records, tensorboard --logdir {tensorboard}", quiet=quiet)
    if mlflow is not None:
        with redirect_stdout(io.StringIO() if quiet else sys.stderr):  # MLflow prints a URL for every run
            new = to_mlflow(folder, mlflow)
        show(f"MLflow: {len(new)} new runs at {mlflow}", quiet=quiet)
    return 0
