"""The search for limits where ranks give way instead of units: the same rounds of files, and low rank in the place of channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from paredown.budget import Budget
from paredown.errors import InfeasibleError, NothingToDo
from paredown.factorize import choose_ranks
from paredown.plan import Plan
from paredown.program import Program
from paredown.search.budgets import LATENCY, Search
from paredown.search.lines import Line

_TIGHTER, _TRIES = 0.97, 60


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSearch(Search):
    """A search whose plans are ranks (svd), chosen exactly within each count by what the spectrum loses.

    Milliseconds are a line of multiply-accumulates here, drawn through the files of this network: no table holds factors,
    whose shapes follow from the rank. `options` are those of choose_ranks.
    """

    program: Program
    by_table: ClassVar[bool] = False

    def x(self, name: str, plan: Plan | None) -> float:
        """What an amount is a line of: multiply-accumulates, or parameters."""
        by = "macs" if name == "macs" or name in LATENCY else "parameters"
        return float(getattr(self.cost, by) if plan is None else plan.made_by["reached"][by])

    def allocated(self, lines: Mapping[str, Line], aims: Mapping[str, float]) -> tuple[Plan | None, bool]:
        """The ranks by the lines as they are, and whether those are the least that floor and alignment allow.

        A choice of ranks is exact for one count. Where two are limited, that of either is taken if it holds the other too
        (of two, the one that loses less), else both are asked for less until one does.
        """
        limits: dict[str, int] = {}
        for name in self.asked:
            by = "macs" if name == "macs" or name in LATENCY else "parameters"
            wanted = max(2, int(lines[name].inverse(aims[name])))
            limits[by] = min(limits.get(by, wanted), wanted)
        asked, nearest = dict(limits), None
        for _ in range(_TRIES):
            plans = []
            for by, limit in asked.items():
                plan, least = self._chosen(by, limit)
                nearest = plan
                plans += [] if least else [plan]
            if not plans:
                return nearest, True
            holding = [p for p in plans if all(p.made_by["reached"][by] <= limit for by, limit in limits.items())]
            if holding:
                best = min(holding, key=lambda p: sum(p.made_by.get("losses", {}).values()))
                return (best, False) if best.ranks else (None, False)
            asked = {by: max(2, int(_TIGHTER * limit)) for by, limit in asked.items()}
        return nearest, True

    def _chosen(self, by: str, limit: int) -> tuple[Plan, bool]:
        options: dict[str, Any] = dict(self.options)
        budget = Budget(macs=limit) if by == "macs" else Budget(parameters=limit)
        try:
            return choose_ranks(self.program, budget, **options), False
        except NothingToDo as error:  # nearest is to keep all: a little less has ranks
            if error.nearest is None:
                raise
            return error.nearest, False
        except InfeasibleError as error:
            if error.nearest is None:
                raise
            return error.nearest, True
