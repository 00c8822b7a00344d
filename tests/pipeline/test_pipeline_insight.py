"""The closer look of a run: every figure by hand, a whole run of a regression, and what a wrong slices() is told."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from paredown.errors import RejectedError
from paredown.measure.disturbed import disturbances, disturbed, is_pictures
from paredown.measure.peak import machine_peaks
from paredown.pipeline.compress import compress
from paredown.pipeline.insight import _apart, changed, traffic
from paredown.program import capture
from paredown.recipe import load_recipe
from paredown.records import read

pytest.importorskip("onnxruntime")
TASK = Path(__file__).with_name("regression_task.py")


# ------------------------------------------------------------------------------------------------------------ for whom


def test_turns_and_the_samples_that_turned() -> None:
    dense = np.array([100.0, 100, 0, 0, 100, 100, 100, 0])
    now = np.array([100.0, 0, 100, 0, 0, 100, 100, 0])
    found = changed(dense, now, {"id": list("abcdefgh")}, "max", "%")
    assert found["turns"] == {"gained": 1, "lost": 2, "both": 3, "neither": 2} and found["worst"] is None
    assert [m["id"] for m in found["most"]] == ["b", "e"] and [m["id"] for m in found["best"]] == ["c"]


def test_of_an_error_to_be_small_zero_is_right() -> None:
    dense, now = np.array([100.0, 0, 0, 100]), np.array([0.0, 100, 0, 100])
    assert changed(dense, now, {}, "min", "%")["turns"] == {"gained": 1, "lost": 1, "both": 1, "neither": 1}
    lost = changed(np.zeros(40), np.array([100.0] * 30 + [0.0] * 10), {}, "min", "%")
    assert lost["turns"] == {"gained": 0, "lost": 30, "both": 10, "neither": 0} and len(lost["best"]) == 0


def test_the_worst_tenth_is_that_of_each_file() -> None:
    rng = np.random.default_rng(0)
    dense, now = rng.exponential(size=200), rng.exponential(size=200) * 2
    found = changed(dense, now, {}, "min", "g")
    assert found["worst"]["dense"] == pytest.approx(np.sort(dense)[-20:].mean(), rel=1e-5)
    assert found["worst"]["now"] == pytest.approx(np.sort(now)[-20:].mean(), rel=1e-5)
    assert found["worst"]["of_dense"] == pytest.approx(now[np.argsort(dense)[-20:]].mean(), rel=1e-5)
    assert found["turns"] is None and not found["named"] and len(found["scatter"]) == 200
    assert found["most"][0]["id"] == str(int(np.argmax(now - dense)))


def test_what_is_no_number_is_a_slice_of_its_own_and_what_is_everywhere_is_none() -> None:
    """NaN equals nothing, not itself: a column with one vanished, or had a group of no samples."""
    dense, now = np.arange(40.0), np.arange(40.0) + np.where(np.arange(40) < 10, 2.0, 0.0)
    gaps = [math.nan if i < 10 else float(i) for i in range(40)]
    few = [math.nan if i < 10 else 1.0 for i in range(40)]
    found = changed(dense, now, {"many": gaps, "few": few, "one": ["x"] * 40}, "min", "g")["slices"]
    told = {(s["column"], s["value"]): (s["n"], s["change"]) for s in found}
    assert told["many", "no finite number"] == (10, 2.0) and told["few", "nan"] == (10, 2.0)
    assert [n for (column, _), (n, _) in told.items() if column == "many"].count(10) >= 1
    assert sum(n for (column, _), (n, _) in told.items() if column == "many") == 40
    assert told["few", "1.0"] == (30, 0.0) and "one" not in {s["column"] for s in found}


def test_slices_by_value_and_by_quarter() -> None:
    rng = np.random.default_rng(0)
    group = np.arange(400) % 3
    dense = np.zeros(400)
    now = 5.0 * (group == 2) + 0.1 * rng.normal(size=400)
    columns = {
        "group": group.tolist(),
        "size": rng.normal(size=400).tolist(),
        "rare": [i if i < 3 else 9 for i in range(400)],
    }
    every = changed(dense, now, columns, "min", "g")
    assert every["few"] == [{"column": "rare", "value": str(i), "n": 1} for i in range(3)]  # fault 62: named, no figure
    found = every["slices"]
    worst = found[0]
    assert (worst["column"], worst["value"], worst["n"]) == ("group", "2", 133)
    assert worst["low"] < worst["change"] < worst["high"] and worst["change"] == pytest.approx(5.0, abs=0.05)
    sizes = [s["n"] for s in found if s["column"] == "size"]
    assert len(sizes) == 4 and sum(sizes) == 400 and max(sizes) - min(sizes) <= 1
    assert [s["value"] for s in found if s["column"] == "rare"] == ["9"]  # one sample is no group


# ------------------------------------------------------------------------------------------------------------ roofline


def test_traffic_is_that_of_the_closed_form() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    conv, linear = traffic(capture(net, torch.zeros(2, 3, 6, 6)))
    assert conv["flops"] == 2 * 36 * 8 * 27
    assert conv["bytes"] == 4 * (8 * 27 + 8 + 3 * 36 + 8 * 36)
    assert linear["flops"] == 2 * 8 * 36 * 5
    assert linear["bytes"] == 4 * (8 * 36 * 5 + 5 + 8 * 36 + 5)


def test_peaks_are_those_of_a_machine() -> None:
    before = torch.get_num_threads()
    found = machine_peaks()
    assert torch.get_num_threads() == before
    assert 1e8 < float(found["peak_flops"].value or 0) < 1e14
    assert 1e7 < float(found["bandwidth"].value or 0) < 1e13
    assert 1e8 < float(found["peak_int8"].value or 0) < 1e15 and found["peak_int8"].unit == "OP/s"
    assert all(m.timing and m.badge == "measured" and m.machine for m in found.values())


# ----------------------------------------------------------------------------------------------------- disturbed inputs


def test_every_file_meets_the_same_disturbance() -> None:
    x = torch.rand(4, 2, 9, 9)
    for kind, strength in disturbances():
        first, second = (disturbed(lambda v: v, kind, strength, 0.5, 3) for _ in range(2))
        one, two = first(x), second(x)
        assert torch.equal(one, two) and not torch.equal(one, x), kind
        if kind == "noise":
            assert not torch.equal(first(x), one)  # the next batch meets other noise
            wide = disturbed(lambda v: v, kind, strength, 0.5, 3)(torch.zeros(64, 2, 32, 32))
            assert float(wide.std()) == pytest.approx(0.5 * strength, rel=0.02)


def test_blur_is_a_gaussian_and_contrast_keeps_the_mean() -> None:
    from scipy.ndimage import gaussian_filter

    x = torch.rand(1, 1, 24, 24)
    blurred = disturbed(lambda v: v, "blur", 1.0, 1.0, 0)(x)[0, 0].numpy()
    assert blurred == pytest.approx(gaussian_filter(x[0, 0].numpy(), 1.0, mode="nearest", truncate=3.0), abs=1e-5)
    halved = disturbed(lambda v: v, "contrast", 0.5, 1.0, 0)(x)
    assert float(halved.mean()) == pytest.approx(float(x.mean()), rel=1e-5)
    assert float(halved.std()) == pytest.approx(0.5 * float(x.std()), rel=1e-4)


def test_only_pictures_are_disturbed() -> None:
    assert is_pictures((torch.zeros(1, 1, 4, 4),), {})
    tokens, two = torch.zeros(2, 3, 4, 4, dtype=torch.int64), torch.zeros(1, 1, 4, 4)
    assert not any(
        [is_pictures((tokens,), {}), is_pictures((two, two), {}), is_pictures((torch.zeros(1, 8, 1, 1),), {})]
    )


# ------------------------------------------------------------------------------------------------------------ whole run


def run_of(out: Path, **measure: Any) -> Any:
    recipe = load_recipe(
        {
            "schema": 1, "task": str(TASK), "threads": 1, "recover": {"epochs": 0, "distil": "none", "batch_norm_batches": 0},
            "dense_twin": {"enabled": False}, "measure": {"runs": 5, "seconds": 0.1, **measure},
        }
    )  # fmt: skip
    compress(recipe, out=out, quiet=True)
    return next(r for r in read(out / "records.jsonl") if r.cell["stage"] == "insight")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("regression") / "run"
    return out, run_of(out, noise=True)


def own() -> Any:
    spec = importlib.util.spec_from_file_location("regression_task_of_tests", TASK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bias_is_the_one_that_was_put_in(run: Any) -> None:
    files = run[1].details["bias"]["files"]
    assert run[1].details["subject"] == "int8" and [*files] == ["dense", "int8"]
    assert files["dense"]["value"] == pytest.approx(-0.5, abs=1e-4)
    assert files["int8"]["value"] == pytest.approx(-0.5, abs=0.1) and files["int8"]["low"] < files["int8"]["high"]
    assert len(files["int8"]["scatter"]) == 61
    y = torch.cat([y for _, y in own().test_batches()])
    assert files["dense"]["truth"] == pytest.approx([float(y.min()), float(y.max())], rel=1e-3)
    assert files["dense"]["predicted"] == pytest.approx([float(y.min()) - 0.5, float(y.max()) - 0.5], rel=1e-2)
    assert not files["dense"]["apart"]


def test_a_truth_in_the_middle_of_the_scale_is_in_no_other_unit() -> None:
    assert not _apart(np.array([0.1, 0.2]), np.zeros(2)) and not _apart(np.zeros(2), np.array([0.1, 0.2]))


@pytest.mark.parametrize(("unit", "apart"), [(1.0, False), (0.001, True), (1000.0, True)])
def test_fault_57_predictions_in_another_unit_than_the_truth(unit: float, apart: bool) -> None:
    grams = np.random.default_rng(0).normal(3300, 400, 200)
    assert _apart(grams + 30 * np.random.default_rng(1).normal(size=200), unit * grams) is apart


def test_slices_of_the_run(run: Any) -> None:
    found = run[1].details["changed"]
    assert found["n"] == 61 and {s["column"] for s in found["slices"]} == {"bright", "mean"}
    assert sum(s["n"] for s in found["slices"] if s["column"] == "bright") == 61
    dense = np.load(run[0] / "steps" / "values-dense.npy")
    bright = np.array([i % 2 for i in [*range(30), *range(31)]], dtype=bool)
    slice_ = next(s for s in found["slices"] if s["value"] == "yes")
    assert slice_["dense"] == pytest.approx(dense[bright].mean(), rel=1e-4)
    assert found["most"][0]["id"].startswith("p")


def test_codes_lose_what_those_in_the_file_lose(run: Any) -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(run[0] / "int8.onnx").graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    held = [
        tensors[n.input[0]].astype(np.float64) * tensors[n.input[1]].reshape(-1, 1, 1, 1)
        for n in graph.node
        if n.op_type == "DequantizeLinear" and tensors.get(n.input[0], np.zeros(0)).shape == (16, 16, 3, 3)
    ]
    weight = own().model().b.weight.detach().double().numpy()
    wanted = 10 * np.log10((weight**2).sum() / ((weight - held[0]) ** 2).sum())
    rows = {r["name"]: r for r in run[1].details["bits"]["layers"]}
    assert len(held) == 1 and set(rows) == {"a.weight", "b.weight", "head.weight"}
    assert rows["b.weight"]["bits"] == 8 and rows["b.weight"]["weight_db"] == pytest.approx(wanted, abs=0.02)
    assert all(25 < r["input_db"] < 70 for r in rows.values())


def test_the_metric_under_noise(run: Any) -> None:
    rows = run[1].details["noise"]["rows"]
    assert [(r["kind"], r["strength"]) for r in rows] == [("none", 0.0), *disturbances()]
    module, record = own(), {r.cell["stage"]: r for r in read(run[0] / "records.jsonl")}
    assert rows[0]["now"]["value"] == pytest.approx(record["int8"].measured["metric"].value)
    halved = next(r for r in rows if (r["kind"], r["strength"]) == ("contrast", 0.5))
    errors = []
    for x, y in module.test_batches():
        mean = x.mean((1, 2, 3), keepdim=True)
        with torch.no_grad():
            errors.append((module.model()(mean + 0.5 * (x - mean)) - y).abs())
    assert halved["dense"]["value"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-3)


def test_the_page_holds_it_and_a_second_call_measures_nothing(run: Any) -> None:
    page = (run[0] / "report.html").read_text()
    for said in (
        "What changed for whom",
        "Bias, and predictions",
        "On disturbed inputs",
        "Roofline",
        "Lineage",
        "bright",
    ):
        assert said in page, said
    before = (run[0] / "records.jsonl").read_bytes()
    run_of(run[0], noise=True)
    assert (run[0] / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("how", "said"), [("short", "61 values, as evaluate returns"), ("list", "must return {column")]
)
def test_wrong_slices_are_told_before_the_pruning(how: str, said: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("SLICES", how)
    with pytest.raises(RejectedError, match=said):
        run_of(tmp_path / "run")
    assert not (tmp_path / "run" / "int8.onnx").exists()
