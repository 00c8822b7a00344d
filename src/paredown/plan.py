"""Plan: all policy as data. What is kept, by parameter name, axis and original index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from paredown.errors import UsageError

Keep = Mapping[str, Mapping[int, tuple[int, ...]]]

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is kept of a model; JSON, with a digest; says nothing about how it is done.

    `keep` is {parameter: {axis: kept indices of the *original*, ascending}}; a parameter or axis that is not
    named is kept whole. `made_by` says how the plan came about (criterion, budget, seed): it is provenance and
    belongs to the digest. `parent_digest` is the plan that this one continues (see `then`).

    >>> plan = Plan(keep={"conv.weight": {0: (0, 2)}}, made_by={"criterion": "l1"})
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    keep: Keep
    drop_modules: tuple[str, ...] = ()
    masks: Mapping[str, str] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    schemes: Mapping[str, str] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)
    parent_digest: str | None = None

    def __post_init__(self) -> None:
        keep = {
            name: {int(axis): tuple(int(i) for i in kept) for axis, kept in sorted(axes.items())}
            for name, axes in sorted(self.keep.items())
        }
        for name, axes in keep.items():
            for axis, kept in axes.items():
                if any(b <= a for a, b in pairwise(kept)) or (kept and kept[0] < 0):
                    msg = f"kept indices must be ascending and ≥ 0. Got {kept[:8]}… for {name} axis {axis}."
                    raise UsageError(msg)
                if not kept:
                    msg = f"a plan must keep at least one index of every axis. Got none for {name} axis {axis}."
                    raise UsageError(msg)
        object.__setattr__(self, "keep", keep)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hexadecimal digits."""
        return hashlib.sha256(self._canonical().encode()).hexdigest()

    def then(self, later: Plan) -> Plan:
        """Both plans as one over the original indices; `later` is in the indices of this plan's result.

        >>> first = Plan(keep={"w": {0: (1, 3, 5)}})
        >>> first.then(Plan(keep={"w": {0: (0, 2)}})).keep
        {'w': {0: (1, 5)}}
        """
        keep: dict[str, dict[int, tuple[int, ...]]] = {n: dict(a) for n, a in self.keep.items()}
        for name, axes in later.keep.items():
            for axis, kept in axes.items():
                mine = keep.setdefault(name, {}).get(axis)
                if mine is not None and kept[-1] >= len(mine):
                    msg = f"the later plan must index what the first one kept ({len(mine)} of {name} axis {axis}). Got index {kept[-1]}."
                    raise UsageError(msg)
                keep[name][axis] = kept if mine is None else tuple(mine[i] for i in kept)
        return Plan(
            keep=keep,
            drop_modules=self.drop_modules + later.drop_modules,
            masks={**self.masks, **later.masks},
            ranks={**self.ranks, **later.ranks},
            schemes={**self.schemes, **later.schemes},
            made_by={"levels": [*_levels(self.made_by), *_levels(later.made_by)]},
            parent_digest=self.digest,
        )

    def to_json(self) -> str:
        """The plan as JSON text, with schema number and digest."""
        return json.dumps({"schema": SCHEMA, "digest": self.digest, **self._fields()}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; raises UsageError where the schema is newer or the digest does not fit its content."""
        try:
            data = json.loads(text)
            schema, digest = data.pop("schema"), data.pop("digest")
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            msg = f"a plan must be a JSON object with 'schema' and 'digest'. Got {text[:60]!r}."
            raise UsageError(msg) from error
        if schema != SCHEMA:
            msg = f"plan schema must be {SCHEMA}. Got {schema!r}. A newer file needs a newer paredown."
            raise UsageError(msg)
        try:
            data["keep"] = {n: {int(a): tuple(k) for a, k in axes.items()} for n, axes in data["keep"].items()}
            plan = cls(**{**data, "drop_modules": tuple(data.get("drop_modules", ()))})
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            msg = f"a plan's fields must be those of paredown.Plan: {error}"
            raise UsageError(msg) from error
        if plan.digest != digest:
            msg = f"a plan's digest must fit its content. Got {digest!r}, the content has {plan.digest!r}: the file was edited or damaged."
            raise UsageError(msg)
        return plan

    def _fields(self) -> dict[str, Any]:
        return {
            "keep": {n: {str(a): list(k) for a, k in axes.items()} for n, axes in self.keep.items()},
            "drop_modules": list(self.drop_modules),
            "masks": dict(self.masks),
            "ranks": dict(self.ranks),
            "schemes": dict(self.schemes),
            "made_by": dict(self.made_by),
            "parent_digest": self.parent_digest,
        }

    def _canonical(self) -> str:
        return json.dumps(self._fields(), sort_keys=True, separators=(",", ":"))


def _levels(made_by: Mapping[str, Any]) -> list[Any]:
    return list(made_by["levels"]) if "levels" in made_by else [dict(made_by)]
