"""Patterns: which weights, modules and spaces a text like "layer4.*" means. A pattern that matches nothing is an error."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from paredown.couple.space import Coupling
from paredown.errors import UsageError
from paredown.examine.cost import Cost
from paredown.examine.walk import examine
from paredown.program import Program


def as_patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    """Patterns as they are given: a text is one, not its letters.

    >>> as_patterns("12"), as_patterns(["head.*", "stem"])
    (('12',), ('head.*', 'stem'))
    """
    return (given,) if isinstance(given, str) else tuple(given)


def maskable(program: Program, coupling: Coupling, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Weights of layers: floating point, at least two axes, and MACs proportional to them; tied ones once."""
    cost = examine(program)
    names = dict.fromkeys(w for node in cost.by_node if node.macs for w in node.weights)
    found = [
        n
        for n in names
        if program.state[n].dim() >= 2 and program.state[n].is_floating_point() and program.state[n].numel()
    ]
    if include or exclude:
        left = set(protected_weights(coupling, cost, found, include, exclude))
        found = [n for n in found if n not in left]
    if not found:
        msg = "a model must have weights to mask: of linear layers or convolutions, and not excluded. Got none."
        raise UsageError(msg)
    return found


def protected_weights(
    coupling: Coupling, cost: Cost, names: Iterable[str], include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """Which of these parameters the same patterns protect; a space's name stands for all that writes its channels."""
    include, exclude = as_patterns(include), as_patterns(exclude)
    check_patterns(coupling, cost, (*include, *exclude))
    spaces = spaces_of(coupling)
    return [
        name
        for name in names
        if (include and not matches(names_of_weight(name, spaces), include))
        or matches(names_of_weight(name, spaces), exclude)
    ]


def check_patterns(coupling: Coupling, cost: Cost, patterns: Sequence[str]) -> None:
    """Raises UsageError for a pattern that matches nothing in the model, with what was probably meant."""
    known = _known(coupling, cost)
    for pattern in as_patterns(patterns):
        if not isinstance(pattern, str) or not any(fnmatch.fnmatchcase(n, pattern) for n in known):
            near = difflib.get_close_matches(str(pattern), known, n=3, cutoff=0.4)
            hint = f" Did you mean {', '.join(repr(n) for n in near)}?" if near else ""
            msg = f"a pattern must match a parameter, module or space. Got {pattern!r}, which matches nothing.{hint}"
            raise UsageError(msg)


def spaces_of(coupling: Coupling) -> dict[str, set[str]]:
    """Parameter → names of the spaces whose channels it writes."""
    found: dict[str, set[str]] = {}
    for space in coupling.spaces:
        for f in space.footprints:
            if f.role == "write":
                found.setdefault(f.parameter, set()).add(space.name)
    return found


def names_of_weight(name: str, spaces: Mapping[str, set[str]]) -> set[str]:
    """All that a pattern can call a weight by."""
    return {name} | parents(name) | spaces.get(name, set())


def matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether any pattern (fnmatch) matches any name."""
    wanted = as_patterns(patterns)
    return any(fnmatch.fnmatchcase(n, p) for n in names for p in wanted)


def _known(coupling: Coupling, cost: Cost) -> list[str]:
    found = {s.name for s in coupling.spaces} | set(cost.parameter_shapes) | set(cost.buffer_shapes)
    for name in (*cost.parameter_shapes, *cost.buffer_shapes):
        found |= parents(name)
    return sorted(found)


def parents(name: str) -> set[str]:
    """The modules that hold a parameter, down to the root.

    >>> sorted(parents("a.b.weight"))
    ['a', 'a.b']
    """
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}
