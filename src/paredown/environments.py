"""Environments of their own: converters whose dependencies conflict with ours are installed apart, by `paredown setup TARGET`.

One folder per target and set of pinned versions, under PAREDOWN_ENVIRONMENTS or ~/.cache/paredown/environments. Nothing in
it is ever imported here: its Python runs the scripts in export/processes, which know nothing of paredown.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from paredown.errors import MissingError, ResourceError, UsageError
from paredown.records import locked, write_text
from paredown.target import TARGETS, Target, named

FOLDER = "PAREDOWN_ENVIRONMENTS"
"""The variable that moves the folder of all environments."""
READY = "ready.json"
"""Written last: an environment without it was never finished and is never used."""
_TOLD = re.compile(r"^(Collecting|Processing|Installing collected|Successfully installed|Building wheel)")


def folder_of(target: Target) -> Path:
    """Where the environment of a target is or would be: its name ends in a digest of the versions and of this Python.

    >>> folder_of(named("litert")).name.startswith("litert-")
    True
    """
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    top = Path(os.environ.get(FOLDER) or Path(cache) / "paredown" / "environments").expanduser()
    kind = (*target.environment, _constraints(target).read_text(encoding="utf-8"), platform.machine(), sys.platform)
    digest = hashlib.sha256(json.dumps([*kind, *sys.version_info[:2]]).encode()).hexdigest()
    return top / f"{target.name}-{digest[:12]}"


def python_of(target: Target) -> Path:
    """The Python of a target's environment. Raises MissingError with the command that makes it, where it is not there."""
    folder = folder_of(target)
    if not _usable(folder):
        msg = (
            f"the target {target.name} must have its own environment ({', '.join(target.environment)}), because what it "
            f"needs conflicts with other packages. There is none at {folder}. Run: paredown setup {target.name}"
        )
        raise MissingError(msg)
    return folder / "bin" / "python"


def is_ready(target: Target) -> bool:
    """Whether the target's environment was made, or needs none."""
    return not target.environment or _usable(folder_of(target))


def _usable(folder: Path) -> bool:
    """Its Python is a link, which leads nowhere once the one that it was made of was removed or updated."""
    return (folder / READY).is_file() and (folder / "bin" / "python").exists()


def make(target: Target | str, *, overwrite: bool = False, say: Callable[[str], None] = lambda line: None) -> Path:
    """Make the environment of a target: a venv of this Python with the pinned versions, imported once as a proof.

    What is there already and has its Python is left as it is, unless `overwrite`. Nothing unfinished is ever used: an interruption, a kill
    or a failure leaves a folder without its mark, which the next call replaces. pip's own settings hold, as
    PIP_INDEX_URL and PIP_EXTRA_INDEX_URL. `say` receives one line per step. Returns the folder.

    Raises UsageError (a target that needs no environment), MissingError (packages that cannot be found or imported),
    ResourceError (disk, or another process at it).
    """
    target = named(target) if isinstance(target, str) else target
    if not target.environment:
        own = ", ".join(t.name for t in TARGETS.values() if t.environment)
        msg = f"setup must be given a target with an environment of its own: {own}. Got {target.name!r}. Run: pip install 'paredown[quant,{','.join(target.extras)}]'."
        raise UsageError(msg)
    folder = folder_of(target)
    with _alone(folder):
        if _usable(folder) and not overwrite:
            say(f"{folder} is there already")
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _installed(target, folder, say)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


def _installed(target: Target, folder: Path, say: Callable[[str], None]) -> None:
    say(f"python -m venv {folder}")
    own = importlib.util.find_spec("pip") is not None  # ours can install there, which saves unpacking another one
    venv = [sys.executable, "-I", "-m", "venv", *(["--without-pip"] if own else []), str(folder)]
    _run(venv, "a virtual environment must be made", say)
    python = str(folder / "bin" / "python")
    runner = [sys.executable, "-I", "-m", "pip", "--python", python] if own else [python, "-I", "-m", "pip"]
    pip = [*runner, "install", "--no-input", "--progress-bar", "off", "--disable-pip-version-check"]
    pinned = ["--constraint", str(_constraints(target)), *target.environment]
    _run([*pip, *pinned], f"pip must install {', '.join(target.environment)}", say)
    say("import what was installed, which compiles it")
    names = [r.partition("==")[0] for r in target.environment]
    text = _run(
        [python, "-I", "-c", _PROOF, json.dumps(target.own_modules), json.dumps(names)],
        f"what was installed for {target.name} must be importable",
        say,
    )
    write_text(folder / READY, json.dumps({"versions": json.loads(text[-1])}, indent=1) + "\n")


_PROOF = (
    "import importlib, importlib.metadata as m, json, sys\n"
    "[importlib.import_module(n) for n in json.loads(sys.argv[1])]\n"
    "print('\\n' + json.dumps({n: m.version(n) for n in json.loads(sys.argv[2])}))"
)


def _run(command: Sequence[str], rule: str, say: Callable[[str], None]) -> list[str]:
    """Run to the end; the last lines that it printed. Ends the child where this process is interrupted."""
    last: collections.deque[str] = collections.deque(maxlen=20)
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        msg = f"{rule}. {error.filename or command[0]} cannot be started: {error.strerror or error}."
        raise MissingError(msg) from error
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip():
                last.append(line.strip())
            if _TOLD.match(line):
                say(line.strip()[:100])
        code = child.wait()
    finally:
        if child.poll() is None:
            os.killpg(
                child.pid, signal.SIGKILL
            )  # pip runs another pip: a signal to the first would leave the second at work
            child.wait()
    if code:
        lines = [*last] or ["no message"]
        told = next((x for x in reversed(lines) if "error" in x.lower()), lines[-1]).removeprefix("ERROR: ")
        full = any("No space left" in x or "Disk quota" in x for x in lines)
        msg = f"{rule}. Got exit code {code}: {told[:400]}"
        raise (ResourceError if full else MissingError)(msg)
    return list(last)


def _constraints(target: Target) -> Path:
    """Versions of everything that comes along, as pip wants them."""
    import paredown.target

    return Path(paredown.target.__file__).parent / "constraints" / f"{target.name}.txt"


def _alone(folder: Path) -> AbstractContextManager[None]:
    """The environment's lock."""
    return locked(
        folder.parent / f".{folder.name}.lock",
        writable=f"the folder of environments must be writable; {FOLDER} sets another",
        held=f"an environment must be made by one process at a time. Another one is at {folder}. Wait for it.",
    )
