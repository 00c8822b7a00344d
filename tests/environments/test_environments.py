"""Environments of their own: made with pip from a wheel that the test writes, so that nothing comes from a network."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from paredown import environments
from paredown.cli import main
from paredown.environments import READY, folder_of, is_ready, make, python_of
from paredown.errors import MissingError, ResourceError, UsageError
from paredown.export import Artifact, check, export
from paredown.export.child import Child
from paredown.export.processes.serve import receive, send
from paredown.export.session import open_session
from paredown.program import capture
from paredown.target import TARGETS, Target, named

OWN = ("executorch-xnnpack", "litert")


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of environments that is empty, and a pip that knows of one wheel."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tiny_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_thing.py", "VALUE = 7\n")
        wheel.writestr("tiny_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_thing-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PAREDOWN_ENVIRONMENTS", str(tmp_path / "environments"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    return tmp_path / "environments"


def tiny(module: str = "tiny_thing") -> Target:
    return dataclasses.replace(named("litert"), environment=("tiny-thing==1.0",), own_modules=(module,))


def test_made_once_used_and_made_anew() -> None:
    target, told = tiny(), list[str]()
    with pytest.raises(MissingError, match="paredown setup litert"):
        python_of(target)
    folder = make(target, say=told.append)
    assert json.loads((folder / READY).read_text()) == {"versions": {"tiny-thing": "1.0"}}
    assert any("tiny-thing" in line.replace("_", "-") for line in told), told
    command = [str(python_of(target)), "-I", "-c", "import tiny_thing; print(tiny_thing.VALUE)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "7\n"
    assert is_ready(target)
    assert not is_ready(named("litert"))  # other versions, another folder

    mark = folder / "mark"
    mark.touch()
    told.clear()
    assert make(target, say=told.append) == folder
    assert mark.exists()
    assert len(told) == 1
    make(target, overwrite=True)
    assert not mark.exists()
    assert is_ready(target)


def test_an_import_that_fails_leaves_nothing() -> None:
    with pytest.raises(MissingError, match="importable"):
        make(tiny("not_there"))
    assert not folder_of(tiny("not_there")).exists()


def test_packages_that_are_not_found_leave_nothing(capsys: pytest.CaptureFixture[str], nowhere: Path) -> None:
    assert main(["setup", "litert"]) == 8
    assert "torch==2.13.0" in capsys.readouterr().err
    assert [p.name for p in nowhere.iterdir()] == [f".{folder_of(named('litert')).name}.lock"]


def test_an_interruption_leaves_nothing() -> None:
    def stop(line: str) -> None:
        if line.startswith("Processing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tiny(), say=stop)
    assert not folder_of(tiny()).exists()


def test_what_a_kill_left_is_not_used_and_replaced() -> None:
    folder = folder_of(tiny())
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "half").touch()
    with pytest.raises(MissingError, match="paredown setup"):
        python_of(tiny())
    make(tiny())
    assert not (folder / "half").exists()


def test_one_whose_python_is_gone_is_made_anew_by_the_command_that_is_recommended() -> None:
    target = tiny()
    python = make(target) / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python")
    assert not is_ready(target)
    with pytest.raises(MissingError, match="Run: paredown setup litert"):
        python_of(target)
    make(target)
    assert is_ready(target)
    assert subprocess.run([python_of(target), "-c", ""], check=False).returncode == 0


def test_one_process_at_a_time(nowhere: Path) -> None:
    nowhere.mkdir()
    with (nowhere / f".{folder_of(tiny()).name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ResourceError, match="one process at a time"):
            make(tiny())


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PAREDOWN_ENVIRONMENTS", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match="PAREDOWN_ENVIRONMENTS"):
        make(tiny())


@pytest.mark.parametrize("name", ["onnxruntime-x86", "no-such-runtime"])
def test_other_targets_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        make(name)
    assert main(["setup", name]) == 2


def test_every_environment_pins_all_that_it_installs() -> None:
    assert {t.name for t in TARGETS.values() if t.environment} == set(OWN)
    for name in OWN:
        pinned = environments._constraints(named(name)).read_text().split()
        assert len(pinned) > 40
        assert all(line.count("==") == 1 for line in pinned)
        assert set(named(name).environment) <= set(pinned)


# ------------------------------------------------------------------------------------------- without the environment


@pytest.mark.parametrize(("name", "suffix"), [("executorch-xnnpack", ".pte"), ("litert", ".tflite")])
def test_every_verb_names_the_command(name: str, suffix: str, tmp_path: Path) -> None:
    program = capture(nn.Sequential(nn.Conv2d(1, 2, 3)), torch.zeros(2, 1, 4, 4), train=False)
    file = tmp_path / f"net{suffix}"
    artifact = Artifact(files=(file,), target=name, scheme="fp32")
    for call in (
        lambda: export(program, file, target=name),
        lambda: check(artifact, program, [torch.zeros(2, 1, 4, 4)]),
        lambda: open_session(file),
    ):
        with pytest.raises(MissingError, match=f"paredown setup {name}$"):
            call()
    assert not file.exists()


# ------------------------------------------------------------------------------------------------------ the child


def fake_python(target: Target, script: str) -> None:
    """An environment whose Python is a script of ours."""
    folder = folder_of(target)
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "python").chmod(0o755)
    (folder / READY).write_text("{}")


@pytest.mark.parametrize(
    ("script", "told"),
    [("echo of no use; echo the last line >&2; exit 3", "exit code 3: the last line"), ("kill -9 $$", "out of memory")],
)
def test_a_child_that_dies_is_told(script: str, told: str) -> None:
    fake_python(named("litert"), script)
    child = Child("litert")
    with pytest.raises(ResourceError, match=told):
        child.ask("load", path="x", threads=1)
    assert not child.alive
    child.close()


def test_a_child_answers_with_errors_and_lives() -> None:
    serve = Path(environments.__file__).parent / "export" / "processes" / "serve.py"
    command = [sys.executable, "-s", "-E", str(serve), "executorch_process"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        for _ in range(2):
            send(child.stdin, {"do": "nothing that is known"}, [torch.ones(2, 3).numpy()])
            reply, arrays = receive(child.stdout)
            assert (reply["kind"], arrays) == ("KeyError", [])
        child.stdin.close()
        assert child.wait(timeout=20) == 0


def test_arrays_arrive_as_they_were(tmp_path: Path) -> None:
    sent = [torch.randn(2, 0, 3).numpy(), torch.randn(()).numpy(), torch.arange(6).reshape(2, 3).t().numpy()]
    with (tmp_path / "wire").open("wb") as out:
        send(out, {"do": "x", "n": 1}, sent)
    with (tmp_path / "wire").open("rb") as source:
        message, arrived = receive(source)
        with pytest.raises(EOFError):
            receive(source)
    assert message == {"do": "x", "n": 1}
    assert all(a.dtype == b.dtype and a.shape == b.shape and (a == b).all() for a, b in zip(sent, arrived, strict=True))
