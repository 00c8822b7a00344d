"""paredown bundle, measure --import and compare, from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bundle_case import sealed, started

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from paredown.export import export
from paredown.measure import sizes
from paredown.records import Measured, Record, append

Call = Callable[..., Any]
QUICK = ("--seconds", "0.2", "--readings", "20", "--pause", "0")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.onnx, other.onnx, samples.npz, a run of net.onnx, and the bundle of that run with its results."""
    from paredown.cli import main

    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    for name, width in (("net", 6), ("other", 7)):
        net = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 3))
        export((net, torch.zeros(2, 1, 8, 8)), folder / f"{name}.onnx")
    np.savez(folder / "samples.npz", x=np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype("f4"))
    _run_of(folder / "net.onnx", folder / "run")
    made = main(["bundle", str(folder / "run"), "--samples", str(folder / "samples.npz"), "--out", str(folder / "b")])
    assert made == 0
    done = started([folder / "b" / "run_local.sh", *QUICK], folder)
    assert done.returncode == 0, done.stderr
    return folder


def _run_of(file: Path, run: Path, **more: Any) -> None:
    from paredown.pipeline.folder import file_digest

    run.mkdir()
    shutil.copy(file, run / "dense.onnx")
    measured = {**sizes((file,)), "metric": Measured(value=90.0, unit="%", low=88.0, high=92.0, n=100)}
    details = {"file": "dense.onnx", "files": ["dense.onnx"], "digest": file_digest(file), **more}
    append(run / "records.jsonl", Record(cell={"stage": "dense", "title": "Dense"}, measured=measured, details=details))
    metric = {"name": "accuracy", "unit": "%", "goal": "max"}
    verdict = {
        "recommended": "dense",
        "metric": metric,
        "normalisation": "pixels / 255",
        "not_tested": ["latency on the phone: these timings are of this machine"],
    }
    append(run / "records.jsonl", Record(cell={"stage": "verdict"}, details=verdict))


def test_the_bundle_of_a_run_is_its_recommended_file(ran: Path, call: Call, tmp_path: Path) -> None:
    done = call("bundle", ran / "run", "--samples", ran / "samples.npz", "--golden", "2", "--out", "b", "--json")
    assert done.code == 0
    found = done.json
    assert (found["golden"], found["scheme"], found["runtime"]) == (2, "fp32", "onnxruntime")
    assert found["preprocessing"] == "pixels / 255"
    assert found["bytes"] == sum(p.stat().st_size for p in (tmp_path / "b").rglob("*") if p.is_file())
    again = call("bundle", ran / "net.onnx", "--samples", ran / "samples.npz", "--out", "b")
    assert (again.code, "which exists" in again.err) == (2, True)
    (tmp_path / "how.json").write_text('{"mean": 0.5}')
    options = ("--out", "b", "--overwrite", "--cosine", "0.99", "--preprocessing", "how.json", "--json")
    found = call("bundle", ran / "net.onnx", "--samples", ran / "samples.npz", *options).json
    assert found["tolerance"] == {"cosine": 0.99} and found["preprocessing"] == {"mean": 0.5}


def test_a_file_that_the_check_excused_is_held_to_less_on_the_device(call: Call, tmp_path: Path) -> None:
    """Twice as far as it is from its simulation: 1 - 2 · (1 - 0.9975)."""
    from paredown.program import capture
    from paredown.quantize import quantize

    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
    export(quantize(capture(net, x[:2]), calibrate=[x]), tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", x=x.numpy())
    for cosine, asked in ((0.9975, 0.995), (0.9995, 0.999)):
        run, out = tmp_path / f"run{cosine}", tmp_path / f"b{cosine}"
        _run_of(tmp_path / "net.onnx", run, check={"max_error": 0.1, "scale": 1.0, "cosine": cosine})
        found = call("bundle", run, "--samples", "x.npz", "--out", out, "--json").json
        assert found["tolerance"] == {"cosine": pytest.approx(asked)}
        assert ("0.997500 of its own simulation" in found["tolerance_because"]) == (asked < 0.999)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("none.onnx", "--samples", "{ran}/samples.npz"), 3, "does not exist"),
        (("{ran}/net.onnx", "--samples", "none.npz"), 3, "does not exist"),
        (("{ran}/samples.npz", "--samples", "{ran}/samples.npz"), 2, "must end in one of"),
        (("{ran}", "--samples", "{ran}/samples.npz"), 3, "records.jsonl"),
        (
            ("{ran}/net.onnx", "--samples", "{ran}/samples.npz", "--preprocessing", "none.json"),
            2,
            "must be a JSON file",
        ),
        (("{ran}/net.onnx", "--samples", "{ran}/samples.npz", "--cosine", "2"), 2, "a tolerance must be"),
    ],
)
def test_a_bundle_of_something_else(ran: Path, call: Call, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = call("bundle", *(a.format(ran=ran) for a in arguments), "--out", "b")
    assert (done.code, said in done.err) == (code, True), done.err
    assert not Path("b").exists()


def test_results_are_imported_and_shown_in_the_report(ran: Path, call: Call, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    shutil.copytree(ran / "run", "run")
    done = call("measure", ran / "b", "--import", ran / "b/results.json", "--into", "run", "--json")
    assert done.code == 0
    found = done.json
    assert found["measured"]["latency_ms"]["badge"] == "measured"
    assert found["golden"]["holds"] is True and found["measured"]["golden_max_error"]["n"] == 4
    document = call("report", "run", "--json").json
    assert [r["stage"] for r in document["rows"]] == ["dense"]
    (device,) = document["devices"]
    assert device["latency_ms"]["median"] == found["measured"]["latency_ms"]["value"]
    assert device["stage"] == "dense"
    (phone,) = (n for n in document["verdict"]["not_tested"] if "on the phone" in n)
    assert "(measured on: " in phone  # this machine ran the bundle, no phone did
    page = (tmp_path / "run/report.html").read_text()
    assert "On other devices" in page and "Error of the golden outputs" in page
    # Again: the later reading takes the earlier one's place.
    assert call("measure", ran / "b", "--import", ran / "b/results.json", "--into", "run").code == 0
    assert len(call("report", "run", "--json").json["devices"]) == 1
    text = call("measure", ran / "b", "--import", ran / "b/results.json").out
    assert "on the device: median" in text and "golden_cosine" in text


def test_results_of_another_model_are_refused(ran: Path, call: Call, tmp_path: Path) -> None:
    done = call("measure", ran / "other.onnx", "--import", ran / "b/results.json")
    assert (done.code, "must be of the model at" in done.err) == (3, True)
    _run_of(ran / "other.onnx", tmp_path / "run")
    before = (tmp_path / "run/records.jsonl").read_bytes()
    done = call("measure", ran / "b", "--import", ran / "b/results.json", "--into", "run")
    assert (done.code, "Got another model's" in done.err) == (3, True)
    assert (tmp_path / "run/records.jsonl").read_bytes() == before
    document = json.loads((ran / "b/results.json").read_text())
    document["outputs"][0][0]["data"] = document["outputs"][1][0]["data"]  # the answer to another sample
    document["claimed"] = None
    done = call("measure", ran / "b", "--import", sealed(tmp_path / "r.json", document))
    assert (done.code, "must be the golden ones" in done.err) == (6, True)


def test_import_stands_alone(ran: Path, call: Call) -> None:
    for more in (("--samples", ran / "samples.npz"), ("--input", "1x1x8x8"), ("--baseline", ran / "net.onnx")):
        done = call("measure", ran / "b", "--import", ran / "b/results.json", *more)
        assert (done.code, "--import must stand without" in done.err) == (2, True)
    done = call("measure", ran / "net.onnx", "--input", "1x1x8x8", "--into", "run")
    assert (done.code, "--into must come with --import" in done.err) == (2, True)


def test_files_are_compared(ran: Path, call: Call) -> None:
    files = (ran / "net.onnx", ran / "other.onnx")
    quick = ("--runs", "5", "--seconds", "0.3")
    found = call("compare", *files, "--samples", ran / "samples.npz", *quick, "--json").json
    assert {t["file"] for t in found["timings"]} == {"net.onnx", "other.onnx"}
    assert found["samples"] == "given" and found["fastest"] in {t["name"] for t in found["timings"]}
    assert all(t["latency_ms"]["badge"] == "measured" for t in found["timings"])
    done = call("compare", *files, "--input", "1x1x8x8", *quick)
    assert done.code == 0
    assert "Fastest on this machine (measured): " in done.out and "not tested: quality of the files" in done.out
    both = call("compare", *files, "--input", "1x1x8x8", "--samples", ran / "samples.npz")
    assert (both.code, "without --input" in both.err) == (2, True)
    assert call("compare", ran / "net.onnx", "none.onnx").code == 3
    assert call("compare").code == 2


def test_runs_are_compared(ran: Path, call: Call) -> None:
    shutil.copytree(ran / "run", "one")
    _run_of(ran / "other.onnx", Path("two"))
    found = call("compare", "one", "two", "--recorded", "--json").json
    assert [r["run"] for r in found["runs"]] == ["one", "two"] and found["timings"] == []
    size = next(d for d in found["differences"] if d["what"] == "bytes")
    assert size["change"]["value"] == (ran / "other.onnx").stat().st_size - (ran / "net.onnx").stat().st_size
    assert size["better"] == "one/dense"
    done = call("compare", "one", "two", "--runs", "5", "--seconds", "0.3")
    assert done.code == 0
    assert "one/" in done.out and "dense *" in done.out and "* recommended" in done.out
    assert (
        "two/dense against one/dense, both recommended:" in done.out
        and "not paired; their intervals overlap: not distinguishable" in done.out
    )
    assert "one/dense.onnx in ONNX Runtime" in done.out.replace("\n", " ")
