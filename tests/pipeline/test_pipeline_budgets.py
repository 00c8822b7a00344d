"""Budgets through the whole job: a file that holds them, or exit 4 with the nearest plan; said in records and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from paredown.cli.main import explained
from paredown.errors import InfeasibleError, UsageError
from paredown.pipeline import compress
from paredown.pipeline.budgets import check_budget
from paredown.pipeline.fitted import unpacking_bytes
from paredown.quantize.packed import packed_length
from paredown.recipe import parse_recipe
from paredown.records import Measured, read
from paredown.train import Metric

TASK = Path(__file__).with_name("small_task.py")


def recipe(budget: dict[str, Any], **more: Any):
    return parse_recipe(
        {
            "schema": 1,
            "task": str(TASK),
            "threads": 1,
            "recover": {"epochs": 1},
            "dense_twin": {"enabled": False},
            "measure": {"runs": 6, "seconds": 0.2},
            "budget": budget,
            **more,
        }
    )


def verdict(folder: Path) -> dict[str, Any]:
    (found,) = [r for r in read(folder / "records.jsonl") if r.cell["stage"] == "verdict"]
    return dict(found.details)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAREDOWN_LATENCY", str(tmp_path / "latency"))


def test_bytes_are_met_by_bits_and_the_file_stays_within(tmp_path):
    limit = 6000
    found = compress(recipe({"size_bytes": limit, "trials": 0}), out=tmp_path / "run", quiet=True)
    size = (tmp_path / "run" / "int8.onnx").stat().st_size
    assert size <= limit
    said = verdict(tmp_path / "run")
    (bound,) = said["bounds"]
    assert (bound["what"], bound["value"], bound["bound"], bound["met"]) == ("size_bytes", size, limit, True)
    assert found.recommended == "int8"
    assert said["otherwise"] != "dense"  # it does not keep the budget
    assert said["search"]["trials"][0]["way"] == "none"
    (trial,) = said["search"]["trials"]
    assert min(trial["bits"].values()) < 8
    assert trial["recipe"]["prune.levels"] == []
    counts = [(list(trial["bits"].values()).count(b), b) for b in sorted(set(trial["bits"].values()), reverse=True)]
    assert trial["recipe"]["bits"] == ", ".join(f"{n} × {b} bits" for n, b in counts)
    assert "How the budget was met" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_bound_that_was_a_share_keeps_it() -> None:
    from types import SimpleNamespace

    from paredown.pipeline.verdict import bounds

    numbers = ("metric", "bytes", "latency_ms", "baseline_latency_ms", "parameters", "macs", "peak_memory_bytes")
    stages = {
        name: SimpleNamespace(measured={k: Measured(value=v, unit="") for k in numbers})
        for name, v in (("dense", 10.0), ("int8", 4.0))
    }
    asked = recipe({"latency": 0.5, "size_bytes": 0.5, "macs": 7})
    run: Any = SimpleNamespace(recipe=asked, task=SimpleNamespace(metric=Metric(name="m", unit="", goal="max")))
    found = {b["what"]: b for b in bounds(run, stages)}  # type: ignore[arg-type]
    assert (found["latency"]["share"], found["latency"]["bound"]) == (0.5, 2.0)  # of the dense file in the same turns
    assert (found["size_bytes"]["share"], found["size_bytes"]["bound"]) == (0.5, 5.0)
    assert "share" not in found["macs"] and found["macs"]["bound"] == 7


def test_fault_72_a_latency_that_is_met_already_is_said(tmp_path):
    compress(recipe({"latency": "1000 ms"}), out=tmp_path / "run", quiet=True)
    said = verdict(tmp_path / "run")
    assert said["search"]["already_met"] is True
    assert said["target_met"] is True
    assert said["bounds"][0]["unit"] == "ms"
    assert not said["search"]["shares"] and not (tmp_path / "latency").exists()  # no layer was timed for it
    (held,) = said["search"]["rounds"]
    assert held["holds"] and 0 < held["measured"]["latency_ms"] < 1000
    assert "The budget was met already" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_fault_71_an_impossible_latency_is_exit_4_with_the_nearest_plan(tmp_path):
    asked = recipe({"latency": 0.001, "rounds": 1, "allocation": "uniform"})
    with pytest.raises(InfeasibleError, match=r"latency must be at most 0\.001 × dense") as caught:
        compress(asked, out=tmp_path / "run", quiet=True)
    assert caught.value.exit_code == 4
    assert caught.value.nearest.keep


@pytest.mark.parametrize(
    "budget",
    [
        {"latency": 0.01, "rounds": 1, "allocation": "uniform"},  # no file holds it
        {"macs": 0.1, "rounds": 0},  # nothing is searched: the verdict misses
    ],
)
def test_what_misses_after_levels_is_exit_4_with_the_nearest_plan_too(tmp_path, budget):
    asked = recipe(budget, prune={"levels": [{"macs": 0.7}]})
    with pytest.raises(InfeasibleError, match="must be at most") as caught:
        compress(asked, out=tmp_path / "run", quiet=True)
    records = {r.cell["stage"]: r for r in read(tmp_path / "run" / "records.jsonl")}
    assert "verdict" in records
    dense, level = (int(records[n].measured["macs"].value) for n in ("dense", "level-1"))
    reached = caught.value.nearest.made_by["reached"]["macs"]
    assert reached < level if "latency" in budget else reached == level
    said, code = explained(caught.value)
    assert code == 4
    assert "\nNearest plan: parameters" in said
    assert f"macs {reached:,} of {dense:,}" in said  # not of what the levels left


TWIN = """


def twin(parameters, *, extra_epochs=0):
    from pathlib import Path

    Path(__file__).with_name("extra").write_text(str(extra_epochs))
    torch.manual_seed(1)
    return Small(8).eval()
"""


@pytest.mark.parametrize(
    ("levels", "budget", "epochs"),
    [
        ([], {"macs": 0.5}, 2),
        ([{"macs": 0.7, "epochs": 1}], {"macs": 0.35}, 3),
        ([{"macs": 0.7, "epochs": 1}], {"macs": 0.9}, 1),  # the level is enough, nothing is searched
        ([], {"macs": 2 * 10**9}, None),  # nothing leaves
    ],
)
def test_the_dense_twin_trains_as_long_as_levels_and_search_together(tmp_path, levels, budget, epochs):
    task = tmp_path / "with_twin.py"
    task.write_text(TASK.read_text(encoding="utf-8") + TWIN, encoding="utf-8")
    asked = recipe(
        {**budget, "allocation": "uniform"}, task=str(task), prune={"levels": levels},
        recover={"epochs": 2}, dense_twin={"enabled": True},
    )  # fmt: skip
    compress(asked, out=tmp_path / "run", quiet=True)
    stages = {r.cell["stage"] for r in read(tmp_path / "run" / "records.jsonl")}
    assert ("twin-int8" in stages) is (epochs is not None)
    if epochs is not None:
        assert (tmp_path / "extra").read_text() == str(epochs)


def test_bytes_that_no_file_reaches_come_with_the_smallest_that_there_is(tmp_path):
    asked = recipe({"size_bytes": 100, "trials": 1, "low_rank": False})
    with pytest.raises(
        InfeasibleError, match=r"size_bytes must be reachable: 100\. Got some [\d,]+ B at the least \(.*, estimated\)"
    ) as caught:
        compress(asked, out=tmp_path / "run", quiet=True)
    assert "Error" not in str(caught.value)


def test_multiply_accumulates_are_searched_without_files(tmp_path):
    compress(recipe({"macs": 0.5, "allocation": "uniform"}), out=tmp_path / "run", quiet=True)
    records = {r.cell["stage"]: r for r in read(tmp_path / "run" / "records.jsonl")}
    assert records["level-1"].measured["macs"].value <= 0.5 * records["dense"].measured["macs"].value
    assert verdict(tmp_path / "run")["bounds"][0]["met"] is True


@pytest.mark.parametrize(
    ("budget", "more", "says"),
    [
        ({"channels": 0.5}, {"prune": {"levels": [{"macs": 0.5}]}}, "must come without prune.levels"),
        ({"latency": 0.5}, {"prune": {"granularity": "element"}}, "masks change neither bytes nor latency"),
        ({"latency": 0.5}, {"prune": {"criterion": "gates"}}, "a criterion of the table"),
        ({"latency": 0.5}, {"target": "litert"}, "run elsewhere"),
        ({"latency": 0.5}, {"target": "litert", "prune": {"levels": [{"macs": 0.5}]}}, "set budget.rounds to 0"),
        ({"metric_loss": 1.0, "front": [0.5]}, {}, "budget.front must come with an amount"),
        ({"channels": 0.5, "together": True}, {}, "budget.together must come with an amount"),
        ({"macs": 0.5, "rounds": 0, "together": True}, {}, "Got rounds 0"),
        ({"size_bytes": 0.5, "metric_loss": 1.0}, {"quantize": {"spare": True}}, "Set budget.bits to"),
    ],
)
def test_what_no_search_can_meet_is_refused_before_any_work(budget, more, says):
    with pytest.raises(UsageError, match=says):
        check_budget(recipe(budget, **more))


def test_the_last_of_many_levels_that_keeps_the_bounds_stands_in() -> None:
    """By number: level-10 comes after level-9."""
    from types import SimpleNamespace

    from paredown.pipeline.verdict import fallback

    names = ["dense", *(f"level-{n}" for n in range(1, 12)), "int8"]
    stages: Any = {
        n: SimpleNamespace(
            measured={k: Measured(value=100.0 - at, unit="") for k in ("metric", "bytes", "parameters", "macs")}
        )
        for at, n in enumerate(names)
    }
    asked = recipe({"metric_loss": 10.5, "size_bytes": 95})
    run: Any = SimpleNamespace(recipe=asked, task=SimpleNamespace(metric=Metric(name="m", unit="", goal="max")))
    assert fallback(run, stages, met=False) == "level-10"


def test_a_missed_bound_is_told_in_figures_that_people_write() -> None:
    from paredown.pipeline.verdict import gates

    bound = {"what": "size_bytes", "bound": 30 * 2**20, "value": 31_500_000.0, "unit": "B", "met": False}
    with pytest.raises(InfeasibleError, match=r"must be at most 31,457,280 B\. Got 31,500,000 B on") as caught:
        gates((), {"bounds": [bound]}, advice="Prune.")
    assert str(caught.value).endswith("keeps it. Prune.")


@pytest.mark.parametrize(
    ("scheme", "budget", "leaves"),
    [
        ("fp16", {"size_bytes": 0.4}, True),
        ("fp16", {"size_bytes": 0.6}, False),
        ("w4", {"size_bytes": 0.5}, True),  # its convolutions stay in float
        ("int8", {"size_bytes": 0.4}, False),
        ("int8", {"size_bytes": 0.3}, True),  # codes alone would be a quarter: the file of so small a network is more
        ("int8", {"macs": 1e-6}, True),
        ("int8", {"peak_ram_bytes": 10}, None),
    ],
)
def test_a_dry_run_foresees_the_bytes_of_the_scheme(scheme, budget, leaves, task):
    from paredown.pipeline.foreseen import foreseen_budget
    from paredown.pipeline.ways import Here, Way
    from paredown.program import capture
    from paredown.recipe_fields import Level

    asked = recipe({**budget, "allocation": "uniform"}, quantize={"scheme": scheme})
    here = Here.of(capture(task.model().eval(), task.inputs()), None)
    way = Way(recipe=asked, task=task, level=Level(parameters=0.5), number=1, weights_given=True)
    found = foreseen_budget(asked, way, here)
    assert found is not None and (found.plan is not None) is bool(leaves)
    assert bool(found.amounts) is (leaves is not None)
    assert ("peak_ram_bytes" in found.note) is (leaves is None)


def test_a_dry_run_foresees_what_the_file_will_weigh(task, tmp_path):
    """Codes alone were foreseen, and a budget that the real file missed by half was called met."""
    from paredown.export import export
    from paredown.pipeline.foreseen import foreseen_budget
    from paredown.pipeline.ways import Here, Way
    from paredown.program import capture
    from paredown.prune import prune
    from paredown.quantize import quantize
    from paredown.recipe_fields import Level

    program = capture(task.model().eval(), task.inputs())
    whole = export(quantize(program, calibrate=task.calibration_batches), tmp_path / "whole.onnx").size_bytes
    for bits, limit in (((8,), whole + 10), ((8,), round(0.8 * whole))):
        asked = recipe({"size_bytes": limit, "bits": [*bits], "allocation": "uniform", "low_rank": False})
        here = Here.of(program, None)
        way = Way(recipe=asked, task=task, level=Level(parameters=0.5), number=1, weights_given=True)
        found = foreseen_budget(asked, way, here)
        assert found is not None
        _, before, after = found.amounts["size_bytes"]
        assert before == pytest.approx(whole, rel=0.02) and (found.plan is None) is (limit > whole)
        if found.plan is not None:
            left = prune(program, found.plan)
            made = export(quantize(left, calibrate=task.calibration_batches), tmp_path / "left.onnx").size_bytes
            assert after <= limit and made == pytest.approx(after, rel=0.1)


def test_a_search_can_be_turned_off():
    check_budget(recipe({"latency": 0.5, "rounds": 0}, target="litert", prune={"levels": [{"macs": 0.5}]}))
    masks = {"granularity": "element", "levels": [{"density": 0.5}]}
    check_budget(recipe({"latency": 0.5}, target="litert", prune=masks))  # nothing would be searched
    check_budget(recipe({"latency": 0.5, "rounds": 0}, prune={"granularity": "element"}))


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_what_unpacking_takes_is_about_what_files_say(bits, tmp_path):
    """One layer with 8 bits and with fewer: the files differ by the codes and by what unpacks them."""
    from torch import nn

    from paredown.export import export
    from paredown.program import capture
    from paredown.quantize import quantize

    torch.manual_seed(0)
    program, x = capture(nn.Sequential(nn.Linear(256, 64), nn.ReLU()), torch.randn(2, 256)), torch.randn(16, 256)
    sizes = [
        export(quantize(program, calibrate=[x], bits={"0.weight": b}), tmp_path / f"{b}.onnx").size_bytes
        for b in (8, bits)
    ]
    codes = [packed_length(256 * 64, b) for b in (8, bits)]
    extra = sizes[1] - sizes[0] - (codes[1] - codes[0])
    assert 0 < extra < 3 * unpacking_bytes(bits) + 2500  # the tables are shared by all weights of one width
