"""Inputs whose first axis is time: told at capture, with the way out; behind it all numbers are those of a sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import paredown as pare
from paredown.export import predictor


class Sequences(nn.Module):
    """[time, batch, 6] → [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.rnn(x)[0]
        return self.head(states[-1])  # type: ignore[no-any-return]


class Attending(nn.Module):
    """[time, batch, 8] → [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(0))  # type: ignore[no-any-return]


class BatchFirst(nn.Module):
    """The wrapper that the note asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(0, 1))  # type: ignore[no-any-return]


TIME = 12
NETS = {"recurrent": (Sequences, 6, "rnn"), "attention": (Attending, 8, "encoder.self_attn")}
MACS = {
    "recurrent": TIME * 4 * 16 * (6 + 16) + 16 * 3,
    "attention": TIME * (3 * 8 * 8 + 8 * 8 + 2 * 8 * 16) + 2 * TIME * TIME * 8 + 8 * 3,
}
"""Of one sample, counted by hand."""


@pytest.mark.parametrize("name", NETS)
def test_time_first_is_told_with_the_way_out(name: str) -> None:
    torch.manual_seed(0)
    made, width, module = NETS[name]
    program = pare.capture(made().eval(), torch.randn(TIME, 2, width))
    (note,) = [n for n in program.notes if "axis 0" in n]
    assert note.startswith(f"{module} runs along axis 0 of the inputs") and "wrapper that takes the batch first" in note
    first = pare.capture(BatchFirst(made()).eval(), torch.randn(2, TIME, width))
    assert first.batch == "dynamic" and not [n for n in first.notes if "axis 0" in n]


@pytest.mark.parametrize("name", NETS)
def test_behind_a_wrapper_everything_is_of_a_sample(name: str, tmp_path: Path) -> None:
    """Counted, pruned with proof, exported with a free batch, and checked."""
    torch.manual_seed(0)
    made, width, _ = NETS[name]
    x = torch.randn(5, TIME, width)
    program = pare.capture(BatchFirst(made()).eval(), x[:2])
    coupling, cost = pare.couple(program), pare.examine(program)
    assert cost.macs == MACS[name]
    plan = pare.allocate(coupling, pare.score(program, coupling, "l2"), cost, pare.Budget(parameters=0.7), align=1)
    small = pare.prune(program, plan)
    left = pare.examine(pare.capture(small.module, x[:2]))
    assert left.parameters < 0.75 * cost.parameters and left.macs < cost.macs
    artifact = pare.export(small, tmp_path / "small.onnx")
    assert pare.check(artifact, small, [x]).holds
    got = predictor(artifact)(x[:3])  # another batch than was captured
    with torch.no_grad():
        torch.testing.assert_close(got, small.module(x[:3]), rtol=1e-4, atol=1e-5)
