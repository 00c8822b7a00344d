"""The main job on the embedded default, real images, through the real runtime."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("torchao")
pytest.importorskip("sklearn")


SHORT = ["base.epochs=12", "recover.epochs=4"]
"""All of it in 40 epochs in place of 100; every bound below holds all the same."""


@pytest.fixture(scope="module", params=[SHORT, pytest.param([], marks=pytest.mark.slow)], ids=["short", "as shipped"])
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from paredown.pipeline import compress

    out = tmp_path_factory.mktemp("digits") / "run"
    compress("digits", out=out, overrides=request.param, quiet=True)
    return out


@pytest.fixture(scope="module")
def stages(out: Path) -> dict[str, dict]:
    return {r["cell"]["stage"]: r for r in map(json.loads, (out / "records.jsonl").read_text().splitlines())}


def test_the_int8_file_is_small_and_as_good(out: Path, stages: dict[str, dict]) -> None:
    dense, int8 = stages["dense"]["measured"], stages["int8"]["measured"]
    assert stages["verdict"]["details"]["recommended"] == "int8"
    assert dense["parameters"]["value"] <= 300_000
    assert dense["metric"]["n"] >= 540
    assert dense["metric"]["value"] >= 98
    assert (out / "dense.onnx").stat().st_size >= 8 * (out / "int8.onnx").stat().st_size
    assert dense["stripped_bytes"]["value"] >= 8 * int8["stripped_bytes"]["value"]
    assert dense["metric"]["value"] - int8["metric"]["value"] <= 1.0
    assert int8["metric_change"]["low"] < int8["metric_change"]["value"] < int8["metric_change"]["high"]


def test_a_bound_on_the_metric_knows_how_far_the_loss_may_reach(stages: dict[str, dict]) -> None:
    (bound,) = [b for b in stages["verdict"]["details"]["bounds"] if b["what"] == "metric_loss"]
    assert bound["high"] == -stages["int8"]["measured"]["metric_change"]["low"] > bound["value"]


def test_nothing_stayed_float(stages: dict[str, dict]) -> None:
    details = stages["int8"]["details"]
    assert details["float_nodes"] == []
    assert sum("Conv" in n for n in details["int8_nodes"]) == 6, "six convolutions"


def test_values_per_sample_are_kept_for_comparisons(out: Path, stages: dict[str, dict]) -> None:
    from paredown.measure.quality import kept_values

    for stage in ("dense", "int8"):
        values, metric = kept_values(out, stage), stages[stage]["measured"]["metric"]
        assert values is not None and len(values) == metric["n"]
        assert values.mean() == pytest.approx(metric["value"])
    assert len(stages["verdict"]["details"]["test_data"]) == 64


def test_the_twin_stands_beside(stages: dict[str, dict]) -> None:
    twin, int8 = stages["twin-int8"]["measured"], stages["int8"]["measured"]
    assert abs(twin["parameters"]["value"] / int8["parameters"]["value"] - 1) < 0.1
    assert twin["metric"]["badge"] == "measured"


def test_the_twin_is_paired_with_the_pruned_file(out: Path, stages: dict[str, dict]) -> None:
    pruned, dense = (np.load(out / "steps" / f"values-{name}.npy") for name in ("int8", "twin-int8"))
    found = stages["twin-int8"]["measured"]["change_from_pruned"]
    assert found["value"] == pytest.approx(dense.mean() - pruned.mean())
    assert found["low"] < found["value"] < found["high"] and found["n"] == len(dense)
    assert "change_from_pruned" not in stages["int8"]["measured"]
    assert stages["verdict"]["details"]["name"] == "digits"


def test_accuracy_is_that_of_the_file_by_hand(out: Path, stages: dict[str, dict]) -> None:
    """Counted here with the runtime alone, not with paredown's predictor or evaluate."""
    import onnxruntime
    from sklearn.datasets import load_digits

    from paredown.recipes import digits

    session = onnxruntime.InferenceSession(out / "int8.onnx", providers=["CPUExecutionProvider"])
    images = torch.cat([x for x, _ in digits.test_batches()]).numpy()
    labels = torch.cat([y for _, y in digits.test_batches()]).numpy()
    logits = session.run(None, {session.get_inputs()[0].name: images})[0]
    assert 100 * np.mean(logits.argmax(1) == labels) == pytest.approx(stages["int8"]["measured"]["metric"]["value"])
    real = {row.astype(np.float32).tobytes() for row in load_digits(return_X_y=True)[0]}
    assert all((16 * image).astype(np.float32).tobytes() in real for image in images.reshape(len(images), -1))


def test_the_saved_model_loads_in_its_class(out: Path) -> None:
    from paredown.prune import load
    from paredown.recipes import digits

    loaded = load(out, digits.model())
    batches = digits.test_batches()
    hits = torch.cat([loaded(x).argmax(1) == y for x, y in batches]).float().mean()
    stage = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    level = next(r for r in stage if r["cell"]["stage"] == "level-2")
    assert 100 * float(hits) == pytest.approx(level["measured"]["metric"]["value"], abs=1e-4)


def test_no_machine_in_the_exports(out: Path) -> None:
    import getpass

    for file in out.glob("*.onnx"):
        content = file.read_bytes()
        for trace in (
            str(Path.home()).encode(),
            str(Path.cwd()).encode(),
            b"site-packages",
            b".py",
            getpass.getuser().encode() + b"/",
        ):
            assert trace not in content, (file.name, trace)


def test_the_snippet_runs(out: Path, stages: dict[str, dict]) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", stages["verdict"]["details"]["snippet"]],
        cwd=out,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(1, 10)" in done.stdout
