"""paredown report: the report of a run, again, from its records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.compress import told
from paredown.cli.sources import existing_folder
from paredown.errors import UsageError


def report(
    folder: Annotated[Path, Parameter(help="The folder of a run.")],
    /,
    *,
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
    if not json:
        from paredown.report import write_report

        write_report(folder)
    told(folder, json=json, quiet=quiet)
    return 0
