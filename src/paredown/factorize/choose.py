"""choose_ranks: energy, a budget or measured losses become a Plan of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from paredown.budget import Budget
from paredown.errors import InfeasibleError, NothingToDo, UsageError, must_be
from paredown.examine import examine
from paredown.examine.cost import Cost
from paredown.factorize.decompose import Factoring, Seen
from paredown.factorize.measured import measured_losses
from paredown.factorize.options import Candidate, candidate, method_for, selected
from paredown.factorize.select import Options, frontier, least_loss, uniform
from paredown.factorize.verb import input_statistics_for, program_of
from paredown.plan import Plan, Rank
from paredown.program import Program
from paredown.prune.factors import METHODS, Found, Layer, found
from paredown.prune.nouns import Pruned
from paredown.score.patterns import as_patterns
from paredown.statistics.batches import Given
from paredown.target.tables import named

Choice = Literal["spectrum", "measured"]
Allocation = Literal["global", "uniform"]
Weigh = Literal["relative", "absolute"]
TOLERANCE = 0.01


def choose_ranks(
    source: Program | Pruned,
    budget: Budget | None = None,
    *,
    energy: float | None = None,
    method: str = "svd",
    choice: Choice = "spectrum",
    allocation: Allocation = "global",
    weigh: Weigh = "relative",
    batches: Given | None = None,
    statistics: Mapping[str, Seen] | None = None,
    num_batches: int = 16,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    loss_batches: Given | None = None,
    ratios: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
    alpha: float = 0.5,
    sweeps: int = 2,
    target: str = "onnxruntime-x86",
    align: int | None = None,
    floor: float = 0.1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Plan:
    """Choose the ranks of linear layers and convolutions: by `energy`, or so that a budget holds.

    energy e keeps the least ranks with Σ_{i≤r} σ_i² ≥ e · Σ σ_i² in every layer. Budget(parameters=…) or Budget(macs=…)
    minimises Σ over layers of what is lost: Σ_{i>r} σ_i² of the method's own spectrum (`energies`), as a fraction of the
    layer's whole (weigh="relative") or as it is ("absolute": for svd_llm the outputs' squared error itself), or with
    choice="measured" the rise of `loss(model, batch)` over `loss_batches` (held out; a mean) when that layer alone is
    truncated to each of `ratios` of its parameters (ASVD's table, and a search that weighs rise against saving).
    allocation "uniform" gives every layer one fraction instead. The whole model's count is met from below.

    A layer becomes factors only at ranks that save; others stay dense, and made_by["stays_dense"] says why. Ranks are
    multiples of `align` (default: the target's), at least `floor` × full rank. `include` and `exclude` are patterns
    (fnmatch) on parameter and module names; exclude wins. spatial_svd and tucker2 leave layers that they do not fit
    (linear, 1×1) to svd. asvd and svd_llm need `batches` of inputs or `statistics`.

    Raises UsageError (options, patterns), NothingToDo (no layer can save; with the reasons), InfeasibleError (the budget
    is out of reach; `.nearest` is the plan that comes nearest), RejectedError (data).

    >>> from paredown.program import capture; import torch
    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> plan = choose_ranks(capture(net, torch.zeros(2, 64)), Budget(parameters=0.6))
    >>> plan.ranks
    {'0.weight': Rank(method='svd', ranks=(16,))}
    """
    program = program_of(source)
    given = _checked(budget, energy, method, choice, allocation, weigh, floor)
    align = _multiple(align, target)
    cost = examine(program)
    amount = {"energy": energy} if energy is not None else {"budget": dict(given)}
    made: dict[str, Any] = {
        "verb": "choose_ranks", "method": method, "choice": choice, "allocation": allocation, "weigh": weigh, **amount,
        "alpha": alpha, "sweeps": sweeps, "target": target, "align": align, "floor": floor, "include": list(as_patterns(include)),
        "exclude": list(as_patterns(exclude)), "precedence": "exclude wins over include",
        "dense": {"parameters": cost.parameters, "macs": cost.macs},
    }  # fmt: skip
    metric, limit = _limit(given, cost)
    if limit is not None and limit >= getattr(cost, metric):
        return Plan(keep={}, made_by={**made, "already_met": True, "reached": made["dense"]})
    every = found(program)
    how = Factoring(alpha=alpha, sweeps=sweeps)
    free = {layer.parameter: layer for layer in selected(every.layers, list(program.state), include, exclude)}
    wanted = {p: Rank(method=method_for(layer, method), ranks=(1,)) for p, layer in free.items()}
    seen = input_statistics_for(program, free, wanted, batches, statistics, num_batches)
    saving = _that_save(free, wanted, program, cost, metric, align=align, floor=floor, seen=seen, how=how)
    table = _Table(cost=cost, found=every, free=free, saving=saving, made=made)
    if not saving:
        raise NothingToDo(table.nothing())
    if energy is not None:
        return table.by_energy(energy)
    losses = [c.relative() if weigh == "relative" else c.losses for c in saving]
    if choice == "measured":
        saving, losses = measured_losses(
            source if isinstance(source, Pruned) else program, saving, loss, loss_batches, ratios, seen=seen, how=how
        )
        table = replace(table, saving=saving)
    assert limit is not None  # a budget was checked to be given
    return table.within(metric, limit, losses, allocation)


def _checked(
    budget: Budget | None, energy: float | None, method: str, choice: str, allocation: str, weigh: str, floor: float
) -> dict[str, float | int]:
    if budget is not None:
        must_be("budget", budget, Budget, fix="What remains of something, as Budget(macs=0.5).")
    closed = {
        "method": (method, METHODS),
        "choice": (choice, ("spectrum", "measured")),
        "allocation": (allocation, ("global", "uniform")),
        "weigh": (weigh, ("relative", "absolute")),
    }
    for name, (value, known) in closed.items():
        if value not in known:
            msg = f"{name} must be one of {', '.join(known)}. Got {value!r}."
            raise UsageError(msg)
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor < 1:
        msg = f"floor must be a fraction in [0, 1). Got {floor!r}. It is the least share of a layer's full rank."
        raise UsageError(msg)
    if (budget is None) == (energy is None):
        msg = f"choose_ranks must be given a budget or an energy. Got {'both' if budget is not None else 'neither'}."
        raise UsageError(msg)
    if energy is not None:
        if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy < 1:
            msg = f"energy must be a fraction in (0, 1), the share of Σ σ² that stays. Got {energy!r}."
            raise UsageError(msg)
        if choice == "measured":
            msg = "choice 'measured' must be given a budget. Got an energy, which is a matter of the spectrum."
            raise UsageError(msg)
        return {}
    assert budget is not None  # one of the two is given
    given = budget.given()
    if len(given) != 1 or next(iter(given)) not in ("parameters", "macs"):
        msg = f"a budget for ranks must give parameters or macs, one of them. Got {', '.join(given) or 'none'}."
        raise UsageError(msg)
    return given


def _multiple(align: int | None, target: str) -> int:
    """What ranks are multiples of."""
    align = named(target).alignment if align is None else align
    if isinstance(align, bool) or not isinstance(align, int) or align < 1:
        msg = f"align must be an integer ≥ 1. Got {align!r}. 1 turns it off."
        raise UsageError(msg)
    return align


def _limit(given: Mapping[str, float | int], cost: Cost) -> tuple[str, int | None]:
    if not given:
        return "parameters", None
    (name, value), *_ = given.items()
    return name, value if isinstance(value, int) else int(value * getattr(cost, name) + 1e-6)


def _that_save(
    free: Mapping[str, Layer], wanted: Mapping[str, Rank], program: Program, cost: Cost, metric: str, *,
    align: int, floor: float, seen: Mapping[str, Seen], how: Factoring,
) -> list[Candidate]:  # fmt: skip
    """The layers that have ranks at which they save."""
    every = (
        candidate(layer, program, cost, wanted[p].method, align=align, floor=floor, seen=seen.get(p), how=how)
        for p, layer in free.items()
    )
    return [found for c in every if (found := _saving(c, metric)) is not None]


def _saving(c: Candidate, metric: str) -> Candidate | None:
    """The candidate with those ranks alone that save what is counted and do not add to the other."""
    first, second = (c.macs, c.parameters) if metric == "macs" else (c.parameters, c.macs)
    dense_first, dense_second = (
        (c.dense_macs, c.dense_parameters) if metric == "macs" else (c.dense_parameters, c.dense_macs)
    )
    stays = np.flatnonzero((first < dense_first) & (second <= dense_second))
    return _only(c, stays) if len(stays) else None


def _only(c: Candidate, index: Any) -> Candidate:
    return replace(
        c,
        ranks=tuple(c.ranks[i] for i in index),
        parameters=c.parameters[index],
        macs=c.macs[index],
        losses=c.losses[index],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """All that a choice is made from."""

    cost: Cost
    found: Found
    free: Mapping[str, Layer]
    saving: list[Candidate]
    made: dict[str, Any]

    def by_energy(self, energy: float) -> Plan:
        chosen: list[int | None] = []
        for c in self.saving:
            enough = np.flatnonzero(c.relative() <= 1 - energy + 1e-12)
            chosen.append(int(enough[np.argmin(c.parameters[enough])]) if len(enough) else None)
        plan = self.plan(chosen, [c.relative() for c in self.saving])
        if not plan.ranks:
            msg = f"a plan must factorize something. Got energy {energy}, which no layer keeps at a rank that saves. Ask for less energy."
            raise NothingToDo(msg)
        return plan

    def within(self, metric: str, limit: int, losses: list[Any], allocation: str) -> Plan:
        """The choice of least loss whose whole model is within the limit."""
        dense = [getattr(c, f"dense_{metric}") for c in self.saving]
        options: list[Options] = [
            frontier([*getattr(c, metric).tolist(), d], [*loss.tolist(), 0.0])
            for c, d, loss in zip(self.saving, dense, losses, strict=True)
        ]
        left = limit - (getattr(self.cost, metric) - sum(dense))
        found = (least_loss if allocation == "global" else uniform)(options, left)
        if found is None:
            nearest = self.plan(self._original([0] * len(options), options), losses)
            reached = nearest.made_by["reached"][metric]
            msg = (
                f"{metric} must be reducible to {limit:,}. Got {reached:,} at the least (floor={self.made['floor']}, alignment to "
                f"{self.made['align']}, {len(self.saving)} layers that can save)."
            )
            advice = "Lower the floor, exclude less, or ask for more."
            raise InfeasibleError(msg, nearest=nearest, advice=advice)
        plan = self.plan(self._original(found, options), losses, asked={metric: limit})
        if not plan.ranks:
            msg = (
                f"a plan must factorize something. Got {self.made['budget']}, to which keeping every layer is nearest."
            )
            raise NothingToDo(msg, nearest=plan)
        return plan

    def _original(self, chosen: list[int], options: list[Options]) -> list[int | None]:
        """Positions in the candidates' own arrays; None is the layer as it is."""
        at = [int(o.index[i]) for o, i in zip(options, chosen, strict=True)]
        return [a if a < len(c.ranks) else None for a, c in zip(at, self.saving, strict=True)]

    def plan(self, chosen: list[int | None], losses: list[Any], asked: Mapping[str, int] | None = None) -> Plan:
        ranks, lost = {}, {}
        parameters, macs = self.cost.parameters, self.cost.macs
        for c, at, loss in zip(self.saving, chosen, losses, strict=True):
            if at is not None:
                ranks[c.layer.parameter] = c.ranks[at]
                lost[c.layer.parameter] = float(loss[at])
                parameters += int(c.parameters[at]) - c.dense_parameters
                macs += int(c.macs[at]) - c.dense_macs
        made = {
            **self.made,
            **({"asked": dict(asked)} if asked else {}),
            "reached": {"parameters": parameters, "macs": macs},
            "losses": lost,
            "stays_dense": self.reasons(set(ranks)),
        }
        for name, limit in (asked or {}).items():
            short = limit - made["reached"][name]
            if short > TOLERANCE * getattr(self.cost, name):
                made["blocked_by"] = (
                    f"ranks in steps of {self.made['align']} and what each layer loses: {short:,} {name} are left over"
                )
        return Plan(keep={}, ranks=ranks, made_by=made)

    def reasons(self, chosen: set[str]) -> dict[str, str]:
        """Why each weight that is not factorized stays as it is."""
        saving = {c.layer.parameter for c in self.saving}
        out = dict(self.found.refused)
        for parameter in self.found.layers:
            if parameter in chosen:
                continue
            if parameter not in self.free:
                out[parameter] = "a pattern leaves it out"
            elif parameter not in saving:
                out[parameter] = "no rank saves anything"
            else:
                out[parameter] = "better dense within this budget"
        return dict(sorted(out.items()))

    def nothing(self) -> str:
        listed = "; ".join(f"{n}: {why}" for n, why in list(self.reasons(set()).items())[:10])
        return f"a plan must have something to factorize. Got a model in which no layer can save. {listed or 'It has no linear layer or convolution'}."
