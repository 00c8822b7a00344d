"""Files of int8-dynamic and w4 in the real ONNX Runtime: the simulation, the codes, the nodes, and ONNX Runtime's own quantizer."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deploy_nets

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
import onnxruntime
from onnx import numpy_helper

from paredown.errors import UsageError
from paredown.export import Artifact, check, export
from paredown.program import Program, capture
from paredown.quantize import Quantized, quantize


class Words(nn.Module):
    """Embedding, two bidirectional LSTM layers, a linear head."""

    def __init__(self, width: int = 24, hidden: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.body = nn.LSTM(width, hidden, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids))[0].mean(1))


class States(nn.Module):
    """Time first, given states, no bias; output and both last states come out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(8, 12, 2, bias=False)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, (h, c) = self.body(x.transpose(0, 1), (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()))
        return out.transpose(0, 1), h.transpose(0, 1), c.transpose(0, 1)


class Tied(nn.Module):
    """A layer used twice, a product with a parameter, keys of another input than queries, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice = nn.Embedding(50, 24), nn.Linear(24, 24)
        self.right = nn.Parameter(torch.randn(24, 24) / 5)
        self.look = nn.MultiheadAttention(24, 4, batch_first=True)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y = self.twice(torch.relu(self.twice(x))) @ self.right
        return self.head(self.look(y, x, x, need_weights=False)[0])


def _ids(batch: int) -> dict[str, Any]:
    return {"args": (torch.randint(0, 50, (batch, 4)),), "kwargs": {}}


def _floats(*shapes: tuple[int, ...]) -> Callable[[int], dict[str, Any]]:
    return lambda batch: {"args": tuple(torch.randn(batch, *s) for s in shapes), "kwargs": {}}


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Any]]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 7)), _floats((30,))),
    "words": (Words, _ids),
    "states": (States, _floats((3, 8), (2, 12), (2, 12))),
    "tied": (Tied, _ids),
    "vision": (lambda: deploy_nets.made("vision")[0], deploy_nets.NETS["vision"][1]),
}
NODES = {
    ("mlp", "int8-dynamic"): {"DynamicQuantizeMatMul": 2},
    ("mlp", "w4"): {"MatMulNBits": 2},
    ("words", "int8-dynamic"): {"Gather": 1, "DynamicQuantizeLSTM": 2, "DynamicQuantizeMatMul": 1},
    ("words", "w4"): {"MatMulNBits": 1},
    ("states", "int8-dynamic"): {"DynamicQuantizeLSTM": 2},
    ("vision", "int8-dynamic"): {"DynamicQuantizeMatMul": 5},
    ("vision", "w4"): {"MatMulNBits": 5},
    ("tied", "w4"): {"MatMulNBits": 7},
}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    scheme: str
    program: Program
    quantized: Quantized
    file: Artifact
    samples: list[dict[str, Any]]


@functools.cache
def captured(name: str) -> Program:
    build, inputs = NETS[name]
    torch.manual_seed(3)
    return capture(build().eval(), inputs(2), train=False)


PAIRS = [(n, s) for n in NETS for s in ("int8-dynamic", "w4") if (n, s) != ("states", "w4")]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    name, scheme = request.param
    program, inputs = captured(name), NETS[name][1]
    quantized = quantize(program, scheme=scheme)
    file = export(quantized, tmp_path_factory.mktemp(name) / "q.onnx")
    yield Case(name, scheme, program, quantized, file, [inputs(5), inputs(3)])


def test_the_file_equals_the_simulation_at_any_batch(case: Case) -> None:
    result = check(case.file, case.quantized, case.samples)
    assert result.holds
    assert result.scale > 0.01
    assert result.max_error <= 1e-4 * result.scale  # the kernels are exact here, not only near
    floating = check(case.file, case.program, case.samples, strict=False)
    assert floating.max_error > 1e-4 * result.scale  # and the codes do round
    assert case.file.scheme == case.scheme


def test_integer_nodes_of_the_runtimes_own_graph(case: Case) -> None:
    result = check(case.file, case.quantized, case.samples)
    found = collections.Counter(n.split(":")[0] for n in result.int8_nodes)
    if (case.name, case.scheme) in NODES:
        assert found == NODES[case.name, case.scheme]
    assert not {"MatMulInteger", "DynamicQuantizeLinear", "Cast"} & {n.split(":")[0] for n in result.float_nodes}
    if case.name == "tied":  # keys and values are one product
        assert sum(found[k] for k in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits")) == 7


def test_a_session_without_paredowns_option_computes_the_same(case: Case) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # with more, a part of the batch has its own range of the LSTM's hidden state
    session = onnxruntime.InferenceSession(str(case.file.path), options, providers=["CPUExecutionProvider"])
    batch = case.samples[0]["args"]
    got = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), batch, strict=True)})
    with torch.no_grad():
        expected = case.quantized.module(*batch)
    for a, b in zip(got, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert np.abs(a - b.numpy()).max() <= 1e-4 * np.abs(b.numpy()).max()


def test_codes_in_the_file_are_those_of_quantized(case: Case) -> None:
    model = onnx.load(case.file.path)
    arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    expected = collections.Counter(_key(p.codes.numpy(), axis=p.axis) for p in case.quantized.weights.values())
    seen: collections.Counter[Any] = collections.Counter()
    for node in model.graph.node:
        if node.op_type == "MatMulInteger":
            source = node.input[1]
            array = arrays[source].T if source in arrays else arrays[makers[source].input[0]]
            seen[_key(array.astype(int) - int(arrays[node.input[3]]))] += 1
        elif node.op_type == "MatMulNBits":
            inputs = next(a.i for a in node.attribute if a.name == "K")
            seen[_key(_unpacked(arrays[node.input[1]])[:, :inputs])] += 1
        elif node.op_type == "Gather" and node.input[0] in arrays and arrays[node.input[0]].dtype == np.uint8:
            seen[_key(arrays[node.input[0]].astype(int) - 128)] += 1
        elif node.op_type == "DynamicQuantizeLSTM":
            for position, zero in ((1, 9), (2, 11)):
                both = arrays[node.input[position]].astype(int) - arrays[node.input[zero]].astype(int)[:, None, :]
                seen.update(_key(_gates(one.T)) for one in both)
    assert set(seen) == set(expected)
    assert len(seen) == len(case.quantized.weights) > 0
    floats = sum(a.size for a in arrays.values() if a.dtype == np.float32 and a.ndim == 2 and min(a.shape) > 4)
    if case.scheme == "int8-dynamic" and case.name != "vision":
        assert floats == 0 or case.name == "words"


def _key(codes: Any, axis: int | None = 0) -> tuple[Any, ...]:
    """Codes as something to count by: shape and bytes, with the output channels first."""
    array = np.asarray(codes).astype(np.int8)
    array = np.ascontiguousarray(array.T if axis == 1 else array)
    return array.shape, array.tobytes()


def _unpacked(packed: Any) -> Any:
    """Numpy's own reading of MatMulNBits: bytes to two nibbles, low one first, minus 8."""
    outputs = packed.shape[0]
    low, high = packed & 0x0F, packed >> 4
    return np.stack([low, high], -1).reshape(outputs, -1).astype(int) - 8


def _gates(rows: Any) -> Any:
    """Rows in ONNX's order i, o, f, c back to PyTorch's i, f, g, o."""
    i, o, f, g = np.split(rows, 4)
    return np.concatenate([i, f, g, o])


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [export(quantize(captured("words"), scheme="int8-dynamic"), tmp_path / f"{k}.onnx").path for k in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_accuracy_level_is_asked_for_and_checked(tmp_path: Path) -> None:
    program, inputs = captured("mlp"), NETS["mlp"][1]
    four = quantize(program, scheme="w4")
    file = export(four, tmp_path / "four.onnx", accuracy_level=4)
    levels = [a.i for n in onnx.load(file.path).graph.node for a in n.attribute if a.name == "accuracy_level"]
    assert levels == [4, 4]
    result = check(file, four, [inputs(64)])
    assert result.cosine >= 0.999
    assert result.max_error > 1e-4 * result.scale  # products in int8 round
    for thing in (program, quantize(program, scheme="int8-dynamic")):
        with pytest.raises(UsageError, match="accuracy_level"):
            export(thing, tmp_path / "no.onnx", accuracy_level=4)


class Encoder(nn.Module):
    """An encoder as BERT has it: embedding, layers of attention and GELU, a head on the first token."""

    def __init__(self, words: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(words, width), nn.Parameter(torch.randn(1, 32, width) / 10)
        layer = [
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True) for _ in range(layers)
        ]
        self.layers, self.head = nn.Sequential(*layer), nn.Linear(width, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.table(ids) + self.place)[:, 0])


PEERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "words": (lambda: Words(96, 128), lambda batch: torch.randint(0, 50, (batch, 4))),
    "encoder": (lambda: Encoder(500, 64, 1, 4), lambda batch: torch.randint(0, 500, (batch, 32))),
}


@pytest.mark.parametrize("name", PEERS)
def test_no_larger_and_no_less_exact_than_the_runtimes_own_quantizer(name: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    torch.manual_seed(1)
    build, inputs = PEERS[name]
    program = capture(build().eval(), inputs(2), train=False)
    floating = export(program, tmp_path / "float.onnx")
    mine = export(quantize(program, scheme="int8-dynamic"), tmp_path / "mine.onnx")
    # Their default, int8 weights, saturates on x86 without VNNI; unsigned weights do not.
    quantize_dynamic(floating.path, tmp_path / "theirs.onnx", per_channel=True, weight_type=QuantType.QUInt8)
    theirs = dataclasses.replace(mine, files=(tmp_path / "theirs.onnx",))
    samples = [{"args": (inputs(8),), "kwargs": {}} for _ in range(2)]
    ours, peers = (check(f, program, samples, strict=False) for f in (mine, theirs))
    assert mine.size_bytes <= 1.03 * theirs.size_bytes
    assert mine.size_bytes < 0.4 * floating.size_bytes
    assert 0 < len(peers.int8_nodes) <= len(ours.int8_nodes)
    left = [n for n in peers.float_nodes if n.startswith("LSTM")]
    if left:  # they leave LSTM layers in float, so nothing is rounded there
        assert not any(n.startswith("LSTM") for n in ours.float_nodes)
        assert mine.size_bytes < 0.6 * theirs.size_bytes
        assert ours.cosine >= 0.9999
    else:
        assert 1 - ours.cosine <= 1.1 * (1 - peers.cosine) + 1e-6
