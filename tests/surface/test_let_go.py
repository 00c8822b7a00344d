"""What verbs keep: nothing. A notebook, a sweep and a search make hundreds of programs in one process."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paredown as pare

BATCHES = [(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3]))]
X = BATCHES[0][0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.d = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(self.a(x)))
        return self.d((x + self.c(x)).mean((2, 3)))


def step(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def pruned(program: pare.Program) -> pare.Pruned:
    coupling = pare.couple(program)
    scores = pare.score(program, coupling, "taylor", batches=BATCHES, loss=step)
    budget = pare.Budget(parameters=0.5)
    return pare.prune(program, pare.allocate(coupling, scores, pare.examine(program), budget, align=1))


def sensitive(program: pare.Program) -> Any:
    coupling = pare.couple(program)
    scores = pare.score(program, coupling, "l1")
    return pare.sensitivity(program, coupling, scores, distance="kl", batches=[X], amounts=[0.5], repair=True)


def exported(program: pare.Program, folder: Path) -> None:
    pare.export(program, folder / "net.onnx")
    other = pare.capture(nn.Linear(2, 2), torch.zeros(2, 2))
    pare.export(other, folder / "other.onnx")  # onnxscript's rules hold the graph that they saw last, and one alone


VERBS: dict[str, Callable[[pare.Program, Path], Any]] = {
    "examine": lambda p, _: pare.examine(p),
    "couple": lambda p, _: pare.couple(p),
    "prune": lambda p, _: pruned(p),
    "reconstruct": lambda p, _: pare.reconstruct(pruned(p), BATCHES, step=step),
    "recover": lambda p, _: pare.recover(pruned(p), BATCHES, step=step, epochs=1),
    "sensitivity": lambda p, _: sensitive(p),
    "quantize": lambda p, _: pare.quantize(p, target="onnxruntime-x86", calibrate=[X]),
    "train_quantized": lambda p, _: pare.train_quantized(p, lambda: BATCHES, step=step, calibrate=[X], epochs=1),
    "export": exported,
    "export_quantized": lambda p, folder: pare.export(pare.quantize(p, calibrate=[X]), folder / "net.onnx"),
    "save": lambda p, folder: pare.save(pruned(p), folder / "kept"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_program_is_let_go_with_its_weights(verb: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = pare.capture(Net(), X)
    left: list[weakref.ref[Any]] = [
        weakref.ref(program),
        weakref.ref(program.module),
        weakref.ref(program.state["c.weight"]),
    ]
    found = VERBS[verb](program, tmp_path)
    small = getattr(found, "module", None)
    if isinstance(small, nn.Module):
        left.append(weakref.ref(small))
    del program, found, small
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)
