"""The page: whole, harmless whatever the names are, and honest about what nobody measured."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sample_run import MACHINE, exported, insight, layers, measured, record, sample, verdict

from paredown.errors import MissingError, RejectedError
from paredown.records import Measured, Record, append
from paredown.report import page, render, write_report
from paredown.report.insight import roofline
from paredown.report.reading import stage_of_device, view
from paredown.report.wording import digits, mebibytes, megabytes

VOID = {"meta", "br", "img", "input", "hr", "link"}
ALLOWED = set(
    "html head meta title style body a header h1 h2 h3 p nav ul li main section div span b strong small table caption thead tbody tfoot tr th td svg rect polyline circle path pre code dl dt dd footer text".split()
)
HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    "%s %d {0} {{ 7 * 7 }} {% raw %}",
    "../../etc/x",
    "🦆\u202egnp.exe",
    "a\x00b\x1bc",
    "javascript:alert(1)",
    "]]><!--",
    "line one\nline two\r\u2028three",
    "\ud800 half",
    "x" * 50_000,
    "=HYPERLINK(1)",
]


class Page(HTMLParser):
    """Parses strictly: balanced tags; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text.replace("<wbr>", ""))  # where a line may break; no character of a name
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({a for a, _ in attrs}) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:], self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def harmless(text: str) -> Page:
    """A page that runs nothing and fetches nothing."""
    shown = Page(text)
    assert {t for t, _ in shown.tags} <= ALLOWED
    for tag, attributes in shown.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "src"
            if name in ("href", "xlink:href", "action"):
                assert value is not None and value.startswith(("#", "data:text/csv;")), value
    policy = next(a["content"] for t, a in shown.tags if t == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert text.count("<style>") == text.count("</style>") == 1
    style = text.split("<style>")[1].split("</style>", maxsplit=1)[0]
    assert "url(" not in style and "@import" not in style
    assert len(text.encode()) < 1_000_000
    return shown


def with_names(name: str) -> list[Record]:
    """The sample run in which everything that can be named has this name."""

    def renamed(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            keep = key in ("environment", "versions", "machine", "check", "proof")
            out = {k: renamed(v, k) for k, v in value.items()}
            return {**out, name: name} if keep else out
        if isinstance(value, list):
            return [renamed(v, key) for v in value]
        return (
            name if isinstance(value, str) and key not in ("stage", "recommended", "mode", "badge", "goal") else value
        )

    out = []
    for one in sample():
        figures = {k: dataclasses.replace(m, unit=name, protocol=name, machine=name) for k, m in one.measured.items()}
        cell, environment, details = (
            renamed(dict(one.cell)),
            renamed(dict(one.environment), "environment"),
            renamed(dict(one.details)),
        )
        out.append(Record(cell=cell, plan_digest=name, measured=figures, environment=environment, details=details))
    return out


def test_page_is_whole_and_harmless() -> None:
    shown = harmless(render(sample()))
    assert ("html", {"lang": "en"}) in shown.tags
    tables = [t for t, _ in shown.tags if t == "table"]
    assert len(tables) >= 8
    assert len([t for t, _ in shown.tags if t == "caption"]) == len(tables)
    assert all(a.get("scope") in ("col", "row") for t, a in shown.tags if t == "th")
    assert all(a.get("aria-hidden") == "true" for t, a in shown.tags if t == "svg")
    boxes = [a for t, a in shown.tags if "box" in (a.get("class") or "").split()]
    assert boxes and all(a["tabindex"] == "0" and a["role"] == "region" for a in boxes), "tables scroll by keyboard"
    ids = [a["id"] for _, a in shown.tags if "id" in a]
    assert len(ids) == len(set(ids))
    files = [a.get("aria-label") or a["download"] for t, a in shown.tags if t == "a" and "download" in a]
    assert len(files) > 5 and len(files) == len(set(files)), "a list of links tells one CSV from another"
    for _, a in shown.tags:
        if (a.get("href") or "").startswith("#"):
            assert a["href"][1:] in ids  # type: ignore[index]


def test_page_says_what_the_records_say() -> None:
    text = harmless(render(sample())).text
    size = sample()[4].measured["bytes"].value
    assert isinstance(size, int)
    for said in (
        "Target met",
        f"{size:,} B",
        megabytes(size),
        mebibytes(size),
        "98.52 %",
        "−0.37 points against dense",
        "inside the noise",
        "1 thread, onnxruntime 1.23.2",
        "stage1.0.conv1.weight[0]",
        "output of the model",
        "Softmax",
        "the file holds one weight twice",
        "pixel / 16, then minus 0.5",
        "ort.InferenceSession('int8.onnx')",
        "runtimes other than ONNX Runtime",
        MACHINE["cpu"],
        "rounding to 8 channels",
        "Equal-size dense network, INT8",
    ):
        assert str(said) in text, said
    before, after = (sample()[i].measured["stripped_bytes"].value for i in (1, 4))
    assert before and after
    assert f"× {before / after:.1f} smaller" in text


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_text(name: str) -> None:
    plain, shown = Page(render(sample())), harmless(render(with_names(name)))
    assert [t for t, _ in shown.tags].count("th") >= [t for t, _ in plain.tags].count("th") - 40
    assert not any(c in shown.text for c in "\x00\x1b\u202e\u2028")
    if "7 * 7" in name:
        assert "{{ 7 * 7 }}" in shown.text
    if name.startswith("<script>"):
        assert "<script>alert(1)</script>" in shown.text


def test_hostile_names_reach_the_disk(tmp_path: Path) -> None:
    for one in with_names("</style><script>%s ../x 🦆"):
        append(tmp_path / "records.jsonl", one)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    harmless(path.read_text(encoding="utf-8"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["records.jsonl", "report.html"]


def test_the_closer_look_says_for_whom_and_what_bounds_a_layer() -> None:
    html = render(sample())
    text = Page(html).text
    for said in (
        "hospital north 80 98.00 % 91.00 % −7.00 points −9.00 to −5.00 points",
        "South".lower() + " 90 97.00 % 97.50 % +0.50 points −1.00 to +2.00 points no difference shown",
        "image-0074 100.00 % 0.00 %",
        "right before, wrong now",
        "dense file, mean of its own worst 54",
        "stage1.0.conv1.weight conv2d 8 bits 90 41.0 dB 44.5 dB",
        "1 of 2 layers of the dense network are memory-bound here",
        "fewer than 3.88 FLOP per byte waits for memory",
        "blur, σ = 1 pixels",
        "no bias shown",
        "biased",
        "too few samples to say anything, fewer than five: hospital west (3).",
        "predictions from 2.900 to 3.900, truth from 0.001000 to 0.002000 is the truth in another unit?",
        "Pruned, level 1, FP32 level-1.onnx Dense FP32",
    ):
        assert said in text, said
    assert html.count("<circle") == 3 + 2 + 2 + 2


def test_what_was_not_looked_at_is_named() -> None:
    run = sample()
    text = Page(render([*run[:6], run[7]])).text
    assert "this run is from before" in text and "For whom" not in text
    less = {
        "changed": {**run[6].details["changed"], "slices": []},
        "bias": None,
        "noise": {"why": "inputs are not pictures"},
    }
    plain = dataclasses.replace(run[6], details={**run[6].details, **less, "slices_given": False})
    text = Page(render([*run[:6], plain, run[7]])).text
    for said in ("the task module has no slices()", "no column target", "inputs are not pictures"):
        assert said in text.split("Not tested latency on the phone")[1].split("Before and after")[0], said


def test_csv_holds_no_formula() -> None:
    shown = Page(render(with_names("=HYPERLINK(1)")))
    links = [a["href"] for _, a in shown.tags if (a.get("href") or "").startswith("data:")]
    assert len(links) == 12  # one per chart
    cells = [
        c
        for h in links
        if h
        for line in csv.reader(io.StringIO(base64.b64decode(h.split(",")[1]).decode()))
        for c in line
    ]
    assert "'=HYPERLINK(1)" in cells and not any(c.startswith("=") for c in cells)


def test_two_records_are_enough() -> None:
    some = [
        record("dense", "Dense FP32", measured=measured((8, 8, 8), 90.0, None, 1.0), details={}),
        record("int8", "INT8"),
    ]
    shown = harmless(render(some))
    assert "Not finished" in shown.text and "No file is recommended yet" in shown.text
    assert shown.text.count("not tested") > 8
    harmless(render([Record(cell={})]))


def test_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="at least one record"):
        render([])
    with pytest.raises(RejectedError, match=r"records\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "records.jsonl").write_text('{"cell": 1\n')
    with pytest.raises(RejectedError, match="one record"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_any_missing_entry_is_not_tested() -> None:
    """Every figure, every detail and every record, left out one at a time."""
    run, dropped = sample(), 0
    for at, one in enumerate(run):
        harmless(render(run[:at] + run[at + 1 :]))
        for key in [*one.measured, *one.details]:
            figures = {k: v for k, v in one.measured.items() if k != key}
            less = dataclasses.replace(
                one, measured=figures, details={k: v for k, v in one.details.items() if k != key}
            )
            Page(render([*run[:at], less, *run[at + 1 :]]))
            dropped += 1
    assert dropped > 80


@pytest.mark.parametrize("wrong", [None, 7, "text", [1, None], {"a": [1]}, float("nan"), 10**400, True], ids=range(8))
def test_malformed_details_do_no_harm(wrong: Any) -> None:
    run = sample()
    for at, one in enumerate(run):
        bad = dataclasses.replace(one, details=dict.fromkeys(one.details, wrong))
        shown = harmless(render([*run[:at], bad, *run[at + 1 :]]))
        assert "Before and after" in shown.text and "Provenance" in shown.text  # the whole page, whatever is wrong
        rows = {
            k: [dict.fromkeys(r, wrong) for r in v] if isinstance(v, list) and v and isinstance(v[0], dict) else v
            for k, v in one.details.items()
        }
        harmless(render([*run[:at], dataclasses.replace(one, details=rows), *run[at + 1 :]]))
        figures = {k: dataclasses.replace(m, value=wrong, low=wrong) for k, m in one.measured.items()}
        harmless(
            render(
                [
                    *run[:at],
                    dataclasses.replace(one, measured=figures, environment={"versions": wrong, "x": wrong}),
                    *run[at + 1 :],
                ]
            )
        )


def test_an_estimate_never_looks_measured() -> None:
    run = sample()
    guess = Measured(value=0.0123, unit="ms", badge="estimated", protocol="a table of the phone")
    run[4] = dataclasses.replace(run[4], measured={**run[4].measured, "latency_ms": guess})
    html = render(run)
    found = re.findall(r'<span class="fig (\S+)"[^>]*><b>([^<]*)</b>\s*<span class="([^"]*)">', html)
    guesses = [f for f in found if "0.0123 ms" in f[1]]
    assert len(guesses) == 3, "card, row and beside the twin"
    assert all(f == ("estimated", "≈ 0.0123 ms", "badge estimated") for f in guesses)
    assert "latency ms of int8" in Page(html).text.split("Estimated, not measured")[1]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-1.9, -0.3, "+1.11 points, interval +0.30 to +1.90 points, on the same samples: pruning kept more."),
        (-1.9, 0.3, "interval −0.30 to +1.90 points, on the same samples: no difference shows, and each was trained once."),
        (0.2, 1.9, "the smaller dense network does better. It can be shipped in place of the pruned one (twin-int8.onnx)."),
    ],
)  # fmt: skip
def test_the_twin_is_compared_on_the_same_samples(low: float, high: float, said: str) -> None:
    """Two intervals against the dense file that overlap say nothing of a difference of the two."""
    run = sample()
    at = next(i for i, r in enumerate(run) if r.cell["stage"] == "twin-int8")
    change = Measured(value=(low + high) / 2, unit="%", low=low, high=high, n=540)
    run[at] = dataclasses.replace(run[at], measured={**run[at].measured, "change_from_pruned": change})
    assert said in Page(render(run)).text
    assert "by these no difference shows" not in Page(render(run)).text


def test_a_reader_can_work_out_what_the_page_says() -> None:
    """What a reader without the records asked for: which dense time, which file's readings, how many samples are drawn."""
    run = sample()
    names = [r.cell["stage"] for r in run]
    for at, name in enumerate(names):
        if name in ("level-1", "level-2", "int8", "twin-int8"):
            beside = Measured(value=0.05 + at / 100, unit="ms")
            own = dataclasses.replace(run[at].measured["latency_ms"], protocol=f"median of {name}")
            run[at] = dataclasses.replace(
                run[at], measured={**run[at].measured, "baseline_latency_ms": beside, "latency_ms": own}
            )
    text = Page(render(run)).text
    for at, name in enumerate(names):
        if name in ("level-1", "level-2", "int8", "twin-int8"):
            assert f"dense beside it {digits(0.05 + at / 100)} ms" in text
    assert "median of int8" in text and "median of twin-int8" not in text, "the recommended file's, not the last one's"
    assert "Drawn are 3 of the 540 samples" in text and "Drawn are 2 of the 540 samples" in text
    assert "the roofline: what bounds a layer" in text.split("Estimated, not measured")[1]


@pytest.mark.parametrize(("pace", "best"), [(0.9, "int8"), (1.02, "level-2")])
def test_a_float_file_that_is_slower_itself_does_not_stand_in_for_a_slow_one_in_codes(pace: float, best: str) -> None:
    """The reason against INT8 held for the file that was recommended in its place, which was larger."""
    run = sample()
    for at, one in enumerate(run):
        if one.cell["stage"] in ("int8", "level-2"):
            speed = 0.8 if one.cell["stage"] == "int8" else pace
            found = Measured(value=speed, low=speed - 0.05, high=speed + 0.05, unit="×")
            run[at] = dataclasses.replace(one, measured={**one.measured, "speedup": found})
    run[-1] = dataclasses.replace(run[-1], details={**run[-1].details, "otherwise": "level-2"})
    assert view(run).recommended == best
    if best == "int8":
        assert "It is recommended for its size. It is slower than the dense FP32 file" in Page(render(run)).text


@pytest.mark.parametrize(("sums", "told"), [(False, True), (True, False), (None, False)])
def test_a_processor_that_does_not_sum_codes_is_told_where_int8_is_the_slower_file(
    sums: bool | None, told: bool
) -> None:
    run = sample()
    at = next(i for i, r in enumerate(run) if r.cell["stage"] == "int8")
    slow = {**run[at].measured, "speedup": Measured(value=1.2, low=1.1, high=1.3, unit="×")}
    run[at] = dataclasses.replace(run[at], measured=slow, environment={"machine": {"int8_dot": sums}})
    text = Page(render(run)).text
    assert "is the faster file on this machine" in text
    assert ("no instructions for sums of 8-bit products" in text) is told


def test_the_name_of_a_recipe_heads_its_page() -> None:
    run = sample()
    assert "digits: what compression did to it" in Page(render(run)).text
    run[-1] = dataclasses.replace(run[-1], details={**run[-1].details, "name": "scales at home"})
    assert "scales at home: what compression did to it" in Page(render(run)).text
    for unnamed in ("run", "notebook"):
        run[-1] = dataclasses.replace(run[-1], details={**run[-1].details, "name": unnamed})
        assert "digits: what compression did to it" in Page(render(run)).text


def test_slower_int8_is_said_and_not_recommended_for_speed() -> None:
    run = sample()
    slow = measured((8, 24, 40), 98.52, -0.37, 0.2, int8=True)
    run[4] = dataclasses.replace(run[4], measured=slow)
    text = Page(render(run)).text
    assert "slower than the dense FP32 file: not recommended on latency grounds" in text
    assert "It is recommended for its size. It is slower than the dense FP32 file on this machine." in text
    no_ratio = {k: v for k, v in slow.items() if k != "speedup"}
    run[4] = dataclasses.replace(run[4], measured=no_ratio)
    assert "slower than the dense FP32 file: not recommended on latency grounds" in Page(render(run)).text
    assert "not recommended on latency grounds" not in Page(render(sample())).text


@pytest.mark.parametrize(
    ("goal", "change", "bounds", "said"),
    [
        ("max", -5.0, [], "has one beyond the noise: −5.00 points of accuracy (budget.metric_loss"),
        ("max", -0.2, [], ""),
        ("max", 5.0, [], ""),
        ("min", 5.0, [], "has one beyond the noise: +5.00 points of accuracy"),
        ("max", -5.0, [{"what": "metric_loss", "bound": 9.0, "value": 5.0, "unit": "%", "met": True, "badge": "measured"}], ""),
    ],
)  # fmt: skip
def test_a_loss_that_nobody_ruled_out_is_said_beside_the_recommended_file(
    goal: str, change: float, bounds: list[dict[str, Any]], said: str
) -> None:
    run = sample()
    own = Measured(value=change, unit="%", low=change - 0.5, high=change + 0.5, n=540)
    run[4] = dataclasses.replace(run[4], measured={**run[4].measured, "metric_change": own})
    metric = {**run[-1].details["metric"], "goal": goal}
    run[-1] = dataclasses.replace(run[-1], details={**run[-1].details, "bounds": bounds, "metric": metric})
    text = re.sub(r"\s+", " ", Page(render(run)).text)
    assert (said in text) if said else ("No loss was ruled out" not in text)


def test_a_float_file_that_is_faster_than_the_one_in_codes_is_named() -> None:
    run = sample()
    fast = {**run[4].measured, "speedup": Measured(value=8.0, unit="×", low=7.9, high=8.1, timing=True)}
    run[4] = dataclasses.replace(run[4], measured=fast)
    assert "Where time decides" not in Page(render(run)).text
    quick = {**run[3].measured, "speedup": Measured(value=9.0, unit="×", low=8.8, high=9.2, timing=True)}
    run[3] = dataclasses.replace(run[3], measured=quick)
    text = re.sub(r"\s+", " ", Page(render(run)).text)
    assert "(level-2.onnx) is the faster file on this machine: × 9.00 the speed of dense, this one × 8.00;" in text
    assert "Where time decides, take that one." in text
    close = {**quick, "speedup": Measured(value=9.0, unit="×", low=0.5, high=9.2, timing=True)}
    run[3] = dataclasses.replace(run[3], measured=close)
    assert "Where time decides" not in Page(render(run)).text


def test_a_gain_inside_the_noise_is_called_so() -> None:
    run = sample()
    even = {**run[4].measured, "speedup": Measured(value=1.02, unit="×", low=0.97, high=1.06, timing=True)}
    run[4] = dataclasses.replace(run[4], measured=even)
    text = Page(render(run)).text
    assert "× 1.02 the speed of dense (0.970 to 1.06): no difference shown" in text


@pytest.mark.parametrize(
    ("more", "headline"),
    [
        ({"target_met": False}, "Target missed"),
        ({"target_met": None, "bounds": []}, "No target was set"),
        (
            {
                "target_met": True,
                "bounds": [
                    {
                        "what": "size_bytes",
                        "bound": 1,
                        "value": 2,
                        "unit": "B",
                        "margin": -1,
                        "met": False,
                        "badge": "measured",
                    }
                ],
            },
            "Target missed",
        ),
        (
            {
                "target_met": True,
                "bounds": [
                    {
                        "what": "latency_ms",
                        "bound": 2,
                        "value": 1,
                        "unit": "ms",
                        "margin": 1,
                        "met": True,
                        "badge": "estimated",
                    }
                ],
            },
            "by estimate",
        ),
        (
            {
                "target_met": True,
                "bounds": [
                    {"what": "latency_ms", "bound": 2, "value": None, "unit": "ms", "met": None, "badge": "not tested"}
                ],
            },
            "not every bound",
        ),
    ],
)
def test_headline(more: dict[str, Any], headline: str) -> None:
    assert headline in Page(render([*sample()[:-1], verdict(**more)])).text


@pytest.mark.parametrize(
    ("what", "unit", "said"),
    [
        ("latency", "ms", "≤ 2.000 ms (0.500 of the dense file, timed in turns)"),
        ("size_bytes", "B", "≤ 0.00200 kB (0.500 of the dense file)"),
    ],
)
def test_a_bound_that_was_a_share_says_of_what(what: str, unit: str, said: str) -> None:
    bound = {
        "what": what,
        "bound": 2,
        "share": 0.5,
        "value": 1,
        "unit": unit,
        "margin": 1,
        "met": True,
        "badge": "measured",
    }
    text = Page(render([*sample()[:-1], verdict(target_met=True, bounds=[bound])])).text
    assert said in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize(
    ("high", "met", "is_said"), [(1.3, True, True), (1.0, True, False), (None, True, False), (1.3, False, False)]
)
def test_a_bound_that_the_mean_alone_keeps_says_how_far_its_interval_reaches(
    high: float | None, met: bool, is_said: bool
) -> None:
    bound = {
        "what": "metric_loss",
        "bound": 1.0,
        "value": 0.4,
        "unit": "%",
        "margin": 0.6,
        "met": met,
        "badge": "measured",
    }
    bound |= {} if high is None else {"high": high}
    text = Page(render([*sample()[:-1], verdict(target_met=met, bounds=[bound])])).text
    assert ("held by its mean; the 95 % interval reaches 1.30 points" in text) is is_said


def test_dense_recommended() -> None:
    text = Page(render([*sample()[:-1], verdict(recommended="dense", target_met=False)])).text
    assert "the dense FP32 file stays the recommended one" in text and "judged on the INT8 file" in text


def test_a_smaller_file_that_keeps_all_bounds_but_is_slower_is_named() -> None:
    run = [*sample()[:-1], verdict(otherwise="dense")]
    run[4] = dataclasses.replace(run[4], measured=measured((8, 24, 40), 98.52, -0.37, 0.2, int8=True))
    text = Page(render(run)).text
    assert "The INT8 file is smaller and keeps every bound, but it is slower than the dense FP32 file" in text
    assert "may take its place" not in text


def test_why_a_larger_float_file_is_recommended_is_said() -> None:
    run = sample()
    name = next(r.cell["stage"] for r in run if r.cell["stage"].startswith("level-"))
    run[-1] = verdict(recommended=name)
    run[4] = dataclasses.replace(run[4], measured=measured((8, 24, 40), 98.52, -0.37, 0.2, int8=True))
    text = Page(render(run)).text
    assert f"Recommended file: {name}.onnx" in text
    assert "The INT8 file is smaller and keeps every bound, but it is slower than the dense FP32 file" in text
    run[-1] = verdict(recommended=name, target_met=False)
    assert "keeps every bound" not in Page(render(run)).text


def test_the_example_opens_the_file_that_the_page_recommends() -> None:
    run = [*sample()[:-1], verdict(otherwise="dense", otherwise_snippet="session = ort.InferenceSession('dense.onnx')")]
    assert "InferenceSession('int8.onnx')" in Page(render(run)).text
    run[4] = dataclasses.replace(run[4], measured=measured((8, 24, 40), 98.52, -0.37, 0.2, int8=True))
    text = Page(render(run)).text
    assert "Recommended file: dense.onnx" in text
    assert "InferenceSession('dense.onnx')" in text and "InferenceSession('int8.onnx')" not in text


def test_a_smaller_file_that_is_only_slower_breaks_no_bound_where_none_was_set() -> None:
    run = [*sample()[:-1], verdict(otherwise="dense", target_met=None, bounds=[])]
    run[4] = dataclasses.replace(run[4], measured=measured((8, 24, 40), 98.52, -0.37, 0.2, int8=True))
    text = Page(render(run)).text
    assert "The INT8 file is smaller, but it is slower than the dense FP32 file on this machine" in text
    assert "may take its place" not in text and "every bound" not in text


@pytest.mark.parametrize(
    ("scheme", "calibrated"), [("int8", True), ("w4a8", True), ("w4", False), ("int8-dynamic", False)]
)
def test_only_schemes_that_calibrate_are_said_to(scheme: str, calibrated: bool) -> None:
    run = [*sample()[:-1], verdict(recommended=scheme, quantized=scheme)]
    run[4] = dataclasses.replace(run[4], cell={**run[4].cell, "stage": scheme, "title": "In codes"})
    text = Page(render(run)).text
    assert "weights quantized" in text and ("activations calibrated" in text) is calibrated
    assert "both quantized" in text and "both INT8" not in text
    floats = [*(r for r in run[:-1] if r.cell["stage"] in ("examine", "dense")), run[-1]]
    assert "There is no quantized file in this run." in Page(render(floats)).text


def test_an_attempt_that_was_rolled_back_is_no_epoch() -> None:
    run = sample()
    losses = [(1, 0.5), (2, None), (2, 0.4), (3, 0.45)]
    history = [{"epoch": epoch, "loss": loss} for epoch, loss in losses]
    run[2] = dataclasses.replace(run[2], details={**run[2].details, "history": history})
    html = render(run)
    assert "3 epochs of training after it" in html and "4 epochs of training" not in html
    assert '<td class="n">3</td><td class="n">0.500</td>' in html and "<small>epoch 2</small>" in html
    data = re.search(r'download="training.csv" href="data:text/csv;charset=utf-8;base64,([^"]+)"', html)
    assert data is not None
    lines = [*csv.DictReader(io.StringIO(base64.b64decode(data[1]).decode()))]
    assert [r["epoch"] for r in lines if r["stage"] == "level-1"] == ["1", "2", "3"]


def test_layers_stand_under_the_roof_of_floats_and_that_of_integers() -> None:
    closer = insight()
    lines = roofline(view(sample()))
    assert lines is not None
    conv, head = lines["lines"]
    speeds = 3.1e10, 1.2e11, 8e9  # FLOP/s, OP/s, B/s
    for line, flops, moved, bounds in (
        (conv, 1_179_648, 53_248, ("compute", "compute")),
        (head, 1280, 2896, ("memory", "memory")),
    ):
        floats, integers = max(flops / speeds[0], moved / speeds[2]), max(flops / speeds[1], moved / 4 / speeds[2])
        assert (line["bound"], line["int8_bound"]) == bounds
        assert float(line["int8_gain"].rstrip("×")) == pytest.approx(floats / integers, rel=0.01)
    assert closer.measured.keys() == {"peak_flops", "bandwidth", "peak_int8"}
    text = render(sample())
    assert "Faster, at most" in text and text.count('class="even dashed"') == 1
    ticks = re.findall(r'text-anchor="(middle|end)">([^<]+)</text>', lines["chart"].markup)
    across, up = ([t for side, t in ticks if side == s] for s in ("middle", "end"))
    assert across == ["1", "10"] or len(across) >= 3, across
    assert len(up) >= 3 and {t.split()[-1] for t in up} <= {"M", "G"}, up
    older = [
        dataclasses.replace(r, measured={k: v for k, v in r.measured.items() if k != "peak_int8"}) for r in sample()
    ]
    assert "Faster, at most" not in render(older) and 'class="even dashed"' not in render(older)


def test_what_stays_in_float_says_why_and_how_many_layers_run_on_codes() -> None:
    """The reasons of the check, the share of layers, and what the check noted, in the tables of the file."""
    why = {"Softmax": "no integer kernel worth using in ONNX Runtime: small probabilities share the code of 0"}
    more = {
        "float_reasons": why,
        "layers_on_codes": {"on_codes": 6, "of": 8},
        "check_notes": ["run here with exact 8-bit products"],
    }
    told = [dataclasses.replace(r, details={**r.details, **more}) if r.cell["stage"] == "int8" else r for r in sample()]
    text = harmless(render(told)).text
    stayed = text.split("What stayed float")[1].split("Evidence")[0]
    assert "6 of 8 convolutions and linear layers (75 %) run quantized" in stayed
    assert why["Softmax"] in stayed
    assert "INT8 of level 2 run here with exact 8-bit products" in text.split("Against Largest error")[1]
    without = harmless(render(sample())).text.split("What stayed float")[1].split("Evidence")[0]
    assert "Why" not in without and "run quantized" not in without


def test_failed_proof_is_seen() -> None:
    run = sample()
    broken = {"max_error": 0.9, "scale": 1.0, "moved": 1.0, "mode": "float32"}
    run[2] = dataclasses.replace(run[2], details={**run[2].details, "proof": broken})
    text = Page(render(run)).text
    assert "does not hold" in text and "does not hold" not in Page(render(sample())).text


def test_large_networks_fit() -> None:
    many = [
        {**layers((8, 8, 8))[0], "name": f"block.{i}.a_rather_long_name_of_a_layer.conv.weight", "parameters": 1000 + i}
        for i in range(3000)
    ]
    spaces = [
        {"space": f"{m['name']}[0]", "kind": "channel", "before": 64, "after": 32, "parameters": [m["name"]] * 8}
        for m in many
    ]
    nodes = [f"Conv: {m['name']}" for m in many]
    closer = insight()
    bits = [
        {"name": m["name"], "kind": "conv2d", "parameters": 9, "bits": 8, "weight_db": 40.0, "input_db": 41.0}
        for m in many
    ]
    roof = [{"name": m["name"], "kind": "conv2d", "flops": 1000 + i, "bytes": 999} for i, m in enumerate(many)]
    pins = [{"reason": f"because {i}", "units": i, "where": m["name"]} for i, m in enumerate(many)]
    run = [
        record("examine", "Dense", details={"layers": many, "pinned": pins, "uncounted": nodes, "alarms": nodes}),
        record("dense", "Dense", details={"layers": many}),
        record("level-1", "Level 1", details={"layers": many, "removed": spaces, "history": list(range(1, 3000))}),
        record("int8", "INT8", details=exported("int8", (8, 8, 8), True) | {"float_nodes": nodes, "notes": nodes}),
        dataclasses.replace(closer, details={**closer.details, "bits": {"layers": bits}, "roofline": roof}),
        verdict(warnings=nodes),
    ]
    text = harmless(render(run)).text
    assert "2760 smaller layers together" in text
    assert f"{sum(m['parameters'] for m in many):,}" in text, "the sum counts all layers"


def test_long_fronts_fit() -> None:
    levels = [{"pattern": f"blocks.{j}.attention.projection", "density": 0.5} for j in range(12)]
    points = [
        {"way": "units", "times": 1.0, "error": i / 1000, "amounts": {"size_bytes": i}, "recipe": {"prune.levels": levels}, "levels": levels}
        for i in range(1000)
    ]  # fmt: skip
    search = {"asked": {"size_bytes": 10}, "trials": [], "front_points": points}
    assert "and 900 more, in front.csv" in harmless(render([*sample()[:-1], verdict(search=search)])).text


@pytest.mark.parametrize(("bits", "badge"), [(None, "measured"), ({"a": 4}, "estimated")])
def test_amounts_of_trials_are_counts_and_say_how_they_are_known(bits: Any, badge: str) -> None:
    amounts = {"parameters": 890.0, "macs": 512.0, "size_bytes": 91_300.0}
    trial = {
        "way": "channels",
        "error": 0.5,
        "bits": bits,
        "amounts": amounts,
        "recipe": {"bits": "1 × 4 bits"} if bits else {},
    }
    search = {"asked": {"macs": 600.0, "size_bytes": 95_000.0}, "trials": [trial], "chosen": 0, "front": [0]}
    text = Page(render([*sample()[:-1], verdict(search=search)])).text
    assert "890 parameters, 512 MAC" in text and "890.0" not in text
    assert "macs: asked at most 600 MAC, found 512 MAC (counted)" in text
    assert f"91.3 kB ({badge})" in text
    assert "1 file or trial" in text


def test_same_records_same_page() -> None:
    assert render(sample()) == render(sample())


def test_jinja_missing_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    page._template.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingError, match=r"paredown\[report\]"):
        render(sample())


def test_template_turns_no_escaping_off() -> None:
    import paredown.report as room

    for file in Path(room.__file__).parent.glob("*.html"):
        template = file.read_text(encoding="utf-8")
        assert "safe" not in re.findall(r"\|\s*(\w+)", template)
        assert "autoescape" not in template and "<script" not in template


def test_a_device_ran_the_file_whose_every_part_it_names() -> None:
    """An .xml says nothing of the weights in its .bin: two runs of one architecture share it."""
    stages = [
        Record(cell={"stage": "dense"}, details={"digest": "whole", "digests": ["xml", "bin"]}),
        Record(cell={"stage": "int8"}, details={"digest": "alone"}),
        Record(cell={"stage": "none"}, details={}),
    ]
    run = SimpleNamespace(stages=stages)
    for sums, wanted in (
        ({"a.xml": "xml", "a.bin": "bin"}, "dense"),
        ({"a.xml": "xml", "a.bin": "another"}, None),
        ({"a.onnx": "alone"}, "int8"),
        ({}, None),
    ):
        assert stage_of_device(run, Record(cell={"stage": "device"}, details={"model": sums})) == wanted  # type: ignore[arg-type]
