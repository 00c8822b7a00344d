"""Pruned and Proof: a smaller module and the evidence that it is the right one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from paredown.plan import Plan
from paredown.program import Program


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Pruned against dense with the removed units' reads zeroed, on seeded random weights of healthy scale."""

    max_error: float
    """max |pruned - masked dense| over all outputs."""
    scale: float
    """max |dense output|; the proof holds where max_error ≤ 1e-4 × scale (float32) or 1e-9 × scale (float64)."""
    moved: float
    """max |masked dense - dense|: how far the removal moves the output; 0 would make the proof vacuous."""
    mode: Literal["float32", "float64"]
    own_move: float | None = None
    """max |pruned - dense| on the user's own weights; reported, not required."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A pruned (or factorized) model. Train `module` with any loop, or with recover."""

    module: nn.Module
    program: Program
    """The dense program it came from."""
    plan: Plan
    realiser: Literal["module", "graph"]
    """ "module": the user's own class with smaller parameters; "graph": rebuilt from the exported graph."""
    proof: Proof
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Sizes set on the user's class, by module path, so that `load` can set them again."""
