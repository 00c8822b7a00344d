"""paredown couple: which channels must leave together, and which may not leave and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paredown.cli import options
from paredown.cli.show import emit, only_document, show, table
from paredown.cli.sources import loaded

if TYPE_CHECKING:
    from paredown.couple import Coupling


def couple(
    model: options.Model,
    /,
    *,
    input: options.Input,
    weights: options.Weights = None,
    strip_prefix: options.StripPrefix = None,
    pruned: options.From = None,
    threads: options.Threads = None,
    device: options.Device = None,
    strict: options.Strict = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Which channels must live or die together, which are pinned and why, and the ops without a rule."""
    with only_document(json):
        import paredown

        found = loaded(
            model, input, weights=weights, strip_prefix=strip_prefix, pruned=pruned, threads=threads, device=device
        )
        coupling = paredown.couple(found.program, strict=strict)
    if json:
        emit(document(coupling))
    else:
        show(*_tables(coupling), *(f"note: {n}" for n in found.program.notes), quiet=quiet)
    return 0


def document(coupling: Coupling) -> dict[str, Any]:
    """`couple --json`."""
    return {
        "schema": 1,
        "spaces": len(coupling.spaces),
        "free_units": coupling.free_units,
        "pinned_units": coupling.pinned_units,
        "pinned": [{"reason": p.reason, "units": p.units, "where": p.where} for p in coupling.pinned],
        "unknown_ops": dict(coupling.unknown_ops),
        "seconds": coupling.seconds,
    }


def _tables(coupling: Coupling) -> list[Any]:
    spaces = [(s.name, s.kind, len(s), len({f.parameter for f in s.footprints})) for s in coupling.spaces]
    pinned = [(p.reason, p.where, p.units) for p in coupling.pinned]
    tables: list[Any] = []
    if spaces:
        tables.append(table(("space", "unit", "units", "parameters"), spaces, left=2))
    if pinned:
        tables.append(table(("pinned because", "at", "units"), pinned, left=2))
    unknown = ", ".join(f"{count} {op}" for op, count in coupling.unknown_ops.items())
    tables.append(
        f"{coupling.free_units} units in {len(coupling.spaces)} spaces may be removed, {coupling.pinned_units} may not; "
        f"ops without a rule: {unknown or 'none'}; {coupling.seconds:.2f} s."
    )
    return tables
