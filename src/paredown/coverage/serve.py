"""One process that has the libraries loaded, and a fork of it for every model: importing them takes longer than most models.

    python -m paredown.coverage.serve

reads one request per line, {"asked", "seconds", "memory_bytes"}, and answers on stdout with lines after a record separator (models
print as well): the rows of `one.main` as they grow, then {"ended", "late", "tail"}, the exit code of the fork, whether it was
killed because its time was over, and the last line it wrote to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from typing import IO, Any, NoReturn

from paredown.coverage.one import main
from paredown.errors import ParedownError
from paredown.models import load_model

MARK = "\x1e"
_LIBRARIES = ("torchvision:alexnet", "timm:test_vit")
"""A small model of each: what is common to all models of the library is loaded with it."""
_LATER = (
    "torch._dynamo",
    "torch.export",
    "torch._export.non_strict_utils",
    "onnxruntime",
    "onnxscript",
    "torch.onnx._internal.exporter._core",
)
"""What PyTorch loads at the first capture and the first export. Only imported: a tensor would start threads, which forks lose."""


def serve(requests: IO[str]) -> None:
    """Answer requests until there are no more."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when timm is imported
    for spec in _LIBRARIES:
        with contextlib.suppress(ParedownError):  # not installed: models that need it will say so
            load_model(spec)
    for name in _LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in requests:
        request = json.loads(line)
        with tempfile.TemporaryFile() as errors:
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                _fill(request, errors)
            _say(_waited(child, float(request["seconds"]), errors))


def _fill(request: Mapping[str, Any], errors: IO[bytes]) -> NoReturn:
    """In the fork: fill the rows of one model; never returns into the loop of the parent."""
    ended = 1
    try:
        os.dup2(errors.fileno(), 2)
        memory = request.get("memory_bytes")
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        main(json.dumps(request["asked"]), _say)
        ended = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended)


def _waited(child: int, seconds: float, errors: IO[bytes]) -> dict[str, Any]:
    """How the fork ended; it is killed when its seconds are over."""
    until, late = time.monotonic() + seconds, False
    while True:
        done, status = os.waitpid(child, 0 if late else os.WNOHANG)
        if done:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            late = True
        else:
            time.sleep(0.02)
    errors.seek(0)
    tail = errors.read().decode(errors="replace").strip().splitlines()
    return {"ended": os.waitstatus_to_exitcode(status), "late": late, "tail": tail[-1][:300] if tail else ""}


def _say(row: Mapping[str, Any]) -> None:
    # A new line first: a model may have printed half of one.
    os.write(1, f"\n{MARK}{json.dumps(row, allow_nan=True)}\n".encode())


if __name__ == "__main__":
    serve(sys.stdin)
