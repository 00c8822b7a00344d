"""Pruned and Proof: a smaller module and the evidence that it is the right one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from paredown.plan import Plan
from paredown.program import Program

Claim = Literal["structure", "depth", "masks"]
"""structure: removed units' reads zeroed; depth: modules left out, their input in the place of their output (both on
seeded random weights of healthy scale); masks: the zeros are there and no other bit changed (on the user's weights)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Pruned against dense with the removed units' reads zeroed, on seeded random weights of healthy scale.

    `shown` says what was proven; for masks alone the numbers are those of the user's own weights.
    """

    max_error: float
    """max |pruned - masked dense| over all outputs."""
    scale: float
    """max |dense output|; the proof holds where max_error ≤ 1e-4 × scale (float32) or 1e-9 × scale (float64)."""
    moved: float
    """max |masked dense - dense|: how far the removal moves the output; 0 would make the proof vacuous."""
    mode: Literal["float32", "float64"]
    own_move: float | None = None
    """max |pruned - dense| on the user's own weights; reported, not required."""
    shown: tuple[Claim, ...] = ("structure",)
    num_zeros: int = 0
    """Elements that masks hold at zero, counted in the module; tied weights once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How well a layer gives what it should, before and after it was fitted anew (see reconstruct)."""

    before: float
    """Σ ‖target - output‖² / Σ ‖target - mean target‖² on the batches; 1 is as good as a constant."""
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One change of a model that several plans changed one after the other, each in the names of the one before."""

    plan: Plan
    realiser: Literal["module", "graph"]
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


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
    fits: Mapping[str, Fit] = field(default_factory=dict)
    """By weight, where `reconstruct` fitted it."""
    stages: tuple[Stage, ...] = ()
    """Where one plan on the dense model cannot say it all (factors, channels inside the one head that was left): every
    change in order, each on the model that the one before it made."""
    notes: tuple[str, ...] = ()
    """What a reader should know: what masks removed physically, and what is simulated and why."""

    def every_stage(self) -> tuple[Stage, ...]:
        """The stages; one where a single plan says it all."""
        return self.stages or (Stage(plan=self.plan, realiser=self.realiser, attributes=self.attributes),)
