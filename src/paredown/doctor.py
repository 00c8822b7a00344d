"""The doctor: what is installed here, what this machine can do, what is wrong and how to mend it.

This file imports nothing but the standard library at its top, so that it can still speak where everything else is
broken. Packages are imported in two child processes side by side: one that crashes or hangs ends its child only.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

State = Literal["ok", "warn", "missing", "broken"]
Reply = Mapping[str, Any]

TIMEOUT_S = 120.0
"""A child process that needs longer than this is ended, and the package that it was importing reported as broken."""
_LOW_MEMORY_BYTES = 2 * 10**9
_LOW_DISK_BYTES = 2 * 10**9
_LOW_SHM_BYTES = 128 * 2**20


class Package(NamedTuple):
    """A distribution, the module it brings, the extra that asks for it ("" is the core), the oldest version."""

    name: str
    module: str
    extra: str
    oldest: str


PACKAGES = (
    Package("torch", "torch", "", "2.11"),
    Package("numpy", "numpy", "", "1.26"),
    Package("safetensors", "safetensors", "", "0.5"),
    Package("pydantic", "pydantic", "", "2.9"),
    Package("PyYAML", "yaml", "", "6.0"),
    Package("rich", "rich", "", "13.9"),
    Package("cyclopts", "cyclopts", "", "4.0"),
    Package("torchao", "torchao", "quant", "0.18"),
    Package("onnx", "onnx", "onnx", "1.19"),
    Package("onnxruntime", "onnxruntime", "onnx", "1.23"),
    Package("onnxscript", "onnxscript", "onnx", "0.6"),
    Package("openvino", "openvino", "openvino", "2025.4"),
    Package("matplotlib", "matplotlib", "report", "3.9"),
    Package("Jinja2", "jinja2", "report", "3.1"),
    Package("optuna", "optuna", "search", "4.5"),
    Package("ray", "ray", "ray", "2.40"),
    Package("tensorboard", "tensorboard", "tensorboard", "2.18"),
    Package("mlflow-skinny", "mlflow", "mlflow", "3.0"),
    Package("SQLAlchemy", "sqlalchemy", "mlflow", "2.0"),
    Package("alembic", "alembic", "mlflow", "1.10"),
    Package("torchvision", "torchvision", "zoo", "0.26"),
    Package("timm", "timm", "zoo", "1.0.20"),
    Package("scikit-learn", "sklearn", "demo", "1.5"),
)
"""The same as in pyproject.toml; a test compares the two."""

_CHILDREN = (("torch", "torchao", "torchvision", "timm"),)
"""Modules by child process; all others share one more. Those that load torch load it, and half of its compiler, once."""

_DOT_UNITS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "i8mm": "i8mm",
    "asimddp": "dotprod",
}
_JUDGE = "Judge latency on the machine that will run the file; the size of the file does not depend on this."


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. `fix` is what to do, empty where nothing is to be done."""

    name: str
    state: State
    found: str
    fix: str = ""
    extra: str = ""
    """The extra that brings it: pip install 'paredown[extra]'."""
    required: bool = False
    """Without it paredown does not run at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All findings; prints as a table."""

    checks: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """0, or 8 where something that paredown cannot run without is missing or broken."""
        return 8 if any(c.required and c.state in ("missing", "broken") for c in self.checks) else 0

    def to_json(self) -> str:
        """{"schema": 1, "exit_code", "checks": [{"name", "state", "found", "fix", "extra", "required"}]}."""
        document = {"schema": 1, "exit_code": self.exit_code, "checks": [asdict(c) for c in self.checks]}
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        return "\n".join(f"{c.state:<8}{c.name:<18}{c.found}{f' -> {c.fix}' if c.fix else ''}" for c in self.checks)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        colours = {"ok": "green", "warn": "yellow", "missing": "yellow", "broken": "red"}
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for title in ("", "what", "found, and what to do"):
            table.add_column(title, overflow="fold")
        for check in self.checks:
            name, text = Text(check.name), Text(check.found)
            if check.extra:
                name.append(f" [{check.extra}]", style="dim")
            if check.fix:
                text.append(f"\n→ {check.fix}", style="bold")
            table.add_row(Text(check.state, style=colours[check.state]), name, text)
        yield table


def diagnose() -> Diagnosis:
    """Look at Python, packages, processor, memory, disk and runtimes. Nothing is changed, nothing leaves the machine.

    States: "ok"; "warn", it works with a loss that `found` explains; "missing", not installed; "broken", installed
    and unusable. A broken package is a finding and never an exception.

    >>> print(diagnose())  # doctest: +SKIP
    ok      Python            3.11.7
    ok      torch             2.13.0+cpu
    """
    replies = probe(PACKAGES)
    return Diagnosis(
        checks=(
            _python(),
            *(_package(package, replies[package.module]) for package in PACKAGES),
            *_accelerator(replies["torch"]),
            *_machine(),
            *_places(),
            *_runtimes(replies),
        )
    )


# ------------------------------------------------------------------------------------------------------------- packages


def probe(packages: tuple[Package, ...], *, timeout_s: float = TIMEOUT_S) -> dict[str, Reply]:
    """Import every package in a child process: {module: {"version", …facts} or {"error", …}}."""
    modules = [p.module for p in packages]
    apart = {m for group in _CHILDREN for m in group}
    groups = [[m for m in group if m in modules] for group in _CHILDREN]
    groups.append([m for m in modules if m not in apart])
    replies: dict[str, Reply] = {}
    with ThreadPoolExecutor(len(groups)) as pool:
        for found in pool.map(lambda group: _probe_group(group, timeout_s), groups):
            replies.update(found)
    return replies


def _probe_group(modules: list[str], timeout_s: float) -> dict[str, Reply]:
    """Import the modules in one child; where it dies, blame the one it was at and go on with the rest in another."""
    replies: dict[str, Reply] = {}
    while rest := [m for m in modules if m not in replies]:
        found, end = _run_child(rest, timeout_s)
        replies.update(found)
        left = [m for m in rest if m not in replies]
        if left:
            replies[left[0]] = {"error": f"importing it {end}", "kind": "crash"}
    return replies


def _run_child(modules: list[str], timeout_s: float) -> tuple[dict[str, Reply], str]:
    """What the child said before it ended, and how it ended."""
    command = [sys.executable, "-P", str(Path(__file__)), *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        return _replies(said), f"did not end within {timeout_s:g} s"
    code = done.returncode
    how = f"killed the process ({signal.strsignal(-code) or -code})" if code < 0 else f"ended the process (exit {code})"
    return _replies(done.stdout), how


def _replies(text: str) -> dict[str, Reply]:
    lines = (json.loads(line) for line in text.splitlines() if line.endswith("}"))
    return {line.pop("module"): line for line in lines}


def _package(package: Package, reply: Reply) -> Finding:
    name, required = package.name, not package.extra
    finding = partial(Finding, name=name, extra=package.extra, required=required)
    newer = f"pip install '{name}>={package.oldest}'"
    if reply.get("kind") == "missing":
        fix = f"pip install 'paredown[{package.extra}]'" if package.extra else newer
        return finding(state="missing", found="not installed", fix=fix)
    if "error" in reply:
        return finding(
            state="broken", found=str(reply["error"]), fix=newer.replace("install", "install --force-reinstall")
        )
    version = str(reply["version"])
    if _numbers(version) < _numbers(package.oldest):
        found = f"{version}, older than {package.oldest}"
        return finding(state="broken" if required else "warn", found=found, fix=newer)
    if "error_without" in reply:
        found, fix = _torchvision(version, reply)
        return finding(state="warn", found=found, fix=fix)
    return finding(state="ok", found=f"{version}, runs on {reply['providers']}" if "providers" in reply else version)


def _torchvision(version: str, reply: Reply) -> tuple[str, str]:
    """What it means that torchvision imports only after its ops were declared, and what mends it."""
    torch = str(reply["torch"])
    flavour = torch.partition("+")[2] or "cpu"
    found = (
        f"{version} does not match torch {torch}: its compiled ops do not load ({reply['error_without']}). paredown declares "
        f"torchvision::nms and torchvision::qnms itself before it loads a model, so classifiers work; detection models, which run these ops, do not. "
        "`import torchvision` in your own code fails."
    )
    wheel = f"'torchvision=={version.partition('+')[0]}' --index-url https://download.pytorch.org/whl/{flavour}"
    return found, f"pip install --force-reinstall --no-deps {wheel}"


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in match[0].split(".")) if match else (0,)


# -------------------------------------------------------------------------------------------------------------- machine


def _python() -> Finding:
    version = ".".join(str(n) for n in sys.version_info[:3])
    old = sys.version_info < (3, 11)
    fix = "Make the environment with Python 3.11 or newer." if old else ""
    state: State = "broken" if old else "ok"
    return Finding(name="Python", state=state, found=version, fix=fix, required=True)


def _accelerator(torch: Reply) -> Iterator[Finding]:
    """What torch computes on; its own finding, because a driver that does not fit leaves everything else working."""
    if "error" in torch:
        return
    driver = Path("/dev/nvidiactl").exists()
    build = torch["cuda_build"]
    if torch["devices"]:
        yield Finding(name="device", state="ok", found=f"CUDA {build}: {', '.join(torch['devices'])}")
    elif build:
        found = (
            f"torch is built for CUDA {build} and finds no usable GPU{_because(torch['cuda_error'])}; the CPU is used"
        )
        fix = "Compare `nvidia-smi` with CUDA " + build + ", or install the CPU build of torch, which is 3 GB smaller."
        yield Finding(name="device", state="warn", found=found, fix=fix)
    elif driver:
        found = "an NVIDIA GPU is here, but torch is a CPU build; the CPU is used"
        yield Finding(name="device", state="warn", found=found, fix="Install a CUDA build of torch for --device cuda.")
    else:
        yield Finding(name="device", state="ok", found="CPU (a CPU build of torch, no NVIDIA GPU here)")


def _because(error: str) -> str:
    return f" ({error})" if error else ""


def _machine() -> Iterator[Finding]:
    try:
        from paredown.measure.machine import machine

        facts = machine()
    except Exception as error:  # numpy or /proc are broken: the other findings say so
        yield Finding(name="processor", state="warn", found=f"cannot be read: {error}")
        return
    yield _int8(facts)
    quota = _cpu_quota()
    cores = min(facts["cores"], quota) if quota else facts["cores"]
    limit = f" of {facts['cores']}: the container has a quota" if cores < facts["cores"] else ""
    yield Finding(name="cores", state="ok", found=f"{cores:g} usable{limit}")
    yield _memory(facts["memory_bytes"])


def _int8(facts: Mapping[str, Any]) -> Finding:
    """How fast 8-bit products are here, from the processor's flags."""
    isa, cpu = set(facts["isa"]), facts["cpu"]
    found = f"{cpu}: {' '.join(facts['isa']) or 'no instruction sets known'}. "
    fix = ""
    if facts["int8_dot"]:
        units = ", ".join(name for flag, name in _DOT_UNITS.items() if flag in isa)
        found += f"int8 is fast: one instruction multiplies and adds 8-bit numbers ({units})."
    elif isa & {"avx2", "avx512f"}:
        found += "int8 gains little speed: without VNNI, 8-bit products take three instructions, and uint8 × int8 sums of other tools' files may saturate at 16 bit in ONNX Runtime (set x64quantprecision there); paredown's INT8 files for x86 are made so that they cannot."
        fix = _JUDGE
    elif isa:
        found += "int8 gains little speed: without dotprod, 8-bit products are widened to 16 bit first."
        fix = _JUDGE
    else:
        found += "Whether int8 is fast here is not known; `paredown measure` tells."
    return Finding(name="processor", state="warn" if fix else "ok", found=found, fix=fix)


def _memory(total_bytes: int | None) -> Finding:
    from paredown.machine_memory import available_bytes, number_in

    limit = number_in(Path("/sys/fs/cgroup/memory.max"))
    total = min((n for n in (total_bytes, limit) if n), default=None)
    free = available_bytes()
    if total is None:
        return Finding(name="memory", state="ok", found="the system does not say")
    found = f"{_gb(total)} in all" + (f", {_gb(free)} free" if free is not None else "")
    if min(total, free if free is not None else total) >= _LOW_MEMORY_BYTES:
        return Finding(name="memory", state="ok", found=found)
    fix = "Close other programs: torch.export and training of a mid-size network need about 2 GB."
    return Finding(name="memory", state="warn", found=found, fix=fix)


def _places() -> Iterator[Finding]:
    """Disk, shared memory and the folder for temporary files."""
    free = shutil.disk_usage(Path.cwd()).free
    low = free < _LOW_DISK_BYTES
    yield Finding(
        name="disk",
        state="warn" if low else "ok",
        found=f"{_gb(free)} free here",
        fix="Free some space, or give --out a folder on another disk." if low else "",
    )
    shm = Path("/dev/shm")
    if sys.platform == "linux":
        size = shutil.disk_usage(shm).total if shm.is_dir() else 0
        yield Finding(
            name="/dev/shm",
            state="ok" if size >= _LOW_SHM_BYTES else "warn",
            found=_gb(size) if size else "not there",
            fix=""
            if size >= _LOW_SHM_BYTES
            else "Only data loaders with workers need it: docker run --shm-size=1g, or use num_workers=0.",
        )
    yield _temporary()


def _temporary() -> Finding:
    fix = "Set TMPDIR to a folder that can be written."
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile() as file:
            file.write(b"paredown")
            file.flush()
    except OSError as error:
        found = f"cannot be written: {error.strerror or error}"
        return Finding(name="temporary files", state="broken", found=found, fix=fix, required=True)
    return Finding(name="temporary files", state="ok", found=f"{folder} can be written", required=True)


def _runtimes(replies: Mapping[str, Reply]) -> Iterator[Finding]:
    """Every target name: usable now, or waiting for a package."""
    from paredown.environments import is_ready
    from paredown.target import TARGETS

    for name in TARGETS:
        extras, wanted = ("quant", *TARGETS[name].extras), ("torchao", *TARGETS[name].modules)
        needs = [p for p in PACKAGES if p.module in wanted and "error" in replies[p.module]]
        lacks = [p.name for p in needs] + ([] if is_ready(TARGETS[name]) else ["an environment of its own"])
        found = f"needs {', '.join(lacks)}" if lacks else "export, check and measure work here"
        fixes = ([f"pip install 'paredown[{','.join(extras)}]'"] if needs else []) + (
            [] if is_ready(TARGETS[name]) else [f"paredown setup {name}"]
        )
        yield Finding(name=name, state="missing" if lacks else "ok", found=found, fix="; ".join(fixes))


def _cpu_quota() -> float | None:
    """Cores that a container may use, from its control group (version 2); None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(int(quota) / int(period), 0.1)
    except (OSError, ValueError):  # no control groups, or "max": no limit
        return None


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


# ------------------------------------------------------------------------------------------- the child process only


def _child(modules: list[str]) -> None:
    """Import the modules one by one; one line of JSON each. What packages print themselves goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for module in modules:
        try:
            reply = _imported(module)
        except ModuleNotFoundError as error:
            absent = error.name == module
            reply = {"error": _one_line(error), "kind": "missing" if absent else "broken"}
        except BaseException as error:  # a package may raise anything while it is imported, SystemExit too
            reply = {"error": _one_line(error), "kind": "broken"}
        print(json.dumps({"module": module, **reply}), file=out, flush=True)


def _imported(name: str) -> dict[str, Any]:
    """Version and facts of a module; raises what its import raises."""
    facts: dict[str, Any] = {}
    if name == "torchvision":
        facts = _torchvision_facts()
    module = importlib.import_module(name)
    if name == "torch":
        facts = _torch_facts(module)
    if name == "onnxruntime":
        facts = {"providers": ", ".join(module.get_available_providers())}
    version = getattr(module, "__version__", None)
    if version is None:
        distribution = next(p.name for p in PACKAGES if p.module == name)
        version = importlib.metadata.version(distribution)
    return {"version": str(version).partition("-")[0], **facts}


def _torch_facts(torch: Any) -> dict[str, Any]:
    devices, problem = [], ""
    try:
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        torch.zeros(1).add(1)
        if devices:
            torch.zeros(1, device="cuda").add(1).item()  # a driver that does not fit fails at the first kernel
    except Exception as error:
        devices, problem = [], _one_line(error)
    return {"cuda_build": torch.version.cuda, "devices": devices, "cuda_error": problem}


def _torchvision_facts() -> dict[str, Any]:
    """Import torchvision plainly; where that fails, as paredown's own loader does. Nothing to tell where it works.

    A wheel built for CUDA beside a CPU torch cannot load its library, and then stops at its own first mention of an op:
    "operator torchvision::nms does not exist".
    """
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        first = _one_line(error)
    else:
        return {}
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half-imported
    importlib.import_module("paredown.models").import_torchvision()
    return {"error_without": first, "torch": str(sys.modules["torch"].__version__)}


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


if __name__ == "__main__":
    _child(sys.argv[1:])
