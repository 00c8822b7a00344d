"""Schemes: how many bits weights and activations take, and what shares a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from paredown.errors import UsageError

Levels = Literal["integer", "balanced", "ternary", "binary"]
LEVELS: tuple[Levels, ...] = get_args(Levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One way to spend bits."""

    name: str
    weight_bits: int
    """Of a weight's code; 16 and 32 stand for floating point."""
    activation_bits: int
    """Of an activation's code; 16 and 32 stand for floating point."""
    activations: Literal["float", "static", "dynamic"] = "float"
    """Static: ranges from calibration. Dynamic: each tensor's own range at run time."""
    group: int | None = None
    """Neighbours along a weight's inputs that share a scale; None: a whole output channel."""
    levels: Levels = "integer"
    """What codes there are: see `weight_range`."""
    end_bits: int | None = None
    """Of weights and inputs of the first and the last layers, where those are not to go below; None: as all others."""

    @property
    def weight_range(self) -> tuple[int, int]:
        """Smallest and largest code of a weight (see `weight_range`).

        >>> SCHEMES["int8"].weight_range, SCHEMES["w4a8"].weight_range
        ((-127, 127), (-8, 7))
        """
        return weight_range(self.weight_bits, self.levels)


def weight_range(bits: int, levels: Levels = "integer") -> tuple[int, int]:
    """Smallest and largest code of a weight of that many bits.

    Integer: -2^(b-1) … 2^(b-1) - 1; eight bits leave out -128, so that products of two codes cannot saturate. Balanced: the odd
    numbers from -(2^b - 1) to 2^b - 1, as many above 0 as below and no 0, which few bits want (Liu et al. 2025, ParetoQ,
    arXiv 2502.02631, section 3). Ternary: -1, 0, 1. Binary: -1 and 1, which is balanced with one bit.

    >>> weight_range(2, "balanced"), weight_range(2), weight_range(1, "binary")
    ((-3, 3), (-2, 1), (-1, 1))
    """
    if levels in ("ternary", "binary"):
        return -1, 1
    if levels == "balanced":
        return 1 - 2**bits, 2**bits - 1
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


_TABLE = (
    Scheme(name="fp32", weight_bits=32, activation_bits=32),
    Scheme(name="fp16", weight_bits=16, activation_bits=16),
    Scheme(name="int8", weight_bits=8, activation_bits=8, activations="static"),
    Scheme(name="int8-dynamic", weight_bits=8, activation_bits=8, activations="dynamic"),
    Scheme(name="w4", weight_bits=4, activation_bits=32, group=32),
    Scheme(name="w4a8", weight_bits=4, activation_bits=8, activations="static"),
    Scheme(name="w4a4", weight_bits=4, activation_bits=4, activations="static", end_bits=8),
    Scheme(name="w2", weight_bits=2, activation_bits=32, levels="balanced", end_bits=8),
    Scheme(name="ternary", weight_bits=2, activation_bits=32, levels="ternary", end_bits=8),
    Scheme(name="binary", weight_bits=1, activation_bits=32, levels="binary", end_bits=8),
)
SCHEMES: Mapping[str, Scheme] = {s.name: s for s in _TABLE}
DYNAMIC = tuple(s.name for s in _TABLE if s.activations == "dynamic" or s.group)
"""Schemes that need no calibration data (see quantize.dynamic)."""
HALF = "fp16"
"""The scheme of weights in 16 bits (see quantize.half); it needs no calibration data either."""
WEIGHTS = tuple(s.name for s in _TABLE if s.activations == "float" and s.weight_bits < 8 and not s.group)
"""Schemes of weights alone, per output channel; what computes is float32."""


def is_narrow(scheme: str) -> bool:
    """Whether activations have fewer bits than the types that a file has for them.

    >>> is_narrow("w4a4"), is_narrow("w4a8")
    (True, False)
    """
    return SCHEMES[scheme].activation_bits < 8


def levels_at(bits: int) -> Levels:
    """The levels of a weight that is given so many bits by itself: below three no 0 is worth a code."""
    return "binary" if bits == 1 else "balanced" if bits == 2 else "integer"


def scheme_named(name: str) -> Scheme:
    """The scheme of that name. Raises UsageError for another one.

    >>> scheme_named("w4a8").weight_bits
    4
    """
    if name not in SCHEMES:
        msg = f"scheme must be one of {', '.join(SCHEMES)}. Got {name!r}."
        raise UsageError(msg)
    return SCHEMES[name]
