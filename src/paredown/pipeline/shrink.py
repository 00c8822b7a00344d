"""A budget of bytes met by pruning, low rank and bits together: which share leaves is tried, which bits where is solved exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paredown.allocate.knapsack import knapsack
from paredown.errors import InfeasibleError, NothingToDo
from paredown.export import export
from paredown.pipeline.folder import key_of
from paredown.pipeline.run import Run
from paredown.pipeline.verdict import counted
from paredown.pipeline.ways import Here, Way
from paredown.plan import Plan
from paredown.program import Program
from paredown.prune import Pruned
from paredown.prune.reconstruct import reconstruct
from paredown.quantize import quantize
from paredown.quantize.culprits import some
from paredown.quantize.mixed import SCALE_BYTES, Width, error_of, measured_widths
from paredown.quantize.rounding import METHODS
from paredown.quantize.static import calibrated
from paredown.recipe_fields import Level
from paredown.search.asking import Trial, Values, search_by_asking, undominated
from paredown.target import named
from paredown.train import recover
from paredown.train.task import seed_all

LEAST_SHARE, MOST_SHARE = 0.15, 0.95
"""Of the parameters that a trial leaves."""
NEAR = 0.985
"""A file from this share of the limit on leaves little unused."""
_ROUNDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrinking:
    """What a search for bytes knows: the limit, and what of a file is not codes."""

    limit: float
    overhead: float
    """Bytes of the 8-bit file besides codes and scales: graph, biases, float layers."""
    widths: tuple[int, ...]
    float_bytes: int = 0
    """Of them those of matrices that stay in float, which pruning makes smaller too."""

    def overhead_of(self, thing: Program | Pruned, coded: Iterable[str]) -> float:
        """The same of a variant of the network, *estimated*."""
        return self.overhead + _float_bytes(thing, coded) - self.float_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """What a search for bytes chose."""

    level: Level | None
    """None where bits alone are enough."""
    plan: Plan | None
    shrinking: Shrinking
    told: Mapping[str, Any]


def shrunk(run: Run, way: Way, here: Here, limit: float) -> Shrunk | None:
    """The share of parameters to keep, by channels or by low rank, so that with the best bits per layer the output moves least.

    Trials: the network as it is, then `budget.trials` shares. Each is pruned, fitted to the dense activations, has its batch norm
    re-estimated (and is trained for budget.trial_epochs), and gets the bits of least summed error within the bytes, by an
    integer program. Its loss is the squared error of its output on calibration data over the mean square of the dense output.

    None where the 8-bit file is small enough. Raises InfeasibleError where no trial fits.
    """
    bounds = run.recipe.budget
    quantized = quantize(here.program, **_plain(run))
    file = export(quantized, run.folder.steps / f"search-{way.number}" / "as-it-is.onnx", target=run.recipe.target)
    run.say(f"budget: {file.size_bytes:,} B with 8 bits and nothing pruned, asked {limit:,.0f} B")
    if file.size_bytes <= limit:
        return None
    coded = sum(p.codes.numel() + SCALE_BYTES * len(p.codes) for p in quantized.weights.values())
    shrinking = Shrinking(
        limit=limit, overhead=float(file.size_bytes - coded), widths=bounds.bits,
        float_bytes=_float_bytes(here.program, quantized.weights),
    )  # fmt: skip

    smallest: list[tuple[float, str]] = []

    def answer(values: Values) -> tuple[tuple[float, ...], Mapping[str, Any]]:
        variant, _ = _variant(run, way, here, values)
        groups = _widths(run, variant, shrinking.widths)
        overhead = shrinking.overhead_of(variant, (g[0].layer for g in groups))
        try:
            spread = _solved(groups, max(1, int(limit - overhead)))
        except _TooLarge as large:
            smallest.append(
                (large.least + overhead, f"{values['way']}, {float(values['share']):.2f} of the parameters")
            )
            raise
        error = _error(run, here, variant, spread.bits)
        size = spread.size_bytes + overhead
        run.say(
            f"budget: {values['way']} {float(values['share']):.2f}: error {error:.4g} at {size:,.0f} B (estimated), "
            f"bits {min(spread.bits.values())}–{max(spread.bits.values())}"
        )
        return (error,), {"bits": spread.bits, "size_bytes": round(size)}

    trials = _trials(run, way, here, answer)
    good = [t for t in trials if t.losses is not None]
    if not good:
        near = (
            f"some {min(smallest)[0]:,.0f} B at the least ({min(smallest)[1]}, estimated)"
            if smallest
            else trials[-1].why
        )
        msg = f"size_bytes must be reachable: {limit:,.0f}. Got {near} in {len(trials)} trials. Allow fewer bits (budget.bits), lower prune.floor, or ask for more."
        raise InfeasibleError(msg, nearest=_nearest(way, here))
    best = min(good, key=lambda t: (t.losses or (math.inf,))[0])
    level = _level(here, best.values)
    plan = None if level is None else _way(way, level).plan(here)
    return Shrunk(level=level, plan=plan, shrinking=shrinking, told=_told(here, trials, best, shrinking))


def _trials(run: Run, way: Way, here: Here, answer: Any) -> tuple[Trial, ...]:
    bounds, journal = run.recipe.budget, run.folder.steps / f"search-{way.number}" / "trials.jsonl"
    key = key_of(run.recipe.digest, here.program.source_digest, run.environment["versions"])
    dense = search_by_asking(
        {"way": ("none",), "share": (1.0, 1.0)}, answer, trials=1, journal=journal, key=f"{key} none"
    )
    ways = ("channels", "low rank") if bounds.low_rank else ("channels",)
    domain = {"way": ways, "share": (LEAST_SHARE, MOST_SHARE)}
    if not bounds.trials:
        return dense
    return (
        *dense,
        *search_by_asking(domain, answer, trials=bounds.trials, seed=run.recipe.seed, journal=journal, key=key),
    )


def _told(here: Here, trials: Sequence[Trial], best: Trial, shrinking: Shrinking) -> dict[str, Any]:
    rows = []
    for t in trials:
        level, bits = _level(here, t.values), t.told.get("bits")
        recipe: dict[str, Any] = {} if level is None else {"prune.levels": [level.model_dump(exclude_none=True)]}
        if bits:  # all trials are solved for one limit: what tells points of nearly one size apart is these
            recipe = {"prune.levels": [], **recipe, "bits": _in_words(bits)}
        rows.append(
            {
                "way": t.values["way"], "share": t.values["share"], "error": None if t.losses is None else t.losses[0],
                "size_bytes": t.told.get("size_bytes"), "bits": bits, "why": t.why, "recipe": recipe,
            }
        )  # fmt: skip
    front = undominated([None if t.losses is None else (t.losses[0], t.told["size_bytes"]) for t in trials])
    return {
        "asked": {"size_bytes": shrinking.limit},
        "trials": rows,
        "chosen": trials.index(best),
        "front": front,
        "already_met": False,
    }


# -------------------------------------------------------------------------------------------------------------- trials


def _level(here: Here, values: Mapping[str, Any]) -> Level | None:
    if values["way"] == "none":
        return None
    count = max(2, int(float(values["share"]) * here.cost.parameters))
    return Level(parameters=count, factorize="svd" if values["way"] == "low rank" else None)


def _way(way: Way, level: Level) -> Way:
    return dataclasses.replace(way, level=level)


def _nearest(way: Way, here: Here) -> Plan | None:
    """The least that floor and alignment allow."""
    try:
        return _way(way, Level(parameters=2)).plan(here)
    except InfeasibleError as error:
        return error.nearest  # type: ignore[no-any-return]


def _variant(run: Run, way: Way, here: Here, values: Values) -> tuple[Program | Pruned, Plan | None]:
    """The network with that share left, as well as it can be without much training."""
    level = _level(here, values)
    if level is None:
        return here.program, None
    mine = _way(way, level)
    plan = mine.plan(here)
    if not plan.keep and not plan.ranks:
        msg = f"the share {values['share']} removes nothing."
        raise NothingToDo(msg)
    pruned, task, recipe = mine.carried_out(here, plan), run.task, run.recipe
    if task.train_batches is None or task.step is None:
        return pruned, plan
    if plan.keep:
        seed_all(recipe.seed)
        pruned = reconstruct(
            pruned, task.train_batches, step=task.step, num_batches=recipe.prune.score_batches, seed=recipe.seed
        )
    options = {**recipe.recover.model_dump(exclude={"ranks"}), "epochs": recipe.budget.trial_epochs}
    if task.optimizer is not None:
        options["optimizer"] = task.optimizer
    dense: nn.Module = here.program.module
    tuned = recover(
        pruned, task.train_batches, step=task.step, teacher=dense, seed=recipe.seed, device=recipe.device, **options
    )
    return tuned, plan


def _plain(run: Run) -> dict[str, Any]:
    """How files are quantized while they are only weighed."""
    return {
        "target": run.recipe.target,
        "calibrate": run.task.calibration_batches,
        "scheme": run.recipe.quantize.scheme,
        "observer": "minmax",
        "float_layers": run.recipe.quantize.float_layers,
        "idle_repairs": True,
    }


def repair_of(run: Run) -> list[str]:
    """Codes of few bits are rounded by what they do to the output."""
    given: list[str] = [*run.recipe.quantize.repair]
    return given if any(r in METHODS for r in given) else [*given, "gptq"]


def _error(run: Run, here: Here, variant: Program | Pruned, bits: Mapping[str, int]) -> float:
    """How far the quantized variant's output is from the dense one's, on calibration data."""
    calls = some(run.task.calibration_batches)
    with torch.no_grad():
        wanted = [t.double() for args, kwargs in calls for t in _tensors(here.program.module(*args, **kwargs))]
    quantized = quantize(variant, **{**_plain(run), "repair": repair_of(run)}, bits=dict(bits))
    return error_of(quantized, calls, wanted)


def _tensors(value: Any) -> list[torch.Tensor]:
    from paredown.quantize.batches import tensors_of

    return [t for t in tensors_of(value) if t.is_floating_point()]


# ---------------------------------------------------------------------------------------------------------------- bits


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spread:
    bits: dict[str, int]
    size_bytes: int


def _widths(run: Run, thing: Program | Pruned, widths: Sequence[int]) -> list[list[Width]]:
    """What every layer costs and loses at every width."""
    base = calibrated(thing, **_plain(run), repair=repair_of(run))
    rounding = next(r for r in repair_of(run) if r in METHODS)
    found = [
        dataclasses.replace(w, size_bytes=w.size_bytes + unpacking_bytes(w.bits))
        for w in measured_widths(base, some(run.task.calibration_batches), sorted(set(widths), reverse=True), rounding)
    ]
    return [[w for w in found if w.layer == name] for name in dict.fromkeys(w.layer for w in found)]


def unpacking_bytes(bits: int) -> int:
    """What a file takes for the ops that unpack a weight of so many bits (see export.onnx_packed), about.

    >>> unpacking_bytes(8), unpacking_bytes(4) > 0
    (0, True)
    """
    from paredown.export.onnx_packed import PLANES, WORTH_BYTES

    return WORTH_BYTES * len(PLANES[bits]) if bits < 8 else 0


class _TooLarge(NothingToDo):
    """Even the narrowest widths do not fit; `least` is what their codes take, bytes."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


def _solved(groups: Sequence[Sequence[Width]], limit: int) -> _Spread:
    solved = knapsack([[w.size_bytes for w in g] for g in groups], [[w.error for w in g] for g in groups], limit)
    if solved is None:
        least = sum(min(w.size_bytes for w in g) for g in groups)
        msg = f"codes of the narrowest widths must fit {limit:,} B. Got {least:,} B"
        raise _TooLarge(msg, least)
    chosen = [g[o] for g, o in zip(groups, solved.chosen, strict=True)]
    return _Spread(bits={w.layer: w.bits for w in chosen}, size_bytes=sum(w.size_bytes for w in chosen))


def _float_bytes(thing: Program | Pruned, coded: Iterable[str]) -> int:
    """Of all matrices that get no codes."""
    names = set(coded)
    return sum(4 * p.numel() for n, p in thing.module.named_parameters() if p.dim() > 1 and n not in names)


def fitted_bits(run: Run, thing: Program | Pruned, shrinking: Shrinking) -> dict[str, int]:
    """Bits per layer for which the exported file holds the limit: solved, exported, weighed, and solved anew by what it weighed.

    Raises InfeasibleError where the narrowest widths are too large.
    """
    groups = _widths(run, thing, shrinking.widths)
    codes = max(1, int(shrinking.limit - shrinking.overhead_of(thing, (g[0].layer for g in groups))))
    best: _Spread | None = None
    path = run.folder.steps / f"weighed{named(run.recipe.target).suffix}"
    tried: dict[str, int] = {}
    for _ in range(_ROUNDS):
        try:
            spread = _solved(groups, codes)
        except NothingToDo as error:
            if best is None:
                msg = f"size_bytes must be reachable: {shrinking.limit:,.0f}. {error}. Lower budget.bits or prune.floor, or ask for more."
                raise InfeasibleError(
                    msg, nearest=counted(thing.plan if isinstance(thing, Pruned) else None)
                ) from error
            break
        if repr(spread.bits) in tried:
            break
        weighed = export(quantize(thing, **_plain(run), bits=spread.bits), path, target=run.recipe.target).size_bytes
        tried[repr(spread.bits)] = weighed
        run.say(f"budget: {weighed:,} B with {_in_words(spread.bits)}, asked {shrinking.limit:,.0f} B")
        room = shrinking.limit - weighed
        if room < 0:  # never the same choice again
            codes = min(codes + math.floor(room), spread.size_bytes - 1)
            continue
        best = spread
        if weighed >= NEAR * shrinking.limit:
            break
        codes = spread.size_bytes + math.floor(0.9 * room)
    path.unlink(missing_ok=True)
    if best is None:
        msg = f"size_bytes must be at most {shrinking.limit:,.0f} B. Got more in each of {len(tried)} files. Allow fewer bits in budget.bits, or ask for more."
        raise InfeasibleError(msg, nearest=counted(thing.plan if isinstance(thing, Pruned) else None))
    return best.bits


def _in_words(bits: Mapping[str, int]) -> str:
    counts = {b: sum(v == b for v in bits.values()) for b in sorted(set(bits.values()), reverse=True)}
    return ", ".join(f"{n} × {b} bits" for b, n in counts.items())


__all__ = ["Shrinking", "Shrunk", "fitted_bits", "repair_of", "shrunk"]
