"""Schedules: when, in the course of a training, how much is left. Arithmetic only, without torch.

A schedule turns a final density and a number of optimizer steps into points (step, density): once `step` steps are
done, the mask is chosen anew with that density. Step 0 is before the training.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Literal

from paredown.errors import UsageError

Points = tuple[tuple[int, float], ...]
"""(steps done, share of the weights that stays), ascending in steps; the last density is the final one."""
Spacing = Literal["geometric", "linear"]
GrowBy = Literal["none", "gradient", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShot:
    """Everything before the training; in `rounds` of scoring and masking with density ρ^(k/rounds) after round k.

    One round suits most criteria. SynFlow wants 100 (Tanaka et al. 2020, algorithm 1), because it must see its own mask.
    """

    rounds: int = 1

    def __post_init__(self) -> None:
        _check("rounds", self.rounds >= 1, "a number ≥ 1", self.rounds)

    def before(self, density: float, start_density: float = 1.0) -> tuple[float, ...]:
        """Densities before the training, one after the other."""
        return _spaced(start_density, density, self.rounds, "geometric")

    def points(self, density: float, steps: int, start_density: float = 1.0) -> Points:
        """All at step 0.

        >>> OneShot(rounds=2).points(0.25, 100)
        ((0, 0.5), (0, 0.25))
        """
        del steps
        return tuple((0, d) for d in self.before(density, start_density))


@dataclass(frozen=True, slots=True, kw_only=True)
class Iterative:
    """Prune, train, prune, train: `rounds` equal steps of one training, the first before it, the last at `end` of it.

    Density after round k of n, from d₀ to d: geometric d₀ (d/d₀)^(k/n) (each round removes an equal share of what is left),
    linear d₀ - (d₀ - d) k/n (each removes an equal number).
    """

    rounds: int = 5
    spacing: Spacing = "geometric"
    end: float = 0.65
    """Share of the training at which the last round falls; the rest recovers with the final mask."""

    def __post_init__(self) -> None:
        _check("rounds", self.rounds >= 1, "a number ≥ 1", self.rounds)
        _check("end", 0 <= self.end < 1, "a share in [0, 1)", self.end)
        _check("spacing", self.spacing in ("geometric", "linear"), "geometric or linear", self.spacing)

    def before(self, density: float, start_density: float = 1.0) -> tuple[float, ...]:
        """The first round."""
        return _spaced(start_density, density, self.rounds, self.spacing)[:1]

    def points(self, density: float, steps: int, start_density: float = 1.0) -> Points:
        """Equal distances between the rounds.

        >>> Iterative(rounds=3, spacing="linear", end=0.5).points(0.25, 100)
        ((0, 0.75), (25, 0.5), (50, 0.25))
        """
        densities = _spaced(start_density, density, self.rounds, self.spacing)
        apart = self.end * steps / max(self.rounds - 1, 1)
        return tuple((max(round(k * apart), int(k > 0)), d) for k, d in enumerate(densities))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradual:
    """Gradual pruning with a cubic ramp (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1).

    s_t = s_f + (s_i - s_f) (1 - (t - t₀) / (n Δt))³ for t = t₀, t₀ + Δt, …, t₀ + n Δt: fast at first, gentle at the end.
    What is masked stays masked, unless `regrow`: then each update also drops `regrow` × (1 + cos(π t / t_end)) / 2 of what
    stays and grows as much anew where the gradient is largest (Liu et al. 2021, GraNet), or at random.
    """

    start: float = 0.0
    """Share of the training at which the ramp begins."""
    end: float = 0.65
    """Share at which the final density is reached; the rest recovers with the final mask."""
    updates: int = 20
    """n, updates of the mask after the first."""
    regrow: float = 0.0
    regrow_by: GrowBy = "gradient"

    def __post_init__(self) -> None:
        _check("start and end", 0 <= self.start < self.end <= 1, "0 ≤ start < end ≤ 1", (self.start, self.end))
        _check("updates", self.updates >= 1, "a number ≥ 1", self.updates)
        _check("regrow", 0 <= self.regrow < 1, "a share in [0, 1)", self.regrow)
        _check("regrow_by", self.regrow_by in ("gradient", "random"), "gradient or random", self.regrow_by)

    def moving(self, step: int, steps: int) -> float:
        """Share of what stays that is dropped and grown anew at an update after `step` of `steps` steps."""
        return moving_share(self.regrow, step / (self.end * steps))

    def progress(self, step: int, steps: int) -> float:
        """How far the ramp has come after `step` of `steps` steps, in [0, 1].

        >>> Gradual(start=0.25, end=0.75).progress(50, 100)
        0.5
        """
        return min(max((step / max(steps, 1) - self.start) / (self.end - self.start), 0.0), 1.0)

    def before(self, density: float, start_density: float = 1.0) -> tuple[float, ...]:
        """Nothing leaves before the training."""
        del density, start_density
        return ()

    def points(self, density: float, steps: int, start_density: float = 1.0) -> Points:
        """The cubic ramp; the first point, which changes nothing, is left out.

        >>> [round(1 - d, 4) for _, d in Gradual(updates=4).points(0.1, 1000)]
        [0.5203, 0.7875, 0.8859, 0.9]
        """
        found = []
        for k in range(1, self.updates + 1):
            at = self.start + (self.end - self.start) * k / self.updates
            found.append((max(round(at * steps), 1), 1 - cubic(1 - start_density, 1 - density, k / self.updates)))
        return (*found[:-1], (found[-1][0], density))


@dataclass(frozen=True, slots=True, kw_only=True)
class Regrowth:
    """A mask of constant density that moves: RigL (Evci et al. 2020, section 3) and SET (Mocanu et al. 2018).

    Every `every` steps until `end` of the training, in each weight: drop the k smallest |w|, grow the k cells with the
    largest gradient ("gradient", RigL) or any ("random", SET); k = fraction/2 (1 + cos(π t / t_end)) × what stays.
    New weights are 0 and so is their optimizer state. Begin with criterion "random" and allocation "erk" as RigL does.
    Where we differ: the step of an update is an ordinary optimizer step as well; RigL leaves it out.
    """

    by: GrowBy = "gradient"
    fraction: float = 0.3
    every: int = 100
    end: float = 0.75

    def __post_init__(self) -> None:
        _check("by", self.by in ("gradient", "random"), "gradient or random", self.by)
        _check("fraction", 0 < self.fraction < 1, "a share in (0, 1)", self.fraction)
        _check("every", self.every >= 1, "a number of steps ≥ 1", self.every)
        _check("end", 0 < self.end <= 1, "a share in (0, 1]", self.end)

    def moving(self, step: int, steps: int) -> float:
        """Share of what stays that moves at an update after `step` of `steps` steps.

        >>> round(Regrowth(fraction=0.4, end=0.5).moving(25, 100), 3)
        0.2
        """
        return moving_share(self.fraction, step / (self.end * steps))

    def before(self, density: float, start_density: float = 1.0) -> tuple[float, ...]:
        """The mask to begin with."""
        del start_density
        return (density,)

    def points(self, density: float, steps: int, start_density: float = 1.0) -> Points:
        """Once before the training, then every `every` steps before `end`; UsageError where the training is too short for one.

        >>> Regrowth(every=40).points(0.1, 200)
        ((0, 0.1), (40, 0.1), (80, 0.1), (120, 0.1))
        """
        del start_density
        stop = math.ceil(self.end * steps)
        _check(
            "every", self.every < stop, f"below {stop}, so that the mask moves at least once before {self.end:g} of the training",
            f"every={self.every} in a training of {steps} steps", f"Train longer, or give Regrowth(every={max(steps // 10, 1)}), in a recipe prune.schedule_options: {{every: {max(steps // 10, 1)}}}.",
        )  # fmt: skip
        return ((0, density), *((t, density) for t in range(self.every, stop, self.every)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lottery:
    """Train, prune, rewind, train again (Frankle & Carbin 2019; Frankle et al. 2020, "Linear mode connectivity").

    Each of `rounds` + 1 trainings has all epochs and the whole learning-rate schedule. After each but the last, what is
    pruned is chosen on the trained weights, and what survives goes back: "weights", to its values after `rewind_step`
    steps of the first training (0: the original lottery ticket); "learning_rate", nowhere: only the learning rate
    begins again (Renda et al. 2020). Where we differ: after a rewind to step k the schedule begins at 0, not at k.
    """

    rounds: int = 3
    rewind: Literal["weights", "learning_rate"] = "weights"
    rewind_step: int = 0
    spacing: Spacing = "geometric"

    def __post_init__(self) -> None:
        _check("rounds", self.rounds >= 1, "a number ≥ 1", self.rounds)
        _check("rewind", self.rewind in ("weights", "learning_rate"), "weights or learning_rate", self.rewind)
        _check("rewind_step", self.rewind_step >= 0, "a number ≥ 0", self.rewind_step)
        _check("spacing", self.spacing in ("geometric", "linear"), "geometric or linear", self.spacing)

    def densities(self, density: float, start_density: float = 1.0) -> tuple[float, ...]:
        """After each round.

        >>> [round(d, 3) for d in Lottery(rounds=3).densities(0.512)]
        [0.8, 0.64, 0.512]
        """
        return _spaced(start_density, density, self.rounds, self.spacing)


Schedule = OneShot | Iterative | Gradual | Regrowth | Lottery


def cubic(start: float, end: float, progress: float) -> float:
    """end + (start - end) (1 - progress)³, progress within [0, 1]; used for sparsities and thresholds alike.

    >>> [round(cubic(0.0, 0.9, p), 4) for p in (0, 0.25, 0.5, 0.75, 1)]
    [0.0, 0.5203, 0.7875, 0.8859, 0.9]
    """
    return end + (start - end) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def named_schedule(given: object) -> Schedule:
    """A schedule, or the one of that name with its defaults.

    >>> named_schedule("one-shot")
    OneShot(rounds=1)
    """
    if isinstance(given, str):
        if given in NAMED:
            return NAMED[given]
        near = difflib.get_close_matches(given, NAMED, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        msg = (
            f"schedule must be one of {', '.join(NAMED)}, or an object of paredown.prune.schedule. Got {given!r}.{hint}"
        )
        raise UsageError(msg)
    if not isinstance(given, OneShot | Iterative | Gradual | Regrowth | Lottery):
        msg = f"schedule must be one of {', '.join(NAMED)}, or an object of paredown.prune.schedule. Got {given!r}."
        raise UsageError(msg)
    return given


def moving_share(regrow: float, progress: float) -> float:
    """Share of what stays that is dropped and grown anew: regrow/2 (1 + cos(π progress)), 0 from progress 1 on.

    >>> [round(moving_share(0.3, p), 3) for p in (0, 0.5, 1)]
    [0.3, 0.15, 0.0]
    """
    return regrow / 2 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _spaced(start: float, end: float, rounds: int, spacing: Spacing) -> tuple[float, ...]:
    if spacing == "linear":
        found = [start - (start - end) * k / rounds for k in range(1, rounds + 1)]
    else:
        found = [start * (end / start) ** (k / rounds) for k in range(1, rounds + 1)]
    return (*found[:-1], end)


def _check(name: str, holds: bool, rule: str, value: object, fix: str = "") -> None:
    if not holds:
        got = value if fix else repr(value)
        msg = f"{name} must be {rule}. Got {got}. {fix}".rstrip()
        raise UsageError(msg)


NAMED: dict[str, Schedule] = {
    "one-shot": OneShot(),
    "iterative": Iterative(),
    "gradual": Gradual(),
    "rigl": Regrowth(by="gradient"),
    "set": Regrowth(by="random"),
    "lottery": Lottery(),
}
