"""Tables, bars and figures: readable when narrow, without colour, and safe with any name."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from paredown.errors import UsageError
from paredown.examine import Cost, NodeCost, examine
from paredown.program import capture

HOSTILE = "<script>alert(1)</script>[bold]%s\x1b[31m$x$/../🦊"


def hostile_cost() -> Cost:
    node = NodeCost(
        name=HOSTILE,
        node="n",
        kind="conv2d",
        output_shape=(1, 2),
        parameters=10,
        macs=100,
        parameter_bytes=40,
        activation_bytes=8,
    )
    return Cost(
        macs=100,
        parameters=10,
        parameter_bytes=40,
        activation_bytes=8,
        peak_activation_bytes=8,
        by_node=(node,),
        model=HOSTILE,
    )


def test_html_escapes_every_name_and_loads_nothing() -> None:
    page = hostile_cost()._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<svg" in page
    assert "http" not in page


def test_a_name_cannot_style_the_terminal() -> None:
    text = str(hostile_cost())
    assert "[bold]" in text.replace("\n", "").replace(" ", "")
    assert "\x1b" not in text
    assert "\x1b" not in hostile_cost().bars()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_tables_fit_the_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    cost = examine(capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.zeros(1, 3, 8, 8), train=False))
    file = io.StringIO()
    Console(file=file, width=width).print(cost)
    text = file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "3.89 k" in text  # 36 positions × 108 weights = 3888 MACs
    assert "\x1b" not in text
    assert all(len(line) <= width for line in cost.bars(width=width).splitlines())


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_writes_a_picture(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = hostile_cost().plot(tmp_path / f"bars.{kind}")
    head = path.read_bytes()[:400]
    assert head.startswith(b"\x89PNG") if kind == "png" else b"<svg" in path.read_bytes()
    assert b"<script>alert" not in path.read_bytes()


def test_plot_refuses_another_format(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        hostile_cost().plot(tmp_path / "bars.gif")
    with pytest.raises(UsageError, match="value must be"):
        hostile_cost().bars(value="time")
