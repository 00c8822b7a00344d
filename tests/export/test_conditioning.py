"""Networks that amplify rounding are held to what their own simulation can be held to; others are not excused."""

import onnx
import pytest
import torch
from torch import nn

import paredown as pare
from paredown.errors import VerificationError
from paredown.export import conditioning


class Steep(nn.Module):
    """Layers that multiply small differences: one step of rounding in front is many behind."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.5)

    def forward(self, x, *, shift):
        for layer in self.layers:
            x = torch.tanh(layer(x) + shift)
        return x


def quantized(net, *args, **kwargs):
    args_kwargs = {"args": args, "kwargs": kwargs}
    return pare.quantize(pare.capture(net, args_kwargs), target="onnxruntime-x86", calibrate=[args_kwargs])


@pytest.fixture(scope="module")
def steep():
    torch.manual_seed(0)
    return quantized(Steep(6), torch.randn(16, 64), shift=torch.randn(16, 64))


def test_a_network_that_amplifies_differs_from_itself_and_another_does_not(steep):
    part = (torch.randn(16, 64),), {"shift": torch.randn(16, 64)}
    assert conditioning.own_cosine(steep, part, noise=0) == pytest.approx(1, abs=1e-12)
    assert conditioning.own_cosine(steep, part, noise=1e-3) < 0.99
    torch.manual_seed(0)
    mild = quantized(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)), torch.randn(16, 3, 8, 8)
    )
    assert conditioning.own_cosine(mild, ((torch.randn(16, 3, 8, 8),), {})) > 0.9999


def test_twice_its_own_distance_is_the_bound(steep):
    part = (torch.randn(1024, 64),), {"shift": torch.randn(1024, 64)}
    own = 1 - conditioning.own_cosine(steep, part)
    assert 1e-6 < own < 0.005
    assert f"{1 - own:.6f}" in conditioning.excuse(steep, part, 1 - 1.9 * own)
    assert conditioning.excuse(steep, part, 1 - 2.1 * own) == ""
    assert conditioning.excuse(steep, part, 0.5) == ""


def test_a_refusal_says_where_no_file_could_be_told_right_from_wrong(steep):
    part = (torch.randn(64, 64),), {"shift": torch.randn(64, 64)}
    torch.manual_seed(0)
    deep = quantized(Steep(24), torch.randn(16, 64), shift=torch.randn(16, 64))
    assert "no file of it can be told right from wrong" in conditioning.hopeless(deep, part, 0.95)
    assert conditioning.hopeless(deep, part, 0.99) == conditioning.hopeless(steep, part, 0.95) == ""


def test_a_right_file_of_a_network_that_amplifies_holds_and_says_so(tmp_path):
    torch.manual_seed(0)
    made = quantized(Steep(12), torch.randn(16, 64), shift=torch.randn(16, 64))
    artifact = pare.export(made, tmp_path / "net.onnx")
    many = {"args": (torch.randn(1024, 64),), "kwargs": {"shift": torch.randn(1024, 64)}}
    found = pare.check(artifact, made, [many], strict=False)
    if not conditioning.LEAST <= found.cosine < 0.999:
        pytest.skip(f"which values fall on the other side is this processor's: cosine {found.cosine:.6f}")
    assert found.holds
    assert [n for n in found.notes if "amplifies rounding" in n]


def test_what_is_no_simulation_is_not_excused(steep):
    part = (torch.randn(2, 64),), {"shift": torch.randn(2, 64)}
    assert conditioning.excuse(steep.program, part, 0.998) == ""
    assert conditioning.excuse(steep, None, 0.998) == ""


def test_a_wrong_file_of_a_network_that_does_not_amplify_fails(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    made = quantized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)), x)
    artifact = pare.export(made, tmp_path / "net.onnx")
    assert pare.check(artifact, made, [x]).notes == ()
    model = onnx.load(artifact.path)
    codes = max(
        (i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT8), key=lambda i: len(i.raw_data)
    )
    codes.raw_data = bytes(b ^ 0x0F if n % 8 == 0 else b for n, b in enumerate(codes.raw_data))
    onnx.save(model, artifact.path)
    with pytest.raises(VerificationError, match=r"cosine 0\.9") as caught:
        pare.check(artifact, made, [x])
    assert 0.9 < caught.value.evidence.cosine < 0.999
    assert caught.value.evidence.notes == ()
