"""sweep: many models, each in a process of its own with a time and memory limit, journalled and resumable."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paredown.errors import Interrupted, UsageError
from paredown.sweep.serve import MARK

Row = Mapping[str, Any]
WORKER = "paredown.coverage.worker"
_VERSIONS = ("paredown", "torch", "torchvision", "timm")
_EXPORTERS = ("onnx", "onnxruntime", "onnxscript")
"""What a comparison of an exported file depends on besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one model may take."""

    seconds: float = 120.0
    memory_bytes: int | None = None
    """Address space of the process; None sets no limit."""


def sweep(
    models: Iterable[str],
    *,
    channels: float = 0.5,
    export: bool = False,
    limits: Limits | None = None,
    journal: Path | None = None,
    threads: int = 1,
    retry: Iterable[str] = (),
    progress: Callable[[Row, int], None] | None = None,
) -> list[Row]:
    """One row per model: captured, coupled, `channels` of every space kept, pruned and proven; in the order given.

    A row has a status: "proven", "nothing to do", "not captured", "unproven", "timeout", "killed" or "error". `journal`
    is a file of JSON lines to which every finished row is appended; a model whose row there was made with the same
    options and versions is not run again, but where its status is in `retry`.

    Raises UsageError (options) and Interrupted (Ctrl-C: finished rows are in the journal).
    """
    if not 0 < channels < 1:
        msg = f"channels must be a fraction in (0, 1): what remains of every space. Got {channels!r}."
        raise UsageError(msg)
    limits = limits if limits is not None else Limits()
    options = {"channels": channels, "export": export, "versions": _versions(_VERSIONS)}
    made = {"options": options, **({"exporters": _versions(_EXPORTERS)} if export else {})}
    again = set(retry)
    known = {r["model"]: r for r in read_lines(journal) if _is_of(r, made) and r.get("status") not in again}
    rows: list[Row] = []
    server = _Server(threads)
    try:
        for number, model in enumerate(models):
            row = known.get(model)
            if row is None:
                row = {**_run(server, model, options, limits, threads), **made}
                if journal is not None:
                    append_line(journal, row)
            rows.append(row)
            if progress is not None:
                progress(row, number)
    except KeyboardInterrupt as error:
        msg = f"stopped after {len(rows)} models. The same command with the same journal goes on."
        raise Interrupted(msg) from error
    finally:
        server.stop()
    return rows


class _Server:
    """The process that forks for every model; started with the first, and again if it does not answer."""

    def __init__(self, threads: int) -> None:
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process: subprocess.Popen[str] | None = None

    def rows(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What the server answers, up to how the fork ended."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "paredown.sweep.serve", WORKER],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace", env=self.environment,
            )  # fmt: skip
        given, answers = self.process.stdin, self.process.stdout
        assert given is not None
        assert answers is not None
        given.write(json.dumps(request) + "\n")
        given.flush()
        for line in answers:
            if line.startswith(MARK):
                row = json.loads(line[1:])
                yield row
                if "ended" in row:
                    return
        self.stop()  # it has closed its end, yet may not count as ended for a moment: the next model needs another one

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def _run(server: _Server, model: str, options: Mapping[str, Any], limits: Limits, threads: int) -> dict[str, Any]:
    asked = {"model": model, "channels": options["channels"], "export": options["export"], "threads": threads}
    request = {"request": {"asked": asked, "memory_bytes": limits.memory_bytes}, "seconds": limits.seconds}
    row: dict[str, Any] = {}
    end: dict[str, Any] = {"ended": None, "stopped": "", "tail": ["the process that starts others ended"]}
    for answer in server.rows(request):
        if "ended" in answer:
            end = answer
        else:
            row = answer
    if row.pop("done", False):
        return row
    if end["stopped"]:
        return _ended(row | {"model": model, "seconds": limits.seconds}, "timeout", f"not done in {limits.seconds:g} s")
    return _ended(row | {"model": model}, "killed", f"exit {end['ended']}: {''.join(end['tail'][-1:])[:300]}")


def _ended(row: dict[str, Any], status: str, message: str) -> dict[str, Any]:
    """A row whose process was stopped: one that was proven before stays so, only its export was not done."""
    if row.get("status") == "proven":
        return row | {"parity": {"message": f"{status}: {message}"}}
    return row | {"status": status, "message": message}


def _is_of(row: Row, made: Mapping[str, Any]) -> bool:
    """Whether a row was made so; by which exporter matters only where one was tried."""
    exported = made["options"]["export"] and "parity" in row
    return row.get("options") == made["options"] and (not exported or row.get("exporters") == made["exporters"])


def _versions(names: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def read_lines(journal: Path | None) -> Iterator[dict[str, Any]]:
    """The objects with a model in a file of JSON lines; none where there is no file. A torn line is left out."""
    if journal is None or not journal.is_file():
        return
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line that was being written when the machine stopped
        if isinstance(row, dict) and "model" in row:
            yield row


def append_line(journal: Path, row: Mapping[str, Any]) -> None:
    """One JSON line, on the disk when this returns."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    torn = journal.is_file() and journal.read_bytes()[-1:] not in (b"", b"\n")  # a line cut short when it stopped
    with journal.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
