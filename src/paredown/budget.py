"""Budget: what must remain, or what must not be exceeded."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from paredown.errors import UsageError

_RELATIVE = ("channels", "parameters", "macs", "density", "size_bytes")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(B|kB|KB|MB|GB|KiB|MiB|GiB)\s*")
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(us|µs|ms|s)\s*")
_TOO_MUCH = 2**63
_MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What remains after compression.

    A float in (0, 1) is the fraction that remains; an integer ≥ 2 is absolute; 1 is refused as ambiguous. `size_bytes` also
    takes text such as "30 MB" (10⁶) or "30 MiB" (2²⁰). `latency` takes a fraction of the dense file's, timed in turns with
    it, or text such as "12 ms", which becomes `latency_ms`. `latency_ms` and RAM are absolute.

    Raises UsageError for anything else.

    >>> Budget(macs=0.5).macs
    0.5
    >>> Budget(size_bytes="2 MiB").size_bytes
    2097152
    >>> Budget(latency="12 ms").given()
    {'latency_ms': 12.0}
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
    latency: float | str | None = None
    """Fraction of the dense file's latency, in turns with it; or a text with its unit, "12 ms"."""
    peak_ram_bytes: int | str | None = None
    """Peak memory of the process that runs the file, bytes."""
    metric_loss: float | None = None
    """Largest tolerated loss of the metric, in the metric's own unit."""

    def __post_init__(self) -> None:
        for name in ("size_bytes", "peak_ram_bytes"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, parse_bytes(value, f"budget.{name}"))
        for name in _RELATIVE:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _amount(value, name))
        self._settle_latency()
        for name in ("latency_ms", "peak_ram_bytes", "metric_loss"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0):
                msg = f"budget.{name} must be a number ≥ 0. Got {value!r}."
                raise UsageError(msg)
            if value == 0 and name != "metric_loss":
                msg = f"budget.{name} must be above 0. Got {value!r}: nothing runs in none. To set no bound, leave it out."
                raise UsageError(msg)
            if name == "peak_ram_bytes" and value is not None and value < 1:
                msg = f"budget.{name} must be bytes, or a text such as '200 MB': no dense file's memory is known before a run. Got {value!r}."
                raise UsageError(msg)
            if value is not None and value >= _TOO_MUCH:
                msg = f"budget.{name} must be a finite number. Got {value!r}. To set no bound, leave it out."
                raise UsageError(msg)

    def _settle_latency(self) -> None:
        """A latency in milliseconds is one field, however it was written."""
        if self.latency is None:
            return
        if self.latency_ms is not None:
            msg = f"a budget must give latency or latency_ms. Got both, {self.latency!r} and {self.latency_ms!r}."
            raise UsageError(msg)
        found = parse_latency(self.latency)
        absolute = isinstance(self.latency, str)
        object.__setattr__(self, "latency_ms", found if absolute else None)
        object.__setattr__(self, "latency", None if absolute else found)

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
        if text.strip().endswith("%"):
            msg += " Write 25 % as 0.25."
        raise UsageError(msg)
    found = float(match[1]) * _UNITS[match[2]]
    if found >= _TOO_MUCH:
        msg = f"{name} must be below 2⁶³ bytes. Got {text[:40]!r}."
        raise UsageError(msg)
    return int(found)


def parse_latency(value: object, name: str = "budget.latency") -> float:
    """Milliseconds of a text such as "12 ms", "800 us" or "0.2 s"; a fraction in (0, 1) as it is. Raises UsageError.

    >>> parse_latency("800 us"), parse_latency(0.5)
    (0.8, 0.5)
    """
    rule = "a text with its unit, as '12 ms', or a fraction in (0, 1) of the dense file's latency"
    if isinstance(value, float) and 0 < value < 1:
        return value
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is not None and 0 < float(match[1]) < _TOO_MUCH:
        return float(match[1]) * _MILLISECONDS[match[2]]
    hint = ""
    if isinstance(value, str) and value.strip().endswith("%"):
        hint = " Write 50 % as 0.5."
    elif isinstance(value, int | float) and not isinstance(value, bool) and 1 < value < _TOO_MUCH:
        hint = f" Write {value:g} ms as '{value:g} ms'."
    elif value == 1 and not isinstance(value, bool):
        hint = " It is ambiguous: as fast as the dense file, or one millisecond? Leave it out, or write '1 ms'."
    elif isinstance(value, str) and re.fullmatch(r"\s*[\d.]+(e[+-]?\d+)?\s*", value):
        hint = " It has no unit: write it with ms, or a fraction without quotes."
    msg = f"{name} must be {rule}. Got {value!r}.{hint}"
    raise UsageError(msg)


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
    if isinstance(value, int) and 2 <= value < _TOO_MUCH:
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    if value == 1:
        msg = f"budget.{name} must be {rule}. Got {value!r}, which is ambiguous: all of it, or one? To change nothing, leave it out."
        raise UsageError(msg)
    if isinstance(value, float) and 2 <= value < _TOO_MUCH and value.is_integer():
        return int(value)
    msg = f"budget.{name} must be {rule}. Got {value!r}."
    raise UsageError(msg)
