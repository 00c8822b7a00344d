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


def test_beyond_its_own_distance_the_float_network_decides(steep):
    part = (torch.randn(1024, 64),), {"shift": torch.randn(1024, 64)}
    torch.manual_seed(0)
    deep = quantized(Steep(7), torch.randn(64, 64), shift=torch.randn(64, 64))
    with torch.no_grad():
        simulated, exact = deep.module(*part[0], **part[1]), deep.program.module(*part[0], **part[1])
    own, far = conditioning.own_cosine(deep, part), conditioning.cosine_of(simulated, exact)
    assert own < conditioning.AMPLIFIES, "or nothing is asked"
    beyond = 1 - 2.5 * (1 - own)
    assert beyond > conditioning.LEAST
    assert conditioning.excuse(deep, part, beyond) == ""
    assert "as near to the float network" in conditioning.excuse(deep, part, beyond, [simulated])
    error = simulated - exact
    farther = exact + 1.1 * error
    assert conditioning.cosine_of(farther, exact) < far
    assert conditioning.excuse(deep, part, beyond, [farther]) == ""
    assert conditioning.excuse(steep, part, 1 - 2.5 * (1 - conditioning.own_cosine(steep, part)), [exact]) == ""


def test_a_file_that_errs_on_the_other_side_is_not_excused(steep, monkeypatch):
    part = (torch.randn(1024, 64),), {"shift": torch.randn(1024, 64)}
    with torch.no_grad():
        simulated, exact = steep.module(*part[0], **part[1]), steep.program.module(*part[0], **part[1])
    opposite, far = 2 * exact - simulated, 1 - conditioning.cosine_of(simulated, exact)
    monkeypatch.setattr(conditioning, "own_cosine", lambda *_: 0.9985)
    monkeypatch.setattr(conditioning, "LEAST", 0.0)
    assert conditioning.cosine_of(opposite, simulated) < 1 - 3 * far, (
        "twice the error apart, which is four times the square"
    )
    assert conditioning.excuse(steep, part, 1 - 3 * far, [simulated]) == ""
    assert conditioning.excuse(steep, part, 1 - 1.9 * far, [simulated]) != ""


@pytest.mark.parametrize("flip", [1, 3, 15])
def test_a_wrong_file_of_a_network_that_amplifies_is_not_excused(tmp_path, flip):
    torch.manual_seed(0)
    made = quantized(Steep(7), torch.randn(64, 64), shift=torch.randn(64, 64))
    artifact = pare.export(made, tmp_path / "net.onnx")
    many = {"args": (torch.randn(1024, 64),), "kwargs": {"shift": torch.randn(1024, 64)}}
    model = onnx.load(artifact.path)
    codes = max(
        (i for i in model.graph.initializer if i.data_type == onnx.TensorProto.INT8), key=lambda i: len(i.raw_data)
    )
    codes.raw_data = bytes(b ^ flip if n % 2 == 0 else b for n, b in enumerate(codes.raw_data))
    onnx.save(model, artifact.path)
    with pytest.raises(VerificationError):
        pare.check(artifact, made, [many])


def test_a_network_with_a_fixed_batch_is_asked_with_one_sample_as_often_as_it_takes(steep):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(4, 8)
    made = pare.quantize(pare.capture(net, x, dynamic_batch=False), target="onnxruntime-x86", calibrate=[x])
    assert conditioning.own_cosine(made, ((x[:1],), {})) > 0.999
    assert conditioning._from_float(made, ((x[:1],), {}), [net(x[:1]).detach()])[0][0] == pytest.approx(1)


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
