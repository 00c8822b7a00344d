"""One run on every runtime at hand: the same network, exported for each, timed in one schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torchao")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from paredown.cli import main
from paredown.errors import RejectedError
from paredown.export import predictor
from paredown.measure import artifact_at
from paredown.pipeline import compress
from paredown.pipeline.runtimes import files_for_runtimes, is_run
from paredown.recipe import Recipe, parse_recipe

TASK = Path(__file__).with_name("small_task.py")


def recipe(**more: Any) -> Recipe:
    return parse_recipe(
        {
            "schema": 1, "name": "small", "task": str(TASK), "threads": 1, "prune": {"align": 4, "levels": [{"channels": 0.5}]},
            "recover": {"epochs": 1, "lr": 0.02, "batch_norm_batches": 4}, "measure": {"runs": 5, "seconds": 0.1}, **more,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runtimes") / "run"
    compress(recipe(), out=out, quiet=True)
    return out


def test_one_run_is_timed_on_every_runtime(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert (
        main(["compare", str(run), "--out", str(tmp_path / "files"), "--seconds", "0.2", "--runs", "5", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    timed = {(Path(t["file"]).name, t["runtime"]) for t in found["timings"]}
    assert {
        ("fp32.onnx", "onnxruntime"),
        ("int8.onnx", "onnxruntime"),
        ("fp32.xml", "openvino"),
        ("int8.xml", "openvino"),
    } <= timed
    assert found["fastest"] is not None
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    made = artifact_at(tmp_path / "files" / "onnxruntime-x86" / "fp32.onnx")
    images = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)
    answers = [
        predictor(a)(__import__("torch").from_numpy(images)).numpy() for a in (made, artifact_at(run / "level-1.onnx"))
    ]
    np.testing.assert_allclose(*answers, atol=1e-5)  # it is the pruned network, as it was trained


def test_what_was_made_for_one_runtime_is_not_repeated(tmp_path: Path) -> None:
    compress(recipe(quantize={"epochs": 1}), out=tmp_path / "run", quiet=True)
    files, notes, _ = files_for_runtimes(tmp_path / "run", tmp_path / "files")
    assert [f.name for f in files] == ["fp32.onnx", "fp32.xml"]
    assert len(notes) == 2 and all("epochs" in n and "not repeated" in n for n in notes)


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    assert "a run of `paredown compress`" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "--out must stand with one run" in capsys.readouterr().err


def test_a_run_is_read_and_never_trained(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads than the run's, and no dense weights: a pruned network carries its own."""
    import shutil

    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "steps" / "base-trained.safetensors").unlink()
    monkeypatch.setattr("paredown.train.fit", lambda *_, **__: pytest.fail("it trained"))
    files, _, _ = files_for_runtimes(copied, tmp_path / "files")
    assert {f.name for f in files} >= {"fp32.onnx", "int8.onnx"}
    assert not (copied / "steps" / "base-trained.safetensors").exists()
    (copied / "form.json").unlink()
    with pytest.raises(RejectedError, match=r"must hold its trained dense network.*Run its recipe again"):
        files_for_runtimes(copied, tmp_path / "files")
    records = (copied / "records.jsonl").read_text().splitlines()
    (copied / "records.jsonl").write_text("\n".join(r for r in records if '"verdict"' not in r) + "\n")
    assert not is_run(copied) and is_run(run)
