"""Budgets by all means together: several limits with bits, low rank after channels, and a front with the recipe of each point."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paredown.cli.main import explained
from paredown.errors import InfeasibleError
from paredown.pipeline import compress
from paredown.pipeline.jointly import _front_row, _out_of_reach, by_bits, is_joint
from paredown.plan import Plan
from paredown.recipe import Recipe, load_recipe, parse_recipe
from paredown.records import read
from paredown.search.asking import Trial, reason_of, undominated

TASK = Path(__file__).with_name("small_task.py")


def recipe(budget: dict[str, Any], **more: Any) -> Recipe:
    return parse_recipe(
        {
            "schema": 1, "task": str(TASK), "threads": 1, "recover": {"epochs": 1}, "dense_twin": {"enabled": False},
            "measure": {"runs": 6, "seconds": 0.1}, "prune": {"align": 1}, "budget": budget, **more,
        }
    )  # fmt: skip


def verdict(folder: Path) -> dict[str, Any]:
    (found,) = [r for r in read(folder / "records.jsonl") if r.cell["stage"] == "verdict"]
    return dict(found.details)


def test_bytes_by_bits_and_another_limit_hold_together_and_the_front_goes_over_sizes(tmp_path):
    task = tmp_path / "held_out_task.py"
    task.write_text(TASK.read_text() + "\n\ndef choose_batches():\n    return [_bars(40, 11)]\n")
    asked = recipe({"size_bytes": 6500, "macs": 0.7, "trials": 1, "front": [1.5], "low_rank": False}, task=str(task))
    compress(asked, out=tmp_path / "run", quiet=True)
    said = verdict(tmp_path / "run")
    assert {b["what"]: b["met"] for b in said["bounds"]} == {"size_bytes": True, "macs": True}
    assert (tmp_path / "run" / "int8.onnx").stat().st_size <= 6500
    search = said["search"]
    whole, pruned = search["trials"]
    assert whole["way"] == "none" and "must hold macs" in whole["why"]  # bits alone save no multiplications
    assert search["chosen"] == 1 and pruned["way"] == "channels"
    assert pruned["amounts"]["macs"] <= search["asked"]["macs"] and pruned["amounts"]["size_bytes"] <= 6500
    told = pruned["forecast"]
    assert told["sum"] == told["units"] + told["bits"] and told["measured"] == pruned["error"] > 0
    points = search["front_points"]
    assert len({p["times"] for p in points}) > 1 and len({p["size_bytes"] for p in points}) > 1
    assert all(p["amounts"]["macs"] <= 1 + p["times"] * search["asked"]["macs"] for p in points)
    assert all(p["recipe"]["budget.size_bytes"] == int(p["times"] * 6500) >= p["size_bytes"] for p in points)
    assert all((p["levels"] == p["recipe"].get("prune.levels", [])) for p in points)
    losses = [(p["error"], p["amounts"]["size_bytes"], p["amounts"]["macs"]) for p in points]
    assert undominated(losses) == [*range(len(points))] and losses == sorted(losses)
    assert {p["epochs"] for p in points} == {0} and all(0 <= p["held_out"] <= 100 for p in points)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "on held-out data (simulated, fitted, not trained)" in page
    assert f"--set budget.size_bytes={points[0]['recipe']['budget.size_bytes']}" in page
    assert "summed sensitivities foresaw" in page and 'download="front.csv"' in page


def test_channels_and_then_ranks_are_one_answer_that_a_second_run_finds_again(tmp_path):
    asked = recipe({"macs": 0.5, "together": True, "trials": 1, "allocation": "uniform"})
    compress(asked, out=tmp_path / "run", quiet=True)
    search = verdict(tmp_path / "run")["search"]
    assert [t["way"] for t in search["trials"]] == ["channels", "low rank", "both"]
    assert all(t["amounts"]["macs"] <= search["asked"]["macs"] for t in search["trials"])
    errors = [t["error"] for t in search["trials"]]
    assert search["chosen"] == errors.index(min(errors))
    steps = search["trials"][2]["recipe"]["prune.levels"]
    assert [s.get("factorize") for s in steps] == [None, "svd"] and steps[0]["epochs"] == 0
    (level,) = [r for r in read(tmp_path / "run" / "records.jsonl") if r.cell["stage"].startswith("level-")]
    assert level.measured["macs"].value == search["trials"][search["chosen"]]["amounts"]["macs"]

    # where both is the answer, the levels before the last one are kept and carried out again
    kept = tmp_path / "run" / "steps" / "search-1.json"
    known = json.loads(kept.read_text())
    assert len(known.get("before", ())) == (search["chosen"] == 2)
    before = level.measured["metric"]
    (again,) = [
        r for r in compress(asked, out=tmp_path / "run", quiet=True).records if r.cell["stage"] == level.cell["stage"]
    ]
    assert dataclasses.replace(again.measured["metric"]) == before


@pytest.mark.parametrize("budget", [{"macs": 1_000_000_000}, {"size_bytes": 60_000, "low_rank": False}])
def test_a_front_is_made_where_the_limits_are_met_already(budget, tmp_path):
    (name,) = {"macs", "size_bytes"} & {*budget}
    share = 2.5e5 / 1e9 if name == "macs" else 0.1
    asked = recipe({**budget, "front": (share,), "trials": 1, "allocation": "uniform"})
    found = compress(asked, out=tmp_path / "run", quiet=True)
    search = verdict(tmp_path / "run")["search"]
    assert search["already_met"] and not found.plan.keep and verdict(tmp_path / "run")["target_met"]
    less = [p for p in search["front_points"] if p["times"] == share]
    assert less and all(0 < p["amounts"][name] <= share * budget[name] and p["error"] > 0 for p in less)
    assert any(p["times"] == 1.0 and not p["levels"] for p in search["front_points"])  # as it is
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "nothing had to leave" in page and f"budget.{name}={int(share * budget[name])}" in page
    # a second run reads what the first one found
    again = compress(asked, out=tmp_path / "run", quiet=True)
    assert again.verdict["search"] == search


def test_limits_that_no_means_reaches_are_exit_4_with_the_nearest_plan(tmp_path):
    task = tmp_path / "given_task.py"  # a base to train would be refused before it, by counts alone
    task.write_text(TASK.read_text(encoding="utf-8") + "\n\ndel base\n", encoding="utf-8")
    budget = {"size_bytes": 6500, "macs": 0.001, "trials": 1, "allocation": "uniform", "low_rank": False}
    asked = recipe(budget, task=str(task))
    with pytest.raises(
        InfeasibleError, match=r"the budget must be reachable: macs .*, size_bytes 6,500\. Got macs must be at most"
    ) as caught:
        compress(asked, out=tmp_path / "run", quiet=True)
    assert caught.value.exit_code == 4 and caught.value.nearest.keep


CRASHES = """


def step(model, batch):
    if sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in Small().parameters()):
        raise RuntimeError("no such width")
    return F.cross_entropy(model(batch[0]), batch[1])
"""


def test_fault_79_what_a_task_raises_in_every_trial_is_no_limit_out_of_reach(tmp_path):
    task = tmp_path / "crashing_task.py"
    task.write_text(TASK.read_text(encoding="utf-8") + CRASHES, encoding="utf-8")
    asked = recipe({"macs": 0.5, "together": True, "trials": 0, "allocation": "uniform"}, task=str(task))
    with pytest.raises(RuntimeError, match="no such width") as caught:
        compress(asked, out=tmp_path / "run", quiet=True)
    said, code = explained(caught.value)
    assert code == 3 and "your own code raised RuntimeError: no such width, at" in said and "crashing_task.py" in said


def test_what_the_narrowest_file_takes_is_weighed_before_anything_is_trained(tmp_path):
    """The ops that unpack a few bits are most of a file this small, and an estimate: exit 4 came after the training."""
    asked = recipe({"size_bytes": 4100, "trials": 2, "low_rank": False}, prune={"align": 1, "floor": 0.7})
    with pytest.raises(
        InfeasibleError, match=r"Got some 4,\d{3} B at the least \(channels, .* weighed\) in 4 trials"
    ) as caught:
        compress(asked, out=tmp_path / "run", quiet=True)
    assert "more trials" not in caught.value.advice, "the fewest channels were tried"
    trials = (tmp_path / "run" / "steps" / "search-1" / "trials.jsonl").read_text()
    assert "the file with the fewest bits must fit 4,100 B" in trials
    assert not [*(tmp_path / "run").rglob("*level-1*.json")], "no level was carried out"


def test_bytes_that_no_share_that_was_asked_holds_are_reached_by_fewer_channels(tmp_path):
    """Shares are drawn, and two draws may both be too large: what floor and alignment allow decides what is out of reach."""
    asked = recipe({"size_bytes": 4100, "trials": 2, "low_rank": False})
    compress(asked, out=tmp_path / "run", quiet=True)
    search = verdict(tmp_path / "run")["search"]
    assert [t["error"] is None for t in search["trials"]][:4] == [True, True, True, False]
    held = [t for t in search["trials"] if t["error"] is not None]
    assert all(t["way"] == "channels" and t["size_bytes"] <= 4100 for t in held)
    missed = min(t["share"] for t in search["trials"] if t["error"] is None and t["way"] == "channels")
    assert max(t["share"] for t in held) < missed
    assert (tmp_path / "run" / "int8.onnx").stat().st_size <= 4100


def test_a_reason_comes_without_its_advice_and_says_what_crashed():
    task: Any = SimpleNamespace(train=None, step=len, train_batches=list)
    run: Any = SimpleNamespace(task=task)
    means: Any = SimpleNamespace(run=run, limits={"macs": 5.0}, smallest=[], shrinking=None, nearest=[Plan(keep={})])
    missed = InfeasibleError("macs must be at most 5. Got 7, in a layer named Lower deck.", advice="Lower the floor.")
    trials = [
        Trial(values={"way": way}, losses=None, why=reason_of(error), error=error)
        for way, error in (("channels", missed), ("low rank", MemoryError("of the GPU")))
    ]
    error = _out_of_reach(means, trials)
    assert isinstance(error, InfeasibleError) and error.nearest == Plan(keep={})
    assert error.reason == (
        "the budget must be reachable: macs 5. Got macs must be at most 5. Got 7, in a layer named Lower deck in 2 trials, of which 1 "
        "ended with MemoryError: of the GPU."
    )
    assert error.advice == "Lower prune.floor, or ask for more."
    assert _out_of_reach(means, trials[1:]) is trials[1].error


def test_the_nearest_of_several_trials_is_what_the_message_tells_and_the_error_carries():
    run: Any = SimpleNamespace(task=SimpleNamespace(train=None, step=len, train_batches=list))
    means: Any = SimpleNamespace(run=run, limits={"macs": 5.0}, smallest=[], shrinking=None, nearest=[])
    plans = [Plan(keep={}, made_by={"reached": {"macs": n}}) for n in (9, 6, 55)]
    errors = [InfeasibleError(f"some {p.made_by['reached']['macs']} MAC.", p) for p in plans]
    trials = [Trial(values={"way": "both"}, losses=None, why=e.reason, error=e) for e in errors]
    error = _out_of_reach(means, trials)
    assert isinstance(error, InfeasibleError) and error.nearest is plans[1]
    assert error.reason == "the budget must be reachable: macs 5. Got some 6 MAC in 3 trials."


@pytest.mark.parametrize(
    ("asked", "times", "latency"),
    [(0.6, 1.0, 0.6), (0.6, 1.5, 0.9), (0.6, 2.0, None), ("12 ms", 0.5, "6ms")],
)
def test_the_recipe_of_a_point_is_one_that_can_be_read(asked, times, latency):
    """No share of the dense file's latency is 1 or more, and a text stays under its key."""
    cost: Any = SimpleNamespace(macs=100, parameters=10)
    run: Any = SimpleNamespace(recipe=recipe({"latency": asked}))
    limits = {"latency": 0.6} if asked == 0.6 else {"latency_ms": 12.0}
    means: Any = SimpleNamespace(run=run, limits={**limits, "macs": 60.0}, here=SimpleNamespace(cost=cost))
    point = {"times": times, "levels": [], "amounts": {}, "error": 0.1}
    keys = _front_row(means, Trial(values={"way": "channels"}, losses=(0.1,)), point)["recipe"]
    assert keys.get("budget.latency") == latency
    load_recipe("digits", [f"{n}={v}" for n, v in {"budget.latency": asked, **keys}.items()])


@pytest.mark.parametrize(
    ("budget", "bits", "joint"),
    [
        ({"size_bytes": 0.5}, True, True),
        ({"size_bytes": 0.5, "latency": 0.5}, True, True),
        ({"size_bytes": 0.5, "bits": [8]}, False, False),
        ({"macs": 0.5}, False, False),
        ({"macs": 0.5, "together": True}, False, True),
        ({"latency": 0.5, "front": [2.0]}, False, True),
        ({"metric_loss": 1.0, "together": True}, False, False),
    ],
)  # fmt: skip
def test_which_budgets_weigh_several_means(budget, bits, joint):
    assert (by_bits(recipe(budget)), is_joint(recipe(budget))) == (bits, joint)


def test_a_recipe_without_the_keys_has_the_digest_that_it_had():
    plain = load_recipe("digits")
    assert "together" not in plain.to_yaml() and "front" not in plain.to_yaml()
    assert load_recipe("digits", ["budget.together=false", "budget.front=[]"]).digest == plain.digest
    assert load_recipe("digits", ["budget.front=[0.5, 2]"]).digest != plain.digest
