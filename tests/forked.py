"""A process of its own without its start: a server that has the libraries loaded is forked. Nothing that a test did is in there.

Loading PyTorch, the exporters and the runtimes takes longer than most of what is run. Tests about that start, about the
environment of an interpreter, or about what is loaded when, begin real processes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

LOADS = (
    "paredown.cli",
    "paredown.pipeline.trial",
    "torchao.quantization.pt2e",
)


class Forked:
    """A running fork; what it writes lies in two files."""

    def __init__(self, code: str, arguments: tuple[object, ...], cwd: Path, env: Mapping[str, str]) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="forked")
        self.out, self.err = (Path(self.folder.name) / name for name in ("out", "err"))
        self.out.touch(), self.err.touch()
        request = {"code": code, "argv": ["-c", *map(str, arguments)], "cwd": str(cwd), "env": {**os.environ, **env}}
        self.pid = _ask({**request, "out": str(self.out), "err": str(self.err)})
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the signal; None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"ended": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """The exit code when it has ended."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                self.kill()
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def stdout(self) -> str:
        return self.out.read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        return self.err.read_text(encoding="utf-8", errors="replace")


def start(code: str, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Forked:
    """As `python -c code arguments…`, in a fork."""
    return Forked(code, arguments, cwd or Path.cwd(), env or {})


def run(code: str, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Forked:
    """`start`, and wait for its end."""
    forked = start(code, *arguments, cwd=cwd, env=env)
    forked.wait()
    return forked


PAREDOWN = "import sys\nfrom paredown.cli import main\nsys.exit(main(sys.argv[1:]))"
"""The command line."""


# ------------------------------------------------------------------------------------------------------------ the server


@functools.cache
def _server() -> subprocess.Popen[str]:
    started = subprocess.Popen([sys.executable, __file__], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True)
    atexit.register(started.kill)
    return started


def _ask(request: Mapping[str, Any]) -> Any:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as well
    for name in LOADS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    _load_exporter()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _work(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load_exporter() -> None:
    """What the first export makes, without a tensor: one would start threads, which forks lose."""
    from paredown.pipeline import trial

    for name in trial.LOADS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    trial.prepare()


def _work(request: Mapping[str, Any]) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, file in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = request["argv"]
        sys.path.insert(0, request["cwd"])
        exec(compile(request["code"], "<forked>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        files: tuple[IO[str], ...] = (sys.stdout, sys.stderr)
        for file in files:
            file.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
