"""Trains and scores a network with a narrow strided shortcut in either layout: what is wrong there ends the process. Run by test_train_layouts."""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn

import paredown as pare
from paredown.train import fit, recover


class Net(nn.Module):
    """A shortcut as a ResNet's, of as many channels as are left."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, 8, 1, 2, bias=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shortcut(self.stem(x).relu()).mean((2, 3)))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(10, 3, 16, 16, generator=generator), torch.arange(10) % 2) for _ in range(10)]


def plain(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def turned(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return plain(model, (batch[0].contiguous(memory_format=torch.channels_last), batch[1]))


def own(step):
    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in batches():
            optimizer.zero_grad()
            step(model, batch).backward()
            optimizer.step()

    return train


def apart(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def halved(program: pare.Program) -> pare.Plan:
    coupling = pare.couple(program)
    scores, cost = pare.score(program, coupling, "l1"), pare.examine(program)
    return pare.allocate(coupling, scores, cost, pare.Budget(channels=0.5), align=1)


def main(width: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = Net(width)
    weights = copy.deepcopy(net).to(memory_format=torch.channels_last)
    ours = [fit(m, batches, s, epochs=2, lr=0.1).module for m, s in ((net, plain), (net, turned), (weights, turned))]
    program = pare.capture(Net(2 * width), torch.zeros(2, 3, 16, 16))
    small = pare.prune(program, halved(program))
    assert small.module.shortcut.in_channels == width
    users = [recover(small, train=own(s)).module for s in (plain, turned)]
    program = pare.capture(net, torch.zeros(2, 3, 16, 16))
    coupling = pare.couple(program)
    scores = [
        pare.score(program, coupling, "taylor", batches=batches(), loss=s, num_batches=10) for s in (plain, turned)
    ]
    values = [torch.cat([torch.as_tensor(v).flatten() for v in s.by_space.values()]) for s in scores]
    print(apart(net, ours[0]), apart(ours[0], ours[1]), apart(ours[0], ours[2]), apart(*users))
    print(float(values[0].abs().max()), float((values[0] - values[1]).abs().max()))
    quantized = pare.train_quantized(program, batches, step=turned, epochs=1, calibrate=[x for x, _ in batches()])
    assert all(torch.isfinite(p.unpack()).all() for p in quantized.weights.values()) and len(quantized.weights) >= 3


if __name__ == "__main__":
    main(int(sys.argv[1]))
