"""Kinds of model files, by the ending of their name: which files belong together, and which runtimes execute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paredown.errors import ParedownError, RejectedError, UsageError

if TYPE_CHECKING:
    from paredown.export.artifact import Artifact

TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "executorch": "ExecuTorch", "litert": "LiteRT"}
"""Runtimes as people call them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is known of all files with one ending."""

    target: str
    runtimes: tuple[str, ...]
    """Those that execute such a file, by the name of the Python module; the first is its own."""
    read: Callable[[Path], tuple[tuple[Path, ...], str]]
    """(the file and its side files, scheme), from what stands on disk."""
    requires: Callable[[Path], dict[str, Any]]
    """Versions of the format that a runtime must know, for a bundle's manifest."""
    program: str = ""
    """The runtime's own benchmark program for Android; "" where run_adb.sh knows none."""


def artifact_at(path: str | Path) -> Artifact:
    """A model file and its side files as an Artifact, as it stands on disk.

    Raises UsageError for another ending, RejectedError for a file that cannot be read, MissingError without its library.
    """
    from paredown.export.artifact import Artifact

    path = Path(path)
    kind = kind_of(path)
    files, scheme = kind.read(path)
    return Artifact(files=files, target=kind.target, scheme=scheme)


def kind_of(path: Path) -> Kind:
    """The table's entry for a file. Raises UsageError where there is none."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        msg = f"a model file must end in one of {', '.join(KINDS)}. Got {str(path)!r}."
        raise UsageError(msg)
    return kind


def _onnx(path: Path) -> tuple[tuple[Path, ...], str]:
    import onnx

    from paredown.examine import examine_onnx
    from paredown.export.artifact import SCHEME

    cost = examine_onnx(path)
    model = onnx.load(str(path), load_external_data=False)
    told = _known(next((p.value for p in model.metadata_props if p.key == SCHEME), ""))
    scheme = told or _onnx_scheme({op.rpartition("::")[2] for op in cost.ops}, _types_of_matrices(model))
    return tuple(path.parent / name for name in cost.files), scheme


def _known(scheme: str) -> str:
    """The scheme that a file says it has, where it is one; "" for anything else: then its ops are looked at."""
    from paredown.quantize.schemes import SCHEMES

    return scheme if scheme in SCHEMES else ""


def _onnx_scheme(ops: set[str], types: set[str]) -> str:
    marks = {
        "w4": {"MatMulNBits"},
        "int8-dynamic": {"DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul"},
        "int8": {"QuantizeLinear", "DequantizeLinear"},
    }
    found = next((name for name, known in marks.items() if known & ops), "fp16" if "FLOAT16" in types else "fp32")
    if found == "int8" and types & {"INT4", "UINT4"}:
        return "w4a8" if "QuantizeLinear" in ops else "w4"
    return found


def _types_of_matrices(model: Any) -> set[str]:
    """Types of the initializers that have two axes or more, as "FLOAT16"."""
    import onnx

    return {onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer if len(t.dims) > 1}


def _onnx_versions(path: Path) -> dict[str, Any]:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    sets = {o.domain or "ai.onnx": int(o.version) for o in model.opset_import}
    return {"ir_version": int(model.ir_version), "opsets": sets}


def _openvino(path: Path) -> tuple[tuple[Path, ...], str]:
    side = path.with_suffix(".bin")
    for file in (path, side):
        if not file.is_file():
            msg = f"an .xml file of OpenVINO must have its .bin beside it. {str(file)!r} is no file."
            raise UsageError(msg)
    import re

    from paredown.export.artifact import SCHEME

    text = path.read_text(encoding="utf-8", errors="replace")
    told = re.search(rf'<{SCHEME} value="([a-z0-9-]+)"', text)
    if told and _known(told.group(1)):
        return (path, side), told.group(1)
    halves = re.search(r'type="Const"[^>]*>\s*<data element_type="f16" shape="\d+, *\d', text)  # two axes or more
    return (path, side), "int8" if 'type="FakeQuantize"' in text else "fp16" if halves else "fp32"


def _openvino_versions(path: Path) -> dict[str, Any]:
    import re

    found = re.search(r'<net[^>]*\bversion="(\d+)"', path.read_text(encoding="utf-8", errors="replace"))
    return {"ir_version": int(found.group(1)) if found else None}


def _phone(path: Path) -> tuple[tuple[Path, ...], str]:
    """A .pte or .tflite file: one that paredown wrote holds its scheme, as text."""
    import re

    data = path.read_bytes()
    if data[4:8] not in (b"TFL3", *(b"ET%02d" % n for n in range(100))):
        msg = f"a .pte or .tflite file must begin as such. Got {data[4:8]!r} in {str(path)!r}."
        raise RejectedError(msg)
    found = re.search(rb'"scheme":"([a-z0-9-]+)"', data)
    return (path,), found.group(1).decode() if found else "fp32"


def _phone_versions(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"identifier": file.read(8)[4:].decode("ascii", "replace")}


KINDS: Mapping[str, Kind] = {
    ".onnx": Kind(
        target="onnxruntime-x86",
        runtimes=("onnxruntime", "openvino"),
        read=_onnx,
        requires=_onnx_versions,
        program="onnxruntime_perf_test",
    ),
    ".xml": Kind(target="openvino-x86", runtimes=("openvino",), read=_openvino, requires=_openvino_versions),
    ".pte": Kind(
        target="executorch-xnnpack",
        runtimes=("executorch",),
        read=_phone,
        requires=_phone_versions,
        program="executor_runner",
    ),
    ".tflite": Kind(
        target="litert", runtimes=("litert",), read=_phone, requires=_phone_versions, program="benchmark_model"
    ),
}
"""Ending of the name → kind of file."""


# --------------------------------------------------------------------------------------------------------------- feeds


def first_sample(samples: Any) -> Any:
    """(args, kwargs) of the first sample. Raises RejectedError where there is none."""
    from paredown.quantize.batches import each, length, rows

    for batch in each(samples):
        if length(batch):
            return rows(batch, slice(0, 1))
    msg = "measure must have at least one sample. Got 0 batches."
    raise RejectedError(msg)


def feed_of(session: Any, sample: Any) -> dict[str, Any]:
    """Arrays for one run: one sample, repeated where the file's batch is fixed to more."""
    return filled(session, sample)[0]


def filled(session: Any, sample: Any) -> tuple[dict[str, Any], int]:
    """(arrays for one run, how many times the sample is in them): the batch of a file that fixes it."""
    from paredown.export.session import as_feed

    wanted, batch = session.get_inputs(), 1
    feed = as_feed(wanted, *sample)
    for value in wanted:
        fixed = value.shape[0] if value.shape and isinstance(value.shape[0], int) else None
        if fixed and feed[value.name].shape[:1] == (1,) and fixed > 1:
            feed[value.name] = np.repeat(feed[value.name], fixed, axis=0)
            batch = fixed
    return feed, batch


def refuse_other_inputs(feeds: Mapping[str, Mapping[str, Any]]) -> None:
    """Files that take other inputs are not the same task: by name of the file, what each is fed. Raises RejectedError."""
    shapes = {name: {n: a.shape for n, a in feed.items()} for name, feed in feeds.items()}
    first = next(iter(shapes), "")
    for name, found in shapes.items():
        other = shapes[first]
        same = found == other if found.keys() == other.keys() else sorted(found.values()) == sorted(other.values())
        if not same:
            msg = f"the files to compare must take inputs of one shape. Got {_told(other)} for {first} and {_told(found)} for {name}. Export both with the same batch."
            raise RejectedError(msg)


def _told(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def run_once(session: Any, feed: Mapping[str, Any], name: str) -> list[Any]:
    """The outputs of one run. Raises RejectedError where the runtime refuses the samples (shape, type)."""
    try:
        return list(session.run(None, feed))
    except ParedownError:
        raise
    except Exception as error:
        got = {k: f"{v.dtype} {tuple(v.shape)}" for k, v in feed.items()}
        reason = (str(error).strip().splitlines() or ["no message"])[0][:300]
        msg = f"samples must be what the file takes. Got {got} for {name}: {reason}."
        raise RejectedError(msg) from error


__all__ = [
    "KINDS",
    "TITLES",
    "Kind",
    "artifact_at",
    "feed_of",
    "filled",
    "first_sample",
    "kind_of",
    "refuse_other_inputs",
    "run_once",
]
