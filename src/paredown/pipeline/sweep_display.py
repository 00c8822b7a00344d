"""What a person sees while a sweep runs: how many trials are through and what each process is at; plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from paredown.sweep.trials import Event


class Shown:
    """One bar for all trials, and below it a line per trial that runs."""

    def __init__(self, total: int, progress: Progress | None, console: Console) -> None:
        self._total, self._progress, self._console = total, progress, console
        self._through = 0
        self._began: dict[str, float] = {}
        self._lines: dict[str, TaskID] = {}
        self._all = None if progress is None else progress.add_task("trials", total=total)

    def there(self, done: int, failed: int) -> None:
        """What an earlier run left."""
        self._through = done + failed
        marked = f", {failed} marked as failed (--retry runs them again)" if failed else ""
        self._console.print(f"{done} of {self._total} trials are there{marked}", highlight=False)
        self._advance()

    def also(self, what: str) -> None:
        """What follows on the grid, with how many trials it has."""
        self._console.print(f"{what}: {self._total} more trial{'s' * (self._total != 1)}", highlight=False)

    def other(self, count: int, differ: Mapping[str, tuple[Any, Any]]) -> None:
        """What an earlier run left that other versions made; `differ` is {name: (version there, version here)}."""
        names = ", ".join(f"{name} {there} there, {here} here" for name, (there, here) in differ.items())
        line = (
            f"{count} of {self._total} trials were made with other versions ({names}) and run again; "
            "with those versions the same command would find them"
        )
        self._console.print(line, highlight=False, markup=False)

    def event(self, event: Event) -> None:
        """A trial begins, goes on or ends."""
        name, key = event.cell.name, event.cell.digest
        if event.what == "begins":
            self._began[key] = time.monotonic()
            if self._progress is not None:
                self._lines[key] = self._progress.add_task(name, total=None)
        elif event.what == "goes on" and self._progress is not None and key in self._lines:
            told = event.told
            what = str(told.get("training", told.get("say", "")))
            self._progress.update(
                self._lines[key], description=f"{name}: {what}", completed=told.get("done", 0), total=told.get("of")
            )
        elif event.what == "ends" and event.outcome is not None:
            self._through += 1
            if self._progress is not None and key in self._lines:
                self._progress.remove_task(self._lines.pop(key))
            took = f" in {time.monotonic() - self._began.pop(key):.1f} s" if key in self._began else ""
            why = f": {event.outcome.reason}" if event.outcome.reason else ""
            line = f"{self._through}/{self._total}  {name}: {event.outcome.status}{took}{why}"
            self._console.print(line, highlight=False, markup=False)
            self._advance()

    def _advance(self) -> None:
        if self._progress is not None and self._all is not None:
            self._progress.update(self._all, completed=self._through)


@contextmanager
def sweep_display(total: int, *, quiet: bool = False) -> Iterator[Shown]:
    """A display on stderr; `quiet` prints nothing."""
    console = Console(stderr=True, quiet=quiet, soft_wrap=True)
    if quiet or not sys.stderr.isatty():
        yield Shown(total, None, console)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Shown(total, progress, console)
