"""paredown init: a recipe and a task module to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from paredown.cli import options
from paredown.cli.show import show
from paredown.errors import UsageError

TEMPLATE = Path(__file__).with_name("template")
FILES = ("recipe.yaml", "task.py")


def init(
    folder: Annotated[Path, Parameter(help="Where to; made if it is not there.")] = Path(),
    /,
    *,
    quiet: options.Quiet = False,
) -> int:
    """Write recipe.yaml and task.py: a small example that runs as it is, with marks where your own model goes."""
    if folder.exists() and not folder.is_dir():
        msg = f"DIR must be a folder. Got the file {str(folder)!r}."
        raise UsageError(msg)
    there = [name for name in FILES if (folder / name).exists() or (folder / name).is_symlink()]
    if there:
        msg = f"DIR must not hold {' and '.join(there)} yet. Got {str(folder)!r}. Nothing was written; choose another folder."
        raise UsageError(msg)
    from paredown.records import write_text

    for name in FILES:
        write_text(folder / name, (TEMPLATE / name).read_text(encoding="utf-8"))
    show(*(f"wrote {folder / name}" for name in FILES), f"next: paredown compress {folder / FILES[0]}", quiet=quiet)
    return 0
