"""Small networks in files of their own, and the command line called as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from paredown.cli import main

NETS = '''
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 1))


def odd_names():
    """Names that mean something to HTML, to rich, to format strings and to a terminal."""
    net = nn.Sequential()
    net.add_module("<script>alert(1)</script>", nn.Conv2d(3, 16, 3))
    net.add_module("[red]%s{0}[/red]", nn.Conv2d(16, 16, 3))
    net.add_module("\\x1b[31m🙂/x", nn.Conv2d(16, 4, 3))
    return net


def nothing_free():
    return nn.Sequential(nn.Conv2d(3, 8, 3))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(6, 8)

    def forward(self, left, right):
        return self.a(left) + self.b(right)


class Fft(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.b(torch.fft.fft2(self.a(x), dim=(1, 2)).real)


def noisy():
    print("a line on stdout that is not JSON")
    return net()


def failing():
    raise RuntimeError("no such thing")
'''


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout must be one document and nothing else."""
        return json.loads(self.out)


Call = Callable[..., Done]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """The command line, in a folder of its own; errors are one message, never a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err + out
        return Done(code, out, err)

    return run


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS, encoding="utf-8")
    return path
