"""Files side by side: each in every runtime at hand that executes it, all of them taking turns in one schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paredown.compare.nouns import Timing
from paredown.errors import MissingError, ParedownError, UsageError
from paredown.measure import machine_text, sizes
from paredown.measure.bundle import default_tolerance
from paredown.measure.kinds import TITLES, filled, first_sample, kind_of, refuse_other_inputs, run_once
from paredown.measure.latency import protocol, ratio, readings, spread
from paredown.records import Measured
from paredown.report.wording import digits, times

if TYPE_CHECKING:
    from paredown.export import Artifact
    from paredown.quantize.batches import Batches

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One file, opened in one runtime."""

    name: str
    file: str
    artifact: Artifact
    runtime: str
    session: Any
    feed: Mapping[str, Any]
    batch: int = 1
    outputs: tuple[NDArray[Any], ...]


def time_files(
    files: Mapping[str, Artifact],
    samples: Batches | None,
    *,
    num_threads: int,
    runs: int,
    seconds: float,
    families: Mapping[str, str] | None = None,
) -> tuple[list[Timing], list[str]]:
    """(timings, the fastest first, notes) of the files, by the names that the comparison gives them.

    `families`: name of a file → the run that it is from; an integer file is held against the float files of its own run.
    """
    notes: list[str] = []
    entries = _opened(files, samples, num_threads, notes)
    names = [e.name for e in entries]
    times, groups = readings(
        {e.name: e.session for e in entries}, {e.name: e.feed for e in entries}, runs=runs, seconds=seconds
    )
    where = machine_text()
    judged = {e.name: _answers(e, entries) for e in entries}
    right = [n for n in names if judged[n][0] != "other"]
    best = min(right, key=lambda n: float(np.median(times[n])))
    found = []
    for e in entries:
        how = f"{protocol(num_threads, groups[e.name], e.batch)}, in turns with {len(names) - 1} other(s)"
        note = getattr(e.session, "note", "")
        size = sizes(e.artifact.files)
        answers, said = judged[e.name]
        found.append(
            Timing(
                name=e.name,
                file=e.file,
                runtime=e.runtime,
                scheme=e.artifact.scheme,
                bytes=int(size["bytes"].value or 0),
                gzip_bytes=int(size["gzip_bytes"].value or 0),
                latency_ms=spread(times[e.name], how + (f"; {note}" if note else ""), where),
                slowdown=_slowdown(times[e.name], times[best], where),
                answers=answers,  # type: ignore[arg-type]
                note=said,
            )
        )
    notes += [f"{t.name}: {t.note}" for t in found if t.answers == "same" and t.note]
    notes += _slow_codes(found, times, where, families or {})
    return sorted(found, key=lambda t: (t.answers == "other", t.slowdown.value or 0.0)), notes


def told(timings: Sequence[Timing]) -> tuple[str | None, tuple[str, ...]]:
    """(name of the fastest, those that are not told from it)."""
    right = [t for t in timings if t.answers != "other"]
    if not right:
        return None, ()
    best, *others = right
    return best.name, tuple(t.name for t in others if t.slowdown.low is not None and t.slowdown.low <= 1)


# ------------------------------------------------------------------------------------------------------------- opening


def _opened(files: Mapping[str, Artifact], samples: Batches | None, num_threads: int, notes: list[str]) -> list[_Entry]:
    sample = None if samples is None else first_sample(samples)
    entries: list[_Entry] = []
    for name, artifact in files.items():
        for number, runtime in enumerate(kind_of(artifact.path).runtimes):
            title = f"{name} in {TITLES[runtime]}"
            try:
                session = _session(artifact, runtime, num_threads)
                feed, batch = (_noise(session, name), 1) if sample is None else filled(session, sample)
                outputs = tuple(np.asarray(a) for a in run_once(session, feed, name))
            except MissingError as error:
                if number == 0:
                    raise
                notes.append(f"{title}: not tested. {error}")
                continue
            except ParedownError as error:
                if number == 0:
                    msg = f"the files to compare must run on the same samples. Got {name}: {error}"
                    raise type(error)(msg) from error
                notes.append(f"{title}: not tested. {error}")
                continue
            entries.append(
                _Entry(
                    name=title,
                    file=name,
                    artifact=artifact,
                    runtime=runtime,
                    session=session,
                    feed=feed,
                    batch=batch,
                    outputs=outputs,
                )
            )
    refuse_other_inputs({e.name: e.feed for e in entries})
    return entries


def _session(artifact: Artifact, runtime: str, num_threads: int) -> Any:
    if runtime == "openvino":
        from paredown.export.openvino_session import Session

        return Session(artifact.path, threads=num_threads)
    from paredown.export.session import open_session, products_of

    session = open_session(artifact.path, threads=num_threads)
    if said := products_of(artifact):
        session.note = said  # the protocol of its timings
    return session


def _noise(session: Any, name: str) -> dict[str, Any]:
    """One sample in the form that the file declares: seeded noise, zeros for whole numbers; a free batch is 1."""
    dice, feed = np.random.default_rng(0), {}
    for value in session.get_inputs():
        shape = [1 if at == 0 and not isinstance(d, int) else d for at, d in enumerate(value.shape)]
        if not all(isinstance(d, int) for d in shape):
            msg = f"samples must be given for a file with free axes besides the batch. Got none for {name}, whose {value.name!r} is {value.shape}."
            raise UsageError(msg)
        try:
            kind = np.dtype(_DTYPES.get(value.type) or value.type.removeprefix("tensor(").rstrip(")"))
        except TypeError as error:
            msg = f"samples must be given for a file whose inputs NumPy has no type for. Got {value.type} for {value.name!r} of {name}."
            raise UsageError(msg) from error
        feed[value.name] = dice.normal(size=shape).astype(kind) if kind.kind == "f" else np.zeros(shape, kind)
    return feed


# ------------------------------------------------------------------------------------------------------------- judging


def _answers(e: _Entry, entries: Sequence[_Entry]) -> tuple[str, str]:
    """(own, same or other; in words): another runtime must answer as the file's own one does."""
    own = next(o for o in entries if o.artifact is e.artifact)
    if own is e:
        return "own", ""
    bound = default_tolerance(e.artifact.scheme)
    if [o.shape for o in own.outputs] != [o.shape for o in e.outputs]:
        return "other", f"its outputs have other shapes than in {TITLES[own.runtime]}"
    worst, lowest, finite = 0.0, 1.0, True
    for a, b in zip(own.outputs, e.outputs, strict=True):
        x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        differ = ~(np.isinf(x) & (x == y))  # minus infinity is what a mask writes
        x, y = x[differ], y[differ]
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            finite = False
            continue
        scale, norms = float(np.abs(x).max(initial=0.0)), float(np.linalg.norm(x) * np.linalg.norm(y))
        worst = max(worst, float(np.abs(x - y).max(initial=0.0)) / (scale or 1.0))
        lowest = min(lowest, float(x @ y) / norms if norms else float(bool((x == y).all())))
    if not finite:
        return "other", f"its outputs, or those in {TITLES[own.runtime]}, hold NaN or infinity on one sample"
    if bound.max_error_of_scale is not None:
        same, because = worst <= bound.max_error_of_scale, ""
    else:
        same, because = _holds(own, lowest, bound.cosine or 1.0)
    if same:
        return "same", because
    return (
        "other",
        f"it answers otherwise than {TITLES[own.runtime]} (error {digits(worst)} of the scale, cosine {lowest:.6f} on one sample)",
    )


def _holds(own: _Entry, cosine: float, bound: float) -> tuple[bool, str]:
    """Whether two runtimes' answers are one network's, and why, where only a network that amplifies rounding explains the distance."""
    if cosine >= bound:
        return True, ""
    from paredown.export.conditioning import LEAST

    if cosine < LEAST:
        return False, ""
    from paredown.export.own_rounding import excused_between_runtimes

    asked, because = excused_between_runtimes(own.artifact.path, [own.feed])
    return cosine >= asked, f"{because} (cosine {cosine:.6f} on one sample)"


def _slowdown(this: list[float], fastest: list[float], where: str) -> Measured:
    found = ratio(np.asarray(this), np.asarray(fastest), where)
    how = "median / median of the fastest; 95 % bootstrap interval over rounds, 2000 resamples, seed 0"
    return dataclasses.replace(found, protocol=how)


def _slow_codes(
    found: Sequence[Timing], times_ms: Mapping[str, list[float]], where: str, families: Mapping[str, str]
) -> list[str]:
    """An integer file that is slower than the fastest float file of the same runtime is called so."""
    notes = []
    for t in found:
        floats = [f for f in found if f.runtime == t.runtime and f.scheme.startswith("fp") and f.answers != "other"]
        floats = [f for f in floats if families.get(f.file) == families.get(t.file)] or floats
        if t.scheme.startswith("fp") or not floats:
            continue
        rival = min(floats, key=lambda f: f.latency_ms.value or 0.0)
        speed = ratio(np.asarray(times_ms[rival.name]), np.asarray(times_ms[t.name]), where)
        if speed.high is not None and speed.low is not None and speed.high < 1:
            span = f"{times(float(speed.value or 0))} its speed, {digits(speed.low)} to {digits(speed.high)}"
            notes.append(
                f"{t.name} ({t.scheme}) is slower than {rival.name} ({rival.scheme}): {span}. Not recommended there for speed."
            )
    return notes
