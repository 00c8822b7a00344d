"""A worker for sweeps that needs no network: what a trial does is said by its cell's amount, or by a file of misdeeds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from paredown.errors import InfeasibleError
from paredown.records import Measured, Record, append_line, write_text
from paredown.sweep.local import RESULT, write_result


def prepare() -> None:
    """As a library that reports what it loads and ends no line."""
    print("loading ... ", end="")


def main(request: Mapping[str, Any], emit: Callable[[Mapping[str, Any]], None]) -> None:
    """One trial: counts to three in a file, so that a killed one goes on, then writes its record."""
    place, cell = Path(request["folder"]), request["cell"]
    place.mkdir(parents=True, exist_ok=True)
    misdeeds = json.loads(os.environ.get("MISDEEDS", "{}"))
    if "silent" not in misdeeds.values():
        print("a line of user code on stdout")
    _misbehave(misdeeds.get(f"{cell['kind']} {cell['amount']} {cell['seed']}", ""))
    for role, folder in request["needs"].items():
        assert (Path(folder) / RESULT).exists(), role
    count = place / "count"
    for step in range(int(count.read_text()) if count.exists() else 0, 3):
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        emit({"training": "counting", "done": step, "of": 3})
        write_text(count, str(step + 1))
    value = 100 * hash_of(cell["digest"])
    measured = {
        "metric": Measured(value=value, unit="%"),
        "seconds": Measured(value=time.perf_counter(), unit="s", timing=True),
        "server": Measured(value=os.getppid(), unit="", timing=True),
        "threads": Measured(value=int(os.environ["OMP_NUM_THREADS"]), unit=""),
    }
    about = {"versions": request["versions"]}
    told = {k: v for k, v in cell.items() if k != "recipe"}
    write_result(place, Record(cell=told, measured=measured, environment=about))


def hash_of(digest: str) -> float:
    """A number in [0, 1) that depends on the cell alone."""
    return int(digest[:12], 16) / 16**12


RAISED = {
    "raise": RuntimeError("the loss is no number"),
    "refuse": InfeasibleError("nothing is left to remove"),
    "raise lines": RuntimeError("the loss is no number\nin the second batch\n\n  (see above)"),
    "refuse lines": InfeasibleError("nothing is left to remove:\n  a\n  b"),
    "no memory": RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
    ),
}


def _misbehave(how: str) -> None:
    if how in RAISED:
        raise RAISED[how]
    if how == "syntax":
        compile("x = = 1", "task.py", "exec")
    if how == "disk full":
        append_line(Path("/dev/full"), "a checkpoint")
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how in ("exit", "silent"):
        os._exit(3)
    if how in ("hang", "daemon"):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=how == "daemon")
        time.sleep(600 if how == "hang" else 0)
    if how == "grow":
        kept = []
        while True:
            kept.append(bytearray(os.urandom(1 << 20)) * 16)
            time.sleep(0.02)
    if how == "kill the server":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    if how == "kill ray's worker":
        server = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
        os.kill(int(server[1]), signal.SIGKILL)  # the parent of the server
        time.sleep(600)
