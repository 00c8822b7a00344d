"""Bits per layer for which an exported file holds a limit of bytes: solved exactly, weighed, and solved anew by what it weighed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paredown.allocate.knapsack import knapsack
from paredown.errors import InfeasibleError, NothingToDo
from paredown.export import export
from paredown.pipeline.verdict import counted
from paredown.program import Program
from paredown.prune import Pruned
from paredown.quantize import quantize
from paredown.quantize.culprits import named_layers, some
from paredown.quantize.mixed import SCALE_BYTES, Errors, Width, lacking, measured_widths
from paredown.quantize.rounding import METHODS
from paredown.quantize.static import calibrated

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
        return self.overhead + float_bytes(thing, coded) - self.float_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighing:
    """How files are made while they are only weighed."""

    options: Mapping[str, Any]
    """Of `quantize`, without `repair`."""
    repair: Sequence[str]
    """How codes of few bits are rounded: one of `METHODS` is among them (see `with_rounding`)."""
    path: Path
    """Of the file, which goes when it is weighed."""
    say: Callable[[str], None]
    known: Errors | None = None
    """What each layer costs at each width, where somebody measured it; else it is measured."""
    fix: str = "Lower budget.bits or prune.floor, or ask for more."
    """What to do where nothing fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """The widths of least summed error within a limit."""

    bits: dict[str, int]
    size_bytes: int


class TooLarge(NothingToDo):
    """Even the narrowest widths do not fit; `least` is what their codes take, bytes."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


def with_rounding(repair: Sequence[str]) -> list[str]:
    """The repairs, with one that chooses codes by what they do to the output.

    >>> with_rounding(["equalize"]), with_rounding(["adaround"])
    (['equalize', 'gptq'], ['adaround'])
    """
    return [*repair] if any(r in METHODS for r in repair) else [*repair, "gptq"]


def weighed(
    thing: Program | Pruned, options: Mapping[str, Any], path: Path, limit: float, widths: Sequence[int]
) -> tuple[int, Shrinking]:
    """Bytes of the file with 8 bits everywhere, and what of it is not codes; the file stays at `path`."""
    quantized = quantize(thing, **options)
    size = export(quantized, path, target=options["target"]).size_bytes
    coded = sum(p.codes.numel() + SCALE_BYTES * len(p.codes) for p in quantized.weights.values())
    return size, Shrinking(
        limit=limit, overhead=float(size - coded), widths=tuple(widths), float_bytes=float_bytes(thing, quantized.weights)
    )  # fmt: skip


def widths_of(
    thing: Program | Pruned,
    options: Mapping[str, Any],
    repair: Sequence[str],
    widths: Sequence[int],
    known: Errors | None = None,
) -> list[list[Width]]:
    """What every layer costs and loses at every width, by what is `known` of it where that is all that is needed."""
    base = calibrated(thing, **options, repair=repair)
    rounding = next(r for r in repair if r in METHODS)
    wide = sorted(set(widths), reverse=True)
    known = known if known is not None and not lacking(named_layers(base), wide, known) else None
    found = [
        dataclasses.replace(w, size_bytes=w.size_bytes + unpacking_bytes(w.bits))
        for w in measured_widths(base, some(options["calibrate"]), wide, rounding, known)
    ]
    return [[w for w in found if w.layer == name] for name in dict.fromkeys(w.layer for w in found)]


def unpacking_bytes(bits: int) -> int:
    """What a file takes for the ops that unpack a weight of so many bits (see export.onnx_packed), about.

    >>> unpacking_bytes(8), unpacking_bytes(4) > 0
    (0, True)
    """
    from paredown.export.onnx_packed import PLANES, WORTH_BYTES

    return WORTH_BYTES * len(PLANES[bits]) if bits < 8 else 0


def solved(groups: Sequence[Sequence[Width]], limit: int) -> Solved:
    """One width of each group, of least summed error within so many bytes. Raises TooLarge."""
    found = knapsack([[w.size_bytes for w in g] for g in groups], [[w.error for w in g] for g in groups], limit)
    if found is None:
        least = sum(min(w.size_bytes for w in g) for g in groups)
        msg = f"codes of the narrowest widths must fit {limit:,} B. Got {least:,} B"
        raise TooLarge(msg, least)
    chosen = [g[o] for g, o in zip(groups, found.chosen, strict=True)]
    return Solved(bits={w.layer: w.bits for w in chosen}, size_bytes=sum(w.size_bytes for w in chosen))


def float_bytes(thing: Program | Pruned, coded: Iterable[str]) -> int:
    """Of all matrices that get no codes."""
    names = set(coded)
    return sum(4 * p.numel() for n, p in thing.module.named_parameters() if p.dim() > 1 and n not in names)


def fitted_bits(thing: Program | Pruned, shrinking: Shrinking, how: Weighing) -> dict[str, int]:
    """Bits per layer for which the exported file holds the limit: solved, exported, weighed, and solved anew by what it weighed.

    Raises InfeasibleError where the narrowest widths are too large.
    """
    groups = widths_of(thing, how.options, how.repair, shrinking.widths, how.known)
    overhead = shrinking.overhead_of(thing, (g[0].layer for g in groups))
    codes = max(1, int(shrinking.limit - overhead))
    best: Solved | None = None
    tried: dict[str, int] = {}
    for _ in range(_ROUNDS):
        try:
            spread = solved(groups, codes)
        except TooLarge as error:  # by what is estimated; at the end the file of the narrowest says it
            if best is not None:
                break
            spread = solved(groups, error.least)
        if repr(spread.bits) in tried:
            break
        made = _weight(thing, spread.bits, how.options, how.path)
        tried[repr(spread.bits)] = made
        how.say(f"budget: {made:,} B with {in_words(spread.bits)}, asked {shrinking.limit:,.0f} B")
        room = shrinking.limit - made
        if room < 0:  # never the same choice again
            codes = min(codes + math.floor(room), spread.size_bytes - 1)
            continue
        best = spread
        if made >= NEAR * shrinking.limit:
            break
        codes = spread.size_bytes + math.floor(0.9 * room)
    how.path.unlink(missing_ok=True)
    if best is None:
        msg = f"size_bytes must be reachable: {shrinking.limit:,.0f}. Got {min(tried.values()):,} B in the smallest of {len(tried)} files."
        raise InfeasibleError(msg, nearest=counted(thing.plan if isinstance(thing, Pruned) else None), advice=how.fix)
    return best.bits


def narrowest_bytes(
    thing: Program | Pruned, groups: Sequence[Sequence[Width]], options: Mapping[str, Any], path: Path
) -> int:
    """Bytes of the file with the fewest bits of every layer: what can be reached at all, weighed; the file goes again."""
    size = _weight(thing, {g[0].layer: min(g, key=lambda w: w.size_bytes).bits for g in groups}, options, path)
    path.unlink()
    return size


def _weight(thing: Program | Pruned, bits: Mapping[str, int], options: Mapping[str, Any], path: Path) -> int:
    """Bytes of the file with these widths."""
    return export(quantize(thing, **options, bits=bits), path, target=options["target"]).size_bytes


def in_words(bits: Mapping[str, int]) -> str:
    """How many layers have how many bits.

    >>> in_words({"a": 8, "b": 4, "c": 4})
    '1 × 8 bits, 2 × 4 bits'
    """
    counts = {b: sum(v == b for v in bits.values()) for b in sorted(set(bits.values()), reverse=True)}
    return ", ".join(f"{n} × {b} bits" for b, n in counts.items())
