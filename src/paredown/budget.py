"""Budget: what must remain, or what must not be exceeded."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from paredown.errors import UsageError

_RELATIVE = ("channels", "parameters", "macs", "density", "size_bytes")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(B|kB|KB|MB|GB|KiB|MiB|GiB)\s*")
_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What remains after compression.

    A float in (0, 1) is the fraction that remains; an integer ≥ 2 is absolute; 1 is refused as ambiguous.
    Latency and RAM are absolute. `size_bytes` also takes text such as "30 MB" or "30 MiB".

    Raises UsageError for anything else.

    >>> Budget(macs=0.5).macs
    0.5
    >>> Budget(size_bytes="2 MiB").size_bytes
    2097152
    """

    channels: float | int | None = None
    """Fraction (or number) of the channels of each space."""
    parameters: float | int | None = None
    """Fraction or number of parameters."""
    macs: float | int | None = None
    """Fraction or number of multiply-accumulates of one sample (FLOPs = 2 × MACs)."""
    density: float | int | None = None
    """Fraction of non-zero elements (masks)."""
    size_bytes: float | int | str | None = None
    """Fraction of the dense file's bytes, or bytes of the exported file."""
    latency_ms: float | None = None
    """Median latency on the target, milliseconds."""
    peak_ram_bytes: int | str | None = None
    """Peak memory of the process that runs the file, bytes."""
    metric_loss: float | None = None
    """Largest tolerated loss of the metric, in the metric's own unit."""

    def __post_init__(self) -> None:
        for name in ("size_bytes", "peak_ram_bytes"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, parse_bytes(value, name))
        for name in _RELATIVE:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _amount(value, name))
        for name in ("latency_ms", "peak_ram_bytes", "metric_loss"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
                msg = f"budget.{name} must be a number ≥ 0. Got {value!r}."
                raise UsageError(msg)

    def given(self) -> dict[str, float | int]:
        """The fields that are set, by name."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}


def parse_bytes(text: str, name: str = "size") -> int:
    """Bytes of a text such as "30 MB" (10⁶) or "30 MiB" (2²⁰). Raises UsageError.

    >>> parse_bytes("1.5 kB")
    1500
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        msg = f"{name} must be a number of bytes or a text such as '30 MB' or '30 MiB'. Got {text!r}."
        raise UsageError(msg)
    return int(float(match[1]) * _UNITS[match[2]])


def _amount(value: object, name: str) -> float | int:
    """A fraction in (0, 1) or an absolute integer ≥ 2."""
    rule = "a float in (0, 1), the fraction that remains, or an absolute integer ≥ 2"
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = ""
        if isinstance(value, str) and value.strip().endswith("%"):
            hint = " Write 25 % as 0.25."
        elif isinstance(value, str):
            hint = " It is a text: YAML reads 1e-3 as text, write 0.001 or 1.0e-3."
        msg = f"budget.{name} must be {rule}. Got {value!r}.{hint}"
        raise UsageError(msg)
    if isinstance(value, int) and value >= 2:
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    if value == 1:
        msg = f"budget.{name} must be {rule}. Got {value!r}, which is ambiguous: all of it, or one? To change nothing, leave it out."
        raise UsageError(msg)
    if isinstance(value, float) and value >= 2 and value.is_integer():
        return int(value)
    msg = f"budget.{name} must be {rule}. Got {value!r}."
    raise UsageError(msg)
