"""One report of all that is known of a network: what is of the same network and data is in it, what is not is told apart."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_run import sample

from curve_records import head, sweep, trial
from paredown.records import Measured, Record, append
from paredown.report import render, write_report
from paredown.report.beside import found_beside, runs_to_write

NETWORK, DATA, FILE = "5a" * 32, "98" * 32, "ab12" * 16


def written(folder: Path, records: list[Record]) -> Path:
    folder.mkdir(parents=True)
    for one in records:
        append(folder / "records.jsonl", one)
    (folder / "report.html").write_text("its page")
    return folder


def run(network: str | None = NETWORK, data: str = DATA) -> list[Record]:
    """The sample run; its records say which network and test data it is of."""
    found = sample()
    found[0] = dataclasses.replace(found[0], details={**found[0].details, "network": network})
    found[-1] = dataclasses.replace(found[-1], details={**found[-1].details, "test_data": data})
    return found


def curve(digest: str = FILE, data: str = DATA, amounts: int = 3, task: str = "digits") -> list[Record]:
    """A sweep of three seeds with a control; the base of the first seed is the file with that digest."""
    measured = {0.9 - 0.2 * i: [98.4 - 2 * i, 98.2 - 2 * i, 98.6 - 2 * i] for i in range(amounts)}
    found = sweep(measured, [98.5, 98.3, 98.6])
    found += [trial("scratch", amount, s, 95.0, 94.5 + s / 10, steps=1000) for amount in measured for s in range(3)]
    for i in range(3):
        base = {**found[i].details, "digest": digest if i == 0 else f"{i}" * 64, "test_data": data}
        found[i] = dataclasses.replace(found[i], details=base)
    first = head(cells=len(found))
    return [dataclasses.replace(first, cell={**first.cell, "task": task}), *found]


def sensitivity(network: str = NETWORK, spaces: int = 4) -> list[Record]:
    """Spaces of which the first is hurt least."""
    details = {
        "name": "digits", "metric": {"name": "accuracy", "unit": "%", "goal": "max"}, "dense": 98.0, "distance": "kl", "num_samples": 400,
        "data": "choose_batches", "amounts": [0.5], "spaces": {}, "parameters": {}, "notes": [], "units": {"network": network}, "test_data": DATA,
    }  # fmt: skip
    cell = {"stage": "sensitivity", "task": "digits", "target": "onnxruntime-x86", "recipe_digest": "77ee" * 16}
    out, dice = [Record(cell=cell, details=details)], np.random.default_rng(0)
    for i in range(spaces):
        groups = i + 0.1 * dice.normal(size=16)
        loss = float(groups.mean())
        measured = {"metric_loss": Measured(value=loss, unit="%"), "distance": Measured(value=loss / 100, unit="nat")}
        at = {"stage": "sensitivity-point", "kind": "units", "name": f"space{i}", "kept": 5, "of": 10}
        kept: dict[str, Any] = {"metric": groups.tolist(), "distance": (groups / 100).tolist(), "why": ""}
        out.append(Record(cell=at, measured=measured, details=kept))
    return out


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A run, its curve and its sensitivity, side by side."""
    written(tmp_path / "digits", run())
    written(tmp_path / "digits-curve", curve())
    written(tmp_path / "digits-sensitivity", sensitivity())
    return tmp_path


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.partition("</style>")[2]))


def test_the_report_of_a_run_holds_its_curve_and_its_sensitivity(runs: Path) -> None:
    page = write_report(runs / "digits").read_text(encoding="utf-8")
    for section in (
        "curve-spot",
        "curve-curve",
        "curve-dense",
        "curve-front",
        "sensitivity-spaces",
        "sensitivity-spaces-rank",
    ):
        assert f'<section id="{section}"' in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "no id is there twice"
    targets = re.findall(r'href="#([^"]+)"', page)
    assert set(targets) <= set(ids)
    assert set(re.findall(r'aria-labelledby="([^"]+)"', page)) <= set(ids)
    tables = page.count("<table")
    assert tables == page.count("<caption"), "every table says what it is"
    for name in ("pareto.csv", "points.csv", "curve-sparsity-test.csv", "dense.csv", "sensitivity.csv", "stages.csv"):
        assert f'download="{name}"' in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert len(page.encode()) < 1_000_000
    top = text_of(page.partition('<section id="stages"')[0])
    assert "Cut space0 first" in top and "1.00 points" in top, "the answers of both stand at the top"
    assert top.index("Target met") < top.index("Cut space0 first") < top.index("latency on the phone")
    assert "From digits-curve , recipe abc" in text_of(page)


def test_a_curve_says_in_a_run_what_it_knows_of_the_way_of_that_run(tmp_path: Path) -> None:
    """Two levels here: the sweet spot's verdict, on one shot, is of another network."""
    there = [dataclasses.replace(r, details={**r.details, "reached": {**r.details["reached"], "criterion": "l1"}})
             if str(r.cell["stage"]).startswith("level-") else r for r in run()]  # fmt: skip
    one, shape = curve(amounts=1), {"shapes": "a1"}
    other = [
        trial("pruned", 0.9, s, 96.0, 96.0 + s / 10, schedule="multi-level", steps=100, details=shape) for s in range(3)
    ]
    one = [
        dataclasses.replace(r, details={**r.details, **shape}) if r.cell.get("kind") in ("pruned", "scratch") else r
        for r in one
    ]
    written(tmp_path / "digits", there)
    written(tmp_path / "digits-curve", [*one, *other])
    top = text_of(write_report(tmp_path / "digits").read_text().partition('<section id="stages"')[0])
    assert "the sweet spot is l1 one-shot" in top
    assert "This run prunes by l1 multi-level. Of that, at 0.9: pruning bought" in top
    written(tmp_path / "alone" / "digits", there)
    written(tmp_path / "alone" / "digits-curve", one)
    assert "This run prunes by" not in write_report(tmp_path / "alone" / "digits").read_text()


def test_a_neighbour_without_a_page_is_named_and_not_linked(runs: Path) -> None:
    (runs / "digits-curve" / "report.html").unlink()
    written(runs / "other", curve(digest="f" * 64))
    (runs / "other" / "report.html").unlink()
    page = write_report(runs / "digits").read_text(encoding="utf-8")
    assert set(re.findall(r'href="(\.\./[^"]+)"', page)) == {"../digits-sensitivity/report.html"}
    assert "It has no page of its own yet" in text_of(page)
    assert "other no page yet" in text_of(page)


def test_pages_of_one_task_link_each_other(runs: Path) -> None:
    names = ("digits", "digits-curve", "digits-sensitivity")
    for name in names:
        page = write_report(runs / name).read_text(encoding="utf-8")
        links = set(re.findall(r'href="(\.\./[^"]+)"', page))
        assert links == {f"../{other}/report.html" for other in names if other != name}
        for link in links:
            assert (runs / name / link).parent.is_dir()
    assert "Target met. Recommended: int8.onnx." in text_of((runs / "digits-curve/report.html").read_text())
    assert runs_to_write(runs / "digits-curve") == runs_to_write(runs / "digits-sensitivity") == [runs / "digits"]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (curve(digest="cd" * 32), "another dense network"),
        (curve(data="77" * 32), "other test data (777777777777, here 989898989898)"),
        (curve(data=""), "whether its test data are these is not on record"),
        (sensitivity(network="00" * 32), "another dense network"),
    ],
)
def test_what_is_of_another_network_or_data_is_linked_with_the_reason_alone(
    other: list[Record], why: str, tmp_path: Path
) -> None:
    written(tmp_path / "run", run())
    written(tmp_path / "other", other)
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert why in text_of(page) and 'href="../other/report.html"' in page
    assert 'id="curve-' not in page and 'id="sensitivity-' not in page
    assert runs_to_write(tmp_path / "other") == []


def test_an_earlier_run_does_not_say_its_network(tmp_path: Path) -> None:
    written(tmp_path / "run", run(network=None))
    written(tmp_path / "run" / "sensitivity", sensitivity())
    (found,) = found_beside(tmp_path / "run", run(network=None))
    assert found.link == "sensitivity/report.html"
    assert found.differs == ("whether its dense network is this one is not on record",)


def test_other_tasks_and_broken_neighbours_are_left_out(tmp_path: Path) -> None:
    written(tmp_path / "run", run())
    alone = write_report(tmp_path / "run").read_bytes()
    written(tmp_path / "strangers", curve(task="letters"))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/records.jsonl").write_text('{"cell": {"stage": "curve", "task": "digits"}\n')
    written(tmp_path / "edited", [curve()[0], *(dataclasses.replace(r, cell={}) for r in curve()[1:])])
    assert write_report(tmp_path / "run").read_bytes() == alone
    assert b'id="beside"' not in alone


def test_a_neighbour_whose_sections_cannot_be_made_is_linked_alone(tmp_path: Path) -> None:
    written(tmp_path / "run", run())
    first, *points = sensitivity()
    details = {
        **first.details,
        "notes": [],
        "metric": {"name": "accuracy", "unit": [[]], "goal": "max"},
        "dense": "98 %",
    }
    written(tmp_path / "sensitivity", [dataclasses.replace(first, details=details), *points])
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert 'href="../sensitivity/report.html"' in page and 'id="sensitivity-from"' not in page


def test_names_of_folders_stay_names(tmp_path: Path) -> None:
    written(tmp_path / "run", run())
    written(tmp_path / 'a "><script>', curve(data=""))
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "<script>" not in page and 'href="../a%20%22%3E%3Cscript%3E/report.html"' in page


def test_a_page_that_would_pass_a_megabyte_links_what_it_cannot_hold(tmp_path: Path) -> None:
    found = run()
    many = [
        {"name": f"blocks.{i}.attention.projection_of_queries_keys_and_values.weight", "kind": "conv2d", "parameters": i, "macs": i, "parameter_bytes": i,
         "activation_bytes": i}
        for i in range(300)
    ]  # fmt: skip
    found = [
        dataclasses.replace(r, details={**r.details, "layers": many}) if "layers" in r.details else r for r in found
    ]
    written(tmp_path / "run", found)
    written(tmp_path / "curve", curve(amounts=5))
    written(tmp_path / "sensitivity", sensitivity(spaces=150))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("paredown.report.page.MOST_BYTES", len(render(found).encode()) + 120_000)
        page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert 'id="curve-spot"' in page and 'id="sensitivity-spaces"' not in page
    assert "not in this file, which it would take beyond a megabyte" in page
    assert 'href="../sensitivity/report.html"' in page


def test_a_dense_network_in_codes_that_is_chosen_goes_by_no_line_that_prunes(tmp_path: Path) -> None:
    found = curve(amounts=1)
    found[0] = dataclasses.replace(found[0], details={**found[0].details, "axis": "bytes", "limit": 0.5})
    for i, one in enumerate(found[1:], start=1):
        less = 0.1 if one.cell["kind"] == "base" else 5.0
        own = {
            f"quantized_{n}": dataclasses.replace(one.measured[n], value=one.measured[n].value - less)
            for n in ("held_out", "metric")
        }
        own["quantized_bytes"] = Measured(value=0.25 * one.measured["bytes"].value, unit="B")
        told = {**one.details, "quantized": {"scheme": "int8"}}
        found[i] = dataclasses.replace(one, measured={**one.measured, **own}, details=told)
    written(tmp_path / "digits", run())
    written(tmp_path / "digits-curve", found)
    (beside,) = found_beside(tmp_path / "digits", run())
    assert beside.brief.startswith(
        "the sweet spot is the dense network in INT8 with 75.0 % of the file's bytes removed"
    )
