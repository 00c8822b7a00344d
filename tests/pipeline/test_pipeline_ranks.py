"""recover.ranks: a level trained by two processes is that of one; what a rank says when it fails; a kill leaves none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import paredown as pare
from paredown.errors import RejectedError, UsageError
from paredown.pipeline.compress import task_of
from paredown.pipeline.folder import RunFolder
from paredown.pipeline.levels import one_level, started
from paredown.pipeline.run import Run
from paredown.pipeline.ways import check_ways
from paredown.recipe import Recipe, parse_recipe

TASK = Path(__file__).with_name("curve_task.py")


def recipe_of(ranks: int, task: Path = TASK, **prune: Any) -> Recipe:
    recover = {"epochs": 2, "lr": 0.05, "ranks": ranks}
    return parse_recipe(
        {"schema": 1, "task": str(task), "threads": 1, "prune": {"align": 4, **prune}, "recover": recover}
    )


def levels(recipe: Recipe, out: Path) -> tuple[pare.Pruned, list[Any], list[Any]]:
    """(what the levels made, their histories, what was told of the trainings)."""
    task, model, _ = task_of(recipe)
    check_ways(recipe, task)
    histories, heard = [], list[Any]()
    folder = RunFolder(path=out)
    folder.steps.mkdir(exist_ok=True, parents=True)
    run = Run(
        recipe=recipe, task=task, folder=folder, say=lambda _: None, on_training=lambda *told: heard.append(told),
        weights_given=True, model=model, environment={"versions": {}},
    )  # fmt: skip
    start = started(run, model())
    tuned = start.before
    for number, level in enumerate(recipe.prune.levels, start=1):
        done = one_level(run, number, level, start.program, tuned, start.dense)
        assert done is not None
        tuned = done[0]
        histories.append(done[1]["history"])
    assert tuned is not None
    return tuned, histories, heard


@pytest.mark.slow
@pytest.mark.parametrize(
    "prune",
    [
        {"levels": [{"channels": 0.75}, {"channels": 0.5}]},
        {"granularity": "element", "allocation": "global", "levels": [{"density": 0.4}]},
    ],
    ids=["two levels of channels", "masks"],
)
def test_a_level_by_two_ranks_is_that_of_one_process(tmp_path: Path, prune: dict[str, Any]) -> None:
    alone, history, _ = levels(recipe_of(1, **prune), tmp_path / "one")
    shared, told, heard = levels(recipe_of(2, **prune), tmp_path / "two")
    assert alone.plan.digest == shared.plan.digest
    for name, tensor in alone.module.state_dict().items():
        torch.testing.assert_close(shared.module.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    for mine, theirs in zip(history, told, strict=True):
        assert [e["loss"] for e in theirs] == pytest.approx([e["loss"] for e in mine], rel=1e-4)
    assert {name for name, _ in heard} == {f"recover level {n}" for n in range(1, len(history) + 1)}
    assert heard[-1][1].epochs == 2 and heard[-1][1].steps == 8
    for name, mask in shared.plan.masks.items():
        assert torch.equal(shared.module.get_parameter(name) != 0, torch.from_numpy(mask.kept))
    left = {p.name for p in (tmp_path / "two/steps").iterdir()}
    assert left == {p.name for p in (tmp_path / "one/steps").iterdir()}  # nothing of the ranks is left
    again, _, quiet = levels(recipe_of(2, **prune), tmp_path / "two")
    assert quiet == []  # kept, as that of one process
    assert all(torch.equal(t, shared.module.state_dict()[n]) for n, t in again.module.state_dict().items())


MASKED = """

_plain = model


def model():
    from torch.nn.utils import prune

    net = _plain()
    prune.l1_unstructured(net[2], "weight", 0.5)
    prune.l1_unstructured(net[0], "bias", 7)
    return net
"""


@pytest.mark.slow
def test_masks_that_a_model_came_with_are_held_by_every_rank(tmp_path: Path) -> None:
    """Beside channels that leave: as one process trains it, and with its zeros, of a bias too."""
    task = tmp_path / "masked_task.py"
    task.write_text(TASK.read_text() + MASKED)
    given = {"levels": [{"channels": 0.5}]}
    alone, _, _ = levels(recipe_of(1, task, **given), tmp_path / "one")
    shared, _, _ = levels(recipe_of(2, task, **given), tmp_path / "two")
    assert alone.plan.digest == shared.plan.digest and set(shared.plan.masks) == {"0.bias", "2.weight"}
    for name, tensor in alone.module.state_dict().items():
        torch.testing.assert_close(shared.module.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    dense = task_of(recipe_of(1, task))[1]()
    for name, mask in shared.plan.masks.items():
        held = torch.from_numpy(mask.kept)
        assert torch.equal(shared.module.get_parameter(name) != 0, held) and not held.all()
        of_torch = dense.get_buffer(f"{name}_mask")
        for axis, kept in shared.plan.keep.get(name, {}).items():
            of_torch = of_torch.index_select(axis, torch.tensor(kept))
        assert torch.equal(of_torch != 0, held), name


@pytest.mark.slow
def test_what_a_rank_says_when_it_fails_is_told(tmp_path: Path) -> None:
    task = tmp_path / "broken_task.py"
    broken = 'return F.cross_entropy(model(batch[0]), batch[1]) / (0 if os.environ.get("RANK") == "1" else 1) * int("x" * ("RANK" in os.environ) or 1)'
    text = TASK.read_text()
    assert "return F.cross_entropy(model(batch[0]), batch[1])" in text
    task.write_text(text.replace("return F.cross_entropy(model(batch[0]), batch[1])", broken))
    with pytest.raises(RejectedError, match=r"must end well.*ValueError: invalid literal.*recover\.ranks=1"):
        levels(recipe_of(2, task, levels=[{"channels": 0.5}]), tmp_path / "run")


@pytest.mark.slow
def test_a_killed_run_leaves_no_rank_behind(tmp_path: Path) -> None:
    task, out = tmp_path / "slow_task.py", tmp_path / "run"
    text = TASK.read_text()
    task.write_text(
        text.replace(
            "    global _steps", '    import time\n    time.sleep(5 * ("RANK" in os.environ))\n    global _steps'
        )
    )
    code = f"""
import sys; sys.path.insert(0, {str(TASK.parent)!r})
from pathlib import Path
from test_pipeline_ranks import levels, recipe_of
levels(recipe_of(2, Path({str(task)!r}), levels=[{{"channels": 0.5}}]), Path({str(out)!r}))
"""
    run = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while not (out / "steps/level-1-training.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(ranks_of(out)) >= 3  # torchrun and two ranks
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 10
    while ranks_of(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ranks_of(out)


def ranks_of(out: Path) -> list[int]:
    """Processes that work for a run."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) != os.getpid():
            try:
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                dead = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if not dead and "paredown.pipeline.ranks" in line and str(out) in line:
                found.append(int(process.name))
    return found


def test_ranks_are_refused_where_they_cannot_share(tmp_path: Path) -> None:
    recipe = recipe_of(2, granularity="element", allocation="global", schedule="gradual", levels=[{"density": 0.5}])
    with pytest.raises(UsageError, match=r"recover\.ranks must be 1 with a level that is pruned in training\. Got 2"):
        check_ways(recipe, task_of(recipe)[0])
    task = tmp_path / "own_task.py"
    task.write_text(TASK.read_text() + "\n\ndef train(model):\n    return model\n")
    recipe = recipe_of(2, task, levels=[{"channels": 0.5}])
    with pytest.raises(UsageError, match=r"recover\.ranks must be 1 with the task's own train\(\)"):
        check_ways(recipe, task_of(recipe)[0])


def test_one_rank_is_the_recipe_as_it_was() -> None:
    assert "ranks" not in recipe_of(1).to_yaml()  # records of before are found under the same digest
    assert recipe_of(1).digest != recipe_of(2).digest
    assert parse_recipe({"schema": 1, "task": "digits"}).digest == parse_recipe(
        {"schema": 1, "task": "digits", "recover": {"ranks": 1}}
    ).digest  # fmt: skip
