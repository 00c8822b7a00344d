"""Files for phones in their real runtimes, ExecuTorch and LiteRT: parity, int8 kernels, codes, bytes, verbs.

Skipped where `paredown setup executorch-xnnpack` or `paredown setup litert` was not run.
"""

from __future__ import annotations

import getpass
import json
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deploy_nets

pytest.importorskip("torchao")

import paredown
from deploy_case import Case, case_of
from paredown.cli import main
from paredown.environments import is_ready, python_of
from paredown.errors import RejectedError, UsageError, VerificationError
from paredown.export import Artifact, check, export, predictor
from paredown.measure import artifact_at, measure
from paredown.pipeline.snippet import snippet
from paredown.program import capture
from paredown.quantize import quantize
from paredown.quantize.batches import tensors_of
from paredown.target import named

SUFFIXES = {"executorch-xnnpack": ".pte", "litert": ".tflite"}
pytestmark = pytest.mark.slow  # the converters take seconds to import and seconds for every file


def needs(target: str) -> None:
    if not is_ready(named(target)):
        pytest.skip(f"the environment of {target} is not there: paredown setup {target}")


@pytest.fixture(scope="module", params=[(t, n) for t in SUFFIXES for n in deploy_nets.NETS], ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Case]:
    target, name = request.param
    needs(target)
    return target, case_of(name, tmp_path_factory.mktemp(name), target, SUFFIXES[target])


# What computes in float in the int8 file; everything else that computes runs on codes.
FLOAT: dict[tuple[str, str], set[str]] = {
    ("executorch-xnnpack", "residual"): {"slice_copy", "StaticConstantPad"},
    ("executorch-xnnpack", "mobile"): {"Hardswish", "Sigmoid"},
    ("executorch-xnnpack", "vision"): {
        *("native_layer_norm", "Gelu", "Softmax", "BatchMatrixMultiply", "Multiply", "StaticSlice", "StaticTranspose"),
    },
    ("litert", "vision"): {
        *("MEAN", "SQUARED_DIFFERENCE", "ADD", "RSQRT", "MUL", "SUB"),  # layer norm
        *("TRANSPOSE", "BATCH_MATMUL", "SOFTMAX"),
    },
}


def kinds(nodes: tuple[str, ...]) -> list[str]:
    return [n.split(":")[0] for n in nodes]


def test_float_file_equals_pytorch(case: tuple[str, Case]) -> None:
    result = check(case[1].fp32, case[1].net, case[1].samples())
    assert result.holds
    assert result.scale > 0.01
    assert result.max_error <= 1e-5 * result.scale
    assert result.int8_nodes == ()
    assert len(result.float_nodes) >= 5


def test_int8_file_equals_the_simulation_and_runs_in_int8(case: tuple[str, Case]) -> None:
    target, one = case
    result = check(one.int8, one.quantized, one.samples())
    assert result.holds
    assert result.cosine >= 0.999
    assert set(kinds(result.float_nodes)) <= FLOAT.get((target, one.name), set())
    found = kinds(result.int8_nodes)
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in one.net.modules())
    weighted = ("Conv2d", "DepthwiseConv2d", "FullyConnected", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    assert layers == sum(found.count(k) for k in weighted)
    left = [n for n in result.float_nodes if "portable" in n]
    assert bool(left) == any("outside of XNNPACK" in n for n in result.notes)


def test_codes_in_the_file_are_the_codes_of_quantized(case: tuple[str, Case]) -> None:
    data, seen = case[1].int8.path.read_bytes(), 0
    for packed in case[1].quantized.weights.values():
        codes = packed.codes
        if codes.dim() == 4 and codes.shape[1] > 1:
            codes = codes.permute(0, 2, 3, 1)  # both keep the channels last
        elif codes.dim() == 4:
            codes = codes.permute(1, 2, 3, 0)  # depthwise
        if codes.dim() >= 2 and codes.numel() > 16:
            seen += 1
            assert codes.contiguous().numpy().astype(np.int8).tobytes() in data
    assert seen >= 3


def test_no_trace_of_the_machine(case: tuple[str, Case]) -> None:
    words = [str(Path.home()), str(Path.cwd()), getpass.getuser() + "/", socket.gethostname(), "site-packages", "/tmp"]
    for artifact in (case[1].fp32, case[1].int8):
        data = artifact.path.read_bytes()
        assert len(data) > 1000
        assert [w for w in [*words, ".py"] if len(w) > 3 and w.encode() in data] == []
        assert artifact_at(artifact.path) == artifact


def test_structure_and_any_batch(case: tuple[str, Case]) -> None:
    one = case[1]
    torch.manual_seed(4)
    for batch in (1, 3):
        inputs = deploy_nets.NETS[one.name][1](batch)
        got = predictor(one.fp32)(*inputs["args"], **inputs["kwargs"])
        expected = predictor(one.net)(*inputs["args"], **inputs["kwargs"])
        for a, b in zip(tensors_of(got), tensors_of(expected), strict=True):
            assert a.shape == b.shape
            assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())
        if one.name == "named":
            assert set(got) == {"kind", "rest"}
            assert isinstance(got["rest"], tuple)
            assert got.kind is got["kind"]


@pytest.fixture(scope="module", params=list(SUFFIXES))
def residual(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Case]:
    needs(request.param)
    return request.param, case_of("residual", tmp_path_factory.mktemp("x"), request.param, SUFFIXES[request.param])


def test_the_same_bytes_again(residual: tuple[str, Case], tmp_path: Path) -> None:
    target, one = residual
    for thing, before in ((one.program, one.fp32), (one.quantized, one.int8)):
        again = export(thing, tmp_path / f"again{SUFFIXES[target]}", target=target)
        assert again.path.read_bytes() == before.path.read_bytes()


def test_measured_in_turns(residual: tuple[str, Case]) -> None:
    one = residual[1]
    x = one.samples(20)

    def evaluate(predict: paredown.export.Predict) -> dict[str, object]:  # type: ignore[name-defined]
        return {"agrees": (predict(*x[0]["args"]).argmax(1) == predictor(one.net)(*x[0]["args"]).argmax(1)).float()}  # type: ignore[misc]

    found = measure(one.int8, x, baseline=one.fp32, evaluate=evaluate, runs=8, seconds=1)
    assert found["bytes"].value == one.int8.path.stat().st_size < one.fp32.path.stat().st_size
    assert 0 < found["latency_ms"].value < 100
    assert "own process" in found["latency_ms"].protocol
    assert found["speedup"].value > 0
    assert found["peak_memory_bytes"].value > found["after_import_memory_bytes"].value * 0.99
    assert found["agrees"].n == 20
    assert found["agrees"].value >= 0.8


def test_the_lines_of_the_report_run(residual: tuple[str, Case]) -> None:
    target, one = residual
    lines = snippet(one.int8.path.name, "", one.program)
    command = [str(python_of(named(target))), "-c", lines]
    done = subprocess.run(command, cwd=one.int8.path.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "10" in done.stdout.splitlines()[-1]


def test_pruned_then_quantized(residual: tuple[str, Case], tmp_path: Path) -> None:
    target, one = residual
    coupling = paredown.couple(one.program)
    cost = paredown.examine(one.program)
    plan = paredown.allocate(
        coupling, paredown.score(one.program, coupling, "l1"), cost, paredown.Budget(channels=0.5), target=target
    )
    small = paredown.prune(one.program, plan)
    quantized = quantize(small, calibrate=one.samples(32), target=target)
    file = export(quantized, tmp_path / f"small{SUFFIXES[target]}")
    assert check(file, quantized, one.samples()).cosine >= 0.999
    assert file.size_bytes < one.int8.size_bytes
    dense = predictor(one.int8)(one.samples()[0]["args"][0])  # type: ignore[index]
    assert float((predictor(file)(one.samples()[0]["args"][0]) - dense).abs().max()) > 1e-3  # type: ignore[index]


def test_a_file_of_another_network_does_not_pass(residual: tuple[str, Case]) -> None:
    torch.manual_seed(1)
    other = capture(deploy_nets.Residual().eval(), torch.randn(2, 1, 8, 8), train=False)
    with pytest.raises(VerificationError, match="must equal PyTorch"):
        check(residual[1].fp32, other, residual[1].samples())


def test_wrong_requests(residual: tuple[str, Case], tmp_path: Path) -> None:
    target, one = residual
    with pytest.raises(UsageError, match=f"ends in {SUFFIXES[target]}"):
        export(one.program, tmp_path / "net.onnx", target=target)
    with pytest.raises(UsageError, match="must be that of the quantized network"):
        export(one.quantized, tmp_path / "net.onnx", target="onnxruntime-x86")
    broken = tmp_path / f"broken{SUFFIXES[target]}"
    broken.write_bytes(one.fp32.path.read_bytes()[:900])
    with pytest.raises(RejectedError, match="must load in the runtime"):
        predictor(Artifact(files=(broken,), target=target, scheme="fp32"))
    with pytest.raises(RejectedError, match="shape"):
        predictor(one.fp32)(torch.randn(1, 1, 9, 9))


def test_fp16_halves_the_weights_for_litert(tmp_path: Path) -> None:
    needs("litert")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 10)).eval()
    program = capture(net, torch.randn(2, 3, 8, 8), train=False)
    files = [export(program, tmp_path / f"{s}.tflite", target="litert", scheme=s) for s in ("fp32", "fp16")]  # type: ignore[arg-type]
    assert files[1].size_bytes < 0.56 * files[0].size_bytes
    result = check(files[1], net, [torch.randn(5, 3, 8, 8)])
    assert 0 < result.max_error <= 5e-3 * result.scale


@pytest.mark.parametrize("target", list(SUFFIXES))
def test_on_the_command_line(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs(target)
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))\n"
    )
    file, x = str(tmp_path / f"q{SUFFIXES[target]}"), ("--input", "1x3x8x8")
    model = f"{tmp_path / 'net.py'}:net"
    assert main(["quantize", model, *x, "--calibrate", "random", "--target", target, "--out", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["scheme"], found["target"], found["float_nodes"]) == ("int8", target, [])
    assert main(["measure", file, *x, "--runs", "5", "--seconds", "0.2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"]["bytes"]["value"] == found["file_bytes"]


class Twice(nn.Module):
    """One layer in front of two batch norms, an output that is None, a padding in words, the largest of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        nn.init.uniform_(self.two.running_var, 2, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
        y = torch.relu(self.two(self.conv(torch.relu(self.one(self.conv(x))))))
        return {"none": None, "kind": self.head(nn.functional.adaptive_max_pool2d(y, 1).flatten(1))}


@pytest.mark.parametrize("target", SUFFIXES)
@pytest.mark.parametrize("scheme", ["fp32", "int8"])
def test_what_converters_take_badly(target: str, scheme: str, tmp_path: Path) -> None:
    needs(target)
    torch.manual_seed(2)
    net, x = Twice().eval(), torch.randn(16, 4, 6, 6)
    program = capture(net, x[:2], train=False)
    thing = program if scheme == "fp32" else quantize(program, calibrate=[x], target=target)
    file = export(thing, tmp_path / f"a{SUFFIXES[target]}", target=target)
    assert check(file, net if scheme == "fp32" else thing, [x[:3]]).holds
    found = predictor(file)(x[:2])
    assert found["none"] is None
    with torch.no_grad():
        wanted = net(x[:2])["kind"]
    assert (
        torch.as_tensor(found["kind"]).sub(wanted).abs().max()
        <= (1e-4 if scheme == "fp32" else 0.05) * wanted.abs().max()
    )


class Moved(nn.Module):
    """Frames as a batch and back, through moves that become reshapes and transposes: their results have the scale of what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv1d(8, 4, 3, padding=1)
        self.gate, self.head = nn.PReLU(4), nn.Conv1d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, frames = x.shape[:2]
        y = nn.functional.adaptive_avg_pool2d(torch.relu(self.conv(x.flatten(0, 1))), 1).squeeze(-1).squeeze(-1)
        y = self.gate(self.time(y.unflatten(0, (batch, frames)).movedim(2, 1)))
        return nn.functional.softplus(self.head(y)).swapaxes(1, 2)


@pytest.mark.parametrize("target", SUFFIXES)
def test_moves_between_codes(target: str, tmp_path: Path) -> None:
    needs(target)
    torch.manual_seed(2)
    net, x = Moved().eval(), torch.randn(16, 6, 3, 8, 8)
    one = quantize(capture(net, x[:2], train=False), calibrate=[x], target=target)
    assert check(export(one, tmp_path / f"a{SUFFIXES[target]}"), one, [x[:3]]).layer_share == 1
