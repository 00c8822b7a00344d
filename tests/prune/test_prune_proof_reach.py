"""What a proof must see: dead survivors, decisions, train mode, groups of samples, other dtypes, noise."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paredown as pare
from oracle import distance, run, scale
from paredown.couple.trace import trace
from paredown.program import Program, capture, least_batch
from paredown.prune import Pruned
from paredown.prune.prove import compare, holds, reference
from paredown.prune.removal import removal


def halved(model: nn.Module, x: Any, channels: float = 0.5) -> tuple[Program, Pruned]:
    program = capture(model, x)
    coupling = pare.couple(program)
    scores, cost = pare.score(program, coupling, "l1"), pare.examine(program)
    plan = pare.allocate(coupling, scores, cost, pare.Budget(channels=channels), align=1)
    return program, pare.prune(program, plan)


class Two(nn.Module):
    """Linear, something, linear: `hidden` units that a read of `o` sees."""

    def __init__(self, inputs: int = 5, hidden: int = 8) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(inputs, hidden), nn.Linear(hidden, 3)

    def without(self, program: Program, pruned: Pruned) -> nn.Module:
        """The dense net whose `o` does not read what left."""
        dense = copy.deepcopy(program.module)
        kept = pruned.plan.keep["a.weight"][0]
        with torch.no_grad():
            dense.o.weight[:, [i for i in range(self.a.out_features) if i not in kept]] = 0  # type: ignore[index, union-attr, operator]
        return dense


class ByWidth(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        return self.o(hidden / math.sqrt(hidden.shape[-1]))  # type: ignore[no-any-return]


class Decides(Two):
    def __init__(self) -> None:
        super().__init__(hidden=32)
        self.k = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        return (self.o(hidden * 4 / hidden.shape[-1] ** 0.5) + self.k(x)).argmax(-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "channels"), [(ByWidth, 0.5), (Decides, 0.25)])
def test_a_width_that_a_class_reads_off_a_tensor_is_seen(kind: type[Two], channels: float) -> None:
    """In one sample every unit that stays may be dead, or the decision the same: the class would pass."""
    for seed in range(24):
        torch.manual_seed(seed)
        model, x = kind(), torch.randn(4, 5)
        program, pruned = halved(model, x, channels)
        many = torch.randn(500, 5)
        expected = model.without(program, pruned)(many)
        assert torch.allclose(pruned.module(many).float(), expected.float(), atol=1e-5), (seed, pruned.realiser)


class Mixes(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        if self.training:
            table = hidden.reshape(-1, 8)
            hidden = (0.5 * table + 0.5 * table.mean(0)).reshape(x.shape[0], -1)
        return self.o(hidden)  # type: ignore[no-any-return]


class ViewsInTraining(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        return self.o(hidden.view(x.shape[0], 8) if self.training else hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Mixes, ViewsInTraining])
def test_what_only_training_does_is_seen(kind: type[Two]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(6, 5)
    program, pruned = halved(model, x)
    expected = run(model.without(program, pruned).train(), ((x,), {}))
    assert distance(run(pruned.module.train(), ((x,), {})), expected) <= 1e-5 * scale(expected)
    pruned.module(x).sum().backward()


class Clips(nn.Module):
    """Four frames make a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.o = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        seen = F.relu(self.c(x)).mean((2, 3))
        return self.o(seen.view(x.shape[0] // 4, 4, 8 if not self.training else seen.shape[1]).mean(1))  # type: ignore[no-any-return]


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.o = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        one, other = F.relu(self.c(x)).mean((2, 3)).chunk(2, 0)
        return self.o((one - other).abs())  # type: ignore[no-any-return]


class Spread(nn.Module):
    """Nothing is left of one sample's deviation from itself."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.o = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        seen = F.relu(self.c(x))
        return self.o((seen + seen.std(0)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "least"), [(Clips, 4), (Pairs, 2), (Spread, 1)])
def test_samples_that_belong_together_stay_together(kind: type[nn.Module], least: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    program, pruned = halved(kind(), x)
    assert least_batch(program) == least and pruned.proof.moved > 0
    dense = copy.deepcopy(program.module)
    kept = pruned.plan.keep["c.weight"][0]
    with torch.no_grad():
        dense.o.weight[:, [i for i in range(8) if i not in kept]] = 0  # type: ignore[index, union-attr, operator]
    assert torch.allclose(pruned.module(x), dense(x), atol=1e-5)
    cost = pare.examine(program)
    assert cost.samples == least
    groups = {Clips: 1, Pairs: 1, Spread: 1}[kind]
    assert cost.macs == least * 8 * 3 * 9 * 36 + groups * 8 * 10
    assert pare.examine(capture(pruned.module, x)).macs < cost.macs


class Casts(nn.Module):
    """A norm in float32 within a network of another dtype, and a softmax that says its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x)).to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        hidden = self.scale * hidden.to(x.dtype)
        gate = F.softmax(self.b(hidden), dim=-1, dtype=torch.float32).to(hidden.dtype)
        return self.o(gate * F.gelu(self.b(hidden)))  # type: ignore[no-any-return]


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = F.relu(self.b(hidden))
        return self.o(hidden.float())  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_any_dtype_that_casts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Casts().to(dtype), torch.randn(4, 5).to(dtype)
    _, pruned = halved(model, x)
    assert {p.dtype for p in pruned.module.parameters()} == {dtype}
    assert pruned.module(x).dtype == model(x).dtype
    assert sum(p.numel() for p in pruned.module.parameters()) < sum(p.numel() for p in model.parameters())


def test_an_autocast_region() -> None:
    torch.manual_seed(0)
    model, x = Autocast(), torch.randn(4, 5)
    program, pruned = halved(model, x)
    assert pruned.module(x).dtype == torch.float32
    assert pruned.module.b.weight.shape < model.b.weight.shape
    assert any("autocast" in note for note in program.notes)


class Noisy(nn.Module):
    """A variational autoencoder that draws in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mean, self.spread = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.b, self.o = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.a(x))
        mean, spread = self.mean(hidden), self.spread(hidden)
        code = mean + torch.randn_like(mean) * torch.exp(0.5 * spread)
        return self.o(F.relu(self.b(code))), mean


def test_a_network_that_draws_numbers() -> None:
    torch.manual_seed(0)
    model, x = Noisy(), torch.randn(4, 5)
    _, pruned = halved(model, x)
    assert pruned.module.a.weight.shape[0] < 8 and pruned.module.b.weight.shape[0] < 8


class Encoder(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.t = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.t(self.a(x))  # type: ignore[no-any-return]


class Steps(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.t = nn.LSTM(6, 16, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.t(x)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Encoder, Steps])
def test_time_that_is_taken_for_the_batch_is_said(kind: Any) -> None:
    said = [capture(kind(batch_first=first), torch.randn(9, 4, 6)).notes for first in (True, False)]
    assert not said[0]
    assert any(note.startswith("t") and "runs along axis 0" in note for note in said[1])


def test_a_hole_in_the_example_is_no_reason_to_exclude_channels() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    x[0, 2] = torch.nan
    model = ByWidth()
    _, pruned = halved(model, x)
    assert pruned.proof.moved > 0 and pruned.proof.scale < float("inf")


class BeginsWithZeros(Two):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], 8)  # of no dtype of its own
        for _ in range(2):
            state = torch.tanh(self.a(x) + self.b(state))
        return self.o(state)  # type: ignore[no-any-return]


def test_constants_of_no_dtype_are_of_the_dtype_of_the_proof() -> None:
    torch.manual_seed(0)
    program, pruned = halved(BeginsWithZeros(), torch.randn(4, 5))
    gone = removal(trace(program), pruned.plan)
    proof = compare(pruned.module, reference(program, gone, dtype=torch.float64))
    assert holds(proof) and proof.mode == "float64"
    assert torch.get_default_dtype() == torch.float32
