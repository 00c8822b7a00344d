"""Criteria in words: one source, the first line of each one's own module."""

from __future__ import annotations

import sys

from sample_run import level, sample

from curve_records import head, sweep
from paredown.report import render
from paredown.report.criteria import explained
from paredown.report.curves import render_curve
from paredown.score import TABLE

LINE = {0.5: [98.0, 97.8, 97.9]}
DENSE = [98.5, 98.3, 98.6]


def test_every_criterion_of_the_table_has_its_words() -> None:
    told = dict(explained(TABLE))
    assert [*told] == [*TABLE]
    assert all(says.endswith(".") and len(says) > 20 for says in told.values())
    for name, row in TABLE.items():
        module = sys.modules[next(f for f in (row.elements, row.outputs, row.units) if f is not None).__module__]
        assert told[name] in (module.__doc__ or ""), name


def test_a_curve_explains_the_criteria_of_its_lines_and_no_others() -> None:
    records = [head(), *sweep(LINE, DENSE, method="refit, global"), *sweep(LINE, DENSE, method="taylor")[3:]]
    page = render_curve(records)
    assert "<b>refit</b>, what a unit still costs the layers that read it" in page
    assert "<b>taylor</b>, first-order change of the loss" in page and "<b>l1</b>" not in page
    assert "Criteria say" not in render_curve([head(), *sweep(LINE, DENSE, method="my own name")])


def test_a_run_explains_the_criterion_that_it_pruned_by() -> None:
    records = sample()
    assert "Criteria say" not in render(records)
    one = level(2, 98.52, -0.37, 0.049, [0.2, 0.1])
    records[3] = type(one)(
        cell=one.cell, plan_digest=one.plan_digest, measured=one.measured, environment=one.environment,
        details={**one.details, "reached": {**one.details["reached"], "criterion": "geometric_median"}},
    )  # fmt: skip
    assert "<b>geometric_median</b>, how far a filter is from all others of its layer" in render(records)
