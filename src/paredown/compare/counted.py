"""Sizes and counts of two files, which need no statistics: any difference is one."""

from __future__ import annotations

from collections.abc import Mapping

from paredown.compare.nouns import COUNTED, Difference
from paredown.records import Measured
from paredown.report.wording import whole

Figures = Mapping[str, Measured]


def counted(first: tuple[str, Figures], second: tuple[str, Figures], protocol: str) -> list[Difference]:
    """One difference for every figure of COUNTED that both (name, figures) have and that nobody estimated; fewer is better."""
    (a, mine), (b, theirs) = first, second
    found = []
    for key, word in COUNTED.items():
        x, y = mine[key], theirs[key]
        if x.value is None or y.value is None or "estimated" in (x.badge, y.badge):
            continue
        change = Measured(value=y.value - x.value, unit=x.unit, protocol=protocol)
        better = None if x.value == y.value else b if y.value < x.value else a
        said = f"{b} has {whole(abs(y.value - x.value))} {word} {'fewer' if y.value < x.value else 'more'} than {a}"
        said = said if better else f"{b} has as many {word} as {a}"
        found.append(Difference(what=key, first=a, second=b, change=change, better=better, said=said))
    return found
