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


@pytest.mark.parametrize("made", [dynamically, by_torchao])
def test_fault_22_a_quantized_model_is_recognised(made) -> None:
    with pytest.raises(RejectedError, match=r"must be in float.*quantized.*0"):
        pare.capture(made(), torch.zeros(2, 64))


def test_the_float_model_is_not() -> None:
    assert len(pare.couple(pare.capture(net(), torch.zeros(2, 64))).spaces) == 1


def test_a_model_prepared_for_quantization_aware_training_is_float() -> None:
    model = nn.Sequential(torch.ao.nn.qat.Linear(64, 8, qconfig=torch.ao.quantization.get_default_qat_qconfig()))
    assert pare.capture(model, torch.zeros(2, 64)).batch == "dynamic"
