"""A budget met by pruning, low rank and bits together: which way and how far is asked, all else is solved, and every answer is held to the limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from paredown.errors import InfeasibleError, NothingToDo, ParedownError, RejectedError
from paredown.pipeline.apart import Learnt, apart
from paredown.pipeline.fitted import Shrinking, TooLarge, in_words, narrowest_bytes, solved, weighed, widths_of
from paredown.pipeline.folder import key_of
from paredown.pipeline.run import Run
from paredown.pipeline.searches import as_it_is, rank_search_of, search_of
from paredown.pipeline.shrink import (
    Thing,
    can_train,
    held_out,
    known_bits,
    moved,
    plain_options,
    prepared,
    recovered,
    repair_of,
    rounded,
)
from paredown.pipeline.ways import Here, Way
from paredown.plan import Plan
from paredown.program import Program
from paredown.prune import Pruned
from paredown.quantize.mixed import Width
from paredown.recipe_fields import SEARCHED, Level
from paredown.search.asking import Answer, Domain, Trial, Values, reason_of, search_by_asking, undominated
from paredown.search.budgets import Met, Search, meet
from paredown.search.probe import UNITS

LEAST_SHARE, MOST_SHARE = 0.15, 0.95
"""Of the parameters that a trial leaves, where bits take what is still too much."""
LEAST_PART, MOST_PART = 0.2, 0.8
"""How far channels go before ranks: of the way from what is to what is asked, by ratios."""
TIGHT, HOPELESS = 0.7, 1.5
"""Between these shares of the limit the narrowest file, by the estimate, is made and weighed."""
REACHING = 3
"""Trials between the fewest channels, where these hold the bytes and nothing else did, and what did not."""
ESTIMATED = "estimated"
NOTHING = 100.0
"""What a trial without an answer is told as, in a search for several: a relative squared error of no use (zeros have 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One level that a search chose."""

    level: Level
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """What leaves the network, level after level, and what was measured of its file in the scheme's own bits."""

    steps: tuple[Step, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """What a search by all means chose."""

    steps: tuple[Step, ...]
    """None where bits alone are enough."""
    shrinking: Shrinking | None
    """Where bits per layer are chosen after the training: what for."""
    told: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """All that trials of one search share."""

    run: Run
    way: Way
    here: Here
    limits: Mapping[str, float]
    search: Search | None
    """By channels; None where no limit but bytes is held, and those by bits."""
    shrinking: Shrinking | None
    """None where widths are those of the scheme."""
    smallest: list[tuple[float, str]] = field(default_factory=list)
    nearest: list[Plan] = field(default_factory=list)
    """Of trials that could not hold the limits."""
    kept: dict[str, Pruned] = field(default_factory=dict)

    def asked(self, times: float) -> dict[str, float]:
        """The limits that what leaves has to hold, so many times; bytes are left to the bits where there are some."""
        left_to_bits = {"size_bytes"} if self.shrinking is not None else set()
        return {n: times * v for n, v in self.limits.items() if n not in left_to_bits}

    # ------------------------------------------------------------------------------------------------- what leaves

    def steps(self, values: Values, times: float) -> Chain:
        """What leaves the network by that way, so that the limits (but bytes, where bits remain) hold; measured where they need files.

        Raises InfeasibleError where it cannot, NothingToDo where nothing would leave.
        """
        by, asked = values["way"], self.asked(times)
        if by == "none":
            return self._as_it_is(asked)
        if self.shrinking is not None:
            count = max(2, int(float(values["share"]) * self.here.cost.parameters))
            if not asked and by != "both":
                return Chain(steps=(self._of_share(count, ranks=by == "low rank"),))
            asked = {**asked, "parameters": min(float(count), asked.get("parameters", float(count)))}
        if by == "channels":
            also = (
                () if self.search is None or self.shrinking is not None else self.search.also
            )  # with bits every trial would
            return _chain(meet(dataclasses.replace(self._within(asked), also=also)), ranks=False)
        if by == "low rank":
            search = rank_search_of(self.run, self.way, self.here, self._within(asked))
            return _chain(meet(search), ranks=True)
        return self._both(asked, float(values["part"]))

    def _within(self, asked: Mapping[str, float]) -> Search:
        assert self.search is not None  # there are limits
        return dataclasses.replace(self.search, asked=asked, also=())

    def _as_it_is(self, asked: Mapping[str, float]) -> Chain:
        if not asked:
            return Chain()
        whole = self._within(asked).measured(0, None, {})
        if not whole.holds:
            msg = f"the network as it is must hold {', '.join(asked)}. It does not."
            raise InfeasibleError(msg)
        return Chain(measured=whole.measured)

    def _of_share(self, parameters: int, *, ranks: bool) -> Step:
        level = Level(parameters=parameters, factorize="svd" if ranks else None)
        plan = dataclasses.replace(self.way, level=level).plan(self.here)
        if not plan.keep and not plan.ranks:
            msg = f"a share of {parameters:,} parameters must remove something. Got nothing."
            raise NothingToDo(msg)
        return Step(level=level, plan=plan)

    def _both(self, asked: Mapping[str, float], part: float) -> Chain:
        """Channels for a part of the way, in ratios; ranks of what is left for the rest."""
        search = self._within(asked)
        whole = search.measured(0, None, {})
        if whole.holds:
            return Chain(measured=whole.measured)
        now = whole.measured
        aims = {n: now[n] * min(1.0, v / now[n]) ** part for n, v in asked.items()}
        plan, _ = search.allocated(search.lines([whole]), aims)
        if plan is None:
            msg = f"channels must give something for {part:.2f} of the way. Got nothing: a step of alignment is more."
            raise NothingToDo(msg)
        alone = _step(plan, ranks=False)
        first = dataclasses.replace(alone, level=alone.level.model_copy(update={"epochs": 0}))
        left = Here.of(self.here.program, self._first(plan))
        met = meet(rank_search_of(self.run, self.way, left, search))
        if met.plan is None:  # channels were enough: alignment took more than its part
            return Chain(steps=(alone,), measured=met.chosen.measured)
        return Chain(steps=(first, _step(met.plan, ranks=True)), measured=met.chosen.measured)

    def _first(self, plan: Plan) -> Pruned:
        """The plan on the network, fitted; the last one is kept, since a trial asks twice."""
        if plan.digest not in self.kept:
            self.kept.clear()
            self.kept[plan.digest] = prepared(self.run, self.way, self.here, plan)
        return self.kept[plan.digest]

    def variant(self, steps: Sequence[Step]) -> Thing:
        """The network without what leaves, as well as it can be without much training."""
        if not steps:
            return self.here.program
        thing = self._first(steps[0].plan)
        for step in steps[1:]:
            left = Here.of(self.here.program, thing)
            thing = prepared(self.run, self.way, left, step.plan, before=thing)
        return recovered(self.run, self.here.program, thing)

    # ------------------------------------------------------------------------------------------------------- points

    def answer(self, values: Values) -> tuple[tuple[float, ...], Mapping[str, Any]]:
        """The error of the output at the limits, and at every multiple of them that the front is asked for."""
        front, points, made = self.run.recipe.budget.front, [], _Made()
        missed: list[ParedownError] = []
        for times in (1.0, *(t for t in front if t != 1.0)):
            try:
                points.append(self.point(values, times, made))
            except ParedownError as error:  # of one multiple: the others may be reached
                missed.append(error)
                if isinstance(error, InfeasibleError) and error.nearest is not None:
                    self.nearest.append(error.nearest)
                points.append({"times": times, "error": None, "why": reason_of(error)})
        if len(missed) == len(points):
            raise missed[0]
        losses = tuple(NOTHING if p["error"] is None else float(p["error"]) for p in points)
        return losses, {**points[0], "points": points}

    def point(self, values: Values, times: float, made: _Made) -> dict[str, Any]:
        """What the way comes to within so many times the limits."""
        chain = self.steps(values, times)
        steps = chain.steps
        name = repr([s.plan.digest for s in steps])
        variant = made.variants[name] = made.variants[name] if name in made.variants else self.variant(steps)
        amounts = {**_counts(steps, self.here), **{n: chain.measured[n] for n in self.limits if n in chain.measured}}
        found: dict[str, Any] = {"times": times, "amounts": amounts, "levels": [_described(s.level) for s in steps]}
        losses: float | None = None
        known, unit = known_bits(self.run, variant)
        bits: dict[str, int] = {}
        repair: Sequence[str] = self.run.recipe.quantize.repair
        if self.shrinking is not None:
            if name not in made.groups:
                made.groups[name] = widths_of(
                    variant, plain_options(self.run), repair_of(self.run), self.shrinking.widths, known
                )
                made.beside[name] = self._beside(variant) if steps else self.shrinking.overhead
            bits, size, losses = self._bits(variant, name, values, times, made)
            repair = repair_of(self.run)
            amounts["size_bytes"] = size
            found |= {"bits": bits, "size_bytes": size}
        quantized = rounded(self.run, variant, bits, repair)
        error = moved(self.run, self.here.program, quantized)
        if not math.isfinite(error):
            msg = f"the output of what is tried must be finite. Got an error of {error}. Lower recover.lr, or set budget.trial_epochs to 0."
            raise RejectedError(msg)
        if self.run.recipe.budget.front:
            found["held_out"] = held_out(self.run, quantized)
        self._say(values, found, error)
        alike = known is None or unit == UNITS["mse"]  # a sum of nats says nothing of a squared error
        return {**found, "error": error, "forecast": _forecast(steps, losses, error) if alike else None, "why": ""}

    def _beside(self, variant: Thing) -> float:
        """Bytes of the variant's file with 8 bits that are no codes: two factors take more of them than one layer."""
        assert self.shrinking is not None
        file = self.run.folder.steps / f"search-{self.way.number}" / "trial.onnx"
        _, known = weighed(variant, plain_options(self.run), file, self.shrinking.limit, self.shrinking.widths)
        file.unlink()
        return known.overhead

    def _bits(
        self, variant: Thing, name: str, values: Values, times: float, made: _Made
    ) -> tuple[dict[str, int], int, float]:
        """Widths of least summed error within the bytes. Where little room is left the narrowest file is made: what its ops
        take is an estimate until then, and after the training too late a surprise."""
        assert self.shrinking is not None
        groups, overhead, limit = made.groups[name], made.beside[name], times * self.shrinking.limit
        least = sum(min(w.size_bytes for w in g) for g in groups)
        what = f"{values['way']}, {float(values['share']):.2f} of the parameters"
        if least + overhead > HOPELESS * limit:
            self.smallest.append((least + overhead, f"{what}, {ESTIMATED}"))
            msg = f"codes of the narrowest widths must fit {limit - overhead:,.0f} B. Got {least:,} B"
            raise TooLarge(msg, least)
        if least + overhead > TIGHT * limit:
            if name not in made.narrowest:
                file = self.run.folder.steps / f"search-{self.way.number}" / "trial.onnx"
                made.narrowest[name] = narrowest_bytes(variant, groups, plain_options(self.run), file)
            if made.narrowest[name] > limit:
                self.smallest.append((made.narrowest[name], f"{what}, weighed"))
                msg = f"the file with the fewest bits must fit {limit:,.0f} B. Got {made.narrowest[name]:,} B"
                raise TooLarge(msg, least)
        spread = solved(groups, max(least, int(limit - overhead)))
        losses = sum(w.error for g in groups for w in g if spread.bits[w.layer] == w.bits)
        weighed_now = made.narrowest.get(name) if spread.size_bytes == least else None
        return spread.bits, weighed_now or round(spread.size_bytes + overhead), losses

    def _say(self, values: Values, found: Mapping[str, Any], error: float) -> None:
        how = f"{values['way']} {float(values['share']):.2f}" if "share" in values else _in_words(values)
        limit = "" if found["times"] == 1 else f" within {found['times']:g} of the limits"
        told = f": error {error:.4g}{limit}"
        if self.shrinking is not None:
            bits = found["bits"].values()
            told += f" at {found['size_bytes']:,} B (estimated), bits {min(bits)}–{max(bits)}"
        self.run.say(f"budget: {how}{told}")


@dataclass(frozen=True, slots=True)
class _Made:
    """What points of one trial share."""

    variants: dict[str, Thing] = field(default_factory=dict)
    groups: dict[str, list[list[Width]]] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)
    """Bytes of a variant's file that are no codes."""
    narrowest: dict[str, int] = field(default_factory=dict)
    """Bytes of a variant's file with the fewest bits, where it was weighed."""


def by_bits(recipe: Any) -> bool:
    """Whether bytes are met by bits per layer, beside whatever else gives way."""
    bounds = recipe.budget
    if recipe.quantize.scheme != "int8":  # another one has its bits already
        return False
    return bounds.size_bytes is not None and min(bounds.bits) < 8 and recipe.target.startswith("onnxruntime")


def is_joint(recipe: Any) -> bool:
    """Whether several means are weighed against each other by what they do to the output."""
    given = any(getattr(recipe.budget, n) is not None for n in SEARCHED)
    return given and (by_bits(recipe) or recipe.budget.together or bool(recipe.budget.front))


def means_of(run: Run, way: Way, here: Here, limits: Mapping[str, float], shrinking: Shrinking | None) -> Means:
    """All that trials share, here or in a process of their own."""
    rest = {n: v for n, v in limits.items() if shrinking is None or n != "size_bytes"}
    search = search_of(run, way, here, rest) if rest or run.recipe.budget.together else None
    return Means(run=run, way=way, here=here, limits=limits, search=search, shrinking=shrinking)


def jointly(
    run: Run, way: Way, here: Here, limits: Mapping[str, float], *, program: Program, before: Pruned | None
) -> Joint | None:
    """The way, and how far to go it, so that within all limits the output moves least.

    Trials: channels, low rank (svd), or channels and then ranks (budget.together); with bits also the share of the parameters
    that is left, and the network as it is. What leaves is allocated within the limits (knapsack and spectrum, exact for what was
    measured), exported and measured where a limit needs it; bits are those of least summed error within the bytes, by an integer
    program. The result is fitted to the dense activations, has its batch norm re-estimated (and is trained for
    budget.trial_epochs). A trial's loss is the squared error of its output on calibration data over the mean square of
    the dense output; with budget.front one for each multiple of the limits. Where budget.trial limits them, each trial has a
    process of its own, which reads `program` and what levels made of it `before`.

    None where the file holds all limits as it is, and no front is asked for. Raises InfeasibleError where no trial holds them.
    """
    shrinking, fits = None, True
    if by_bits(run.recipe):
        file = run.folder.steps / f"search-{way.number}" / "as-it-is.onnx"
        size, shrinking = weighed(here.program, plain_options(run), file, limits["size_bytes"], run.recipe.budget.bits)
        run.say(f"budget: {size:,} B with 8 bits and nothing pruned, asked {limits['size_bytes']:,.0f} B")
        fits = size <= limits["size_bytes"]
    rest = {n: v for n, v in limits.items() if shrinking is None or n != "size_bytes"}
    met = fits and (not rest or as_it_is(run, way, here, rest).holds)
    if met and not run.recipe.budget.front:
        return None
    means = means_of(run, way, here, limits, shrinking)
    with _answering(means, program, before) as answer:
        trials = tuple(_trials(means, answer))
    good = [t for t in trials if _holds(t)]
    if not good:
        raise _out_of_reach(means, trials)
    best = min(good, key=lambda t: (t.losses or (NOTHING,))[0])
    if met:  # only the front was asked for
        return Joint(steps=(), shrinking=None, told={**_told(means, trials, best), "already_met": True})
    return Joint(steps=means.steps(dict(best.values), 1.0).steps, shrinking=shrinking, told=_told(means, trials, best))


@contextmanager
def _answering(means: Means, program: Program, before: Pruned | None) -> Iterator[Callable[[Values], Answer]]:
    """Who answers trials: this process, or one for each of them."""
    if not means.run.recipe.budget.trial.limits:
        yield means.answer
        return

    def learn(said: Learnt) -> None:
        means.smallest.extend(said.smallest)
        means.nearest.extend(said.nearest)

    with apart(
        means.run, number=means.way.number, program=program, before=before, here=means.here, limits=means.limits,
        shrinking=means.shrinking, learn=learn,
    ) as asked:  # fmt: skip
        yield asked.answer


def _trials(means: Means, answer: Callable[[Values], Answer]) -> Iterator[Trial]:
    """What is asked: first each way that has no number to choose, then the others as often as budget.trials says."""
    run, bounds = means.run, means.run.recipe.budget
    journal = run.folder.steps / f"search-{means.way.number}" / "trials.jsonl"
    key = key_of(run.recipe.digest, means.here.program.source_digest, run.environment)
    shared: dict[str, Any] = {"journal": journal, "objectives": 1 + len([t for t in bounds.front if t != 1.0])}
    domain: Domain
    if means.shrinking is not None:
        alone: list[Domain] = [{"way": ("none",), "share": (1.0, 1.0)}]
        ways = ("channels", *(("low rank",) if bounds.low_rank else ()), *(("both",) if bounds.together else ()))
        domain = {"way": ways, "share": (LEAST_SHARE, MOST_SHARE)}
    else:
        one_by_one = ("channels", "low rank") if bounds.together else ("channels",)
        alone = [{"way": (name,)} for name in one_by_one]
        domain = {"way": ("both",)} if bounds.together else {}
    if not can_train(run.task):  # bits ask for no training
        domain = {}
    elif bounds.together:
        domain = {**domain, "part": (LEAST_PART, MOST_PART)}
    found: list[Trial] = []
    for single in alone:
        found += search_by_asking(single, answer, trials=1, key=f"{key} {single['way'][0]}", **shared)
    if bounds.trials and domain:
        found += search_by_asking(domain, answer, trials=bounds.trials, seed=run.recipe.seed, key=key, **shared)
    yield from found
    if bounds.trials and domain and means.shrinking is not None and not any(map(_holds, found)):
        yield from _reaching(means, found, lambda at: search_by_asking(
            {"way": ("channels",), "share": (at, at)}, answer, trials=1, key=f"{key} reaching {at:g}", **shared)[0])  # fmt: skip


def _holds(trial: Trial) -> bool:
    """Whether a trial is within the limits themselves, whatever of their multiples."""
    return trial.losses is not None and trial.told.get("error", trial.losses[0]) is not None


def _reaching(means: Means, found: Sequence[Trial], asked: Callable[[float], Trial]) -> Iterator[Trial]:
    """Where no share that was asked holds the bytes: the fewest channels that floor and alignment allow, and if these hold them more,
    by halves of the ratio to what did not."""
    least = _least(means)
    if least is None:
        return
    low = math.ceil(1e4 * int(least.made_by["reached"]["parameters"]) / means.here.cost.parameters) / 1e4
    first = asked(low)
    yield first
    if not _holds(first):
        return
    missed = [float(t.values["share"]) for t in found if t.values["way"] == "channels"]
    high = min((at for at in missed if at > low), default=1.0)
    for _ in range(REACHING):
        at = round(math.sqrt(low * high), 4)
        if not low < at < high:
            return
        trial = asked(at)
        yield trial
        low, high = (at, high) if _holds(trial) else (low, at)


def _out_of_reach(means: Means, trials: Sequence[Trial]) -> Exception:
    """Why no trial holds the limits; where none came so far as to say, what the last one raised."""
    crashed = [t.error for t in trials if t.error is not None and not isinstance(t.error, InfeasibleError)]
    if len(crashed) == len(trials):
        return crashed[-1]
    limits = ", ".join(f"{n} {v:,.0f}" if v >= 100 else f"{n} {v:.4g}" for n, v in means.limits.items())
    what = (
        f"size_bytes must be reachable: {means.limits['size_bytes']:,.0f}"
        if [*means.limits] == ["size_bytes"]
        else f"the budget must be reachable: {limits}"
    )
    least = min(means.smallest, key=lambda s: (s[1].endswith(ESTIMATED), s[0]), default=None)
    why = [t.why or str(t.told.get("why", "")) for t in trials if t.error is None or t.error not in crashed][-1]
    plans = [
        (e.nearest, e.reason) for t in trials if isinstance(e := t.error, InfeasibleError) and e.nearest is not None
    ]
    nearest, why = min(
        plans, key=lambda p: _excess(p[0], means.limits), default=(means.nearest[0] if means.nearest else None, why)
    )
    got = f"some {least[0]:,.0f} B at the least ({least[1]})" if least is not None else why.rstrip(".")
    others = f", of which {len(crashed)} ended with {reason_of(crashed[-1]).rstrip('.')}" if crashed else ""
    msg = f"{what}. Got {got} in {len(trials)} trials{others}."
    trains, bits = can_train(means.run.task), means.shrinking is not None
    fewer = "Allow fewer bits (budget.bits), " if bits else ""
    less = "lower prune.floor" if trains else "give train, or train_batches and step, for pruning"
    advice = f"{fewer}{less}, or ask for more."
    return InfeasibleError(msg, nearest=nearest or _least(means), advice=advice[0].upper() + advice[1:])


def _excess(plan: Plan, limits: Mapping[str, float]) -> float:
    """How far a plan is above the limits that can be counted."""
    reached = plan.made_by.get("reached") or {}
    return max((float(reached[n]) / v for n, v in limits.items() if n in reached), default=math.inf)


def _least(means: Means) -> Plan | None:
    """The least that floor and alignment allow."""
    try:
        return dataclasses.replace(means.way, level=Level(parameters=2)).plan(means.here)
    except InfeasibleError as error:
        return error.nearest  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------- told


def _step(plan: Plan, *, ranks: bool) -> Step:
    count = int(plan.made_by["reached"]["parameters"])
    return Step(level=Level(parameters=max(2, count), factorize="svd" if ranks else None), plan=plan)


def _chain(met: Met, *, ranks: bool) -> Chain:
    steps = () if met.plan is None else (_step(met.plan, ranks=ranks),)
    return Chain(steps=steps, measured=met.chosen.measured)


def _described(level: Level) -> dict[str, Any]:
    return level.model_dump(exclude_none=True)


def _counts(steps: Sequence[Step], here: Here) -> dict[str, Any]:
    if not steps:
        return {"parameters": here.cost.parameters, "macs": here.cost.macs}
    return {n: int(steps[-1].plan.made_by["reached"][n]) for n in ("parameters", "macs")}


def _in_words(values: Mapping[str, Any]) -> str:
    return f"{values['way']} {float(values['part']):.2f}" if "part" in values else str(values["way"])


def _forecast(steps: Sequence[Step], bits: float | None, error: float) -> dict[str, Any] | None:
    """What each thing by itself was measured to cost, added up, beside what all cost together: how far sums can be trusted.

    None for ranks, whose choice is by the spectrum, and for allocations that measure nothing.
    """
    units = [s.plan.made_by.get("expected_increase") for s in steps]
    if any(u is None for u in units) or (bits is None and not steps):
        return None
    total = sum(float(u) for u in units if u is not None) + (bits or 0.0)
    return {"units": sum(float(u) for u in units if u is not None), "bits": bits, "sum": total, "measured": error}


def _told(means: Means, trials: Sequence[Trial], best: Trial) -> dict[str, Any]:
    front = undominated([_losses(t.losses, t.told, means) for t in trials])
    told = {
        "asked": dict(means.limits),
        "trials": [_row(t) for t in trials],
        "chosen": trials.index(best),
        "front": front,
        "already_met": False,
    }
    if not means.run.recipe.budget.front:
        return told
    points = [(t, p) for t in trials for p in t.told.get("points", ()) if p["error"] is not None]
    kept = undominated([(p["error"], *(p["amounts"][n] for n in means.limits)) for _, p in points])
    rows = [_front_row(means, *points[at]) for at in kept]
    return {**told, "front_points": sorted(rows, key=lambda row: row["error"])}


def _losses(losses: Sequence[float] | None, told: Mapping[str, Any], means: Means) -> tuple[float, ...] | None:
    """Of a trial at the limits themselves: the error, and of each limit what it comes to."""
    if losses is None or told.get("error", losses[0]) is None:
        return None
    amounts = told.get("amounts") or {"size_bytes": told.get("size_bytes")}
    return (losses[0], *(float(amounts[n]) for n in means.limits))


def _row(trial: Trial) -> dict[str, Any]:
    bits, levels = trial.told.get("bits"), trial.told.get("levels") or []
    recipe: dict[str, Any] = {"prune.levels": levels} if levels or bits else {}
    if bits:  # all trials are solved for one limit: what tells points of nearly one size apart is these
        recipe["bits"] = in_words(bits)
    error = None if trial.losses is None else trial.told.get("error", trial.losses[0])
    return {
        "way": trial.values["way"], "share": trial.values.get("share"), "error": error,
        "size_bytes": trial.told.get("size_bytes"), "bits": bits, "why": trial.why or trial.told.get("why", ""), "recipe": recipe,
        **{n: trial.told[n] for n in ("amounts", "forecast") if trial.told.get(n)},
        **({"part": trial.values["part"]} if trial.values["way"] == "both" else {}),
    }  # fmt: skip


def _front_row(means: Means, trial: Trial, point: Mapping[str, Any]) -> dict[str, Any]:
    """A point of the front, with the keys of a recipe that make it."""
    # from these on a limit limits nothing, and of the dense file's latency a recipe takes no larger share
    whole = {"macs": means.here.cost.macs, "parameters": means.here.cost.parameters, "latency": 1.0}
    limits = {n: _written(n, point["times"] * v) for n, v in means.limits.items()}
    keys: dict[str, Any] = {f"budget.{n}": v for n, v in limits.items() if v < whole.get(n, v + 1)}
    if "latency_ms" in limits and means.run.recipe.budget.latency is not None:  # the recipe's own key, not a second one
        keys["budget.latency"] = f"{keys.pop('budget.latency_ms'):g}ms"
    if point["levels"]:
        keys["prune.levels"] = point["levels"]
    if point.get("bits"):
        keys["bits"] = in_words(point["bits"])
    return {
        "way": _in_words({k: v for k, v in trial.values.items() if k != "part" or trial.values["way"] == "both"}),
        "times": point["times"], "error": point["error"], "amounts": point["amounts"], "levels": point["levels"],
        "recipe": keys, "size_bytes": point["amounts"].get("size_bytes"), "held_out": point.get("held_out"),
        "epochs": means.run.recipe.budget.trial_epochs,
    }  # fmt: skip


def _written(name: str, value: float) -> Any:
    """An amount as a recipe takes it."""
    return round(value, 4) if name in ("latency", "latency_ms") else int(value)


__all__ = ["Joint", "Means", "Step", "by_bits", "is_joint", "jointly", "means_of"]
