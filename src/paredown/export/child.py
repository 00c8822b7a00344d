"""A process of a target's own environment: started once, asked many times; and a file that runs in it, called like a session."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paredown.environments import python_of
from paredown.errors import RejectedError, ResourceError
from paredown.export.openvino_session import STRUCTURE, Input
from paredown.export.processes.serve import receive, send
from paredown.target import named

RUNTIMES = {".pte": "executorch-xnnpack", ".tflite": "litert"}
"""Ending of a file → the target whose environment runs it."""
_SCRIPTS = {"executorch-xnnpack": "executorch_process", "litert": "litert_process"}
_TYPES = {"float32": "tensor(float)", "float64": "tensor(double)", "int64": "tensor(int64)", "int32": "tensor(int32)"}


class Child:
    """A process under the Python of a target's environment. Raises MissingError where the environment was not made."""

    def __init__(self, target: str) -> None:
        self.target = target
        folder = Path(__file__).parent / "processes"
        command = [str(python_of(named(target))), "-s", "-E", str(folder / "serve.py"), _SCRIPTS[target]]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (what the child prints; it lives as long as the child)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, cwd=tempfile.gettempdir()
        )
        atexit.register(self.close)

    def ask(self, do: str, arrays: Sequence[Any] = (), **question: Any) -> tuple[dict[str, Any], list[Any]]:
        """One answer and its arrays. Raises RejectedError where it is an error, ResourceError where the process has died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            send(self._process.stdin, {"do": do, **question}, arrays)
            reply, results = receive(self._process.stdout)
        except (EOFError, BrokenPipeError, ValueError) as error:
            raise ResourceError(self._death(do)) from error
        except BaseException:
            self.close()  # half a message is on the way: nothing that comes later could be understood
            raise
        if "error" in reply:
            told = next((x for x in str(reply["error"]).strip().splitlines() if x.strip()), "no message")
            msg = f"{reply['kind']}: {told[:400]}"
            raise RejectedError(msg)
        return reply, results

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        atexit.unregister(self.close)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        if self.alive:
            self._process.terminate()
        self._process.wait()
        self._said.close()

    def _death(self, do: str) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it lives, but what it said was no answer
            self._process.kill()
            code = self._process.wait()
        self._said.seek(0)
        lines = [x for x in self._said.read().decode(errors="replace").splitlines() if x.strip()] or ["no message"]
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        told = " It may have been out of memory." if code == -signal.SIGKILL else ""
        return f"the process of {self.target} must answer ({do}). It ended with {how}: {lines[-1][:300]}.{told}"


@functools.cache
def _kept(target: str, threads: int) -> list[Child]:
    """The child that is shared by all files of a target: starting one takes seconds of imports."""
    return []


def child_of(target: str, threads: int) -> Child:
    """A running child for that many threads, the same one as long as it lives."""
    kept = _kept(target, threads)
    if not kept or not kept[0].alive:
        kept[:] = [Child(target)]
    return kept[0]


class Session:
    """A .pte or .tflite file in its runtime, called like an ONNX Runtime session; the clock runs inside the child."""

    note = "timed in the runtime's own process, the call from Python included"

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        target = RUNTIMES[path.suffix.lower()]
        self._child = child_of(target, threads)
        try:
            found, _ = self._child.ask("load", path=str(path.resolve()), threads=threads)
        except RejectedError as error:
            msg = f"the file must load in the runtime of {target}. Got {path.name}: {error}"
            raise RejectedError(msg) from error
        self._model = found["model"]
        about = json.loads(found["about"])
        names = about.get("inputs") or [f"input_{i}" for i in range(len(found["inputs"]))]
        self._inputs = [
            Input(name=name, shape=i["shape"], type=_TYPES.get(i["type"], f"tensor({i['type']})"))
            for name, i in zip(names, found["inputs"], strict=True)
        ]
        self.metadata = {STRUCTURE: json.dumps(about["outputs"])} if "outputs" in about else {}

    def get_inputs(self) -> list[Input]:
        """The inputs in the order of the network's own."""
        return self._inputs

    def run(self, _: None, feed: Mapping[str, Any]) -> list[Any]:
        """Outputs as arrays."""
        return self._asked("run", feed)[1]

    def timed(self, feed: Mapping[str, Any], runs: int) -> float:
        """Milliseconds per run, over that many."""
        return float(self._asked("timed", feed, runs=runs)[0]["ms"])

    def _asked(self, do: str, feed: Mapping[str, Any], **more: Any) -> tuple[dict[str, Any], list[Any]]:
        for value in self._inputs:
            if list(feed[value.name].shape) != value.shape:
                msg = f"an input must have the shape {value.shape} of the file. Got {list(feed[value.name].shape)} for {value.name}."
                raise RejectedError(msg)
        return self._child.ask(do, [feed[i.name] for i in self._inputs], model=self._model, **more)


__all__ = ["RUNTIMES", "Child", "Session", "child_of"]
