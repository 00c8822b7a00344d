"""How fast the files of two curves are: how many times as fast as its own dense file each was, never milliseconds of two schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paredown.compare.nouns import Difference
from paredown.curve import interval
from paredown.records import Measured, Record
from paredown.report.reading import entry, figure, runtime, text, threads
from paredown.report.wording import digits, times

APART = "which is faster: curves are timed apart, if at all; give the files themselves to time them in turns"
"""Of curves that timed nothing, or whose speeds do not compare."""
MILLISECONDS = "milliseconds of one curve against those of the other: two schedules; give the files themselves to time them in turns"
"""Of curves whose speeds over their dense files were compared."""
OWN = "its own dense file each"
"""Over what speeds are that say nothing of which file is faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What one point of a curve was timed at, in turns with the dense float file of each seed."""

    place: tuple[str, str, str]
    """(machine, runtime, threads)."""
    by_seed: Mapping[int, Measured]
    """Dense latency / its own, × with a 95 % interval."""
    dense: Mapping[int, str]
    """Digest of the dense file of each seed."""
    unsteady: int
    """Seeds that other load or throttling disturbed."""

    @property
    def mean(self) -> Measured:
        """The geometric mean over seeds; its ends hold the spread over seeds and that of each timing."""
        found = [*self.by_seed.values()]
        if not found:
            return Measured(value=None, unit="×", badge="not tested")
        low: float | None
        high: float | None
        value, low, high = _over_seeds([(_of(m.value), _of(m.low), _of(m.high)) for m in found])
        if low == high:  # the dense file over itself: an interval of no width would look like certainty
            low = high = None
        return Measured(
            value=value, unit="×", low=low, high=high, n=len(found), machine="; ".join(self.place), timing=True,
            protocol="dense latency / its own, in turns; geometric mean over seeds",
        )  # fmt: skip


def speeds_of(records: Sequence[Record], bases: Sequence[Record], codes: str) -> Speeds:
    """The speeds of one point; empty where a seed has none. `codes`: whether its files in codes are meant."""
    prefix = "quantized_" if codes else ""
    found: dict[int, Measured] = {}
    for r in records:
        base = r.cell["kind"] == "base" and not codes and figure(r, "latency_ms").value is not None
        speed = Measured(value=1.0, unit="×", low=1.0, high=1.0) if base else figure(r, f"{prefix}speedup")
        if None not in (speed.value, speed.low, speed.high) and min(_of(speed.value), _of(speed.low)) > 0:
            found[int(r.cell["seed"])] = speed
    first = records[0] if records else None
    timed = [figure(r, f"{prefix}latency_ms") for r in records]
    return Speeds(
        place=("", "", "")
        if first is None
        else (timed[0].machine or "unknown machine", runtime(first), f"{threads(first) or 'unknown'} threads"),
        by_seed=found if len(found) == len(records) else {},
        dense={int(r.cell["seed"]): text(entry(r, "digest"), 80) for r in bases},
        unsteady=sum("unsteady" in text(t.protocol, 400) for t in timed),
    )


def compared(first: tuple[str, Speeds], second: tuple[str, Speeds], notes: list[str]) -> list[Difference]:
    """Second against first, seed by seed: which is faster where both stand on the same dense files, else how much each gained on its own.

    Latencies of two schedules do not compare: the same file took twice as long in one as in the other beside other work. What compares
    is the ratio to the dense file that took turns with each. What stands against it is a note.
    """
    (a, x), (b, y) = first, second
    seeds = [s for s in x.by_seed if s in y.by_seed]
    if not seeds:
        return []
    for what, p, q in zip(("machine", "runtime", "number of threads"), x.place, y.place, strict=True):
        if p != q:
            notes.append(f"speeds are not compared: the curves were timed with another {what} ({p}; {q})")
            return []
    pairs = [(x.by_seed[s], y.by_seed[s]) for s in seeds]
    ends = [
        (_of(q.value) / _of(p.value), _of(q.low) / _of(p.high), _of(q.high) / _of(p.low)) for p, q in pairs
    ]  # both intervals at their worst
    value, low, high = _over_seeds(ends)
    same = all(x.dense.get(s) and x.dense.get(s) == y.dense.get(s) for s in seeds)
    notes += [
        f"{name}: {of.unsteady} of {len(of.by_seed)} files were timed beside other load, or throttled"
        for name, of in (first, second)
        if of.unsteady
    ]
    better = None if not same else b if low > 1 else a if high < 1 else None
    over = "the same dense files" if same else OWN
    verdict = f"{better} is faster" if better else "not distinguishable"
    if not same:
        verdict = "their dense files are not the same, so which file is faster is not told"
    own = f"{times(_of(y.mean.value))} and {times(_of(x.mean.value))} of dense"
    said = (
        f"speed of {b} against {a}: {times(value)} ({digits(low)} to {digits(high)}), by their speedups over {over} "
        f"({own}; {len(seeds)} seed{'s' if len(seeds) > 1 else ''}): {verdict}"
    )
    protocol = f"ratio of the speedups over {over}, geometric mean over seeds; bootstrap over seeds of the ends of both 95 % intervals"
    change = Measured(
        value=value, unit="×", low=low, high=high, n=len(seeds), protocol=protocol, machine=x.place[0], timing=True
    )
    return [Difference(what="latency_ms", first=a, second=b, change=change, better=better, said=said)]


def _over_seeds(ends: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """(geometric mean, low, high) of (value, low, high) per seed: a swap of both sides gives the inverse."""
    value, low, high = (interval([math.log(e[i]) for e in ends]) for i in range(3))
    lowest = low.mean if low.low is None else low.low
    highest = high.mean if high.high is None else high.high
    return math.exp(value.mean), math.exp(lowest), math.exp(highest)


def _of(value: float | None) -> float:
    """A number that is there: who calls has looked."""
    assert value is not None
    return float(value)
