"""A whole curve on a small network: every kind of trial, its controls trained as long, records that a kill does not change."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

pytest.importorskip("onnxruntime")

import paredown as pare
from paredown.errors import Interrupted, MissingError, RejectedError, UsageError
from paredown.measure import artifact_at
from paredown.models import load_task_module
from paredown.pipeline.compress import compress, task_of, versions
from paredown.pipeline.curves import Curved, _counting, _say_what_is_there, check_cells, curve, machine_for
from paredown.pipeline.folder import RunFolder, opened
from paredown.pipeline.run import Run
from paredown.pipeline.stages import quantized_of
from paredown.pipeline.sweep_display import sweep_display
from paredown.pipeline.trial import Asked, _in_codes, _timed, _trained_anew
from paredown.plan import Rank
from paredown.program import capture
from paredown.recipe import Recipe, parse_recipe
from paredown.recipe_fields import Recover
from paredown.records import Record, read
from paredown.report import write_report
from paredown.sweep import grid
from paredown.sweep.trials import Event

TASK = Path(__file__).with_name("curve_task.py")


def recipe(task: Path = TASK, **curve_keys: Any) -> Recipe:
    keys = {"amounts": [0.5], "seeds": [0], "limit": 5.0, **curve_keys}
    return parse_recipe(
        {
            "schema": 1, "name": "moons", "task": str(task), "prune": {"align": 4}, "recover": {"epochs": 2, "lr": 0.02},
            "curve": keys,
        }
    )  # fmt: skip


def untimed(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(r.to_json()) for r in read(out / "records.jsonl")]
    for record in records:
        for value in record["measured"].values():
            if value["timing"]:
                value.clear()
    return records


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Curved:
    out = tmp_path_factory.mktemp("curve") / "run"
    return curve(recipe(schedules=["one-shot", "multi-level", "from-scratch"]), out=out, quiet=True, processes=1)


def by_kind(found: Curved) -> dict[tuple[str, str], Record]:
    return {(r.cell["kind"], r.cell["schedule"]): r for r in found.records[1:]}


def test_every_kind_of_trial_has_a_record_of_its_own_file(done: Curved) -> None:
    found = by_kind(done)
    assert {kind for kind, _ in found} == {"base", "pruned", "from-scratch", "scratch", "thin", "random"}
    assert len(found) == len(done.records) - 1 == 7
    for record in found.values():
        assert record.measured["metric"].badge == record.measured["held_out"].badge == "measured"
        assert record.measured["bytes"].value
        assert record.details["check"]["max_error"] < 1e-4
        if record.cell["kind"] not in ("base",):
            assert record.details["proof"]["moved"] > 0
    dense = found[("base", "")]
    assert dense.measured["metric"].value > 80
    half = found[("pruned", "one-shot")]
    wanted = 8 * 16 + 16 + 16 * 16 + 16 + 16 * 2 + 2
    assert half.measured["parameters"].value == half.measured["nonzero_parameters"].value == wanted
    assert dense.measured["parameters"].value == 8 * 32 + 32 + 32 * 32 + 32 + 32 * 2 + 2


def test_beside_a_base_that_came_trained_controls_train_by_the_tasks_own_scratch_and_are_not_comparable(
    tmp_path: Path,
) -> None:
    weights = tmp_path / "moons.safetensors"
    save_file(load_task_module(str(TASK)).model().state_dict(), weights)
    asked = recipe(controls={"epochs": 3, "kinds": ["scratch"]})
    asked = asked.model_copy(update={"weights": str(weights)})
    found = by_kind(curve(asked, out=tmp_path / "run", quiet=True, processes=1))
    assert set(found) == {("base", ""), ("pruned", "one-shot"), ("scratch", "one-shot")}
    control = found[("scratch", "one-shot")]
    assert control.details["not_comparable"] == "the base came trained, and its training cannot be repeated here"
    assert list(control.details["training"].values()) == [[3, 8]]


def test_controls_are_trained_as_long_as_base_and_recovery_together(done: Curved) -> None:
    found = by_kind(done)
    steps = {key: sum(e * s for e, s in r.details["training"].values()) for key, r in found.items()}
    assert steps[("base", "")] == 6 * 8
    assert steps[("pruned", "one-shot")] == steps[("pruned", "multi-level")] == 2 * 8
    assert steps[("scratch", "one-shot")] == steps[("from-scratch", "from-scratch")] == 8 * 8
    assert found[("scratch", "one-shot")].details["not_comparable"] == ""
    # Pruned alike everywhere to multiples of 4, the thinner network has that shape: it is trained once.
    assert found[("thin", "one-shot")].details["same_as"] == "scratch"
    assert found[("thin", "one-shot")].measured["macs"] == found[("scratch", "one-shot")].measured["macs"]
    for c in done.document["comparisons"]:
        assert c["comparable"] == (c["control"] != "random" or c["line"] == "l1 one-shot")


def test_a_control_that_was_trained_as_the_base_alone_is_not_comparable(tmp_path: Path) -> None:
    """The recovery is a loop of the user's own, or scratch() cannot train longer: steps that nobody counts would pass for equal."""
    task = task_of(recipe())[0]
    program = capture(task.model(), task.inputs())
    coupling = pare.couple(program)
    plan = pare.allocate(coupling, pare.score(program, coupling), pare.examine(program), pare.Budget(macs=0.5))
    small = pare.prune(program, plan)

    def untold(model: Any) -> Any:
        return model

    for own, why in (
        (dataclasses.replace(task, train=untold), "the recovery is the task's own train(), which tells no length"),
        (dataclasses.replace(task, scratch=untold), "the task's scratch() takes no extra_epochs"),
        (task, ""),
    ):
        run = Run(
            recipe=recipe(), task=dataclasses.replace(own, base=task.base), folder=RunFolder(path=tmp_path),
            say=lambda _: None, on_training=lambda *_: None, weights_given=True, model=task.model, environment={},
        )  # fmt: skip
        cell = Asked(run=run, kind="scratch", epochs=None, latency=False, quantized=False, needs={})
        found = _trained_anew(cell, small, 2).details["not_comparable"]
        assert found == (f"{why}: it was trained as the base alone" if why else "")


def test_the_document_the_journal_and_the_page_say_the_same(done: Curved) -> None:
    out = done.out
    assert json.loads((out / "curve.json").read_text()) == json.loads(json.dumps(done.document))
    assert done.document["trials"] == {"cells": 7, "done": 7, "failed": 0}
    assert [line["name"] for line in done.document["lines"]][:3] == ["l1 one-shot", "l1 multi-level", "l1 from-scratch"]
    assert done.document["sweet_spot"]["rule"] == "limit"
    assert "one seed" in done.document["sweet_spot"]["sentence"]
    page = (out / "report.html").read_bytes()
    assert write_report(out).read_bytes() == page
    assert not list(out.rglob("*.tmp"))
    for record in done.records[1:]:
        if record.cell["kind"] == "pruned":
            place = done.records[0].details["recipes"][record.cell["digest"]]
            assert (out / place).is_file() and (out / place).with_name("model.onnx").is_file()


def test_the_same_recipe_runs_nothing_again_and_another_is_refused(done: Curved) -> None:
    before = untimed(done.out)
    stamp = (done.out / "journal.jsonl").stat().st_mtime_ns
    again = curve(recipe(schedules=["one-shot", "multi-level", "from-scratch"]), out=done.out, quiet=True)
    assert untimed(done.out) == before
    assert (done.out / "journal.jsonl").stat().st_mtime_ns == stamp
    assert again.document == done.document
    with pytest.raises(UsageError, match=r"curve\.amounts: \[0\.5\] → \[0\.75\]"):
        curve(recipe(amounts=[0.75], schedules=["one-shot", "multi-level", "from-scratch"]), out=done.out, quiet=True)


def test_an_interruption_among_the_controls_counts_all_trials(done: Curved) -> None:
    """It counted those of the last stretch alone: "6 of 10" beside a display that had told 12 of 16."""
    cells = grid(recipe(schedules=["one-shot", "multi-level", "from-scratch"]))
    more = dataclasses.replace(cells[-1], digest="0" * 64)
    with (
        pytest.raises(Interrupted, match=r"^7 of 8 trials are done or marked"),
        _counting((*cells, more), done.out, versions(), retry=False),
    ):
        raise Interrupted("1 of 2 trials are done or marked")


def test_a_sweep_may_grow_and_keeps_what_it_has(tmp_path: Path) -> None:
    """More amounts, another limit: nothing is trained twice, and the result is that of the larger sweep begun anew."""
    out, alone = tmp_path / "run", tmp_path / "alone"
    controls = {"amounts": [0.5], "kinds": ["random"]}
    curve(recipe(controls=controls), out=out, quiet=True)
    stamps = {f: f.stat().st_mtime_ns for f in out.glob("trials/*/result.json")}
    assert len(stamps) == 3
    asked = recipe(amounts=[0.75, 0.5], controls=controls, limit=2.0)
    grown = curve(asked, out=out, quiet=True)
    assert {f: f.stat().st_mtime_ns for f in stamps} == stamps
    assert len([*out.glob("trials/*/result.json")]) == 4
    assert (grown.document["sweet_spot"]["rule"], grown.document["trials"]["done"]) == ("limit", 4)
    curve(asked, out=alone, quiet=True)
    assert untimed(out) == untimed(alone)
    for fewer in (recipe(controls=controls), recipe(amounts=[0.75, 0.5], controls=controls, limit=2.0, seeds=[1])):
        with pytest.raises(
            UsageError, match=r"(?s)holds another run.*or --overwrite \(trials that both recipes have are kept\)"
        ):
            curve(fewer, out=out, quiet=True)
    assert (out / "curve.json").is_file()


def test_the_chosen_point_gets_controls_of_its_own_way_whichever_it_is(tmp_path: Path) -> None:
    asked = recipe(
        seeds=[0, 1], schedules=["one-shot", "multi-level"], limit=100.0,
        controls={"amounts": ["sweet-spot"], "kinds": ["scratch", "random"]},
    )  # fmt: skip
    out = tmp_path / "run"
    found = curve(asked, out=out, quiet=True, processes=2)
    spot = found.document["sweet_spot"]
    method, _, schedule = spot["line"].partition(" ")
    assert spot["amount"] == 0.5 and schedule in ("one-shot", "multi-level")
    beside = [r.cell for r in found.records[-4:]]
    ways = {(c["kind"], c["method"], c["schedule"], c["amount"], c["seed"]) for c in beside}
    assert ways == {(kind, method, schedule, 0.5, seed) for kind in ("scratch", "random") for seed in (0, 1)}
    assert [r.cell["kind"] for r in found.records[1:-4]] == ["base", "pruned", "pruned"] * 2
    assert found.document["dense_verdict"].startswith(f"At the sweet spot (0.5 remains, {spot['line']})")
    assert found.document["trials"]["cells"] == len(found.records) - 1
    told, lines = untimed(out), (out / "journal.jsonl").read_text().count("\n")
    curve(asked, out=out, quiet=True)
    assert (out / "journal.jsonl").read_text().count("\n") == lines == 10 and untimed(out) == told
    # as if it had been killed when the grid was through: what is missing follows from the records
    for cell in beside[1:]:
        shutil.rmtree(out / Path(found.records[0].details["recipes"][cell["digest"]]).parent)
    kept = [row for row in (out / "journal.jsonl").read_text().splitlines() if '"name": "control' not in row]
    (out / "journal.jsonl").write_text("\n".join([*kept, ""]))
    assert len(kept) == 6
    curve(asked, out=out, quiet=True, processes=2)
    assert untimed(out) == told


def test_trials_of_other_versions_are_told_before_they_run_again(
    done: Curved, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = grid(recipe(schedules=["one-shot", "multi-level", "from-scratch"]))
    for found in (versions(), {**versions(), "torch": "1.0"}):
        with sweep_display(len(cells)) as shown:
            _say_what_is_there(shown, cells, done.out, found, retry=False)
    here, other = capsys.readouterr().err.splitlines()
    assert here == "7 of 7 trials are there"
    assert other == (
        f"7 of 7 trials were made with other versions (torch {versions()['torch']} there, 1.0 here) and run again; "
        "with those versions the same command would find them"
    )


def test_names_in_square_brackets_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    cell = grid(recipe(methods=[{"name": "[/b] l1", "criterion": "l1"}]))[1]
    with sweep_display(1) as shown:
        for told in ({}, {"say": "level 1: [red]keep"}):
            shown.event(Event(cell=cell, what="goes on" if told else "begins", told=told))
            assert shown._progress is not None
            shown._progress.refresh()
    assert "[/b] l1 one-shot, 0.5 remains, seed 0: level 1: [red]keep" in screen.getvalue()


def test_what_another_recipe_drew_does_not_stay_behind(tmp_path: Path) -> None:
    """Where the new one ends without a curve, the old one's would pass for it; its trials are kept."""
    kept = tmp_path / "trials" / "key" / "result.json"
    kept.parent.mkdir(parents=True)
    kept.touch()
    for name in ("recipe.yaml", "curve.json", "records.jsonl", "sensitivity.json", "sensitivity.csv", "journal.jsonl"):
        (tmp_path / name).touch()
    refused = pytest.raises(UsageError, match=r"or --overwrite \(trials that both recipes have are kept\)\.")
    with refused, opened(tmp_path, "seed: 1", lambda there: "seed", overwrite=False, kind="a curve"):
        pass
    with opened(tmp_path, "seed: 1", lambda there: "seed", overwrite=True, kind="a curve"):
        left = sorted(f.name for f in tmp_path.iterdir() if f.is_file())
    assert left == [".lock", "journal.jsonl", "recipe.yaml"] and kept.is_file()


MASKED = """

def _dense(width=32, whole=model):
    from torch.nn.utils import prune

    net = whole(width)
    prune.random_unstructured(net[2], "weight", 0.25)
    return net


model = _dense
del base, scratch
"""


def test_masks_that_the_base_came_with_are_kept_in_every_trial(tmp_path: Path) -> None:
    """Also where weights are fresh: the from-scratch way and the control that has the pruned shape."""
    from safetensors.torch import load_file

    masked = tmp_path / "masked_task.py"
    masked.write_text(TASK.read_text() + MASKED)
    made = recipe(masked, schedules=["one-shot", "from-scratch"], controls={"kinds": ["scratch"]})
    found = by_kind(curve(made, out=tmp_path / "run", quiet=True, processes=1))
    assert {kind for kind, _ in found} == {"base", "pruned", "from-scratch", "scratch"}
    for (kind, _), record in found.items():
        if kind != "base":
            whole = record.measured["parameters"].value
            assert record.measured["nonzero_parameters"].value < whole - 0.2 * 16 * 16 * 0.75, kind
    notes = found[("pruned", "one-shot")].details["notes"]
    assert "took over the masks of torch.nn.utils.prune that the model came with: 256 zeros" in notes[0]
    assert len(list((tmp_path / "run").glob("trials/*/model.safetensors"))) == 1
    weight = load_file(next((tmp_path / "run").glob("trials/*/model.safetensors")))["2.weight"]
    assert weight.shape == (16, 16) and (weight == 0).sum() > 30


def test_names_are_checked_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'taylor'"):
        curve(recipe(methods=["tayler"]), out=tmp_path / "run", quiet=True)
    options = {"granularity": "element", "schedule_options": {"roundz": 3}}
    misspelt = recipe().model_copy(update={"prune": recipe().prune.model_copy(update=options)})
    with pytest.raises(UsageError, match="Did you mean 'rounds'"):
        curve(misspelt, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_sensitivity_of_one_network_is_refused_for_seeds_that_train_their_own(tmp_path: Path) -> None:
    head = Record(cell={"stage": "sensitivity"})
    (tmp_path / "records.jsonl").write_text(head.to_json() + "\n")
    asked = recipe(seeds=[0, 1], methods=["l1", {"allocation": "knapsack"}], controls={"kinds": []}, by="macs")
    asked = asked.model_copy(update={"prune": asked.prune.model_copy(update={"sensitivity": str(tmp_path)})})
    task = task_of(asked)[0]
    with pytest.raises(UsageError, match=r"prune\.sensitivity must be of the one network .* with 2 seeds"):
        check_cells(grid(asked), task)
    given = asked.model_copy(update={"weights": str(tmp_path / "of one base.safetensors")})
    check_cells(grid(given), task)
    assert asked.curve is not None
    one = asked.model_copy(update={"curve": asked.curve.model_copy(update={"seeds": (1,)})})
    check_cells(grid(one), task)


def test_where_no_trial_has_a_result_it_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken_task.py"
    broken.write_text(TASK.read_text().replace("return F.cross_entropy", "return 0 / 0 * F.cross_entropy"))
    with pytest.raises(RejectedError, match=r"ZeroDivisionError.*--retry"):
        curve(recipe(broken, controls={"kinds": []}), out=tmp_path / "run", quiet=True, processes=1)
    lines = [json.loads(line) for line in (tmp_path / "run/journal.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["crashed"]
    assert any("ZeroDivisionError" in line for line in lines[0]["tail"])


def test_processes_follow_cores_threads_and_latency() -> None:
    cores = len(os.sched_getaffinity(0))
    assert machine_for(recipe(), None).processes == cores
    assert machine_for(recipe(latency=True), None).processes == 1
    assert machine_for(recipe(latency=True), 3).processes == 3
    assert machine_for(recipe(), None).threads == 1


@pytest.mark.slow
def test_a_curve_of_masks_has_controls_with_the_mask_and_of_its_effective_macs(tmp_path: Path) -> None:
    made = parse_recipe(
        {
            "schema": 1, "name": "masks", "task": str(TASK), "prune": {"granularity": "element", "allocation": "global"},
            "recover": {"epochs": 2},
            "curve": {
                "amounts": [0.25], "seeds": [0], "schedules": ["one-shot", "iterative", "from-scratch"], "latency": True,
            },
        }
    )  # fmt: skip
    found = by_kind(curve(made, out=tmp_path / "run", quiet=True))
    base, masked = found[("base", "")], found[("pruned", "one-shot")]
    assert masked.measured["parameters"] == base.measured["parameters"]  # a mask is zeros in a dense file
    assert masked.measured["effective_macs"].badge == "estimated"
    kept = masked.measured["nonzero_parameters"].value
    assert kept == 8 * 32 + 32 * 32 + 32 * 2 - round(0.75 * (8 * 32 + 32 * 32 + 32 * 2)) + 32 + 32 + 2
    assert found[("scratch", "one-shot")].measured["nonzero_parameters"].value == kept
    assert found[("pruned", "iterative")].measured["nonzero_parameters"].value == kept
    thin = found[("thin", "one-shot")].measured["macs"].value
    assert thin == pytest.approx(masked.measured["effective_macs"].value, rel=0.05)
    assert all(r.measured["latency_ms"].badge == "measured" for r in found.values())
    assert all("speedup" in r.measured for (kind, _), r in found.items() if kind != "base")


@pytest.mark.slow
def test_killed_in_every_training_it_comes_to_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: Curved
) -> None:
    made, marks = recipe(schedules=["one-shot", "multi-level", "from-scratch"]), tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv("KILL_DIR", str(marks))
    for steps in (30, 11, 9, 60, 0):  # the trainings of epochs of 8 steps, 64 at most, go on from their checkpoints
        monkeypatch.setenv("KILL_STEPS", str(steps))
        try:
            found = curve(made, out=tmp_path / "run", quiet=True, retry=True, processes=2)
        except RejectedError:
            continue  # no pruned model yet
    assert len(list(marks.iterdir())) >= 4
    assert found.document["trials"]["failed"] == 0
    assert untimed(tmp_path / "run") == untimed(done.out)


@pytest.mark.slow
def test_two_nodes_of_a_cluster_come_to_the_same_records(tmp_path: Path, done: Curved) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        made = recipe(schedules=["one-shot", "multi-level", "from-scratch"])
        found = curve(made, out=tmp_path / "run", quiet=True, ray=cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert untimed(tmp_path / "run") == untimed(done.out)
    assert found.document == done.document
    models = sorted(p.relative_to(done.out) for p in done.out.rglob("model.onnx"))
    assert len(models) == 7
    for path in models:  # results by content: the very files
        assert (tmp_path / "run" / path).read_bytes() == (done.out / path).read_bytes()


def test_a_trial_refuses_other_versions_than_its_results_are_filed_under(tmp_path: Path) -> None:
    from paredown.pipeline.trial import main

    with pytest.raises(UsageError, match=r"versions of who asks.*torch 1\.0 there, \d"):
        main({"folder": str(tmp_path), "versions": {**versions(), "torch": "1.0"}}, print)
    assert list(tmp_path.iterdir()) == []


def test_a_trial_of_ranks_has_cores_and_gpus_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")
    made = recipe().model_copy(update={"device": "cuda"})
    assert machine_for(made, None).gpus == ("4", "5", "6", "7", "9")
    two = made.model_copy(update={"recover": made.recover.model_copy(update={"ranks": 2})})
    assert machine_for(two, None).gpus == ("4,5", "6,7")
    assert machine_for(two, None).processes == machine_for(two, None).ranks == 2
    for hidden, left in (("-1", ()), ("0, 2,-1,3", ("0", "2"))):  # what follows a number below 0 is not seen
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        if left:
            assert machine_for(made, None).gpus == left
        else:
            with pytest.raises(MissingError, match="device cuda must have 1 GPUs"):
                machine_for(made, None)
    on_cpus = two.model_copy(update={"device": "cpu"})
    assert machine_for(on_cpus, None).processes == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_cluster_shares_out_its_own_cores_and_gpus() -> None:
    assert machine_for(recipe(), None, ray="auto").processes > 1000  # the cluster's cores decide
    assert machine_for(recipe(), 3, ray="auto").processes == 3
    assert machine_for(recipe(latency=True), None, ray="auto").processes == 1
    assert machine_for(recipe(), None, ray="auto").gpus == ()
    assert machine_for(recipe().model_copy(update={"device": "cuda"}), None, ray="auto").gpus == ("cuda",)


def test_a_curve_of_quantized_files_scores_each_in_its_runtime_dense_and_controls_too(tmp_path: Path) -> None:
    import onnxruntime

    found = curve(
        recipe(quantized=True, controls={"kinds": ["scratch"]}), out=tmp_path / "run", quiet=True, processes=1
    )
    task = load_task_module(str(TASK))
    (images, labels) = task.test_batches()[0]
    assert {kind for kind, _ in by_kind(found)} == {"base", "pruned", "scratch"}
    for record in found.records[1:]:
        told = record.details["quantized"]
        place = tmp_path / "run" / Path(found.records[0].details["recipes"][record.cell["digest"]]).parent
        session = onnxruntime.InferenceSession(place / told["file"], providers=["CPUExecutionProvider"])
        answers = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
        by_hand = 100.0 * float((answers.argmax(1) == labels.numpy()).mean())
        assert record.measured["quantized_metric"].value == pytest.approx(by_hand)
        assert record.measured["quantized_bytes"].value == (place / told["file"]).stat().st_size
        assert told["check"]["cosine"] > 0.99
        assert (
            sum(e * s for e, s in record.details["training"].values())
            == {"base": 48, "pruned": 16, "scratch": 64}[record.cell["kind"]]
        )
    lines = {line["name"]: line for line in found.document["lines"]}
    assert list(lines) == [
        "l1 one-shot",
        "l1 one-shot, INT8",
        "the same shape from scratch",
        "the same shape from scratch, INT8",
    ]
    dense = lines["l1 one-shot, INT8"]["points"][0]
    assert (dense["kind"], dense["codes"]) == ("base", "INT8")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "dotted ones INT8 files" in page and "quantized files of these points" not in page
    assert {c["line"] for c in found.document["comparisons"]} == {"l1 one-shot", "l1 one-shot, INT8"}


def with_quantize(asked: Recipe, **keys: Any) -> Recipe:
    return asked.model_copy(update={"quantize": asked.quantize.model_copy(update=keys)})


def test_whatever_fails_of_a_file_in_codes_takes_nothing_of_the_float_file_along(tmp_path: Path) -> None:
    """Low rank replaced the layer that was to stay in float; and a user's evaluate that breaks on the second file."""
    task = task_of(recipe())[0]
    program = capture(task.model(), task.inputs())
    pare.export(program, tmp_path / "model.onnx")

    def broken(predict: Any) -> Any:
        msg = "the user's evaluate broke"
        raise ZeroDivisionError(msg)

    chain = pare.factorize(program, pare.Plan(keep={}, ranks={"2.weight": Rank(method="svd", ranks=(4,))}))
    for thing, evaluate, stays, said in (
        (
            chain,
            task.evaluate,
            ["2.weight"],
            "float_layers must match parameters or modules of the network. Got '2.weight'",
        ),
        (program, broken, [], "ZeroDivisionError: the user's evaluate broke"),
    ):
        run = Run(
            recipe=with_quantize(recipe(quantized=True), float_layers=stays), folder=RunFolder(path=tmp_path),
            say=lambda _: None, on_training=lambda *_: None, task=dataclasses.replace(task, evaluate=evaluate),
            weights_given=True, model=None, environment={},  # type: ignore[arg-type]
        )  # fmt: skip
        cell = Asked(run=run, kind="base", epochs=None, latency=False, quantized=True, needs={})
        measured, told = _in_codes(cell, thing, None, artifact_at(tmp_path / "model.onnx"))
        assert measured == {} and told["scheme"] == "int8" and told["failed"].startswith(said)
        assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx"]


def test_a_retry_makes_the_file_in_codes_that_failed_and_trains_nothing_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, out = recipe(quantized=True, controls={"kinds": ["scratch"]}), tmp_path / "run"
    monkeypatch.setenv(
        "BROKEN_CALL", "3"
    )  # the float file is scored on test and on held-out data, then the one in codes
    broken = curve(asked, out=out, quiet=True, processes=1)
    assert ["this call was to break" in r.details["quantized"]["failed"] for r in broken.records[1:]] == [True] * 3
    assert "--retry makes it again" in (out / "report.html").read_text()
    monkeypatch.delenv("BROKEN_CALL")
    monkeypatch.setenv("UNTRAINED", "1")
    assert curve(asked, out=out, quiet=True, processes=1).records == broken.records  # who does not ask for it gets none
    whole = curve(asked, out=out, quiet=True, processes=1, retry=True)
    assert all(
        (out / p).parent.joinpath("model.int8.onnx").is_file() for p in whole.records[0].details["recipes"].values()
    )
    for one, other in zip(broken.records[1:], whole.records[1:], strict=True):
        assert other.measured["quantized_metric"].value is not None
        assert other.measured["metric"] == one.measured["metric"]
        assert other.details["training"] == one.details["training"]
    lines = (out / "journal.jsonl").read_text().splitlines()
    (out / "journal.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # killed before the last line
    again = curve(asked, out=out, quiet=True, processes=1, retry=True)
    assert again.document == whole.document
    assert not list(out.glob("trials/*/steps/scratch*"))


def test_a_layer_that_should_stay_in_float_and_is_nowhere_is_refused_before_any_work() -> None:
    for pattern, refused in (("2.weight", False), ("2", False), ("*.bias", False), ("3.weight", True)):
        asked = with_quantize(recipe(quantized=True), float_layers=[pattern])
        if refused:
            with pytest.raises(
                UsageError, match=r"quantize\.float_layers must match .* Got '3\.weight', which matches none"
            ):
                check_cells(grid(asked), task_of(asked)[0])
        else:
            check_cells(grid(asked), task_of(asked)[0])
    ranks = recipe(quantized=True, methods=["l1", {"factorize": "svd"}])  # its layers have names that no one knows yet
    ranks = with_quantize(ranks, float_layers=["2.0.weight"])
    check_cells(grid(ranks), task_of(ranks)[0])


def test_training_with_rounding_ends_in_the_dense_cell_too_where_the_data_have_no_end(tmp_path: Path) -> None:
    asked = with_quantize(recipe(quantized=True, controls={"kinds": []}), epochs=1)
    asked = asked.model_copy(update={"recover": asked.recover.model_copy(update={"max_steps": 4})})
    dense, pruned = grid(asked)
    assert dense.recipe.recover.max_steps == pruned.recipe.recover.max_steps == 4
    assert grid(recipe())[0].digest == grid(recipe().model_copy(update={"recover": Recover(epochs=7)}))[0].digest
    task, made = task_of(asked)[0], []

    def endless() -> Any:
        for batch in itertools.cycle(task.train_batches()):
            made.append(batch)
            yield batch

    (tmp_path / "steps").mkdir()
    run = Run(
        recipe=dense.recipe, folder=RunFolder(path=tmp_path), say=lambda _: None, on_training=lambda *_: None,
        task=dataclasses.replace(task, train_batches=endless), weights_given=True, model=None, environment={},  # type: ignore[arg-type]
    )  # fmt: skip
    quantized_of(run, capture(task.model(), task.inputs()), None)
    assert 4 <= len(made) < 40


def test_a_function_of_the_task_that_asks_for_more_than_it_is_given_is_told_before_any_work() -> None:
    from paredown.pipeline.stages import accepted

    def base(model: Any, seed: int = 0) -> None: ...

    def scratch(net: Any, *, extra_epochs: int) -> None: ...

    with pytest.raises(
        UsageError, match=r"base must be callable as base\(seed=….*'model' without a default\. It makes the model"
    ):
        accepted(base, {"seed": 1})
    assert accepted(scratch, {"extra_epochs": 2, "seed": 1}, first="model") == {"extra_epochs": 2}
    with pytest.raises(UsageError, match="'model' without a default"):
        accepted(functools.partial(base, seed=1), {})
    with pytest.raises(UsageError, match=r"scratch\(model, seed=…\).*'extra_epochs' without a default"):
        accepted(scratch, {"seed": 1}, first="model")


def test_quantized_files_of_a_curve_are_refused_with_layers_that_each_file_spares() -> None:
    asked = recipe(quantized=True)
    assert {c.digest for c in grid(asked)}.isdisjoint(c.digest for c in grid(recipe()))
    spared = asked.model_copy(update={"quantize": asked.quantize.model_copy(update={"spare": True})})
    with pytest.raises(UsageError, match=r"curve\.quantized must go without quantize\.spare"):
        grid(spared)


def test_rounding_that_a_task_cannot_train_is_refused_before_any_work(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(TASK.read_text() + "\n\ndef train(model):\n    return model\n\n\ndel step, train_batches\n")
    for quantized in (True, False):
        asked = recipe(own, quantized=quantized)
        asked = asked.model_copy(update={"quantize": asked.quantize.model_copy(update={"epochs": 1})})
        if quantized:
            with pytest.raises(UsageError, match=r"quantize\.epochs must have a step"):
                check_cells(grid(asked), task_of(asked)[0])
        else:
            check_cells(grid(asked), task_of(asked)[0])
    with pytest.raises(UsageError, match=r"quantize\.epochs must have a step"):
        compress(asked.model_copy(update={"curve": None}), out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_file_in_codes_takes_turns_with_the_dense_file_in_float(tmp_path: Path) -> None:
    import torch
    from torch import nn

    base, own, asked = tmp_path / "base", tmp_path / "own", recipe(quantized=True, latency=True)
    base.mkdir(), own.mkdir()
    wide = nn.Sequential(nn.Linear(8, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2))
    pare.export((wide, torch.zeros(2, 8)), base / "model.onnx")  # slow enough to be told apart
    for folder in (base, own):
        pare.export((nn.Linear(8, 2), torch.zeros(2, 8)), folder / "model.int8.onnx")
    run = Run(
        recipe=asked.model_copy(update={"measure": asked.measure.model_copy(update={"runs": 20, "seconds": 0.2})}),
        task=load_task_module(str(TASK)), folder=RunFolder(path=own), say=lambda _: None, on_training=lambda *_: None,
        weights_given=True, model=None, environment={},  # type: ignore[arg-type]
    )  # fmt: skip
    cell = Asked(run=run, kind="pruned", epochs=None, latency=True, quantized=True, needs={"base": base})
    found = _timed(run, cell, artifact_at(own / "model.int8.onnx"), None)
    assert found["baseline_latency_ms"].value > 10 * found["latency_ms"].value
