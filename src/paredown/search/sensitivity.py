"""sensitivity: how much worse the model gets when one space or one weight alone keeps less, measured on data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from paredown.allocate import Sensitivity
from paredown.allocate.levels import protected
from paredown.allocate.masks import layer_mask
from paredown.allocate.search import lowest
from paredown.couple.space import Coupling
from paredown.errors import Interrupted, NothingToDo, RejectedError, UsageError, must_be
from paredown.examine import Cost, examine
from paredown.granularity import Granularity
from paredown.program import Program
from paredown.score.nouns import Scores
from paredown.score.patterns import protected_weights
from paredown.search.journal import Journal
from paredown.search.masked import Copy
from paredown.search.repair import Repair
from paredown.search.value import Value, value_of
from paredown.statistics.batches import Given, as_call, batches_of
from paredown.train.batch_norm import reestimate_batch_norm
from paredown.train.task import Batches, Metric, Predict, Step, kept_randomness, seed_all

Distance = Literal["mse", "kl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """Where a measurement stands."""

    done: int
    total: int
    name: str
    kept: int
    of: int
    increase: float | None
    """None where this point failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One thing to measure: a space with these units gone, or a weight with this mask."""

    name: str
    kept: int
    of: int
    stays: Any
    """Units that stay, bool; or how the mask is made: all masks at once would weigh as much as the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _BatchNorm:
    """How batch norm is measured anew at every point."""

    batches: Batches
    step: Step | None
    num_batches: int
    inputs: Any
    seed: int

    def renewed(self, module: nn.Module) -> nn.Module:
        """A copy with statistics of its own activations."""
        return reestimate_batch_norm(
            module, self.batches, self.inputs, step=self.step, num_batches=self.num_batches, seed=self.seed
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What every point is measured with."""

    copy: Copy
    scores: Scores
    value: Value
    norms: _BatchNorm | None
    seed: int

    def dense(self) -> float:
        """The value of the model as it is; a distance is measured from here."""
        with kept_randomness(), torch.no_grad():
            seed_all(self.seed)
            dense = self.value.of(self._renewed(self.copy.module), first=True)
        if not math.isfinite(dense):
            msg = f"the dense model must have a finite value. Got {dense} ({self.value.unit}). Look at the weights and the batches."
            raise RejectedError(msg)
        return dense

    def measured(self, point: Point, dense: float) -> tuple[float | None, str]:
        """The increase, or None and why."""
        try:
            with (
                kept_randomness(),
                torch.no_grad(),
                self.copy.without(point.name, stays_of(point, self.scores, self.copy)) as module,
            ):
                seed_all(self.seed)
                worse = self.value.worse(self.value.of(self._renewed(module)), dense)
        except KeyboardInterrupt as error:
            msg = f"measuring was stopped at {point.name}. The same call goes on from its journal, where it has one."
            raise Interrupted(msg) from error
        except Exception as error:  # whatever the user's loss raises on a damaged model: a point without a number
            first = str(error).splitlines()[0] if str(error) else ""
            return None, f"{type(error).__name__}: {first}"[:300]
        if not math.isfinite(worse):
            return None, f"the value is {worse}"
        return worse, ""

    def _renewed(self, module: nn.Module) -> nn.Module:
        return module if self.norms is None else self.norms.renewed(module)


def stays_of(point: Point, scores: Scores, copy: Copy) -> Any:
    """What stays at a point, bool: one per unit, or of the shape of the weight."""
    if not isinstance(point.stays, tuple):
        return point.stays
    granularity, amount, rows = point.stays
    return layer_mask(
        scores.by_cell[point.name],
        copy.shape(point.name),
        granularity,
        amount,
        rows=rows,
        flipped=(scores.flipped or {}).get(point.name, 0),
    )


def sensitivity(
    program: Program,
    coupling: Coupling,
    scores: Scores,
    *,
    batches: Given | None = None,
    loss: Step | None = None,
    evaluate: Callable[[Predict], Any] | None = None,
    metric: Metric | None = None,
    distance: Distance | None = None,
    amounts: Sequence[float] = (0.75, 0.5, 0.25, 0.1),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    num_batches: int = 8,
    batch_norm: Batches | None = None,
    num_batch_norm_batches: int = 16,
    repair: bool = False,
    journal: Path | str | None = None,
    progress: Callable[[Measuring], None] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Sensitivity:
    """How much worse the model gets when one space (or one weight, for scores of masks) keeps each of `amounts` of itself.

    One of three says what worse is. `loss(model, batch)`: the mean loss over `batches`, by samples. `evaluate(predict)`
    with its `metric`: the loss of the metric, whichever direction is better. `distance`: how far the outputs move from
    the dense ones, without labels: "mse" Σ(y - y₀)² / Σy₀², or "kl" KL(dense || pruned) of the class scores; `batches` then
    yield inputs alone. Data should be held out of training, and never be test data.

    What the scores rank lowest is left out on a copy: the weights that read a removed channel are set to zero there, which
    equals its physical removal (the argument of `prune`'s proof); spaces across a layer norm are removed in the graph.
    With `batch_norm` (a function that yields training batches) its statistics are measured anew at every point. With
    `repair` the layers that read a removed channel are fitted anew at every point, by least squares on `batches`: what
    `prune.reconstruct` will do afterwards.

    Every point is kept in `journal` (JSON lines) as soon as it is known: the same call goes on where it was stopped. A
    point that fails is missing in the result, with the reason, not zero; the next call tries it again. Same arguments, same
    numbers. Raises UsageError (what to measure), RejectedError (the dense model has no finite value; no batches) and
    NothingToDo (no space or weight is left by the patterns).

    >>> from paredown.couple import couple; from paredown.program import capture; from paredown.score import score
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> program = capture(net, torch.zeros(2, 3, 8, 8))
    >>> seen = sensitivity(
    ...     program, couple(program), score(program, couple(program)), distance="mse", batches=[torch.randn(4, 3, 8, 8)]
    ... )
    >>> list(seen.increase["0.weight[0]"])
    [6, 4, 2, 1]
    """
    _check_nouns(program, coupling, scores)
    value = value_of(
        batches, loss=loss, evaluate=evaluate, metric=metric, distance=distance, num_batches=num_batches, device=device
    )
    for number, batch in enumerate(() if distance is None else value.batches):
        as_call(program, batch, number)
    points = points_of(program, coupling, scores, amounts, include, exclude)
    norms = None
    if batch_norm is not None:
        norms = _BatchNorm(
            batches=batches_of(batch_norm, "batch_norm"), step=loss, num_batches=num_batch_norm_batches,
            inputs=program.inputs, seed=seed,
        )  # fmt: skip
    fit = _repair(program, scores, value) if repair else None
    run = _Run(copy=Copy(program, coupling, value.device, fit), scores=scores, value=value, norms=norms, seed=seed)
    log = Journal(None if journal is None else Path(journal), program, scores, value, norms, seed, repair=repair)
    dense = run.dense()
    increase, missing = _increases(run, points, dense, log, progress)
    return Sensitivity(
        increase=increase,
        of={p.name: p.of for p in points}, unit=value.unit, dense=dense,
        granularity=scores.granularity,
        num_samples=value.num_samples,
        missing=missing,
        made_by={
            "criterion": scores.criterion, "amounts": list(amounts), **({"repair": True} if repair else {}), "seed": seed,
            "source": program.source_digest,
        },
    )  # fmt: skip


def _repair(program: Program, scores: Scores, value: Value) -> Repair:
    if Granularity.parse(scores.granularity).masked:
        msg = f"repair=True must be used with channels or heads. Got scores of granularity {scores.granularity}. `prune.obs` is for masks."
        raise UsageError(msg)
    if not value.batches:
        msg = "repair=True must be given batches: with a loss, or with a distance. Got evaluate alone."
        raise UsageError(msg)
    return Repair(program=program, batches=value.batches, step=value.loss)


def _increases(
    run: _Run, points: Sequence[Point], dense: float, log: Journal, progress: Callable[[Measuring], None] | None
) -> tuple[dict[str, dict[int, float | None]], dict[str, str]]:
    """Every point, from the journal or measured now; and why points are missing."""
    increase: dict[str, dict[int, float | None]] = {}
    missing: dict[str, str] = {}
    for number, point in enumerate(points, start=1):
        found = log.known(point.name, point.kept)
        if found is None:
            found, why = run.measured(point, dense)
            log.add(point.name, point.kept, point.of, found, why)
            if found is None:
                missing[f"{point.name} @ {point.kept}"] = why
        increase.setdefault(point.name, {})[point.kept] = found
        if progress is not None:
            progress(
                Measuring(done=number, total=len(points), name=point.name, kept=point.kept, of=point.of, increase=found)
            )
    return increase, missing


def _amounts(amounts: Sequence[float], scores: Scores) -> tuple[float, ...]:
    granularity = Granularity.parse(scores.granularity)
    if granularity.kind == "n:m":
        return (granularity.a / granularity.b,)
    check_amounts(amounts or ("none",))
    return tuple(sorted(set(amounts), reverse=True))


def check_amounts(amounts: Sequence[object]) -> None:
    """Raises UsageError where one is not what may remain of a space."""
    bad = [a for a in amounts if isinstance(a, bool) or not isinstance(a, float) or not 0 < a < 1]
    if bad:
        msg = f"amounts must be fractions in (0, 1), what remains. Got {bad[0]!r}."
        raise UsageError(msg)


def _check_nouns(program: Program, coupling: Coupling, scores: Scores) -> None:
    must_be("program", program, Program, fix="Use paredown.capture(model, inputs).")
    must_be("coupling", coupling, Coupling, fix="Use paredown.couple(program).")
    must_be("scores", scores, Scores, fix="Use paredown.score(program, coupling).")


def points_of(
    program: Program,
    coupling: Coupling,
    scores: Scores,
    amounts: Sequence[float],
    include: Sequence[str],
    exclude: Sequence[str],
) -> list[Point]:
    """What is measured: each free space (or weight) at each amount that takes at least one unit away.

    Raises UsageError (amounts, scores of another model) and NothingToDo.
    """
    amounts = _amounts(amounts, scores)
    granularity, cost = Granularity.parse(scores.granularity), examine(program)
    if granularity.masked:
        points = _masks(
            scores, granularity, cost, amounts, protected_weights(coupling, cost, scores.by_cell, include, exclude)
        )
    else:
        guard = protected(coupling, cost, include, exclude).names
        points = _units(coupling, scores, granularity, amounts, guard)
    if not points:
        msg = (
            "a sensitivity must have something to measure. Got no free space or weight of two units: see the patterns."
        )
        raise NothingToDo(msg)
    return points


def _units(
    coupling: Coupling, scores: Scores, granularity: Granularity, amounts: Sequence[float], guard: Sequence[str]
) -> list[Point]:
    points = []
    for space in coupling.spaces:
        if space.name in guard or (granularity.kind == "head" and space.kind != "head"):
            continue
        if len(scores.by_space.get(space.name, ())) != len(space):
            msg = f"scores must fit the coupling: {len(space)} for {space.name}. Score this coupling again."
            raise UsageError(msg)
        counts = dict.fromkeys(max(1, round(a * len(space))) for a in amounts)
        points += [
            Point(
                name=space.name,
                kept=count,
                of=len(space),
                stays=~lowest(scores.by_space, space.name, len(space) - count),
            )
            for count in counts
            if count < len(space)
        ]
    return points


def _masks(
    scores: Scores, granularity: Granularity, cost: Cost, amounts: Sequence[float], guard: Sequence[str]
) -> list[Point]:
    points: dict[tuple[str, int], Point] = {}
    multiplied = {w for node in cost.by_node for w in node.weights}
    rows = scores.scope == "row" and granularity.kind not in ("row", "column")
    for name, values in scores.by_cell.items():
        shape = cost.parameter_shapes.get(name)
        if shape is None or values.shape != granularity.grid(shape):
            msg = f"scores must fit the model. Got shape {values.shape} for {name}. Score this model again."
            raise UsageError(msg)
        if name in guard or name not in multiplied:
            continue
        for amount in amounts:
            stays = layer_mask(
                values, shape, granularity, amount, rows=rows, flipped=(scores.flipped or {}).get(name, 0)
            )
            kept = int(np.count_nonzero(stays))
            if kept < stays.size:
                points.setdefault(
                    (name, kept), Point(name=name, kept=kept, of=stays.size, stays=(granularity, amount, rows))
                )
    return list(points.values())
