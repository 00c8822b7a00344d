"""Masks in the report: called simulated, estimates told from what was measured, pictures that are the mask."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from sample_run import sample
from test_report_page import Page, harmless
from torch import nn

import paredown as pare
from paredown.pipeline.simulated import picture, told
from paredown.plan import Mask
from paredown.records import Record
from paredown.report import render
from paredown.report.masks import cells


@pytest.fixture(scope="module")
def details() -> dict[str, Any]:
    """What a level records of a real masked model."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
    program = pare.capture(net, torch.randn(2, 3, 8, 8))
    coupling = pare.couple(program)
    plan = pare.allocate(coupling, pare.score(program, coupling, granularity="2:4"), pare.examine(program))
    return told(pare.prune(program, plan))


def with_masks(simulated: Any, **more: Any) -> list[Record]:
    run = sample()
    at = next(i for i, r in enumerate(run) if r.cell["stage"] == "level-2")
    run[at] = dataclasses.replace(run[at], details={**run[at].details, "simulated": simulated, **more})
    return run


def test_totals_and_weights_are_told_with_their_badges(details: dict[str, Any]) -> None:
    html = render(with_masks(details, left_out=["stage3.1"]))
    text = harmless(html).text
    macs = 6 * 6 * (432 + 128)
    assert (details["macs"], details["effective_macs"]) == (macs, 6 * 6 * (288 + 64))
    for said in (f"{macs:,}", f"≈ {36 * 352:,}", "2:4", "144 of 432", "66.7 %", "Masked weights simulated", "stage3.1"):
        assert said in text, said
    part = html.split('<h3 id="masks">')[1].split("<h3")[0]
    badges = re.findall(r"<th scope=\"row\">([^<]*)</th><td class=\"n\">(≈ )?([^<]*)</td><td>(.*?)</td>", part)
    assert {what: "estimated" in badge for what, about, _, badge in badges} == {
        what: bool(about) for what, about, _, _ in badges
    }
    assert sum("estimated" in badge for *_, badge in badges) == 3
    assert 'title="measured"' in next(badge for what, *_, badge in badges if what.startswith("gzip"))
    assert part.count("<svg") == 2
    assert 'id="masks"' not in render(sample())


def test_bytes_are_those_of_mask_sizes(details: dict[str, Any]) -> None:
    assert details["dense_bytes"] == 4 * (432 + 16 + 128 + 8)
    bits = -(-432 // 8) + 288 * 4 + -(-128 // 8) + 64 * 4
    assert details["bitmask_bytes"] == bits + 4 * (16 + 8)
    assert details["gzip_bytes"] > 0
    assert {n: (w["zeros"], w["of"]) for n, w in details["weights"].items()} == {
        "0.weight": (144, 432), "2.weight": (64, 128)
    }  # fmt: skip


def test_a_recorded_picture_is_the_mask() -> None:
    kept = np.random.default_rng(0).random((20, 24)) < 0.4
    rows = picture(Mask.of(kept, "element"))
    assert np.array_equal(np.array([[int(c) for c in r] for r in rows]) == 9, kept)
    assert {c for r in rows for c in r} == {"0", "9"}
    nearly = np.ones((48, 48), bool)
    nearly[0, 0] = False
    assert picture(Mask.of(nearly, "element"))[0][:2] == "79"  # 3 of 4 stay: neither all nor nothing
    large = picture(Mask.of(np.random.default_rng(0).random((300, 500)) < 0.5, "element"))
    assert len(large) <= 24 and max(map(len, large)) <= 24


def winding(corners: np.ndarray, x: float, y: float) -> int:
    """How often a closed line goes round a point: what the fill rule "nonzero" asks."""
    turns = 0
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) / (y1 - y0) * (x1 - x0) > x:
            turns += 1 if y1 > y0 else -1
    return turns


def test_the_drawn_cells_are_the_digits() -> None:
    digits = np.random.default_rng(1).integers(0, 10, (7, 11))
    svg = cells(["".join(map(str, row)) for row in digits])
    assert svg is not None
    drawn = np.zeros(digits.shape)
    for opacity, points in re.findall(r'fill-opacity="([^"]+)" points="([^"]+)"', svg.markup):
        corners = np.array([[int(n) for n in p.split(",")] for p in points.split()])
        for y, x in np.ndindex(digits.shape):
            drawn[y, x] += float(opacity) * abs(winding(corners, x + 0.5, y + 0.5))
    assert np.allclose(drawn, digits / 9, atol=0.006)


@pytest.mark.parametrize("rows", [[], [""], ["90", "9"], ["<b"], ["９0"], ["9 "]])
def test_what_is_no_picture_is_not_drawn(rows: list[str]) -> None:
    assert cells(rows) is None


@pytest.mark.parametrize(
    "wrong", [None, 7, "text", [1, None], {"weights": 3}, {"weights": {"<script>": None}}, float("nan"), 10**400]
)
def test_damaged_records_do_no_harm(wrong: Any, details: dict[str, Any]) -> None:
    harmless(render(with_masks(wrong, left_out=wrong)))
    for key in details:
        harmless(render(with_masks({**details, key: wrong})))
    weights = {"<script>alert(1)</script>": dict.fromkeys(details["weights"]["0.weight"], wrong)}
    page = harmless(render(with_masks({**details, "weights": weights})))
    assert "<script>alert(1)</script>" in page.text


def test_many_large_masks_fit_into_the_page(details: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 10, (24, 24))
    rows = ["".join(map(str, r)) for r in noise]
    weights = {
        f"layer{i}.weight": {**details["weights"]["0.weight"], "picture": rows if i < 12 else []} for i in range(300)
    }
    html = render(with_masks({**details, "weights": weights}))
    harmless(html)
    assert "and 60 more masked weights" in Page(html).text
