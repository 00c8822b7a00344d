"""paredown quantize --scheme int8-dynamic and w4: no samples, the share that runs on codes, and nothing to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paredown.cli.coding import ALONE, NO_DATA, WEIGHTS
from paredown.quantize.schemes import DYNAMIC, HALF, SCHEMES
from paredown.quantize.schemes import WEIGHTS as TABLE_WEIGHTS

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SOURCE = """
from torch import nn


def rows():
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5))


def images():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_schemes_that_need_no_samples_are_those_of_the_table():
    assert set(NO_DATA) == {*DYNAMIC, HALF} and set(WEIGHTS) == set(TABLE_WEIGHTS)
    assert set(ALONE) == {s.name for s in SCHEMES.values() if s.activations == "static" and s.activation_bits < 8}


@pytest.mark.parametrize("scheme", NO_DATA)
def test_no_samples_are_needed(call, own, tmp_path, scheme):
    done = call("quantize", f"{own}:rows", "--input", "2x64", "--scheme", scheme, "--out", "q.onnx", "--json")
    assert done.code == 0
    found = done.json
    assert (found["scheme"], found["calibrated_on"]) == (scheme, "none")
    assert found["check"]["holds"]
    if scheme == HALF:
        assert any("100.0% of the weights are in 16 bits" in n for n in found["notes"])
    else:
        assert found["coverage"] == {"macs": 1.0, "weights": 1.0}
        assert len(found["int8_nodes"]) == 2
    assert not any("RANDOM" in n for n in found["notes"])
    assert (tmp_path / "q.onnx").stat().st_size == found["file_bytes"]


def test_samples_that_are_given_check_the_file(call, own, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32))
    ask = ("quantize", f"{own}:rows", "--input", "2x64", "--scheme", "int8-dynamic", "--calibrate", "x.npy")
    done = call(*ask, "--out", "q.onnx")
    assert done.code == 0
    assert "100.0% of the MACs" in done.out
    assert "given samples" in " ".join(done.out.split())
    found = call(*ask, "--out", "again.onnx", "--json").json
    assert (found["calibrated_on"], found["rounding"]["samples"]) == ("none", "given")
    found = call(*ask[:-2], "--out", "random.onnx", "--json").json
    assert (found["calibrated_on"], found["rounding"]["samples"]) == ("none", "random")


def test_nothing_covered_is_an_error_with_the_reasons(call, own, tmp_path):
    done = call("quantize", f"{own}:images", "--input", "2x3x8x8", "--scheme", "w4", "--out", "q.onnx")
    assert (done.code, "conv2d stays float" in done.err) == (4, True), done.err
    assert not (tmp_path / "q.onnx").exists()


def test_static_schemes_still_ask_for_samples(call, own):
    done = call("quantize", f"{own}:rows", "--input", "2x64", "--scheme", "int8", "--out", "q.onnx")
    assert (done.code, "--calibrate" in done.err) == (2, True)
