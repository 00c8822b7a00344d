"""Weights of 1 to 7 bits: balanced, ternary and binary levels, bits per layer, and ONNX files that hold them packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchao")

from paredown.errors import UsageError
from paredown.examine.onnx_file import examine_onnx
from paredown.export import check, export
from paredown.plan import Mask, Plan
from paredown.program import Program, capture
from paredown.prune import prune
from paredown.quantize import quantize, train_quantized
from paredown.quantize.numerics import scales_of_least_error, snap
from paredown.quantize.observe import PerChannel
from paredown.quantize.packed import save_packed
from paredown.quantize.qat import LearnedStep
from paredown.quantize.schemes import WEIGHTS, levels_at, weight_range

CODES = {"w2": {-3, -1, 1, 3}, "ternary": {-1, 0, 1}, "binary": {-1, 1}}


def net() -> nn.Module:
    """Wide enough for the ops around packed weights to pay; 67 channels, so that no number of codes fills its last byte."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 67, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(67, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    ).eval()


@pytest.fixture(scope="module")
def case() -> tuple[Program, Tensor]:
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return capture(net(), x[:2]), x


@pytest.mark.parametrize(
    ("levels", "bits", "published"), [("binary", 1, 0.3634), ("ternary", 2, 0.1902), ("balanced", 2, 0.1188)]
)
def test_scales_reach_the_least_error_on_normal_numbers(levels: Any, bits: int, published: float) -> None:
    """The mean squared errors of the best grids of 2, 3 and 4 levels for N(0, 1), known since Max 1960."""
    w = torch.randn(8, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = weight_range(bits, levels)
    s = scales_of_least_error(w, low, high, levels=levels)[:, None]
    error = float((w - s * snap(w / s, low, high, levels)).square().mean())
    assert error == pytest.approx(published, rel=0.01)


def test_snapping_takes_the_nearest_level() -> None:
    w = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    for levels, bits in (("balanced", 2), ("binary", 1), ("balanced", 3), ("ternary", 2), ("integer", 3)):
        low, high = weight_range(bits, levels)  # type: ignore[arg-type]
        every = torch.arange(low, high + 1, 2 if levels in ("balanced", "binary") else 1, dtype=torch.float64)
        nearest = (w[:, None] - every).abs().min(1).values
        assert torch.allclose((w - snap(w, low, high, levels)).abs(), nearest)  # type: ignore[arg-type]
    assert levels_at(1) == "binary" and levels_at(2) == "balanced" and levels_at(3) == "integer"


@pytest.mark.parametrize("scheme", WEIGHTS)
def test_weights_alone_are_on_their_levels_and_the_file_is_as_small(
    scheme: str, case: tuple[Program, Tensor], tmp_path: Path
) -> None:
    program, x = case
    quantized = quantize(program, scheme=scheme)
    assert [p.bits for p in quantized.weights.values()][0::3] == [8, 8]  # the first and the last
    for name in ("2.weight", "4.weight"):
        packed, weight = quantized.weights[name], program.module.get_parameter(name).detach()
        assert set(packed.codes.unique().tolist()) == CODES[scheme]
        assert float((packed.unpack() - weight).square().sum()) < 0.45 * float(weight.square().sum())
        assert torch.allclose(packed.unpack().sign()[packed.codes != 0], weight.sign()[packed.codes != 0])
    artifact = export(quantized, tmp_path / "net.onnx")
    found = check(artifact, quantized, [x])
    assert found.holds and found.max_error <= 1e-5 * found.scale and not found.int8_nodes and found.float_nodes
    inner = sum(quantized.weights[n].codes.numel() for n in ("2.weight", "4.weight"))
    bits = {"w2": 2.0, "ternary": 1.6, "binary": 1.0}[scheme]
    rest = sum(p.codes.numel() for p in quantized.weights.values()) - inner
    scales = 4 * sum(p.scales.numel() + p.codes.shape[0] for p in quantized.weights.values())
    assert inner * bits / 8 + rest < artifact.path.stat().st_size < inner * bits / 8 + rest + scales + 6_000
    assert save_packed(quantized.weights, tmp_path / "w.safetensors").total_bytes < artifact.path.stat().st_size


def test_rounding_by_the_output_beats_the_nearest_level(case: tuple[Program, Tensor]) -> None:
    program, x = case
    with torch.no_grad():
        wanted = program.module(x)
        for scheme in WEIGHTS:
            plain, repaired = (
                float((quantize(program, scheme=scheme, calibrate=[x], repair=r).module(x) - wanted).square().sum())
                for r in ((), ("gptq",))
            )
            assert repaired < 0.5 * plain


@pytest.mark.parametrize("bits", [1, 3, 4, 6])
def test_bits_per_layer_run_on_int8_kernels_from_a_packed_file(
    bits: int, case: tuple[Program, Tensor], tmp_path: Path
) -> None:
    program, x = case
    quantized = quantize(program, calibrate=[x], bits={"2.weight": bits, "4": bits})
    assert {n: p.bits for n, p in quantized.weights.items()} == {
        "0.weight": 8,
        "2.weight": bits,
        "4.weight": bits,
        "8.weight": 8,
    }
    artifact = export(quantized, tmp_path / "net.onnx")
    found = check(artifact, quantized, [x])
    assert found.holds and not found.float_nodes and sum("QLinearConv" in n for n in found.int8_nodes) == 3
    whole = quantize(program, calibrate=[x])
    larger = export(whole, tmp_path / "eight.onnx").size_bytes
    inner = sum(quantized.weights[n].codes.numel() for n in ("2.weight", "4.weight"))
    assert artifact.size_bytes <= larger - inner * (8 - bits) / 8 + 5_500
    cost, plain = examine_onnx(artifact.path), examine_onnx(tmp_path / "eight.onnx")
    assert (cost.parameters, cost.macs) == (plain.parameters, plain.macs) and not cost.uncounted
    assert cost.parameter_bytes <= plain.parameter_bytes - inner * (8 - bits) // 8 + 16
    assert onnx.load(artifact.path).opset_import[0].version == 18


def test_a_small_weight_is_not_packed(tmp_path: Path) -> None:
    small, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 8)
    quantized = quantize(capture(small, x[:2]), calibrate=[x], scheme="w4a8")
    export(quantized, tmp_path / "net.onnx")
    assert "Gather" not in {n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node}


@pytest.mark.parametrize(("levels", "bits", "edge"), [("balanced", 2, 4.0), ("ternary", 2, 1.5), ("binary", 1, 2.0)])
def test_gradients_of_few_levels_pass_as_far_as_the_outermost_cell(levels: Any, bits: int, edge: float) -> None:
    low, high = weight_range(bits, levels)
    spec: dict[str, Any] = {"dtype": torch.int8, "qscheme": torch.per_channel_symmetric, "ch_axis": 0}
    seen = PerChannel(**spec, quant_min=low, quant_max=high, levels=levels)
    seen(torch.ones(1, 4))
    seen.fixed = torch.tensor([0.5])
    step = LearnedStep(seen)
    x = (0.5 * torch.tensor([[-edge - 0.1, -edge + 0.1, 0.2, edge - 0.1, edge + 0.1]])).requires_grad_(True)
    out = step(x)
    codes = snap(x.detach() / 0.5, low, high, levels)
    assert torch.equal(out.detach(), codes * 0.5)
    out.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    inside = torch.tensor([[False, True, True, True, False]])
    wanted = torch.where(inside, codes - x.detach() / 0.5, codes).sum() / np.sqrt(5 * max(high, 1))
    assert step.scale.grad is not None and float(step.scale.grad) == pytest.approx(float(wanted), rel=1e-4)


def test_training_recovers_what_one_bit_costs() -> None:
    torch.manual_seed(0)
    prototypes = torch.randn(4, 1, 8, 8)
    y = torch.randint(0, 4, (512,))
    x = prototypes[y] + 0.8 * torch.randn(512, 1, 8, 8)
    data = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 384, 64)]
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        for a, b in data:
            optimizer.zero_grad()
            F.cross_entropy(model(a), b).backward()
            optimizer.step()
    program = capture(model, x[:2])

    def step(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    def loss(quantized: Any) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(quantized.module(x[384:]), y[384:]))

    plain, dense = loss(quantize(program, scheme="binary")), float(F.cross_entropy(model(x[384:]), y[384:]))
    trained = train_quantized(program, lambda: data, step=step, scheme="binary", epochs=12, lr=0.05, teacher=model)
    assert set(trained.weights["2.weight"].codes.unique().tolist()) == CODES["binary"]
    assert plain > dense + 0.1 and loss(trained) < dense + 0.5 * (plain - dense)


def test_masks_need_a_zero(case: tuple[Program, Tensor]) -> None:
    program, _ = case
    kept = np.ones((67, 32, 3, 3), dtype=bool)
    kept[::2] = False
    small = prune(program, Plan(keep={}, masks={"2.weight": Mask.of(kept, "element")}))
    with pytest.raises(UsageError, match=r"must have levels with a 0. Got balanced codes for 2.weight"):
        quantize(small, scheme="w2")
    codes = quantize(small, scheme="ternary").weights["2.weight"].codes
    assert not codes[torch.from_numpy(~kept)].any() and codes.any()


def test_weights_alone_are_for_onnx_runtime_and_need_samples_for_repairs(case: tuple[Program, Tensor]) -> None:
    program, _ = case
    with pytest.raises(UsageError, match="one of onnxruntime-x86, onnxruntime-arm"):
        quantize(program, scheme="w2", target="openvino-x86")
    with pytest.raises(UsageError, match="calibrate"):
        quantize(program, scheme="w2", repair=["gptq"])
    with pytest.raises(UsageError, match="kernels have one width"):
        quantize(program, scheme="int8-dynamic", bits={"8.weight": 4})


def test_a_dead_channel_stays_next_to_zero(tmp_path: Path) -> None:
    model, x = net(), torch.randn(8, 1, 8, 8)
    with torch.no_grad():
        model[2].weight[5] = 0.0  # type: ignore[index,union-attr,operator]
    quantized = quantize(capture(model, x[:2]), scheme="binary")
    assert float(quantized.weights["2.weight"].unpack()[5].abs().max()) < 1e-9
