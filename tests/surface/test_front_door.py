"""What users and their scripts rely on: names, import time, the package's own files."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import paredown

ROOT = Path(__file__).parents[2]
VERBS = (
    "capture examine couple score allocate prune choose_ranks factorize recover quantize export check measure compress load"
).split()
NOUNS = "Budget Plan Program".split()
IMPORT_SECONDS = 0.3


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules() -> list[str]:
    """Every module of the package but programs (`__main__`)."""
    found = [m.name for m in pkgutil.walk_packages(paredown.__path__, "paredown.")]
    return ["paredown", *(name for name in found if not name.endswith("__main__"))]


def test_import_is_fast_and_loads_no_torch() -> None:
    """CPU time, which is wall time where the machine does nothing else."""
    code = (
        "import sys, time; start = time.process_time(); import paredown; took = time.process_time() - start\n"
        "print(took); print(sorted({'torch', 'numpy', 'onnx', 'onnxruntime', 'matplotlib'} & set(sys.modules)))"
    )
    runs = [python(code).splitlines() for _ in range(5)]
    assert statistics.median(float(run[0]) for run in runs) < IMPORT_SECONDS
    assert {run[1] for run in runs} == {"[]"}


def test_help_is_fast_and_loads_no_torch() -> None:
    program = Path(sys.executable).with_name("paredown")
    if not program.exists() or not callable(getattr(importlib.import_module("paredown.cli"), "main", None)):
        pytest.skip("no command line is installed beside this Python")
    seconds = []
    while len(seconds) < 15 and sum(s < IMPORT_SECONDS for s in seconds) < 3:  # other work can only add to it
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "compress" in done.stdout
    assert sorted(seconds)[2] < IMPORT_SECONDS
    loaded = python("import sys, paredown.cli; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))")
    assert loaded == "[]"


def test_front_door_has_every_verb_and_nothing_private() -> None:
    names = paredown.__all__
    assert set(VERBS) | set(NOUNS) <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith("_") and name != "__version__"]
    assert set(names) <= set(dir(paredown))


_CHECK_VERBS = f"""
import json, paredown
print(json.dumps([name for name in {VERBS!r} if not callable(getattr(paredown, name)) or type(getattr(paredown, name)).__name__ == "module"]))
"""


@pytest.mark.parametrize(
    "first",
    [
        "",
        "import paredown.score, paredown.export, paredown.examine, paredown.measure",
        pytest.param(
            "from paredown import allocate, prune\nimport paredown.quantize, paredown.train", marks=pytest.mark.slow
        ),
        "import paredown\nfor name in reversed(paredown.__all__): getattr(paredown, name)",
    ],
    ids=["alone", "rooms-first", "mixed", "reversed"],
)
def test_verbs_are_functions_though_rooms_have_the_same_names(first: str) -> None:
    """Importing the room paredown.score sets the attribute `score` of the package: the verb must win."""
    assert json.loads(python(first + "\n" + _CHECK_VERBS)) == []


def test_every_listed_name_is_there() -> None:
    for name in modules():
        module = importlib.import_module(name)
        missing = [n for n in getattr(module, "__all__", ()) if not hasattr(module, n)]
        assert not missing, f"{name}: {missing}"


def test_all_lists_are_sorted() -> None:
    """Constants, then classes, then functions, each by name: the order that ruff keeps."""

    def key(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)

    listed = {name: list(getattr(importlib.import_module(name), "__all__", ())) for name in modules()}
    assert sum(map(bool, listed.values())) > 5
    assert {name: names for name, names in listed.items() if names != sorted(names, key=key)} == {}


def test_verbs_say_what_they_do_and_show_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in VERBS:
        text = inspect.getdoc(getattr(paredown, name)) or ""
        assert len(text.splitlines()) > 3, name
        assert ">>>" in text or f"pare.{name}(" in readme, (
            f"{name} has no example, neither in its docstring nor in the README"
        )


def test_constraints_pin_a_cpu_stack() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    pins = {name: version for name, _, version in (line.partition("==") for line in lines)}
    assert all(re.fullmatch(r"[\w.-]+==\d+(\.\d+)+", line) for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    wanted = {re.split(r"[><=]", text)[0] for extra in ("quant", "onnx", "zoo", "demo") for text in extras[extra]}
    assert wanted | {"torch", "numpy"} <= set(pins)
    assert set(extras["all"][0].removeprefix("paredown[").rstrip("]").split(",")) == set(extras) - {"all"}
    dev = project["dependency-groups"]["dev"]
    assert all(re.fullmatch(r"[\w.-]+==[\d.]+", text) for text in dev)


def test_licence_and_types_are_shipped() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0" and project["requires-python"] == ">=3.11"
    assert (ROOT / "src" / "paredown" / "py.typed").exists()


@pytest.mark.parametrize("script", ["scripts/install", "scripts/demo", "scripts/test", "scripts/check", ".ci/run"])
def test_scripts_are_whole(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111, "not executable"
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    done = subprocess.run([bash, "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_readme_names_what_there_is() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"`{verb}(" not in text] == []
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [extra for extra in extras if f"`{extra}`" not in text] == []
