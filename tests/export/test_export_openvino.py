"""OpenVINO files: bytes, names, codes, int8 kernels, parity. Everything runs in the real OpenVINO."""

from __future__ import annotations

import getpass
import itertools
import operator
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import deploy_nets
import forked

pytest.importorskip("onnxscript")
pytest.importorskip("torchao")
pytest.importorskip("openvino", reason="the target openvino-x86 needs openvino: pip install 'paredown[openvino]'")

import openvino

from deploy_case import Case, case_of
from paredown.errors import MissingError, RejectedError, UsageError, VerificationError
from paredown.export import Artifact, check, export, predictor
from paredown.export.session import open_session
from paredown.measure import measure
from paredown.program import Program, capture
from paredown.quantize import Quantized, quantize

OPENVINO = "openvino-x86"


@pytest.fixture(scope="module", params=list(deploy_nets.NETS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(request.param, tmp_path_factory.mktemp(request.param), OPENVINO, ".xml")


# What computes in float in the plugin's own graph; everything else that computes runs on codes.
FLOAT = {
    "residual": set(),
    "mobile": set(),
    "concat": set(),
    "named": set(),
    "vision": {
        "MVN",
        "Subgraph",
        "Transpose",
        "Split",
        "Eltwise",
        "Concatenation",
    },  # which of them, the processor decides
}


def kinds(nodes: tuple[str, ...]) -> list[str]:
    return [n.split(":")[0] for n in nodes]


def test_float_file_equals_pytorch(case: Case) -> None:
    result = check(case.fp32, case.net, case.samples())
    assert result.holds
    assert result.scale > 0.01
    assert result.max_error <= 1e-5 * result.scale
    assert result.int8_nodes == ()
    assert "Convolution" in kinds(result.float_nodes)
    assert any("f32" in note for note in result.notes)  # says in which precision it computed
    assert [f.suffix for f in case.fp32.files] == [".xml", ".bin"]


def test_int8_file_equals_the_simulation_and_runs_in_int8(case: Case) -> None:
    result = check(case.int8, case.quantized, case.samples())
    assert result.holds
    assert result.cosine >= 0.999  # also where OpenVINO sums two products in 16 bits: no two weights saturate them
    assert len(result.notes) == 1
    assert set(kinds(result.float_nodes)) <= FLOAT[case.name]
    assert ("MVN" in kinds(result.float_nodes)) == (case.name == "vision")
    found = kinds(result.int8_nodes)
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in case.net.modules())
    assert layers == found.count("Convolution") + found.count("FullyConnected")
    assert not [n for n in result.int8_nodes if n[-1].isdigit() and "_" in n and "Constant" in n]


def test_why_ops_stay_float_and_how_many_layers_run_on_codes(case: Case) -> None:
    result = check(case.int8, case.quantized, case.samples())
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in case.net.modules())
    assert (result.num_layers, result.num_layers_on_codes, result.layer_share) == (layers, layers, 1.0)
    assert set(result.reasons) == set(kinds(result.float_nodes)) and all(result.reasons.values())
    assert all("): " in n for n in case.quantized.notes if "stays float" in n), "each with its reason"


def test_codes_in_the_file_are_the_codes_of_quantized(case: Case) -> None:
    model = openvino.Core().read_model(case.int8.path)
    stored = [np.array(n.data) for n in model.get_ops() if n.get_type_name() == "Constant"]
    stored = [a for a in stored if a.dtype == np.int8]
    expected = [p.codes.numpy() for p in case.quantized.weights.values() if p.codes.dtype == torch.int8]
    assert len(stored) == len(expected) > 0
    digests = sorted(a.tobytes() for a in stored)
    assert digests == sorted(a.tobytes() for a in expected)
    floats = [
        n for n in model.get_ops() if n.get_type_name() == "Constant" and n.get_element_type() == openvino.Type.f32
    ]
    assert max(n.data.size for n in floats) < max(a.size for a in stored)  # no float weight beside its codes


def test_no_trace_of_the_machine(case: Case) -> None:
    words = [
        str(Path.home()),
        str(Path.cwd()),
        getpass.getuser() + "/",
        socket.gethostname(),
        "site-packages",
        "/tmp",
        ".py",
    ]
    words += [openvino.__version__, "Runtime", "model.onnx"]
    for artifact in (case.fp32, case.int8):
        assert len(artifact.files) == 2
        for file in artifact.files:
            data = file.read_bytes()
            assert len(data) > 300
            assert [w for w in words if len(w) > 3 and w.encode() in data] == []


_SCRIPT = """
import sys, pathlib
sys.path[:0] = sys.argv[1:3]
import test_export_openvino
test_export_openvino.write_both(pathlib.Path.cwd())
"""


def write_both(folder: Path) -> list[bytes]:
    """The float and the int8 file of one network, made from nothing but seeds."""
    net, inputs = deploy_nets.made("mobile")
    torch.manual_seed(5)
    program = capture(net, inputs(2), train=False)
    quantized = quantize(program, calibrate=[inputs(32)], target=OPENVINO)
    made = [export(t, folder / f"{i}.xml", target=OPENVINO) for i, t in enumerate((program, quantized))]
    return [f.read_bytes() for artifact in made for f in artifact.files]


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes_here_and_in_another_process(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "some where else", "third")]
    for folder in folders:
        folder.mkdir()
    first, again = write_both(folders[0]), write_both(folders[1])
    assert first == again
    command = [sys.executable, "-c", _SCRIPT, str(Path(__file__).parent), str(Path(__file__).parents[1])]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "123"}, check=True, cwd=folders[2])
    assert [(folders[2] / f"{i}.{end}").read_bytes() for i in (0, 1) for end in ("xml", "bin")] == first


@pytest.fixture(scope="module")
def concat(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Program, Quantized, Artifact, Artifact]:
    folder = tmp_path_factory.mktemp("concat")
    net, inputs = deploy_nets.made("concat")
    program = capture(net, inputs(2), train=False)
    quantized = quantize(program, calibrate=[inputs(32)], target=OPENVINO)
    fp32 = export(program, folder / "a.xml", target=OPENVINO)
    return net, program, quantized, fp32, export(quantized, folder / "b.xml")


def test_a_file_of_another_network_does_not_pass(
    concat: tuple[nn.Module, Program, Quantized, Artifact, Artifact],
) -> None:
    *_, fp32, int8 = concat
    other = deploy_nets.Concat().eval()
    _, inputs = deploy_nets.made("concat")
    for artifact in (fp32, int8):
        with pytest.raises(VerificationError, match="must equal PyTorch") as caught:
            check(artifact, other, [inputs(4)])
        assert not caught.value.evidence.holds
        assert not check(artifact, other, [inputs(4)], strict=False).holds


def test_fp16_halves_the_weights(
    tmp_path: Path, concat: tuple[nn.Module, Program, Quantized, Artifact, Artifact]
) -> None:
    net, program, codes, fp32, _ = concat
    half = export(program, tmp_path / "half.xml", target=OPENVINO, scheme="fp16")
    assert half.scheme == "fp16"
    # the first layer has so few weights that a cast behind them would take more bytes than they give
    assert half.files[1].stat().st_size <= 0.65 * fp32.files[1].stat().st_size
    result = check(half, net, [deploy_nets.NETS["concat"][1](4)])
    assert 0 < result.max_error <= 1e-2 * result.scale
    with pytest.raises(UsageError, match="'fp16' for a float network"):
        export(codes, tmp_path / "a.xml", target=OPENVINO, scheme="fp16")  # it has 8 bits already


def test_structure_and_batch_of_the_model_are_kept(tmp_path: Path) -> None:
    net, inputs = deploy_nets.made("named")
    predict = predictor(export((net, inputs(2)), tmp_path / "a.xml", target=OPENVINO))
    for batch in (1, 7):
        given = inputs(batch)
        answer, expected = (f(*given["args"], **given["kwargs"]) for f in (predict, predictor(net)))
        assert list(answer) == ["kind", "rest"]
        torch.testing.assert_close(answer["kind"], expected["kind"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(answer["rest"][1], expected["rest"][1], rtol=1e-4, atol=1e-5)
    with pytest.raises(RejectedError, match="image, table"):
        predict(torch.zeros(2, 3, 8, 8))


def test_measured_in_turns_with_a_file_of_another_runtime(
    tmp_path: Path, concat: tuple[nn.Module, Program, Quantized, Artifact, Artifact]
) -> None:
    pytest.importorskip("onnxruntime")
    _, program, _, fp32, _ = concat
    x = deploy_nets.NETS["concat"][1](6)
    found = measure(fp32, [x], baseline=export(program, tmp_path / "a.onnx"), runs=10, seconds=1.0)
    assert found["bytes"].value == sum(f.stat().st_size for f in fp32.files)
    assert 0 < found["latency_ms"].value < 1000
    assert found["speedup"].value == pytest.approx(found["baseline_latency_ms"].value / found["latency_ms"].value)
    assert "INFERENCE_PRECISION_HINT=f32" in found["latency_ms"].protocol
    assert "INFERENCE_PRECISION_HINT" not in found["baseline_latency_ms"].protocol
    assert found["peak_memory_bytes"].value > found["after_import_memory_bytes"].value > 20e6


def test_ops_that_openvino_lacks_are_listed_and_nothing_is_written(tmp_path: Path) -> None:
    class Rare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.det(x) + torch.linalg.det(x.relu())

    with pytest.raises(RejectedError, match=r"OpenVINO from ONNX opset 18. Got Det \(2×, at ") as caught:
        export((Rare(), torch.randn(2, 3, 3)), tmp_path / "a.xml", target=OPENVINO)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_file_newer_than_the_runtime_is_refused_with_the_way_out(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    artifact = export((net, torch.zeros(2, 1, 4, 4)), tmp_path / "a.xml", target=OPENVINO)
    text = artifact.path.read_text()
    for old, new in (('version="11"', 'version="99"'), ('version="opset1"', 'version="opset99"')):
        assert old in text
        artifact.path.write_text(text.replace(old, new))
        with pytest.raises(MissingError, match="Install a newer openvino") as caught:
            open_session(artifact.path)
        assert caught.value.exit_code == 8


def test_wrong_requests(tmp_path: Path, concat: tuple[nn.Module, Program, Quantized, Artifact, Artifact]) -> None:
    _, program, quantized, *_ = concat
    with pytest.raises(UsageError, match=r"ends in \.xml"):
        export(quantized, tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="opset must be an integer"):
        export(program, tmp_path / "a.xml", target=OPENVINO, opset=5)
    with pytest.raises(UsageError, match="Quantize again"):
        export(quantized, tmp_path / "a.onnx", target="onnxruntime-x86")
    (tmp_path / "bad.xml").write_text("<net/>")
    with pytest.raises(RejectedError, match="must load in OpenVINO"):
        open_session(tmp_path / "bad.xml")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.xml"]


def test_without_openvino_every_verb_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concat: tuple[nn.Module, Program, Quantized, Artifact, Artifact]
) -> None:
    _, program, _, fp32, _ = concat
    x = [deploy_nets.NETS["concat"][1](2)]
    monkeypatch.setitem(sys.modules, "openvino", None)
    for verb in (
        lambda: export(program, tmp_path / "a.xml", target=OPENVINO),
        lambda: check(fp32, program, x),
        lambda: predictor(fp32),
        lambda: measure(fp32, x),
    ):
        with pytest.raises(MissingError, match=r"pip install 'paredown\[openvino\]'"):
            verb()
    assert MissingError.exit_code == 8


def test_a_layer_that_is_called_twice_runs_on_codes_both_times(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 8), 3 * torch.randn(32, 8)
    quant = quantize(capture(deploy_nets.Pair(), (x[:2], y[:2])), target="openvino-x86", calibrate=[(x, y)])
    artifact = export(quant, tmp_path / "pair.xml", target="openvino-x86")
    found = check(artifact, quant, [(x, y)])
    assert (found.num_layers, found.num_layers_on_codes) == (5, 5)
    codes = sum(p.codes.numel() for p in quant.weights.values())
    assert artifact.files[1].stat().st_size < codes + 600  # and no weight is in the file twice


def test_layers_with_equal_codes_run_on_codes_all(tmp_path: Path) -> None:
    """As in DenseNet: batch norms of one width behind concatenations are depthwise convolutions whose codes are 127 throughout."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 4, 1)
            self.norm, self.norm_too = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
            nn.init.uniform_(self.norm.weight, 0.5, 2.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            y = self.one(self.norm(torch.cat([x, x.abs()], 1)).relu())
            return self.two(self.norm_too(torch.cat([y, y.abs()], 1)).relu())

    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12)
    quant = quantize(capture(Dense().eval(), x[:2]), target="openvino-x86", calibrate=[x])
    same = [p.codes for p in quant.weights.values() if p.codes.shape == (16, 1, 1, 1)]
    assert len(same) == 2 and torch.equal(*same), "the case must be one of equal codes"
    found = check(export(quant, tmp_path / "dense.xml", target="openvino-x86"), quant, [x])
    assert (found.num_layers, found.num_layers_on_codes) == (5, 5)


def test_a_maximum_over_axes_in_front_of_codes(tmp_path: Path) -> None:
    """OpenVINO 2026.4 answers nonsense where it makes one kernel of ReduceMax and the quantization of its result."""

    class Points(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.b(torch.relu(self.a(x)))
            return self.head(torch.cat([y.amax(1), y.amin(1)], 1))

    torch.manual_seed(0)
    samples = [torch.randn(16, 9, 3)]
    quant = quantize(capture(Points(), samples[0][:2]), target="openvino-x86", calibrate=samples)
    found = check(export(quant, tmp_path / "points.xml", target="openvino-x86"), quant, samples, strict=False)
    assert found.max_error <= 1e-2 * found.scale


@pytest.mark.parametrize("bias", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(16, 24, 8), (24, 8, 64, 1)])
def test_dense_layers_that_become_one_kernel_answer_as_they_should(
    sizes: tuple[int, ...], bias: float | None, tmp_path: Path
) -> None:
    """OpenVINO 2026.4 with AVX-512, one thread, few samples: layers without a bias, or with one value, become a kernel that answers nonsense."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=bias is not None) for a, b in itertools.pairwise(sizes)]
    for layer in layers:
        if bias is not None and bias < 1:
            nn.init.constant_(layer.bias, bias)
    net = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))[:-1].eval()
    x = torch.randn((64, sizes[0]), generator=torch.Generator().manual_seed(1))
    quantized = quantize(capture(net, x[:2]), calibrate=[x], target="openvino-x86")
    artifact = export(quantized, tmp_path / "net.xml", target="openvino-x86")
    assert check(artifact, quantized, [x[:n] for n in (1, 2, 3, 8, 64)]).cosine > 0.999
    stored = {
        n.get_friendly_name(): np.array(n.data)
        for n in openvino.Core().read_model(artifact.path).get_ops()
        if n.get_type_name() == "Constant"
    }
    assert max(len(np.unique(a)) for a in stored.values() if a.dtype == np.float32 and a.size == sizes[1]) > 1


@pytest.mark.parametrize("join", [operator.mul, operator.sub])
def test_gates_in_front_of_experts_answer_as_they_should_for_one_sample(tmp_path: Path, join: Any) -> None:
    """OpenVINO 2026.4: where a gate of one number comes first, the kernel of an expert answers nonsense."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.head = nn.Linear(32, 4), nn.Linear(32, 5)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(4)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gates = self.gate(x).softmax(-1)
            values, chosen = gates.topk(2, -1)
            sparse = torch.zeros_like(gates).scatter(-1, chosen, values)
            mixed = sum(join(sparse[:, n : n + 1], expert(x)) for n, expert in enumerate(self.experts))
            return self.head(torch.relu(x + mixed))

    torch.manual_seed(0)
    x = torch.randn(64, 32)
    quantized = quantize(capture(Mixture().eval(), x[:2]), calibrate=[x], target="openvino-x86")
    found = check(export(quantized, tmp_path / "mixture.xml", target="openvino-x86"), quantized, [x, x[:1], x[:8]])
    assert found.cosine > 0.99999 and found.num_layers == found.num_layers_on_codes == 10


def test_a_layer_that_reads_no_input_has_float_weights(tmp_path: Path) -> None:
    """Of position codes, say: for a fixed batch OpenVINO 2026.4 folds them, and refuses some on codes ("m_element_type.is_static()")."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.place, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            row = torch.ones(x.shape[0], 1, 8, 8).cumsum(2)
            return self.b(torch.relu(self.a(x) + self.place(torch.cat([row.sin(), row.cos()], 1))))

    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    quantized = quantize(capture(Placed().eval(), x[:2]), calibrate=[x], target="openvino-x86")
    artifact = export(quantized, tmp_path / "placed.xml")
    assert check(artifact, quantized, [x]).cosine > 0.99999
    stored = [
        np.array(n.data) for n in openvino.Core().read_model(artifact.path).get_ops() if n.get_type_name() == "Constant"
    ]
    assert sorted(s.size for s in stored if s.dtype == np.int8) == [3 * 8 * 9, 8 * 4 * 9]
    place = quantized.weights["place.weight"].unpack().numpy()
    assert any(s.shape == place.shape and np.allclose(s, place, atol=1e-6) for s in stored if s.dtype == np.float32)


SIGNALS = """
import os, pathlib, signal, sys
from paredown.export.session import open_session
caught = []
signal.signal(signal.SIGUSR1, lambda *_: caught.append(1))
sessions = [open_session(pathlib.Path(path)) for path in sys.argv[1:]]
for session in sessions:
    session.request({i.name: __import__("numpy").zeros([d if isinstance(d, int) else 2 for d in i.shape], "float32") for i in session.get_inputs()})
while sessions:
    del session, sessions[0]  # in the order in which they began
    session = None
os.kill(os.getpid(), signal.SIGUSR1)
print(len(caught), "caught")
"""


def test_signals_find_a_stack_when_sessions_have_ended(
    concat: tuple[nn.Module, Program, Quantized, Artifact, Artifact],
) -> None:
    done = forked.run(SIGNALS, *(artifact.path for artifact in concat[3:]))
    assert (done.returncode, done.stdout) == (0, "1 caught\n"), done.stderr
