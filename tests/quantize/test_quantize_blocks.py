"""Block reconstruction: where blocks are, what it does to their outputs, and that the codes are those chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import deploy_nets

pytest.importorskip("torchao")

from paredown.errors import UsageError
from paredown.program import Inputs, Program, capture
from paredown.quantize import blocks, quantize
from paredown.quantize.blocks import blocks_of, reconstruct
from paredown.quantize.static import Calibrated, calibrated


@pytest.fixture(scope="module")
def case() -> tuple[Program, Tensor]:
    torch.manual_seed(1)
    net, _ = deploy_nets.made("residual")
    x = torch.randn(96, 1, 8, 8)
    return capture(net.eval(), x[:2], train=False), x


def base_of(program: Program, x: Tensor, bits: int = 3) -> Calibrated:
    return calibrated(program, target="onnxruntime-x86", scheme="int8", calibrate=[x], bits={"*": bits})


def names(base: Calibrated) -> list[list[str]]:
    return [[base.parameter_of(x.use.weight) for x in b.layers] for b in blocks_of(base.prepared)]


def test_blocks_are_what_one_value_leads_into_and_out_of(case: tuple[Program, Tensor]) -> None:
    assert names(base_of(*case)) == [
        ["stem.weight"],
        ["blocks.0.a.weight", "blocks.0.c.weight"],
        ["blocks.1.a.weight", "blocks.1.c.weight"],
        ["head.weight"],
    ]
    program, x = case
    alone = calibrated(program, target="onnxruntime-x86", scheme="w2", calibrate=[x])  # no activation is rounded here
    assert [len(b) for b in names(alone)] == [1, 2, 2, 1]
    chain, x = (
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)),
        torch.randn(32, 6),
    )
    assert names(base_of(capture(chain, x[:2], train=False), x)) == [["0.weight"], ["2.weight"], ["4.weight"]]


def test_every_block_gets_nearer_to_its_float_output_and_so_does_the_network(
    case: tuple[Program, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ITERATIONS", 120)
    program, x = case
    train, fresh = x[:64], x[64:]
    base = base_of(program, train, bits=2)
    found = reconstruct(base.prepared, [Inputs((train[:40],), {}), Inputs((train[40:],), {})])
    assert [len(b.layers) for b in found] == [2, 2]
    assert all(b.error <= b.error_before for b in found) and found[0].error < 0.9 * found[0].error_before
    with torch.no_grad():
        wanted = program.module(fresh)
    off = {}
    for repair in ((), ("gptq",), ("blocks",)):
        small = quantize(program, calibrate=[train], bits={"*": 2}, repair=repair)
        with torch.no_grad():
            off["".join(repair)] = float((small.module(fresh) - wanted).square().sum())
    assert (
        off["blocks"] < off[""] and off["blocks"] < 1.5 * off["gptq"]
    )  # 64 samples: it may not generalise, nor do harm


def test_codes_lie_on_their_grid_and_the_same_seed_gives_the_same(
    case: tuple[Program, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ITERATIONS", 150)
    program, x = case
    one, two = (quantize(program, calibrate=[x], bits={"*": 2}, repair=["blocks"]) for _ in range(2))
    for name, packed in one.weights.items():
        assert torch.equal(packed.codes, two.weights[name].codes)
        assert set(packed.codes.unique().tolist()) <= {-3, -1, 1, 3}
    gptq = quantize(program, calibrate=[x], bits={"*": 2}, repair=["gptq"])
    assert all(torch.equal(gptq.weights[n].scales, p.scales) for n, p in list(one.weights.items())[:3])
    differs = (gptq.weights["blocks.0.a.weight"].codes - one.weights["blocks.0.a.weight"].codes).abs()
    assert int((differs > 0).sum()) > 0 and int(differs.max()) == 2  # the next odd code


def test_it_goes_with_no_other_rounding(case: tuple[Program, Tensor]) -> None:
    program, x = case
    for other in ("gptq", "adaround", "bias", "bias-fast"):
        with pytest.raises(UsageError, match="must not hold both"):
            quantize(program, calibrate=[x], repair=["blocks", other])
