"""A bundle for a device: the model, golden inputs and outputs, tolerances, preprocessing, checksums and runner scripts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paredown.errors import RejectedError, UsageError
from paredown.measure.bundled.runner import sha256
from paredown.measure.kinds import TITLES, artifact_at, feed_of, kind_of, run_once
from paredown.measure.machine import machine_text

if TYPE_CHECKING:
    from paredown.export.artifact import Artifact
    from paredown.quantize.batches import Batches

SCHEMA = 1
FORMAT = "paredown-bundle"
MANIFEST = "manifest.json"
SCRIPTS = ("runner.py", "run_local.sh", "run_ssh.sh", "run_adb.sh")
NOT_GIVEN = "not given"
Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a device's answer may be from the golden one: exactly one of the two is set."""

    max_error_of_scale: float | None = None
    """max |device - golden| ≤ this × max |golden|, over all samples of one output."""
    cosine: float | None = None
    """Smallest cosine similarity of one output, over all samples."""

    def __post_init__(self) -> None:
        given = [v for v in (self.max_error_of_scale, self.cosine) if v is not None]
        if len(given) != 1 or not 0 < given[0] <= 1:
            msg = f"a tolerance must be one number in (0, 1], max_error_of_scale or cosine. Got {dataclasses.asdict(self)}."
            raise UsageError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A folder to carry to a device."""

    folder: Path
    files: Mapping[str, str]
    """Name → SHA-256 of the model's files: what a result must be of."""
    runtime: str
    scheme: str
    num_golden: int
    tolerance: Tolerance
    size_bytes: int
    """Of everything in the folder, by stat."""
    manifest: Mapping[str, Any]
    """All of manifest.json (docs/bundle.md)."""


def bundle(
    artifact: Artifact | str | Path,
    samples: Batches,
    *,
    out: str | Path,
    num_golden: int = 8,
    tolerance: Tolerance | None = None,
    preprocessing: Mapping[str, Any] | str | None = None,
    overwrite: bool = False,
) -> Bundle:
    """Write a folder with the model, golden inputs and outputs, tolerances, checksums and scripts that run it on a device.

    Golden outputs are what the file answers in its own runtime on this machine, for the first `num_golden` samples, one
    at a time. `tolerance`: float files 1e-4 (fp16 1e-2, w4 1e-3) of the largest output, others a cosine of 0.999, as
    `check` holds them; an .onnx file in codes that amplifies rounding, twice as far as it is from itself on these samples with
    its float results disturbed by a part in a million, at least 0.98 (`tolerance_because` in the manifest says so). `preprocessing` is your own text or JSON and travels as it is; without it the manifest says "not
    given". The folder appears whole or not at all; the samples in it are yours to show or not.

    Raises UsageError (out exists, num_golden), RejectedError (no samples, NaN in inputs or outputs), MissingError.

    >>> import tempfile, torch
    >>> from torch import nn
    >>> from paredown.export import export
    >>> folder = Path(tempfile.mkdtemp())
    >>> artifact = export((nn.Linear(4, 2), torch.zeros(2, 4)), folder / "net.onnx")
    >>> made = bundle(artifact, torch.randn(3, 4), out=folder / "bundle")
    >>> made.num_golden, sorted(p.name for p in made.folder.glob("*.sh"))
    (3, ['run_adb.sh', 'run_local.sh', 'run_ssh.sh'])
    """
    artifact = artifact_at(artifact) if isinstance(artifact, str | Path) else artifact
    out = Path(out)
    _refuse_place(out, overwrite=overwrite)
    if num_golden < 1:
        msg = f"num_golden must be an integer ≥ 1. Got {num_golden}."
        raise UsageError(msg)
    text = _preprocessing(preprocessing)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle") as temporary:
        folder = Path(temporary) / "bundle"
        folder.mkdir()
        names = _copy_model(artifact, folder)
        manifest = _golden(artifact, samples, num_golden, folder)
        for script in SCRIPTS:
            shutil.copyfile(Path(__file__).with_name("bundled") / script, folder / script)
            (folder / script).chmod(0o755)
        limit, because = (tolerance, "") if tolerance is not None else _usual(artifact, folder, manifest)
        manifest = _manifest(artifact, folder, names, manifest, limit, text)
        manifest |= {"tolerance_because": because} if because else {}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        folder.replace(out)
    return read_bundle(out)


def read_bundle(folder: str | Path) -> Bundle:
    """A bundle as it stands on disk, every checksum compared.

    Raises UsageError where the folder is none, RejectedError where a file is missing or changed, or of a newer schema.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        msg = f"a bundle must be a folder with {MANIFEST}. Got {str(folder)!r}. `paredown bundle` writes one."
        raise UsageError(msg)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["schema"] != SCHEMA:
            msg = f"{path} must be of format {FORMAT!r}, schema {SCHEMA}. Got {manifest['format']!r}, {manifest['schema']!r}. A newer paredown may read it."
            raise RejectedError(msg)
        found = Bundle(
            folder=folder,
            files=dict(manifest["model"]["files"]),
            runtime=str(manifest["model"]["runtime"]),
            scheme=str(manifest["model"]["scheme"]),
            num_golden=len(manifest["golden"]),
            tolerance=Tolerance(**manifest["tolerance"]),
            size_bytes=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
            manifest=manifest,
        )
        listed = dict(manifest["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, RejectedError):
            raise
        msg = f"{path} must be the manifest that paredown wrote. Got {type(error).__name__}: {error}."
        raise RejectedError(msg) from error
    for name, expected in listed.items():
        _refuse_changed(folder, name, expected)
    return found


def golden_outputs(found: Bundle, number: int) -> list[Array]:
    """The golden outputs of one sample, in the order of the manifest."""
    files = found.manifest["golden"][number]["outputs"]
    return [_read(found.folder / f, spec) for f, spec in zip(files, found.manifest["outputs"], strict=True)]


def default_tolerance(scheme: str) -> Tolerance:
    """What `check` asks of a file of that scheme."""
    from paredown.export.distance import COSINE
    from paredown.export.onnxruntime import TOLERANCES

    bound = {"fp16": 1e-2, **TOLERANCES}.get(scheme)
    return Tolerance(cosine=COSINE) if bound is None else Tolerance(max_error_of_scale=bound)


def _usual(artifact: Artifact, folder: Path, golden: Mapping[str, Any]) -> tuple[Tolerance, str]:
    """What a device is held to where nobody says, and why it is less than usual for a network that amplifies rounding."""
    usual = default_tolerance(artifact.scheme)
    if usual.cosine is None:
        return usual, ""
    from paredown.export.own_rounding import excused_between_runtimes

    feeds = [
        {s["name"]: _read(folder / f, s) for f, s in zip(one["inputs"], golden["inputs"], strict=True)}
        for one in golden["golden"]
    ]
    cosine, because = excused_between_runtimes(artifact.path, feeds)
    return Tolerance(cosine=min(cosine, usual.cosine)), because


# ------------------------------------------------------------------------------------------------------------- writing


def _refuse_place(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        msg = f"out must be a new folder. Got {str(out)!r}, which exists. Choose another, or overwrite."
        raise UsageError(msg)
    if not out.is_dir() or not ((out / MANIFEST).is_file() or not any(out.iterdir())):
        msg = f"out must be a bundle to be overwritten. Got {str(out)!r}, which is something else. Choose another."
        raise UsageError(msg)


def _preprocessing(given: Mapping[str, Any] | str | None) -> Any:
    if given is None:
        return NOT_GIVEN
    try:
        return json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError) as error:
        msg = f"preprocessing must be text or JSON. Got {type(error).__name__}: {error}."
        raise UsageError(msg) from error


def _copy_model(artifact: Artifact, folder: Path) -> list[str]:
    """The model as model.SUFFIX; side files that the model names stay where it names them, OpenVINO's is named after it."""
    names, place = [], artifact.path.parent
    for number, file in enumerate(artifact.files):
        twin = artifact.path.suffix.lower() == ".xml" and file.suffix == ".bin"
        near = file.relative_to(place).as_posix() if file.is_relative_to(place) else file.name
        name = f"model{file.suffix.lower()}" if number == 0 or twin else near
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
        names.append(name)
    return names


def _golden(artifact: Artifact, samples: Batches, most: int, folder: Path) -> dict[str, Any]:
    """Run the samples one by one and keep inputs and outputs; what the manifest says of them."""
    from paredown.export.session import STRUCTURE, leaf_names, open_session

    session = open_session(artifact.path)
    meta = session.metadata if hasattr(session, "metadata") else session.get_modelmeta().custom_metadata_map
    named = leaf_names(json.loads(meta[STRUCTURE]) if STRUCTURE in meta else 0)
    golden: list[dict[str, list[str]]] = []
    inputs: list[dict[str, Any]] = []
    outputs: list[dict[str, Any]] = []
    for number, sample in enumerate(_singles(samples, most)):
        feed = {name: np.ascontiguousarray(array) for name, array in feed_of(session, sample).items()}
        answers = [np.ascontiguousarray(a) for a in run_once(session, feed, artifact.path.name)]
        _refuse_odd({f"input {n}": a for n, a in feed.items()}, number)
        _refuse_odd({f"output {i}": a for i, a in enumerate(answers)}, number)
        specs = (
            [_spec(n, a) for n, a in feed.items()],
            [_spec(named.get(i, f"output_{i}"), a) for i, a in enumerate(answers)],
        )
        if not golden:
            inputs, outputs = specs
        elif specs != (inputs, outputs):
            msg = (
                f"all samples must have one shape. Got {specs} for sample {number}, {(inputs, outputs)} for the first."
            )
            raise RejectedError(msg)
        golden.append(
            {
                "inputs": _write(folder, number, "input", list(feed.values())),
                "outputs": _write(folder, number, "output", answers),
            }
        )
        if artifact.path.suffix.lower() == ".onnx":
            _write_protobuf(folder / f"test_data_set_{number}", feed, answers, outputs)
    if not golden:
        msg = "a bundle must have at least one sample. Got 0 batches."
        raise RejectedError(msg)
    return {"inputs": inputs, "outputs": outputs, "golden": golden}


def _singles(samples: Batches, most: int) -> Iterator[Any]:
    from paredown.quantize.batches import each, length, rows

    left = most
    for batch in each(samples):
        for at in range(min(length(batch), left)):
            yield rows(batch, slice(at, at + 1))
        left -= min(length(batch), left)
        if not left:
            return


def _spec(name: str, array: Array) -> dict[str, Any]:
    return {"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}


def _refuse_odd(arrays: Mapping[str, Array], number: int) -> None:
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            msg = f"golden values must be finite. Got NaN or infinity in {name} of sample {number}."
            raise RejectedError(msg)


def _write(folder: Path, number: int, what: str, arrays: Sequence[Array]) -> list[str]:
    """Raw little-endian bytes, C order: golden/0/input_0.bin."""
    names = []
    for at, array in enumerate(arrays):
        name = f"golden/{number}/{what}_{at}.bin"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(array.astype(array.dtype.newbyteorder("<")).tobytes())
        names.append(name)
    return names


def _write_protobuf(folder: Path, feed: Mapping[str, Array], answers: Sequence[Array], specs: Sequence[Any]) -> None:
    """The same as TensorProto, where onnxruntime_perf_test and onnx_test_runner look for it."""
    from onnx import numpy_helper

    folder.mkdir()
    for at, (name, array) in enumerate(feed.items()):
        (folder / f"input_{at}.pb").write_bytes(numpy_helper.from_array(array, name).SerializeToString())
    for at, (spec, array) in enumerate(zip(specs, answers, strict=True)):
        (folder / f"output_{at}.pb").write_bytes(numpy_helper.from_array(array, spec["name"]).SerializeToString())


def _read(path: Path, spec: Mapping[str, Any]) -> Array:
    return np.fromfile(path, np.dtype(spec["dtype"]).newbyteorder("<")).reshape(spec["shape"])


def _manifest(
    artifact: Artifact, folder: Path, names: list[str], golden: dict[str, Any], tolerance: Tolerance, preprocessing: Any
) -> dict[str, Any]:
    kind = kind_of(artifact.path)
    every = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    sums = {name: sha256(folder / name) for name in every}
    runtime = kind.runtimes[0]
    return {
        "schema": SCHEMA,
        "format": FORMAT,
        "model": {
            "file": names[0],
            "files": {name: sums[name] for name in names},
            "runtime": runtime,
            "scheme": artifact.scheme,
            "bytes": artifact.size_bytes,
        },
        "requires": kind.requires(artifact.path),
        "golden_from": {
            "runtime": f"{TITLES[runtime]} {_version(runtime)}".strip(),
            "machine": machine_text(),
        },
        **golden,
        "tolerance": {k: v for k, v in dataclasses.asdict(tolerance).items() if v is not None},
        "preprocessing": preprocessing,
        "program": kind.program,
        "files": sums,
    }


def _version(runtime: str) -> str:
    """ "" where the runtime lives in an environment of its own."""
    try:
        return importlib.metadata.version(runtime)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _refuse_changed(folder: Path, name: str, expected: str) -> None:
    path = folder / name
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not inside or not path.is_file() or sha256(path) != expected:
        msg = f"every file of a bundle must be as it was written. {name!r} in {str(folder)!r} is missing or changed. Write the bundle again."
        raise RejectedError(msg)


__all__ = ["Bundle", "Tolerance", "bundle", "default_tolerance", "golden_outputs", "read_bundle"]
