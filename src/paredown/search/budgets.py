"""meet: tables in, plan out, measured on the exported file, and corrected by what was measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from paredown.allocate import Latency, allocate, predict
from paredown.budget import Budget
from paredown.couple import Coupling
from paredown.errors import InfeasibleError, MissingError, NothingToDo, ParedownError, ResourceError, UsageError
from paredown.examine import Cost
from paredown.export import Artifact
from paredown.measure import memory
from paredown.measure.latency import CALM, calmest
from paredown.measure.turns import timed_in_turns
from paredown.plan import Plan
from paredown.records import Measured, Record
from paredown.score.nouns import Scores
from paredown.search.candidates import Make, kept_units
from paredown.search.journal import measured_files
from paredown.search.lines import Line, fitted

LATENCY = ("latency", "latency_ms")
LIMITS = ("parameters", "macs", "size_bytes", *LATENCY, "peak_ram_bytes")
"""Amounts that a search meets."""
UNITS = {"parameters": "", "macs": "MAC", "size_bytes": "B", "latency": "×", "latency_ms": "ms", "peak_ram_bytes": "B"}
AIM = {"latency": 0.985, "latency_ms": 0.985, "size_bytes": 0.998, "peak_ram_bytes": 0.98}
"""What is aimed at, as a share of the limit: a limit is not to be missed by the noise of a clock."""
CLOSE = {
    "latency": 0.975,
    "latency_ms": 0.975,
    "size_bytes": 0.98,
    "peak_ram_bytes": 0.9,
    "parameters": 0.97,
    "macs": 0.97,
}
"""From which share of the limit on a file is near enough to it, and the search ends."""
_FIRST_TRIES, _TRIES = 32, 8
"""How often the aims are lowered by three percent for one more plan; at first until the largest step of alignment is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One file that was made and measured."""

    number: int
    plan: Plan | None
    foreseen: Mapping[str, float]
    measured: Mapping[str, float]
    holds: bool
    why: str = ""
    """Why there is no measurement, where the file could not be made."""
    by: str = ""
    """The allocation that chose the plan."""
    error: float | None = None
    """What the plan as a whole does to the output (`Search.joint`), where several allocations hold the limits."""
    attempt: int = 0
    """1 where the file was timed once more, because other load had disturbed the first time."""

    @property
    def dense_ms(self) -> float | None:
        """The dense file's time in the schedule of this file; None where nothing was timed."""
        if not set(LATENCY) <= self.measured.keys():
            return None
        return self.measured["latency_ms"] / self.measured["latency"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Met:
    """What a search found."""

    plan: Plan | None
    """None where the file holds every limit as it is."""
    asked: Mapping[str, float]
    """Limits: absolute; a latency as a fraction of the dense file's."""
    rounds: tuple[Round, ...]
    chosen: Round
    shares: Mapping[str, float] = field(default_factory=dict)
    """Layer → its share of the latency of all timed layers after the plan, *estimated* by the tables."""

    @property
    def already_met(self) -> bool:
        """Whether nothing had to be done."""
        return self.plan is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One search: the network, the limits, and how files are made and measured."""

    coupling: Coupling
    cost: Cost
    asked: Mapping[str, float]
    make: Make
    dense: Artifact
    """The float32 file that a fraction refers to, and that takes turns with every file that is timed."""
    samples: Any
    folder: Path
    """Where files lie while they are measured, and the journal of the rounds."""
    scores: Scores | None = None
    """None where files are only measured, and none is chosen."""
    table: Latency | None = None
    bytes_per_parameter: float | None = 4.0
    """Expected, where files say nothing yet; None takes what the first file has."""
    threads: int = 1
    runs: int = 200
    seconds: float = 3.0
    rounds: int = 6
    key: str = ""
    """What a journalled round depends on besides its plan."""
    say: Callable[[str], None] = lambda text: None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of allocate: allocation, sensitivity, include, exclude, floor, align, target, normalize."""
    also: Sequence[str] = ()
    """Allocations that are tried beside that of `options`, where `joint` can tell which is better."""
    joint: Callable[[Plan], float] | None = None
    """How far a plan as a whole moves the output, at best after a fit: sums over spaces, each alone, do not say it."""
    by_table: ClassVar[bool] = True
    """Whether milliseconds are foreseen by the layers' table."""

    @property
    def allocation(self) -> str:
        """That of `options`."""
        return str(self.options.get("allocation", ""))

    # ---------------------------------------------------------------------------------------------------- foreseeing

    def x(self, name: str, plan: Plan | None) -> float:
        """What an amount is a line of: exact counts, or the sum of the layers' times."""
        parameters, macs = (self.cost.parameters, self.cost.macs) if plan is None else predict(
            self.coupling, self.cost, plan
        )  # fmt: skip
        if name in LATENCY and self.table is not None and self.foresees:
            units = {s.name: len(s) for s in self.coupling.spaces}
            return float(self.table.total(units, kept_units(self.coupling, plan)))
        return float(macs if name == "macs" or name in LATENCY else parameters)

    @property
    def foresees(self) -> bool:
        """Whether a table says milliseconds; else they are a line of multiply-accumulates."""
        return self.table is not None and self.table.shrinks

    def lines(self, rounds: Sequence[Round]) -> dict[str, Line]:
        """Every amount as a line, from the files measured so far."""
        out = {}
        for name, limit in self.asked.items():
            points = [(self.x(name, r.plan), r.measured[name]) for r in rounds if name in r.measured]
            if name in ("parameters", "macs"):
                out[name] = Line(slope=1.0, offset=0.0)
                continue
            x, y = points[0]
            expected, whole = self.bytes_per_parameter or 0.0, y / max(x, 1e-12)
            if name in LATENCY or (name == "size_bytes" and self.bytes_per_parameter is None):
                expected = whole
            elif name != "size_bytes":
                expected = 1.0  # memory: most of it is no parameter
            out[name] = fitted(points, near=limit, slope=expected)
        return out

    def allocated(self, lines: Mapping[str, Line], aims: Mapping[str, float]) -> tuple[Plan | None, bool]:
        """The plan by the lines as they are, and whether that is the least that floor and alignment allow."""
        assert self.scores is not None  # they choose
        counts: dict[str, int] = {}
        for name in self.asked:
            if name in LATENCY and self.foresees:
                continue
            by = "macs" if name == "macs" or name in LATENCY else "parameters"
            wanted = max(2, int(lines[name].inverse(aims[name])))
            counts[by] = min(counts.get(by, wanted), wanted)
        timed = next((n for n in self.asked if n in LATENCY and self.foresees), None)
        latency, limit = None, None
        if timed is not None and self.table is not None:
            line = lines[timed]
            latency = dataclasses.replace(self.table, scale=line.slope, rest_ms=max(line.offset, 0.0))
            limit = max(aims[timed] - min(line.offset, 0.0), 1e-9)
        budget = Budget(latency_ms=limit, **counts)
        try:
            plan = allocate(self.coupling, self.scores, self.cost, budget, latency=latency, **self.options)
        except NothingToDo as error:
            if error.nearest is None:
                raise
            return None, False  # to keep all is nearest: a little less takes something
        except InfeasibleError as error:
            if error.nearest is None:
                raise
            return error.nearest, True
        return (plan, False) if plan.keep else (None, False)

    def by(self, allocation: str) -> Search:
        """The same search by another allocation."""
        return dataclasses.replace(self, options={**self.options, "allocation": allocation})

    # ----------------------------------------------------------------------------------------------------- measuring

    def measured(self, number: int, plan: Plan | None, foreseen: Mapping[str, float], attempt: int = 0) -> Round:
        """The plan's file, made and measured; or as the journal has it."""
        digest = "" if plan is None else plan.digest
        found, why = self._known(digest, attempt), ""
        if self.asked.keys() <= {"parameters", "macs"}:  # counted, whatever the file
            found = {n: self.x(n, plan) for n in ("parameters", "macs")}
        if found is None:
            try:
                found = self._read(self.make(plan, self.folder / f"candidate{self.dense.path.suffix}"), plan)
            except (UsageError, InfeasibleError, ResourceError, MissingError):
                raise  # nothing that another plan would change
            except ParedownError as error:
                found, why = {}, str(error)
            self._keep(digest, found, why, attempt)
        holds = bool(found) and all(found[n] <= limit for n, limit in self.asked.items())
        return Round(
            number=number, plan=plan, foreseen=dict(foreseen), measured=found, holds=holds, why=why, by=self.allocation,
            attempt=attempt,
        )  # fmt: skip

    def _read(self, file: Artifact, plan: Plan | None) -> dict[str, float]:
        values: dict[str, float] = {n: self.x(n, plan) for n in ("parameters", "macs")}
        values["size_bytes"] = float(file.size_bytes)
        if set(LATENCY) & self.asked.keys():
            times = self._timed(file)
            values["latency_ms"], values["latency"] = times["this"], times["this"] / times["dense"]
        if "peak_ram_bytes" in self.asked:
            values["peak_ram_bytes"] = float(
                memory(file, self.samples, threads=self.threads)["peak_memory_bytes"].value or 0
            )
        return values

    def _timed(self, file: Artifact) -> dict[str, float]:
        """The file beside the dense one, in the calmest of a few schedules."""
        files = {"this": file, "dense": self.dense}
        return calmest(
            lambda: timed_in_turns(
                files, self.samples, threads=self.threads, runs=self.runs, seconds=self.seconds
            ), lambda times: times["dense"], least_ms=self._least_dense_ms(),
        )  # fmt: skip

    def _least_dense_ms(self) -> float:
        """Of the schedules that the journal has of this search; inf where it has none."""
        records = measured_files(self.folder / "search.jsonl").under(self.key)
        times = [
            tuple(r.measured[n].value for n in ("latency_ms", "latency"))
            for r in records
            if set(LATENCY) <= r.measured.keys()
        ]
        return min((ms / share for ms, share in times if ms and share), default=math.inf)

    def _known(self, digest: str, attempt: int) -> dict[str, float] | None:
        for record in measured_files(self.folder / "search.jsonl").of(digest, self.key):
            if (
                record.cell.get("attempt", 0) == attempt and self.asked.keys() <= record.measured.keys()
            ):  # one that was searched for less says too little
                return {n: float(m.value) for n, m in record.measured.items() if m.value is not None}
        return None

    def _keep(self, digest: str, found: Mapping[str, float], why: str, attempt: int) -> None:
        numbers = {n: Measured(value=v, unit=UNITS[n], timing=n in LATENCY) for n, v in found.items()}
        cell = {"stage": "search", "key": self.key, **({"attempt": attempt} if attempt else {})}
        record = Record(cell=cell, plan_digest=digest, measured=numbers, details={"why": why} if why else {})
        measured_files(self.folder / "search.jsonl").add(record)


def meet(search: Search) -> Met:
    """A plan whose exported file holds every limit, the one that gives away least.

    Of the files measured so far, each amount is a line of what can be counted: bytes and memory of the parameters, milliseconds
    of the sum of the layers' tables. The budget is turned into counts by these lines, allocated, carried out, exported and
    measured; the lines are drawn anew through the file nearest to the limit, and so on until a file holds the limits and is
    near to them, for `rounds` files at most. Then the same for every allocation of `also`, by the lines through all files so far; of the
    best file of each the one whose plan moves the output least (`joint`) is taken: measured sensitivities are of one space
    at a time, and where most of a network leaves, one share everywhere may be better than what their sum says.

    Raises InfeasibleError where none holds, with the plan that came nearest; NothingToDo where nothing is free; UsageError.
    """
    _checked(search)
    rounds = [search.measured(0, None, {})]
    search.say(in_a_line(search, rounds[0]))
    if not rounds[0].measured:
        msg = f"the network must be exportable as it is. {rounds[0].why}"
        raise InfeasibleError(msg)
    nothing: list[NothingToDo] = []
    if not rounds[0].holds:
        for allocation in (search.allocation, *(search.also if search.joint is not None else ())):
            try:
                _towards(search if allocation == search.allocation else search.by(allocation), rounds)
            except NothingToDo as error:  # another allocation may find something, or has
                nothing.append(error)
                search.say(f"search: nothing by {allocation}: {error.reason}")
    if nothing and len(rounds) == 1:
        raise nothing[0]
    if not any(r.holds for r in rounds):
        raise _infeasible(search, rounds)
    chosen = _chosen(search, rounds)
    return Met(
        plan=chosen.plan,
        asked=dict(search.asked),
        rounds=tuple(rounds),
        chosen=chosen,
        shares=layer_shares(search, chosen.plan),
    )


def _towards(search: Search, rounds: list[Round]) -> None:
    """Files by one allocation until one holds the limits and is near to them; each is appended to `rounds`."""
    aims = _aims(search)
    for _ in range(search.rounds):
        done = _next(search, rounds, aims)
        if done is None:
            return
        rounds.append(done)
        search.say(in_a_line(search, done))
        if _taken_again(search, rounds):
            aims = _aims(search)  # they were lowered by what was disturbed
        if _is_near(search, rounds[-1]):
            return


def _aims(search: Search) -> dict[str, float]:
    return {n: limit * AIM.get(n, 1.0) for n, limit in search.asked.items()}


def _taken_again(search: Search, rounds: list[Round]) -> bool:
    """Time files anew, once each, whose schedule the others show to have been disturbed: the dense file was slower there. Whether any were."""
    taken = False
    least = min((r.dense_ms for r in rounds if r.dense_ms is not None), default=math.inf)
    for number, found in enumerate(rounds):
        if found.attempt or found.dense_ms is None or found.dense_ms <= CALM * least:
            continue
        search.say(
            f"search {number}: other load disturbed it (the dense file took {found.dense_ms:.4g} ms, {least:.4g} elsewhere)"
        )
        again = search.measured(number, found.plan, found.foreseen, attempt=1)
        if again.measured:
            rounds[number], taken = dataclasses.replace(again, by=found.by), True
            search.say(in_a_line(search, rounds[number]))
    return taken


def _chosen(search: Search, rounds: list[Round]) -> Round:
    """Of each allocation's files that hold the limits the one of least expected loss; of these the one that moves the output least."""
    holding: dict[str, list[Round]] = {}
    for found in rounds:
        if found.holds:
            holding.setdefault(found.by, []).append(found)
    best = [min(of_one, key=lambda r: (_expected(r), -search.x("parameters", r.plan))) for of_one in holding.values()]
    if search.joint is None or len(best) == 1:
        return best[0]
    seen = []
    for found in best:
        moved = search.joint(found.plan) if found.plan is not None else 0.0
        seen.append(dataclasses.replace(found, error=moved if math.isfinite(moved) else None))
        rounds[found.number] = seen[-1]
        search.say(f"search {found.number}: by {found.by} the output moves by {moved:.4g}")
    return min(seen, key=lambda r: math.inf if r.error is None else r.error)


def layer_shares(search: Search, plan: Plan | None) -> dict[str, float]:
    """Layer → its share of the milliseconds of all timed layers; layers of one name are added."""
    if search.table is None:
        return {}
    units, kept = {s.name: len(s) for s in search.coupling.spaces}, kept_units(search.coupling, plan)
    times = [(layer.name, float(layer.of(units, kept))) for layer in search.table.layers]
    total = sum(ms for _, ms in times)
    out: dict[str, float] = {}
    for name, ms in times:
        out[name] = out.get(name, 0.0) + ms / max(total, 1e-12)
    return out


def _checked(search: Search) -> None:
    unknown = [n for n in search.asked if n not in LIMITS]
    if unknown or not search.asked:
        msg = f"a search must be given limits among {', '.join(LIMITS)}. Got {', '.join(unknown) or 'none'}."
        raise UsageError(msg)
    if search.by_table and set(LATENCY) & search.asked.keys() and search.table is None:
        msg = "a limit of latency must come with a table of the layers' times. Got none. See search.latency_table."
        raise UsageError(msg)


def _is_near(search: Search, last: Round) -> bool:
    """Whether a file holds the limits and leaves little unused."""
    return last.holds and any(last.measured[n] >= CLOSE[n] * v for n, v in search.asked.items())


def _next(search: Search, rounds: Sequence[Round], aims: dict[str, float]) -> Round | None:
    """One more file; None where no other plan comes out."""
    seen = {r.plan.digest if r.plan is not None else "" for r in rounds}
    kept = {_kept(r.plan) for r in rounds}
    lines, own = search.lines(rounds), rounds[-1] if rounds[-1].by == search.allocation else None
    for _ in range(_TRIES if len(rounds) > 1 else _FIRST_TRIES):
        plan, floored = search.allocated(lines, aims)
        foreseen = {n: lines[n].of(search.x(n, plan)) for n in search.asked}
        if plan is not None and plan.digest not in seen and _kept(plan) not in kept:
            for name in aims:  # allocation lands near its amount, above or below: an overshoot is aimed off
                if foreseen[name] > search.asked[name]:
                    aims[name] -= foreseen[name] - search.asked[name]
            return search.measured(len(rounds), plan, foreseen)
        if floored:
            return None
        if any(r.holds and (r is own or _kept(r.plan) == _kept(plan)) for r in rounds):
            return None  # the same answer again: there is none nearer to the limit
        for name in aims:
            aims[name] *= 0.97
    return None


def _kept(plan: Plan | None) -> str:
    if plan is None:
        return ""
    return repr((sorted((n, sorted(a.items())) for n, a in plan.keep.items()), sorted(plan.ranks.items(), key=str)))


def _expected(found: Round) -> float:
    made = {} if found.plan is None else found.plan.made_by
    return float(made.get("expected_increase", sum(made.get("losses", {}).values())))


def _excess(search: Search, found: Round) -> float:
    if not found.measured:
        return float("inf")
    return max(found.measured[n] / v for n, v in search.asked.items())


def _infeasible(search: Search, rounds: Sequence[Round]) -> InfeasibleError:
    # the network as it is holds nothing and is no answer, even where the noise of a clock puts it nearest
    best = min([r for r in rounds if r.plan is not None and r.measured] or rounds, key=lambda r: _excess(search, r))
    worst = max(search.asked, key=lambda n: best.measured.get(n, float("inf")) / search.asked[n])
    got = (
        f"{_figure(worst, best.measured[worst])} at the nearest of {len(rounds)} files" if best.measured else "no file"
    )
    msg = f"{worst} must be at most {_figure(worst, search.asked[worst])}. Got {got}."
    advice = f"{_what_stays(worst, best)}Lower prune.floor, exclude less, allow more rounds, or ask for more."
    return InfeasibleError(msg, nearest=best.plan, advice=advice)


def _what_stays(worst: str, best: Round) -> str:
    """What no plan lowers, where that is likely what is in the way; "" elsewhere."""
    if worst == "peak_ram_bytes":
        return "Most of it may be the runtime's own, which no plan lowers: the table of the report tells what is above the bare runtime. "
    if worst == "latency" and best.plan is not None and best.measured.get(worst, 0.0) >= 1.0:
        return "The nearest file is no faster than the dense float one: in this runtime its codes may be what is slow, and levels of pruning (prune.levels) are measured in float as well. "
    return ""


def _figure(name: str, value: float) -> str:
    unit = UNITS[name]
    text = f"{value:,.0f}" if unit in ("", "B", "MAC") else f"{value:.4g}"
    return f"{text} {unit}".strip() if unit != "×" else f"{text} × dense"


def in_a_line(search: Search, found: Round) -> str:
    """A round, for a person."""
    if not found.measured:
        return f"search {found.number}: no file: {found.why[:200]}"
    parts = []
    for name, limit in search.asked.items():
        seen = f", foreseen {_figure(name, found.foreseen[name])}" if name in found.foreseen else ""
        parts.append(f"{name} {_figure(name, found.measured[name])} measured{seen}, asked {_figure(name, limit)}")
    return f"search {found.number}: {'; '.join(parts)}: {'holds' if found.holds else 'missed'}"
