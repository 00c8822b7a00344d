"""A level of one's own masks: a file that the recipe names, held to the last export, and refused where it does not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import paredown as pare
from paredown.errors import NothingToDo, RejectedError, UsageError
from paredown.pipeline.compress import compress
from paredown.pipeline.folder import RunFolder
from paredown.pipeline.levels import one_level, started
from paredown.pipeline.own_masks import check_own_masks
from paredown.pipeline.run import Run
from paredown.pipeline.ways import check_ways
from paredown.recipe import Recipe, parse_recipe
from paredown.train import Task

TASK = Path(__file__).with_name("small_task.py")


def masks() -> dict[str, Tensor]:
    """A checkerboard over a convolution's matrix, and three of the four biases of the head."""
    conv = (torch.arange(16)[:, None] + torch.arange(144)).reshape(16, 16, 3, 3) % 2
    return {"b.weight": conv.to(torch.uint8), "head.bias": torch.tensor([1, 1, 0, 1], dtype=torch.uint8)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(masks(), tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def recipe_of(*levels: dict[str, Any], epochs: int = 1, **prune: Any) -> Recipe:
    recover = {"epochs": epochs, "lr": 0.02, "batch_norm_batches": 2, "distil": "none"}
    asked = {"align": 1, "levels": list(levels), **prune}
    return parse_recipe({"schema": 1, "task": "small", "prune": asked, "recover": recover})


def pruned(task: Task, recipe: Recipe, out: Path) -> tuple[pare.Pruned, list[dict[str, Any]]]:
    """All levels on the task's model as it is."""
    check_ways(recipe, task)
    folder = RunFolder(path=out)
    folder.steps.mkdir(parents=True)
    run = Run(
        recipe=recipe, task=task, folder=folder, say=lambda _: None, on_training=lambda *_: None, weights_given=True,
        model=task.model, environment={"versions": {}},
    )  # fmt: skip
    start = started(run, task.model())
    tuned, told = start.before, []
    for number, level in enumerate(recipe.prune.levels, start=1):
        done = one_level(run, number, level, start.program, tuned, start.dense)
        assert done is not None
        tuned = done[0]
        told.append(json.loads(json.dumps(done[1])))  # a record must hold it
    assert tuned is not None
    return tuned, told


def held(module: nn.Module, kept: dict[str, Tensor]) -> bool:
    return all(not module.get_parameter(n).detach()[k == 0].any() for n, k in kept.items())


@pytest.mark.slow
def test_masks_of_a_file_come_to_an_int8_file(file: Path, tmp_path: Path) -> None:
    """Trained around, with half of the channels removed after them, quantized, and told as simulated."""
    (tmp_path / "recipe.yaml").write_text(f"""
schema: 1
task: {TASK}
threads: 1
prune: {{align: 4, levels: [{{masks: {file.name}}}, {{channels: 0.5}}]}}
recover: {{epochs: 1, lr: 0.02, batch_norm_batches: 2}}
measure: {{runs: 5, seconds: 0.1}}
""")
    done = compress(tmp_path / "recipe.yaml", out=tmp_path / "run", quiet=True)
    stages = {r.cell["stage"]: r for r in done.records}
    first = stages["level-1"].details
    assert first["reached"]["masks"] == "mine.safetensors" and first["reached"]["density"] == (1152 + 3) / (2304 + 4)
    assert first["simulated"]["weights"]["b.weight"]["density"] == 0.5 and first["history"]
    assert first["simulated"]["effective_macs"] == stages["dense"].measured["macs"].value - 64 * 2304 // 2
    assert (
        stages["level-1"].measured["macs"].value == stages["dense"].measured["macs"].value
    )  # which a runtime executes
    keep = {n: [*done.plan.keep.get("b.weight", {}).get(axis, range(16))] for n, axis in (("out", 0), ("in", 1))}
    assert 8 <= len(keep["out"]) < 16
    left = {**masks(), "b.weight": masks()["b.weight"][keep["out"]][:, keep["in"]]}
    assert done.module.get_parameter("b.weight").shape == left["b.weight"].shape and held(done.module, left)
    assert stages["int8"].plan_digest == done.plan.digest
    text = (tmp_path / "run/recipe.yaml").read_text()
    assert str(file) in text and "masks_sha256" in text
    save_file({n: 1 - m if n == "b.weight" else m for n, m in masks().items()}, file)
    with pytest.raises(UsageError, match=r"another run.*\n.*prune\.levels\[0\]\.masks_sha256"):
        compress(tmp_path / "recipe.yaml", out=tmp_path / "run", quiet=True)
    with pytest.raises(UsageError, match=r"masks_sha256 must fit the masks file.*changed since"):
        compress(tmp_path / "run/recipe.yaml", out=tmp_path / "run", quiet=True)


def test_masks_stay_in_what_later_levels_and_an_update_do(file: Path, task: Task, tmp_path: Path) -> None:
    """Answered by obs, which changes the weights and not the mask; then half of what is left of all leaves."""
    levels = {"masks": str(file)}, {"density": 0.5, "granularity": "element"}
    recipe = recipe_of(*levels, epochs=0, update="obs", criterion="obs", score_batches=2)
    tuned, told = pruned(task, recipe, tmp_path / "obs")
    fit = told[0]["fits"]["b.weight"]
    assert fit["after"] < fit["before"] and "head.bias is masked without an update" in " ".join(told[0]["notes"])
    assert held(tuned.module, masks())
    weights = [p for p in tuned.module.parameters() if p.dim() > 1]
    assert sum(int((w != 0).sum()) for w in weights) == pytest.approx((4816 - 1152) / 2, abs=4)


def test_masks_join_those_that_the_model_came_with(file: Path, task: Task, tmp_path: Path) -> None:
    def model() -> nn.Module:
        net = task.model()
        torch_prune.l1_unstructured(net.b, "weight", 0.5)  # type: ignore[arg-type]
        return net

    of_torch = model().b.weight_mask  # type: ignore[union-attr]
    recipe = recipe_of({"masks": str(file)})
    check_own_masks(recipe, model())  # whose parameter is called weight_orig
    tuned, told = pruned(dataclasses.replace(task, model=model), recipe, tmp_path / "run")
    assert told[0]["reached"]["masks"] == file.name and told[0]["simulated"]["weights"]["head.bias"]["zeros"] == 1
    both = masks()["b.weight"].bool() & of_torch.bool()
    assert torch.equal(tuned.module.get_parameter("b.weight") != 0, both) and held(tuned.module, masks())


def test_whole_rows_leave_physically(task: Task, tmp_path: Path) -> None:
    rows = torch.tensor([1, 0] * 8).reshape(16, 1, 1, 1)
    np.savez(tmp_path / "rows.npz", **{"b.weight": rows.numpy()})  # type: ignore[arg-type]
    net = task.model()
    for bn in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.constant_(bn.bias, 0.0)  # a row of zeros is a dead channel
    tuned, told = pruned(
        dataclasses.replace(task, model=lambda: net),
        recipe_of({"masks": str(tmp_path / "rows.npz"), "granularity": "row"}, epochs=0),
        tmp_path / "run",
    )
    assert tuned.module.get_parameter("b.weight").shape[0] in (8, 16) and told[0]["notes"]
    again = recipe_of({"masks": str(tmp_path / "rows.npz")}, granularity="filter")
    assert again.prune.granularity_of(again.prune.levels[0]) == "row"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"d.weight": torch.ones(2)}, UsageError, r"must name a parameter of the model\. Got 'd\.weight'"),
        ({"b.weight": torch.ones(8, 16, 3, 3)}, UsageError, r"parameter's shape \(16, 16, 3, 3\).*for b\.weight"),
        ({"b.weight": torch.full((16, 16, 3, 3), 0.5)}, UsageError, "must hold 0 and 1, or booleans"),
        ({"b.weight": torch.zeros(16, 16, 3, 3)}, UsageError, "must keep at least one element"),
        ({"b.weight": torch.ones(16, 16, 3, 3), "head.bias": torch.ones(4)}, NothingToDo, "must prune something"),
    ],
    ids=["name", "shape", "values", "all", "none"],
)
def test_what_does_not_fit_is_told_before_the_base_is_trained(
    change: dict[str, Tensor], error: type[Exception], says: str, file: Path, tmp_path: Path
) -> None:
    save_file({**masks(), **change}, file)
    (tmp_path / "task.py").write_text(TASK.read_text().replace("    return fit(", "    assert False\n    return fit("))
    recipe = {"schema": 1, "task": str(tmp_path / "task.py"), "prune": {"levels": [{"masks": str(file)}]}}
    with pytest.raises(error, match=says):
        compress(parse_recipe(recipe), out=tmp_path / "run", quiet=True)


def test_cells_are_those_that_were_said(file: Path, task: Task, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must keep or prune whole cells"):
        pruned(task, recipe_of({"masks": str(file), "granularity": "kernel"}), tmp_path / "run")


def test_patterns_spare_a_weight_from_masks_too(file: Path, task: Task, tmp_path: Path) -> None:
    for number, patterns in enumerate(({"exclude": ["b"]}, {"include": ["head"]})):
        with pytest.raises(UsageError, match=r"masks must leave alone what prune\.include.*Got b\.weight"):
            pruned(task, recipe_of({"masks": str(file)}, **patterns), tmp_path / str(number))


def test_a_file_that_changes_or_goes_is_not_taken_for_the_old_one(file: Path, task: Task, tmp_path: Path) -> None:
    recipe = recipe_of({"masks": str(file)})
    save_file({"b.weight": masks()["b.weight"]}, file)
    with pytest.raises(UsageError, match="masks must stay as they were when the recipe was read"):
        pruned(task, recipe, tmp_path / "changed")
    file.unlink()
    with pytest.raises(RejectedError, match="a file of masks must be there"):
        pruned(task, recipe, tmp_path / "gone")


def test_a_schedule_has_nothing_to_choose(file: Path, task: Task) -> None:
    with pytest.raises(UsageError, match=r"prune\.schedule must be used with a level of masks that are chosen"):
        check_ways(recipe_of({"masks": str(file)}, schedule="gradual"), task)
