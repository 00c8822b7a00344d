"""What a run says of an evaluation that is not what it seems, and of a base that is not what the recipe knows."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import paredown as pare
from paredown.errors import GateError, RejectedError, VerificationError
from paredown.measure.quality import paired, summarize
from paredown.pipeline import stages, verdict
from paredown.pipeline.folder import RunFolder
from paredown.pipeline.run import Run
from paredown.recipe import parse_recipe
from paredown.records import Record, read
from paredown.train import Task

pytest.importorskip("onnxruntime")


def run_of(task: Task, out: Path, **measure: Any) -> Run:
    recipe = parse_recipe({"schema": 1, "task": "small", "measure": {"runs": 5, "seconds": 0.1, **measure}})
    folder = RunFolder(path=out)
    folder.steps.mkdir(exist_ok=True, parents=True)
    return Run(
        recipe=recipe, task=task, folder=folder, say=lambda _: None, on_training=lambda *_: None, weights_given=True,
        model=task.model, environment={"versions": {}},
    )  # fmt: skip


def records(run: Run, small: torch.nn.Module | None = None) -> dict[str, Record]:
    """The dense network and another one, as two stages of a run; or the dense one alone."""
    nets = {"dense": run.task.model(), **({} if small is None else {"level-1": small})}
    for order, (name, net) in enumerate(nets.items()):
        stages._stage_float(run, order, name, name, pare.capture(net, run.task.inputs()), None, {})
    run.folder.write_records()
    return {str(r.cell["stage"]): r for r in read(run.folder.path / "records.jsonl")}


def test_a_network_that_answers_the_same_for_all_and_other_inputs_are_told(task: Task, tmp_path: Path) -> None:
    still = task.model()
    with torch.no_grad():
        still.head.weight.zero_()
    found = records(run_of(task, tmp_path / "a"), still)
    assert "alarms" not in found["dense"].details
    (said,) = found["level-1"].details["alarms"]
    assert "no longer depend on the sample" in said and said in found["level-1"].details["notes"]
    assert list(verdict._alarms(found)) == [f"level-1: {said}"]

    def noisy(predict: Any) -> dict[str, Any]:
        return task.evaluate(lambda x: predict(x + 0.01 * torch.randn_like(x)))

    found = records(run_of(dataclasses.replace(task, evaluate=noisy), tmp_path / "b"), task.model())
    assert ["other inputs" in s for s in found["level-1"].details["alarms"]] == [True]


def test_fault_52_means_of_uneven_batches_are_told(task: Task, tmp_path: Path) -> None:
    samples = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def means(predict: Any) -> dict[str, Any]:
        return {"accuracy": [50.0 + float(predict(x).mean()) for x in samples.split(4)]}

    found = records(run_of(dataclasses.replace(task, evaluate=means), tmp_path))
    (said,) = found["dense"].details["alarms"]
    assert said.startswith("evaluate returned 3 values, one for each batch of 1 to 4 samples")


def test_fault_63_an_evaluation_that_changes_weights_is_refused(task: Task, tmp_path: Path) -> None:
    """In place, behind the back of autograd, and by a batch norm that is left in training mode."""
    network = task.model()

    def trains(predict: Any) -> dict[str, Any]:
        network.head.weight.data[0, 0] += 1.0
        return dict(task.evaluate(predict))

    def moves(predict: Any) -> dict[str, Any]:
        network.train()(torch.randn(4, 1, 8, 8))
        return dict(task.evaluate(predict))

    for evaluate, says in (
        (trains, r"must not change the network. Got other values in head.weight when"),
        (moves, r"Got other values in a_bn.running_mean, a_bn.running_var, a_bn.num_batches_tracked and 6 more when"),
    ):
        run = run_of(dataclasses.replace(task, evaluate=evaluate), tmp_path / evaluate.__name__)
        run.dense["networks"] = [task.model(), network]
        with pytest.raises(RejectedError, match=says):
            records(run)
    run = run_of(task, tmp_path / "c")
    run.dense["networks"] = [network]
    assert "alarms" not in records(run)["dense"].details


def test_calibration_data_of_another_range_is_told(task: Task, tmp_path: Path) -> None:
    raw = dataclasses.replace(task, calibration_batches=lambda: [x * 255 for x in task.calibration_batches()])
    (said,) = records(run_of(raw, tmp_path))["dense"].details["alarms"]
    assert "calibration inputs lie in" in said


def test_a_base_that_does_not_score_what_is_known_of_it_stops_the_run(task: Task, tmp_path: Path) -> None:
    found = records(run_of(task, tmp_path / "a"))
    value = found["dense"].measured["metric"].value
    assert value is not None
    records(run_of(task, tmp_path / "b", known_metric=value + 0.4, known_within=0.5))
    with pytest.raises(GateError, match="known_metric"):
        records(run_of(task, tmp_path / "c", known_metric=value + 0.6, known_within=0.5))
    with pytest.raises(GateError, match="the recipe knows"):
        records(run_of(task, tmp_path / "d", known_metric=97.0))


def judged(task: Task, out: Path, simulated: Any, file: Any) -> None:
    """`_refuse_far` on what the simulation and the file scored."""
    unit = task.metric.unit
    measured = {"simulated_metric": summarize(simulated, unit), "metric": summarize(file, unit)}
    if np.ndim(file):
        measured["simulated_change"] = paired(simulated, file, unit)
    stages._refuse_far(run_of(task, out), Record(cell={"stage": "int8"}, environment={}, measured=measured, details={}))


def test_a_file_may_differ_from_its_simulation_by_noise_and_by_no_more(task: Task, tmp_path: Path) -> None:
    hits = 100.0 * (np.arange(200) % 10 > 0)
    one, both = hits.copy(), hits.copy()
    one[1] = 0.0
    both[[1, 2]], both[[0, 10]] = 0.0, 100.0
    judged(task, tmp_path, hits, one)  # 0.5 points are one of 200 samples
    judged(task, tmp_path, hits, both)
    worse = hits.copy()
    worse[1:9] = 0.0
    with pytest.raises(VerificationError, match="of its simulation"):
        judged(task, tmp_path, hits, worse)
    many = 100.0 * (np.arange(20_000) % 10 > 0)
    less = many.copy()
    less[1:120:2] = 0.0  # 0.3 points, and all of them lost
    with pytest.raises(VerificationError, match=r"within 0\.2 %"):
        judged(task, tmp_path, many, less)
    with pytest.raises(VerificationError, match=r"within 0\.2 %"):
        judged(task, tmp_path, 90.0, 89.7)  # one number: nothing tells noise


def test_grams_are_judged_by_their_share(task: Task, tmp_path: Path) -> None:
    grams = dataclasses.replace(task, metric=dataclasses.replace(task.metric, name="mae", unit="g", goal="min"))
    errors = np.random.default_rng(0).uniform(0, 300, 100)
    noise = np.random.default_rng(1).normal(0, 3, 100)
    judged(grams, tmp_path, errors, errors + noise - noise.mean() + 0.4)
    with pytest.raises(VerificationError, match="of its simulation"):
        judged(grams, tmp_path, errors, errors + 2.0)
