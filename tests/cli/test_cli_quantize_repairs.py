"""paredown quantize: repairs, layers in float, four-bit weights with eight-bit activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchao")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SOURCE = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
"""


@pytest.fixture
def asked(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "own.py").write_text(SOURCE, encoding="utf-8")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype(np.float32))
    return ("quantize", f"{tmp_path / 'own.py'}:net", "--input", "2x3x8x8", "--calibrate", "x.npy")


def test_repairs_and_layers_in_float(call, asked):
    done = call(*asked, "--repair", "equalize", "--repair", "gptq", "--scheme", "w4a8", "--out", "a.onnx", "--json")
    assert done.code == 0, done.err
    assert done.json["check"]["holds"] and done.json["scheme"] == "w4a8" and not done.json["float_nodes"]


def test_layers_in_float_have_float_weights_in_the_file(call, asked):
    done = call(*asked, "--float-layers", "2.*", "--out", "b.onnx", "--json")
    assert done.code == 0, done.err
    assert any("conv2d stays float" in n for n in done.json["notes"])
    stored = {tuple(t.dims): t.data_type for t in onnx.load("b.onnx").graph.initializer}
    assert stored[8, 8, 3, 3] == onnx.TensorProto.FLOAT and stored[8, 3, 3, 3] == onnx.TensorProto.INT8


def test_layers_in_float_run_in_float(call, asked):
    done = call(*asked, "--float-layers", "2.*", "--out", "b.onnx", "--json")
    assert any("Conv" in n for n in done.json["float_nodes"])
    assert done.json["check"]["cosine"] > 0.9999


def test_wrong_requests(call, asked):
    done = call(*asked, "--float-layers", "7.*", "--out", "a.onnx")
    assert (done.code, "matches none" in done.err) == (2, True)
    done = call(*asked, "--repair", "gptq", "--repair", "adaround", "--out", "a.onnx")
    assert (done.code, "must not hold both" in done.err) == (2, True)


WIDE = """
import torch
from torch import nn

WIDTHS = torch.tensor([1e4] + [1.0] * 9)


def wide():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    net[0].weight.data /= WIDTHS
    return net


def alike():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
"""


def test_what_rounding_does_to_the_float_network_is_said(call, tmp_path):
    """One input column in ten thousands, the others in units: one grid for all of them keeps the one."""
    import torch

    (tmp_path / "own.py").write_text(WIDE, encoding="utf-8")
    x = np.random.default_rng(0).normal(size=(256, 10)).astype(np.float32)
    for name, scales, noisy in (("wide", [1e4] + [1.0] * 9, True), ("alike", [1.0] * 10, False)):
        np.save("x.npy", x * np.array(scales, np.float32))
        ask = (
            "quantize",
            f"{tmp_path / 'own.py'}:{name}",
            "--input",
            "2x10",
            "--calibrate",
            "x.npy",
            "--out",
            f"{name}.onnx",
        )
        done = call(*ask, "--json")
        assert done.code == 0, done.err
        found = done.json["rounding"]["error_of_deviation"]
        runtime = pytest.importorskip("onnxruntime").InferenceSession(f"{name}.onnx")
        inputs = x * np.array(scales, np.float32)
        got = runtime.run(None, {runtime.get_inputs()[0].name: inputs})[0]
        namespace: dict = {}
        exec(WIDE, namespace)
        with torch.no_grad():
            dense = namespace[name]()(torch.from_numpy(inputs)).numpy()
        assert found == pytest.approx(float(np.sqrt(((got - dense) ** 2).mean()) / dense.std()), rel=0.05)
        assert (found > 0.1) == noisy == any("differ among themselves" in n for n in done.json["notes"])
        said = call(*ask, "--overwrite")
        assert "codes against float" in said.out and "runtime against the simulation" in said.out
