"""Layers on codes in the forms that ONNX Runtime has fast kernels for: the same codes, the same result bit for bit, no slow layer left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchao")
pytest.importorskip("onnx")

import onnx
from onnx import numpy_helper

from paredown.examine.onnx_file import examine_onnx
from paredown.export import Artifact, check, export, onnx_kernels, predictor
from paredown.export.onnxruntime import _optimized
from paredown.export.session import EXACT
from paredown.program import capture
from paredown.quantize import Quantized, quantize


def between(layer: nn.Module, inner: int, outer: int) -> nn.Module:
    """A layer between two others of its kind, which is where grouped convolutions stand."""
    kind: Any = nn.Conv3d if isinstance(layer, nn.Conv3d) else nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
    return nn.Sequential(kind(3, inner, 1), nn.ReLU(), layer, nn.ReLU(), kind(outer, 3, 1))


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "frames": (between(nn.Conv3d(4, 6, 3, padding=1), 4, 6), (5, 8, 8)),
    "frames-odd": (
        nn.Sequential(nn.Conv3d(3, 5, (3, 5, 2), (2, 1, 2), (2, 1, 0), (2, 1, 1)), nn.ReLU(), nn.Conv3d(5, 2, 2)),
        (9, 8, 8),
    ),
    "frames-strided": (
        nn.Sequential(nn.Conv3d(3, 4, (1, 3, 3), (2, 2, 2)), nn.Conv3d(4, 4, (1, 3, 3), groups=4)),
        (6, 9, 9),
    ),
    "frames-groups": (between(nn.Conv3d(8, 12, 3, padding=1, groups=4), 8, 12), (4, 6, 6)),
    "frames-rows": (
        nn.Sequential(
            nn.Conv3d(3, 6, (3, 1, 1), (2, 1, 1), (1, 0, 0)), nn.ReLU(), nn.Conv3d(6, 6, (3, 1, 1), groups=6)
        ),
        (9, 5, 4),
    ),
    "repeat": (between(nn.Conv2d(6, 18, 3, 2, 1, groups=6), 6, 18), (9, 9)),
    "merge": (between(nn.Conv2d(24, 36, 3, 1, 1, groups=12), 24, 36), (7, 7)),
    "merge-wide": (between(nn.Conv2d(32, 32, 3, 1, 2, 2, groups=4, bias=False), 32, 32), (8, 8)),
    "merge-row": (between(nn.Conv1d(16, 16, 5, 1, 2, groups=8), 16, 16), (20,)),
    "gelu": (Gelu(), (8, 8)),
}


# The layer in the middle of some: inputs per group and groups in the runtime's own graph.
GROUPS = {"repeat": (1, 18), "merge": (12, 2), "merge-wide": (16, 2), "merge-row": (16, 1), "frames-groups": (12, 2)}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Quantized, Artifact]:
    torch.manual_seed(3)
    net, size = CASES[request.param]
    program = capture(net.eval(), torch.randn(2, 3, *size), train=False)
    one = quantize(program, calibrate=[torch.randn(8, 3, *size)], observer="minmax")
    return request.param, one, export(one, tmp_path_factory.mktemp("a") / "new.onnx")


def test_the_result_is_the_same_bit_for_bit(
    case: tuple[str, Quantized, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, one, new = case
    x = torch.randn(5, 3, *CASES[name][1])
    monkeypatch.setattr(onnx_kernels, "rewrite", lambda model, forms: 0)
    old = export(one, tmp_path / "old.onnx")
    assert torch.equal(torch.as_tensor(predictor(new)(x)), torch.as_tensor(predictor(old)(x)))
    assert examine_onnx(new.path).parameters == examine_onnx(old.path).parameters
    assert new.size_bytes < old.size_bytes + 1500 * len(one.weights)
    assert check(new, one, [x]).layer_share == 1


def test_kernels_are_the_fast_ones_and_codes_are_kept(case: tuple[str, Quantized, Artifact]) -> None:
    name, one, file = case
    graph, written = _optimized(file).graph, onnx.load(str(file.path))
    held = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    layers = {n.name: n for n in graph.node if n.op_type == "QLinearConv"}
    assert len(layers) == len(one.weights)
    shapes = [held[n.input[3]].shape for n in layers.values()]
    assert all(len(shape) < 5 or shape[2:] == (1, 1, 1) for shape in shapes)
    assert ("Gelu" in {n.op_type for n in graph.node}) == (name == "gelu")
    if name in GROUPS:
        groups = next((a.i for a in layers["2"].attribute if a.name == "group"), 1)
        assert (held[layers["2"].input[3]].shape[1], groups) == GROUPS[name]
    kept = [numpy_helper.to_array(i) for i in written.graph.initializer]
    for packed in one.weights.values():
        codes = packed.codes.numpy()
        assert any(k.dtype == np.int8 and np.array_equal(k, codes) for k in kept)
    assert {p.key: p.value for p in written.metadata_props}[EXACT] == "1"  # no neighbours that could saturate


def test_four_bits_are_packed_all_the_same(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 5, 1, 2, groups=16), nn.ReLU(), nn.Conv2d(64, 4, 1)
    ).eval()
    program, x = capture(net, torch.randn(2, 3, 6, 6), train=False), torch.randn(8, 3, 6, 6)
    one = quantize(program, calibrate=[x], scheme="w4a8")
    file = export(one, tmp_path / "a.onnx")
    assert check(file, one, [x]).layer_share == 1
    kept = [numpy_helper.to_array(i) for i in onnx.load(str(file.path)).graph.initializer]
    assert max(k.nbytes for k in kept) == one.weights["2.weight"].codes.numel() // 2
