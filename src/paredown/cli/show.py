"""What commands print: tables and one JSON document on stdout; progress, notes and errors on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

NARROW = 60
"""Columns of a terminal below which a table may not fit."""


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


EMITTED: ContextVar[bool] = ContextVar("EMITTED", default=False)
"""Whether this command has written its document: where it then fails, stdout gets no second one."""


def emit(document: Mapping[str, Any]) -> None:
    """The one JSON document of --json. ASCII, so that any pipe takes it."""
    print(json.dumps(document, indent=1, allow_nan=False))
    EMITTED.set(True)


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
    """A table without frame; the first `left` columns are texts, the others numbers. Where a narrow terminal would break its words: a row as lines."""
    from rich.table import Table
    from rich.text import Text

    cells = [[plain(cell) for cell in row] for row in rows]
    if columns() < NARROW and _widest_words(titles, cells) > columns():
        lines = [
            [row[0], *(f"  {t}: {c}" if t else f"  {c}" for t, c in zip(titles[1:], row[1:], strict=True))]
            for row in cells
        ]
        return Text("\n".join(line for row in lines for line in row), overflow="fold")
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, title in enumerate(titles):
        made.add_column(title, justify="left" if number < left else "right", overflow="fold")
    for row in cells:
        made.add_row(*(Text(cell) for cell in row))
    return made


def _widest_words(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    """Columns that a table takes at least, if no word of it is to be broken."""
    return sum(
        2 + max(len(w) for cell in column for w in (*cell.split(), "")) for column in zip(titles, *cells, strict=True)
    )


def share(after: float, before: float) -> str:
    """What remains, in percent.

    >>> share(25, 100)
    '25.0 %'
    """
    return f"{100 * after / before:.1f} %" if before else "–"


def plan_table(coupling: Any, cost: Any, plan: Any) -> Any:
    """What a plan leaves, space by space or weight by weight, and what remains in all (counted exactly, not measured)."""
    from rich.console import Group

    parameters, macs = counts_after(coupling, cost, plan)
    totals = [
        ("parameters", f"{cost.parameters:,}", f"{parameters:,}", share(parameters, cost.parameters)),
        ("MACs", f"{cost.macs:,}", f"{macs:,}", share(macs, cost.macs)),
    ]
    lines = []
    if plan.keep or not (plan.masks or plan.ranks or plan.drop_modules):
        rows = [(s.name, s.kind, len(s), n, share(n, len(s))) for s in coupling.spaces for n in [units_left(s, plan)]]
        lines.append(table(("space", "unit", "before", "after", "remains"), rows, left=2))
    if plan.masks:
        lines.append(_masks_table(plan.masks))
        totals += _skipped(coupling, cost, plan)
    if plan.ranks:
        chains = [(n, r.method, " × ".join(map(str, r.ranks))) for n, r in plan.ranks.items()]
        lines.append(table(("weight", "method", "ranks"), chains, left=2))
    if plan.drop_modules:
        lines.append(table(("left out",), [(name,) for name in plan.drop_modules]))
    lines.append(table(("", "before", "after", "remains"), totals))
    blocked = plan.made_by.get("blocked_by")
    if blocked:
        lines.append(_text(f"nearest reachable: {blocked}"))
    if plan.made_by.get("include") and plan.made_by.get("exclude"):
        lines.append(_text(plan.made_by["precedence"]))
    return Group(*lines)


def beside(folder: Path, what: str) -> list[str]:
    """Which runs' reports would take in `what` a folder holds."""
    from paredown.report.beside import runs_to_write

    return [
        f"beside it: `paredown report {min(str(p), os.path.relpath(p), key=len)}` puts {what} into the report of that run"
        for p in runs_to_write(folder)
    ]


def counts_after(coupling: Any, cost: Any, plan: Any) -> tuple[int, int]:
    """Parameters and MACs that a dense runtime stores and executes after a plan."""
    from paredown.allocate import predict

    if plan.ranks or plan.drop_modules:
        reached = plan.made_by["reached"]
        return reached["parameters"], reached["macs"]
    return predict(coupling, cost, plan)


def _masks_table(masks: Any) -> Any:
    sizes = [(n, m.granularity, m.kept.size, m.num_kept) for n, m in masks.items()]
    rows = [(n, cut, f"{size:,}", f"{kept:,}", share(kept, size)) for n, cut, size, kept in sizes]
    return table(("weight", "mask", "before", "not zero", "remains"), rows, left=2)


def _skipped(coupling: Any, cost: Any, plan: Any) -> list[tuple[str, str, str, str]]:
    """What only a runtime that skips zeros would gain."""
    from paredown.allocate import foresee

    if plan.keep:  # masks of what channels leave
        return []
    seen = foresee(coupling, cost, plan)
    left, macs = seen.nonzero_parameters, seen.effective_macs
    return [
        ("parameters that are not zero (simulated)", f"{cost.parameters:,}", f"{left:,}", share(left, cost.parameters)),
        ("effective MACs (estimated)", f"{cost.macs:,}", f"{macs:,}", share(macs, cost.macs)),
    ]


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
