"""fp16: weights in 16 bits, arithmetic in float32, in files for ONNX Runtime and OpenVINO."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from paredown.cli.main import main
from paredown.errors import NothingToDo, RejectedError, UsageError
from paredown.export import check, export
from paredown.measure import artifact_at
from paredown.program import Program, capture
from paredown.quantize import quantize

SUFFIXES = {"onnxruntime-x86": ".onnx", "openvino-x86": ".xml"}


class Mixed(nn.Module):
    """A table, a convolution with batch norm, a layer used twice, and a buffer of numbers that float16 has not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.conv = nn.Conv1d(24, 24, 3, padding=1)
        self.norm = nn.BatchNorm1d(24)
        self.twice = nn.Linear(24, 24)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("place", torch.linspace(0, 1, 24 * 8).reshape(24, 8))

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(self.conv(self.table(words).transpose(1, 2))) + self.place
        return self.head(self.twice(torch.relu(self.twice(x.mean(2)))))


@pytest.fixture(scope="module")
def mixed() -> tuple[Mixed, Program, Tensor]:
    torch.manual_seed(0)
    net, words = Mixed().eval(), torch.randint(0, 50, (3, 8))
    return net, capture(net, words, train=False), words


@pytest.mark.parametrize("target", list(SUFFIXES))
def test_the_file_is_the_network_with_rounded_weights(
    target: str, mixed: tuple[Mixed, Program, Tensor], tmp_path: Path
) -> None:
    if target == "openvino-x86":
        pytest.importorskip("openvino")
    net, program, words = mixed
    before = {n: t.clone() for n, t in net.state_dict().items()}
    small = quantize(program, scheme="fp16", target=target)
    artifact = export(small, tmp_path / f"half{SUFFIXES[target]}", target=target)
    whole = export(program, tmp_path / f"whole{SUFFIXES[target]}", target=target)
    weights = [n for n, t in net.named_parameters() if t.dim() > 1]
    saved = 2 * sum(net.state_dict()[n].numel() for n in weights)
    assert whole.size_bytes - saved <= artifact.size_bytes <= whole.size_bytes - saved + 1500  # casts, and their names
    # Two oracles: PyTorch with batch norm folded and weights that went through float16, and the network as it is.
    rounded = copy.deepcopy(net)
    rounded.conv, rounded.norm = fuse_conv_bn_eval(rounded.conv, rounded.norm), nn.Identity()
    with torch.no_grad():
        for weight in (p for p in rounded.parameters() if p.dim() > 1):
            weight.copy_(weight.half().float())
    assert check(artifact, rounded, [words]).max_error <= 1e-5 * check(artifact, small, [words]).scale
    found = check(artifact, program, [words])
    assert 0 < found.max_error <= 1e-2 * found.scale and not found.int8_nodes
    assert artifact_at(artifact.path) == artifact and artifact.scheme == "fp16"
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    direct = export(program, tmp_path / f"direct{SUFFIXES[target]}", target=target, scheme="fp16")
    assert [f.read_bytes() for f in direct.files] == [f.read_bytes() for f in artifact.files]


def test_what_float16_cannot_hold_stays_float32_and_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4))).eval()
    with torch.no_grad():
        net[0].weight[3, 5] = 7e4
        net[1].weight[2] *= 1e-7
        net[2].weight[2] = 0  # exact
    x = torch.randn(4, 24)
    for target, suffix in SUFFIXES.items():
        small = quantize(capture(net, x, train=False), scheme="fp16", target=target, float_layers=["3"])
        notes = "\n".join(small.notes)
        assert "0.weight stays float32: values up to 7e+04 are beyond 65504" in notes
        assert "1.weight stays float32: a channel of values of" in notes and "2.weight" not in notes
        assert "3.weight stays float32: asked for" in notes and "25.0% of the weights" in notes
        artifact = export(small, tmp_path / f"a{suffix}", target=target)
        assert check(artifact, small, [x]).max_error <= 1e-5 * check(artifact, net, [x]).scale
    held = onnx.load(tmp_path / "a.onnx").graph.initializer
    kinds = {t.name: numpy_helper.to_array(t).dtype.name for t in held if len(t.dims) == 2}
    assert sorted(kinds.values()) == ["float16", "float32", "float32", "float32"]


def test_weights_too_small_for_sums_of_their_squares_are_told() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        net[0].weight.fill_(1e-25)
    small = quantize(capture(net, torch.randn(2, 4), train=False), scheme="fp16")
    assert any(n.startswith("0.weight stays float32: a channel of values of 1e-25") for n in small.notes)


class Computed(nn.Module):
    """Batch norms whose factors, or whose layer's bias, are worked out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 16, 3)
        self.scale, self.shift = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))
        self.register_buffer("mean", torch.randn(16))
        self.register_buffer("var", torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, self.first.weight, self.shift.exp())
        x = nn.functional.batch_norm(x, self.mean, self.var, self.scale, self.shift)
        return nn.functional.batch_norm(self.second(x), self.mean, self.var, self.scale.exp(), self.shift)


def test_batch_norms_with_computed_factors_stay_where_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Computed().eval(), torch.randn(2, 3, 8, 8)
    small = quantize(capture(net, x, train=False), scheme="fp16")
    artifact = export(small, tmp_path / "a.onnx")
    with torch.no_grad():
        for layer in (net.first, net.second):
            layer.weight.copy_(layer.weight.half().float())
    assert check(artifact, net, [x]).max_error <= 1e-5 * check(artifact, small, [x]).scale


def test_litert_whose_converter_makes_halves_of_all_is_refused_what_is_to_stay_float32() -> None:
    from paredown.export.litert import _refuse_whole

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)).eval()

    def half(**asked: Any) -> Any:
        return quantize(capture(net, x, train=False), scheme="fp16", target="litert", **asked)

    _refuse_whole(half())
    with pytest.raises(RejectedError, match=r"2\.weight: asked for"):
        _refuse_whole(half(float_layers=["2"]))
    with torch.no_grad():
        net[1].weight.fill_(1e6)  # held by float16 before batch norm is folded into it, not after
    with pytest.raises(RejectedError, match=r"0\.weight: values up to"):
        _refuse_whole(half())


def test_requests_that_cannot_be_met() -> None:
    x = torch.randn(2, 4)
    program = capture(nn.Sequential(nn.Linear(4, 4)), x, train=False)
    with pytest.raises(UsageError, match="openvino-x86, litert for the scheme fp16"):
        quantize(program, scheme="fp16", target="executorch-xnnpack")
    with pytest.raises(UsageError, match="reads no samples"):
        quantize(program, scheme="fp16", repair=["bias"])
    with pytest.raises(UsageError, match="'nothing', which matches none"):
        quantize(program, scheme="fp16", float_layers=["nothing"])
    with pytest.raises(NothingToDo, match=r"0\.weight stays float32: asked for"):
        quantize(program, scheme="fp16", float_layers=["0"])
    with pytest.raises(NothingToDo, match="no weight with two axes"):
        quantize(capture(nn.ReLU(), x, train=False), scheme="fp16")


@pytest.mark.parametrize("target", list(SUFFIXES))
def test_on_the_command_line(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 4))\n"
    )
    given: list[Any] = [f"{tmp_path / 'net.py'}:net", "--input", "1x3x8x8", "--target", target]
    wrong = [
        "quantize",
        *given[:3],
        "--target",
        "executorch-xnnpack",
        "--scheme",
        "fp16",
        "--out",
        str(tmp_path / "a.pte"),
    ]
    assert main(wrong) == 2 and "litert for the scheme fp16" in capsys.readouterr().err
    found = {}
    for verb, scheme in (("quantize", "fp16"), ("export", "fp16"), ("export", "fp32")):
        file = str(tmp_path / f"{verb}-{scheme}{SUFFIXES[target]}")
        assert main([verb, *given, "--scheme", scheme, "--out", file, "--json"]) == 0
        found[verb, scheme] = json.loads(capsys.readouterr().out)
    small = found["quantize", "fp16"]
    assert small["scheme"] == "fp16" and small["check"]["holds"] and small["calibrated_on"] == "none"
    assert small["file_bytes"] == found["export", "fp16"]["file_bytes"] < 0.8 * found["export", "fp32"]["file_bytes"]
    assert 0 < small["rounding"]["error_of_deviation"] < 0.01 and any("not faster" in n for n in small["notes"])
