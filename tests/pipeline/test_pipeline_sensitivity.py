"""Sensitivities of a recipe: against networks hurt by hand, stopped and gone on with, and read by an allocation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from paredown.allocate import allocate
from paredown.errors import Interrupted, UsageError
from paredown.pipeline.compress import compress, task_of
from paredown.pipeline.fitted import widths_of
from paredown.pipeline.kept_sensitivity import about_units, kept_bits, kept_table
from paredown.pipeline.sensitivity import Sensed, sensitivity
from paredown.pipeline.ways import Here, Way, check_ways
from paredown.program import capture
from paredown.recipe import Recipe, load_recipe
from paredown.recipe_fields import Level

TASK = Path(__file__).with_name("sensitive_task.py")
ALONE = 2 * 4 + 3 * 5
"""Two spaces at four amounts, three layers at five widths."""
POINTS = ALONE + 4 + 5
"""And all of them at once, at each amount and each width."""


def recipe_of(**prune: Any) -> Recipe:
    return load_recipe({"schema": 1, "name": "own", "task": str(TASK), "prune": prune})


def sensed(out: Path, **options: Any) -> Sensed:
    return sensitivity(recipe_of(), out=out, quiet=True, **options)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "count"
    path.touch()
    monkeypatch.setenv("COUNT", str(path))
    return path


@pytest.fixture(scope="module")
def own() -> Any:
    return task_of(recipe_of())[0].model.__globals__


def rows(found: Sensed, kind: str) -> dict[str, dict[Any, Any]]:
    return {r["name"]: {p["kept"]: p for p in r["points"]} for r in found.document[kind]["rows"]}


def both(own: Any, net: Any) -> tuple[float, float]:
    """(loss of accuracy in points, mean KL in nats) of a network against the dense one, all data at once."""
    x, y = (torch.cat(parts) for parts in zip(own["data"](70, 2), own["data"](30, 3), strict=True))
    with torch.no_grad():
        dense, now = own["made"]()(x), net(x)
    kl = F.kl_div(F.log_softmax(now.double(), 1), F.softmax(dense.double(), 1), reduction="batchmean")
    return float(100 * (1 - (now.argmax(1) == y).double().mean())), float(kl)


def test_a_space_and_a_layer_cost_what_they_cost_by_hand(own: Any, tmp_path: Path) -> None:
    found = sensed(tmp_path / "out")
    assert found.measured_now == POINTS and found.document["distance"]["name"] == "kl"
    assert found.document["dense"] == 100.0 and found.document["num_samples"] == 100
    net = own["made"]()
    with torch.no_grad():
        net[2].weight[:, net[0].weight.abs().sum(1).argsort()[:12]] = 0
    point = rows(found, "units")["0.weight[0]"][12]
    assert (point["metric_loss"], point["distance"]) == pytest.approx(both(own, net), rel=1e-5)
    assert point["metric_loss"] > 3  # else nothing was damaged
    net = own["made"]()
    with torch.no_grad():
        weight = net[2].weight.double()
        scale = weight.abs().amax(1, keepdim=True) / 127
        net[2].weight.copy_((weight / scale).round().clamp(-127, 127) * scale)
    point = rows(found, "bits")["2.weight"][8]
    assert point["distance"] == pytest.approx(both(own, net)[1], rel=1e-3)
    assert 0 < 100 * point["distance"] < rows(found, "bits")["2.weight"][2]["distance"]


def test_what_all_cost_at_once_stands_beside_the_sum(own: Any, tmp_path: Path) -> None:
    found = sensed(tmp_path / "out").document
    assert [(t["kind"], t["at"], t["parts"]) for t in found["together"]] == [
        *(("units", at, 2) for at in (75.0, 50.0, 25.0, 10.0)),
        *(("bits", at, 3) for at in (8, 6, 4, 3, 2)),
    ]
    half = found["together"][1]
    alone = [p for r in found["units"]["rows"] for p in r["points"] if p["at"] == 50.0]
    assert half["distance"]["sum"] == pytest.approx(sum(p["distance"] for p in alone))
    net = own["made"]()
    with torch.no_grad():
        gone = {i: net[i].weight.abs().sum(1).argsort()[: len(net[i].weight) // 2] for i in (0, 2)}
        for i, lowest in gone.items():
            net[i + 2].weight[:, lowest] = 0
    wanted = both(own, net)
    assert (half["metric_loss"]["measured"], half["distance"]["measured"]) == pytest.approx(wanted, rel=1e-5)
    assert half["distance"]["times"] == pytest.approx(wanted[1] / half["distance"]["sum"], rel=1e-5)
    assert "spaces or layers together" not in str(found["not_tested"])
    assert "Sums as a forecast" in (tmp_path / "out" / "report.html").read_text()


def test_squared_errors_on_request(own: Any, tmp_path: Path) -> None:
    found = sensed(tmp_path / "out", distance="mse", bits=(), amounts=(0.5,))
    net, x = own["made"](), torch.cat([own["data"](70, 2)[0], own["data"](30, 3)[0]])
    with torch.no_grad():
        dense = net(x)
        net[4].weight[:, net[2].weight.abs().sum(1).argsort()[:8]] = 0
        wanted = float((net(x) - dense).square().sum() / dense.square().sum())
    assert rows(found, "units")["2.weight[0]"][8]["distance"] == pytest.approx(wanted, rel=1e-5)
    assert found.document["bits"] is None and any("bits" in t for t in found.document["not_tested"])


def test_stopped_it_goes_on_to_the_same_records(monkeypatch: Any, count: Path, tmp_path: Path) -> None:
    whole = sensed(tmp_path / "whole")
    evaluations = count.read_text().count("e")
    assert evaluations == POINTS + 1  # and the dense network
    count.write_text("")
    monkeypatch.setenv("STOP", "9")
    with pytest.raises(Interrupted, match="goes on from its journal"):
        sensed(tmp_path / "out")
    journal = tmp_path / "out" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 7
    with journal.open("a") as file:
        file.write('{"torn')  # as a kill leaves it
    monkeypatch.delenv("STOP")
    count.write_text("")
    again = sensed(tmp_path / "out")
    assert again.measured_now == POINTS - 7
    assert count.read_text().count("e") == POINTS - 7 + 1
    assert [dataclasses.asdict(r) for r in again.records] == [dataclasses.asdict(r) for r in whole.records]
    assert again.document == whole.document
    assert sensed(tmp_path / "out").measured_now == 0


def test_other_weights_are_measured_anew(monkeypatch: Any, tmp_path: Path) -> None:
    first = sensed(tmp_path / "out", bits=(4,), amounts=(0.5,))
    monkeypatch.setenv("NET", "1")
    second = sensed(tmp_path / "out", bits=(4,), amounts=(0.5,))
    assert first.measured_now == second.measured_now == 5 + 2
    assert first.document["units"]["rows"] != second.document["units"]["rows"]
    assert sensed(tmp_path / "out", bits=(4, 3), amounts=(0.5,)).measured_now == 3 + 1  # only what is new


def test_test_data_change_nothing(monkeypatch: Any, tmp_path: Path) -> None:
    first = sensed(tmp_path / "out", bits=(4,), amounts=(0.5,))
    monkeypatch.setenv("TESTED", "6")
    again = sensed(tmp_path / "out", bits=(4,), amounts=(0.5,))
    assert again.measured_now == 0 and again.document == first.document


def test_lines_of_the_journal_that_are_no_points_are_measured_again(tmp_path: Path) -> None:
    first = sensed(tmp_path / "out", bits=(4,), amounts=(0.5,))
    journal = tmp_path / "out" / "journal.jsonl"
    lines = journal.read_text().splitlines()
    lines[1] = lines[1][:40]  # torn
    lines[2] = '{"key": "of something else"}'
    journal.write_text("\n".join([*lines, "[]", ""]))
    again = sensed(tmp_path / "out", bits=(4,), amounts=(0.5,))
    assert again.measured_now == 2 and again.document == first.document


@pytest.mark.parametrize(
    ("prune", "options", "said"),
    [
        ({}, {"amounts": (0.5, 1.5)}, r"amounts must be fractions in \(0, 1\).*Got 1\.5"),
        ({}, {"amounts": (float("nan"),)}, "amounts must be fractions"),
        ({}, {"bits": (8, 9)}, "bits must be integers from 1 to 8. Got 9"),
        ({}, {"amounts": (), "bits": ()}, "amounts or bits. Got neither"),
        ({"criterion": "tayler"}, {}, "Did you mean 'taylor'"),
        ({"criterion": "l1", "criterion_options": {"batchez": 3}}, {}, "batchez"),
    ],
)
def test_what_is_refused_is_refused_before_a_base_is_trained(
    prune: Any, options: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        sensitivity(recipe_of(**prune), out=tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_another_recipe_is_refused_in_the_same_folder(tmp_path: Path) -> None:
    sensed(tmp_path / "out", bits=(), amounts=(0.5,))
    with pytest.raises(UsageError, match="criterion"):
        sensitivity(recipe_of(criterion="l2"), out=tmp_path / "out", quiet=True)


def test_another_curve_leaves_a_measurement_as_it_is(tmp_path: Path) -> None:
    def measured(amounts: list[float]) -> Sensed:
        asked = {"schema": 1, "name": "own", "task": str(TASK), "curve": {"amounts": amounts}}
        recipe = load_recipe(asked)
        assert recipe.digest  # as one who compares recipes has asked for it
        return sensitivity(recipe, out=tmp_path / "out", quiet=True)

    first, again = measured([0.5]), measured([0.7, 0.3])
    assert (first.measured_now, again.measured_now) == (POINTS, 0)
    assert first.document == again.document == sensed(tmp_path / "without").document


def test_the_order_and_what_it_is_worth(tmp_path: Path) -> None:
    found = sensed(tmp_path / "out").document
    bits = found["bits"]
    assert set(bits["order"]) == {"0.weight", "2.weight", "4.weight"}
    means = {
        r["name"]: r[f"mean_{'metric_loss' if bits['ordered_by'] == 'metric' else 'distance'}"] for r in bits["rows"]
    }
    assert [means[n] for n in bits["order"]] == sorted(means.values())
    stable = bits["stability"]["distance"]
    assert -1 <= stable["low"] <= stable["tau"] <= stable["high"] <= 1 and stable["groups"] == 64
    assert found["units"]["stability"]["distance"] is None  # two spaces have no order to speak of
    assert bits["order"][0] in found["verdict"] and "τ" in found["verdict"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert found["units"]["sentence"] in page.replace("&#39;", "'") and "not tested" in page
    lines = (tmp_path / "out" / "sensitivity.csv").read_text().splitlines()
    assert len(lines) == ALONE + 1
    assert json.loads((tmp_path / "out" / "sensitivity.json").read_text()) == json.loads(json.dumps(found))


def test_one_number_for_all_samples_has_no_stability_by_the_metric(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("PLAIN", "1")
    found = sensed(tmp_path / "out", amounts=()).document
    assert found["bits"]["stability"]["metric"] is None and found["bits"]["stability"]["distance"] is not None
    assert all(p["metric_loss"] is not None for r in found["bits"]["rows"] for p in r["points"])


def test_without_held_out_data_there_are_distances_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TASK.read_text().replace("def choose_batches", "def not_choose_batches")
    (tmp_path / "task.py").write_text(text)
    recipe = load_recipe({"schema": 1, "task": str(tmp_path / "task.py")})
    found = sensitivity(recipe, out=tmp_path / "out", amounts=(0.5,), bits=(4,)).document
    said = capsys.readouterr().err
    assert "measure on 64 calibration samples" in said and "held-out" not in said
    assert found["metric"] is None and found["data"] == "calibration_batches" and found["num_samples"] == 64
    assert all(p["metric_loss"] is None and p["distance"] > 0 for r in found["units"]["rows"] for p in r["points"])
    assert found["not_tested"][0].startswith("the metric")


def test_masks_are_measured_per_weight(tmp_path: Path) -> None:
    recipe = recipe_of(granularity="element", levels=[{"density": 0.5}])
    found = sensitivity(recipe, out=tmp_path / "out", quiet=True, amounts=(0.5,), bits=())
    assert {n: [*p] for n, p in rows(found, "units").items()} == {"0.weight": [96], "2.weight": [192], "4.weight": [24]}


def test_an_amount_said_twice_and_one_that_the_granularity_fixes_are_one_amount(tmp_path: Path) -> None:
    """A row without a point for every amount is continued along straight lines: here none is missing."""
    once = sensed(tmp_path / "once", amounts=(0.5,), bits=()).document["units"]
    twice = sensed(tmp_path / "twice", amounts=(0.5, 0.5), bits=()).document["units"]
    assert twice == once and "straight lines" not in once["sentence"]
    fixed = sensitivity(recipe_of(granularity="2:4"), out=tmp_path / "fixed", quiet=True, bits=()).document["units"]
    assert {p["at"] for r in fixed["rows"] for p in r["points"]} == {50.0}
    for row in fixed["rows"]:
        assert not row["continued"] and row["mean_distance"] == row["points"][0]["distance"]
    assert "straight lines" not in fixed["sentence"]


# ------------------------------------------------------------------------------------------------ read by an allocation


def way_of(recipe: Recipe, tmp_path: Path, level: Level, number: int = 1) -> tuple[Way, Here]:
    task = task_of(recipe)[0]
    way = Way(recipe=recipe, task=task, level=level, number=number, weights_given=True, steps=tmp_path / "steps")
    return way, Here.of(capture(task.model(), task.inputs()), None)


def test_an_allocation_reads_the_folder_and_measures_nothing(count: Path, tmp_path: Path) -> None:
    measured = sensed(tmp_path / "out")
    recipe = recipe_of(allocation="knapsack", sensitivity=str(tmp_path / "out"), align=1)
    way, here = way_of(recipe, tmp_path, Level(macs=0.6))
    count.write_text("")
    plan = way.plan(here)
    assert count.read_text() == "" and not (tmp_path / "steps").exists()
    table = {n: {k / p["of"]: p["distance"] for k, p in ps.items()} for n, ps in rows(measured, "units").items()}
    by_hand = allocate(
        here.coupling, way.scores(here), here.cost, way.budget(), target=recipe.target, allocation="knapsack",
        sensitivity=table, align=1,
    )  # fmt: skip
    assert {k: dict(v) for k, v in plan.keep.items()} == {k: dict(v) for k, v in by_hand.keep.items()}
    plain, _ = way_of(recipe_of(allocation="knapsack", align=1), tmp_path, Level(macs=0.6))
    plain.plan(here)
    assert count.read_text() == "c" and (tmp_path / "steps" / "level-1-sensitivity.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"criterion": "l2"}, "criterion"),
        ({"reconstruct": True}, "repair"),
        ({"granularity": "element"}, "granularity"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    sensed(tmp_path / "out", amounts=(0.5,), bits=())
    masked = "granularity" in change
    recipe = recipe_of(allocation="knapsack", sensitivity=str(tmp_path / "out"), **change)
    way, here = way_of(recipe, tmp_path, Level(density=0.5) if masked else Level(macs=0.6))
    with pytest.raises(UsageError, match=f"must fit this run in {said}"):
        way.plan(here)
    later, _ = way_of(recipe, tmp_path, Level(density=0.5) if masked else Level(macs=0.6), number=2)
    assert later.plan(here).made_by["allocation"] == "knapsack"  # another network: measured there


def test_scores_that_differ_by_rounding_alone_leave_the_same_units(tmp_path: Path) -> None:
    """With other threads the scores of a criterion that reads data differ in their last bits."""
    sensed(tmp_path / "out", amounts=(0.5,), bits=())
    way, here = way_of(recipe_of(), tmp_path, Level(macs=0.6))
    scores = way.scores(here)
    name, own = next(iter(scores.by_space.items()))
    near, other = own * (1 + 1e-12), own.copy()
    other[[0, 1]] = other[[1, 0]]
    for changed, fits in ((near, True), (other, False)):
        assert not np.array_equal(changed, own)
        these = dataclasses.replace(scores, by_space={**scores.by_space, name: changed})
        about = about_units(here.program, these, repair=False)
        if fits:
            assert kept_table(tmp_path / "out", about, these).of[name] == len(own)
        else:
            with pytest.raises(UsageError, match=r"the scores of its units.*its threads too"):
                kept_table(tmp_path / "out", about, these)


def test_a_run_does_not_go_on_with_another_measurement_under_the_same_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    sensed(tmp_path / "measured", bits=(), amounts=(0.5,))
    recipe = load_recipe(
        {
            "schema": 1, "task": str(TASK), "dense_twin": {"enabled": False}, "recover": {"epochs": 1},
            "quantize": {"scheme": "int8-dynamic"}, "measure": {"runs": 5, "seconds": 0.05},
            "prune": {
                "allocation": "knapsack", "align": 1, "levels": [{"macs": 0.6}], "sensitivity": str(tmp_path / "measured"),
            },
        }
    )  # fmt: skip
    first = compress(recipe, out=tmp_path / "run", quiet=True)
    again = compress(recipe, out=tmp_path / "run", quiet=True)
    assert [r.to_json() for r in again.records] == [r.to_json() for r in first.records]
    sensed(tmp_path / "measured", bits=(), amounts=(0.75, 0.5))
    with pytest.raises(UsageError, match=r"(?s)prune.sensitivity: \S*measured holds another measurement.*--overwrite"):
        compress(recipe, out=tmp_path / "run", quiet=True)
    compress(recipe, out=tmp_path / "run", quiet=True, overwrite=True)
    assert compress(recipe, out=tmp_path / "run", quiet=True).records  # what it is now is on record


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    way, here = way_of(recipe_of(allocation="greedy", sensitivity=str(tmp_path)), tmp_path, Level(macs=0.6))
    with pytest.raises(UsageError, match="that `paredown sensitivity` finished"):
        way.plan(here)
    sensed(tmp_path / "bits", amounts=())
    way, here = way_of(recipe_of(allocation="greedy", sensitivity=str(tmp_path / "bits")), tmp_path, Level(macs=0.6))
    with pytest.raises(UsageError, match="bits alone"):
        way.plan(here)


@pytest.mark.parametrize("text", [None, "", "no record\n", '{"cell": 1}\n', "[]\n"])
def test_a_folder_of_something_else_is_refused_before_any_work(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "records.jsonl").write_text(text)
    recipe = recipe_of(allocation="greedy", sensitivity=str(tmp_path), levels=[{"macs": 0.6}])
    with pytest.raises(UsageError, match="that `paredown sensitivity` finished"):
        check_ways(recipe, task_of(recipe)[0])


def test_a_recipe_without_the_key_has_the_digest_that_it_had(tmp_path: Path) -> None:
    assert "sensitivity" not in recipe_of().to_yaml().replace("allocation: sensitivity", "")
    (tmp_path / "r.yaml").write_text(f"schema: 1\ntask: {TASK}\nprune: {{sensitivity: here/there}}\n")
    assert load_recipe(tmp_path / "r.yaml").prune.sensitivity == str(tmp_path / "here" / "there")
    changed = load_recipe(tmp_path / "r.yaml", ["prune.sensitivity=other"])
    assert changed.prune.sensitivity == str(Path.cwd() / "other") and changed.digest != recipe_of().digest
    assert load_recipe(changed.model_dump(mode="json", by_alias=True)).digest == changed.digest


def test_a_metric_that_fails_on_damage_leaves_a_point_without_a_number(
    monkeypatch: Any, count: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAIL", "3")
    found = sensed(tmp_path / "out", bits=()).document
    lost = [p for r in found["units"]["rows"] for p in r["points"] if p["distance"] is None]
    assert [(p["why"], p["badge"]) for p in lost] == [("ValueError: no boxes left", "not tested")]
    assert found["units"]["order"] == ["2.weight[0]"] and "1 point without a number" in str(found["not_tested"])
    count.write_text("e" * 9)
    again = sensed(tmp_path / "out", bits=())
    assert again.measured_now == 1  # what failed is tried again
    assert len(again.document["units"]["order"]) == 2


def test_where_the_metric_is_no_number_the_distance_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A correlation of constant answers is NaN: how far they moved is known, and allocations read that alone."""
    wanted = sensed(tmp_path / "wanted", bits=()).document["units"]["rows"]
    cut = float(np.mean([p["metric_loss"] for r in wanted for p in r["points"]]))
    monkeypatch.setenv("BLANK", str(100 - cut))
    found = sensed(tmp_path / "out", bits=()).document
    pairs = [
        (p, q)
        for r, s in zip(wanted, found["units"]["rows"], strict=True)
        for p, q in zip(r["points"], s["points"], strict=True)
    ]
    assert [q["distance"] for _, q in pairs] == [p["distance"] for p, _ in pairs]
    blank = [p["metric_loss"] > cut for p, _ in pairs]
    assert [q["metric_loss"] is None for _, q in pairs] == blank and 0 < sum(blank) < len(blank)
    assert {q["why"][:42] for _, q in pairs if q["metric_loss"] is None} == {
        "RejectedError: the metric 'accuracy' must "
    }
    assert found["units"]["ordered_by"] == "distance" and len(found["units"]["order"]) == 2
    assert f"{sum(blank)} points without a metric (see the tables)" in found["not_tested"]
    assert "must be finite" in (tmp_path / "out" / "report.html").read_text()
    monkeypatch.delenv("BLANK")
    again = sensed(tmp_path / "out", bits=())
    assert again.measured_now >= sum(blank)  # tried again
    assert [r["points"] for r in again.document["units"]["rows"]] == [r["points"] for r in wanted]


def test_bits_that_were_measured_are_reused(own: Any, tmp_path: Path) -> None:
    measured = sensed(tmp_path / "out", distance="mse", amounts=())
    program = capture(own["made"](), own["inputs"]())
    known, unit = kept_bits(tmp_path / "out", program.source_digest) or ({}, "")
    table = rows(measured, "bits")
    assert unit == "relative squared error"
    assert known == {n: {b: p["distance"] for b, p in points.items()} for n, points in table.items()}
    options = {
        "target": "onnxruntime-x86",
        "calibrate": [own["data"](64, 4)[0]],
        "scheme": "int8",
        "observer": "minmax",
    }
    groups = widths_of(program, options, ["gptq"], (8, 4, 2), known)
    anew = widths_of(program, options, ["gptq"], (8, 4, 2))
    assert {(w.layer, w.bits): w.error for g in groups for w in g} == {
        (n, b): table[n][b]["distance"] for n in table for b in (8, 4, 2)
    }
    assert [(w.layer, w.bits, w.size_bytes, w.bops) for g in groups for w in g] == [
        (w.layer, w.bits, w.size_bytes, w.bops) for g in anew for w in g
    ]
    five = widths_of(program, options, ["gptq"], (5,), known)  # a width that nobody measured: all are measured here
    assert all(0 < w.error < 1 for g in five for w in g)
    assert kept_bits(tmp_path / "out", capture(own["made"](3), own["inputs"]()).source_digest) is None
