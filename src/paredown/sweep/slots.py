"""Slots: servers of trials (`serve`) as the process that asks them has them, kept from one sweep to the next where that is asked for."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paredown.sweep.grid import Cell
from paredown.sweep.serve import MARK
from paredown.sweep.trials import Machine

PATIENCE_S = 5.0
"""How long servers that were told to end are waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """All that a server begins with: another sweep may ask it where its own would begin with the same."""

    worker: str
    folder: str
    shared: Mapping[str, str]
    """Variables of the environment, without the GPU, which differs from slot to slot."""
    gpu: Mapping[str, str]

    @classmethod
    def of(cls, machine: Machine, number: int) -> Start:
        """Of the server with that number."""
        gpu = {"CUDA_VISIBLE_DEVICES": machine.gpus[number % len(machine.gpus)]} if machine.gpus else {}
        shared = {
            **os.environ, "OMP_NUM_THREADS": str(machine.threads),
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whoever asks for a GPU before the fork would leave none to the trials
        }  # fmt: skip
        return cls(worker=machine.worker, folder=str(Path.cwd()), shared=shared, gpu=gpu)

    def is_beside(self, other: Start) -> bool:
        """Whether slots of one sweep begin like these two."""
        return (self.worker, self.folder, self.shared) == (other.worker, other.folder, other.shared)


class Slot:
    """A server, and the cell it is at work on."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.number = number
        self.start = Start.of(machine, number)
        self.cell: Cell | None = None
        self.began = 0.0
        self.heard = b""
        self.is_busy = False
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paredown.sweep.serve", machine.worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**self.start.shared, **self.start.gpu}, start_new_session=True,
        )  # fmt: skip

    def ask(self, cell: Cell | None, request: Mapping[str, Any]) -> None:
        """Begin a trial."""
        self.cell, self.began, self.is_busy = cell, time.monotonic(), True
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is read as the end of the server
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def answers(self) -> Iterable[dict[str, Any]]:
        """What came since the last time; the end of the server is an answer too."""
        assert self.process.stdout is not None
        read = os.read(self.process.stdout.fileno(), 1 << 16)
        if not read:
            code = self.process.wait()
            yield {"ended": code, "stopped": "", "tail": ["the process that starts trials ended"], "server": True}
            return
        *lines, self.heard = (self.heard + read).split(b"\n")
        for line in lines:
            _, mark, told = line.rpartition(MARK.encode())  # what a library printed may end no line
            if mark:
                answer = json.loads(told)
                self.is_busy = self.is_busy and "ended" not in answer
                yield answer

    def leave(self) -> None:
        """Close the pipe, which ends the trial and all it started, and then the server."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def close(self, seconds: float = PATIENCE_S) -> None:
        """End the server, which is waited for so long: while it imports it does not hear."""
        assert self.process.stdout is not None
        self.leave()
        try:
            self.process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


_idle: list[Slot] = []
_keepers: list[str] = []
"""One entry for each `servers_kept` that is open."""


@contextmanager
def servers_kept() -> Iterator[None]:
    """Sweeps in the block share their servers, whose libraries take seconds to load; the outermost block ends them."""
    _keepers.append("open")
    try:
        yield
    finally:
        _keepers.pop()
        if not _keepers:
            _closed(_idle)


def slot_for(machine: Machine, number: int) -> Slot:
    """An idle server that began with what this one would begin with; else a new one. Raises OSError where it cannot be started."""
    wanted = Start.of(machine, number)
    found = next((s for s in _idle if s.start == wanted and s.process.poll() is None), None)
    if found is None:
        return Slot(machine, number)
    _idle.remove(found)
    found.number = number
    return found


def given_back(slot: Slot) -> bool:
    """Whether an idle server is kept for the next sweep; the caller ends one that is not. Those that began otherwise end now."""
    if not _keepers or slot.is_busy or slot.heard or slot.process.poll() is not None:
        return False
    others = [s for s in _idle if not s.start.is_beside(slot.start)]
    _closed(others)
    _idle.append(slot)
    return True


def _closed(slots: list[Slot]) -> None:
    """End servers, all of them within the same seconds."""
    until = time.monotonic() + PATIENCE_S
    for slot in slots:
        slot.leave()
    for slot in [*slots]:
        slot.close(until - time.monotonic())
        _idle.remove(slot)
