"""What a recipe can ask of quantization: repairs, layers in float, training with rounding in place."""

from pathlib import Path
from typing import Any

import pytest
import torch

import paredown as pare
from paredown.errors import UsageError
from paredown.pipeline.folder import RunFolder
from paredown.pipeline.run import Run
from paredown.pipeline.stages import _quantized
from paredown.recipe import parse_recipe
from paredown.train import Task

pytest.importorskip("torchao")


def quantized(task: Task, out: Path, **asked: Any) -> tuple[pare.Quantized, torch.nn.Module, list[Any]]:
    recipe = parse_recipe({"schema": 1, "task": "small", "quantize": asked})
    torch.manual_seed(0)
    dense = task.model()
    folder = RunFolder(path=out)
    folder.steps.mkdir(exist_ok=True, parents=True)
    told: list[Any] = []
    run = Run(
        recipe=recipe, task=task, folder=folder, say=lambda _: None, on_training=lambda *a: told.append(a), weights_given=True,
        model=lambda: dense, environment={"versions": {}},
    )  # fmt: skip
    return _quantized(run, pare.capture(dense, task.inputs()), dense), dense, told


def test_training_with_rounding_starts_where_calibration_ends_and_moves_on(task: Task, tmp_path: Path) -> None:
    plain, _, none = quantized(task, tmp_path / "a")
    trained, _, told = quantized(task, tmp_path / "b", epochs=1, lr=0.01)
    assert not none and told and {a[0] for a in told} == {"train with rounding"}
    assert trained.weights.keys() == plain.weights.keys()
    assert any(not torch.equal(trained.weights[n].codes, p.codes) for n, p in plain.weights.items())
    again, _, _ = quantized(task, tmp_path / "c", epochs=1, lr=0.01)
    assert all(torch.equal(again.weights[n].codes, p.codes) for n, p in trained.weights.items())


def test_repairs_and_layers_in_float_reach_the_verb(task: Task, tmp_path: Path) -> None:
    plain, _, _ = quantized(task, tmp_path / "a")
    repaired, _, _ = quantized(task, tmp_path / "b", repair=["gptq"])
    assert any(not torch.equal(repaired.weights[n].codes, p.codes) for n, p in plain.weights.items())
    name = next(iter(plain.weights))
    less, _, _ = quantized(task, tmp_path / "c", float_layers=[name])
    assert set(less.weights) == set(plain.weights) - {name}


def test_wrong_requests_are_refused(task: Task, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="repair"):
        parse_recipe({"schema": 1, "task": "small", "quantize": {"repair": ["magic"]}})
    with pytest.raises(UsageError, match="matches none"):
        quantized(task, tmp_path / "a", float_layers=["no.such.layer"])
