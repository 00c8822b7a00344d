"""Grid: from a recipe to the cells of its curve. A cell is the resolved recipe of one trial, known by its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from paredown.contents import digest_of
from paredown.curve import CONTROLS
from paredown.errors import UsageError
from paredown.granularity import Granularity
from paredown.recipe import Recipe
from paredown.recipe_fields import STREAMS, CurveGrid, DenseTwin, Level, Method, Prune, Recover

Kind = Literal["base", "pruned", "from-scratch", "scratch", "thin", "random"]
OF_MASKS = ("gradual", "lottery", "rigl", "set")
"""Schedules that only masks have."""
MULTI = 2
"""Levels of the schedule multi-level."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One trial: what it does, in full."""

    kind: Kind
    method: str = ""
    schedule: str = ""
    amount: float | None = None
    """What remains, as the recipe says it; None for the base."""
    seed: int
    recipe: Recipe
    """`paredown compress` runs that of a pruned cell as it is."""
    needs: tuple[tuple[str, str], ...] = ()
    """(role, digest) of the cells whose results it reads: "base", and for scratch and thin "pruned"."""
    epochs: int | None = None
    """Training of a control whose base cannot be trained again."""
    latency: bool = False
    """Whether its file is timed."""
    quantized: bool = False
    """Whether it has a second file, in codes."""
    digest: str
    """SHA-256 of kind, recipe and needs: two cells that would do the same are one."""

    @property
    def name(self) -> str:
        """For people: "l1 one-shot, 0.5 remains, seed 0"."""
        if self.kind == "base":
            return f"base, seed {self.seed}"
        what = f"{self.method} {self.schedule}" if self.kind in ("pruned", "from-scratch") else f"control {self.kind}"
        return f"{what}, {self.amount:g} remains, seed {self.seed}"

    def told(self) -> dict[str, Any]:
        """What a record says of it; the resolved recipe is not in there."""
        return {
            "kind": self.kind,
            "method": self.method,
            "schedule": self.schedule,
            "amount": self.amount,
            "seed": self.seed,
            "digest": self.digest,
        }


def grid(recipe: Recipe) -> tuple[Cell, ...]:
    """All cells of a recipe's curve, a base before what needs it; equal recipes give equal cells.

    Per seed a base, then every amount × method × schedule; controls stand at the amounts they are asked for and follow
    the first method and its first schedule that prunes a trained model; those of the sweet spot are known later (`controls_of`). Raises UsageError where there is no `curve`,
    or a method and a schedule do not fit.

    >>> from paredown.recipe import load_recipe
    >>> found = grid(load_recipe("digits", ["curve.amounts=[0.5]", "curve.seeds=[0]"]))
    >>> [c.kind for c in found]
    ['base', 'pruned', 'scratch', 'thin', 'random']
    """
    curve = recipe.curve
    if curve is None:
        msg = "a recipe must have a section `curve` with amounts, for a curve. Got none. Write curve: {amounts: [0.75, 0.5, 0.25]}."
        raise UsageError(msg)
    cells: dict[str, Cell] = {}
    ways = [
        (method, schedule, amount, _pruning(recipe, curve, method, schedule, amount))
        for amount in curve.amounts
        for method in curve.methods
        for schedule in curve.schedules
    ]
    _refuse_idle(recipe, [prune for *_, (prune, _) in ways])
    if curve.quantized and recipe.quantize.spare:
        msg = "curve.quantized must go without quantize.spare, whose layers in float differ from file to file: controls would not compare. Got both. Name layers in quantize.float_layers."
        raise UsageError(msg)
    files = _files(recipe)
    for seed in curve.seeds:
        recover = Recover(
            max_steps=recipe.recover.max_steps
        )  # training with rounding, of the dense file too, ends by it
        own = _changed(recipe, seed, prune=Prune(), recover=recover)
        base = _cell("base", seed=seed, recipe=own, latency=curve.latency, quantized=curve.quantized, files=files)
        cells[base.digest] = base
        for cell in _of_seed(recipe, curve, ways, seed, base):
            twin = cells.setdefault(cell.digest, cell)
            if twin is not cell and cell.kind in ("pruned", "from-scratch"):
                msg = f"curve.methods and schedules must give each cell once. Got {twin.name!r} and {cell.name!r}, which do the same."
                raise UsageError(msg)
    return tuple(cells.values())


def _refuse_idle(recipe: Recipe, ways: Sequence[Prune]) -> None:
    """Options of a schedule that no way of the curve has would be passed over in silence."""
    options = recipe.prune.schedule_options
    if options and not any(options.items() <= way.schedule_options.items() for way in ways):
        msg = (
            f"prune.schedule_options must be of a schedule of masks that is among curve.schedules. Got {options} for "
            f"{recipe.prune.schedule!r}, and a curve without it. Name their schedule in prune.schedule, or leave them out."
        )
        raise UsageError(msg)


_Way = tuple[Method, str, float, tuple[Prune, Recover]]


def _of_seed(recipe: Recipe, curve: CurveGrid, ways: Sequence[_Way], seed: int, base: Cell) -> Iterator[Cell]:
    trained = next(((m, s) for m, s, _, _ in ways if s != "from-scratch"), None)
    controlled = set(curve.controls.fixed(curve.amounts))
    for method, schedule, amount, (prune, recover) in ways:
        kind: Kind = "from-scratch" if schedule == "from-scratch" else "pruned"
        own = _changed(recipe, seed, prune=prune, recover=recover)
        cell = _cell(
            kind, seed=seed, recipe=own, method=_label(recipe, method), schedule=schedule, amount=amount,
            latency=curve.latency, quantized=curve.quantized, needs=(("base", base.digest),), files=_measured(own),
        )  # fmt: skip
        yield cell
        if (method, schedule) == trained and amount in controlled:
            yield from _controls(curve, cell, base.digest)


def controls_of(
    recipe: Recipe, cells: Sequence[Cell], chosen: Sequence[str], kinds: Collection[str]
) -> tuple[Cell, ...]:
    """Controls of these kinds beside the pruned cells of these digests, their own way followed, those left out that are among `cells`.

    >>> from paredown.recipe import load_recipe
    >>> recipe = load_recipe("digits", ["curve.amounts=[0.5]", "curve.seeds=[0]", "curve.controls.amounts=[sweet-spot]"])
    >>> cells = grid(recipe)
    >>> [c.kind for c in cells], [c.kind for c in controls_of(recipe, cells, [cells[1].digest], ("thin",))]
    (['base', 'pruned'], ['thin'])
    """
    assert recipe.curve is not None
    there = {c.digest for c in cells}
    controls = recipe.curve.controls.model_copy(update={"kinds": tuple(kinds)})
    asked = recipe.curve.model_copy(update={"controls": controls})
    own = [c for c in cells if c.digest in set(chosen) and c.kind == "pruned"]
    found = {c.digest: c for cell in own for c in _controls(asked, cell, dict(cell.needs)["base"])}
    return tuple(c for digest, c in found.items() if digest not in there)


def _controls(curve: CurveGrid, first: Cell, base: str) -> Iterator[Cell]:
    """What the pruned model of one amount and seed must beat; `base` is the digest of its base."""
    both: tuple[tuple[str, str], ...] = (("base", base), ("pruned", first.digest))
    scratch: tuple[tuple[str, str], ...] = ()
    for kind in sorted(curve.controls.kinds, key=[*CONTROLS].index):
        recipe, needs = first.recipe, both if kind != "thin" else both + scratch
        if kind == "random":
            prune = first.recipe.prune
            if prune.criterion == "random" or prune.levels[0].factorize is not None:
                continue  # it is that already, or has no criterion
            plain = prune.model_copy(
                update={
                    "criterion": "random", "criterion_options": {}, "update": "none",
                    "allocation": prune.allocation or prune.usual_allocation(prune.levels[0]),  # not that of random
                }
            )  # fmt: skip
            recipe, needs = _copy(first.recipe, prune=plain), both[:1]
        cell = _cell(
            kind, seed=first.seed, recipe=recipe, method=first.method, schedule=first.schedule, amount=first.amount,
            latency=curve.latency, quantized=curve.quantized, needs=needs,
            epochs=None if kind == "random" else curve.controls.epochs, files=_measured(recipe),
        )  # fmt: skip
        if kind == "scratch":
            scratch = (("scratch", cell.digest),)  # thin is the same where its shape is
        yield cell


def _files(recipe: Recipe) -> list[str]:
    """Digests of the files that the trials are made of: other ones under the same name are another sweep."""
    model = None if recipe.model is None else recipe.model.rpartition(":")[0]
    found = []
    for path in (Path(p) for p in (recipe.weights, model) if p):
        if path.is_file():
            with path.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
    if recipe.data_path is not None and recipe.data_path.exists():
        found.append(digest_of(recipe.data_path))
    return found


def _measured(recipe: Recipe) -> list[str]:
    """A digest of what `prune.sensitivity` holds, where a recipe names it: another measurement makes other plans."""
    asked = recipe.prune.sensitivity
    records = None if asked is None else Path(asked, "records.jsonl")
    return [digest_of(records)] if records is not None and records.is_file() else []


def _cell(
    kind: Kind, *, recipe: Recipe, needs: tuple[tuple[str, str], ...] = (), files: Sequence[str] = (), **more: Any
) -> Cell:
    codes = ["quantized"] if more.get("quantized") else []
    asked = [kind, recipe.digest, needs, more.get("epochs"), more.get("latency", False), STREAMS, *codes, *files]
    text = json.dumps(asked)
    return Cell(kind=kind, recipe=recipe, needs=needs, digest=hashlib.sha256(text.encode()).hexdigest(), **more)


def _pruning(recipe: Recipe, curve: CurveGrid, method: Method, schedule: str, amount: float) -> tuple[Prune, Recover]:
    """What leaves and how it is trained back, for one amount of one way."""
    given = method.model_dump(exclude_none=True, exclude={"name", "factorize"})
    prune = recipe.prune.model_copy(update=given)
    if method.criterion not in (None, recipe.prune.criterion):
        prune = prune.model_copy(update={"criterion_options": {}})
    if method.regularize not in (None, recipe.prune.regularize):
        prune = prune.model_copy(update={"regularize_options": {}})
    cut = Granularity.parse(prune.granularity)
    masked = cut.masked and method.factorize is None
    if cut.kind in ("n:m", "layer"):
        msg = f"a curve must have amounts between which to choose: its granularity must be channel, head or a mask other than N:M. Got {prune.granularity}."
        raise UsageError(msg)
    by = curve.by or ("density" if masked else "channels" if method.factorize is None else "parameters")
    if (by == "density") != masked:
        msg = f"curve.by must be {'density for masks' if masked else 'channels, parameters or macs'}. Got {by!r} with granularity {prune.granularity}."
        raise UsageError(msg)
    if method.factorize is not None and by == "channels":
        msg = f"curve.by must be parameters or macs for low rank. Got 'channels' with {method.label}. Left out, it is channels where channels leave and parameters for low rank."
        raise UsageError(msg)
    if schedule in OF_MASKS and not masked:
        msg = f"curve.schedules must be one-shot, multi-level, iterative or from-scratch where channels leave. Got {schedule!r} with granularity {prune.granularity}."
        raise UsageError(msg)
    levels = MULTI if schedule == "multi-level" else curve.rounds if schedule == "iterative" and not masked else 1
    own: Mapping[str, Any] = {"schedule": "one-shot", "schedule_options": {}}
    if masked:
        of_masks = schedule if schedule in ("iterative", *OF_MASKS) else "one-shot"
        rounds: dict[str, Any] = {"rounds": curve.rounds} if schedule == "iterative" else {}
        if rounds and curve.spacing != "geometric":
            rounds["spacing"] = curve.spacing
        options = recipe.prune.schedule_options if recipe.prune.schedule == of_masks else {}
        own = {"schedule": of_masks, "schedule_options": {**rounds, **options}}
    epochs = _shared(recipe.recover.epochs, levels)
    recover = recipe.recover.model_copy(update={"epochs": epochs[0]})
    left = [
        Level.model_validate({by: s, "factorize": method.factorize, "epochs": None if e == epochs[0] else e})
        for s, e in zip(_steps(amount, levels, curve.spacing), epochs, strict=True)
    ]
    prune = prune.model_copy(update={**own, "levels": tuple(left)})
    try:
        Prune.model_validate_json(prune.model_dump_json())  # copies are not checked
    except ValidationError as error:
        msg = f"every way of a curve must be a recipe. Got {method.label!r} with {schedule}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        raise UsageError(msg) from error
    return prune, recover


def _steps(amount: float, levels: int, spacing: str) -> list[float]:
    """What each level leaves of what it got.

    >>> [round(s, 3) for s in _steps(0.5, 2, "linear")], [round(s, 3) for s in _steps(0.5, 2, "geometric")]
    ([0.75, 0.667], [0.707, 0.707])
    """
    if spacing == "geometric":
        return [amount ** (1 / levels)] * levels
    lost = (1 - amount) / levels
    return [(1 - (k + 1) * lost) / (1 - k * lost) for k in range(levels)]


def _shared(epochs: int, levels: int) -> list[int]:
    """Of each level, where all together have those of the recipe, as one level has; what is left over goes to the last ones.

    >>> _shared(8, 2), _shared(3, 2), _shared(2, 4)
    ([4, 4], [1, 2], [0, 0, 1, 1])
    """
    each, over = divmod(epochs, levels)
    return [each + (k >= levels - over) for k in range(levels)]


def _changed(recipe: Recipe, seed: int, **fields: Any) -> Recipe:
    """A recipe of one trial. Its threads are said: results must not depend on how many cores there are."""
    own = {"threads": recipe.threads or 1, "curve": None, "dense_twin": DenseTwin(enabled=False)}
    return _copy(recipe, seed=seed, **own, **fields)


def _copy(recipe: Recipe, **fields: Any) -> Recipe:
    copied = recipe.model_copy(update=fields)
    copied.__dict__.pop("digest", None)  # of the recipe it was copied from
    return copied


def _label(recipe: Recipe, method: Method) -> str:
    """What a line is called; a method that changes nothing goes by the recipe's criterion."""
    return method.label if method != Method() else recipe.prune.criterion
