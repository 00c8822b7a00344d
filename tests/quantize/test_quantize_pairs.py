"""Pairs: sums of two products of uint8 and int8 fit in 16 bits, counted with integers and in the runtime itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import paredown
from paredown.export import check, export, onnx_kernels
from paredown.export.session import EXACT, has_exact_products
from paredown.program import capture
from paredown.quantize import quantize
from paredown.quantize.pairs import pair_floor, pair_sums, within
from paredown.quantize.qat import LearnedStep, train_quantized


def saturating(a: np.ndarray, w: np.ndarray) -> int:
    """What vpmaddubsw makes of a row: neighbours' products are summed in int16, and these sums in int32."""
    products = a.astype(np.int64) * w.astype(np.int64)
    pairs = np.pad(products, (0, len(products) % 2)).reshape(-1, 2).sum(1)
    return int(np.clip(pairs, -(2**15), 2**15 - 1).sum())


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=12))
def test_within_128_no_activations_saturate_and_beyond_some_do(row: list[int]) -> None:
    w = np.array(row, np.int8)
    extremes = [np.where(w > 0, 255, 0), np.where(w < 0, 255, 0), np.full(len(w), 255)]
    exact = all(saturating(a.astype(np.uint8), w) == int((a * w.astype(np.int64)).sum()) for a in extremes)
    found = int(pair_sums(torch.from_numpy(w)[None])[0])
    assert found == max((abs(int(a) + int(b)) for a, b in zip(w[::2], w[1::2], strict=False)), default=0)
    assert exact == (found <= 128)


@given(
    st.integers(0, 2**31),
    st.sampled_from([(3, 4, 3, 3), (2, 3, 3, 2), (2, 1, 5, 5), (4, 7), (2, 3, 5), (2, 2, 3, 3, 2)]),
)
def test_scales_at_the_floor_hold_the_rule_in_every_order(seed: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    floor = torch.maximum(pair_floor(weight, 128), weight.abs().flatten(1).amax(1) / 127)
    codes = torch.round(weight / floor.reshape(-1, *[1] * (len(shape) - 1))).to(torch.int8)
    assert int(pair_sums(codes).max()) <= 128
    by_place = codes.reshape(shape[0], shape[1], -1).numpy().astype(int)
    for out, place in itertools.product(range(shape[0]), range(by_place.shape[2])):  # neighbouring inputs at one place
        column = np.pad(by_place[out, :, place], (0, shape[1] % 2)).reshape(-1, 2).sum(1)
        assert np.abs(column).max() <= 128


@given(st.integers(0, 2**31), st.sampled_from([(3, 3, 3), (5,), (4,), (1, 5, 5), (3, 4), (3, 2, 2, 2)]))
def test_codes_that_break_the_rule_give_way_and_no_others(seed: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(-127, 128, (4, int(np.prod(shape))), generator=torch.Generator().manual_seed(seed)).double()
    found = within(codes, shape, 128)
    assert int(pair_sums(found.reshape(4, *shape)).max()) <= 128
    assert (found.abs() <= codes.abs()).all() and (found * codes >= 0).all()
    fits = pair_sums(codes.reshape(4, *shape)) <= 128
    assert torch.equal(found[fits], codes[fits])
    assert (found != codes).sum() <= codes.numel() // 2 + 1 + codes.numel() * (shape[0] % 2)


class Bright(nn.Module):
    """Weights of one sign in every kind of layer: products of bright inputs saturate if they can."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.c = nn.Conv2d(8, 12, 3, groups=2)
        self.d = nn.Linear(12, 16)
        self.e = nn.Linear(16, 5)
        for p in self.parameters():
            nn.init.uniform_(p, 0.05, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.e(torch.relu(self.d(x.mean((2, 3)))))


def both_sessions(path: Path, x: torch.Tensor) -> list[np.ndarray]:
    found = []
    for exact in (False, True):
        options = onnxruntime.SessionOptions()
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found.append(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    return found


def test_a_session_with_no_options_computes_what_an_exact_one_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, bright = Bright().eval(), torch.rand(8, 3, 9, 9) * 0.1 + 0.9
    quantized = quantize(capture(net, bright[:2]), target="onnxruntime-x86", calibrate=[bright])
    path = export(quantized, tmp_path / "bright.onnx").path
    assert has_exact_products(path)
    fast, exact = both_sessions(path, bright)
    assert (fast == exact).all()
    with torch.no_grad():
        wanted = net(bright).numpy()
    assert np.abs(fast - wanted).max() < 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize("repair", ["gptq", "adaround", "blocks"])
def test_repairs_keep_to_the_rule(tmp_path: Path, repair: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    ).eval()
    for p in net.parameters():
        nn.init.uniform_(p, -0.02, 0.1)
    x = torch.rand(64, 3, 6, 6)
    quantized = quantize(capture(net, x[:2]), target="onnxruntime-x86", calibrate=[x], repair=[repair])
    path = export(quantized, tmp_path / "repaired.onnx").path
    assert has_exact_products(path)
    fast, exact = both_sessions(path, x)
    assert (fast == exact).all()
    with torch.no_grad():
        wanted = net(x).numpy()
    assert np.abs(fast - wanted).max() < 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("held", [True, False])
def test_training_with_rounding_keeps_to_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    for p in net.parameters():
        nn.init.uniform_(p, -0.02, 0.1)
    x = torch.rand(64, 3, 6, 6)
    if not held:
        monkeypatch.setattr(LearnedStep, "hold_pairs", lambda self, weight: None)
    quantized = train_quantized(
        capture(net.eval(), x[:2]),
        lambda: [(x, 10 + 10 * x.mean((1, 2, 3)))] * 10,
        step=lambda model, batch: (model(batch[0]).mean(1) - batch[1]).square().mean(),
        calibrate=[x],
        scheme="int8",
        lr=0.02,
        epochs=2,
    )
    artifact = export(quantized, tmp_path / "trained.onnx")
    assert has_exact_products(artifact.path) is held  # or the rule would have held by itself
    notes = check(artifact, quantized, [x]).notes
    assert ["exact 8-bit products" in n for n in notes] == (
        [] if held else [True]
    )  # what the file asks of a session is said
    if held:
        fast, exact = both_sessions(artifact.path, x)
        assert (fast == exact).all()


@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_codes_that_break_the_rule_are_not_called_exact(tmp_path: Path, layer: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.rand(32, 2, 2, 2)
    quantized = quantize(capture(net, x[:2]), target="onnxruntime-x86", calibrate=[x])
    assert has_exact_products(export(quantized, tmp_path / "fits.onnx").path)
    quantized.weights["0.weight" if layer == "conv" else "3.weight"].codes[0].fill_(65)  # 65 + 65
    assert not has_exact_products(export(quantized, tmp_path / "breaks.onnx").path)


@pytest.mark.parametrize(("outputs", "exact"), [(4, True), (8, False)])
def test_several_outputs_of_a_channel_have_neighbours_where_the_runtime_unfolds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: int, exact: bool
) -> None:
    """One output per channel has a kernel of its own, without pairs; several go through a product of matrices, tap beside tap."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, outputs, 3, groups=4), nn.ReLU(), nn.Conv2d(outputs, 2, 1)
    ).eval()
    nn.init.constant_(net[2].weight, 0.1)
    x = torch.rand(32, 3, 6, 6)
    quantized = quantize(capture(net, x[:2]), target="onnxruntime-x86", calibrate=[x])
    assert int(quantized.weights["2.weight"].codes.min()) > 64  # two of them are beyond 128
    monkeypatch.setattr(onnx_kernels, "rewrite", lambda model, forms: 0)  # as a layer is left that fits no form
    artifact = export(quantized, tmp_path / "a.onnx")
    assert has_exact_products(artifact.path) is exact
    if exact:
        fast, safe = both_sessions(artifact.path, x)
        assert (fast == safe).all()
    assert check(artifact, quantized, [x]).layer_share == 1


def test_what_another_tool_makes_of_our_float_file_is_not_called_exact(tmp_path: Path) -> None:
    """It hands the metadata on."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{"input": np.ones((2, 4), np.float32)}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    path = export((nn.Linear(4, 2).eval(), torch.zeros(2, 4)), tmp_path / "float.onnx").path
    quantize_static(path, tmp_path / "theirs.onnx", Reader(), weight_type=QuantType.QInt8)
    assert not has_exact_products(tmp_path / "theirs.onnx")


def test_what_runs_without_paredown_looks_for_the_same_word() -> None:
    folder = Path(paredown.__file__).parent / "measure"
    for file in (folder / "memory.py", folder / "bundled" / "runner.py"):
        assert f'b"{EXACT}"' in file.read_text(encoding="utf-8")


def test_files_of_floats_and_of_others_say_nothing(tmp_path: Path) -> None:
    net = nn.Linear(4, 2).eval()
    assert not has_exact_products(export((net, torch.zeros(2, 4)), tmp_path / "float.onnx").path)
    assert not has_exact_products(tmp_path / "missing.onnx")
    foreign = tmp_path / "foreign.onnx"
    torch.onnx.export(net, (torch.zeros(2, 4),), str(foreign), dynamo=True, verbose=False)
    assert not has_exact_products(foreign)
