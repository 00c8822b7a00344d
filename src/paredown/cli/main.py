"""The application: commands by name, and what every kind of failure becomes on stderr and as an exit code."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from paredown.cli.front import answer
from paredown.cli.show import EMITTED, emit, plain
from paredown.errors import InfeasibleError, Interrupted, ParedownError

if TYPE_CHECKING:
    from cyclopts import CycloptsError

BROKEN_PIPE = 141
"""What a shell reports for a program whose reader went away: 128 + SIGPIPE."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE)
_NO_ACCESS = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT)
_NO_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.ELOOP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or that of the error (see paredown.errors); 2 for wrong options.

    With --json an error is a document too, unless the command had written its own: `{"schema": 1, "error": {"kind", "exit_code",
    "message", "nearest"}}`, where `nearest` is the nearest plan of an InfeasibleError, or null.

    >>> main(["--version"])
    0.1.0
    0
    """
    _readable_anywhere()
    EMITTED.set(False)
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _told(given)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123  (lives until the process ends; nothing must be flushed to the pipe)
        return BROKEN_PIPE


def _told(arguments: list[str]) -> int:
    """The command's exit code; a failure is told on stderr first, and in a document where one was asked for."""
    documented = "--json" in arguments
    try:
        with _interruptible(), _warnings_as_notes():
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        raise
    except SystemExit as error:
        where = _own_code(error)
        if not where:
            raise
        message = f"your own code ended the process with sys.exit({error.code!r}), at {where}."
        return _complain(message, 3, error, documented)
    except KeyboardInterrupt as error:
        return _complain(_interruption(error), Interrupted.exit_code, error, documented)
    except Exception as error:
        message, code = explained(error)
        return _complain(message, code, error, documented)


def _run(arguments: list[str]) -> int:
    told = answer(arguments)
    if told is not None:
        print(told)
        return 0
    from paredown.cli.app import app

    return int(app(arguments) or 0)


def explained(error: Exception) -> tuple[str, int]:
    """One message and one exit code for any failure."""
    from cyclopts import CycloptsError

    if isinstance(error, CycloptsError):
        return f"{_usage(error)}\nSee `paredown --help`, or --help after a command.", 2
    if isinstance(error, ParedownError):
        return f"{error}{_nearest(error)}", error.exit_code
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return f"out of memory: {_first_line(error)}. Use smaller batches or inputs, or a machine with more memory.", 7
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return _of_path(error), 7
    where = _own_code(error)
    if where:
        return f"your own code raised {type(error).__name__}: {_first_line(error)}, at {where}.", 3
    if isinstance(error, OSError | ValueError) and _of_path(error):
        return _of_path(error), 2 if isinstance(error, ValueError) or error.errno in _NO_NAME else 7
    if isinstance(error, ImportError):
        return (
            f"an import failed: {_first_line(error)}. `paredown doctor` says what is installed and what is broken.",
            8,
        )
    return (
        f"{type(error).__name__}: {_first_line(error)}. This is a fault of paredown: please report it, with the command "
        "and the output of PAREDOWN_DEBUG=1.",
        1,
    )


def _of_path(error: OSError | ValueError) -> str:
    """What is wrong with a path that could not be used; "" where the error is of another kind."""
    if isinstance(error, ValueError):
        return "a path must hold no NUL character. Got one." if str(error) == "embedded null byte" else ""
    where = f"{error.strerror} at {str(error.filename)[:200]!r}" if error.filename else f"{error.strerror}"
    if error.errno in _NO_SPACE:
        return f"out of space: {where}."
    if error.errno in _NO_ACCESS:
        return f"no permission: {where}."
    return f"a path must be one that can be used. Got {where}." if error.errno in (*_NO_NAME, *_NO_PLACE) else ""


def _nearest(error: ParedownError) -> str:
    """What can be reached, where the target cannot."""
    plan = error.nearest if isinstance(error, InfeasibleError) else None
    made = getattr(plan, "made_by", None) or {}
    reached, dense = made.get("reached"), made.get("dense")
    if not reached or not dense:
        return ""
    if "kept" in reached:
        kept = f"{reached['kept']:,} of {reached['of']:,} weights kept ({100 * reached['density']:.1f} %)"
        return f"\nNearest plan: {kept}, effective MACs {reached['effective_macs']:,} of {dense['macs']:,} (estimated)."
    figures = [f"{n} {reached[n]:,} of {dense[n]:,} ({100 * reached[n] / dense[n]:.1f} %)" for n in dense if dense[n]]
    return f"\nNearest plan: {', '.join(figures)}."


def _usage(error: CycloptsError) -> str:
    return str(error).strip()


def _interruption(error: KeyboardInterrupt) -> str:
    told = f": {error}" if str(error) else "."
    return f"interrupted{told} The same command resumes what is resumable; nothing half-written stays."


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:1000] if lines else "no message"


def _is_out_of_memory(error: Exception) -> bool:
    """torch says it as a RuntimeError of a class of its own, or of none."""
    text = str(error)
    known = "OutOfMemoryError" in type(error).__name__
    runtime = type(error).__module__.startswith("onnxruntime") and "Failed to allocate memory" in text
    told = isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    return known or told or runtime


def _own_code(error: BaseException) -> str:
    """ "task.py:12" where the innermost frame outside of libraries is the user's own."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120  (compared with frames' file names, which are texts)
    libraries = (sys.base_prefix, sys.prefix, "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(here):
            return ""
        if "site-packages" not in frame.filename and not frame.filename.startswith(libraries):
            return f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}"  # noqa: PTH119
    return ""


def _complain(message: str, code: int, error: BaseException, documented: bool) -> int:
    if os.environ.get("PAREDOWN_DEBUG") == "1":
        traceback.print_exception(error, file=sys.stderr)
    print(plain(message if isinstance(error, KeyboardInterrupt) else f"error: {message}"), file=sys.stderr)
    if documented and not EMITTED.get():
        plan = error.nearest if isinstance(error, InfeasibleError) else None
        nearest = None if plan is None else json.loads(plan.to_json())
        told = {"kind": type(error).__name__, "exit_code": code, "message": plain(message), "nearest": nearest}
        emit({"schema": 1, "error": told})
        sys.stdout.flush()
    return code


def _readable_anywhere() -> None:
    """A terminal or pipe that knows fewer characters shows a question mark instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C once raises KeyboardInterrupt, which ends at a safe point; twice ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    count = 0

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            os._exit(Interrupted.exit_code)
        print("stopping at a safe point; Ctrl-C again stops now", file=sys.stderr)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        if not count:  # once interrupted, the process ends: a second Ctrl-C must not meet it half torn down
            signal.signal(signal.SIGINT, before)


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Warnings are lines for people; those of libraries about their own future are left out."""

    def shown(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        print(f"note: {plain(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = shown
        yield
