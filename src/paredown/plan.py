"""Plan: all policy as data. What is kept, by parameter name, axis and original index."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paredown.errors import UsageError
from paredown.granularity import Granularity

Keep = Mapping[str, Mapping[int, tuple[int, ...]]]

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """Which elements of one parameter stay, one bit each.

    `shape` is the parameter's after the plan's `keep` was carried out; `granularity` says what its cells are.

    >>> mask = Mask.of(np.array([[True, False], [True, True]]), "element")
    >>> mask.density, mask.kept.tolist()
    (0.75, [[True, False], [True, True]])
    """

    shape: tuple[int, ...]
    granularity: str
    bits: bytes
    """numpy.packbits of the kept elements in C order; 1 = kept."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        cells = Granularity.parse(self.granularity)
        object.__setattr__(self, "granularity", str(cells))
        if not cells.masked:
            msg = f"a mask must be made of element, N:M, RxC, row, column or kernel. Got {cells}."
            raise UsageError(msg)
        if any(n < 0 for n in self.shape) or len(self.bits) != -(-math.prod(self.shape) // 8):
            msg = f"a mask must hold one bit for each of {math.prod(self.shape)} elements. Got {len(self.bits)} bytes for shape {self.shape}."
            raise UsageError(msg)

    @classmethod
    def of(cls, kept: NDArray[np.bool_], granularity: str) -> Mask:
        """A mask from booleans, True = kept."""
        kept = np.asarray(kept)
        if kept.dtype != np.bool_:
            msg = f"a mask must be made of booleans, True = kept. Got {kept.dtype}."
            raise UsageError(msg)
        return cls(shape=kept.shape, granularity=granularity, bits=np.packbits(kept, axis=None).tobytes())

    def only(self, keep: Mapping[int, tuple[int, ...]]) -> Mask | None:
        """The mask of what a removal leaves of its parameter, {axis: kept indices}; None where it keeps all of that.

        Cells that the removal tears (2 of 4 inputs that are not neighbours any more, half a block) are single elements.
        """
        kept = self.kept
        for axis, indices in keep.items():
            kept = kept.take(indices, axis=axis)
        if kept.all():
            return None
        whole = not keep or Granularity.parse(self.granularity).holds(kept)
        return Mask.of(kept, self.granularity if whole else "element")

    @property
    def kept(self) -> NDArray[np.bool_]:
        """True where an element stays. Shape: `shape`."""
        bits = np.unpackbits(np.frombuffer(self.bits, dtype=np.uint8), count=math.prod(self.shape))
        return bits.astype(np.bool_).reshape(self.shape)

    @property
    def num_kept(self) -> int:
        """How many elements stay."""
        return int(np.unpackbits(np.frombuffer(self.bits, dtype=np.uint8), count=math.prod(self.shape)).sum())

    @property
    def density(self) -> float:
        """Share of the elements that stay."""
        return self.num_kept / max(math.prod(self.shape), 1)

    @property
    def digest(self) -> str:
        """SHA-256 over shape and bits."""
        return hashlib.sha256(repr(self.shape).encode() + self.bits).hexdigest()

    def described(self) -> dict[str, Any]:
        """What stands in a plan's JSON; the bits lie in a file of their own."""
        return {"shape": list(self.shape), "granularity": self.granularity, "sha256": self.digest}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """How one weight is factorized: the method, and its ranks (one for SVD, two for Tucker-2)."""

    method: str
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(int(r) for r in self.ranks))
        if not self.ranks or min(self.ranks) < 1:
            msg = f"ranks must be integers ≥ 1. Got {self.ranks} for {self.method}."
            raise UsageError(msg)


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
    """Paths of modules that are left out: their input passes through."""
    masks: Mapping[str, Mask] = field(default_factory=dict)
    """Parameter → elements that stay; the others are zero. Shapes are those after `keep`."""
    ranks: Mapping[str, Rank] = field(default_factory=dict)
    """Weight → how it is factorized, after `keep`."""
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
            masks=_both(_cut(self.masks, later), later.masks),
            ranks={**self.ranks, **later.ranks},
            schemes={**self.schemes, **later.schemes},
            made_by={"levels": [*_levels(self.made_by), *_levels(later.made_by)]},
            parent_digest=self.digest,
        )

    def to_json(self) -> str:
        """The plan as JSON text, with schema number and digest."""
        return json.dumps({"schema": SCHEMA, "digest": self.digest, **self._fields()}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, bits: Mapping[str, bytes] | None = None) -> Plan:
        """Read a plan; `bits` holds the masks' bits by their SHA-256.

        Raises UsageError where the schema is newer, bits are missing or a digest does not fit its content.
        """
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
            data["masks"] = {n: _mask(n, m, bits or {}) for n, m in data.get("masks", {}).items()}
            data["ranks"] = {
                n: Rank(method=r["method"], ranks=tuple(r["ranks"])) for n, r in data.get("ranks", {}).items()
            }
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
            "masks": {n: m.described() for n, m in sorted(self.masks.items())},
            "ranks": {n: {"method": r.method, "ranks": list(r.ranks)} for n, r in sorted(self.ranks.items())},
            "schemes": dict(self.schemes),
            "made_by": dict(self.made_by),
            "parent_digest": self.parent_digest,
        }

    def _canonical(self) -> str:
        return json.dumps(self._fields(), sort_keys=True, separators=(",", ":"))


def _cut(masks: Mapping[str, Mask], later: Plan) -> dict[str, Mask]:
    """Masks of an earlier level, in the indices that a later level leaves; none of what it leaves out or factorizes."""
    out = {}
    for name, mask in masks.items():
        if name in later.ranks or any(name.startswith(f"{path}.") for path in later.drop_modules):
            continue
        left = mask.only(later.keep.get(name, {}))
        if left is not None:
            out[name] = left
    return out


def _both(first: Mapping[str, Mask], later: Mapping[str, Mask]) -> dict[str, Mask]:
    """Masks of two levels: what either prunes is pruned."""
    out = dict(first) | dict(later)
    for name in first.keys() & later.keys():
        if first[name].shape != later[name].shape:
            msg = f"the later mask must have the shape that the first plan leaves, {first[name].shape}. Got {later[name].shape} for {name}."
            raise UsageError(msg)
        kept, label = first[name].kept & later[name].kept, later[name].granularity
        out[name] = Mask.of(kept, label if Granularity.parse(label).holds(kept) else "element")
    return out


def _mask(name: str, described: Mapping[str, Any], bits: Mapping[str, bytes]) -> Mask:
    if described["sha256"] not in bits:
        msg = f"a plan with masks must be read with their bits, which lie beside plan.json. Got none for {name}."
        raise UsageError(msg)
    mask = Mask(shape=tuple(described["shape"]), granularity=described["granularity"], bits=bits[described["sha256"]])
    if mask.digest != described["sha256"]:
        msg = f"a mask's bits must fit its digest. Got others for {name}: the file was edited or damaged."
        raise UsageError(msg)
    return mask


def _levels(made_by: Mapping[str, Any]) -> list[Any]:
    return list(made_by["levels"]) if "levels" in made_by else [dict(made_by)]
