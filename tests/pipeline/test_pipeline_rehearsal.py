"""Rehearsal: what needs no training is refused before the base is trained."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import paredown as pare
from paredown.errors import CaptureError, InfeasibleError, ParedownError, RejectedError
from paredown.pipeline import compress, rehearsal, stages
from paredown.pipeline.compress import task_of
from paredown.recipe import Recipe, parse_recipe

TASK = Path(__file__).with_name("small_task.py")
BASE = """

def base(seed=0, epochs=1):
    with open(__file__ + ".trained", "a") as file:
        file.write("x")
    torch.manual_seed(seed)
    return model()
"""
BAD = {
    "a name that METRIC does not have": "def evaluate(predict):\n    return {'recall': 50.0}\n",
    "two axes": "def evaluate(predict):\n    return {METRIC['name']: torch.zeros(3, 2)}\n",
    "slices": "def slices():\n    return {'site': ['a'] * 7}\n",
    "capture": "def model():\n    class Odd(Small):\n        def forward(self, x):\n            return super().forward(x) if x.sum() > 0 else super().forward(-x)\n    return Odd()\n",
}  # fmt: skip


def recipe(task: Path, **more: Any) -> Recipe:
    return parse_recipe(
        {
            "schema": 1, "task": str(task), "threads": 1, "recover": {"epochs": 1}, "dense_twin": {"enabled": False},
            "measure": {"runs": 6, "seconds": 0.1}, "prune": {"align": 1}, **more,
        }
    )  # fmt: skip


def task_with(tmp_path: Path, more: str) -> Path:
    path = tmp_path / "task.py"
    path.write_text(TASK.read_text(encoding="utf-8") + BASE + "\n\n" + more, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("a name that METRIC does not have", RejectedError, "that METRIC names"),
        ("two axes", RejectedError, "a 1-D array"),
        ("slices", RejectedError, "Got 7 in the column 'site'"),
        ("capture", CaptureError, "x.sum"),
    ],
)
def test_what_needs_no_training_is_told_before_it(
    what: str, kind: type[ParedownError], said: str, tmp_path: Path
) -> None:
    task = task_with(tmp_path, BAD[what])
    with pytest.raises(kind, match=said):
        compress(recipe(task, prune={"levels": [{"channels": 0.5}]}), out=tmp_path / "run", quiet=True)
    assert not Path(f"{task}.trained").exists()


@pytest.mark.parametrize("count", ["macs", "parameters"])
def test_counts_out_of_reach_are_told_before_the_base_is_trained(count: str, tmp_path: Path) -> None:
    task = task_with(tmp_path, "")
    with pytest.raises(InfeasibleError, match=f"{count} must be reducible") as caught:
        compress(recipe(task, budget={count: 0.001}), out=tmp_path / "run", quiet=True)
    assert caught.value.nearest is not None and not Path(f"{task}.trained").exists()
    compress(recipe(task, budget={count: 0.6, "allocation": "uniform"}), out=tmp_path / "other", quiet=True)
    assert Path(f"{task}.trained").read_text() == "x"


def test_a_metric_that_is_no_number_before_the_training_is_left_to_it(tmp_path: Path) -> None:
    nan = "def evaluate(predict):\n    done = __import__('os').path.exists(__file__ + '.trained')\n    return {METRIC['name']: torch.full((9,), 50.0 if done else float('nan'))}\n"
    task = task_with(tmp_path, nan)
    compress(recipe(task, prune={"levels": [{"channels": 0.5}]}), out=tmp_path / "run", quiet=True)
    assert Path(f"{task}.trained").read_text() == "x"
    always = "def evaluate(predict):\n    return {METRIC['name']: torch.tensor([50.0, float('nan'), 1.0])}\n"
    with pytest.raises(RejectedError, match="Got 1 of 3 values NaN or infinite from evaluate"):
        compress(recipe(task_with(tmp_path, always)), out=tmp_path / "bad", quiet=True)


def test_an_evaluate_that_wants_a_trained_network_is_asked_after_the_training(tmp_path: Path) -> None:
    picky = "def evaluate(predict):\n    if not __import__('os').path.exists(__file__ + '.trained'):\n        raise ValueError('no threshold')\n    return {METRIC['name']: torch.full((9,), 50.0)}\n"
    task = task_with(tmp_path, picky)
    compress(recipe(task), out=tmp_path / "run", quiet=True)
    assert Path(f"{task}.trained").read_text() == "x"


def test_a_rehearsal_takes_no_longer_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large test set is one to wait for once: the first answer after the limit ends it, in an evaluate that handles any Exception."""
    monkeypatch.setattr(rehearsal, "SECONDS", -1.0)
    said: list[str] = []
    task, _, _ = task_of(recipe(task_with(tmp_path, "")))

    def evaluate(predict: Any) -> dict[str, Any]:
        try:
            predict(*task.inputs())
        except Exception:
            said.append("handled")
        said.append("went on")
        return {}

    run: Any = SimpleNamespace(task=dataclasses.replace(task, evaluate=evaluate), recipe=recipe(TASK), say=said.append)
    rehearsal.rehearse(run, task.model(), ("evaluate", "slices", "budget"))
    assert said == ["look at the untrained network"]
    monkeypatch.setattr(rehearsal, "SECONDS", 60.0)
    with pytest.raises(RejectedError, match="Got dict without entries"):
        rehearsal.rehearse(run, task.model(), ("evaluate", "slices", "budget"))


def test_a_curve_and_a_sensitivity_are_not_refused_for_what_they_do_not_read(tmp_path: Path) -> None:
    """A curve's base cell has the recipe's budget and none of its levels, floors or slices."""
    task = task_with(tmp_path, BAD["slices"])
    folder = tmp_path / "run"
    (folder / "steps").mkdir(parents=True)
    asked = recipe(task, budget={"macs": 0.001})
    made, _, _ = task_of(asked)
    run: Any = SimpleNamespace(
        task=made, recipe=asked, say=print, dense={}, folder=SimpleNamespace(steps=folder / "steps"), on_training=print,
        environment={"versions": {}, "threads": 1},
    )  # fmt: skip
    for asks in ((), ("evaluate",)):
        stages.base_of(run, asked=asks)
    with pytest.raises(RejectedError, match="Got 7 in the column 'site'"):
        rehearsal.rehearse(run, made.model(), ("evaluate", "slices"))
    with pytest.raises(InfeasibleError):
        rehearsal.rehearse(run, made.model(), ("budget",))


@pytest.mark.parametrize("share", [10**9, 0.99999])
def test_counts_that_are_held_already_are_no_reason_to_refuse(share: int | float, tmp_path: Path) -> None:
    task, _, _ = task_of(recipe(TASK))
    program = pare.capture(task.model().eval(), task.inputs())
    for asked, refused in ((share, False), (0.001, True)):
        run: Any = SimpleNamespace(task=task, recipe=recipe(TASK, budget={"macs": asked}), say=print, dense={})
        with pytest.raises(InfeasibleError) if refused else nullcontext() as caught:
            rehearsal._reach(run, program)
        assert (caught is not None) is refused
