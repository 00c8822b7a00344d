"""Trials by ask and tell: resumable from the journal, failures marked, the front against every pair compared."""

from __future__ import annotations

import itertools
import json
import sys
import time

import numpy as np
import pytest

from paredown.errors import InfeasibleError, UsageError
from paredown.search.asking import search_by_asking, undominated
from paredown.search.lines import fitted

DOMAIN = {"x": (0.0, 1.0), "way": ("a", "b")}


def bowl(values):
    return ((float(values["x"]) - 0.3) ** 2 + (values["way"] == "a"),), {"seen": values["x"]}


@pytest.fixture(params=["optuna", "grid"])
def asker(request, monkeypatch):
    if request.param == "grid":
        monkeypatch.setitem(sys.modules, "optuna", None)  # importing it now fails, as where it is not installed
    else:
        pytest.importorskip("optuna")
    return request.param


def test_the_same_seed_asks_the_same(asker):
    found = [search_by_asking(DOMAIN, bowl, trials=8, seed=s) for s in (0, 0, 3)]
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert len({json.dumps(dict(t.values)) for t in found[0]}) == 8
    best = min(t.losses[0] for t in found[0])
    assert best < np.median([bowl({"x": x, "way": w})[0][0] for x in np.linspace(0, 1, 21) for w in "ab"])


@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_a_journal_goes_on_to_the_same_result(asker, killed_at, tmp_path):
    whole = search_by_asking(DOMAIN, bowl, trials=6)
    calls = []

    def until(values):
        calls.append(values)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        return bowl(values)

    with pytest.raises(KeyboardInterrupt):
        search_by_asking(DOMAIN, until, trials=6, journal=tmp_path / "j.jsonl", key="k")
    with (tmp_path / "j.jsonl").open("a") as file:
        file.write('{"key": "k", "numb')  # the line that the kill cut short
    again = []
    found = search_by_asking(
        DOMAIN, lambda v: (again.append(v), bowl(v))[1], trials=6, journal=tmp_path / "j.jsonl", key="k"
    )
    assert found == whole
    assert len(again) == 6 - killed_at
    other = search_by_asking(DOMAIN, bowl, trials=6, journal=tmp_path / "j.jsonl", key="another")
    assert other == whole


def test_fault_89_a_trial_that_fails_is_marked_not_zero(asker, tmp_path):
    def sometimes(values):
        if values["way"] == "b":
            raise ValueError("no such way\nat all")
        return bowl(values) if float(values["x"]) < 0.9 else ((float("nan"),), {})

    found = search_by_asking(DOMAIN, sometimes, trials=12, journal=tmp_path / "j")
    failed = [t for t in found if t.losses is None]
    assert failed
    assert all(t.why for t in failed)
    assert {t.why for t in failed} <= {"ValueError: no such way", "the losses are (nan,)"}
    assert any(t.losses for t in found)
    assert undominated([t.losses for t in found]) == [min((i for i, t in enumerate(found) if t.losses), key=lambda i: found[i].losses)]  # fmt: skip


def test_a_trial_that_missed_a_limit_says_the_reason_and_keeps_no_network():
    import gc
    import weakref

    alive = []

    def fails(values):
        network = np.zeros(1000)
        alive.append(weakref.ref(network))
        try:
            raise RuntimeError("out of memory")
        except RuntimeError as error:
            raise InfeasibleError("macs must be at most 5. Got 7.", advice="Ask for more.") from error

    (trial,) = search_by_asking({"x": (0.0, 1.0)}, fails, trials=1)
    gc.collect()
    assert trial.why == "macs must be at most 5. Got 7."
    assert isinstance(trial.error, InfeasibleError) and trial.error.advice == "Ask for more."
    assert alive[0]() is None
    assert trial.error.__traceback__ is not None  # where it was


def test_fault_91_the_front_of_ten_thousand_trials_is_quick():
    points = [tuple(map(float, p)) for p in np.random.default_rng(0).random((10_000, 3))]
    start = time.process_time()
    found = undominated(points)
    assert time.process_time() - start < 5
    assert len(found) > 20
    assert found == sorted(found)


def test_the_front_is_what_no_other_beats():
    rng = np.random.default_rng(5)
    for size, kinds in itertools.product((1, 4, 25), (2, 3)):
        points = [tuple(map(float, p)) for p in rng.integers(0, 5, (size, kinds))]
        found = undominated(points)
        for i, p in enumerate(points):
            better = [q for q in points if all(a <= b for a, b in zip(q, p, strict=True)) and q != p]
            assert (i in found) == (not better and points.index(p) == i)
    assert undominated([None, None]) == []


def test_nothing_to_ask_is_refused():
    with pytest.raises(UsageError, match="trials ≥ 1"):
        search_by_asking({}, bowl, trials=3)
    with pytest.raises(UsageError, match="trials ≥ 1"):
        search_by_asking(DOMAIN, bowl, trials=0)


def test_a_line_goes_through_the_file_nearest_to_the_limit():
    line = fitted([(10.0, 25.0), (4.0, 13.0), (6.0, 17.5)], near=17.0, slope=2.0)
    assert line.of(6.0) == pytest.approx(17.5)
    assert 1.8 < line.slope < 2.2
    assert line.inverse(line.of(5.0)) == pytest.approx(5.0)


@pytest.mark.parametrize("points", [[(10.0, 25.0)], [(10.0, 25.0), (10.0, 26.0)], [(10.0, 25.0), (9.0, 27.0)]])
def test_where_points_say_nothing_the_expected_slope_stands(points):
    assert fitted(points, near=20.0, slope=2.5).slope == 2.5
