"""FAULTS 22: a model that is quantized already is recognised by whatever is done with it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import paredown as pare
from paredown.errors import RejectedError


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def dynamically() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)
    return made


def by_torchao() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    made = net()
    quantize_(made, Int8WeightOnlyConfig())
    return made


def converted() -> nn.Module:
    from paredown.quantize import quantize

    made: nn.Module = quantize(pare.capture(net(), torch.zeros(2, 64)), calibrate=[torch.randn(32, 64)]).module
    return made


class Packed(nn.Module):
    """A layer as GPTQ and AWQ have it: eight 4-bit codes in an int32, and scales."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 64, dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = (self.qweight.repeat_interleave(8, 0) >> 4) & 15
        return x @ (codes.float() * self.scales.float())


def by_gptq() -> nn.Module:
    return nn.Sequential(Packed(), nn.ReLU(), nn.Linear(64, 4))


@pytest.mark.parametrize("made", [dynamically, by_torchao, converted, by_gptq])
def test_fault_22_a_quantized_model_is_recognised(made) -> None:
    with pytest.raises(RejectedError, match=r"must be in float.*quantized.*(0|decomposed)"):
        pare.capture(made(), torch.zeros(2, 64))


def test_the_float_model_is_not() -> None:
    assert len(pare.couple(pare.capture(net(), torch.zeros(2, 64))).spaces) == 1


def test_a_model_prepared_for_quantization_aware_training_is_float() -> None:
    model = nn.Sequential(torch.ao.nn.qat.Linear(64, 8, qconfig=torch.ao.quantization.get_default_qat_qconfig()))
    assert pare.capture(model, torch.zeros(2, 64)).batch == "dynamic"
