"""Results that a bundle's runner wrote on a device, read back: believed only where they can be worked out again."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paredown.errors import RejectedError, VerificationError
from paredown.measure.bundle import Array, Bundle, Tolerance, golden_outputs, read_bundle
from paredown.measure.bundled.runner import digest, disturbed, sha256
from paredown.measure.bundled.runner import spread as range_of
from paredown.measure.kinds import TITLES, artifact_at
from paredown.measure.latency import protocol, spread
from paredown.records import Measured, Record

SCHEMA = 1
LARGEST_BYTES = 256 * 2**20
_Milliseconds = Annotated[float, Field(gt=0, lt=1e7, allow_inf_nan=False)]
_Text = Annotated[str, Field(max_length=300)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Device(_Strict):
    name: _Text
    cpu: _Text
    isa: list[_Text] = Field(max_length=50)
    cores: int | None = Field(ge=1, le=100_000)
    system: _Text
    python: _Text = ""


class _Runtime(_Strict):
    name: _Text
    version: _Text
    settings: dict[str, str] = Field(max_length=50)


class _Series(_Strict):
    latencies_ms: list[_Milliseconds] = Field(min_length=5, max_length=1_000_000)
    runs_per_reading: int = Field(ge=1)
    celsius: list[_Number | None] = Field(min_length=2, max_length=2)
    megahertz: list[_Number | None] = Field(min_length=2, max_length=2)


class _Output(_Strict):
    name: _Text
    dtype: _Text
    shape: list[int]
    data: str


class _Results(_Strict):
    """results.json, schema 1 (docs/bundle.md)."""

    schema_: int = Field(alias="schema")
    format: _Text
    model: dict[str, str]
    device: _Device
    runtime: _Runtime
    threads: int = Field(ge=1, le=100_000)
    series: list[_Series] = Field(min_length=1, max_length=20)
    throttled: bool | None
    outputs: list[list[_Output]] | None
    claimed: list[list[_Number | None]] | None
    digest: str


def import_results(results: str | Path, of: str | Path | Bundle) -> Record:
    """What a device measured, as a record with badge "measured" and the device as its machine.

    `of` is the bundle, or a model file: then only the hash is compared and the outputs are not tested. The parity with
    the golden outputs is worked out again from the outputs that came back; nothing that the file claims is believed. A
    series of readings that drifts (throttling, other load) is left out and named in details["flags"]; where every series
    drifts the steadiest stands and its protocol says "unsteady".

    Raises RejectedError: another model's hash, edited, NaN or infinite or not positive numbers, fields that are missing
    or unknown, a newer schema. Raises VerificationError, with the record as evidence, where the outputs are not the
    golden ones within the bundle's tolerance.

    >>> import tempfile, torch
    >>> from paredown.export import export
    >>> folder = Path(tempfile.mkdtemp())
    >>> artifact = export((torch.nn.Linear(4, 2), torch.zeros(2, 4)), folder / "net.onnx")
    >>> _ = (folder / "results.json").write_text("{}")
    >>> import_results(folder / "results.json", artifact.path)
    Traceback (most recent call last):
    ...
    paredown.errors.RejectedError: ...results.json must be what a bundle's runner wrote. Got no 'schema'. ...
    """
    path = Path(results)
    bundle = of if isinstance(of, Bundle) else read_bundle(of) if Path(of).is_dir() else None
    found = _read(path)
    _refuse_other_model(found, bundle, Path(of) if bundle is None else bundle.folder, path)  # type: ignore[arg-type]
    if bundle is not None and found.runtime.name != bundle.runtime:
        _refuse(path, f"the runtime {found.runtime.name!r}, the bundle is for {bundle.runtime!r}")
    where = _machine(found)
    flags, rows, latency = _latency(found, where)
    measured = {"latency_ms": latency}
    parity = None
    if bundle is not None and found.outputs is not None:
        measured |= (parity := _parity(found, bundle, path)).measured(where)
    title = TITLES.get(found.runtime.name, found.runtime.name)
    record = Record(
        cell={"stage": _stage(found), "title": f"{found.device.name}, {title}, {found.threads} thread(s)"},
        measured=measured,
        environment={
            "device": found.device.model_dump(),
            "runtime": found.runtime.model_dump(),
            "threads": found.threads,
        },
        details={
            "model": found.model,
            "flags": flags,
            "series": rows,
            "throttled": found.throttled,
            "golden": None if parity is None else parity.document(),
            "not_tested": [] if parity else [_untested(bundle)],
            "results_digest": found.digest,
        },
    )
    if parity is not None and not parity.holds:
        msg = f"the device's outputs must be the golden ones ({parity.rule}). Got {parity.got} on {found.device.name}. Its runtime computes something else: its latency is not that of this model."
        raise VerificationError(msg, record)
    return record


# ------------------------------------------------------------------------------------------------------------- reading


def _read(path: Path) -> _Results:
    if not path.is_file():
        msg = f"results must be a file that a bundle's runner wrote. Got {str(path)!r}, which {'is a folder' if path.is_dir() else 'does not exist'}."
        raise RejectedError(msg)
    if path.stat().st_size > LARGEST_BYTES:
        msg = f"results must have at most {LARGEST_BYTES:,} bytes. Got {path.stat().st_size:,} at {path}."
        raise RejectedError(msg)
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"{type(error).__name__}: {error}", error)
    if not isinstance(document, dict) or "schema" not in document:
        _refuse(path, "no 'schema'")
    if document["schema"] != SCHEMA:
        _refuse(path, f"schema {document['schema']!r}; this paredown reads {SCHEMA}, a newer one may read it")
    try:
        found = _Results.model_validate_json(json.dumps(document))
    except (ValidationError, ValueError) as error:
        _refuse(path, _wrong(error), error)
    if found.format != "paredown-results":
        _refuse(path, f"format {found.format!r}")
    if found.digest != digest(document):
        _refuse(path, "a digest that is not that of its content: it was edited")
    return found


def _wrong(error: Exception) -> str:
    """The first thing that does not fit, and where."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{first['msg'].lower()} at {'.'.join(str(p) for p in first['loc'])!r}"


def _no_number(text: str) -> NoReturn:
    msg = f"{text} is no number"
    raise ValueError(msg)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = [k for k, _ in pairs]
    if len(names) != len(set(names)):
        msg = "a key is there twice"
        raise ValueError(msg)
    return dict(pairs)


def _refuse(path: Path, got: str, cause: Exception | None = None) -> NoReturn:
    msg = f"{path} must be what a bundle's runner wrote. Got {got}. Run the bundle on the device again."
    raise RejectedError(msg) from cause


def _refuse_other_model(found: _Results, bundle: Bundle | None, place: Path, path: Path) -> None:
    """The hashes must be those of the model's files. A file on disk may have another name than in the bundle."""
    if bundle is not None:
        same, mine = dict(bundle.files) == found.model, dict(bundle.files)
    else:
        mine = {f.name: sha256(f) for f in artifact_at(place).files}
        same = sorted(mine.values()) == sorted(found.model.values())
    if not same:
        msg = f"{path} must be of the model at {place}, whose SHA-256 is {_sums(mine)}. Got results of {_sums(found.model)}. Import it with the bundle that ran."
        raise RejectedError(msg)


def _sums(files: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value[:12]}…" for name, value in files.items())


# ------------------------------------------------------------------------------------------------------------- latency


def _latency(found: _Results, where: str) -> tuple[list[str], list[dict[str, Any]], Measured]:
    """(flags, one row per series, the figure): of the last steady series, or of the steadiest where none is."""
    reasons = [disturbed(s.latencies_ms) for s in found.series]
    steady = [i for i, why in enumerate(reasons) if not why]
    used = steady[-1] if steady else min(range(len(reasons)), key=lambda i: range_of(found.series[i].latencies_ms))
    series, count = found.series[used], len(reasons)
    flags = [
        f"series {i + 1} of {count} {why} (throttling or other load): {'left out' if i != used else 'kept, since every series was disturbed'}"
        for i, why in enumerate(reasons)
        if why
    ]
    before, after = series.megahertz
    if before and after and after < 0.9 * before:
        flags.append(f"the clock fell from {before:.0f} to {after:.0f} MHz while it was measured")
    if found.throttled:
        flags.append("the device says that it was throttled since it started")
    title = TITLES.get(found.runtime.name, found.runtime.name)
    how = f"on the device: {protocol(found.threads, series.runs_per_reading)}, series {used + 1} of {count}; {title} {found.runtime.version}"
    if not steady:
        how += f"; unsteady: every series was disturbed, this one {reasons[used]}"
    rows = [_row(s, why, i == used) for i, (s, why) in enumerate(zip(found.series, reasons, strict=True))]
    return flags, rows, spread(list(series.latencies_ms), how, where)


def _row(series: _Series, why: str, used: bool) -> dict[str, Any]:
    low, middle, high = (float(q) for q in np.percentile(series.latencies_ms, (10, 50, 90)))
    return {
        "median_ms": middle,
        "p10_ms": low,
        "p90_ms": high,
        "n": len(series.latencies_ms),
        "disturbed": why,
        "used": used,
        "celsius": list(series.celsius),
        "megahertz": list(series.megahertz),
    }


def _machine(found: _Results) -> str:
    device = found.device
    cores = "cores not told" if device.cores is None else f"{device.cores} cores"
    parts = (device.name, device.cpu if device.cpu != device.name else "", cores, " ".join(device.isa), device.system)
    return ", ".join(p for p in parts if p)


def _stage(found: _Results) -> str:
    """One name for one device, runtime and thread count, so that a later import takes an earlier one's place."""
    words = f"device {found.device.name} {found.runtime.name} {found.threads}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:80]


# -------------------------------------------------------------------------------------------------------------- parity


class _Parity:
    """Distance of the device's outputs from the golden ones, output by output over all samples."""

    def __init__(self, tolerance: Tolerance) -> None:
        self.tolerance = tolerance
        self.error = self.scale = 0.0
        self.relative, self.cosine, self.samples = 0.0, 1.0, 0
        self.lost = 0.0
        """Error of an output as a share of what its golden values differ among themselves, where that is too much."""

    def add(self, got: Sequence[Array], golden: Sequence[Array]) -> None:
        """All samples of one output."""
        from paredown.export.distance import SPREAD, of_spread

        x = np.concatenate([a.astype(np.float64).ravel() for a in got])
        y = np.concatenate([a.astype(np.float64).ravel() for a in golden])
        error, scale = float(np.abs(x - y).max(initial=0.0)), float(np.abs(y).max(initial=0.0))
        norms = float(np.linalg.norm(x) * np.linalg.norm(y))
        self.error, self.scale = max(self.error, error), max(self.scale, scale)
        self.relative = max(self.relative, error / scale if scale else (0.0 if error == 0 else math.inf))
        self.cosine = min(self.cosine, float(x @ y) / norms if norms else float(bool((x == y).all())))
        share = of_spread(x, y)
        self.lost = max(self.lost, share if share > SPREAD else 0.0)
        self.samples = len(got)

    @property
    def holds(self) -> bool:
        bound = self.tolerance.max_error_of_scale
        if bound is not None:
            return self.relative <= bound
        return self.cosine >= (self.tolerance.cosine or 1.0) - 1e-12 and not self.lost

    @property
    def rule(self) -> str:
        bound = self.tolerance.max_error_of_scale
        return f"within {bound:g} of the output scale" if bound is not None else f"cosine ≥ {self.tolerance.cosine}"

    @property
    def got(self) -> str:
        lost = f", {self.lost:.2g} of what an output's values differ among themselves" if self.lost else ""
        return f"an error of {self.error:.3g} at scale {self.scale:.3g}, cosine {self.cosine:.6f}{lost}"

    def measured(self, where: str) -> dict[str, Measured]:
        """The two figures of a record."""
        how = f"worked out from the outputs that the device returned, {self.samples} golden sample(s)"
        return {
            "golden_max_error": Measured(
                value=self.error, unit="", n=self.samples, protocol=f"max |device - golden|; {how}", machine=where
            ),
            "golden_cosine": Measured(
                value=self.cosine, unit="", n=self.samples, protocol=f"smallest of the outputs; {how}", machine=where
            ),
        }

    def document(self) -> dict[str, Any]:
        """For details."""
        return {
            "max_error": self.error,
            "scale": self.scale,
            "cosine": self.cosine,
            "samples": self.samples,
            "rule": self.rule,
            "holds": self.holds,
        }


def _parity(found: _Results, bundle: Bundle, path: Path) -> _Parity:
    returned = found.outputs or []
    if len(returned) != bundle.num_golden:
        _refuse(path, f"outputs of {len(returned)} samples, {bundle.num_golden} golden ones were sent")
    specs = bundle.manifest["outputs"]
    got = [
        [_array(one, spec, path) for one, spec in zip(_all(row, specs, path), specs, strict=True)] for row in returned
    ]
    golden = [golden_outputs(bundle, n) for n in range(bundle.num_golden)]
    parity = _Parity(bundle.tolerance)
    for at in range(len(specs)):
        parity.add([row[at] for row in got], [row[at] for row in golden])
    _refuse_wrong_claims(found, got, golden, path)
    return parity


def _all(row: list[_Output], specs: Sequence[Any], path: Path) -> list[_Output]:
    if len(row) != len(specs):
        _refuse(path, f"{len(row)} outputs of a sample, the model has {len(specs)}")
    return row


def _array(one: _Output, spec: Mapping[str, Any], path: Path) -> Array:
    """The bytes of one output. Its shape and dtype must be those of the golden one; NaN and infinity are no answer."""
    if (one.dtype, one.shape) != (spec["dtype"], spec["shape"]):
        _refuse(
            path,
            f"an output {one.name!r} of {one.dtype} {one.shape}, the golden one is {spec['dtype']} {spec['shape']}",
        )
    try:
        data = base64.b64decode(one.data, validate=True)
        array = np.frombuffer(data, np.dtype(spec["dtype"]).newbyteorder("<")).reshape(one.shape)
    except ValueError as error:
        _refuse(path, f"an output {one.name!r} that has not the bytes of its shape", error)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        _refuse(path, f"NaN or infinity in the output {one.name!r}")
    return array


def _refuse_wrong_claims(
    found: _Results, got: Sequence[Sequence[Array]], golden: Sequence[Sequence[Array]], path: Path
) -> None:
    """What the runner printed on the device must be what its outputs say."""
    if found.claimed is None:
        return
    true = [
        [float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0)) for a, b in zip(x, y, strict=True)]
        for x, y in zip(got, golden, strict=True)
    ]
    if not (len(true) == len(found.claimed) and all(_alike(t, c) for t, c in zip(true, found.claimed, strict=True))):
        _refuse(path, "claimed errors that are not those of its outputs: it was edited")


def _alike(true: Sequence[float], claimed: Sequence[float | None]) -> bool:
    same = len(true) == len(claimed)
    return same and all(
        (c is None and t == 0.0) or (c is not None and math.isclose(t, c, rel_tol=1e-6, abs_tol=1e-12))
        for t, c in zip(true, claimed, strict=True)
    )


def _untested(bundle: Bundle | None) -> str:
    if bundle is None:
        return "the device's outputs: give the bundle instead of the model file"
    return "the device's outputs: the program that ran there writes none"


__all__ = ["LARGEST_BYTES", "import_results"]
