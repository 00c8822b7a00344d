"""Asking: what is not solved exactly is tried, a few times, where earlier trials say that it pays; Optuna by ask and tell, or a grid.

A journal of what was told makes a search resumable: the same questions are asked again, and those with an answer are not tried anew.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paredown.errors import InfeasibleError, RejectedError, ResourceError, UsageError
from paredown.records import append_line

Values = dict[str, float | str]
Domain = Mapping[str, tuple[float, float] | tuple[str, ...]]
"""Name → (lowest, highest), or the choices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One question and its answer."""

    values: Mapping[str, float | str]
    losses: tuple[float, ...] | None
    """Lower is better, one per objective; None where the trial failed: it is missing, not zero."""
    why: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What else is known of it, as JSON."""
    error: Exception | None = field(default=None, compare=False, repr=False)
    """What it raised, where it failed in this process."""


class FailedApart(RejectedError):
    """A trial that failed in a process of its own; `reason` is what `reason_of` said there."""

    def __init__(self, reason: str, where: str) -> None:
        super().__init__(f"a trial of a search must end well. Got {reason.rstrip('.')}{where}.")
        self.reason = reason


class OverLimit(ResourceError):
    """A trial that used up its `limit`, "time" or "memory": a search that goes on does not try it again."""

    def __init__(self, reason: str, limit: str) -> None:
        super().__init__(f"a trial of a search must stay within its {limit}. Got one that {reason}. Allow more.")
        self.reason, self.limit = reason, limit


Answer = tuple[tuple[float, ...], Mapping[str, Any]]


def search_by_asking(
    domain: Domain,
    answer: Callable[[Values], Answer],
    *,
    trials: int,
    objectives: int = 1,
    seed: int = 0,
    journal: Path | None = None,
    key: str = "",
) -> tuple[Trial, ...]:
    """`trials` questions out of the domain, each answered by losses (lower is better) and whatever else is to be kept.

    Optuna's TPE sampler with this seed asks, where Optuna is installed (the extra `search`); else points spread evenly
    (Halton 1960). An answer that raises an Exception is a failed trial and the search goes on. With a `journal` every answer
    is on disk before the next question; the same call goes on from there to the same result. Answers that failed are tried again then,
    but for those over a limit (OverLimit). Raises UsageError.

    >>> found = search_by_asking({"x": (0.0, 1.0)}, lambda v: ((abs(float(v["x"]) - 0.5),), {}), trials=3)
    >>> len(found), min(t.losses for t in found)[0] < 0.5
    (3, True)
    """
    if trials < 1 or objectives < 1 or not domain:
        msg = f"a search must have trials ≥ 1, objectives ≥ 1 and a domain. Got {trials}, {objectives} and {len(domain)} names."
        raise UsageError(msg)
    known = _told(journal, key)
    ask, tell = _asker(domain, objectives, seed)
    done: list[Trial] = []
    for number in range(trials):
        values = ask()
        trial = known.get(_name(values, number)) or _tried(values, answer)
        if _name(values, number) not in known and journal is not None:
            told = {"losses": trial.losses, "why": trial.why, "told": dict(trial.told)}
            append_line(journal, json.dumps({"key": key, "number": number, "values": values, **told}, sort_keys=True))
        tell(trial.losses)
        done.append(trial)
    return tuple(done)


def undominated(losses: Sequence[Sequence[float] | None]) -> list[int]:
    """Which points no other beats in one loss without being worse in another; the first of equals. None never is.

    >>> undominated([(1.0, 5.0), (2.0, 2.0), (3.0, 3.0), None, (2.0, 2.0)])
    [0, 1]
    """
    front: list[tuple[tuple[float, ...], int]] = []
    for mine, number in sorted((tuple(v), n) for n, v in enumerate(losses) if v is not None):
        # sorted: whatever beats a point comes before it, and if that is beaten itself, so by one of the front
        if not any(all(o <= m for o, m in zip(other, mine, strict=True)) for other, _ in front):
            front.append((mine, number))
    return sorted(number for _, number in front)


def _tried(values: Values, answer: Callable[[Values], Answer]) -> Trial:
    try:
        losses, told = answer(values)
    except Exception as error:  # whatever a trial raises: it is marked, and the others go on
        limit = {"limit": error.limit} if isinstance(error, OverLimit) else {}
        return Trial(values=values, losses=None, why=reason_of(error), told=limit, error=_without_locals(error))
    if not all(math.isfinite(v) for v in losses):
        return Trial(values=values, losses=None, why=f"the losses are {losses}", told=told)
    return Trial(values=values, losses=tuple(float(v) for v in losses), told=told)


def reason_of(error: Exception) -> str:
    """One line: why limits are out of reach, without advice; what kind of error any other is, and what it says.

    >>> reason_of(InfeasibleError("macs must be at most 5. Got 7.", advice="Ask for more.")), reason_of(KeyError("a"))
    ('macs must be at most 5. Got 7.', "KeyError: 'a'")
    """
    if isinstance(error, InfeasibleError | FailedApart | OverLimit):
        text = error.reason
    else:
        text = f"{type(error).__name__}: {error}"
    return (text.splitlines() or [""])[0][:300]


def _without_locals(error: Exception) -> Exception:
    """The error with its places in the code, without what the frames there held: networks, and memory of a GPU."""
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        traceback.clear_frames(one.__traceback__)
        seen.append(one)
        one = one.__cause__ or one.__context__
    return error


def _name(values: Mapping[str, Any], number: int) -> str:
    return json.dumps([number, dict(values)], sort_keys=True)


def _told(journal: Path | None, key: str) -> dict[str, Trial]:
    """Answers of the journal by their question; a last line that a kill cut short is cut off, other lines that say nothing are left out."""
    if journal is None or not journal.exists():
        return {}
    from paredown.records import mend

    mend(journal)
    known: dict[str, Trial] = {}
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            said = json.loads(line)
            losses = None if said["losses"] is None else tuple(float(v) for v in said["losses"])
            limit = said["told"].get("limit")
            if said["key"] == key and (losses is not None or limit):  # one that failed otherwise is tried again
                known[_name(said["values"], said["number"])] = Trial(
                    values=said["values"], losses=losses, why=said["why"], told=said["told"],
                    error=OverLimit(said["why"], limit) if limit else None,
                )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return known


def _asker(
    domain: Domain, objectives: int, seed: int
) -> tuple[Callable[[], Values], Callable[[tuple[float, ...] | None], None]]:
    """How the next question comes about, and who hears the answer."""
    try:
        import optuna
    except ImportError:
        points = _spread(domain, seed)
        return lambda: next(points), lambda losses: None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    study = optuna.create_study(sampler=sampler, directions=["minimize"] * objectives)
    asked: list[Any] = []

    def ask() -> Values:
        trial = study.ask()
        asked.append(trial)
        return {name: _suggested(trial, name, choices) for name, choices in domain.items()}

    def tell(losses: tuple[float, ...] | None) -> None:
        if losses is None:
            study.tell(asked[-1], state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(asked[-1], list(losses))

    return ask, tell


def _suggested(trial: Any, name: str, choices: tuple[Any, ...]) -> float | str:
    if isinstance(choices[0], str):
        return str(trial.suggest_categorical(name, list(choices)))
    return round(float(trial.suggest_float(name, choices[0], choices[1])), 4)


def _spread(domain: Domain, seed: int) -> Any:
    """Points of the Halton sequence, one prime per name."""
    primes = (2, 3, 5, 7, 11, 13, 17, 19)
    number = 1 + seed
    while True:
        values: Values = {}
        for base, (name, choices) in zip(primes, domain.items(), strict=False):
            at, share, left = 0.0, 1.0, number
            while left:
                share /= base
                at += share * (left % base)
                left //= base
            if isinstance(choices[0], str):
                values[name] = str(choices[min(int(at * len(choices)), len(choices) - 1)])
            else:
                low, high = (float(c) for c in choices)
                values[name] = round(low + at * (high - low), 4)
        yield values
        number += 1
