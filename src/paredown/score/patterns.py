"""Patterns: which weights, modules and spaces a text like "layer4.*" means. A pattern that matches nothing is an error."""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Iterable, Mapping, Sequence

from paredown.couple.space import Coupling
from paredown.couple.trace import op_name
from paredown.errors import UsageError
from paredown.examine.cost import Cost
from paredown.examine.walk import examine
from paredown.granularity import Granularity
from paredown.program import Program, placeholder_names
from paredown.statistics.uses import CONVOLUTIONS, find_uses

_OUTPUTS_FIRST = frozenset(("linear", "embedding", *CONVOLUTIONS))
"""Ops that read a parameter as it is as [out, in, …], or that are no layer: what only they read needs no second look."""


def as_patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    """Patterns as they are given: a text is one, not its letters.

    >>> as_patterns("12"), as_patterns(["head.*", "stem"])
    (('12',), ('head.*', 'stem'))
    """
    return (given,) if isinstance(given, str) else tuple(given)


def maskable(
    program: Program,
    coupling: Coupling,
    include: Sequence[str],
    exclude: Sequence[str],
    cut: Granularity | None = None,
) -> list[str]:
    """Weights of layers: floating point, at least two axes, and MACs proportional to them; tied ones once.

    With `cut` only those whose cells are what it says (`cut_as_said`).
    """
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
    return found if cut is None else cut_as_said(program, found, cut)


def cut_as_said(program: Program, names: Sequence[str], cut: Granularity) -> list[str]:
    """Without the weights stored [in, out, …] that this granularity would cut across, which a warning names.

    Raises UsageError where none is left.
    """
    if cut.kind in ("element", "kernel"):  # also there what they are called: nothing to look for
        return list(names)
    flipped = stored_in_out(program, names)
    across = [n for n in names if n in flipped and not cut.serves_flipped(tuple(program.state[n].shape))]
    if not across:
        return list(names)
    listed = ", ".join(across[:5]) + (f" and {len(across) - 5} more" if len(across) > 5 else "")
    if len(across) == len(names):
        msg = (
            f"granularity {cut} must be used with weights stored [out, in, …]. Got only weights stored [in, out, …], "
            f"along which it has no meaning: {listed}. Use element, kernel or channel."
        )
        raise UsageError(msg)
    warnings.warn(
        f"left out: stored [in, out, …], along which {cut} has no meaning: {listed}.", UserWarning, stacklevel=3
    )
    return [n for n in names if n not in across]


def stored_in_out(program: Program, names: Iterable[str]) -> dict[str, int]:
    """Weights stored with their inputs along axis 0, with the number of their groups: transposed convolutions, `x @ W`.

    All uses must agree; what no layer reads, or is read both ways, counts as stored [out, in, …].
    """
    graph, places = program.eval_graph.graph_module.graph, placeholder_names(program.eval_graph)
    read_otherwise = {
        id(program.state[places[node.name]])
        for node in graph.nodes
        if node.op == "placeholder"
        and node.name in places
        and any(op_name(user) not in _OUTPUTS_FIRST for user in node.users)
    }
    # find_uses holds an index for each element, so only where the ops do not say it already.
    uses = find_uses(program, [n for n in names if id(program.state[n]) in read_otherwise])
    return {n: max(u.groups for u in each) for n, each in uses.items() if each and all(u.flipped for u in each)}


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
