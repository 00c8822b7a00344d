"""Forms of an operator that ONNX does not have are refused with the line and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paredown as pare


class KernelPerSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.route, self.bank = nn.Linear(3, 2), nn.Parameter(torch.randn(2, 4 * 3))

    def forward(self, x: Tensor) -> Tensor:
        kernels = (self.route(x.mean((2, 3))) @ self.bank).view(-1, 3, 1, 1)
        out = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, groups=x.shape[0])
        return out.view(x.shape[0], 4, *x.shape[2:])


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 5, proj_size=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]  # type: ignore[no-any-return]


def test_a_kernel_per_sample_needs_a_fixed_batch(tmp_path: Path) -> None:
    net, x = KernelPerSample().eval(), torch.randn(2, 3, 4, 4)
    with pytest.raises(
        pare.RejectedError, match=r"one for each sample at conv2d \(.*test_export_forms.*dynamic_batch=False"
    ):
        pare.export(pare.capture(net, x, train=False), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
    fixed = pare.capture(net, x, train=False, dynamic_batch=False)
    assert pare.check(pare.export(fixed, tmp_path / "net.onnx"), fixed, [torch.randn(2, 3, 4, 4)]).cosine > 0.999


def test_an_lstm_with_a_projection_is_told(tmp_path: Path) -> None:
    program = pare.capture(Projected().eval(), torch.randn(2, 4, 3), train=False)
    with pytest.raises(pare.RejectedError, match=r"no projection in ONNX. Got proj_size=2 at lstm"):
        pare.export(program, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
