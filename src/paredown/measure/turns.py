"""Files in turns, by the clock that other programs disturb least: what a search compares."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from paredown.measure.kinds import feed_of, first_sample, refuse_other_inputs, run_once
from paredown.measure.latency import readings

if TYPE_CHECKING:
    from paredown.export.artifact import Artifact


def timed_in_turns(
    files: Mapping[str, Artifact], samples: Any, *, threads: int = 1, runs: int = 200, seconds: float = 3.0
) -> dict[str, float]:
    """Median milliseconds of one sample for every file, all of them taking turns.

    Processor time where one thread works, else time on the wall. Raises RejectedError (no samples, samples that a file does not
    take, files of unequal fixed batches), MissingError (a runtime).
    """
    from paredown.export.session import open_session

    sample = first_sample(samples)
    sessions = {name: open_session(file.path, threads=threads) for name, file in files.items()}
    feeds = {name: feed_of(session, sample) for name, session in sessions.items()}
    refuse_other_inputs(feeds)
    for name, session in sessions.items():
        run_once(session, feeds[name], files[name].path.name)
    clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
    times, _ = readings(sessions, feeds, runs=runs, seconds=seconds, clock=clock)
    return {name: float(np.median(values)) for name, values in times.items()}
