"""What compress was given, as digests: the same source is the same, whatever changes the result is not."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from paredown.train.given import given_digests, given_notes

CELL = """
import dataclasses, enum, functools
import numpy as np
import torch
from torch import nn

lr = 0.1
data = torch.arange(8.0)
table = np.eye(2)
names = {"b", "a", "c"}
Kind = enum.Enum("Kind", "A B")

@dataclasses.dataclass(frozen=True)
class Options:
    epochs: int = 3
    more: list = dataclasses.field(default_factory=list)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(2, 2)
    def forward(self, x):
        return self.a(x).relu()

options, teacher, loader = Options(), Net(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), shuffle=True)

def helper(x):
    return x * 2

@functools.cache
def cached(x):
    return x + 1

def train(model, epochs=2, *, verbose=False):
    def inner(x):
        class Local:
            scale = 3
        return helper(x) * Local.scale * lr + cached(1)
    return [inner(d) for d in data], table, names, Kind.A, options, teacher(data), loader, train

@torch.no_grad()
def evaluate(predict):
    return {"a": helper(1)}
"""


def digests(source: str, *names: str, head: str = "") -> dict[str, str]:
    space: dict = {"__name__": "__main__"}
    exec(compile(head + source, "<cell>", "exec"), space)
    return given_digests({n: space[n] for n in names or ("train", "evaluate")})


def changed(before: str, after: str) -> set[str]:
    assert before in CELL
    a, b = digests(CELL), digests(CELL.replace(before, after))
    assert a.keys() == b.keys()
    return {n for n in a if a[n] != b[n]}


def test_the_same_source_is_the_same_at_other_lines_and_in_another_process() -> None:
    here = digests(CELL)
    assert here == digests(CELL, head="\n\n\n# comment\n")
    assert not given_notes(here)
    assert here["train.lr"] == "0.1"
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_train_given import *; print(digests(CELL))"
    for seed in "12":
        found = subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert found.stdout.strip() == str(here)


@pytest.mark.parametrize(
    ("before", "after", "where"),
    [
        ("lr = 0.1", "lr = 0.2", {"train.lr"}),
        ("epochs=2", "epochs=3", {"train"}),
        ("verbose=False", "verbose=True", {"train"}),
        ("scale = 3", "scale = 4", {"train"}),
        ("x * 2", "x * 3", {"train.helper", "evaluate"}),
        ("x + 1", "x + 2", {"train.cached"}),
        ("arange(8.0)", "arange(9.0)", {"train.data", "train.loader"}),
        ("eye(2)", "eye(3)", {"train.table"}),
        ('"c"}', '"d"}', {"train.names"}),
        ("epochs: int = 3", "epochs: int = 4", {"train.options"}),
        ("Options(), Net()", "Options(4), Net()", {"train.options"}),
        ("manual_seed(0)", "manual_seed(1)", {"train.teacher"}),
        (".relu()", ".tanh()", {"train.teacher"}),
        ("shuffle=True", "shuffle=False", {"train.loader"}),
        ("Kind.A", "Kind.B", {"train"}),
        ('{"a": helper(1)}', '{"a": helper(2)}', {"evaluate"}),
    ],
)
def test_what_changes_the_result_is_seen_and_named(before: str, after: str, where: set[str]) -> None:
    assert changed(before, after) - {"train.train"} == where


def test_closures_partials_methods_and_callable_objects_count_their_content() -> None:
    def made(value: object):
        return lambda model: value

    class Trainer:
        def __init__(self, lr: float) -> None:
            self.lr = lr

        def __call__(self, model: nn.Module) -> None: ...

        def run(self, model: nn.Module) -> None: ...

    same = [
        (made(torch.ones(2)), made(torch.ones(2)), made(torch.zeros(2))),
        (functools.partial(made, 1), functools.partial(made, 1), functools.partial(made, 2)),
        (Trainer(0.1), Trainer(0.1), Trainer(0.2)),
        (Trainer(0.1).run, Trainer(0.1).run, Trainer(0.2).run),
        (made(made(1)), made(made(1)), made(made(2))),
        (np.sin, np.sin, np.cos),
        (torch.relu, torch.relu, torch.tanh),
        (len, len, max),
        ([torch.ones(2)], [torch.ones(2)], [torch.ones(3)]),
    ]
    for one, again, other in same:
        a, b, c = (given_digests({"train": f}) for f in (one, again, other))
        assert a == b != c
        assert not given_notes(a)


def test_packages_have_no_line_of_their_own_and_count() -> None:
    found = digests(CELL)
    assert not {"train.np", "train.torch", "train.nn", "train.functools"} & found.keys()
    source = "import {} as np\n\ndef train(model):\n    return np.sin(1.0)\n"
    a, b = (digests(source.format(name), "train") for name in ("numpy", "math"))
    assert a.keys() == b.keys() == {"train"}
    assert a != b


def test_a_teachers_mode_is_no_change() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    before = given_digests({"train": lambda x: net(x) + 1})
    net.eval()
    assert given_digests({"train": lambda x: net(x) + 1}) == before


def test_what_cannot_be_compared_never_equals_itself_and_is_named() -> None:
    lock, plain = threading.Lock(), 1
    with tempfile.TemporaryFile() as file:
        for thing, kind in ((lock, "lock"), (file, "BufferedRandom"), ((i for i in range(2)), "generator")):
            train = lambda model: (thing, plain)  # noqa: B023, E731
            first, second = given_digests({"train": train}), given_digests({"train": train})
            assert first["train"] == second["train"]
            assert first["train.plain"] == second["train.plain"] == "1"
            assert first["train.thing"] != second["train.thing"]
            (note,) = given_notes(first)
            assert "train.thing" in note
            assert kind in note
            assert "cannot be continued" in note
            assert " at 0x" not in note


FILLS = """
from collections import defaultdict
losses, log, seen, rates = [], defaultdict(list), {}, [0.1, 0.2]
total = 0

def train(model):
    global total
    total += 1
    losses.append(rates[0])
    log["loss"].append(rates[1])
    seen[total] = model

def counting():
    calls = 0
    def step(model, batch):
        nonlocal calls
        calls += 1
        return rates[0]
    return step

step = counting()
"""


def test_what_a_function_fills_itself_is_no_other_function_and_what_it_reads_is() -> None:
    space: dict = {"__name__": "__main__"}
    exec(compile(FILLS, "<cell>", "exec"), space)

    def now() -> dict[str, str]:
        return given_digests({"train": space["train"], "step": space["step"]})

    before = now()
    space["train"](1), space["step"](1, 2)
    assert (space["total"], len(space["losses"]), dict(space["log"]), space["seen"]) == (1, 1, {"loss": [0.2]}, {1: 1})
    assert now() == before and {"train.losses", "train.rates", "step.calls"} <= set(before)
    space["rates"][0] = 0.3
    assert {n for n, line in now().items() if line != before[n]} == {"train.rates", "step.rates"}
