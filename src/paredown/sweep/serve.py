"""One process that has the libraries loaded, and a fork of it for every trial: importing them takes longer than small trials.

    python -m paredown.sweep.serve MODULE

imports MODULE, which has `main(request, emit)` and may have `LOADS`, names to import as well, and `prepare()`; reads one request per line,
{"request", "seconds", "memory_bytes"}; and answers on stdout with lines after a record separator (libraries print as well):
what `main` emits, then {"ended": exit code or minus signal, "stopped": "" | "time" | "memory", "tail": last lines of stderr}.
A fork, with all processes it started, ends when its time or memory is used up, and when the pipe to here is closed; what it leaves
running ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

MARK = "\x1e"
TAIL = 12
"""Lines of stderr that are kept."""
PRINTED_BYTES, _END_BYTES = 64 << 20, 20_000
"""Of what a trial prints so much lies on disk, and what of it is looked at: one that prints at every step would fill the disk."""
FATAL = "Fatal Python error"
"""What faulthandler writes before the stack, most recent call first."""
_EVERY_S, _LOOK_EVERY_S = 0.05, 0.25
_PAGE = os.sysconf("SC_PAGE_SIZE")
_DIE_WITH_PARENT, _TAKE_ORPHANS = 1, 36  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of prctl(2)


def serve(module: str) -> None:
    """Answer requests until there are no more."""
    # Python 3.12 warns of any thread beside a fork; the one there is belongs to ONNX Runtime's log.
    warnings.filterwarnings("ignore", message=r".*use of fork\(\)", category=DeprecationWarning)
    trial = importlib.import_module(module)
    for name in getattr(trial, "LOADS", ()):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if hasattr(trial, "prepare"):
        trial.prepare()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_TAKE_ORPHANS, 1)
    own = children()
    gc.collect()
    gc.freeze()  # else every fork would look through, and so copy, all that the libraries made
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks; the closed pipe tells us
    asked = b""
    while True:
        read = os.read(0, 1 << 16)
        if not read:
            return
        asked += read
        if not asked.endswith(b"\n"):
            continue
        request = json.loads(asked)
        asked = b""
        with tempfile.TemporaryFile() as errors:
            sys.stdout.flush()
            server = os.getpid()
            child = os.fork()
            if child == 0:
                _work(trial, request["request"], errors, server)
            end = _waited(child, errors, request.get("seconds"), request.get("memory_bytes"), own)
            _say({**end, "tail": _last_lines(errors)})


def _work(trial: Any, request: Mapping[str, Any], errors: IO[bytes], server: int) -> NoReturn:
    """In the fork: one trial; never returns into the loop of the parent."""
    ended = 1
    try:
        os.setsid()  # a group of its own, which ends as one
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
            if os.getppid() != server:
                os._exit(ended)
        answers = os.dup(1)  # what user code prints goes where its errors go
        os.dup2(errors.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        faulthandler.enable(2, all_threads=False)  # which line a segmentation fault was in
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the pipe is the server's
        trial.main(request, lambda row: _say(row, answers))
        ended = 0
    except BaseException as error:
        traceback.print_exc()
        *before, last = "".join(traceback.format_exception_only(error)).rstrip().splitlines()
        first = next((line for line in before if line[:1].strip()), last)
        if first != last:  # the reason of a failure is the last line, which here says the least
            print(first, file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended)


def _waited(
    child: int, errors: IO[bytes], seconds: float | None, memory: int | None, own: Collection[int]
) -> dict[str, Any]:
    """How the fork ended; nothing runs but what ran before, `own`."""
    start, stopped, looked = time.monotonic(), "", 0.0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if select.select([0], [], [], _EVERY_S)[0] and not os.read(0, 1):
            _end(child)
            _end_left(own)
            os._exit(0)
        now = time.monotonic()
        if not stopped and seconds is not None and now - start > seconds:
            stopped = "time"
        elif not stopped and now - looked > _LOOK_EVERY_S:
            looked = now
            shorten(errors)
            stopped = "memory" if memory is not None and resident(child) > memory else ""
        if stopped:
            _end(child)
    _end(child)  # what it started and left behind
    _end_left(own)
    return {"ended": os.waitstatus_to_exitcode(status), "stopped": stopped}


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def children() -> set[int]:
    """Processes whose parent is this one; those whose parent ended fall to it. Linux."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(process.name))
    return found


def _end_left(own: Collection[int]) -> None:
    """What a trial left behind in a group of its own, one generation after the other; what does not end in a second stays."""
    until = time.monotonic() + 1.0
    while (left := children().difference(own)) and time.monotonic() < until:
        for process in left:
            with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, os.WNOHANG)
        time.sleep(0.01)


def resident(group: int) -> int:
    """Bytes in memory of all processes of a group. Linux.

    >>> resident(os.getpgid(0)) > 1_000_000
    True
    """
    total = 0
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError, ValueError):
                if os.getpgid(int(process.name)) == group:
                    total += int((process / "statm").read_text().split()[1]) * _PAGE
    return total


def shorten(errors: IO[bytes]) -> None:
    """Keep the end alone of what was printed, once it is PRINTED_BYTES long. Who prints shares the place in the file, and goes on behind it."""
    file = errors.fileno()
    size = os.fstat(file).st_size
    if size > PRINTED_BYTES:
        kept = os.pread(file, _END_BYTES, size - _END_BYTES)
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(file, kept)


def _last_lines(errors: IO[bytes]) -> list[str]:
    """The last lines, or the first ones of the stack of a fault."""
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - _END_BYTES))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    fault = next((n for n, line in enumerate(lines) if line.startswith(FATAL)), None)
    kept = lines[-TAIL:] if fault is None else lines[fault:][:TAIL]
    return [line[:400] for line in kept]


def _say(row: Mapping[str, Any], pipe: int = 1) -> None:
    os.write(pipe, f"{MARK}{json.dumps(row)}\n".encode())


if __name__ == "__main__":
    serve(sys.argv[1])
