"""Times of layers on this machine, measured in the real runtime and kept in the user's cache: each shape is timed once.

One folder per processor, runtime with its version, number of threads and number type, under PAREDOWN_LATENCY or
~/.cache/paredown/latency; one line per shape as soon as it is known, so that a stopped measurement goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paredown.errors import MissingError, UsageError
from paredown.measure.latency import CALM, calmest, readings
from paredown.measure.layer_files import LayerShape, Scheme, feed_for, write_layer
from paredown.measure.machine import machine, machine_text
from paredown.records import Measured, Record, append, mend, read_whole_lines, write_text

FOLDER = "PAREDOWN_LATENCY"
"""The variable that moves the folder of all times."""
RUNS, SECONDS, AT_ONCE = 25, 1.5, 80
"""Readings of a shape at most; seconds for SHAPES of them; shapes that are timed in turns."""
SHAPES = 36
PULSE = LayerShape(
    kind="conv", out_channels=64, in_channels=64, positions=(28, 28), kernel=(3, 3), stride=(1, 1), padding=(1, 1),
    dilation=(1, 1),
)  # fmt: skip
"""A layer in float32 that takes turns with all others: where it is slower than elsewhere, other load disturbed them."""
RUNTIMES = {"onnxruntime-x86": "onnxruntime", "onnxruntime-arm": "onnxruntime", "openvino-x86": "openvino"}
"""Targets whose layers can be timed here, and the runtime that does it."""
PROTOCOL = (
    f"least of at most {RUNS} readings (processor time where one thread works) in turns with the layer's other shapes"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What runs a layer: times of one setting say nothing of another."""

    target: str = "onnxruntime-x86"
    threads: int = 1
    scheme: Scheme = "fp32"

    def __post_init__(self) -> None:
        if self.target not in RUNTIMES:
            msg = f"layers can be timed for {', '.join(RUNTIMES)}. Got {self.target!r}, whose files run elsewhere: give a budget of macs, and measure on the device."
            raise UsageError(msg)
        if isinstance(self.threads, bool) or self.threads < 1:
            msg = f"threads must be ≥ 1. Got {self.threads!r}."
            raise UsageError(msg)

    def described(self) -> dict[str, Any]:
        """The key of the cache: processor, runtime and version, threads, number type."""
        facts, runtime = machine(), RUNTIMES[self.target]
        return {
            "cpu": facts["cpu"],
            "isa": facts["isa"],
            "runtime": runtime,
            "version": _version(runtime),
            "threads": self.threads,
            "dtype": self.scheme,
        }

    @property
    def folder(self) -> Path:
        """Where its times are kept."""
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        top = Path(os.environ.get(FOLDER) or Path(cache) / "paredown" / "latency").expanduser()
        described = self.described()
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        return top / f"{described['runtime']}-{self.scheme}-{self.threads}t-{digest}"


def _version(runtime: str) -> str:
    """Of the package of that name, or as the module says it: builds for a GPU come as another package.

    >>> _version("numpy") == np.__version__
    True
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(runtime)
    try:
        return str(importlib.import_module(runtime).__version__)
    except (ImportError, AttributeError) as error:
        msg = f"layers must be timed in {runtime}. Got: {error}. Run: pip install {runtime}"
        raise MissingError(msg) from error


def layer_times(
    groups: Iterable[Sequence[LayerShape]],
    setting: Setting,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[LayerShape, Measured]:
    """Milliseconds of every shape, one sample, measured in the runtime; known ones from the cache.

    The shapes of one group (a layer at several numbers of channels) are timed in turns, so that a change of the machine's
    load meets all of them; what other load disturbed (see PULSE) is timed again. `progress` gets (shapes known, shapes in all) after each group. Raises UsageError (target,
    threads), MissingError (the runtime), ResourceError (the cache cannot be written).
    """
    wanted = [list(dict.fromkeys(group)) for group in groups]
    known = cached(setting)
    total, where = len({s for group in wanted for s in group}), machine_text()
    mine = setting.folder / f"{os.getpid()}.jsonl"
    taken: list[tuple[list[LayerShape], float]] = []

    def timed(shapes: list[LayerShape], least: float) -> tuple[dict[LayerShape, Measured], float]:
        return calmest(lambda: _timed(shapes, setting, where), lambda found: found[1], least_ms=least)

    for group in wanted:
        missing = [s for s in group if s not in known]
        for start in range(0, len(missing), AT_ONCE):
            shapes = missing[start : start + AT_ONCE]
            found, pulse = timed(shapes, min((p for _, p in taken), default=math.inf))
            taken.append((shapes, pulse))
            _keep(mine, setting, found)
            known |= found
        if progress is not None:
            progress(len({s for g in wanted for s in g if s in known}), total)
    least = min((p for _, p in taken), default=math.inf)
    for shapes, pulse in taken:
        if pulse > CALM * least:  # the first ones had nothing to compare with
            found, again = timed(shapes, least)
            if again < pulse:
                _keep(mine, setting, found)
                known |= found
    return {s: known[s] for group in wanted for s in group}


def cached(setting: Setting) -> dict[LayerShape, Measured]:
    """What was measured before in this setting; lines that cannot be right are left out, and measured again."""
    known: dict[LayerShape, Measured] = {}
    for file in sorted(setting.folder.glob("*.jsonl")):
        for record in _whole_lines(file):
            shape, found = _shape(record.cell), record.measured.get("latency_ms")
            if (
                shape is not None
                and found is not None
                and isinstance(found.value, int | float)
                and 0 < found.value < 1e7
            ):
                known[shape] = found
    return known


def _whole_lines(file: Path) -> list[Record]:
    try:
        return read_whole_lines(file)
    except OSError:
        return []  # a cache may be lost


def _shape(cell: Mapping[str, Any]) -> LayerShape | None:
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in cell["layer"].items()}
        return LayerShape(**fields)
    except (KeyError, TypeError, AttributeError, UsageError):
        return None


def _keep(file: Path, setting: Setting, found: Mapping[LayerShape, Measured]) -> None:
    if not file.parent.is_dir():
        write_text(file.parent / "setting.json", json.dumps(setting.described(), indent=1) + "\n")
    mend(file)
    for shape, measured in found.items():
        cell = {"stage": "layer latency", "layer": shape.described()}
        append(file, Record(cell=cell, measured={"latency_ms": measured}))


def _timed(shapes: Sequence[LayerShape], setting: Setting, where: str) -> tuple[dict[LayerShape, Measured], float]:
    """All of them in turns, with the pulse; its milliseconds too."""
    with tempfile.TemporaryDirectory(prefix="paredown-layers-") as folder:
        names = [str(number) for number in range(len(shapes))]
        files = [write_layer(s, Path(folder) / f"{n}.onnx", setting.scheme) for n, s in zip(names, shapes, strict=True)]
        sessions = {n: _session(f, setting) for n, f in zip(names, files, strict=True)}
        feeds = {n: feed_for(s, setting.scheme) for n, s in zip(names, shapes, strict=True)}
        sessions["pulse"] = _session(write_layer(PULSE, Path(folder) / "pulse.onnx"), setting)
        feeds["pulse"] = feed_for(PULSE, "fp32")
        clock = time.process_time_ns if setting.threads == 1 else time.perf_counter_ns
        times, _ = readings(sessions, feeds, runs=RUNS, seconds=SECONDS * max(1.0, len(shapes) / SHAPES), clock=clock)
    out = {}
    for name, shape in zip(names, shapes, strict=True):
        value, high = float(min(times[name])), float(np.percentile(times[name], 90))
        out[shape] = Measured(
            value=value, unit="ms", low=value, high=high, n=len(times[name]), timing=True, machine=where,
            protocol=f"{PROTOCOL}, {setting.threads} thread; high is the 90th percentile",
        )  # fmt: skip
    return out, float(min(times["pulse"]))


def _session(path: Path, setting: Setting) -> Any:
    if RUNTIMES[setting.target] == "openvino":
        from paredown.export.openvino_session import Session

        return Session(path, threads=setting.threads)
    from paredown.export.session import open_session

    return open_session(path, threads=setting.threads)
