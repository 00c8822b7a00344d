"""What a person sees while a run works: stages and training steps on stderr; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Display:
    """Stages one under the other, with a bar while something trains."""

    def __init__(self, progress: Progress | None, console: Console) -> None:
        self._progress, self._console = progress, console
        self._bars: dict[str, Any] = {}
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """A stage begins."""
        self._console.print(f"[dim]{time.monotonic() - self._start:6.1f} s[/dim]  {text}", highlight=False)

    def training(self, name: str, state: Any) -> None:
        """A training step is done; `state` is train.Progress."""
        if self._progress is None:
            return
        total = state.epochs * state.steps
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total)
        loss = f"loss {state.loss:.3g}" if state.loss is not None else ""
        done = min(total, state.epoch * state.steps + state.step)
        self._progress.update(self._bars[name], completed=done, total=total, description=f"{name} {loss}")
        if done >= total:
            self._progress.remove_task(self._bars.pop(name))

    def measuring(self, done: int, total: int, name: str) -> None:
        """A point of many is measured."""
        if self._progress is None:
            return
        if "points" not in self._bars:
            self._bars["points"] = self._progress.add_task("points", total=total)
        self._progress.update(self._bars["points"], completed=done, total=total, description=escape(name[-40:]))


@contextmanager
def display(*, quiet: bool = False) -> Iterator[Display]:
    """A display on stderr; `quiet` prints nothing."""
    console = Console(stderr=True, quiet=quiet, soft_wrap=True)
    if quiet or not sys.stderr.isatty():
        yield Display(None, console)
        return
    columns = (TextColumn("          {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Display(progress, console)
