"""The page of sensitivities: nothing runs in it, names of strangers are escaped, thousands of layers stay under a megabyte."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest

from paredown.errors import RejectedError
from paredown.records import Measured, Record, append
from paredown.report import write_report
from paredown.report.sensitivity import render_sensitivity
from paredown.report.sensitivity_document import sensitivity_document

BAD = '</style><script>alert("x")</script>{{ 7*7 }}'


def head(**details: object) -> Record:
    known = {
        "name": "nets", "metric": {"name": "error", "unit": "g", "goal": "min"}, "dense": 210.0, "distance": "mse",
        "num_samples": 400, "data": "choose_batches", "amounts": [0.5, 0.25], "spaces": {}, "parameters": {}, "notes": [BAD],
    }  # fmt: skip
    return Record(cell={"stage": "sensitivity", "task": BAD, "target": "onnxruntime-x86"}, details={**known, **details})


def point(name: str, kept: int, of: int, loss: float | None, groups: np.ndarray | None = None) -> Record:
    many = [] if groups is None else groups.tolist()
    return Record(
        cell={"stage": "sensitivity-point", "kind": "units", "name": name, "kept": kept, "of": of},
        measured={
            "metric_loss": Measured(value=loss, unit="g", badge="not tested" if loss is None else "measured"),
            "distance": Measured(
                value=None if loss is None else loss / 100, unit="", badge="not tested" if loss is None else "measured"
            ),
        },
        details={
            "metric": many,
            "distance": [v / 100 for v in many],
            "why": "RuntimeError: no" if loss is None else "",
        },
    )


def clear(number: int = 5) -> list[Record]:
    """Space i loses about i grams per half that leaves."""
    rng = np.random.default_rng(0)
    made = [head()]
    for i in range(number):
        for kept, factor in ((5, 1.0), (2, 2.0)):
            groups = i * factor + 0.1 * rng.normal(size=16)
            made.append(point(f"layer{i}", kept, 10, float(groups.mean()), groups))
    return made


def test_the_order_is_that_of_the_losses() -> None:
    found = sensitivity_document(clear())["units"]
    assert found["order"] == [f"layer{i}" for i in range(5)] and found["columns"] == [50.0, 25.0]
    assert found["ordered_by"] == "metric" and found["stability"]["metric"]["tau"] == 1.0
    assert found["stability"]["between"] == pytest.approx(1.0)
    assert "Cut layer0 first" in found["sentence"] and "leave layer4 alone" in found["sentence"]
    assert "+4.0" in found["sentence"]  # a smaller error is better: what is lost is added


def test_an_order_of_noise_is_not_to_be_relied_on() -> None:
    rng = np.random.default_rng(1)
    noise = [point(f"l{i}", 5, 10, 0.0, rng.normal(size=32)) for i in range(12)]
    assert "Do not rely on the order" in sensitivity_document([head(), *noise])["verdict"]


def test_one_number_for_all_samples_is_told_as_why_the_order_was_not_tested() -> None:
    rng = np.random.default_rng(1)
    noise = [point(f"l{i}", 5, 10, float(i), rng.normal(size=32)) for i in range(12)]
    one_number = [dataclasses.replace(p, details={**p.details, "metric": []}) for p in noise]
    found = sensitivity_document([head(), *one_number])["units"]
    assert found["ordered_by"] == "metric" and found["stability"]["distance"]["low"] < 0.5
    assert "not tested: evaluate returns one number for all samples, not one for each." in found["sentence"]


def test_units_that_only_come_near_an_amount_stand_in_its_column() -> None:
    some = [point("a", 5, 11, 1.0), point("b", 48, 96, 2.0), point("b", 23, 96, 3.0)]
    assert sensitivity_document([head(), *some])["units"]["columns"] == [50.0, 25.0]


def test_a_space_of_few_units_is_not_ranked_by_its_mild_amounts_alone() -> None:
    """Three heads lose more than twelve at every share that both have; their plain mean, 4.0, is less than 4.5."""
    losses = {("few", 3): {2: 2.0, 1: 6.0}, ("many", 12): {9: 0.5, 6: 1.5, 3: 4.0, 1: 12.0}}
    points = [
        point(name, kept, of, loss, loss + 0.01 * np.random.default_rng(kept).normal(size=8))
        for (name, of), found in losses.items()
        for kept, loss in found.items()
    ]
    found = sensitivity_document([head(amounts=[0.75, 0.5, 0.25, 0.1]), *points, *clear(1)[1:]])["units"]
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["many"]["mean_metric_loss"] == pytest.approx(4.5)
    by_hand = np.mean([1.5, 4.0, 6 + 12 * (1 / 3 - 0.25), 6 + 12 * (1 / 3 - 0.1)])  # 12 more for each whole that leaves
    assert rows["few"]["mean_metric_loss"] == pytest.approx(by_hand)
    assert found["order"].index("many") < found["order"].index("few")
    assert "have too few units for every amount" in found["sentence"]


def test_what_failed_is_marked_and_takes_no_rank() -> None:
    document = sensitivity_document([*clear(), point("odd", 5, 10, None)])
    odd = next(r for r in document["units"]["rows"] if r["name"] == "odd")
    assert odd["rank"] is None and "odd" not in document["units"]["order"]
    page = render_sensitivity([*clear(), point("odd", 5, 10, None)])
    assert 'title="RuntimeError: no"><span class="badge">not tested</span>' in page


def test_what_failed_stands_in_the_printed_table_and_its_reason_in_the_sentence() -> None:
    from paredown.cli.sensitivity import told

    odd = point("odd", 5, 10, None)
    odd = dataclasses.replace(odd, details={**odd.details, "why": "RuntimeError: no."})
    document = sensitivity_document([head(), point("whole", 5, 10, 1.0), odd])
    shown = [[str(cell) for cell in column.cells] for column in told(document)[0].columns]
    assert [name.split()[0] for name in shown[0]] == ["whole", "odd"]
    assert "not tested" in shown[1]
    assert "Only 1 of 2 spaces has all its numbers: no order" in document["verdict"]
    assert "(odd: RuntimeError: no)." in document["verdict"]


def test_where_the_metric_is_the_same_everywhere_the_outputs_give_the_order() -> None:
    """Of twelve layers that lose nothing the last in an order by loss would be left alone for no reason."""
    rng = np.random.default_rng(2)
    same = []
    for i in range(4):
        moved = 1e-3 * (i + 1) + 1e-6 * rng.normal(size=16)
        one = point(f"l{i}", 5, 10, 0.0, np.zeros(16))
        distance = Measured(value=float(moved.mean()), unit="")
        same.append(
            dataclasses.replace(
                one, measured={**one.measured, "distance": distance},
                details={**one.details, "distance": moved.tolist()},
            )
        )  # fmt: skip
    for told in (same, [dataclasses.replace(r, details={"metric": [], "distance": []}) for r in same]):
        found = sensitivity_document([head(), *told])["units"]
        assert found["ordered_by"] == "distance"
        assert re.search(r"outputs move by 0\.001\d*, error ±0 g", found["sentence"])


@pytest.mark.parametrize("repair", [True, False])
def test_readers_that_were_fitted_anew_are_told(repair: bool) -> None:
    records = [head(units={"repair": repair}), *clear()[1:]]
    assert sensitivity_document(records)["repair"] is repair
    said = "the layers that read it are fitted anew by least squares (prune.reconstruct), everything else stays dense"
    assert (said in render_sensitivity(records)) is repair


def test_the_verdict_says_that_the_order_is_by_the_mean() -> None:
    """One amount is quoted: there another space may lose more than the one to leave alone."""
    found = sensitivity_document(clear())
    assert "The order, by error (mean over 2 amounts), holds" in found["verdict"]
    one = [head(amounts=[0.5]), *(r for r in clear()[1:] if r.cell["kept"] == 5)]
    assert "The order, by error, holds" in sensitivity_document(one)["verdict"]


def test_calibration_samples_are_not_called_held_out() -> None:
    assert "400 held-out samples, from choose_batches" in render_sensitivity(clear())
    page = render_sensitivity([head(data="calibration_batches", metric=None), *clear()[1:]])
    assert "400 calibration samples (which training may have seen), from calibration_batches" in page
    assert "held-out" not in page.lower()


def test_nothing_runs_and_nothing_is_fetched() -> None:
    page = render_sensitivity([*clear(), point(BAD, 5, 10, 1.0)])
    assert "<script" not in page and "{{ 7*7 }}" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page) and "http:" not in page and "https:" not in page
    assert all(tag in page for tag in ('scope="col"', 'scope="row"', 'lang="en"', "Skip to the verdict"))


def test_thousands_of_layers_stay_under_a_megabyte() -> None:
    many = clear(1200)
    page = render_sensitivity(many)
    assert len(page.encode()) < 1_000_000 and "and 950 more rows" in page


def test_the_csv_holds_every_figure() -> None:
    page = render_sensitivity(clear())
    data = re.search(r'download="sensitivity.csv" href="data:text/csv;charset=utf-8;base64,([^"]+)"', page)
    assert data is not None
    lines = list(csv.DictReader(io.StringIO(base64.b64decode(data[1]).decode())))
    assert (
        len(lines) == 10
        and lines[9]["name"] == "layer4"
        and float(lines[9]["metric_loss"]) == pytest.approx(8, abs=0.2)
    )


def test_a_folder_is_reported_again_from_its_records(tmp_path: Path) -> None:
    for record in clear():
        append(tmp_path / "records.jsonl", record)
    assert write_report(tmp_path).read_text() == render_sensitivity(clear())


def test_other_records_are_refused() -> None:
    with pytest.raises(RejectedError, match="paredown sensitivity"):
        sensitivity_document([Record(cell={"stage": "dense"})])
