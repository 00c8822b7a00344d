"""Sensitivity and Latency: what measuring said about every layer, as nouns that an allocation reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paredown.allocate.latency import LayerLatency
from paredown.errors import UsageError, must_be
from paredown.records import Badge

Floats = NDArray[np.float64]
Table = Mapping[str, Mapping[int | float, float | None]]
"""Space or parameter → {what is kept, a count or a fraction: how much worse the model gets}."""
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """How much worse the model gets when one space (or one weight) alone keeps less.

    >>> seen = Sensitivity.from_table({"a": {0.5: 0.2, 0.25: 0.1}}, {"a": 8})
    >>> seen.at("a", [2, 3, 4, 6, 8]).tolist()  # a smaller part never counts as better than a larger one
    [0.2, 0.2, 0.2, 0.1, 0.0]
    """

    increase: Mapping[str, Mapping[int, float | None]]
    """Space or parameter → {units (of a weight: elements) kept: how much worse}; None where measuring failed."""
    of: Mapping[str, int]
    """Space or parameter → all of its units or elements, at which the increase is 0."""
    unit: str = "loss"
    """Of the increase; higher is worse, also for a metric that is better when higher."""
    dense: float | None = None
    """The value of the model as it is."""
    granularity: str = "channel"
    num_samples: int = 0
    badge: Badge = "measured"
    missing: Mapping[str, str] = field(default_factory=dict)
    """"name @ kept" → why there is no number."""
    made_by: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_table(cls, table: Table, of: Mapping[str, int], *, unit: str = "loss", **fields: Any) -> Sensitivity:
        """From one's own numbers: integers are counts, fractions in (0, 1] shares of `of`. Raises UsageError."""
        must_be("sensitivity", table, Mapping, fix="Give {name: {kept: increase}}.")
        increase: dict[str, dict[int, float | None]] = {}
        for name, points in table.items():
            must_be(f"sensitivity[{name!r}]", points, Mapping, fix="Give {kept: increase}, kept a count or a fraction.")
            if name not in of:
                msg = f"a table of sensitivities must name what can be pruned. Got {name!r}; known are {', '.join(list(of)[:5])}…."
                raise UsageError(msg)
            mine = increase.setdefault(name, {})
            for kept, worse in points.items():
                mine[_count(kept, of[name], name)] = _number(worse, name)
        return cls(increase=increase, of={n: int(of[n]) for n in increase}, unit=unit, **fields)

    def curve(self, name: str) -> tuple[Floats, Floats]:
        """Counts kept, ascending, and the increase at each: never negative, never falling as less is kept.

        What one batch of noise calls an improvement is no reason to remove more. Missing points are left out.
        """
        points = {k: v for k, v in self.increase.get(name, {}).items() if v is not None and k < self.of[name]}
        kept = np.array([*sorted(points), self.of.get(name, 0)], dtype=np.float64)
        worse = np.array([*(points[int(k)] for k in kept[:-1]), 0.0], dtype=np.float64)
        return kept, np.maximum.accumulate(np.maximum(worse, 0.0)[::-1])[::-1]

    def at(self, name: str, kept: ArrayLike) -> Floats:
        """The increase at any count, on straight lines between measured ones; infinite below the least measured."""
        counts, worse = self.curve(name)
        wanted = np.asarray(kept, dtype=np.float64)
        return np.where(wanted < counts[0], np.inf, np.interp(wanted, counts, worse))

    def to_json(self) -> str:
        """One JSON document; counts are texts there."""
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "increase": {n: {str(k): v for k, v in sorted(p.items())} for n, p in self.increase.items()},
            **{n: getattr(self, n) for n in ("unit", "dense", "granularity", "num_samples", "badge")},
            **{n: dict(getattr(self, n)) for n in ("of", "missing", "made_by")},
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """The inverse of to_json. Raises UsageError where the text is something else."""
        try:
            data = json.loads(text)
            if data.pop("schema") != SCHEMA:
                raise ValueError("another schema")  # noqa: EM101
            data["increase"] = {n: {int(k): v for k, v in p.items()} for n, p in data["increase"].items()}
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            msg = f"a table of sensitivities must be the JSON that Sensitivity.to_json writes. Got {text[:60]!r} ({error})."
            raise UsageError(msg) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds that the layers of each space take by the units it keeps; added up, with what no space changes.

    The count of all units must be among the points. Between points it is straight; below the least one nothing is
    assumed to get faster. The sum is *estimated* even where its parts are measured: layers share caches and threads.
    """

    by_space: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    rest_ms: float = 0.0
    layers: tuple[LayerLatency, ...] = ()
    """Tables of layers, by the channels that they write and read: two spaces meet in one layer."""
    scale: float = 1.0
    """What the layers' sum is multiplied by: what files of this network said (search.latency_model)."""

    @property
    def shrinks(self) -> bool:
        """Whether a table says what fewer units take."""
        return bool(self.by_space) or any(layer.writes.per or layer.reads.per for layer in self.layers)

    def total(self, units: Mapping[str, int], kept: Mapping[str, NDArray[np.int64] | Floats]) -> Floats:
        """Milliseconds of all for the counts that each space keeps, of any one shape."""
        parts = [np.asarray(self.of(name, kept[name])) for name in self.by_space]
        parts += [self.scale * layer.of(units, kept) for layer in self.layers]
        return np.asarray(sum(parts, np.asarray(self.rest_ms)))

    def of(self, name: str, kept: ArrayLike) -> Floats:
        """Milliseconds of one space at any counts."""
        points = sorted(self.by_space[name].items())
        counts, ms = np.array([p[0] for p in points], dtype=np.float64), np.array([p[1] for p in points])
        return np.asarray(np.interp(np.asarray(kept, dtype=np.float64), counts, ms))

    def check(self, units: Mapping[str, int]) -> None:
        """Raises UsageError for unknown spaces, a missing dense point, or times that are no numbers ≥ 0."""
        for name, points in self.by_space.items():
            must_be(f"latency[{name!r}]", points, Mapping, fix="Give {kept units: ms}.")
            if name not in units:
                msg = f"a latency table must name spaces of the coupling. Got {name!r}; known are {', '.join(list(units)[:5])}…."
                raise UsageError(msg)
            if units[name] not in points:
                msg = f"a latency table must hold the dense point, {units[name]} units of {name}. Got {sorted(points)}."
                raise UsageError(msg)
            bad = [v for v in (*points.values(), self.rest_ms) if not math.isfinite(v) or v < 0]
            if bad:
                msg = f"milliseconds must be numbers ≥ 0. Got {bad[0]} for {name}."
                raise UsageError(msg)
        for layer in self.layers:
            unknown = [n for n in (*layer.writes.per, *layer.reads.per) if n not in units]
            if unknown:
                msg = f"a latency table must name spaces of the coupling. Got {unknown[0]!r} in the layer {layer.name}."
                raise UsageError(msg)


def _count(kept: object, of: int, name: str) -> int:
    if isinstance(kept, float) and 0 < kept <= 1:
        return max(1, math.floor(kept * of + 0.5))
    if isinstance(kept, int) and not isinstance(kept, bool) and 1 <= kept <= of:
        return kept
    msg = f"what a space keeps must be a count in 1 … {of} or a fraction in (0, 1]. Got {kept!r} for {name}."
    raise UsageError(msg)


def _number(worse: object, name: str) -> float | None:
    if worse is None:
        return None
    if isinstance(worse, bool) or not isinstance(worse, int | float) or not math.isfinite(worse):
        msg = f"an increase must be a finite number, or None where it is not known. Got {worse!r} for {name}."
        raise UsageError(msg)
    return float(worse)
