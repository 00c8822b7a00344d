"""Runs side by side from records: exact sizes, paired metrics, speeds of one machine only, and what may not be compared."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paredown.compare import Comparison, Difference, compare
from paredown.errors import RejectedError, UsageError
from paredown.measure import paired, summarize
from paredown.measure.quality import keep_values, kept_values
from paredown.records import Measured, Record, append

HERE = "Some CPU, 2 cores, avx2, Linux x86_64"
DENSE = np.repeat([100.0, 0.0], [180, 20])


def record(stage: str, values: np.ndarray, size: int, latency: float, speedup: float | None, **more: Any) -> Record:
    measured = {
        "bytes": Measured(value=size, unit="B", machine=more.get("machine", HERE)),
        "gzip_bytes": Measured(value=size // 2, unit="B"),
        "parameters": Measured(value=size // 4, unit=""),
        "macs": Measured(value=100 * size, unit="MAC"),
        "metric": summarize(values, more.get("unit", "%")),
        "latency_ms": Measured(
            value=latency,
            unit="ms",
            low=0.95 * latency,
            high=1.1 * latency,
            n=100,
            protocol="median; 1 thread, 10 warm-up runs",
            machine=more.get("machine", HERE),
            timing=True,
        ),
    }
    if speedup is not None:
        measured["speedup"] = Measured(value=speedup, unit="×", low=0.97 * speedup, high=1.03 * speedup, timing=True)
    return Record(
        cell={"stage": stage, "title": stage, "target": "onnxruntime-x86"},
        measured=measured,
        environment={"versions": {"onnxruntime": more.get("version", "1.32.0")}, "threads": 1},
        details={"file": f"{stage}.onnx", "digest": more.get("digest", f"{stage}{size}")},
    )


def run(folder: Path, int8: np.ndarray, *, size: int = 1000, speedup: float = 2.0, **more: Any) -> Path:
    """A run folder as the pipeline writes it, with files that are no models: nothing of them is timed here."""
    (folder / "steps").mkdir(parents=True)
    metric = {"name": "accuracy", "unit": "%", "goal": "max", **more.pop("metric", {})}
    verdict = {
        "recommended": "int8",
        "metric": metric,
        "test_data": more.pop("test_data", "a" * 64),
        "target_met": True,
    }
    keep = more.pop("keep", True)
    pairs = (("dense", DENSE, 4000, 1.0, None), ("int8", int8, size, 1.0 / speedup, speedup))
    for stage, values, length, latency, gain in pairs:
        append(folder / "records.jsonl", record(stage, values, length, latency, gain, **more))
        if keep:
            keep_values(folder, stage, values)
    append(folder / "records.jsonl", Record(cell={"stage": "verdict"}, details=verdict))
    return folder


def flipped(lost: int, gained: int) -> np.ndarray:
    values = DENSE.copy()
    values[:lost], values[180 : 180 + gained] = 0.0, 100.0
    return values


def of(found: Comparison, what: str, second: str) -> Difference:
    (one,) = [d for d in found.differences if d.what == what and d.second == second]
    return one


def test_sizes_are_exact_and_the_metric_is_paired(tmp_path: Path) -> None:
    small, large = flipped(30, 0), flipped(2, 1)
    found = compare(run(tmp_path / "a", large), run(tmp_path / "b", small, size=700), recorded=True)
    assert [(r.run, r.stage, r.recommended) for r in found.runs] == [
        ("a", "dense", False), ("a", "int8", True), ("b", "dense", False), ("b", "int8", True)
    ]  # fmt: skip
    size = of(found, "bytes", "b/int8")
    assert (size.change.value, size.better) == (-300, "b/int8")
    assert "300 bytes fewer" in size.said
    metric = of(found, "metric", "b/int8")
    expected = paired(large, small, "%")
    assert (metric.change.value, metric.change.low, metric.change.high) == (expected.value, expected.low, expected.high)
    assert metric.better == "a/int8" and expected.high < 0
    assert found.timings == () and found.fastest is None


def test_the_recommended_files_are_answered_in_a_sentence(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", flipped(2, 1)), run(tmp_path / "b", flipped(30, 0), size=700, speedup=3.0)
    assert compare(a, b, recorded=True).answers == (
        "b/int8 against a/int8, both recommended: 0.300 kB smaller; accuracy worse, −14.50 points; faster.",
    )
    assert compare(b, a, recorded=True).answers == (
        "a/int8 against b/int8, both recommended: 0.300 kB larger; accuracy better, +14.50 points; slower.",
    )
    shutil.copytree(a, tmp_path / "c")
    assert compare(a, tmp_path / "c", recorded=True).answers == ("c/int8 and a/int8, both recommended, are the same.",)


def test_what_was_not_measured_is_not_tested(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", flipped(2, 1)), run(tmp_path / "b", flipped(4, 1), size=700)
    lines = [json.loads(line) for line in (b / "records.jsonl").read_text().splitlines()]
    del lines[1]["measured"]["latency_ms"], lines[1]["measured"]["macs"]
    (b / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    append(a / "records.jsonl", record("level-1", DENSE, 2000, 0.7, 1.4))
    found = compare(a, b, recorded=True)
    assert set(found.not_tested) == {"MACs of b/int8", "latency of b/int8", "in b, what a has: level-1"}
    assert found.answers[0].endswith("no difference in accuracy that shows; speed not compared.")


def test_two_tasks_are_named_where_their_test_sets_differ(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", DENSE), run(tmp_path / "b", DENSE, size=900, test_data="b" * 64)
    for folder, task in ((a, "digits"), (b, "cells")):
        (folder / "records.jsonl").write_text(
            (folder / "records.jsonl").read_text().replace('"stage":', f'"task": "{task}", "stage":')
        )
    with pytest.raises(RejectedError, match=r"in a and b \(tasks digits and cells\)"):
        compare(a, b, recorded=True)


def test_a_difference_inside_its_interval_is_none(tmp_path: Path) -> None:
    found = compare(run(tmp_path / "a", flipped(2, 1)), run(tmp_path / "b", flipped(4, 2), size=700), recorded=True)
    metric = of(found, "metric", "b/int8")
    assert metric.better is None and "not distinguishable" in metric.said
    assert metric.change.low < 0 < metric.change.high


def test_lower_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    goal = {"name": "mae", "unit": "g", "goal": "min"}
    runs = (run(tmp_path / n, flipped(k, 0), size=k, metric=goal, unit="g") for n, k in (("a", 2), ("b", 60)))
    assert of(compare(*runs, recorded=True), "metric", "b/int8").better == "b/int8"


def test_without_values_per_sample_the_intervals_decide(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"r{k}", flipped(k, 0), size=k, keep=False) for k in (2, 10, 100)]
    found = compare(*runs, recorded=True)
    near, far = of(found, "metric", "r10/int8"), of(found, "metric", "r100/int8")
    assert near.better is None and "overlap" in near.said and near.change.low is None
    assert far.better == "r2/int8" and "are apart" in far.said


def test_speeds_are_compared_through_the_dense_file_of_both(tmp_path: Path) -> None:
    same = flipped(2, 1)
    runs = [
        run(tmp_path / n, same, size=s, speedup=g) for n, s, g in (("a", 900, 2.0), ("b", 800, 3.0), ("c", 700, 2.05))
    ]
    found = compare(*runs, recorded=True)
    fast, alike = of(found, "latency_ms", "b/int8"), of(found, "latency_ms", "c/int8")
    assert fast.change.value == pytest.approx(1.5)
    assert fast.change.low == pytest.approx(1.5 * 0.97 / 1.03) and fast.better == "b/int8"
    assert alike.better is None and "not distinguishable" in alike.said
    assert "b/dense is the same file as a/dense" in found.notes


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"machine": "A phone"}, "another machine (Some CPU, 2 cores, avx2, Linux x86_64; A phone)"),
        ({"version": "1.20.0"}, "another runtime (onnxruntime 1.32.0; onnxruntime 1.20.0)"),
        ({"digest": "other"}, "measured in two schedules, against different dense files"),
    ],
)
def test_latency_is_not_compared_across_machines_runtimes_or_schedules(
    tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    found = compare(run(tmp_path / "a", DENSE), run(tmp_path / "b", DENSE, size=900, **more), recorded=True)
    assert [d for d in found.differences if d.what == "latency_ms"] == []
    assert any(n.startswith("latency of a/int8 and b/int8 is not compared") and said in n for n in found.notes)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"metric": {"name": "f1"}}, "name 'accuracy' and 'f1' in a and b"),
        ({"metric": {"unit": "points"}, "unit": "points"}, "unit '%' and 'points'"),
        ({"metric": {"goal": "min"}}, "goal 'max' and 'min'"),
        ({"test_data": "b" * 64}, "test data aaaaaaaaaaaa and bbbbbbbbbbbb in a and b"),
        ({"test_data": ""}, "test data aaaaaaaaaaaa and unknown"),
    ],
)
def test_other_metrics_and_test_sets_are_refused_by_name(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    runs = run(tmp_path / "a", DENSE), run(tmp_path / "b", DENSE, size=900, **more)
    with pytest.raises(RejectedError, match="to be compared") as caught:
        compare(*runs, recorded=True)
    assert said in str(caught.value) and caught.value.exit_code == 3


def test_another_number_of_samples_is_another_test_set(tmp_path: Path) -> None:
    run(tmp_path / "a", DENSE)
    run(tmp_path / "b", DENSE[:-1], size=900)
    with pytest.raises(RejectedError, match="on the same test samples"):
        compare(tmp_path / "a", tmp_path / "b", recorded=True)


def test_unknown_test_data_is_paired_with_a_note(tmp_path: Path) -> None:
    runs = [run(tmp_path / n, flipped(k, 0), size=k, test_data="") for n, k in (("a", 2), ("b", 60))]
    found = compare(*runs, recorded=True)
    assert of(found, "metric", "b/int8").better == "a/int8"
    assert any("paired by their order" in n for n in found.notes)


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    good = run(tmp_path / "a", DENSE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RejectedError, match=r"records\.jsonl"):
        compare(good, tmp_path / "empty", recorded=True)
    half = tmp_path / "half"
    shutil.copytree(good, half)
    lines = (half / "records.jsonl").read_text().splitlines()
    (half / "records.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(RejectedError, match="must be finished to be compared"):
        compare(good, half, recorded=True)
    with pytest.raises(UsageError, match="two or more folders"):
        compare(good, recorded=True)
    with pytest.raises(UsageError, match="one of them twice"):
        compare(good, good, recorded=True)


@pytest.mark.parametrize("kind", ["curve", "sensitivity"])
def test_a_folder_of_a_curve_or_a_sensitivity_is_no_run_to_go_on_with(kind: str, tmp_path: Path) -> None:
    good = run(tmp_path / "a", DENSE)
    (tmp_path / "other").mkdir()
    append(tmp_path / "other/records.jsonl", Record(cell={"stage": kind}))
    append(tmp_path / "other/records.jsonl", Record(cell={"stage": "trial", "kind": "pruned"}))
    with pytest.raises(RejectedError, match=rf"Got a {kind} in 'other'. `paredown compress` of a recipe makes a run"):
        compare(good, tmp_path / "other", recorded=True)


def test_a_table_of_runs_has_the_metric_in_its_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from paredown.cli.compare import compare as told

    prices = {"unit": "EUR", "metric": {"name": "mae", "unit": "EUR", "goal": "min"}}
    rng = np.random.default_rng(0)
    one, other = (run(tmp_path / n, 10_000 + 900 * rng.normal(size=200), **prices) for n in "ab")
    assert told(one, other, recorded=True) == 0
    said = capsys.readouterr().out
    assert "EUR" in said.partition("against")[0] and "e+0" not in said


def test_files_that_are_gone_are_not_timed(tmp_path: Path) -> None:
    found = compare(run(tmp_path / "a", DENSE), run(tmp_path / "b", DENSE, size=900))
    assert found.timings == ()
    assert any(n.startswith("a: its files are not in the folder any more") for n in found.notes)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.write_bytes(b"not numpy"),
        lambda p: np.save(p, np.array([1.0, np.nan])),
        lambda p: np.save(p, np.ones((2, 2))),
        lambda p: np.save(p, np.array([object()]), allow_pickle=True),
        lambda p: p.unlink(),
    ],
)
def test_kept_values_are_numbers_or_nothing(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    keep_values(tmp_path, "int8", DENSE)
    assert (kept_values(tmp_path, "int8") == DENSE).all()
    spoil(tmp_path / "steps" / "values-int8.npy")
    assert kept_values(tmp_path, "int8") is None


def test_names_from_strangers_stay_names(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", DENSE)
    lines = (folder / "records.jsonl").read_text().replace('"int8.onnx"', '"../../etc/passwd"')
    (folder / "records.jsonl").write_text(lines)
    found = compare(folder, run(tmp_path / "b", DENSE, size=900))
    assert found.timings == ()
    assert dataclasses.asdict(found)["fastest"] is None
