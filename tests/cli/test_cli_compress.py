"""paredown compress as people use it: a plan first, a run, the same run again, another recipe, bounds, Ctrl-C."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

import forked
from paredown.cli.compress import safe_name, told, verdict
from paredown.records import Record, append

TASK = """
import os, time
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

METRIC = {"name": "accuracy <b>", "unit": "%", "goal": "max"}


def _data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    return torch.randn(count, 1, 8, 8, generator=generator) + 2.0 * labels[:, None, None, None], labels


def model():
    torch.manual_seed(5)
    net = nn.Sequential()
    net.add_module("<script>alert(1)</script>", nn.Conv2d(1, 16, 3))
    net.add_module("relu", nn.ReLU())
    net.add_module("[red]%s{0}", nn.Conv2d(16, 16, 3, stride=2))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(16, 2))
    return net


def inputs():
    return _data(2, 9)[0]


def train_batches():
    print("the user's own words on stdout")
    return list(zip(*(t.split(32) for t in _data(64, 1))))


def calibration_batches():
    return list(_data(64, 2)[0].split(32))


def test_batches():
    return list(zip(*(t.split(50) for t in _data(100, 3))))


def step(model, batch):
    time.sleep(float(os.environ.get("SLOW", "0")))
    return F.cross_entropy(model(batch[0]), batch[1])


def evaluate(predict, batches):
    return {"accuracy <b>": 100.0 * np.concatenate([(predict(x).argmax(1) == y).numpy() for x, y in batches])}
"""
RECIPE = """
schema: 1
name: "a run/../50 %"
task: task.py
threads: 1
prune: {levels: [{channels: 0.5}]}
recover: {epochs: 2, lr: 0.01}
measure: {runs: 5, seconds: 0.1}
"""
ODD = "runs of größe\n#1 [red]"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its finished run."""
    folder = tmp_path_factory.mktemp("place with spaces")
    (folder / "task.py").write_text(TASK, encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    done = forked.run(forked.PAREDOWN, "compress", "recipe.yaml", "--out", ODD, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "first.json").write_text(done.stdout, encoding="utf-8")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and "pycache" not in str(p)
    }


def test_the_document_is_that_of_the_report(call, place, monkeypatch):
    document = json.loads((place / "first.json").read_text())
    assert document["schema"] == 1
    assert document["rows"][0]["stage"] == "dense"
    assert document["rows"][-1]["stage"] == document["verdict"]["recommended"]
    for row in document["rows"]:
        assert row["bytes"] == (place / ODD / row["file"]).stat().st_size
        assert row["metric"]["name"] == "accuracy <b>"
        assert row["metric"]["badge"] == "measured"
        assert row["latency_ms"]["badge"] == "measured"
    monkeypatch.chdir(place)
    done = call("report", ODD, "--json")
    assert (done.code, done.json) == (0, document)


def test_the_run_holds_what_it_should(place):
    assert {"recipe.yaml", "plan.json", "records.jsonl", "report.html", "model.safetensors", "int8.onnx"} <= set(
        files(place / ODD)
    )


def test_fault_75_names_are_escaped_in_the_report(place):
    html = (place / ODD / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in html
    assert "<script>alert" not in html
    assert "accuracy <b>" not in html


def test_report_as_text_makes_the_page_again(call, place, monkeypatch):
    monkeypatch.chdir(place)
    page = place / ODD / "report.html"
    before = page.read_bytes()
    page.unlink()
    done = call("report", ODD)
    assert done.code == 0
    assert page.read_bytes() == before
    assert "accuracy <b>" in done.out
    assert "not tested" in done.out
    wrong = call("report", ".")
    assert (wrong.code, "größe" in wrong.err) == (2, True)


def test_small_figures_are_not_rounded_away():
    row = {"stage": "dense", "bytes": 1234, "parameters": 7, "macs": 8000, "latency_ms": {"median": 0.0004}}
    row["metric"] = {"name": "error", "unit": "g{}", "value": 0.0031}
    told = {"target_met": None, "recommended": None, "not_tested": []}
    drawn, said = verdict({"verdict": told, "rows": [row]})
    cells = [next(iter(column.cells)).plain for column in drawn.columns]
    assert cells == ["dense", "1,234", "100.0 %", "0.003100 g{}", "0.000400", "7", "8,000"]
    assert said == "recommended: nothing yet (not finished)"  # its recipe may well have bounds


def test_the_same_command_is_done_at_once(call, place, monkeypatch):
    """And what a kill left behind is cleaned (fault 92)."""
    monkeypatch.chdir(place)
    before = files(place / ODD)
    (place / ODD / "steps" / ".level-1.safetensors.abc.tmp").write_bytes(b"half")
    done = call("compress", "recipe.yaml", "--out", ODD)
    assert done.code == 0, done.err
    assert "recommended" in done.out
    after = files(place / ODD)
    assert after == before


def test_fault_76_another_recipe_is_refused_with_the_difference(call, place, monkeypatch):
    monkeypatch.chdir(place)
    before = files(place / ODD)
    done = call("compress", "recipe.yaml", "--out", ODD, "--set", "recover.lr=0.5")
    assert done.code == 2
    assert "recover.lr: 0.01 → 0.5" in done.err
    assert "--overwrite" in done.err
    assert files(place / ODD) == before


def test_fault_73_the_folder_of_the_recipe_is_never_a_run(call, place, monkeypatch):
    monkeypatch.chdir(place)
    before = files(place)
    for extra in ((), ("--overwrite",)):
        done = call("compress", "recipe.yaml", "--out", ".", *extra)
        assert done.code == 2
        assert "folder of the" in done.err
    assert files(place) == before


def test_fault_5_a_bound_that_does_not_hold_still_tells_the_verdict(call, place, tmp_path, monkeypatch):
    """100 bytes are asked for, which no file of a network has."""
    monkeypatch.chdir(place)
    done = call("compress", "recipe.yaml", "--out", tmp_path / "run", "--set", "budget.size_bytes=100", "--json")
    assert done.code == 4
    assert done.json["verdict"]["target_met"] is False
    assert "size_bytes" in done.err
    assert (tmp_path / "run/report.html").is_file()


def test_dry_run(call, place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    before = files(place)
    done = call("compress", "recipe.yaml", "--out", tmp_path / "new", "--dry-run", "--strict")
    assert done.code == 0, done.err
    assert "50.0 %" in done.out
    assert "<script>alert(1)</script>" in done.out
    assert files(place) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("level", "says"),
    [
        ("{density: 0.25, granularity: element}", "effective MACs (estimated)"),
        ("{macs: 0.7, factorize: svd}", "svd"),
        ("{granularity: '2:4'}", "2:4"),
    ],
)
def test_dry_run_of_masks_and_low_rank(call, place, monkeypatch, tmp_path, level, says):
    monkeypatch.chdir(place)
    done = call(
        "compress", "recipe.yaml", "--out", tmp_path / "new", "--dry-run",
        "--set", f"prune.levels=[{level}]", "--set", "prune.criterion=l2",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert says in done.out
    assert not (tmp_path / "new").exists()


def test_the_default_folder_is_named_after_the_recipe(place):
    assert safe_name("a run/../50 %") == "a-run-..-50"
    for name in ("..", "/", "-rf", "...", "", "a" * 300, "C:\\x", "\n", "🙂"):
        made = safe_name(name)
        assert made
        assert not made.startswith((".", "-"))
        assert "/" not in made
        assert len(made) <= 80


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_fault_80_interrupted_and_continued(place, tmp_path, times):
    """Once ends at a safe point within 5 s, twice ends now; both continue to the same files."""
    command = ("compress", "recipe.yaml", "--out", tmp_path / "run")
    running = forked.start(forked.PAREDOWN, *command, cwd=place, env={"SLOW": "0.3"})
    while "recover" not in running.stderr and running.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    start = time.monotonic()
    for _ in range(times):
        running.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert running.wait(timeout=60) == 130, running.stderr
    assert time.monotonic() - start < 5
    said = running.stderr
    assert "stopping at a safe point" in said
    assert "Traceback" not in said
    if times == 1:
        assert "The same command resumes" in said
    done = forked.run(forked.PAREDOWN, *command, cwd=place)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "run").rglob("*.tmp"))
    for name in ("model.safetensors", "plan.json", "int8.onnx", "recipe.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (place / ODD / name).read_bytes(), name


def test_the_users_own_failure_is_theirs(call, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    (tmp_path / "task.py").write_text(TASK + "\n\ndef step(model, batch):\n    return 1 / 0\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    done = call("compress", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert done.code == 3, done.err
    assert "ZeroDivisionError" in done.err
    assert "task.py" in done.err


def test_what_was_odd_is_told_in_the_terminal_and_not_in_the_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(cell={"stage": "verdict"}, details={"recommended": None, "warnings": ["every answer is the same"]})
    append(tmp_path / "records.jsonl", record)
    told(tmp_path, json=False, quiet=False)
    assert "note: every answer is the same" in capsys.readouterr().out
    told(tmp_path, json=True, quiet=False)
    assert json.loads(capsys.readouterr().out)["verdict"].keys() == {"target_met", "recommended", "not_tested"}
