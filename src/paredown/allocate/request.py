"""Request: one call of allocate as data, and the checks that do not depend on the granularity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paredown.allocate.sensitivity import Latency, Sensitivity, Table
from paredown.budget import Budget
from paredown.couple.space import Coupling
from paredown.errors import UsageError
from paredown.examine.cost import Cost
from paredown.granularity import Granularity
from paredown.score.nouns import Scores

Allocation = Literal["uniform", "global", "erk", "sensitivity", "greedy", "knapsack"]
Normalize = Literal["mean", "max", "none", "size"]
Scope = Literal["layer", "row"]
LeaveOut = Literal["first", "last", "depthwise"]
Floor = float | Mapping[str, float]

ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "global", "erk", "sensitivity", "greedy", "knapsack")
MEASURED = ("sensitivity", "greedy", "knapsack")
"""Allocations that read a table of sensitivities."""
FIX = "Lower the floor, exclude less, or ask for more."
"""What to do where an amount is out of reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What allocate was asked for. None means the default of the granularity."""

    coupling: Coupling
    scores: Scores
    cost: Cost
    budget: Budget
    target: str
    allocation: Allocation
    include: Sequence[str]
    exclude: Sequence[str]
    floor: Floor | None
    align: int | None
    normalize: Normalize | None
    scope: Scope | None
    leave_out: Sequence[LeaveOut]
    sensitivity: Sensitivity | Table | None
    latency: Latency | Mapping[str, Mapping[int, float]] | None

    @property
    def granularity(self) -> Granularity:
        """Of the scores."""
        return Granularity.parse(self.scores.granularity)

    def check(self) -> None:
        """Raises UsageError for options outside their closed lists, or that need one another."""
        for name, known in (
            ("allocation", ALLOCATIONS),
            ("normalize", ("mean", "max", "none", "size", None)),
            ("scope", ("layer", "row", None)),
        ):
            value = getattr(self, name)
            if value not in known:
                listed = ", ".join(repr(k) for k in known if k is not None)
                msg = f"{name} must be one of {listed}. Got {value!r}."
                raise UsageError(msg)
        for part in self.leave_out if not isinstance(self.leave_out, str) else [self.leave_out]:
            if part not in ("first", "last", "depthwise") or isinstance(self.leave_out, str):
                msg = f"leave_out must be a list of 'first', 'last', 'depthwise'. Got {self.leave_out!r}."
                raise UsageError(msg)
        if self.allocation in MEASURED and self.sensitivity is None:
            msg = (
                f"allocation {self.allocation!r} must be given sensitivity=…, what each layer loses when it keeps less. "
                "Got none. Measure it with paredown.sensitivity, or give {name: {fraction kept: increase of the loss}}."
            )
            raise UsageError(msg)
        floors = self.floor.values() if isinstance(self.floor, Mapping) else [0.0 if self.floor is None else self.floor]
        for floor in floors:
            if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor < 1:
                msg = f"floor must be a fraction in [0, 1). Got {floor!r}. It is the least share of a space or layer that stays."
                raise UsageError(msg)

    def table(self, of: Mapping[str, int]) -> Sensitivity:
        """The sensitivities as a noun; one's own table may name counts or fractions."""
        assert self.sensitivity is not None  # checked
        if isinstance(self.sensitivity, Sensitivity):
            wrong = [n for n, total in self.sensitivity.of.items() if n in of and of[n] != total]
            if wrong or not set(self.sensitivity.of) & set(of):
                name = wrong[0] if wrong else next(iter(self.sensitivity.of), "nothing")
                msg = f"the sensitivities must be of this model and granularity. Got {name}, which does not fit. Measure them again."
                raise UsageError(msg)
            return self.sensitivity
        return Sensitivity.from_table(self.sensitivity, of)

    def provenance(self, **more: Any) -> dict[str, Any]:
        """What was asked, for `Plan.made_by`."""
        made: dict[str, Any] = {
            "verb": "allocate",
            "criterion": self.scores.criterion,
            "criterion_options": dict(self.scores.options),
            "seed": self.scores.seed,
            "allocation": self.allocation,
            **({"granularity": str(self.granularity)} if self.granularity.kind != "channel" else {}),
            "budget": self.budget.given(),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "precedence": "exclude wins over include",
        }
        if self.allocation in MEASURED and isinstance(self.sensitivity, Sensitivity):
            seen = self.sensitivity
            digest = hashlib.sha256(seen.to_json().encode()).hexdigest()
            made["sensitivity"] = {
                "unit": seen.unit,
                "num_samples": seen.num_samples,
                "badge": seen.badge,
                "sha256": digest,
            }
        return {**made, **more}
