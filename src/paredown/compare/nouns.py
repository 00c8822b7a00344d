"""What a comparison finds: rows of runs, timings of files, differences that are told from noise or are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from paredown.records import Measured

FIGURES = ("bytes", "gzip_bytes", "parameters", "macs", "metric", "latency_ms")
"""What a row of a run shows, in this order."""
COUNTED = {"bytes": "bytes", "gzip_bytes": "bytes gzipped", "parameters": "parameters", "macs": "MACs"}
"""Sizes and counts, in words."""
WORDS = {**COUNTED, "metric": "metric", "latency_ms": "latency"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One exported file of one run, as its records have it; of a curve one point, with means over its seeds."""

    run: str
    stage: str
    title: str
    file: str
    recommended: bool
    figures: Mapping[str, Measured]
    """By the names of FIGURES, and of a curve's points "speedup" (× over the dense float files, in turns); what was not measured has value None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One figure of two rows. `better` is None where the data show no difference."""

    what: str
    first: str
    second: str
    change: Measured
    """second - first, for curves of means over seeds; for latencies the first's divided by the second's, × (above 1: the second is faster)."""
    better: str | None
    said: str
    """The same in a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One file in one runtime, timed in turns with all others."""

    name: str
    """ "int8.onnx in OpenVINO". """
    file: str
    runtime: str
    scheme: str
    bytes: int
    gzip_bytes: int
    latency_ms: Measured
    slowdown: Measured
    """Median of this one / median of the fastest, ×, with its 95 % interval."""
    answers: Literal["own", "same", "other"]
    """own: the file's own runtime; same, other: whether this runtime answers as the own one does, on one sample."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that `compare` found."""

    metric: Mapping[str, str]
    """{"name", "unit", "goal"} of the runs; empty where there are none."""
    runs: tuple[RunRow, ...]
    differences: tuple[Difference, ...]
    timings: tuple[Timing, ...]
    """The fastest first; those whose answers differ last."""
    fastest: str | None
    """Name of the fastest timing whose answers are right."""
    as_fast: tuple[str, ...]
    """Those that the data do not tell from the fastest."""
    notes: tuple[str, ...]
    not_tested: tuple[str, ...]
    answers: tuple[str, ...] = ()
    """The recommended file of each other run against that of the first, in a sentence: size, metric, speed."""
