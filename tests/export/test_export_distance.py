"""When a file is near enough to PyTorch: each output by itself, offsets, masks' minus infinity, NaN."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from paredown.errors import RejectedError, VerificationError
from paredown.export import check, export
from paredown.export.distance import Distance, of_spread
from paredown.program import capture
from paredown.quantize import quantize

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Grams(nn.Module):
    """A regression far from zero: 3,258 give or take some grams."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 1)
        nn.init.normal_(self.o.weight, std=30.0)
        nn.init.constant_(self.o.bias, 3258.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.a(x).relu())  # type: ignore[no-any-return]


def changed(path: Path, which: str | list[int], change: float | None) -> None:
    """Set an initializer (by its name, or by its dimensions where codes have none) to zero, or add to it, in the file."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    tensor = next(t for t in model.graph.initializer if which in (t.name, list(t.dims)))
    array = numpy_helper.to_array(tensor)
    new = np.zeros_like(array) if change is None else (array + np.asarray(change, array.dtype))
    tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    onnx.save(model, str(path))


def test_a_head_that_says_the_same_of_all_is_refused(tmp_path: Path) -> None:
    quantized = quantize(capture(Grams().eval(), X[:2]), calibrate=[X])
    artifact = export(quantized, tmp_path / "net.onnx")
    right = check(artifact, quantized, [X])
    assert right.holds and right.cosine > 0.999
    changed(artifact.path, [1, 16], None)
    wrong = check(artifact, quantized, [X], strict=False)
    assert wrong.cosine > 0.999 and not wrong.holds  # all that a cosine sees is the offset
    with pytest.raises(VerificationError, match="differ among themselves"):
        check(artifact, quantized, [X])


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.p, self.g = nn.Linear(8, 1), Grams()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"probability": self.p(x).sigmoid(), "grams": self.g(x)}


def test_a_small_output_beside_a_large_one_is_held_to_its_own_scale(tmp_path: Path) -> None:
    net = Both().eval()
    artifact = export((net, X[:2]), tmp_path / "net.onnx")
    assert check(artifact, net, [X]).holds
    changed(artifact.path, "p.bias", 1.2)
    found = check(artifact, net, [X], strict=False)
    assert not found.holds and found.scale <= 1.0 and found.max_error > 0.1


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 6)
        self.register_buffer("mask", torch.tensor([0, 0, 1, 0, 1, 0], dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).masked_fill(self.mask, -math.inf)


def test_minus_infinity_that_both_say_is_no_error(tmp_path: Path) -> None:
    net = Masked().eval()
    artifact = export((net, X[:2]), tmp_path / "net.onnx")
    found = check(artifact, net, [X])
    assert found.holds and 0 < found.scale < math.inf and found.max_error < 1e-3
    other = Masked().eval()
    other.mask[0] = True
    other.load_state_dict(net.state_dict() | {"mask": other.mask})
    assert not check(artifact, other, [X], strict=False).holds


def test_a_masked_network_is_quantized_and_checked(tmp_path: Path) -> None:
    quantized = quantize(capture(Masked().eval(), X[:2]), calibrate=[X])
    assert check(export(quantized, tmp_path / "net.onnx"), quantized, [X]).holds


def test_a_reference_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    net = nn.Linear(8, 2).eval()
    artifact = export((net, X[:2]), tmp_path / "net.onnx")
    broken = nn.Linear(8, 2).eval()
    nn.init.constant_(broken.bias, math.nan)
    with pytest.raises(RejectedError, match="NaN in output 0"):
        check(artifact, broken, [X], strict=False)
    large = nn.Linear(8, 2).eval()
    nn.init.constant_(large.bias, 3e38)
    large.weight.data *= 1e38  # every output overflows, in the file too
    with pytest.raises(RejectedError, match="infinity in output 0"):
        check(export((large, X[:2]), tmp_path / "large.onnx"), large, [X])
    bad = X.clone()
    bad[3, 1] = math.nan
    with pytest.raises(RejectedError, match="samples"):
        check(artifact, net, [bad])


def test_steps_of_codes_are_no_loss() -> None:
    """Outputs that all lie on two steps: one that falls to the other side is a large part of their spread, and rounding all the same."""
    expected = np.array([0.1] * 60 + [0.2] * 4)
    got = expected.copy()
    got[:3] = 0.2
    assert of_spread(got, expected) == 0.0
    assert of_spread(expected * 0 + expected.mean(), np.linspace(0, 1, 64)) > 0.3
    far = Distance()
    far.add([torch.from_numpy(got)], [torch.from_numpy(expected)])
    assert far.in_spread


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_are_refused_before_any_work(tmp_path: Path, dtype: torch.dtype) -> None:
    net = nn.Linear(8, 2).to(dtype).eval()
    with pytest.raises(
        RejectedError, match=rf"float32 to be exported. Got {str(dtype).removeprefix('torch.')} in weight"
    ):
        export((net, X[:2].to(dtype)), tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_samples_that_the_file_does_not_take_are_told_by_shape(tmp_path: Path) -> None:
    net = nn.Linear(8, 2).eval()
    artifact = export((net, X[:2]), tmp_path / "net.onnx")
    for wrong in (torch.zeros(3, 7), torch.zeros(8), torch.zeros(2, 3, 8)):
        with pytest.raises(RejectedError, match=r"samples must be what the file takes: .* of shape \(any, 8\)"):
            check(artifact, Anything(), [wrong])
    assert check(artifact, net, [X.bfloat16().float()]).holds


class Anything(nn.Module):
    """A reference that takes anything: it is the file that must refuse."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 2)
