"""Latency of a file in its runtime: warm-up, one thread, turns with the baseline, median and spread."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from paredown.measure.bundled.runner import disturbed
from paredown.measure.bundled.runner import spread as range_of
from paredown.records import Measured

T = TypeVar("T")

_WARM = 10
CALM = 1.08
"""Where a file takes more than this times its least known time, other load disturbs it. That does not slow all files alike: INT8
took half longer where float took a sixth, so that turns alone do not make up for it."""
TRIES = 3
"""How many series of one thing `calmest` takes at most."""
_SHORTEST_S = 5e-4
"""Runs shorter than this are timed in groups: the clock and the call would be a visible part of them."""


def latency(
    sessions: dict[str, Any],
    feeds: dict[str, Any],
    *,
    threads: int,
    runs: int,
    seconds: float,
    machine: str,
    batch: int = 1,
    baseline_ms: float | None = None,
) -> dict[str, Measured]:
    """Median latency of every session in milliseconds, with the 10th–90th percentile, taking turns.

    `sessions` and `feeds` go by name; the first is what is measured, a second one is the baseline. Each round runs
    every session once, in alternating order, so that drift of clock or load meets all of them; it ends after `runs`
    rounds or `seconds`, whichever comes first, but not before 5 rounds. `batch`: samples in one run, for the protocol.

    Such a series that other load or throttling disturbed, of any session, is taken once more; the steady one of the two counts,
    or the steadier, never both together, and the protocol says which. Disturbed is also a series in which the baseline takes
    CALM times `baseline_ms` or more; of two such ones that in which it took less counts.
    """
    names = list(sessions)
    times, groups, repeated = _series(sessions, feeds, runs, seconds, baseline_ms)
    measured = {}
    for name in names:
        what = protocol(threads, groups[name], batch) + (", in turns with the other file" if len(names) > 1 else "")
        what += repeated
        note = getattr(sessions[name], "note", "")
        measured[name] = spread(times[name], what + (f"; {note}" if note else ""), machine)
    if len(names) > 1:
        measured["ratio"] = ratio(np.asarray(times[names[1]]), np.asarray(times[names[0]]), machine)
    return measured


def _series(
    sessions: dict[str, Any], feeds: dict[str, Any], runs: int, seconds: float, baseline_ms: float | None
) -> tuple[dict[str, list[float]], dict[str, int], str]:
    """A steady series where one of two is: `readings`, and what the protocol says of a repetition."""
    taken = [readings(sessions, feeds, runs=runs, seconds=seconds)]
    why = [_disturbed(taken[0][0], baseline_ms)]
    if why[0]:
        taken.append(readings(sessions, feeds, runs=runs, seconds=seconds))
        why.append(_disturbed(taken[1][0], baseline_ms))
    if not why[0]:
        return *taken[0], ""
    if not why[1]:
        return *taken[1], "; series 2 of 2: the first was disturbed by other load or throttling, and is left out"
    used = min((0, 1), key=lambda i: _unrest(taken[i][0], baseline_ms))
    return *taken[used], f"; unsteady: both series were disturbed, this one, {used + 1} of 2, {why[used]}"


def _disturbed(times: dict[str, list[float]], baseline_ms: float | None) -> str:
    """Why a series is no one speed, of the first session that is not, or not the machine's usual one; "" where all are steady."""
    why = next((why for values in times.values() if (why := disturbed(values))), "")
    if why or baseline_ms is None or len(times) < 2:
        return why
    took = float(np.median([*times.values()][1]))
    return (
        f"was slowed by other load: the baseline took {took / baseline_ms:.2f} × its least time"
        if took > CALM * baseline_ms
        else ""
    )


def _unrest(times: dict[str, list[float]], baseline_ms: float | None) -> float:
    """How much a series was disturbed: how long the baseline took, where its least time is known, else the widest spread."""
    if baseline_ms is not None and len(times) > 1:
        return float(np.median([*times.values()][1]))
    return max(range_of(values) for values in times.values())


def calmest(take: Callable[[], T], reference_ms: Callable[[T], float], *, least_ms: float) -> T:
    """Of at most TRIES series the first in which a reference takes at most CALM times its least known time, else that in which it takes least.

    >>> series = iter([1.5, 1.2, 1.0])
    >>> calmest(lambda: next(series), lambda taken: taken, least_ms=1.15)
    1.2
    """
    best = take()
    for _ in range(TRIES - 1):
        if reference_ms(best) <= CALM * least_ms:
            break
        best = min(best, take(), key=reference_ms)
    return best


def protocol(threads: int, group: int, batch: int = 1) -> str:
    """How a latency was taken, in words."""
    runs = f"{group} run(s) per reading" + (f" of a batch of {batch}" if batch > 1 else "")
    return f"median, low–high is the 10th–90th percentile; {threads} thread, {_WARM} warm-up runs, {runs}"


def readings(
    sessions: dict[str, Any],
    feeds: dict[str, Any],
    *,
    runs: int,
    seconds: float,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """({name: milliseconds of every round}, {name: runs in one reading}) of sessions that take turns, as `latency` says.

    `clock` gives nanoseconds: with time.process_time_ns readings are of processor time, which other programs stretch less;
    it is the time on the wall where one thread works. A session of another process has a clock of its own.
    """
    names = list(sessions)
    groups = {name: _group(sessions[name], feeds[name]) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(runs):
            for name in names if turn % 2 == 0 else reversed(names):
                times[name].append(_timed(sessions[name], feeds[name], groups[name], clock))
            if turn >= 4 and time.perf_counter() - start > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return times, groups


def _timed(session: Any, feed: Any, group: int, clock: Callable[[], int] = time.perf_counter_ns) -> float:
    if hasattr(session, "timed"):  # it runs in another process, whose clock leaves out the way there
        return float(session.timed(feed, group))
    start = clock()
    for _ in range(group):
        session.run(None, feed)
    return (clock() - start) / group / 1e6


def _group(session: Any, feed: Any) -> int:
    """Warm up, and how many runs make one reading."""
    fastest = min(_timed(session, feed, 1) for _ in range(_WARM))
    return max(1, math.ceil(_SHORTEST_S * 1e3 / max(fastest, 1e-6)))


def spread(times_ms: list[float], protocol: str, machine: str) -> Measured:
    """Median and 10th–90th percentile; the protocol says so where they are far apart."""
    low, middle, high = (float(q) for q in np.percentile(times_ms, (10, 50, 90)))
    if high > 1.5 * low:
        protocol += f"; unsteady, p90 is {high / low:.1f} × p10: other load or throttling"
    return Measured(
        value=middle, unit="ms", low=low, high=high, n=len(times_ms), protocol=protocol, machine=machine, timing=True
    )


def ratio(before: Any, after: Any, machine: str) -> Measured:
    """How many times faster than the baseline: ratio of medians, 95 % bootstrap interval over rounds (seed 0)."""
    picks = np.random.default_rng(0).integers(0, len(before), (2000, len(before)))
    ratios = np.median(before[picks], axis=1) / np.median(after[picks], axis=1)
    low, high = (float(q) for q in np.percentile(ratios, (2.5, 97.5)))
    protocol = (
        "median of the baseline / median of this file; 95 % bootstrap interval over rounds, 2000 resamples, seed 0"
    )
    value = float(np.median(before) / np.median(after))
    return Measured(
        value=value, unit="×", low=low, high=high, n=len(before), protocol=protocol, machine=machine, timing=True
    )
