"""The README's own code runs as it stands there: the task module, the verbs one by one, the recipe, the notebook."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import paredown as pare

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
pytest.importorskip("sklearn", reason="needs the extra demo")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


def block(language: str, holding: str) -> str:
    """The one code block of that language that holds a text."""
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if holding in b]
    return str(found)


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The README's task module in a folder of its own, with trained weights beside it."""
    (tmp_path / "task.py").write_text(block("python", "# task.py"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("task")
    yield module
    del sys.modules["task"]


def trained(task: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    net = task.model().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(8):
        for batch in task.train_batches():
            optimizer.zero_grad()
            task.step(net, batch).backward()
            optimizer.step()
    return net.eval()


def accuracy(task: ModuleType, net: nn.Module) -> float:
    with torch.no_grad():
        return float(task.evaluate(net, task.test_batches())["accuracy"].mean())


def test_the_task_module_is_short() -> None:
    lines = [line for line in block("python", "# task.py").splitlines() if line.strip()]
    assert len(lines) <= 30


def test_the_verbs_one_by_one(task: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    net = trained(task)
    before = accuracy(task, net)
    monkeypatch.setattr(task, "model", lambda: net)
    names: dict[str, object] = {}
    exec(compile(block("python", "pare.capture("), "README.md", "exec"), names)
    dense, small, measured, check = names["cost"], names["small"], names["measured"], names["check"]
    assert isinstance(dense, pare.Cost) and isinstance(small, pare.Pruned) and isinstance(check, pare.Check)
    assert isinstance(measured, dict)
    after = pare.examine(pare.capture(small.module, task.inputs()))
    assert abs(after.macs / dense.macs - 0.5) < 0.02
    assert before > 90 and measured["accuracy"].value > before - 5
    assert measured["accuracy"].n == 597 and measured["bytes"].value == Path("model.onnx").stat().st_size
    assert check.int8_nodes and not [n for n in check.float_nodes if "Conv" in str(n)]


def test_commands_are_those_of_the_program() -> None:
    named = set(re.findall(r"`paredown ([a-z]+)", README)) | set(
        re.findall(r"^paredown ([a-z]+) \S+ --", README, re.MULTILINE)
    )
    assert len(named) >= 9
    done = subprocess.run([sys.executable, "-m", "paredown", "--help"], capture_output=True, text=True, check=True)
    there = set(re.findall(r"^  ([a-z]+) ", done.stdout, re.MULTILINE))
    assert named == there


@pytest.mark.slow
def test_the_recipe(task: ModuleType) -> None:
    save_file(trained(task).state_dict(), "trained.safetensors")
    Path("recipe.yaml").write_text(block("yaml", "task: task.py"), encoding="utf-8")
    result = pare.compress(
        "recipe.yaml", out="runs/mine", overrides=["measure.seconds=0.5", "budget.metric_loss=5.0"], quiet=True
    )
    assert isinstance(result, pare.Compressed)
    text = Path("runs/mine/report.html").read_text(encoding="utf-8")
    assert "accuracy" in text.lower() and "int8.onnx" in text
    loaded = pare.load("runs/mine", task.model())
    assert accuracy(task, loaded) > 90


@pytest.mark.slow
def test_the_notebook(task: ModuleType) -> None:
    def train(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for batch in task.train_batches():
            optimizer.zero_grad()
            task.step(model, batch).backward()
            optimizer.step()

    names = {
        "model": trained(task),
        "inputs": task.inputs(),
        "train": train,
        "calibrate": task.calibration_batches,
        "evaluate": lambda predict: task.evaluate(predict, task.test_batches()),
    }
    exec(compile(block("python", "budget=pare.Budget"), "README.md", "exec"), names)
    assert isinstance(names["result"], pare.Compressed)
    assert Path("runs/mine/report.html").stat().st_size > 1000
