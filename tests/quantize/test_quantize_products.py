"""x @ W with a held W: codes as for a linear layer, by the user's name and in the user's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchao")

from paredown.export import check, export
from paredown.program import capture
from paredown.quantize import quantize, spare, train_quantized
from paredown.quantize.decompose import op_name
from paredown.quantize.products import products_as_layers
from paredown.quantize.static import STATIC


class Products(nn.Module):
    """Three products with matrices [inputs, outputs], one written with the transpose, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shift = nn.Parameter(torch.randn(16, 24) / 4), nn.Parameter(torch.randn(24))
        self.register_buffer("fixed", torch.randn(24, 24) / 5)
        self.back = nn.Parameter(torch.randn(12, 24) / 5)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x @ self.first + self.shift)
        x = F.relu(x @ self.fixed)  # type: ignore[operator]
        return self.head(F.relu(x @ self.back.T))


NAMES = {"first": 1, "fixed": 1, "back": 0, "head.weight": 0}
"""Weights, and the axis of their outputs."""


@pytest.fixture(params=[(64, 16), (16, 5, 16)], ids=["rows", "tokens"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    return Products().eval(), torch.randn(request.param, generator=torch.Generator().manual_seed(1))


def noise(net: nn.Module, module: Any, x: Tensor) -> float:
    with torch.no_grad():
        return float((module(x) - net(x)).square().mean() / net(x).square().mean())


@pytest.mark.parametrize("scheme", STATIC)
def test_a_product_is_quantized_as_the_layer_that_it_is(case: tuple[nn.Module, Tensor], scheme: str) -> None:
    net, x = case
    state = {n: t.clone() for n, t in net.state_dict().items()}
    repair = [] if scheme == "int8" else ["gptq"]
    found = quantize(capture(net, x[:2], train=False), calibrate=[x], scheme=scheme, repair=repair)
    assert {n: p.axis for n, p in found.weights.items()} == NAMES
    ways = {"int8": 1e-3, "w4a8": 0.02, "w4a4": 0.1}
    assert noise(net, found.module, x) < ways.get(scheme, 0.7)
    for name, packed in found.weights.items():
        assert packed.codes.shape == state[name].shape
        if scheme == "int8":
            wide = packed.scales.unsqueeze(0 if packed.axis else 1)
            assert float(((packed.unpack() - state[name]).abs() / wide).max()) < 0.51
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())


def test_names_and_widths_are_those_of_the_users_matrix(case: tuple[nn.Module, Tensor]) -> None:
    net, x = case
    found = quantize(
        capture(net, x[:2], train=False), calibrate=[x], float_layers=["first"], bits={"fixed": 4, "back": 3}
    )
    assert {n: p.bits for n, p in found.weights.items()} == {"fixed": 4, "back": 3, "head.weight": 8}
    plain = noise(net, quantize(capture(net, x[:2], train=False), calibrate=[x]).module, x)
    options: Any = {"evaluate": lambda p: noise(net, p, x), "calibrate": [x]}
    chosen = spare(capture(net, x[:2], train=False), meets=lambda v: v < 0.9 * plain, **options)
    assert 0 < len(chosen.float_layers) < 4 and set(chosen.float_layers) < set(NAMES)
    assert set(chosen.quantized.weights) == set(NAMES) - set(chosen.float_layers)


@pytest.mark.parametrize("target", ["onnxruntime-x86", "openvino-x86"])
def test_the_file_runs_products_on_codes(case: tuple[nn.Module, Tensor], target: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime" if target.startswith("onnx") else "openvino")
    net, x = case
    found = quantize(capture(net, x[:2], train=False), calibrate=[x], target=target)
    artifact = export(found, tmp_path / ("net.onnx" if target.startswith("onnx") else "net.xml"))
    verdict = check(artifact, found, [x])
    assert verdict.holds
    assert len(verdict.int8_nodes) >= 4, verdict.int8_nodes


def test_training_with_rounding_keeps_the_zeros_of_a_mask() -> None:
    from paredown.plan import Mask, Plan
    from paredown.prune.nouns import Proof, Pruned

    net, x = Products().eval(), torch.randn(64, 16)
    kept = np.random.default_rng(0).random((16, 24)) > 0.5
    with torch.no_grad():
        net.first.mul_(torch.from_numpy(kept))
    program = capture(net, x[:2])
    proof = Proof(max_error=0.0, scale=1.0, moved=1.0, mode="float32")
    masked = Pruned(
        module=net,
        program=program,
        plan=Plan(keep={}, masks={"first": Mask.of(kept, "element")}),
        realiser="module",
        proof=proof,
    )
    wanted = net(x).detach() * 1.1
    trained = train_quantized(
        masked, lambda: [x], step=lambda model, batch: (model(batch) - wanted).square().mean(), calibrate=[x], epochs=2
    )
    codes = trained.weights["first"].codes
    assert codes.shape == kept.shape and not bool(codes[~torch.from_numpy(kept)].any()) and bool(codes.any())


class Other(nn.Module):
    """Products that are no layers, and one matrix that two products and a table read."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.cube = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.tied
        z = (y @ self.tied) * 2 + F.embedding(torch.zeros(8, dtype=torch.long), self.tied)
        return self.tied @ z + (x @ x.transpose(-1, -2)) @ z + z @ self.cube.mean(0) + y.sum(-1) @ self.tied


def test_other_products_stay_as_they_are_and_a_matrix_is_copied_once() -> None:
    net, x = Other().eval(), torch.randn(8, 8)
    graph = capture(net, x).eval_graph.module(check_guards=False)
    before = dict(graph.named_parameters())
    products_as_layers(graph)
    ops = [op_name(n) for n in graph.graph.nodes]
    assert ops.count("linear") == 2 and ops.count("matmul") == 5
    assert set(dict(graph.named_parameters())) == {*before, "tied_transposed"}
    with torch.no_grad():
        assert torch.allclose(graph(x), net(x), rtol=1e-5, atol=1e-4)
