"""What a page of the book is made of: plain data that goes to JSON and comes back, and is drawn by book.html."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from paredown.curve import interval
from paredown.records import Measured

T = TypeVar("T")
Mark = Literal["", "talk", "counted", "measured", "estimated", "not tested"]
"""Where a number comes from. counted: exact, from the graph, the weights or the arithmetic itself; nothing was run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much to do, and where."""

    quick: bool
    folder: Path
    """For files and checkpoints of the page that is built; gone once it is done."""
    shared: Path
    """For the networks that several pages share."""
    data: Path | None = None
    """Folder with cifar10.npz and resnet20_cifar10.safetensors; used where `quick` is off."""
    newborn: Path | None = None
    """Folder of `paredown curve examples/newborn/curve.yaml`."""

    def pick(self, quick: T, full: T) -> T:
        """One of two amounts of work."""
        return quick if self.quick else full

    @property
    def seeds(self) -> range:
        """Of every experiment that trains."""
        return range(self.pick(2, 5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A number with its interval."""

    value: float
    low: float | None
    high: float | None


Cell = str | int | float | Spread | None
"""None is shown as "not tested"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """The head of a column: where its numbers come from, and how they are written."""

    title: str
    mark: Mark = ""
    form: str = ""
    """A format as ".2f"; without one, integers are grouped and others have three digits."""
    bar: bool = False
    """A bar beside each number, as long as its share of the largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under heads."""

    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[Sequence[Cell]]
    kind: str = "table"

    def __post_init__(self) -> None:
        wrong = [r for r in self.rows if len(r) != len(self.columns)]
        if wrong:
            msg = f"every row must have {len(self.columns)} cells. Got {len(wrong[0])} in {list(wrong[0])[:3]}."
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture: SVG in the page (`markup`), or as an image of its own (`source`)."""

    caption: str
    mark: Mark
    alt: str
    markup: str = ""
    source: str = ""
    legend: Sequence[tuple[str, str]] = ()
    """(sign as SVG, name) of every line."""
    wide: bool = False
    kind: str = "figure"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A paragraph; `**strong**`, `*emphasis*` and backquotes are understood."""

    text: str
    kind: str = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """A line of mathematics, as it is."""

    text: str
    kind: str = "formula"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """Between parts of a long page."""

    text: str
    kind: str = "heading"


Part = Table | Figure | Text | Formula | Heading


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One subject of the talk."""

    title: str
    told: tuple[str, ...]
    """What the talk said."""
    parts: tuple[Part, ...]
    """What we measured."""
    differ: tuple[str, ...]
    """Why the two differ, or that they do not."""
    not_tested: tuple[str, ...] = ()
    shortened: str = ""
    """What --quick left out."""


def plain(page: Page) -> dict[str, Any]:
    """As JSON has it."""
    return dataclasses.asdict(page)


def over_seeds(values: Sequence[float]) -> Spread:
    """Mean of the seeds with its 95 % interval (see paredown.curve); none with one seed."""
    found = interval(list(values))
    return Spread(value=found.mean, low=found.low, high=found.high)


def spread(measured: Measured) -> Spread | None:
    """A figure that paredown measured."""
    return None if measured.value is None else Spread(value=measured.value, low=measured.low, high=measured.high)
