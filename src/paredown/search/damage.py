"""Damage: every free space at several amounts and every layer at several bits, each alone, each kept as soon as it is known."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paredown.couple.space import Coupling
from paredown.errors import Interrupted, MissingError, NothingToDo, UsageError
from paredown.program import Program, quiet
from paredown.quantize.noise import WEIGHTED, weight_noise
from paredown.quantize.numerics import fake_quantize
from paredown.quantize.schemes import levels_at, weight_range
from paredown.records import Measured, Record, append, mend, read_whole_lines
from paredown.score.nouns import Scores
from paredown.search.masked import Copy
from paredown.search.probe import UNITS, Probe, Seen, in_a_line
from paredown.search.repair import Repair
from paredown.search.sensitivity import Point, points_of, stays_of

AMOUNTS = (0.75, 0.5, 0.25, 0.1)
"""What remains of a space."""
BITS = (8, 6, 4, 3, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One thing that is done to the network: units that leave a space, or a weight of fewer bits."""

    kind: Literal["units", "bits", "all units", "all bits"]
    name: str
    """Of the space, or of the weight; of all at once how many, and a digest of which and how far."""
    kept: int
    """Units (of a masked weight: elements) that stay; or bits; of all units at once the thousandths that stay."""
    of: int
    """All units; 32 for bits; 1000 for all units at once."""


What = Point | int | tuple[tuple[Damage, Point | int], ...]
"""How a damage is done: the units that stay, the axis of the scales, or several damages at once."""
Job = tuple[Damage, What]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hurt:
    """A damage and what it did; `seen` is None where there is no number, or has no metric, and `why` says why."""

    damage: Damage
    seen: Seen | None
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """Where a measurement stands; `fresh` where this point was not in the journal."""

    done: int
    total: int
    damage: Damage
    fresh: bool


def hurts(
    program: Program,
    coupling: Coupling,
    scores: Scores,
    probe: Probe,
    *,
    amounts: Sequence[float] = AMOUNTS,
    bits: Sequence[int] = BITS,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    repair: Repair | None = None,
    journal: Path | None = None,
    key: str = "",
    progress: Callable[[Measuring], None] | None = None,
) -> tuple[Hurt, ...]:
    """What every damage by itself does to the answers on held-out data, the rest of the network dense; nothing is retrained.

    Units: what the scores rank lowest leaves a space, until it keeps each of `amounts` (fractions that remain). Bits: the
    weight alone is rounded per output channel, as `quantize` would (8 bits hold the largest weight, fewer take the scales of
    least squared error); activations stay in float. After these all spaces at once at each amount and all layers at once at
    each width, so that a sum of the single ones can be held against what they cost together. Each point is appended to `journal` under `key`, which must name
    everything a number depends on; points of that key are not measured again, failed ones are tried again.

    Raises UsageError (amounts, bits), NothingToDo (no space and no layer), Interrupted, MissingError (bits need torchao).
    """
    copy = Copy(program, coupling, probe.device, repair)
    units = [*_of_units(program, coupling, scores, amounts, include, exclude)]
    layers = [*_of_bits(program, bits)]
    at_once = _all_units(units, amounts) if repair is None else ()  # fits of two spaces may be of one weight
    jobs: list[Job] = [*units, *layers, *at_once, *_all_bits(layers)]
    if not jobs:
        msg = "a sensitivity must have something to measure. Got no free space and no layer with a weight: see the patterns."
        raise NothingToDo(msg)
    known = _known(journal, key)
    found = []
    for number, (damage, point) in enumerate(jobs, start=1):
        there = known.get(damage)
        hurt = there or _measured(copy, scores, probe, damage, point)
        if there is None and journal is not None:
            _keep(journal, key, hurt, probe)
        found.append(hurt)
        if progress is not None:
            progress(Measuring(done=number, total=len(jobs), damage=damage, fresh=there is None))
    return tuple(found)


def _of_units(
    program: Program, coupling: Coupling, scores: Scores, amounts: Sequence[float], include: Sequence[str],
    exclude: Sequence[str],
) -> Iterator[tuple[Damage, Point]]:  # fmt: skip
    if not amounts:
        return
    try:
        points = points_of(program, coupling, scores, amounts, include, exclude)
    except NothingToDo:  # the layers' bits may still be looked at
        return
    for point in points:
        yield Damage(kind="units", name=point.name, kept=point.kept, of=point.of), point


def check_bits(bits: Sequence[int]) -> None:
    """Raises UsageError where they cannot be measured by anyone."""
    wrong = [b for b in bits if isinstance(b, bool) or b not in range(1, 9)]
    if wrong:
        msg = f"bits must be integers from 1 to 8. Got {wrong[0]!r}."
        raise UsageError(msg)


def _of_bits(program: Program, bits: Sequence[int]) -> Iterator[tuple[Damage, int]]:
    """With the axis that has a scale per index."""
    check_bits(bits)
    if not bits:
        return
    try:
        layers = [one for one in weight_noise(program, bits=(8,), granularities=("tensor",)) if one.kind in WEIGHTED]
    except NothingToDo:
        return
    for one in layers:
        for b in sorted(set(bits), reverse=True):
            yield Damage(kind="bits", name=one.name, kept=b, of=32), int("transpose" in one.kind)


def _all_units(units: Sequence[tuple[Damage, Point]], amounts: Sequence[float]) -> Iterator[Job]:
    """Of each amount every space that has a point for it."""
    for amount in sorted(set(amounts), reverse=True):
        nearest: dict[str, tuple[Damage, Point]] = {}
        for damage, point in units:
            away = abs(damage.kept / damage.of - amount)
            if away > min(abs(damage.kept / damage.of - a) for a in amounts):  # it stands for another one
                continue
            there = nearest.get(damage.name)
            if there is None or away < abs(there[0].kept / there[0].of - amount):
                nearest[damage.name] = (damage, point)
        yield from _at_once("all units", round(1000 * amount), 1000, [*nearest.values()])


def _all_bits(layers: Sequence[tuple[Damage, int]]) -> Iterator[Job]:
    for bits in sorted({damage.kept for damage, _ in layers}, reverse=True):
        yield from _at_once("all bits", bits, 32, [one for one in layers if one[0].kept == bits])


def _at_once(
    kind: Literal["all units", "all bits"], kept: int, of: int, parts: Sequence[tuple[Damage, Any]]
) -> Iterator[Job]:
    if len(parts) > 1:
        which = hashlib.sha256(repr([(d.name, d.kept) for d, _ in parts]).encode()).hexdigest()[:8]
        yield Damage(kind=kind, name=f"{len(parts)} #{which}", kept=kept, of=of), tuple(parts)


def _measured(copy: Copy, scores: Scores, probe: Probe, damage: Damage, point: What) -> Hurt:
    """The damage done, looked at, and undone; a point without a number says why."""
    try:
        with torch.no_grad(), _done(copy, scores, damage, point) as module:
            seen = probe.of(module)
            return Hurt(damage=damage, seen=seen, why=seen.why)
    except KeyboardInterrupt as error:
        msg = f"measuring was stopped at {damage.name}. The same command goes on from its journal."
        raise Interrupted(msg) from error
    except MissingError:
        raise
    except Exception as error:  # whatever the user's metric raises on a damaged model
        return Hurt(damage=damage, seen=None, why=in_a_line(error))


def _done(copy: Copy, scores: Scores, damage: Damage, point: What) -> AbstractContextManager[nn.Module]:
    if isinstance(point, tuple):
        units = {p.name: stays_of(p, scores, copy) for _, p in point if isinstance(p, Point)}
        return copy.without_all(units) if units else _all_rounded(copy, scores, point)
    if isinstance(point, Point):
        return copy.without(point.name, stays_of(point, scores, copy))
    return copy.rounded(damage.name, rounded_weight(copy.weight(damage.name), damage.kept, point))


@contextmanager
def _all_rounded(copy: Copy, scores: Scores, parts: Sequence[tuple[Damage, Point | int]]) -> Iterator[nn.Module]:
    """All of them at once, undone in the reverse order."""
    with ExitStack() as stack:
        for damage, bits in parts:
            stack.enter_context(_done(copy, scores, damage, bits))
        yield copy.module


def rounded_weight(weight: Tensor, bits: int, axis: int = 0) -> Tensor:
    """The weight after rounding to so many bits with a scale per index of `axis`, as `quantize` stores it; float32.

    Batch norm that is folded later scales whole channels, so that the codes are the same. Raises MissingError (torchao).

    >>> w = torch.tensor([[0.5, -1.27], [0.1, 0.254]])
    >>> rounded_weight(w, 8)
    tensor([[ 0.5000, -1.2700],
            [ 0.1000,  0.2540]])
    """
    try:
        with quiet("torchao"):
            from paredown.quantize.observe import PerChannel
    except ImportError as error:
        msg = "rounding must have torchao. It is not installed. Run: pip install 'paredown[quant]', or measure no bits."
        raise MissingError(msg) from error
    low, high = weight_range(bits, levels_at(bits))
    observer = PerChannel(
        dtype=torch.int8, qscheme=torch.per_channel_symmetric, ch_axis=axis, quant_min=low, quant_max=high,
        levels=levels_at(bits),
    )  # fmt: skip
    values = weight.detach().float()
    observer(values)
    return fake_quantize(values, observer)


# ------------------------------------------------------------------------------------------------------------- journal


def record_of(hurt: Hurt, key: str, metric_unit: str, distance: str, num_samples: int) -> Record:
    """One point as a record: figures with their badges, group means in the details."""
    seen = hurt.seen
    shared: dict[str, Any] = {"n": num_samples, "protocol": "one space or layer alone, the others dense, held-out data"}
    metric, moved = (None, None) if seen is None else (seen.metric, seen.distance)
    return Record(
        cell={"stage": "sensitivity-point", "key": key, **dataclasses.asdict(hurt.damage)},
        measured={
            "metric_loss": Measured(value=metric, unit=metric_unit, badge=_badge(metric), **shared),
            "distance": Measured(value=moved, unit=distance, badge=_badge(moved), **shared),
        },
        details={
            **({"why": hurt.why} if hurt.why else {}),
            **({} if seen is None else {"metric": list(seen.metric_groups), "distance": list(seen.distance_groups)}),
        },
    )


def _badge(value: float | None) -> Literal["measured", "not tested"]:
    return "not tested" if value is None else "measured"


def _keep(journal: Path, key: str, hurt: Hurt, probe: Probe) -> None:
    journal.parent.mkdir(parents=True, exist_ok=True)
    append(journal, record_of(hurt, key, probe.metric_unit, UNITS[probe.distance], probe.num_samples))


def _known(journal: Path | None, key: str) -> dict[Damage, Hurt]:
    """Points with all their numbers in the journal."""
    if journal is None:
        return {}
    mend(journal)
    found: dict[Damage, Hurt] = {}
    for record in read_whole_lines(journal):
        moved = record.measured.get("distance")
        if record.cell.get("key") != key or moved is None or moved.value is None or record.details.get("why"):
            continue
        damage = Damage(**{f.name: record.cell[f.name] for f in dataclasses.fields(Damage)})
        seen = Seen(
            metric=record.measured["metric_loss"].value,
            distance=float(moved.value),
            metric_groups=tuple(record.details["metric"]),
            distance_groups=tuple(record.details["distance"]),
        )
        found[damage] = Hurt(damage=damage, seen=seen)
    return found
