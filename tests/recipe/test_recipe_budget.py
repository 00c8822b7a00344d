"""Budgets in recipes: every field, the ways to write it, and what is refused with what was meant."""

from __future__ import annotations

import pytest

from paredown.budget import Budget, parse_bytes, parse_latency
from paredown.errors import UsageError
from paredown.recipe import load_recipe


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("30 MB", 30_000_000),
        ("30 MiB", 31_457_280),
        ("1.5 kB", 1500),
        ("1.5 KiB", 1536),
        ("2 GB", 2 * 10**9),
        ("2 GiB", 2**31),
        ("17 B", 17),
    ],
)
def test_decimal_and_binary_units_are_told_apart(text, wanted):
    assert parse_bytes(text) == wanted
    assert load_recipe("digits", [f"budget.size_bytes={text}"]).budget.size_bytes == wanted
    assert load_recipe("digits", [f"budget.peak_ram_bytes={text}"]).budget.peak_ram_bytes == wanted


def test_a_fraction_of_the_dense_file_stays_one():
    bounds = load_recipe("digits", ["budget.size_bytes=0.25", "budget.latency=0.5", "budget.macs=0.5"]).budget
    assert (bounds.size_bytes, bounds.latency, bounds.macs) == (0.25, 0.5, 0.5)


@pytest.mark.parametrize(
    ("text", "ms"), [("12 ms", 12.0), ("12ms", 12.0), ("0.25 s", 250.0), ("800 us", 0.8), ("800 µs", 0.8)]
)
def test_latency_with_its_unit(text, ms):
    assert parse_latency(text) == pytest.approx(ms)
    assert Budget(latency=text).given() == {"latency_ms": pytest.approx(ms)}
    assert load_recipe("digits", [f"budget.latency={text}"]).budget.latency == text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("budget.latency=12", "Write 12 ms as '12 ms'"),
        ("budget.latency='12'", "It has no unit"),
        ("budget.latency=50%", "Write 50 % as 0.5"),
        ("budget.latency=1", "ambiguous"),
        ("budget.latency=1.0", "ambiguous"),
        ("budget.latency=0", "a fraction in (0, 1)"),
        ("budget.latency=-0.5", "a fraction in (0, 1)"),
        ("budget.latency=true", "a fraction in (0, 1)"),
        ("budget.latency=12 min", "a text with its unit"),
        ("budget.latency=0 ms", "a text with its unit"),
        ("budget.latency=1e-3", "It has no unit"),
        ("budget.latency_ms=fast", "must be a number ≥ 0"),
        ("budget.latency_ms=0", "must be above 0"),
        ("budget.peak_ram_bytes=0", "must be above 0"),
        ("budget.size_bytes=25%", "'30 MB' or '30 MiB'"),
        ("budget.size_bytes=30 mb", "'30 MB' or '30 MiB'"),
        ("budget.size_bytes=1", "ambiguous"),
        ("budget.size_bytes=-3", "must be a float in (0, 1)"),
        ("budget.peak_ram_bytes=0.5", "no dense file's memory is known"),
        (f"budget.peak_ram_bytes={'9' * 400} B", "below 2⁶³"),
        (f"budget.size_bytes={'9' * 400} GB", "below 2⁶³"),
        (f"budget.macs={'9' * 400}", "must be a float in (0, 1)"),
        (f"budget.metric_loss={'9' * 400}", "must be a finite number"),
        (f"budget.latency={'9' * 400} s", "a text with its unit"),
        ("budget.macs=true", "must be a float in (0, 1)"),
        ("budget.front=[0.5, true]", "budget.front"),
        ("budget.peak_ram_bytes=lots", "'30 MB' or '30 MiB'"),
        ("budget.macs=1e-3", "YAML reads 1e-3 as text"),
        ("budget.channels=1.5", "must be a float in (0, 1)"),
        ("budget.density=25%", "Write 25 % as 0.25"),
        ("budget.latncy=0.5", "Did you mean budget.latency?"),
        ("budget.bits=[9]", "less than or equal to 8"),
        ("budget.bits=[]", "at least 1"),
        ("budget.rounds=-1", "greater than or equal to 0"),
        ("budget.allocation=knapsck", "Did you mean 'knapsack'?"),
    ],
)
def test_fault_67_one_clear_rule_each(override, says):
    with pytest.raises(UsageError) as caught:
        load_recipe("digits", [override])
    assert says in str(caught.value)
    assert "budget." in str(caught.value)


def test_what_cannot_stand_together_is_refused():
    with pytest.raises(UsageError, match=r"latency or latency_ms"):
        load_recipe("digits", ["budget.latency=0.5", "budget.latency_ms=3.0"])
    with pytest.raises(UsageError, match=r"budget\.channels must stand alone"):
        load_recipe("digits", ["budget.channels=0.5", "budget.macs=0.5"])
    with pytest.raises(UsageError, match=r"latency or latency_ms"):
        Budget(latency=0.5, latency_ms=3.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, True, "12 ms"])
def test_milliseconds_are_finite_numbers(value):
    with pytest.raises(UsageError, match=r"budget\.latency_ms must be a"):
        Budget(latency_ms=value)
