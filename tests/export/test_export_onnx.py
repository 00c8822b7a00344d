"""The exported file itself: bytes, names, codes, dynamic batch, int8 kernels. Everything runs in the real ONNX Runtime."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deploy_nets

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("torchao")

import onnx
import onnxruntime
import onnxruntime.quantization
from onnx import numpy_helper

from deploy_case import Case, case_of
from paredown.errors import MissingError, RejectedError, ResourceError, UsageError, VerificationError
from paredown.export import Artifact, Check, check, export, onnx_direct
from paredown.export import onnxruntime as runtime
from paredown.export.session import PRECISE, has_int8_sums, open_session
from paredown.plan import Plan
from paredown.program import GraphModel, capture
from paredown.prune.nouns import Proof, Pruned
from paredown.quantize import quantize


@pytest.fixture(scope="module", params=list(deploy_nets.NETS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(request.param, tmp_path_factory.mktemp(request.param), "onnxruntime-x86", ".onnx")


# What computes in float in the runtime's own graph, by op; everything else must run on codes.
FLOAT = {
    "residual": set(),
    "mobile": set(),
    "concat": set(),
    "named": set(),
    "vision": {"LayerNormalization", "FusedMatMul", "MatMul", "Softmax", "Gelu"},
}
INT8 = {
    "residual": {"QLinearConv": 5, "QLinearAdd": 2, "QGemm": 1, "Pad": 1, "Slice": 2, "QLinearGlobalAveragePool": 1},
    "mobile": {"QLinearConv": 5, "QLinearMul": 4, "QLinearSigmoid": 2, "QLinearGlobalAveragePool": 2, "QGemm": 1},
    "concat": {"QLinearConv": 3, "Concat": 1, "MaxPool": 1, "QGemm": 1},
    "named": {"QLinearConv": 1, "QGemm": 3, "QLinearAdd": 1},
    "vision": {"QLinearConv": 1, "QGemm": 5, "QLinearAdd": 3},
}


def ops(nodes: tuple[str, ...]) -> list[str]:
    return [n.split(":")[0] for n in nodes]


def test_float_file_equals_pytorch(case: Case) -> None:
    result = check(case.fp32, case.net, case.samples())
    assert result.holds
    assert result.scale > 0.01
    assert result.max_error <= 1e-5 * result.scale
    assert result.int8_nodes == ()
    assert {"Conv", "FusedConv"} & set(ops(result.float_nodes))


def test_int8_file_equals_the_simulation_and_runs_in_int8(case: Case) -> None:
    result = check(case.int8, case.quantized, case.samples())
    assert result.holds
    assert result.cosine >= 0.999
    assert set(ops(result.float_nodes)) == FLOAT[case.name]
    found = ops(result.int8_nodes)
    assert {op: found.count(op) for op in INT8[case.name]} == INT8[case.name]
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in case.net.modules())
    assert layers == found.count("QLinearConv") + found.count("QGemm")
    assert any("head" in n for n in result.int8_nodes) or case.name == "named"


def test_why_ops_stay_float_and_how_many_layers_run_on_codes(case: Case) -> None:
    result = check(case.int8, case.quantized, case.samples())
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in case.net.modules())
    assert (result.num_layers, result.num_layers_on_codes, result.layer_share) == (layers, layers, 1.0)
    assert set(result.reasons) == FLOAT[case.name] and all(result.reasons.values())
    assert all("): " in n for n in case.quantized.notes if "stays float" in n), "each with its reason"
    plain = check(case.fp32, case.net, case.samples())
    assert (plain.num_layers, plain.layer_share, plain.reasons) == (layers, 0.0, {})


def test_a_linear_layer_over_tokens_counts_as_a_layer_and_a_product_of_activations_does_not(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.out = nn.Linear(16, 32), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = self.both(x).chunk(2, -1)
            return self.out(q @ k.transpose(1, 2) @ x)

    torch.manual_seed(0)
    samples = [torch.randn(2, 5, 16) for _ in range(4)]
    program = capture(Attention(), samples[0])
    quantized = quantize(program, target="onnxruntime-x86", calibrate=samples)
    result = check(export(quantized, tmp_path / "a.onnx"), quantized, samples)
    assert "MatMulIntegerToFloat" in ops(result.int8_nodes), (
        "the case must be one where a product of activations runs on codes"
    )
    assert (result.num_layers, result.num_layers_on_codes) == (2, 2)


@pytest.mark.filterwarnings("ignore:.*without exact 8-bit products")
def test_a_file_of_another_tool_whose_layers_share_a_weight_opens(tmp_path: Path) -> None:
    """ONNX Runtime cannot give exact products to two layers that share a weight of codes: it writes the exact form twice."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x).relu())

    torch.manual_seed(0)
    samples = [torch.randn(2, 3, 16) for _ in range(4)]
    file = export(capture(Twice(), samples[0]), tmp_path / "float.onnx").path
    path = tmp_path / "theirs.onnx"

    class Reader(onnxruntime.quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = ({"x": x.numpy()} for x in samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    onnxruntime.quantization.quantize_static(str(file), str(path), Reader(), per_channel=True)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*PRECISE)
    with pytest.raises(Exception, match="replace the existing tensor"):
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    exact = has_int8_sums()  # else sums saturate here, which is said
    with contextlib.nullcontext() if exact else pytest.warns(UserWarning, match="may saturate here"):
        session = open_session(path)
    found = session.run(None, {"x": samples[0].numpy()})[0]
    plain = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.array_equal(found, plain.run(None, {"x": samples[0].numpy()})[0])
    assert not exact or np.abs(found - open_session(file).run(None, {"x": samples[0].numpy()})[0]).max() < 0.1


class Reasons(nn.Module):
    """An op for every reason that there is to stay in float."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.asked, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.weight, self.scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.register_buffer("mask", torch.triu(torch.full((4, 4), float("-inf")), 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        scores = (x @ x.transpose(1, 2) + self.mask).softmax(-1)
        x = x + self.scale * self.asked(scores @ x)
        return self.head(nn.functional.linear(x, self.weight * x.mean()))


def test_every_reason_to_stay_in_float_is_said() -> None:
    torch.manual_seed(0)
    program = capture(Reasons().eval(), torch.randn(2, 4, 8), train=False)
    quantized = quantize(program, calibrate=[torch.randn(32, 4, 8)], float_layers=["asked"])
    said = [n for n in quantized.notes if "stays float" in n]
    for op, reason in (
        ("add", "sums before a softmax stay float"),
        ("linear", "asked for by float_layers"),
        ("linear", "its weight is computed"),
        ("mul", "a constant for every channel"),
        ("softmax", "no integer kernel worth using in ONNX Runtime"),
        ("matmul", "does not pay in ONNX Runtime: a product of two activations"),
    ):
        assert any(n.startswith(f"{op} stays float (") and reason in n for n in said), (op, reason, said)


def test_codes_in_the_file_are_the_codes_of_quantized(case: Case) -> None:
    model = onnx.load(case.int8.path)
    arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    dequantized = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    seen = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        packed = case.quantized.weights[f"{node.name}.weight"]
        source = dequantized[node.input[1]]
        assert arrays[source.input[0]].dtype == np.int8
        np.testing.assert_array_equal(arrays[source.input[0]], packed.codes.numpy())
        np.testing.assert_array_equal(arrays[source.input[1]], packed.scales.numpy())
        seen += 1
    assert seen == sum(p.codes.dtype == torch.int8 for p in case.quantized.weights.values()) > 0
    quantizers = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert all(n.input[0] not in arrays for n in quantizers)  # no float weight beside a quantize


def test_no_trace_of_the_machine_and_no_exporter_notes(case: Case) -> None:
    words = [
        str(Path.home()),
        str(Path.cwd()),
        getpass.getuser() + "/",
        socket.gethostname(),
        "site-packages",
        ".py",
        "pkg.torch",
    ]
    words += [os.environ["VIRTUAL_ENV"]] if "VIRTUAL_ENV" in os.environ else []
    for artifact in (case.fp32, case.int8):
        data = artifact.path.read_bytes()
        assert len(data) > 1000
        assert [w for w in words if len(w) > 3 and w.encode() in data] == []
        model = onnx.load(artifact.path)
        assert not model.doc_string
        marks = ["exact_products", "paredown_scheme"] if artifact is case.int8 else []
        assert {p.key for p in model.metadata_props} - {"outputs"} == set(marks)
        assert not any(n.metadata_props or n.doc_string for n in model.graph.node)
        assert not model.graph.value_info
        onnx.checker.check_model(model, full_check=True)


def test_names_at_the_edge_and_a_free_batch(case: Case) -> None:
    for artifact in (case.fp32, case.int8):
        graph = onnx.load(artifact.path).graph
        outputs = ["kind", "rest.0", "rest.1"] if case.name == "named" else ["output"]
        assert [o.name for o in graph.output] == outputs
        assert [i.name for i in graph.input] == (["image", "table"] if case.name == "named" else ["x"])
        for value in (*graph.input, *graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    names = {i.name for i in onnx.load(case.fp32.path).graph.initializer}
    assert names & {n for n, _ in case.net.named_parameters()}  # parameters keep their names in the float file


def test_few_bytes_beside_the_weights(case: Case) -> None:
    parameters = sum(p.numel() for p in case.net.parameters())
    assert case.fp32.size_bytes <= 4 * parameters + 6000
    graph = onnx.load(case.int8.path).graph
    data = sum(numpy_helper.to_array(i).nbytes for i in graph.initializer)
    computing = [n for n in graph.node if n.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    assert case.int8.size_bytes - data <= 300 + 180 * len(computing)
    if case.name == "residual":
        assert case.int8.size_bytes - data <= 300 * 6 + 1000


_SCRIPT = """
import sys, pathlib
sys.path[:0] = sys.argv[1:3]
import test_export_onnx
test_export_onnx.write_both(pathlib.Path.cwd())
"""


def write_both(folder: Path) -> list[bytes]:
    """The float and the int8 file of one network, made from nothing but seeds."""
    torch.manual_seed(5)
    net, inputs = deploy_nets.Residual((8,)).eval(), deploy_nets.NETS["residual"][1]
    program = capture(net, inputs(2), train=False)
    quantized = quantize(program, calibrate=[inputs(32)])
    return [export(t, folder / f"{i}.onnx").path.read_bytes() for i, t in enumerate((program, quantized))]


def test_the_same_input_gives_the_same_bytes_here_and_in_another_process(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "some where else", "third")]
    for folder in folders:
        folder.mkdir()
    first, again = write_both(folders[0]), write_both(folders[1])
    assert first == again
    command = [sys.executable, "-c", _SCRIPT, str(Path(__file__).parent), str(Path(__file__).parents[1])]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "123"}, check=True, cwd=folders[2])
    assert [(folders[2] / f"{i}.onnx").read_bytes() for i in (0, 1)] == first


@pytest.mark.slow
def test_int8_is_eight_times_smaller_than_a_float_network_three_times_its_size(tmp_path: Path) -> None:
    x = torch.randn(2, 1, 8, 8)
    torch.manual_seed(0)
    large, small = deploy_nets.Residual((40, 72, 112)).eval(), deploy_nets.Residual((16, 40, 72)).eval()
    counts = [sum(p.numel() for p in n.parameters()) for n in (large, small)]
    assert 250_000 < counts[0] <= 300_000
    assert 80_000 < counts[1] <= 100_000
    dense = export((large, x), tmp_path / "dense.onnx")
    tiny = export(quantize(capture(small, x), calibrate=[torch.randn(32, 1, 8, 8)]), tmp_path / "tiny.onnx")
    assert dense.size_bytes < 4.05 * counts[0]  # nothing flatters the comparison
    assert dense.size_bytes / tiny.size_bytes >= 8
    assert tiny.size_bytes <= 1.08 * counts[1]


def test_both_realisers_export(tmp_path: Path) -> None:
    net, inputs = deploy_nets.made("residual")
    program = capture(net, inputs(2))
    graph = GraphModel(program.eval_graph, program.train_graph, program.state)
    proof = Proof(max_error=0.0, scale=1.0, moved=1.0, mode="float32")
    files = []
    for realiser, module in (("module", net), ("graph", graph.train())):
        pruned = Pruned(module=module, program=program, plan=Plan(keep={}), realiser=realiser, proof=proof)  # type: ignore[arg-type]
        artifact = export(pruned, tmp_path / f"{realiser}.onnx")
        assert check(artifact, pruned, [inputs(3)]).holds
        files.append(artifact.path.read_bytes())
        if realiser == "graph":
            assert graph.training
    assert files[0] == files[1]


def test_a_perturbed_bias_is_caught(case: Case, tmp_path: Path) -> None:
    for artifact, reference in ((case.fp32, case.net), (case.int8, case.quantized)):
        model = onnx.load(artifact.path)
        used = {n.input[2] for n in model.graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) > 2}
        producers = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
        names = [producers.get(b, b) for b in used]
        bias = next(i for i in model.graph.initializer if i.name in names)
        array = numpy_helper.to_array(bias).copy()
        array.reshape(-1)[0] += np.asarray(
            4 * max(1.0, float(np.abs(array).max())), array.dtype
        )  # one channel: norms hide a shift of all
        bias.CopyFrom(numpy_helper.from_array(array, bias.name))
        path = tmp_path / artifact.path.name
        onnx.save(model, path)
        broken = Artifact(files=(path,), target=artifact.target, scheme=artifact.scheme)
        with pytest.raises(VerificationError, match="must equal PyTorch") as caught:
            check(broken, reference, case.samples())
        assert isinstance(caught.value.evidence, Check)
        assert not check(broken, reference, case.samples(), strict=False).holds
        assert caught.value.exit_code == 6


def test_a_mean_without_axes_kept_becomes_a_pool(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) + x.mean((-1, -2), keepdim=True).flatten(1)

    artifact = export((Mean(), torch.randn(2, 3, 4, 5)), tmp_path / "mean.onnx")
    found = [n.op_type for n in onnx.load(artifact.path).graph.node]
    assert "ReduceMean" not in found
    assert "GlobalAveragePool" in found
    assert check(artifact, Mean(), [torch.randn(3, 3, 4, 5)]).holds


@pytest.mark.parametrize("signed", [False, True])
def test_padding_by_a_constant_on_codes(signed: bool, tmp_path: Path) -> None:
    class Pads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(6, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x) if signed else self.a(x).relu()
            return self.b(torch.nn.functional.pad(y, (0, 0, 1, 1, 1, 1), value=0.0))

    torch.manual_seed(0)
    net = Pads().eval()
    x = torch.randn(64, 2, 5, 5)
    quantized = quantize(capture(net, x[:2]), calibrate=[x])
    artifact = export(quantized, tmp_path / "pad.onnx")
    result = check(artifact, quantized, [x[:8]])
    assert "Pad" in ops(result.int8_nodes)
    assert result.float_nodes == ()
    assert result.max_error <= 2e-2 * result.scale  # a wrong pad value would be off by the whole zero point


def test_the_first_layer_does_not_saturate_in_a_session_with_no_options(tmp_path: Path) -> None:
    """Bright images: codes of 255 against weights of one sign, where x86 without VNNI sums two products in 16 bits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()).eval()
    nn.init.constant_(net[0].weight, 0.1)
    bright = torch.rand(4, 4, 8, 8) * 0.1 + 0.9
    quantized = quantize(capture(net, bright[:2]), target="onnxruntime-x86", calibrate=[bright])
    path = export(quantized, tmp_path / "bright.onnx").path
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: bright.numpy()})[0]
    with torch.no_grad():
        wanted = net(bright).numpy()
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()


def test_a_linear_layer_in_float_between_codes_stays_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    samples = [torch.randn(32, 8)]
    plain = quantize(capture(net, samples[0][:2]), target="onnxruntime-x86", calibrate=samples)
    spared = quantize(capture(net, samples[0][:2]), target="onnxruntime-x86", calibrate=samples, float_layers=["2.*"])
    checks = [check(export(q, tmp_path / f"{i}.onnx"), q, samples) for i, q in enumerate((plain, spared))]
    assert all(found.holds and found.cosine > 0.9999 for found in checks)
    assert [sum("MatMul" in n or "Gemm" in n for n in found.float_nodes) for found in checks] == [0, 1]


@pytest.mark.parametrize("opset", [18, 20])
def test_the_exporter_with_its_table_kept_is_the_public_one(opset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = deploy_nets.made("concat")
    program = capture(net, inputs(2)).eval_graph
    public = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False, optimize=True)
    assert public is not None
    monkeypatch.setattr(onnx_direct, "convert", lambda program, registry: None)
    for _ in range(2):
        ours = runtime._export(program, opset).model_proto
        assert ours.SerializeToString(deterministic=True) == public.model_proto.SerializeToString(deterministic=True)


LATER = """
import sys, torch
from torch import nn
from pathlib import Path
from paredown.export import check, export
from paredown.program import capture
from paredown.quantize import quantize

program = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.zeros(2, 4))
export(program, Path(sys.argv[1]) / "float.onnx")
assert not any(name.startswith("torchao") for name in sys.modules)
x = torch.randn(32, 4)
quantized = quantize(program, calibrate=[x])
assert check(export(quantized, Path(sys.argv[1]) / "int8.onnx"), quantized, [x]).holds
print("well")
"""


def test_ops_of_libraries_that_are_imported_after_the_first_export_are_found(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LATER, tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "well", done.stderr[-2000:]


def test_another_version_of_the_exporter_is_called_in_public(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.onnx._internal.exporter import _core

    monkeypatch.setattr(_core, "export", lambda model: None)
    program = capture(nn.Linear(4, 2), torch.zeros(2, 4)).eval_graph
    called: list[int] = []
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **more: called.append(more["opset_version"]))
    runtime._export(program, 19)
    assert called == [19]


def test_side_files_are_written_counted_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "SPLIT_BYTES", 1000)
    net, inputs = deploy_nets.made("residual")
    artifact = export((net, inputs(2)), tmp_path / "big model.onnx")
    assert [f.name for f in artifact.files] == ["big model.onnx", "big model.onnx.data"]
    assert artifact.files[1].stat().st_size > 1000
    assert artifact.size_bytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    assert check(artifact, net, [inputs(3)]).holds


def test_wrong_requests_say_what_is_right_and_leave_nothing(tmp_path: Path) -> None:
    net, inputs = deploy_nets.made("residual")
    program = capture(net, inputs(2))
    with pytest.raises(UsageError, match="opset must be an integer from 18"):
        export(program, tmp_path / "a.onnx", opset=11)
    with pytest.raises(UsageError, match="target must be one of"):
        export(program, tmp_path / "a.onnx", target="tflite")
    with pytest.raises(UsageError, match="the folder"):
        export(program, tmp_path)
    with pytest.raises(UsageError, match="the thing to export"):
        export(net, tmp_path / "a.onnx")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises((ResourceError, OSError)):
        export(program, tmp_path / "file" / "a.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_ops_without_translation_are_listed(tmp_path: Path) -> None:
    class Rare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.i0e(x) + torch.special.bessel_j0(x)

    with pytest.raises(RejectedError, match=r"(?s)opset 18.*bessel_i0e.*bessel_j0") as caught:
        export((Rare(), torch.rand(2, 3)), tmp_path / "a.onnx")
    assert "test_export_onnx.py:" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_missing_libraries_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = deploy_nets.made("residual")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingError, match=r"paredown\[onnx\]"):
        export((net, inputs(2)), tmp_path / "a.onnx")


def test_a_file_newer_than_the_runtime_is_refused_with_the_way_out(tmp_path: Path) -> None:
    net, inputs = deploy_nets.made("residual")
    artifact = export((net, inputs(2)), tmp_path / "a.onnx")
    for change in ("opset", "format"):
        model = onnx.load(artifact.path)
        if change == "opset":
            model.opset_import[0].version = 999
        else:
            model.ir_version = 99
        newer = Artifact(files=(tmp_path / f"{change}.onnx",), target=artifact.target, scheme="fp32")
        onnx.save(model, newer.path)
        with pytest.raises(MissingError, match=r"lower opset=… \(--opset\)") as caught:
            check(newer, net, [inputs(2)])
        assert caught.value.exit_code == 8
        assert "99" in str(caught.value)
    artifact.path.write_bytes(b"not a model")
    with pytest.raises(RejectedError, match="must load in ONNX Runtime"):
        check(artifact, net, [inputs(2)])


def test_a_name_that_speaks_of_opsets_is_no_reason(tmp_path: Path) -> None:
    path = tmp_path / "opset 999 ir version.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(RejectedError, match="must load in ONNX Runtime"):
        check(Artifact(files=(path,), target="onnxruntime-x86", scheme="fp32"), nn.Identity(), [torch.zeros(1, 1)])


@pytest.mark.parametrize("opset", [18, 19, 20, 21, 22, 23])
def test_the_format_is_no_newer_than_the_opset_needs(opset: int, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    artifact = export((net, torch.zeros(2, 1, 4, 4)), tmp_path / "a.onnx", opset=opset)
    model = onnx.load(artifact.path)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import)


@pytest.mark.parametrize("opset", [18, 21])
def test_other_opsets(opset: int, tmp_path: Path) -> None:
    net, inputs = deploy_nets.made("concat")
    quantized = quantize(capture(net, inputs(2)), calibrate=[inputs(32)])
    artifact = export(quantized, tmp_path / "a.onnx", opset=opset)
    assert onnx.load(artifact.path).opset_import[0].version == opset
    assert check(artifact, quantized, [inputs(3)]).float_nodes == ()


@pytest.mark.parametrize("scheme", ["int8", "w4a8"])
def test_a_layer_that_is_called_twice_has_codes_of_its_bias_for_either_call(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 8), 3 * torch.randn(32, 8)
    quant = quantize(capture(deploy_nets.Pair(), (x[:2], y[:2])), calibrate=[(x, y)], scheme=scheme)
    found = check(export(quant, tmp_path / "pair.onnx"), quant, [(x, y)])
    assert (found.num_layers, found.num_layers_on_codes) == (5, 5)


@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_a_bag_of_embeddings_is_a_loop_that_the_runtime_takes(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.EmbeddingBag(10, 4, mode=mode), nn.Linear(4, 2)).eval()
    words = torch.randint(0, 10, (4, 5))
    found = check(export((net, words), tmp_path / "bag.onnx"), net, [words])
    assert found.holds
    assert found.scale > 0.1
