"""Masks: which cells of each weight stay.

What is exact. A density d over N weights removes round((1 - d) × N) of them: of every layer with "uniform" (of every row
with scope "row"), of all considered layers together with the others; half to even, as torch.nn.utils.prune rounds.
Cells of several weights (rows, kernels, blocks) leave whole, and the nearest number of weights counts; a block at the
border has fewer. At a tie the lower index leaves first, and in a ranking over layers those of the earlier layer. At least
one cell of a layer (of a row) stays. N:M keeps N of every M inputs, whatever the scores.

Rows are outputs: of a weight stored [in, out, …] (Scores.flipped) they lie along axis 1; cells that would lie across it
(N:M, rows, columns, blocks that are not square) leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paredown.allocate.levels import weight_floors
from paredown.allocate.meter import rates
from paredown.allocate.request import FIX, Request
from paredown.allocate.search import TOLERANCE
from paredown.allocate.select import Bools, Cells, cut, kept_in_rows, rounded
from paredown.allocate.shares import Curve, by_price, equal_increase, erk, in_whole_numbers, scaled
from paredown.errors import InfeasibleError, NothingToDo, RejectedError, UsageError
from paredown.granularity import Granularity
from paredown.plan import Mask, Plan
from paredown.score.patterns import protected_weights

_FLOOR = 0.01
"""Of layers that are compared with one another, where nothing else is asked: a ranking can empty a layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One weight that takes part: its cells, and what they cost."""

    name: str
    shape: tuple[int, ...]
    scores: NDArray[Any]
    saves: int | NDArray[np.int64]
    """Weights in a cell."""
    price: int = 1
    """What one weight counts in the budget: 1, or its MACs."""
    least: int = 1
    """Weights that stay in any case."""
    flipped: int = 0
    """Where it is stored [in, out, …] the number of its groups; 0 for [out, in, …]."""

    @property
    def numel(self) -> int:
        """Weights in all."""
        return math.prod(self.shape)

    def cells(self) -> Cells:
        """The cells, saving weights."""
        return Cells(scores=self.scores, saves=self.saves)

    def compared(self, how: str) -> Cells:
        """The cells, saving what the budget counts, with scores that are compared across layers.

        Divided by the layer's mean or largest magnitude, or ("size") by the number of weights in each cell: for scores that
        are sums over cells; `score` gives means.
        """
        saves = self.saves * self.price
        if how == "size":
            return Cells(scores=self.scores / self.saves, saves=saves)
        if how == "none":
            return Cells(scores=self.scores, saves=saves)
        magnitude = np.abs(self.scores)
        scale = float(magnitude.mean(dtype=np.float64) if how == "mean" else magnitude.max())
        return Cells(scores=self.scores, saves=saves, scale=scale if scale > 0 else 1.0)

    def kept_in_rows(self, share: float) -> Bools:
        """Cells that stay when every output gives that share of its own."""
        if not self.flipped:
            return kept_in_rows(self.scores, self.saves, share)
        saves = self.saves if isinstance(self.saves, int) else by_output(self.saves, self.flipped)
        kept = kept_in_rows(by_output(self.scores, self.flipped), saves, share)
        inputs, outputs, *taps = self.scores.shape
        apart = kept.reshape(self.flipped, outputs, inputs // self.flipped, *taps)
        return np.moveaxis(apart, 1, 2).reshape(self.scores.shape)


def by_output(cells: NDArray[Any], groups: int) -> NDArray[Any]:
    """[groups × in, out, …] with one row for each output of each group. Shape [groups × out, in, …].

    >>> by_output(np.array([[0, 1], [2, 3]]), 1).tolist()
    [[0, 2], [1, 3]]
    """
    inputs, outputs, *taps = cells.shape
    apart = cells.reshape(groups, inputs // groups, outputs, *taps)
    return np.moveaxis(apart, 2, 1).reshape(groups * outputs, -1, *taps)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A checked request: who takes part, and how much has to leave."""

    request: Request
    weights: tuple[Weight, ...]
    left_out: Mapping[str, str]
    rate: Mapping[str, int]
    """MACs per weight."""
    unit: str
    """ "density", "parameters" or "macs"; "" where N:M needs none."""
    removed: int
    """What has to leave, in weights or MACs."""
    share: float
    """The same as a share of what takes part."""
    each: bool
    """Whether the share is every layer's own; else the sum over layers is what counts."""
    rows: bool
    floor: Any
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(w.numel * w.price for w in self.weights)

    @property
    def removable(self) -> int:
        return sum((w.numel - w.least) * w.price for w in self.weights)


def allocate_masks(request: Request) -> Plan:
    """A plan of masks for a granularity that masks can show."""
    task = _task(request)
    made = task.made
    if task.unit and task.removed <= 0:
        return Plan(keep={}, made_by={**made, "already_met": True, "reached": _reached(task, {})})
    if request.granularity.kind == "n:m":
        return _finished(task, {w.name: request.granularity.keep_n_of_m(w.scores) for w in task.weights})
    if task.removed - task.removable > TOLERANCE * task.total:
        nearest = _finished(task, _kept(replace(task, removed=task.removable), at_floor=True))
        raise InfeasibleError(_infeasible(task, nearest), nearest=nearest, advice=FIX)
    plan = _finished(task, _kept(replace(task, removed=min(task.removed, task.removable))))
    if not plan.masks:
        msg = f"a plan must remove something. Got {request.budget.given()}, to which keeping every weight is nearest."
        raise NothingToDo(msg, nearest=plan)
    return plan


def layer_mask(
    scores: NDArray[Any],
    shape: tuple[int, ...],
    granularity: Granularity,
    density: float,
    *,
    rows: bool = False,
    flipped: int = 0,
) -> Bools:
    """The elements of one weight that stay at a density: what "uniform" does to one layer. Shape: the weight's.

    `flipped`: the groups of a weight stored [in, out, …], by Scores.flipped; 0 for [out, in, …].

    >>> scores = np.array([[1.0, 4.0], [3.0, 2.0]])
    >>> layer_mask(scores, (2, 2), Granularity.parse("element"), 0.5).tolist()
    [[False, True], [True, False]]
    """
    if granularity.kind == "n:m":
        return granularity.keep_n_of_m(scores)
    weight = Weight(name="", shape=shape, scores=scores, saves=_cell_sizes(granularity, shape), flipped=flipped)
    share = 1.0 - density
    kept = weight.kept_in_rows(share) if rows else _lowest(weight, rounded(share, weight.numel))
    return granularity.expand(kept, shape)


# --------------------------------------------------------------------------------------------------------------- inputs


def _task(request: Request) -> _Task:
    _check(request)
    rate = rates(request.coupling, request.cost)
    weights, left_out = _weights(request, rate)
    unit, given = _budget(request)
    if unit == "macs":
        weights = [replace(w, price=rate[w.name]) for w in weights]
    spread = request.allocation not in ("uniform", "erk")
    floor: Any = request.floor
    if floor is None:
        floor = min(_FLOOR, given / 2) if spread and unit == "density" and given < 1 else _FLOOR if spread else 0.0
    least = weight_floors(request.coupling, request.cost, [w.name for w in weights], floor)
    weights = [replace(w, least=max(1, math.ceil(least[w.name] * w.numel - 1e-9))) for w in weights]
    rows = _by_rows(request)
    task = _Task(
        request=request, weights=tuple(weights), left_out=left_out, rate=rate, unit=unit, removed=0, share=0.0,
        each=True, rows=rows, floor=floor,
    )  # fmt: skip
    made = request.provenance(
        floor=dict(floor) if isinstance(floor, Mapping) else floor,
        left_out=left_out,
        leave_out=list(request.leave_out),
        scope="row" if rows else "model" if request.allocation == "global" else "layer",
        dense={"parameters": request.cost.parameters, "macs": request.cost.macs},
        **({"normalize": request.normalize or "none"} if request.allocation == "global" else {}),
    )
    return replace(task, made=made, **_to_remove(task, unit, given))


def _check(request: Request) -> None:
    if request.align is not None:
        msg = f"align must be used with channels. Got {request.align} with granularity {request.granularity}: a block is its own alignment."
        raise UsageError(msg)
    if not request.scores.by_cell:
        msg = f"scores of granularity {request.granularity} must hold cells. Got none. Score with granularity={str(request.granularity)!r}."
        raise UsageError(msg)
    if request.granularity.kind == "n:m" and request.allocation != "uniform":
        msg = f"allocation must be uniform with N:M, whose density is given. Got {request.allocation!r}."
        raise UsageError(msg)
    if request.latency is not None:
        msg = "a latency table must be used with channels: zeros save no time on a dense runtime. Got one with masks."
        raise UsageError(msg)


def _by_rows(request: Request) -> bool:
    """Whether cells are compared inside each output row: as asked, else as the criterion wants it."""
    flat = request.granularity.kind in ("row", "column", "n:m")
    if request.scope == "row" and (flat or request.allocation == "global"):
        what = (
            "a ranking of the whole model" if request.allocation == "global" else f"granularity {request.granularity}"
        )
        msg = f"scope 'row' must be used where rows have cells of their own to compare. Got it with {what}."
        raise UsageError(msg)
    wanted = request.scope or request.scores.scope
    return wanted == "row" and not flat and request.allocation != "global"


def _weights(request: Request, rate: Mapping[str, int]) -> tuple[list[Weight], dict[str, str]]:
    """Who takes part, in the order of the graph, and why others do not."""
    shapes, granularity = request.cost.parameter_shapes, request.granularity
    for name, scores in request.scores.by_cell.items():
        if name not in shapes or scores.shape != granularity.grid(shapes[name]):
            known = f"grid {granularity.grid(shapes[name])}" if name in shapes else "a parameter of this model"
            msg = f"scores must fit the model: {known} for {name}. Got shape {scores.shape}. Score this model again."
            raise UsageError(msg)
        if not np.isfinite(scores).all():
            msg = f"scores must be finite. Got NaN or infinity from {request.scores.criterion} in {name}."
            raise RejectedError(msg)
    order = list(dict.fromkeys(w for node in request.cost.by_node for w in node.weights if w in request.scores.by_cell))
    left_out = {n: "no layer multiplies with it" for n in request.scores.by_cell if not rate.get(n)}
    flipped = _flipped(request, order)
    left_out |= {
        n: f"it is stored [in, out, …], along which {granularity} has no meaning"
        for n in order
        if n in flipped and not granularity.serves_flipped(shapes[n])
    }
    order = [n for n in order if n not in left_out]
    left_out |= _by_place(order, shapes, request.leave_out)
    for name in protected_weights(request.coupling, request.cost, order, request.include, request.exclude):
        left_out.setdefault(name, "a pattern leaves it out")
    found = [n for n in order if n not in left_out]
    if not found:
        reasons = "; ".join(f"{n}: {why}" for n, why in list(left_out.items())[:10])
        msg = (
            f"a plan must have something to remove. Got no weight that takes part. {reasons or 'The scores hold none'}."
        )
        raise NothingToDo(msg)
    made = [
        Weight(
            name=n,
            shape=shapes[n],
            scores=request.scores.by_cell[n],
            saves=_cell_sizes(granularity, shapes[n]),
            flipped=flipped.get(n, 0),
        )
        for n in found
    ]
    return made, left_out


def _flipped(request: Request, names: Sequence[str]) -> Mapping[str, int]:
    """Weights stored [in, out, …]: as the scores say, else by their op or by which axes write and read channels."""
    if request.scores.flipped is not None:
        return request.scores.flipped
    found = {w: 1 for node in request.cost.by_node if node.kind.startswith("conv_transpose") for w in node.weights}
    axes = {(f.parameter, f.axis, f.role) for space in request.coupling.spaces for f in space.footprints}
    for name in names:
        if len(request.cost.parameter_shapes[name]) == 2:
            turned = (name, 1, "write") in axes or (name, 0, "read") in axes
            usual = (name, 0, "write") in axes or (name, 1, "read") in axes
            found |= {name: 1} if turned and not usual else {}
    return {n: found[n] for n in names if n in found}


def _by_place(order: Sequence[str], shapes: Mapping[str, tuple[int, ...]], leave_out: Iterable[str]) -> dict[str, str]:
    """Layers that are often spared. Depthwise is a kernel with one input per group and more than one output."""
    out: dict[str, str] = {}
    if "depthwise" in leave_out:
        later = order[1:]
        out |= {n: "depthwise" for n in later if len(shapes[n]) > 2 and shapes[n][1] == 1 and shapes[n][0] > 1}
    if "first" in leave_out and order:
        out[order[0]] = "first layer"
    if "last" in leave_out and order:
        out[order[-1]] = "last layer"
    return out


def _cell_sizes(granularity: Granularity, shape: tuple[int, ...]) -> int | NDArray[np.int64]:
    """Weights per cell: one number wherever all cells are equal."""
    if granularity.kind in ("element", "n:m"):
        return 1
    sizes = granularity.cell_sizes(shape)
    first = int(sizes.flat[0])
    return first if bool((sizes == first).all()) else sizes


def _budget(request: Request) -> tuple[str, float | int]:
    given = request.budget.given()
    if request.granularity.kind == "n:m":
        ratio = request.granularity.a / request.granularity.b
        if given and (set(given) != {"density"} or abs(float(given["density"]) - ratio) > TOLERANCE):
            msg = f"{request.granularity} must come without a budget, or with density={ratio:g}, which it is. Got {given}."
            raise UsageError(msg)
        return "", ratio
    if len(given) != 1 or next(iter(given)) not in ("density", "parameters", "macs"):
        other = [n for n in given if n not in ("density", "parameters", "macs")]
        why = f" {other[0]} does not change with zeros on a dense runtime: prune channels for it." if other else ""
        msg = (
            "a budget for masks must give one of density, parameters (those that are not zero) or macs (effective). "
            f"Got {' and '.join(given) or 'none'}.{why}"
        )
        raise UsageError(msg)
    (unit, value), *_ = given.items()
    return unit, value


def _to_remove(task: _Task, unit: str, given: float | int) -> dict[str, Any]:
    """How much has to leave, and as a share of what takes part."""
    if not unit:
        return {"removed": 0, "share": 0.0, "each": True}
    cost, total = task.request.cost, task.total
    if unit == "density" and not isinstance(given, int):
        return {"removed": rounded(1.0 - given, total), "share": 1.0 - given, "each": True}
    if unit == "density":
        removed = total - int(given)
    else:
        dense = cost.parameters if unit == "parameters" else cost.macs
        removed = dense - (given if isinstance(given, int) else round(given * dense))
    return {"removed": int(removed), "share": removed / total, "each": False}


# --------------------------------------------------------------------------------------------------------------- choice


def _kept(task: _Task, *, at_floor: bool = False) -> dict[str, Bools]:
    """Kept cells of every weight."""
    if task.request.allocation == "global" and not at_floor:
        return _ranked(task)
    if task.rows and task.request.allocation == "uniform" and not at_floor and not _floors_bind(task):
        return {w.name: w.kept_in_rows(task.share) for w in task.weights}
    return _chosen(task, _removed_by_weight(task, at_floor=at_floor))


def _chosen(task: _Task, removed: NDArray[np.int64]) -> dict[str, Bools]:
    """Kept cells when every weight gives so many of its elements."""
    kept: dict[str, Bools] = {}
    for weight, number in zip(task.weights, removed.tolist(), strict=True):
        if task.rows:
            kept[weight.name] = weight.kept_in_rows(number / weight.numel)
        else:
            kept[weight.name] = _lowest(weight, number)
    return kept


def _lowest(weight: Weight, removed: int) -> Bools:
    """Cells that stay when so many weights should leave; never fewer weights than the least."""
    cells = weight.cells()
    found = cut([cells], removed)
    if weight.numel - found.saved < weight.least:
        found = cut([cells], weight.numel - weight.least, at_most=True)
    return next(found.kept([cells]))


def _ranked(task: _Task) -> dict[str, Bools]:
    """One ranking; layers that would fall below their floor keep it, and the others give the more."""
    how = task.request.normalize or "none"
    cells = {w.name: w.compared(how) for w in task.weights}
    free, removed = list(task.weights), task.removed
    kept: dict[str, Bools] = {}
    while True:
        found = cut([cells[w.name] for w in free], removed)
        stays = dict(zip([w.name for w in free], found.kept([cells[w.name] for w in free]), strict=True))
        poor = [w for w in free if _weights_in(w, stays[w.name]) < w.least]
        if not poor:
            return {w.name: kept[w.name] if w.name in kept else stays[w.name] for w in task.weights}
        for w in poor:
            at_floor = cut([w.cells()], w.numel - w.least, at_most=True)
            kept[w.name] = next(at_floor.kept([w.cells()]))
            removed -= at_floor.saved * w.price
            free.remove(w)
        removed = max(removed, 0)


def _weights_in(weight: Weight, kept: Bools) -> int:
    if isinstance(weight.saves, int):
        return int(np.count_nonzero(kept)) * weight.saves
    return int(weight.saves[kept].sum())


def _removed_by_weight(task: _Task, *, at_floor: bool) -> NDArray[np.int64]:
    """How many weights every layer gives, layer by layer."""
    numel = np.array([w.numel for w in task.weights], dtype=np.int64)
    price = np.array([w.price for w in task.weights], dtype=np.int64)
    most = numel - np.array([w.least for w in task.weights], dtype=np.int64)
    how = task.request.allocation
    if at_floor:
        return most
    if how == "uniform" and task.each and not _floors_bind(task):
        return np.minimum(np.array([rounded(task.share, n) for n in numel.tolist()], dtype=np.int64), most)
    amounts = (numel * price).astype(np.float64)
    target = float(amounts.sum()) - task.removed
    lows = 1.0 - most / numel
    if how in ("uniform", "erk"):
        raw = np.ones(len(numel)) if how == "uniform" else erk([w.shape for w in task.weights])
        shares = scaled(raw, amounts, lows, target)
    else:
        shares = _measured(task, amounts, lows, target)
    wanted = numel * (1.0 - shares)
    if (price == 1).all():
        return in_whole_numbers(wanted, most, task.removed)
    return np.minimum(np.round(wanted).astype(np.int64), most)


def _floors_bind(task: _Task) -> bool:
    """Whether a floor that was asked for (not the one weight that always stays) holds one common ratio up."""
    return any(w.least > 1 and w.least > w.numel - rounded(task.share, w.numel) for w in task.weights)


def _measured(
    task: _Task, amounts: NDArray[np.float64], lows: NDArray[np.float64], target: float
) -> NDArray[np.float64]:
    """Densities by measured increases; a layer that nobody measured stays dense."""
    seen = task.request.table({w.name: w.numel for w in task.weights})
    curves: list[Curve] = []
    for w in task.weights:
        kept, worse = seen.curve(w.name) if w.name in seen.increase else (np.array([float(w.numel)]), np.zeros(1))
        curves.append((kept / w.numel, worse))
    unmeasured = [w.name for w, c in zip(task.weights, curves, strict=True) if len(c[0]) == 1]
    if unmeasured:
        task.made["unmeasured"] = unmeasured
    floor = np.maximum(lows, [c[0][0] for c in curves])
    if float(amounts @ floor) > target + TOLERANCE * float(amounts.sum()):
        msg = (
            f"{task.unit} must be reducible by {task.removed:,}. Got {round(float(amounts @ (1 - floor))):,} at the densities "
            f"that were measured ({len(unmeasured)} weights were not)."
        )
        numel = np.array([w.numel for w in task.weights])
        nearest = _finished(task, _chosen(task, np.floor(numel * (1.0 - floor) + 1e-9).astype(np.int64)))
        raise InfeasibleError(msg, nearest=nearest, advice="Measure smaller amounts, or ask for more.")
    if task.request.allocation == "sensitivity":
        shares = equal_increase(curves, amounts, floor, target)
    else:
        shares = by_price(curves, amounts, floor, target, exact=task.request.allocation == "knapsack")
    task.made["expected_increase"] = float(sum(np.interp(s, *c) for s, c in zip(shares, curves, strict=True)))
    return shares


# ----------------------------------------------------------------------------------------------------------------- plan


def _finished(task: _Task, kept: Mapping[str, Bools]) -> Plan:
    """Masks of the weights that lose something, and what they reach."""
    granularity = task.request.granularity
    masks, stays = {}, {}
    for weight in task.weights:
        full = granularity.expand(kept[weight.name], weight.shape)
        stays[weight.name] = int(np.count_nonzero(full))
        if stays[weight.name] < weight.numel:
            masks[weight.name] = Mask.of(full, str(granularity))
    made = {**task.made, "reached": _reached(task, stays), "estimated": ["effective_macs"]}
    if task.unit:
        made["asked"] = {task.unit: _asked(task)}
    if granularity.kind == "n:m" and not masks:
        msg = f"a plan must remove something. Got {granularity}, for which no weight has enough inputs."
        raise NothingToDo(msg)
    return Plan(keep={}, masks=masks, made_by=made)


def _asked(task: _Task) -> int:
    dense = {"parameters": task.request.cost.parameters, "macs": task.request.cost.macs}.get(task.unit, task.total)
    return dense - task.removed


def _reached(task: _Task, stays: Mapping[str, int]) -> dict[str, Any]:
    """Executed and stored on a dense runtime; and what is not zero, which only a sparse one would gain from."""
    cost = task.request.cost
    gone = {w.name: w.numel - stays.get(w.name, w.numel) for w in task.weights}
    total = sum(w.numel for w in task.weights)
    kept = total - sum(gone.values())
    return {
        "kept": kept,
        "of": total,
        "density": kept / total,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "nonzero_parameters": cost.parameters - sum(gone.values()),
        "effective_macs": cost.macs - sum(n * task.rate[name] for name, n in gone.items()),
        "kept_of": {w.name: stays[w.name] for w in task.weights if w.name in stays},
    }


def _infeasible(task: _Task, nearest: Plan) -> str:
    reached = nearest.made_by["reached"]
    got = {"density": reached["kept"], "parameters": reached["nonzero_parameters"], "macs": reached["effective_macs"]}
    because = f"floor={task.made['floor']}" + (f", {len(task.left_out)} weights left out" if task.left_out else "")
    what = {"density": "weights that stay", "parameters": "parameters that are not zero", "macs": "effective MACs"}
    return f"{what[task.unit]} must be reducible to {_asked(task):,}. Got {got[task.unit]:,} at the least ({because})."
