"""Curves side by side: differences seed by seed, sweet spots first, and what may not be compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curve_records import head, sweep, trial
from paredown.cli.compare import compare as told
from paredown.compare import Comparison, Difference, compare
from paredown.curve import interval
from paredown.errors import RejectedError
from paredown.records import Measured, Record, append

DENSE = [98.5, 98.3, 98.6]
LINE = {0.75: [98.4, 98.2, 98.6], 0.5: [98.0, 97.8, 97.9], 0.25: [92.0, 94.0, 90.0]}
BETTER = {0.75: [98.5, 98.4, 98.6], 0.5: [98.3, 98.0, 98.4], 0.25: [98.0, 97.9, 98.1]}


def curve(folder: Path, records: Sequence[Record], **details: Any) -> Path:
    """A folder as `paredown curve` leaves it, of trials that never ran."""
    folder.mkdir()
    recipes = {r.cell["digest"]: f"trials/{i:04d}/recipe.yaml" for i, r in enumerate(records)}
    append(folder / "records.jsonl", head(cells=len(records), recipes=recipes, **details))
    for record in records:
        data = {"test_data": details.get("data", "a" * 64)} if record.cell["kind"] == "base" else {}
        append(
            folder / "records.jsonl",
            dataclasses.replace(record, details={**record.details, **data, "file": "model.onnx"}),
        )
    return folder


def of(found: Comparison, what: str, second: str) -> Difference:
    """The difference of one point in both."""
    ends = [second.partition("/")[2], second]
    (one,) = [d for d in found.differences if d.what == what and [d.first.partition("/")[2], d.second] == ends]
    return one


def pair(
    tmp_path: Path, a: Mapping[float, Sequence[float]], b: Mapping[float, Sequence[float]], **details: Any
) -> Comparison:
    return compare(curve(tmp_path / "a", sweep(a, DENSE), **details), curve(tmp_path / "b", sweep(b, DENSE), **details))


def test_points_are_paired_by_seed(tmp_path: Path) -> None:
    found = pair(tmp_path, LINE, BETTER)
    gains = [y - x for x, y in zip(LINE[0.25], BETTER[0.25], strict=True)]
    expected = interval(gains)
    metric = of(found, "metric", "b/l1 one-shot 0.25")
    assert (metric.change.value, metric.change.low, metric.change.high) == (np.mean(gains), min(gains), max(gains))
    assert (expected.low, metric.change.n, metric.better) == (min(gains), 3, "b/l1 one-shot 0.25")
    assert "paired by 3 seeds, interval +3.90 to +8.10 points: b/l1 one-shot 0.25 is better" in metric.said
    assert of(found, "bytes", "b/l1 one-shot 0.75").better is None
    assert any(n.startswith("3 seeds: an interval called 95 %") for n in found.notes)
    assert found.timings == () and found.fastest is None


def test_pairing_shows_what_the_spread_over_seeds_would_hide(tmp_path: Path) -> None:
    wide = {0.5: [90.0, 95.0, 98.0]}
    metric = of(pair(tmp_path, wide, {0.5: [90.4, 95.5, 98.3]}), "metric", "b/l1 one-shot 0.5")
    assert metric.better == "b/l1 one-shot 0.5" and metric.change.low == pytest.approx(0.3)


def test_sweet_spots_come_first_and_are_answered(tmp_path: Path) -> None:
    found = pair(tmp_path, LINE, BETTER)
    assert [(r.run, r.stage) for r in found.runs if r.recommended] == [
        ("a", "l1 one-shot 0.5"),
        ("b", "l1 one-shot 0.25"),
    ]
    assert (found.differences[0].first, found.differences[0].second) == ("a/l1 one-shot 0.5", "b/l1 one-shot 0.25")
    (said,) = found.answers
    assert said == (
        "b/l1 one-shot 0.25 against a/l1 one-shot 0.5, both recommended: 0.100 MB smaller; "
        "no difference in accuracy that shows; speed not compared."
    )
    assert "latency: no row has it" in found.not_tested
    assert any(n.startswith("which is faster: curves are timed apart") for n in found.not_tested)


def test_a_metric_that_is_better_when_lower_and_its_unit(tmp_path: Path) -> None:
    goal = {"name": "mae", "unit": "g", "goal": "min"}
    metric = of(pair(tmp_path, LINE, BETTER, metric=goal), "metric", "b/l1 one-shot 0.25")
    assert metric.better == "a/l1 one-shot 0.25" and "+6.000 g, paired" in metric.said


def test_only_seeds_of_both_are_paired(tmp_path: Path) -> None:
    few = {a: v[:2] for a, v in BETTER.items()}
    a, b = curve(tmp_path / "a", sweep(LINE, DENSE)), curve(tmp_path / "b", sweep(few, DENSE[:2]), seeds=[0, 1])
    found = compare(a, b)
    assert of(found, "metric", "b/l1 one-shot 0.25").change.n == 2
    assert "paired over the seeds of both (0, 1); one of them alone has 2" in found.notes
    one = compare(a, curve(tmp_path / "c", sweep({k: v[:1] for k, v in LINE.items()}, DENSE[:1]), seeds=[0]))
    metric = of(one, "metric", "c/l1 one-shot 0.5")
    assert (metric.change.low, metric.better) == (None, None) and metric.said.endswith(
        "one common seed, so no interval: not told"
    )
    assert any(n.startswith("c has no sweet spot. Nothing was chosen: with one seed") for n in one.notes)
    assert one.answers == ()


def test_points_of_one_curve_alone_are_not_tested_in_the_other(tmp_path: Path) -> None:
    scratch = [trial("scratch", 0.5, s, 96.0, 95.0, steps=1000) for s in range(3)]
    a = curve(tmp_path / "a", [*sweep(LINE, DENSE), *scratch])
    found = compare(a, curve(tmp_path / "b", sweep({0.5: BETTER[0.5]}, DENSE)))
    assert "in b, what a has: l1 one-shot 0.75, l1 one-shot 0.25, the same shape from scratch 0.5" in found.not_tested
    assert {d.second for d in found.differences} == {"b/dense", "b/l1 one-shot 0.5"}


def test_the_same_files_are_one_note(tmp_path: Path) -> None:
    same = [
        dataclasses.replace(r, details={**r.details, "digest": f"file {r.cell['digest']}"}) for r in sweep(LINE, DENSE)
    ]
    found = compare(curve(tmp_path / "a", same), curve(tmp_path / "b", same))
    assert found.differences == ()
    assert "the same files in a and b: dense, l1 one-shot 0.75, l1 one-shot 0.5, l1 one-shot 0.25" in found.notes
    assert found.answers == ("b/l1 one-shot 0.5 and a/l1 one-shot 0.5, both recommended, are the same.",)


def test_other_networks_other_rules_and_failures_are_noted(tmp_path: Path) -> None:
    def of_network(name: str) -> list[Record]:
        own = sweep(LINE, DENSE)
        return [dataclasses.replace(r, details={**r.details, "digest": f"{name} {r.cell['digest']}"}) for r in own]

    lost = [{**trial("pruned", 0.5, 2, None, 0.0).cell, "status": "crashed", "reason": "why", "tail": []}]
    found = compare(
        curve(tmp_path / "a", of_network("a")), curve(tmp_path / "b", of_network("b"), limit=None, failed=lost)
    )
    assert "a and b prune other dense networks: a difference is that of the networks too" in found.notes
    assert any(
        "chosen by different rules (a: limit 1.000 points, over sparsity; b: farthest from the chord" in n
        for n in found.notes
    )
    assert "b: 1 trials have no result" in found.notes


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ({"metric": {"name": "f1", "unit": "%", "goal": "max"}}, "name 'accuracy' and 'f1' in a and b"),
        ({"metric": {"name": "accuracy", "unit": "%", "goal": "min"}}, "goal 'max' and 'min'"),
        ({"data": "b" * 64}, "test data aaaaaaaaaaaa and bbbbbbbbbbbb in a and b"),
        ({"data": ""}, "test data aaaaaaaaaaaa and unknown"),
    ],
)
def test_other_metrics_and_test_sets_are_refused(tmp_path: Path, details: dict[str, Any], said: str) -> None:
    a, b = curve(tmp_path / "a", sweep(LINE, DENSE)), curve(tmp_path / "b", sweep(LINE, DENSE), **details)
    with pytest.raises(RejectedError, match="to be compared") as caught:
        compare(a, b)
    assert said in str(caught.value) and caught.value.exit_code == 3


def test_a_sweep_that_has_not_ended_says_how_it_goes_on(tmp_path: Path) -> None:
    a = curve(tmp_path / "a", sweep(LINE, DENSE))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/journal.jsonl").write_text("")
    with pytest.raises(RejectedError, match=r"Got a sweep that has not ended at .*Run `paredown curve` into it again"):
        compare(a, tmp_path / "b")
    (a / "records.jsonl").write_text((a / "records.jsonl").read_text()[:-40])
    with pytest.raises(RejectedError, match=r"Got none of seed 2 for l1 one-shot, 0.25\. Restore records\.jsonl"):
        compare(a, curve(tmp_path / "c", sweep(LINE, DENSE)))


def test_the_command_says_the_same_in_words_and_as_a_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = curve(tmp_path / "a", sweep(LINE, DENSE)), curve(tmp_path / "b", sweep(BETTER, DENSE))
    assert told(a, b) == 0
    words = capsys.readouterr().out
    assert told(a, b, json=True) == 0
    document = json.loads(capsys.readouterr().out)
    flat = " ".join(words.split())
    for line in (*document["answers"], *(d["said"] for d in document["differences"] if d["what"] == "metric")):
        assert " ".join(line.split()) in flat
    assert all(f"not tested: {n}" in flat for n in document["not_tested"]) and all(
        f"note: {n}" in flat for n in document["notes"]
    )
    assert "latency ms" not in words and "as large in everything counted" in words
    row = next(r for r in document["runs"] if r["recommended"])
    assert row["file"].endswith("/model.onnx") and row["figures"]["metric"]["n"] == 3


FAST = {0.75: 1.2, 0.5: 1.5, 0.25: 2.0}


def timed(
    records: Sequence[Record],
    speeds: Mapping[float, float],
    *,
    dense: str = "dense",
    wide: float = 1.02,
    machine: str = "here",
) -> list[Record]:
    """The same trials as `curve.latency` leaves them: each in turns with the dense file of its seed; seeds differ by 1 %."""
    found = []
    for r in records:
        seed, base = int(r.cell["seed"]), r.cell["kind"] == "base"
        speed = 1.0 if base else speeds[r.cell["amount"]] * 1.01**seed
        ms = 7.0 * (1 + seed)  # the machine was at other clocks for every seed: only ratios hold
        own = {"latency_ms": Measured(value=ms / speed, unit="ms", machine=machine, timing=True, protocol="1 thread")}
        if not base:
            own["baseline_latency_ms"] = Measured(value=ms, unit="ms", timing=True)
            own["speedup"] = Measured(value=speed, unit="×", low=speed / wide, high=speed * wide, timing=True)
        details = {**r.details, **({"digest": f"{dense} {seed}"} if base else {})}
        found.append(dataclasses.replace(r, measured={**r.measured, **own}, details=details))
    return found


def test_speeds_are_ratios_to_the_same_dense_files_seed_by_seed(tmp_path: Path) -> None:
    a, b = timed(sweep(LINE, DENSE), FAST), timed(sweep(BETTER, DENSE), {**FAST, 0.5: 1.8, 0.25: 2.02})
    found = compare(curve(tmp_path / "a", a), curve(tmp_path / "b", b))
    faster = of(found, "latency_ms", "b/l1 one-shot 0.5")
    assert faster.change.value == pytest.approx(1.8 / 1.5) and faster.better == "b/l1 one-shot 0.5"
    assert (faster.change.low, faster.change.high) == pytest.approx((1.2 / 1.02**2, 1.2 * 1.02**2))
    assert "by their speedups over the same dense files (× 1.82 and × 1.52 of dense; 3 seeds)" in faster.said
    alike = of(found, "latency_ms", "b/l1 one-shot 0.25")
    assert alike.better is None and alike.said.endswith("not distinguishable")
    assert not [d for d in found.differences if d.what == "latency_ms" and d.second == "b/dense"]
    assert any(n.startswith("milliseconds of one curve against those of the other") for n in found.not_tested)
    row = next(r for r in found.runs if (r.run, r.stage) == ("a", "l1 one-shot 0.5"))
    assert row.figures["speedup"].value == pytest.approx(1.5 * 1.01)
    dense = next(r for r in found.runs if (r.run, r.stage) == ("a", "dense")).figures["speedup"]
    assert (dense.value, dense.low, dense.high) == (1.0, None, None)
    assert found.answers == (
        "b/l1 one-shot 0.25 against a/l1 one-shot 0.5, both recommended: 0.100 MB smaller; "
        "no difference in accuracy that shows; faster.",
    )


def test_the_first_and_the_second_curve_may_change_places(tmp_path: Path) -> None:
    a, b = timed(sweep(LINE, DENSE), FAST), timed(sweep(BETTER, DENSE), {**FAST, 0.5: 1.8})
    folders = [curve(tmp_path / "a", a), curve(tmp_path / "b", b)]
    there, back = compare(*folders), compare(*reversed(folders))
    one, other = of(there, "latency_ms", "b/l1 one-shot 0.5"), of(back, "latency_ms", "a/l1 one-shot 0.5")
    assert one.change.value is not None and one.change.value == pytest.approx(1 / float(other.change.value or 0))
    assert one.better == other.better == "b/l1 one-shot 0.5"


def test_other_dense_files_leave_open_which_file_is_faster(tmp_path: Path) -> None:
    a, b = (
        timed(sweep(LINE, DENSE), FAST),
        timed(sweep(BETTER, DENSE), {k: 2 * v for k, v in FAST.items()}, dense="other"),
    )
    found = compare(curve(tmp_path / "a", a), curve(tmp_path / "b", b))
    one = of(found, "latency_ms", "b/l1 one-shot 0.5")
    assert one.change.value == pytest.approx(2) and one.better is None
    assert "over its own dense file each" in one.said
    assert one.said.endswith("their dense files are not the same, so which file is faster is not told")
    assert "speed of each over its own dense file alone" in found.answers[0]


def test_another_machine_and_curves_that_timed_nothing_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = curve(tmp_path / "a", timed(sweep(LINE, DENSE), FAST))
    b = curve(tmp_path / "b", timed(sweep(BETTER, DENSE), FAST, machine="there"))
    found = compare(a, b)
    assert not [d for d in found.differences if d.what == "latency_ms"]
    assert "speeds are not compared: the curves were timed with another machine (here; there)" in found.notes
    assert any(n.startswith("which is faster: curves are timed apart") for n in found.not_tested)
    assert told(a, b) == 0
    words = capsys.readouterr().out
    assert "× dense" in words and "latency ms" not in words
    untimed = compare(a, curve(tmp_path / "c", sweep(BETTER, DENSE)))
    assert "latency of c, whose files were not timed (curve.latency)" in untimed.not_tested
    assert untimed.answers[0].endswith("speed not compared.")


def test_one_seed_has_the_interval_of_its_timings_alone(tmp_path: Path) -> None:
    def one(of: Mapping[float, Sequence[float]], speeds: Mapping[float, float]) -> list[Record]:
        return timed(sweep({k: v[:1] for k, v in of.items()}, DENSE[:1]), speeds, wide=1.2)

    a, b = one(LINE, FAST), one(BETTER, {**FAST, 0.5: 1.8})
    found = compare(curve(tmp_path / "a", a, seeds=[0]), curve(tmp_path / "b", b, seeds=[0]))
    speed = of(found, "latency_ms", "b/l1 one-shot 0.5")
    assert speed.better is None and (speed.change.low, speed.change.high) == pytest.approx((1.2 / 1.44, 1.2 * 1.44))
