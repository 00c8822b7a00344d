"""The page of a curve: every number of it from the records, nothing fetched, small however many trials, names escaped."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import itertools
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curve_records import head, sweep, trial
from paredown.errors import RejectedError
from paredown.records import Measured, Record
from paredown.report.curve_document import curve_document
from paredown.report.curve_figures import ticks
from paredown.report.curve_view import curve_view
from paredown.report.curves import render_curve, write_curve_report

MEASURED = {0.75: [98.4, 98.2, 98.6], 0.5: [98.0, 97.8, 97.9], 0.25: [92.0, 94.0, 90.0]}
DENSE = [98.5, 98.3, 98.6]


def records(*, failed: bool = False, **details: Any) -> list[Record]:
    found = sweep(MEASURED, DENSE)
    found += sweep({a: [v - 0.3 for v in vs] for a, vs in MEASURED.items()}, DENSE, schedule="multi-level")[3:]
    for amount in MEASURED:
        for kind in ("scratch", "thin", "random"):
            found += [trial(kind, amount, s, 96.0 + s / 10, 95.5 + s / 10, steps=1000) for s in range(3)]
    lost: list[dict[str, Any]] = []
    if failed:
        gone = next(r for r in found if r.cell["kind"] == "pruned" and r.cell["amount"] == 0.5)
        found.remove(gone)
        tail = ["Traceback", "RuntimeError: <b>the loss</b> is no number"]
        lost.append({**gone.cell, "name": "l1 one-shot, 0.5", "status": "crashed", "reason": tail[-1], "tail": tail})
    recipes = {r.cell["digest"]: f"trials/{i:04d}/recipe.yaml" for i, r in enumerate(found)}
    return [head(cells=len(found) + len(lost), failed=lost, recipes=recipes, **details), *found]


class Page(HTMLParser):
    """Tags, links, ids and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def csv(self, name: str) -> list[list[str]]:
        (link,) = [a["href"] for tag, a in self.tags if tag == "a" and a.get("download") == name]
        assert link is not None
        return [*csv.reader(io.StringIO(base64.b64decode(link.partition("base64,")[2]).decode()))]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_curve(records()))


def test_it_says_what_was_chosen_and_whether_pruning_paid(page: Page) -> None:
    text = re.sub(r"\s+", " ", page.text)
    assert "Take 50.0 % of the weights out: l1 one-shot" in text
    assert "the largest reduction whose one-sided 95 % bound on the loss, 0.70 points, is within 1.00 points" in text
    assert "At the sweet spot (0.5 remains, l1 one-shot), pruning bought" in text
    assert "pruning is better" in text
    assert "test data chose nothing" in text


def test_the_first_section_says_what_it_costs_and_what_was_not_tested(page: Page) -> None:
    strip = strip_of(render_curve(records()))
    assert "worse than dense" in strip and "dense 98.47 %: −0.57 points, worse than dense" in strip
    assert (
        '<span class="badge">not tested</span> quantized files, such as INT8 (curve.quantized); latency (curve.latency);'
        in strip
    )
    assert "a random criterion" not in strip.partition("not tested</span>")[2]  # it has results here
    gained = sweep({0.5: [99.0, 99.1]}, [98.5, 98.4])
    lost = [{**gained[-1].cell, "amount": 0.25, "status": "crashed"}]
    strip = strip_of(render_curve([head(cells=4, limit=None), *gained]))
    assert "mean gain 0.60 points on held-out data" in strip and "+0.60 points</b><small>better than dense" in strip
    untested = strip_of(render_curve([head(cells=9, failed=lost), *gained])).partition("not tested</span>")[2]
    assert "the same shape from scratch" in untested and "1 of 9 trials, which have no result" in untested
    alone = strip_of(render_curve([head(cells=2), *sweep({0.5: [99.0]}, [98.5])]))
    assert "other seeds, so that nothing here has an interval" in alone


def test_without_a_limit_it_says_the_chord() -> None:
    assert "farthest above the chord" in render_curve(records(limit=None))


def strip_of(source: str) -> str:
    """The first section of the page, as markup without line ends."""
    return re.sub(r"\s+", " ", source[source.index('<section id="spot"') : source.index("</section>")])


def test_the_strip_claims_nothing_over_what_is_not_comparable() -> None:
    badge = '<span class="badge">not comparable</span>'
    assert badge not in strip_of(render_curve(records()))
    found = sweep(MEASURED, DENSE)
    found += [trial("scratch", 0.5, s, 96.0, 95.5 + s / 10, steps=500) for s in range(3)]
    strip = strip_of(render_curve([head(cells=len(found)), *found]))
    assert (
        f"{badge} At the sweet spot (0.5 remains, l1 one-shot), not comparable (it was trained for 500 steps" in strip
    )
    assert "bought" not in strip
    found += [trial("thin", 0.5, s, 95.0, 95.5, steps=1000) for s in range(3)]
    strip = strip_of(render_curve([head(cells=len(found)), *found]))
    assert "<li>At the sweet spot (0.5 remains, l1 one-shot), pruning bought" in strip
    assert f"{badge} Not comparable (it was trained for 500 steps" in strip and strip.count(badge) == 1


def controls(amount: float, test: float, *, steps: int = 1000, kind: str = "thin") -> list[Record]:
    return [trial(kind, amount, s, 90.0, test + s / 10, steps=steps) for s in range(3)]


@pytest.mark.parametrize(
    ("added", "answer"),
    [
        (controls(0.5, 90.0), "Not a uniformly thinner dense network: pruning is better."),
        ([*controls(0.5, 90.0), *controls(0.5, 90.5, kind="scratch")], "No: pruning is better."),
        ([*controls(0.5, 90.0), *controls(0.5, 97.8, kind="scratch")], "No difference shows."),
        (controls(0.5, 99.5), "Yes: a dense one is better."),
        (controls(0.5, 97.8), "No difference shows."),
        (controls(0.5, 90.0, steps=100), "Not answered: no dense network here compares."),
        (controls(0.75, 90.0), "Not tested at the sweet spot."),
        ([trial("random", 0.5, s, 90.0, 90.0) for s in range(3)], "Not tested."),
    ],
)
def test_the_dense_question_is_answered_in_a_few_words(added: list[Record], answer: str) -> None:
    strip = strip_of(render_curve([head(cells=12), *sweep(MEASURED, DENSE), *added]))
    assert f"Would a smaller dense network have done as well?</strong> {answer}</p>" in strip


def test_controls_that_stand_elsewhere_are_not_tested_at_the_sweet_spot() -> None:
    found = [*sweep(MEASURED, DENSE), *controls(0.75, 90.0), *controls(0.25, 90.0)]
    untested = strip_of(render_curve([head(cells=15), *found])).partition("not tested</span>")[2]
    assert "all controls at the sweet spot, 0.5 (sweet-spot in curve.controls.amounts)" in untested
    untested = strip_of(render_curve(records())).partition("not tested</span>")[2]
    assert "all controls at the sweet spot" not in untested


def test_few_seeds_are_told_before_anyone_relies_on_their_intervals() -> None:
    assert "3 seeds: an interval called 95 % is then the range of the seeds" in render_curve(records())
    five = sweep({0.5: [98.0, 98.1, 98.2, 98.3, 98.4]}, [98.5] * 5)
    assert "interval called 95 %" not in render_curve([head(cells=10, seeds=[*range(5)]), *five])
    assert "interval called 95 %" not in render_curve([head(cells=2, seeds=[0]), *sweep({0.5: [99.0]}, [98.5])])


@pytest.mark.parametrize(
    ("here", "held", "tested", "known"),
    [(False, 99.8, 91.7, True), (True, 99.8, 91.7, False), (False, 92.0, 91.7, False), (False, 91.7, 99.8, False), (None, 99.8, 91.7, False)],
)  # fmt: skip
def test_held_out_data_that_a_trained_base_has_seen_are_told(
    here: bool | None, held: float, tested: float, known: bool
) -> None:
    found = sweep({0.5: [held - 1.0] * 3}, [held] * 3, test={0.5: [tested - 0.4] * 3})
    for number, record in enumerate(found):
        if record.cell["kind"] == "base":
            ends = {"held_out": held, "metric": tested}
            told = {
                k: dataclasses.replace(record.measured[k], value=v, low=v - 0.5, high=v + 0.5) for k, v in ends.items()
            }
            own = {} if here is None else {"trained_here": here}
            found[number] = dataclasses.replace(
                record, measured={**record.measured, **told}, details={**record.details, **own}
            )
    text = re.sub(r"\s+", " ", Page(render_curve([head(cells=6), *found])).text)
    assert ("seems to have been trained on the held-out data: 99.80 % there, 91.70 % on test data" in text) is known
    assert ("(here 1.00 points and, on test data, 0.40 points)" in text) is known


def test_an_interval_without_width_is_no_certainty() -> None:
    strip = strip_of(render_curve(records()))
    assert "chosen in nearly every resampling of the 3 seeds" in strip
    assert "95 % interval 50.0 to 50.0 %" not in strip and "in nearly every resampling of the 3 seeds" in strip


def test_amounts_say_what_they_are_of_and_schedules_what_they_do() -> None:
    found = records()
    assert "amount 0.5 in the recipe" in strip_of(render_curve(found))
    for record in found[1:]:
        if record.cell["kind"] == "pruned":
            record.details["reached"] = {"budget": {"macs": record.cell["amount"]}}  # type: ignore[index]
    page = re.sub(r"\s+", " ", render_curve(found))
    assert "0.5 of the MACs remain, by the recipe" in page and "“remains” is the recipe's amount, of the MACs." in page
    assert "<b>one-shot</b>, everything leaves at once" in page and "<b>multi-level</b>, in two levels" in page
    assert "<b>lottery</b>" not in page


def test_controls_that_flatten_the_lines_leave_room_for_a_closer_look() -> None:
    assert "without the dense controls" not in render_curve(records())
    low = [trial(kind, 0.5, s, 40.0, 40.0 + s / 10, steps=1000) for kind in ("scratch", "thin") for s in range(3)]
    near = Page(render_curve([head(cells=18), *sweep(MEASURED, DENSE), *low]))
    assert sum(tag == "figure" for tag, _ in near.tags) == 7
    rows = near.csv("curve-sparsity-test-closer.csv")[1:]
    assert {r[0] for r in rows} == {"l1 one-shot"} and len(rows) == 4
    assert len(near.csv("curve-sparsity-test.csv")) == 1 + 4 + 2 * 2


def test_the_limit_is_drawn_where_it_is_held_against_the_lines() -> None:
    levels = [a for tag, a in Page(render_curve(records())).tags if a.get("class") == "level"]
    assert len(levels) == 1
    (at,) = re.findall(r"M52 ([\d.]+)H", str(levels[0]["d"]))
    first = render_curve(records()).partition("</svg>\n<figcaption")[0]
    (top, high), (low_at, low) = [
        (float(y) - 4, float(v)) for y, v in re.findall(r'y="([\d.]+)" text-anchor="end">(\d+)</text>', first)
    ][:2]
    value = high + (float(at) - top) * (low - high) / (low_at - top)
    assert value == pytest.approx(np.mean(DENSE) - 1.0, abs=0.02)  # what is told at a height, by the ticks
    assert not re.search('class="level"', render_curve(records(limit=None)))


def test_words_at_the_sweet_spot_stand_where_nothing_is_drawn() -> None:
    from paredown.report.curve_figures import Dot, Mark, Series, chart

    def dots(*places: tuple[float, float]) -> tuple[Dot, ...]:
        return tuple(Dot(x=x, y=y, low=y - 1, high=y + 1, told="") for x, y in places)

    falling = Series(name="a", dots=dots((0, 90), (20, 20), (40, 20)))
    drawn = chart([falling], x_title="x", y_title="y", alt="", mark=Mark(x=20, y=20, low=None, high=None)).markup
    (x, y, side) = re.findall(r'class="spotted" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)"', drawn)[0]
    left = float(x) - 96 if side == "end" else float(x)
    ring = re.findall(r'class="ring" cx="([\d.]+)" cy="([\d.]+)"', drawn)[0]
    assert not (left < float(ring[0]) < left + 96 and abs(float(y) - float(ring[1])) < 9)
    assert float(y) < 240  # the line runs along the bottom


def test_the_file_to_ship_says_its_own_figure_beside_the_means() -> None:
    strip = strip_of(render_curve(records()))
    assert (
        "98.00 % on test data (the dense network of this seed 98.50 %); the figures above are means over 3 seeds"
        in strip
    )
    assert "60.0 % smaller" not in strip and "50.0 % fewer MACs" in strip and "dense 0.402 MB" in strip


def test_the_most_that_was_tried_is_no_limit_of_what_can_be_removed() -> None:
    most = "more than 60.0 % removed, the most that was tried (curve.amounts)"
    assert most not in strip_of(render_curve(records())), "90 % were tried, and cost too much"
    found = sweep({0.4: [98.0, 98.1, 98.2], 0.6: [98.3, 98.4, 98.5]}, DENSE)
    assert most in strip_of(render_curve([head(cells=len(found)), *found]))
    assert most not in strip_of(render_curve([head(cells=len(found), limit=None), *found]))
    lost = {
        "kind": "pruned",
        "method": "l1",
        "schedule": "one-shot",
        "amount": 0.2,
        "seed": 0,
        "digest": "x",
        "name": "x",
        "status": "crashed",
        "reason": "r",
        "tail": [],
    }
    gone = [dict(lost, seed=s, digest=f"x{s}") for s in range(3)]
    assert most not in strip_of(render_curve([head(cells=len(found) + 3, failed=gone), *found])), (
        "more was tried, in vain"
    )


def test_zeros_that_save_nothing_in_the_file_are_told(page: Page) -> None:
    told = "zeros are stored and multiplied like other weights here"
    found = sweep({0.5: [98.0, 98.1, 98.2]}, DENSE)
    at = [i for i, r in enumerate(found) if r.cell["kind"] == "pruned"]
    for i in at:
        same = {k: found[0].measured[k] for k in ("bytes", "macs")}
        found[i] = dataclasses.replace(found[i], measured={**found[i].measured, **same})
    assert told in strip_of(render_curve([head(cells=len(found)), *found]))
    assert told not in page.text


def test_steps_of_what_is_pruned_stand_behind_those_of_its_base(page: Page) -> None:
    base, pruned = (next(p.steps for p in curve_view(records()).points if p.kind == k) for k in ("base", "pruned"))
    assert base and pruned
    assert f"{base:,.0f} + {pruned:,.0f}" in page.text and "MB1,000" in page.text, "from scratch there is no base"


def test_a_control_of_another_lines_shape_says_whose() -> None:
    page = Page(render_curve(records()))
    text = re.sub(r"\s+", " ", page.text)
    assert "the shape of l1 one-shot from scratch" in text and "it has the shape of l1 one-shot" in text
    told = [r for r in page.csv("dense.csv")[1:] if r[2] == "scratch"]
    assert {r[0]: (r[7], r[8]) for r in told} == {
        "l1 one-shot": ("True", ""),
        "l1 multi-level": ("False", "it has the shape of l1 one-shot"),
    }


def test_every_chart_has_a_csv_of_its_own_numbers(page: Page) -> None:
    figures = sum(tag == "figure" for tag, _ in page.tags)
    names = [a["download"] for tag, a in page.tags if tag == "a" and "download" in a]
    assert figures == sum(str(n).startswith("curve-") for n in names) == 5
    table = page.csv("curve-sparsity-held-out.csv")
    row = next(r for r in table if r[:2] == ["l1 one-shot", "0.5"])
    assert float(row[4]) == pytest.approx(np.mean(MEASURED[0.5]))
    assert (float(row[5]), float(row[6])) == pytest.approx((97.8, 98.0))
    assert len(table) == 1 + 5 * 4
    assert len(page.csv("points.csv")) == 1 + 1 + 5 * 3
    assert len(page.csv("dense.csv")) == 1 + 2 * 3 * 3


def test_the_front_has_the_recipe_and_command_of_each_point(page: Page) -> None:
    rows = page.csv("pareto.csv")[1:]
    assert [r[0] for r in rows][:2] == ["dense", "l1 one-shot"]
    assert all(re.fullmatch(r"trials/\d{4}/recipe\.yaml", r[-1]) for r in rows)
    assert re.search(r"paredown compress trials/\d{4}/recipe\.yaml", page.text)


def test_a_random_criterion_that_wins_stands_on_the_front() -> None:
    """A front that leaves it out would list points that it beats."""
    found = sweep(MEASURED, DENSE) + [trial("random", 0.1, s, 99.5, 99.5) for s in range(3)]
    front = curve_document([head(cells=len(found)), *found])["pareto"]
    assert [(p["amount"], round(p["removed"]["parameters"])) for p in front] == [(0.1, 90)]


def test_charts_draw_what_the_records_say(page: Page) -> None:
    charts = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert len(charts) == 5
    assert all("All numbers are in the CSV" in str(c["aria-label"]) for c in charts)
    assert sum(a.get("class") == "ring" for tag, a in page.tags if tag == "circle") == 5
    bands = [a for tag, a in page.tags if tag == "rect" and a.get("class") == "band"]
    assert len(bands) == 2  # where the choice was made, and its worth on the same axis
    full = [a for _, a in page.tags if a.get("class") == "dot-full"]
    assert len(full) == 5 * 5 * 4 + 5  # charts × lines × points, and the signs of the legend
    for found in full:
        if "cx" in found:
            assert 0 <= float(str(found["cx"])) <= 440
            assert 0 <= float(str(found["cy"])) <= 330


def test_a_failed_trial_is_told_hollow_and_not_chosen() -> None:
    page = Page(render_curve(records(failed=True)))
    assert "Trials without a result" in page.text
    assert "RuntimeError: <b>the loss</b> is no number" in page.text  # as text, not as a tag
    assert not any(tag == "b" and "loss" in str(a) for tag, a in page.tags)
    assert any(a.get("class") == "dot-hollow" for _, a in page.tags)
    assert "Take 25.0 % of the weights out" in page.text or "l1 multi-level" in page.text
    assert page.csv("failed.csv")[1][1] == "crashed"


def test_no_script_no_network_and_valid_structure(page: Page) -> None:
    source = render_curve(records(failed=True))
    assert not re.search(r"<script|<link|<iframe|javascript:|https?://|@import|url\(", source)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {str(a["href"])[1:] for tag, a in page.tags if tag == "a" and str(a.get("href", "")).startswith("#")}
    assert targets <= set(map(str, ids))
    files = [str(a.get("aria-label")) for tag, a in page.tags if tag == "a" and "download" in a]
    assert len(files) == len(set(files)) and all(f.startswith("CSV") for f in files), "links are told apart by name"
    assert "default-src 'none'" in source
    assert len(source) < 300_000


def test_names_are_only_text() -> None:
    bad = "<script>alert(1)</script>"
    found = records(name=bad)
    for record in found[1:]:
        if record.cell["kind"] == "pruned":
            record.cell["method"] = bad  # type: ignore[index]
    source = render_curve(found)
    assert "<script" not in source
    assert "&lt;script&gt;" in source


def timed(*, low: float = 1.02, protocol: str = "median; 1 thread") -> list[Record]:
    """Trials with latencies; every interval of a speed reaches down to `low`."""
    ms = {None: 1.2, 0.75: 0.9, 0.5: 0.7, 0.25: 0.5}
    found = []
    for r in sweep(MEASURED, DENSE):
        own = {"latency_ms": Measured(value=ms[r.cell["amount"]], unit="ms", timing=True, protocol=protocol)}
        if r.cell["kind"] != "base":
            own["speedup"] = Measured(value=1.2 / ms[r.cell["amount"]], unit="×", low=low, high=3.0, timing=True)
        found.append(dataclasses.replace(r, measured={**r.measured, **own}))
    return [head(), *found]


def test_timed_curves_say_what_latency_removed_is_against() -> None:
    said = "Latency removed is against the dense float32 file that took turns with each file"
    assert said in render_curve(timed()) and said not in render_curve(records())


def test_a_latency_that_no_timing_tells_from_the_dense_one_is_no_saving() -> None:
    doubt = "less latency: no difference that shows, the timings of a seed overlap those of its dense file"
    assert "41.7 % less latency" in render_curve(timed()) and doubt not in render_curve(timed())
    assert doubt in render_curve(timed(low=0.9))
    said = "Latency: 12 of 12 files were timed beside other load, or throttled"
    assert said in render_curve(timed(protocol="median; 1 thread; unsteady: both series were disturbed"))
    assert "Latency: " not in Page(render_curve(timed())).text


def test_one_seed_has_no_interval_anywhere() -> None:
    one = [r for r in records(seeds=[0]) if r.cell.get("seed", 0) == 0]
    page = Page(render_curve(one))
    assert "one seed" in page.text
    assert "For a choice give two seeds or more (curve.seeds)" in page.text and "train longer" not in page.text
    assert not any(a.get("class") == "bar" for _, a in page.tags)
    assert "± 0.00" not in page.text


def test_it_names_the_file_to_ship_and_what_makes_it_again() -> None:
    found = records()
    for number, record in enumerate(found[1:]):
        record.details["file"] = f"{number}.onnx"  # type: ignore[index]
    at = next(i for i, r in enumerate(found[1:]) if r.cell["digest"] == "pruned-l1-one-shot-0.5-0")
    text = re.sub(r"\s+", " ", Page(render_curve(found)).text)
    assert f"What to ship: trials/{at:04d}/{at}.onnx, of seed 0" in text
    assert f"paredown compress trials/{at:04d}/recipe.yaml makes it again" in text
    strict = [dataclasses.replace(found[0], details={**found[0].details, "limit": 0.0}), *found[1:]]
    text = re.sub(r"\s+", " ", Page(render_curve(strict)).text)
    assert "No sweet spot" in text and re.search(
        r"What to ship: the dense network \(trials/(\d{4})/\d\.onnx, of seed \d, the best of 3 on held-out data\)", text
    )
    assert "allow a larger loss (curve.limit)" in text and "recover.epochs" in text


def test_the_seed_that_is_best_on_held_out_data_is_shipped_whatever_the_test_data_say() -> None:
    """The first seed's base had learnt nothing, and its file was the one to ship."""
    found = sweep({0.5: [1.0, 97.9, 97.5]}, [1.0, 98.0, 98.0])
    recipes = {r.cell["digest"]: f"trials/{i:04d}/recipe.yaml" for i, r in enumerate(found)}
    for record in found:
        record.details["file"] = "model.onnx"  # type: ignore[index]
    strip = strip_of(render_curve([head(cells=len(found), limit=1.0, recipes=recipes), *found]))
    at = next(i for i, r in enumerate(found) if r.cell["digest"] == "pruned-l1-one-shot-0.5-1")
    assert f"<code>trials/{at:04d}/model.onnx</code>, of seed 1, the best of 3 on held-out data" in strip
    page = Page(render_curve([head(cells=len(found), limit=1.0, recipes=recipes), *found]))
    assert [row[-1] for row in page.csv("points.csv")[1:] if row[:2] == ["l1 one-shot", "0.5"]] == [
        f"trials/{at:04d}/recipe.yaml"
    ]


def test_dense_networks_of_which_one_learnt_little_are_told() -> None:
    told = "The dense networks of the seeds reach from 1.00 % to 98.00 % on held-out data"
    found = sweep({0.5: [1.0, 97.9, 97.5]}, [1.0, 98.0, 98.0])
    assert told in Page(render_curve([head(cells=len(found), limit=1.0), *found])).text
    assert "The dense networks of the seeds reach" not in Page(render_curve(records())).text
    assert told not in Page(render_curve([head(cells=len(found), limit=None), *found])).text
    assert told not in Page(render_curve([head(cells=len(found), limit=0.0), *found])).text


def test_without_held_out_data_the_test_data_choose_nothing() -> None:
    found: list[Record] = [head(cells=4)]
    found += [trial("base", None, s, None, 98.0) for s in (0, 1)]
    found += [trial("pruned", 0.5, s, None, 98.0) for s in (0, 1)]
    page = Page(render_curve(found))
    assert "No sweet spot" in page.text
    assert "test data choose nothing" in page.text
    assert curve_document(found)["sweet_spot"]["line"] is None


def test_ten_thousand_trials_give_a_small_page_in_seconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    amounts = [round(0.99 - 0.0097 * i, 4) for i in range(100)]
    dense, many = [98.0] * 10, []
    for number in range(10):
        line = {a: [*(98 - (2 + number) * (1 - a) ** 2 + rng.normal(0, 0.1, 10))] for a in amounts}
        many += sweep(line, dense, method=f"method {number}")[(10 if number else 0) :]
    failed = [
        {
            **trial("pruned", a, 99, None, 0.0).cell,
            "name": "x",
            "status": "crashed",
            "reason": "why",
            "tail": ["t" * 300] * 12,
        }
        for a in amounts
    ]
    assert len(many) > 10_000
    start = time.process_time()
    path = write_curve_report(tmp_path, [head(cells=10_110, failed=failed), *many])
    assert time.process_time() - start < 20
    assert path.stat().st_size < 1_000_000
    text = path.read_text()
    assert "3 more lines" in text
    assert "drawn with some of their points" in text


def test_the_document_is_plain_json_with_what_remains_and_what_was_removed() -> None:
    document = curve_document(records(failed=True))
    assert (
        document["dense_answer"] == "Not a uniformly thinner dense network: pruning is better."
    )  # scratch is of another shape
    assert "latency (curve.latency)" in document["not_tested"]
    assert document["doubts"][0].startswith("3 seeds: ")
    assert document["trials"]["failed"] == 1
    assert {line["name"] for line in document["lines"]} >= {"l1 one-shot", "a random criterion"}
    point = document["lines"][0]["points"][-1]
    assert (point["amount"], round(point["removed"]["parameters"])) == (0.25, 75)
    assert point["loss"]["upper"] >= point["loss"]["mean"]
    marked = next(p for p in document["lines"][0]["points"] if p["amount"] == 0.5)
    assert (marked["seeds"], len(marked["failed"])) == ([1, 2], 1)


@pytest.mark.parametrize("bad", [[], [Record(cell={"stage": "dense"})]])
def test_other_records_are_refused(bad: list[Record]) -> None:
    with pytest.raises(RejectedError, match="must begin with the record that describes it"):
        curve_view(bad)


def test_a_journal_whose_last_line_is_gone_is_refused() -> None:
    """A torn line is not read: what is left would be a curve of other seeds."""
    found = [head(cells=9), *sweep(MEASURED, DENSE)]
    with pytest.raises(RejectedError, match=r"Got none of seed 2 for l1 one-shot, 0\.25\. Restore records\.jsonl"):
        curve_view(found[:-1])


@pytest.mark.parametrize("broken", ["training", "held_out"])
def test_a_record_without_its_figures_is_refused_by_name(broken: str) -> None:
    found = records()
    if broken == "training":
        found[3].details["training"] = {"recover": 0.5}  # type: ignore[index]
    else:
        at = next(i for i, r in enumerate(found) if r.cell.get("kind") == "pruned" and r.cell["seed"] == 1)
        own = {k: v for k, v in found[at].measured.items() if k != "held_out"}
        found[at] = dataclasses.replace(found[at], measured=own)
    with pytest.raises(RejectedError, match=r"Was records\.jsonl edited|Got none of seed 1 for l1 one-shot, 0\.75"):
        render_curve(found)


def test_an_edited_journal_is_refused() -> None:
    found = records()
    del found[3].cell["seed"]  # type: ignore[attr-defined]
    with pytest.raises(RejectedError, match=r"Was records\.jsonl edited"):
        curve_view(found)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 81.0), (97.123, 97.125), (0.0, 1e6), (-5.0, -4.9)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    assert len({round(b - a, 9) for a, b in itertools.pairwise(found)}) == 1
