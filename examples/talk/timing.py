"""Latency of many things that take turns: medians with quartiles, one thread, processor time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paredown.export.openvino_session import Session as OpenVino
from paredown.export.session import open_session
from paredown.measure.latency import readings
from talk.page import Spread

Floats = NDArray[np.float64]

PROTOCOL = "median with quartiles of readings in turns, one thread, processor time"


@dataclass(frozen=True, slots=True)
class Call:
    """A function of its feed, timed like a session."""

    function: Callable[[Any], Any]

    def run(self, _names: None, feed: Any) -> Any:
        """One call."""
        return self.function(feed)


def opened(file: Path, runtime: str) -> Any:
    """A file of ONNX in ONNX Runtime or in OpenVINO, one thread."""
    return OpenVino(file, threads=1) if runtime == "OpenVINO" else open_session(file, threads=1)


def in_turns(
    sessions: Mapping[str, Any], feeds: Mapping[str, Any], *, runs: int = 60, seconds: float = 30.0
) -> dict[str, Floats]:
    """Milliseconds of one run of each, round by round; every round runs all, so that a change of load meets all."""
    times, _ = readings(dict(sessions), dict(feeds), runs=runs, seconds=seconds, clock=time.process_time_ns)
    return {name: np.asarray(each) for name, each in times.items()}


def middle(values: Floats) -> Spread:
    """Median with quartiles."""
    low, median, high = (float(q) for q in np.percentile(values, (25, 50, 75)))
    return Spread(value=median, low=low, high=high)
