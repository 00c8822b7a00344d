"""Trials of a search in processes of their own: the same answers, and limits, crashes and kills that cost one trial at most."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paredown.errors import RejectedError, ResourceError, UsageError
from paredown.pipeline import compress
from paredown.recipe import Recipe, parse_recipe
from paredown.records import read

TASK = Path(__file__).with_name("small_task.py")
ROOMY = {"seconds": 300.0, "memory": "20 GB"}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is watched on Linux")


def recipe(trial: Any, *, task: Path = TASK, **budget: Any) -> Recipe:
    asked = {"macs": 0.5, "together": True, "trials": 2, "allocation": "uniform", **budget}
    return parse_recipe(
        {
            "schema": 1, "task": str(task), "threads": 1, "recover": {"epochs": 1}, "dense_twin": {"enabled": False},
            "measure": {"runs": 6, "seconds": 0.1}, "prune": {"align": 1}, "budget": {**asked, "trial": trial},
        }
    )  # fmt: skip


def search(folder: Path) -> dict[str, Any]:
    (found,) = [r for r in read(folder / "records.jsonl") if r.cell["stage"] == "verdict"]
    return dict(found.details["search"])


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps" / "search-1" / "trials.jsonl").read_text().splitlines()]


def task_with(folder: Path, more: str) -> Path:
    """The small task, and what it does where fewer weights are left than it was made with: in a trial alone, or in its own training."""
    file = folder / "own_task.py"
    file.write_text(
        f"{TASK.read_text(encoding='utf-8')}\n\ndef step(model, batch):\n"
        "    if sum(p.numel() for p in model.parameters()) != sum(p.numel() for p in Small().parameters()):\n"
        f"        {more}\n    return F.cross_entropy(model(batch[0]), batch[1])\n",
        encoding="utf-8",
    )
    return file


@pytest.mark.parametrize(
    ("budget", "least"),
    [
        ({"trial_epochs": 1}, 3),
        # bytes are out of reach of some
        pytest.param({"size_bytes": 6500, "macs": 0.9, "front": (0.8, 1.5)}, 2, marks=pytest.mark.slow),
    ],
)
def test_a_trial_in_its_own_process_answers_the_same(budget, least, tmp_path):
    for name, trial in (("here", {}), ("apart", ROOMY)):
        compress(recipe(trial, **budget), out=tmp_path / name, quiet=True)
    here, apart = search(tmp_path / "here"), search(tmp_path / "apart")
    assert here == apart
    assert sum(t["error"] is not None for t in here["trials"]) >= least
    assert not (tmp_path / "apart" / "steps" / "search-1" / "apart").exists()


ONLY_RANKS = "if any('fac' in n or '.0.' in n or '.1.' in n for n, _ in model.named_parameters()): {}"


@pytest.mark.parametrize(
    ("does", "trial", "why", "tried_again"),
    [
        ("keep = bytearray(b'1') * 3_000_000_000; __import__('time').sleep(600)", {"memory": "2 GB"}, "took more than 2,000,000,000 B (budget.trial.memory)", False),
        pytest.param("os.kill(os.getpid(), signal.SIGSEGV)", ROOMY, "a process that ended with signal 11: ", True, marks=pytest.mark.slow),
        pytest.param("raise RuntimeError('no such shape')", ROOMY, "RuntimeError: no such shape", True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_fault_90_a_trial_that_ends_badly_is_marked_and_the_search_goes_on(does, trial, why, tried_again, tmp_path):
    task = task_with(tmp_path, ONLY_RANKS.format(does))
    asked = recipe(trial, task=task, trial_epochs=1, trials=0)
    compress(asked, out=tmp_path / "run", quiet=True)
    channels, ranks = search(tmp_path / "run")["trials"]
    assert channels["error"] > 0 and not channels["why"]
    assert ranks["error"] is None and ranks["why"].startswith(why)
    (line,) = [row for row in journal(tmp_path / "run") if row["losses"] is None]
    assert line["why"] == ranks["why"]
    # the search again, as after a kill just before its end: what used up its limit has had its turn
    (tmp_path / "run" / "steps" / "search-1.json").unlink()
    compress(asked, out=tmp_path / "run", quiet=True)
    assert len(journal(tmp_path / "run")) == (3 if tried_again else 2)
    assert search(tmp_path / "run")["trials"] == [channels, ranks]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "trial", "error", "says"),
    [
        ("__import__('time').sleep(600)", {"seconds": 8.0}, ResourceError, r"within its time\. Got one that took more than 8 s"),
        ("raise RuntimeError('no such width')", ROOMY, RejectedError, r"must end well\. Got RuntimeError: no such width, at own_task\.py:\d+, in step\."),
    ],
)  # fmt: skip
def test_where_no_trial_ends_well_it_says_why(does, trial, error, says, tmp_path):
    asked = recipe(trial, task=task_with(tmp_path, does), trials=0, trial_epochs=1)
    for _ in range(2):  # the second time from the journal, where it keeps it
        with pytest.raises(error, match=says):
            compress(asked, out=tmp_path / "run", quiet=True)


@pytest.mark.slow
def test_fault_90_killed_in_a_trial_nothing_is_left_and_the_same_comes_out(tmp_path):
    asked = recipe(ROOMY, trials=0)
    file = tmp_path / "recipe.yaml"
    file.write_text(asked.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "paredown", "compress", str(file), "--out", str(tmp_path / "run")]
    lines = tmp_path / "run" / "steps" / "search-1" / "trials.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        until = time.monotonic() + 300
        while not lines.exists() and time.monotonic() < until and run.poll() is None:
            time.sleep(0.05)
        time.sleep(1.0)  # in the second trial by now
        children = _below(run.pid)
        run.send_signal(signal.SIGKILL)
    assert lines.exists() and children
    before = journal(tmp_path / "run")
    until = time.monotonic() + 20
    while any(_runs(pid) for pid in children) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for pid in children if _runs(pid)]

    compress(asked, out=tmp_path / "run", quiet=True)
    compress(asked, out=tmp_path / "whole", quiet=True)
    assert search(tmp_path / "run") == search(tmp_path / "whole")
    assert len(before) == 1 and journal(tmp_path / "run")[:1] == before
    assert journal(tmp_path / "run") == journal(tmp_path / "whole")


def _below(pid: int) -> list[int]:
    """All processes that descend from one."""
    tree: dict[int, list[int]] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            tree.setdefault(parent, []).append(int(process.name))
    found, at = [], [pid]
    while at:
        at = [child for one in at for child in tree.get(one, [])]
        found += at
    return found


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_limits_without_trials_or_without_a_recipe_are_refused(tmp_path):
    plain = recipe({"seconds": 5.0}, together=False, trials=6)
    with pytest.raises(UsageError, match=r"budget\.trial must come with trials"):
        compress(plain, out=tmp_path / "run", quiet=True)
    sys.path.insert(0, str(TASK.parent))
    try:
        import small_task as task
    finally:
        sys.path.remove(str(TASK.parent))
    with pytest.raises(UsageError, match=r"budget\.trial must be used with a recipe"):
        compress(
            task.model(), inputs=task.inputs(), train_batches=task.train_batches, step=task.step, evaluate=lambda predict: {"accuracy": [1.0]},
            calibrate=task.calibration_batches, metric=task.METRIC, options={"budget": {"macs": 0.5, "together": True, "trial": {"seconds": 5.0}}},
            out=tmp_path / "notebook", quiet=True,
        )  # fmt: skip


def test_a_recipe_without_limits_has_the_digest_that_it_had():
    assert "trial" not in recipe({}).to_yaml().replace("trials", "").replace("trial_epochs", "")
    assert recipe({}).digest != recipe({"seconds": 5.0}).digest
    assert recipe({"memory": "4 GB"}).budget.trial.memory == 4_000_000_000
