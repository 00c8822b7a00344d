"""What commands print: tables and one JSON document on stdout; progress, notes and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def plain(text: object) -> str:
    """Text with control characters shown instead of sent: names come from files of strangers.

    >>> plain("layer\\x1b[31m")
    'layer\\\\x1b[31m'
    """
    return "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in str(text))


def say(text: str, *, quiet: bool = False) -> None:
    """A line on stderr: progress and notes."""
    if not quiet:
        print(plain(text), file=sys.stderr)


def emit(document: Mapping[str, Any]) -> None:
    """The one JSON document of --json. ASCII, so that any pipe takes it."""
    print(json.dumps(document, indent=1, allow_nan=False))


@contextmanager
def only_document(wanted: bool) -> Iterator[None]:
    """With --json, whatever the user's own code prints goes to stderr: stdout is for one document.

    It works on the file descriptor, so it holds for C libraries and child processes too.
    """
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept, python = os.dup(1), sys.stdout
    try:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = python
        os.dup2(kept, 1)
        os.close(kept)


def show(*things: Any, quiet: bool = False) -> None:
    """Tables and texts on stdout."""
    if quiet:
        return
    from rich.console import Console

    console = Console(highlight=False)
    for thing in things:
        if isinstance(thing, str):
            print(plain(thing))  # as one line: a path that is folded cannot be copied
            continue
        with console.capture() as drawn:  # rich would end the process where the reader of a pipe goes away
            console.print(thing, markup=False)
        sys.stdout.write(drawn.get())


def columns() -> int:
    """Width of the terminal, or COLUMNS, or 80."""
    import shutil

    return max(20, shutil.get_terminal_size().columns)


def table(titles: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> Any:
    """A table without frame; the first `left` columns are texts, the others numbers."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, title in enumerate(titles):
        made.add_column(title, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(plain(cell)) for cell in row))
    return made


def share(after: float, before: float) -> str:
    """What remains, in percent.

    >>> share(25, 100)
    '25.0 %'
    """
    return f"{100 * after / before:.1f} %" if before else "–"


def plan_table(coupling: Any, cost: Any, plan: Any) -> Any:
    """What a plan removes, space by space, and what remains in all (counted exactly, not measured)."""
    from rich.console import Group

    from paredown.allocate import predict

    parameters, macs = predict(coupling, cost, plan)
    rows = []
    for space in coupling.spaces:
        before, after = len(space), units_left(space, plan)
        rows.append((space.name, space.kind, before, after, share(after, before)))
    totals = [
        ("parameters", f"{cost.parameters:,}", f"{parameters:,}", share(parameters, cost.parameters)),
        ("MACs", f"{cost.macs:,}", f"{macs:,}", share(macs, cost.macs)),
    ]
    lines = [
        table(("space", "unit", "before", "after", "remains"), rows, left=2),
        table(("", "before", "after", "remains"), totals),
    ]
    blocked = plan.made_by.get("blocked_by")
    if blocked:
        lines.append(_text(f"nearest reachable: {blocked}"))
    if plan.made_by.get("include") and plan.made_by.get("exclude"):
        lines.append(_text(plan.made_by["precedence"]))
    return Group(*lines)


def _text(words: object) -> Any:
    from rich.text import Text

    return Text(plain(words), overflow="fold")


def units_left(space: Any, plan: Any) -> int:
    """Units of a space that a plan keeps."""
    first = space.footprints[0]
    kept = plan.keep.get(first.parameter, {}).get(first.axis)
    if kept is None:
        return len(space)
    alive = set(kept)
    return sum(int(row[0]) in alive for row in first.indices)
