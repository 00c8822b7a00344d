"""The doctor says what is here, and a broken package is a finding, never the end of the doctor."""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from paredown import doctor
from paredown.doctor import PACKAGES, Diagnosis, Finding, Package, diagnose, probe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def here() -> tuple[Diagnosis, float]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = diagnose()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture
def broken_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Package, ...]:
    """Packages that do at import what broken ones do, with a healthy one after each of the worst."""
    bodies = {
        "sick_segfault": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        "fine_noisy": '__version__ = \'2.0\'\nimport os\nos.write(1, b\'{"module": "fine_noisy", "error": "not JSON of ours"}\\n\')',
        "sick_hangs": "import time\ntime.sleep(600)",
        "fine_later": "__version__ = '3.1'",
        "sick_exits": "raise SystemExit(3)",
        "sick_raises": "raise RuntimeError('operator other::op does not exist\\n[red]second line')",
        "sick_needs": "import not_there_at_all",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return (*(Package(name, name, "zoo", "1.0") for name in bodies), Package("gone", "gone_entirely", "zoo", "1.0"))


def _found(diagnosis: Diagnosis) -> dict[str, Finding]:
    return {check.name: check for check in diagnosis.checks}


def test_packages_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {("", text) for text in project["dependencies"]}
    for extra, texts in project["optional-dependencies"].items():
        wanted |= {(extra, text) for text in texts if extra != "all"}
    assert {(p.extra, f"{p.name}>={p.oldest}") for p in PACKAGES} == wanted


def test_here_nothing_required_is_broken(here: tuple[Diagnosis, float]) -> None:
    diagnosis, seconds = here
    found = _found(diagnosis)
    assert diagnosis.exit_code == 0
    assert found["torch"].state == "ok" and found["torch"].found.startswith(importlib.metadata.version("torch"))
    assert found["numpy"].found == importlib.metadata.version("numpy")
    assert found["onnxruntime"].extra == "onnx"
    assert found["device"].found
    # Of processor time, in all processes. It does not wait for other work, but runs slower beside it on one core.
    assert seconds < 20


def test_every_package_is_named_once_and_every_problem_says_what_to_do(here: tuple[Diagnosis, float]) -> None:
    checks = here[0].checks
    names = [check.name for check in checks]
    assert len(names) == len(set(names))
    assert {p.name for p in PACKAGES} <= set(names)
    assert {"onnxruntime-x86", "onnxruntime-arm", "openvino-x86"} <= set(names)
    own = [c for c in checks if c.name in ("litert", "executorch-xnnpack")]
    assert all(c.state == "ok" or f"paredown setup {c.name}" in c.fix for c in own)
    assert len(own) == 2
    assert all(c.fix for c in checks if c.state != "ok")
    assert not any(c.fix for c in checks if c.state == "ok")


def test_torchvision_is_ok_only_where_a_plain_import_works(here: tuple[Diagnosis, float]) -> None:
    try:
        importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("torchvision is not installed")
    plain = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    check = _found(here[0])["torchvision"]
    if plain.returncode == 0:
        assert check.state == "ok"
    else:
        assert check.state == "warn"
        assert "torchvision::nms does not exist" in check.found and "torchvision::qnms" in check.found
        assert "whl/cpu" in check.fix or "whl/cu" in check.fix
        assert _found(here[0])["timm"].state == "ok"  # it needs torchvision: the declarations let it in


def test_one_broken_package_hides_no_other(broken_packages: tuple[Package, ...]) -> None:
    start = time.monotonic()
    replies = probe(broken_packages, timeout_s=3)
    assert time.monotonic() - start < 30
    assert replies["fine_noisy"]["version"] == "2.0"
    assert replies["fine_later"]["version"] == "3.1"
    states = {p.name: doctor._package(p, replies[p.module]) for p in broken_packages}
    assert {name: f.state for name, f in states.items()} == {
        "sick_segfault": "broken",
        "fine_noisy": "ok",
        "sick_hangs": "broken",
        "fine_later": "ok",
        "sick_exits": "broken",
        "sick_raises": "broken",
        "sick_needs": "broken",
        "gone": "missing",
    }
    assert "Segmentation fault" in states["sick_segfault"].found
    assert "3 s" in states["sick_hangs"].found
    assert "not_there_at_all" in states["sick_needs"].found
    assert "\n" not in states["sick_raises"].found
    assert states["gone"].fix == "pip install 'paredown[zoo]'"


@pytest.mark.parametrize(
    ("reply", "extra", "state"),
    [
        ({"version": "2.12.1+cpu"}, "", "ok"),
        ({"version": "2.9.1"}, "", "broken"),
        ({"version": "2.9.1"}, "zoo", "warn"),
        ({"version": "2.11"}, "", "ok"),
        ({"version": "3"}, "", "ok"),
    ],
)
def test_too_old_is_judged_by_numbers_not_by_text(reply: dict[str, str], extra: str, state: str) -> None:
    assert doctor._package(Package("torch", "torch", extra, "2.11"), reply).state == state


def test_exit_code_is_about_what_is_required() -> None:
    fine = Finding(name="torch", state="ok", found="2.13", required=True)
    optional = Finding(name="onnx", state="broken", found="died", fix="reinstall")
    required = Finding(name="numpy", state="missing", found="not installed", fix="install", required=True)
    assert Diagnosis(checks=(fine, optional)).exit_code == 0
    assert Diagnosis(checks=(fine, optional, required)).exit_code == 8


def test_json_holds_every_field(here: tuple[Diagnosis, float]) -> None:
    document = json.loads(here[0].to_json())
    assert document["schema"] == 1 and document["exit_code"] == 0
    assert len(document["checks"]) == len(here[0].checks)
    assert all(set(c) == {"name", "state", "found", "fix", "extra", "required"} for c in document["checks"])
    assert {c["state"] for c in document["checks"]} <= {"ok", "warn", "missing", "broken"}


@pytest.mark.parametrize("width", [40, 100])
def test_table_shows_names_as_they_are_and_fits(width: int) -> None:
    nasty = Finding(name="[red]x[/red]", state="broken", found="a [link=y]b " * 20, fix="do [bold]that")
    out = io.StringIO()
    Console(file=out, width=width).print(Diagnosis(checks=(nasty,)))
    text = out.getvalue()
    assert "[red]" in text and "[link=y]" in text
    assert max(len(line) for line in text.splitlines()) <= width
    assert "do [bold]that" in str(Diagnosis(checks=(nasty,)))


@pytest.mark.parametrize(
    ("isa", "state", "word"),
    [
        (["avx2", "avx512f", "avx512_vnni", "amx_int8"], "ok", "AMX, AVX-512 VNNI"),
        (["avx2"], "warn", "saturate"),
        (["asimd", "asimddp"], "ok", "dotprod"),
        (["asimd"], "warn", "dotprod"),
        ([], "ok", "not known"),
    ],
)
def test_instruction_sets_explain_int8(isa: list[str], state: str, word: str) -> None:
    dot = bool({"avx512_vnni", "asimddp"} & set(isa))
    finding = doctor._int8({"isa": isa, "cpu": "a processor", "int8_dot": dot})
    assert finding.state == state
    assert word in finding.found


def test_small_disk_and_shared_memory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**8, total=64 * 2**20))
    found = {f.name: f for f in doctor._places()}
    assert found["disk"].state == "warn" and "0.1 GB" in found["disk"].found
    if sys.platform == "linux":
        assert found["/dev/shm"].state == "warn" and "--shm-size" in found["/dev/shm"].fix


def test_a_temporary_folder_that_cannot_be_written_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(ROOT / "no" / "such" / "folder"))
    finding = doctor._temporary()
    assert finding.state == "broken" and finding.required and "TMPDIR" in finding.fix


def test_accelerator_with_a_driver_that_does_not_fit() -> None:
    torch = {"version": "2.13", "cuda_build": "13.0", "devices": [], "cuda_error": "RuntimeError: driver too old"}
    (finding,) = doctor._accelerator(torch)
    assert finding.state == "warn" and "driver too old" in finding.found and "nvidia-smi" in finding.fix
    (finding,) = doctor._accelerator({**torch, "devices": ["A GPU"], "cuda_error": ""})
    assert finding.state == "ok" and "A GPU" in finding.found


def test_importing_the_doctor_needs_the_standard_library_only() -> None:
    code = "import sys, paredown.doctor; print([m for m in ('torch', 'numpy', 'rich', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\[\]\s*", done.stdout)
