"""paredown sensitivity: tables, one document, bad options, Ctrl-C, and the report of a folder again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paredown.cli.sensitivity import told

TASK = Path(__file__).parents[1] / "pipeline" / "sensitive_task.py"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(f"schema: 1\nname: own\ntask: {TASK}\n")
    return path


def test_tables_a_document_and_the_report_again(call: Any, recipe: Path, tmp_path: Path) -> None:
    done = call("sensitivity", recipe, "--bits", "4,2", "--amounts", "0.5")
    assert done.code == 0 and "50 % out" in done.out and "2 bits" in done.out and "verdict: Cut" in done.out
    folder = tmp_path / "runs" / "own-sensitivity"
    assert {p.name for p in folder.iterdir()} >= {"report.html", "sensitivity.csv", "sensitivity.json", "records.jsonl"}
    document = call("sensitivity", recipe, "--bits", "4,2", "--amounts", "0.5", "--json").json
    assert document["schema"] == 1 and document["units"]["columns"] == [50.0]
    assert call("report", folder, "--json").json == document
    page = (folder / "report.html").read_bytes()
    assert call("report", folder).code == 0 and (folder / "report.html").read_bytes() == page
    plan = call("compress", recipe, "--dry-run", "--set", "prune.allocation=greedy", "--set", f"prune.sensitivity={folder}",
                "--set", "prune.levels=[{macs: 0.7}]", "--json")  # fmt: skip
    assert plan.code == 0 and plan.json["macs"][1] < plan.json["macs"][0]


def test_calibration_samples_are_not_called_held_out(call: Any, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(TASK.read_text().replace("def choose_batches", "def not_choose_batches"))
    recipe.write_text("schema: 1\nname: own\ntask: task.py\n")
    done = call("sensitivity", recipe, "--bits", "4", "--amounts", "none")
    assert done.code == 0, done.err
    assert "on 64 calibration samples (which training may have seen)" in done.out
    assert "held-out" not in done.out + done.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--amounts", "half"), "--amounts must be numbers by commas"),
        (("--bits", "4,x"), "--bits must be numbers by commas"),
        (("--amounts", "1.5"), "amounts must be fractions in (0, 1)"),
        (("--bits", "9"), "bits must be integers from 1 to 8"),
        (("--amounts", "none", "--bits", "none"), "amounts or bits"),
        (("--set", "prune.exclude=[nothing*]"), "nothing*"),
    ],
)
def test_bad_options_are_told(call: Any, recipe: Path, options: tuple[str, ...], said: str) -> None:
    done = call("sensitivity", recipe, *options)
    assert (done.code, said in done.err) == (2, True)


def test_stopped_it_says_so_and_goes_on(call: Any, recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "count").touch()
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    monkeypatch.setenv("STOP", "4")
    done = call("sensitivity", recipe, "--out", "out")
    assert (done.code, "interrupted" in done.err, "resumes" in done.err) == (130, True, True)
    assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) == 2
    monkeypatch.delenv("STOP")
    assert call("sensitivity", recipe, "--out", "out", "--quiet").code == 0


@pytest.mark.parametrize(
    ("unit", "said"), [("", "loss of r2, on 65"), ("g", "loss of r2 in g, on 65"), ("%", "loss of r2 in points, on 65")]
)
def test_a_metric_without_a_unit_is_told_without_one(unit: str, said: str) -> None:
    document: dict[str, Any] = {
        "units": None, "bits": None, "metric": {"name": "r2", "unit": unit, "goal": "max"}, "distance": {"name": "mse"},
        "num_samples": 65, "data": "choose_batches", "together": [], "verdict": "none",
    }  # fmt: skip
    assert told(document)[0] == f"cells: {said} held-out samples"
