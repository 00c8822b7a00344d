"""paredown curve: the grid before any work, bad input, another recipe, Ctrl-C, and the report of a sweep again."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import forked
from curve_records import head, sweep

pytest.importorskip("onnxruntime")

TASK = Path(__file__).parents[1] / "pipeline" / "curve_task.py"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "moons.yaml"
    made = {
        "schema": 1, "name": "moons", "task": str(TASK), "prune": {"align": 4}, "recover": {"epochs": 1},
        "curve": {"amounts": [0.5], "seeds": [0], "controls": {"kinds": []}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(made))
    return path


def test_a_dry_run_is_the_grid(call: Any, recipe: Path, tmp_path: Path) -> None:
    many = ("--set", "curve.amounts=[0.75, 0.5]", "--set", "curve.seeds=[0, 1]", "--set", "curve.controls.kinds=[thin]")
    done = call("curve", str(recipe), "--out", "run", "--dry-run", "--json", "--processes", "3", *many)
    assert done.code == 0
    found = done.json
    assert (found["dry_run"], found["processes"], found["threads"]) == (True, 3, 1)
    assert [c["kind"] for c in found["cells"]].count("pruned") == 4
    assert len({c["digest"] for c in found["cells"]}) == 2 + 4 + 4
    assert not (tmp_path / "run").exists()
    text = call("curve", str(recipe), "--dry-run").out
    assert "2 trials" in text and "nothing was trained or written" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("curve.amounts=[]", "the grid is empty"),
        ("curve.amounts=[1]", "always on the curve"),
        ("curve.amounts=[0]", "Nothing would remain"),
        ("curve.amounts=[0.5,0.5]", "each cell once"),
        ("curve.limit=1 %", "in the metric's own unit"),
        ("curve.methods=[taylr]", "Did you mean 'taylor'"),
        ("curve.schedules=[multilevel]", "Did you mean 'multi-level'"),
        ("curve=null", "must have a section `curve`"),
    ],
)
def test_bad_input_is_refused_before_any_work(call: Any, recipe: Path, tmp_path: Path, change: str, said: str) -> None:
    done = call("curve", str(recipe), "--out", "run", "--set", change)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert not (tmp_path / "run").exists()


def test_processes_must_be_a_number_of_processes(call: Any, recipe: Path) -> None:
    done = call("curve", str(recipe), "--out", "run", "--processes", "0")
    assert done.code == 2
    assert "--processes must be ≥ 1" in done.err


def start(recipe: Path, out: Path) -> forked.Forked:
    return forked.start(forked.PAREDOWN, "curve", recipe, "--out", out, "--processes", "1")


def test_ctrl_c_says_how_to_go_on_and_another_recipe_is_refused(call: Any, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(recipe, out)
    deadline = time.monotonic() + 120
    while not list(out.glob("trials/*/steps/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(out.glob("trials/*/steps/*")), "no trial began"
    process.send_signal(
        signal.SIGSTOP
    )  # it must not end before it is interrupted, however long the other takes to start
    second = start(recipe, out)
    second.wait()
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "must have one owner" in second.stderr
    assert re.search("[01] of 2 trials are done or marked; the same command goes on with the others", process.stderr)
    done = call("curve", str(recipe), "--out", "run", "--set", "recover.epochs=2")
    assert done.code == 2
    assert "recover.epochs: 1 → 2" in done.err


def test_a_narrow_terminal_gets_lines_in_the_place_of_broken_words(
    call: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert (
        "base\n  method: \n  schedule: \n  trials: 1\npruned\n  method: l1\n"
        in call("curve", str(recipe), "--dry-run").out
    )
    monkeypatch.setenv("COLUMNS", "80")
    assert "method: l1" not in call("curve", str(recipe), "--dry-run").out


def test_a_sweep_is_reported_again_from_its_records(call: Any, tmp_path: Path) -> None:
    records = [head(cells=6), *sweep({0.5: [98.0, 97.9]}, [98.5, 98.4])]
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/records.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    done = call("report", "sweep")
    assert done.code == 0
    assert "sweet spot: l1 one-shot with 50.0 % of the weights removed" in " ".join(done.out.split())
    assert "dense verdict: Not tested" in done.out
    assert (tmp_path / "sweep/report.html").stat().st_size > 5_000
    found = call("report", "sweep", "--json").json
    assert found["sweet_spot"]["amount"] == 0.5
    assert json.dumps(found)
