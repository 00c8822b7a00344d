"""What a criterion means, in the words of its own module: they are read as text, since the modules load torch and a report does not."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path


def explained(labels: Iterable[str]) -> list[tuple[str, str]]:
    """(criterion, what it is) of all criteria that the labels of methods name, in their order; others are left out.

    >>> explained(["l2", "l2, global", "somebody's own"])
    [('l2', 'sum of squared weights, the squared Euclidean norm.')]
    """
    known = _known()
    named = dict.fromkeys(part.strip() for label in labels for part in label.split(","))
    return [(name, known[name]) for name in named if name in known]


@functools.cache
def _known() -> Mapping[str, str]:
    """Criterion to the rest of its module's first line: "l1: …", "apoz and mean_activation: …"."""
    found: dict[str, str] = {}
    for path in sorted((Path(__file__).parent.parent / "score").glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        names, _, rest = said.partition("\n")[0].partition(": ")
        found |= {name: rest for name in names.split(" and ") if rest and name == name.lower()}
    return found
