"""What cannot be quantized is refused with the reason: nothing comes out that only looks quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("torchao")

from paredown.errors import NothingToDo, RejectedError, UsageError
from paredown.program import capture
from paredown.quantize import SCHEMES, allot, quantize, spare
from paredown.quantize.static import STATIC

ALL = (*STATIC, "int8-dynamic", "w4")


@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_network_that_is_not_float32_is_told_how_to_become_so(scheme: str, dtype: torch.dtype) -> None:
    x = torch.randn(8, 4, dtype=dtype)
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to(dtype), x)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(RejectedError, match=rf"must be in float32\. Got parameters in {name}.*\.float\(\)"):
        quantize(program, calibrate=[x], scheme=scheme)
    if scheme == "int8":
        for verb, options in ((allot, {"as_uniform": 4}), (spare, {"evaluate": lambda _: 0.0, "meets": bool})):
            with pytest.raises(RejectedError, match=r"\.float\(\)"):
                verb(program, calibrate=[x], **options)  # type: ignore[operator]


class Grown(nn.Module):
    """A matrix that is computed from a parameter by writing into it: what it is depends on when it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.seed * 2
        weight.add_(1)
        return F.linear(x, weight)


NOTHING: dict[str, tuple[Any, Any, str]] = {
    "transposed": (nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU()), torch.randn(8, 3, 4, 4), "conv_transpose2d"),
    "recurrent": (nn.GRU(4, 4, batch_first=True), torch.randn(8, 3, 4), "gru"),
    "table": (nn.Embedding(9, 4), torch.randint(0, 9, (8, 3)), "embedding"),
    "computed": (Grown(), torch.randn(8, 4), "its weight is computed"),
    "none": (nn.ReLU(), torch.randn(8, 4), "the network has no weights"),
}


@pytest.mark.parametrize("scheme", STATIC)
@pytest.mark.parametrize("kind", NOTHING)
def test_a_network_without_a_weight_in_codes_is_refused_with_the_reasons(kind: str, scheme: str) -> None:
    net, x, reason = NOTHING[kind]
    with pytest.raises(NothingToDo, match=rf"at least one weight must be quantized.*Got none: .*{reason}"):
        quantize(capture(net.eval(), x), calibrate=[x], scheme=scheme)


@pytest.mark.parametrize("scheme", STATIC)
def test_a_network_all_of_which_was_asked_to_stay_float_is_refused(scheme: str) -> None:
    program = capture(nn.Sequential(nn.Linear(4, 4)), torch.zeros(2, 4), train=False)
    with pytest.raises(NothingToDo, match=r"linear stays float \(1×, first at .*\): asked for"):
        quantize(program, calibrate=[torch.randn(8, 4)], scheme=scheme, float_layers=["*"])


@pytest.mark.parametrize("number", [2.5, True, "3", 0])
def test_the_number_of_samples_is_a_whole_one(number: Any) -> None:
    program = capture(nn.Sequential(nn.Linear(4, 4)), torch.zeros(2, 4), train=False)
    with pytest.raises(UsageError, match="num_samples must be an integer ≥ 1"):
        quantize(program, calibrate=[torch.randn(8, 4)], num_samples=number)


def test_what_allot_is_told_it_may_choose_is_what_it_can_do() -> None:
    program, x = capture(nn.Sequential(nn.Linear(4, 4)), torch.zeros(2, 4), train=False), torch.randn(8, 4)
    for scheme in ("int8-dynamic", "w4", "fp16", "int7"):
        with pytest.raises(UsageError, match="scheme must be one of") as raised:
            allot(program, calibrate=[x], as_uniform=4, scheme=scheme)
        offered = str(raised.value).partition(" Got ")[0]
        assert all(name in offered for name in STATIC) and "int8-dynamic" not in offered
        assert (scheme in SCHEMES) == ("paredown" in str(raised.value))
