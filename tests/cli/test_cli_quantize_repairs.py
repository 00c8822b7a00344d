"""paredown quantize: repairs, layers in float, four-bit weights with eight-bit activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from paredown.program import capture
from paredown.prune import load_pruned
from paredown.quantize import quantize

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


def test_what_stays_float_says_why_and_the_share_is_told(call, asked):
    done = call(*asked, "--float-layers", "2.*", "--out", "b.onnx", "--json")
    assert done.json["layers"] == {"all": 3, "on_codes": 2}
    assert any("conv2d stays float" in n and n.endswith("asked for by float_layers") for n in done.json["notes"])
    assert "asked for by float_layers" in done.json["float_reasons"]["Conv"]
    done = call(*asked, "--float-layers", "2.*", "--out", "c.onnx")
    said = " ".join(done.out.split())
    assert "2 of 3 convolutions and linear layers (67%)" in said
    assert "Conv 1× (conv0): its weight is in float: asked for by float_layers" in said
    assert "3 of 3 convolutions and linear layers (100%)" in " ".join(call(*asked, "--out", "d.onnx").out.split())


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
        assert "quantized against float" in said.out and "runtime against the simulation" in said.out


MASKED = """
import torch
from torch import nn
from torch.nn.utils import prune


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(*layers)


def torch_masks():
    model = net()
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    return model


METRIC = {"name": "accuracy", "unit": "%", "goal": "max"}


def model():
    return net()


def inputs():
    return torch.zeros(2, 8)


def calibration_batches():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(32, 8, generator=generator) for _ in range(3)]


def train(network):
    return network


def evaluate(predict):
    return {"accuracy": 50.0}
"""


@pytest.fixture
def masked(call, tmp_path: Path) -> str:
    """A model in a file, and what `paredown prune` made of it in the folder "masked"."""
    (tmp_path / "masked.py").write_text(MASKED, encoding="utf-8")
    model = f"{tmp_path / 'masked.py'}:net"
    ask = ("prune", model, "--input", "2x8", "--granularity", "element", "--density", "0.5", "--out", "masked")
    done = call(*ask)
    assert done.code == 0, done.err
    return model


@pytest.mark.parametrize("scheme", ["w2", "binary"])
def test_levels_without_a_zero_do_not_fill_what_was_pruned(call, masked, tmp_path, scheme):
    ask = ("--input", "2x8", "--scheme", scheme, "--out", "q.onnx")
    done = call("quantize", masked, *ask, "--pruned", "masked")
    assert (done.code, "must have levels with a 0" in done.err) == (2, True), done.err
    done = call("quantize", masked.replace(":net", ":torch_masks"), *ask)
    assert (done.code, "must have levels with a 0" in done.err) == (2, True), done.err
    assert not (tmp_path / "q.onnx").exists()
    assert call("quantize", masked, *ask).code == 0, "without masks there is nothing to fill"


@pytest.mark.parametrize("scheme", ["int8", "w4", "ternary"])
def test_levels_with_a_zero_keep_what_was_pruned(call, masked, tmp_path, scheme):
    ask = ("--input", "2x8", "--scheme", scheme, "--calibrate", "random", "--out", "q.onnx", "--json")
    done = call("quantize", masked, *ask, "--pruned", "masked")
    assert done.code == 0, done.err
    assert (done.json["scheme"], done.json["weights"], done.json["check"]["holds"]) == (scheme, "given", True)
    # The same call in Python: the check has proved that the file computes with these codes.
    program = capture(_of(tmp_path, "net")(), torch.zeros(2, 8))
    before = load_pruned("masked", program)
    zeros = sum(m.kept.size - m.num_kept for m in before.plan.masks.values())
    assert zeros >= 500
    quant = quantize(before, scheme=scheme, calibrate=[torch.randn(32, 8)])
    assert sum(int((p.codes == 0).sum()) for p in quant.weights.values()) >= zeros


def _of(folder: Path, name: str):
    """A function of the file that the command line reads."""
    space: dict[str, object] = {}
    exec((folder / "masked.py").read_text(encoding="utf-8"), space)
    return space[name]


def test_the_folder_of_a_run_names_model_and_samples(call, masked, tmp_path):
    recipe = "schema: 1\nname: masked\ntask: ../masked.py\nprune: {levels: [{density: 0.5}], granularity: element}\n"
    (tmp_path / "masked" / "recipe.yaml").write_text(recipe, encoding="utf-8")
    ask = ("--target", "onnxruntime-x86", "--scheme", "int8")
    done = call("quantize", "masked", *ask, "--out", "q.onnx", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert (found["calibrated_on"], found["rounding"]["samples"], found["weights"]) == ("task", "given", "given")
    assert found["check"]["holds"] and not any("RANDOM" in n for n in found["notes"])
    # The same as with MODEL, --pruned and the same samples.
    np.save(tmp_path / "x.npy", np.concatenate([t.numpy() for t in _of(tmp_path, "calibration_batches")()]))
    other = call("quantize", masked, "--input", "2x8", "--pruned", "masked", "--calibrate", "x.npy", "--out", "r.onnx")
    assert other.code == 0, other.err
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "r.onnx").read_bytes()
    done = call("quantize", "masked", *ask, "--calibrate", "x.npy", "--out", "s.onnx", "--json")
    assert done.json["calibrated_on"] == "given"
    done = call("quantize", "masked", "--scheme", "binary", "--out", "t.onnx")
    assert (done.code, "must have levels with a 0" in done.err) == (2, True), done.err
    done = call("quantize", "masked", *ask, "--input", "2x8", "--out", "t.onnx")
    assert (done.code, "--input must be left out" in done.err) == (2, True), done.err


def test_a_folder_without_a_recipe_is_refused_with_what_to_do(call, masked):
    done = call("quantize", "masked", "--out", "q.onnx")
    said = " ".join(done.err.split())
    assert done.code == 2
    assert "without recipe.yaml" in said and "paredown quantize MODEL --input … --pruned masked" in said
    done = call("quantize", masked, "--scheme", "w2", "--out", "q.onnx")
    assert (done.code, "must come with --input" in done.err) == (2, True), done.err
