"""Reading weights safely: safetensors checked by hand before anything is allocated, .pt files in a limited process.

Nothing here unpickles. `weights_process` runs torch.load(weights_only=True) in a process of its own and hands over a
safetensors file, which is checked like one from a stranger.
"""

from __future__ import annotations

import difflib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from paredown.errors import MissingError, RejectedError, ResourceError

HEADER_LIMIT_BYTES = 32 * 10**6
MOST_TENSORS = 200_000
MOST_AXES = 32
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_MAGIC = (
    (b"\x89HDF", "an HDF5 file (Keras)"),
    (b"\x93NUMPY", "a NumPy .npy file"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x7fELF", "an executable"),
    (b"%PDF", "a PDF"),
    (b"<", "an HTML or XML page (a failed download?)"),
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
)


class Weights(dict[str, Tensor]):
    """Tensors by name, CPU, each with its own storage (tied names share one), in the dtypes of the file.

    `path` is the file, `kind` "safetensors" or "state_dict", `notes` what was unwrapped or left out and which dtypes
    there are, `metadata` the texts that a safetensors file holds beside them.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        path: Path,
        kind: str,
        notes: tuple[str, ...] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.metadata = metadata or {}
        self.path = path
        self.kind = kind
        self.notes = notes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What `load_into` did."""

    num_tensors: int
    """Tensors of the model that were written."""
    prefix: str
    """Prefix taken off the names of the weights, or put before them ("+x."); "" for none."""
    missing: tuple[str, ...]
    """Names of the model without weights; empty when strict."""
    unexpected: tuple[str, ...]
    """Names of the weights without a place; empty when strict."""
    casts: tuple[str, ...]
    """dtype changes, as "float16 → float32: 12 tensors"."""
    notes: tuple[str, ...]


def read_weights(path: str | Path) -> Weights:
    """Tensors by name from a safetensors file or a `.pt`/`.pth` state_dict; which one is told by content, not by name.

    Checkpoints that hold {"state_dict": …} or {"model": …} are unwrapped, and `notes` says so. Tensors are on the CPU.
    A `.pt` is read by torch.load(weights_only=True) in a process with limits, never otherwise.

    Raises RejectedError (missing, empty, truncated, damaged, overlapping or oversized declarations, pickled modules,
    TorchScript, `.pt2`, complex, quantized or sparse tensors) and ResourceError (no time, memory or disk).

    >>> import tempfile; from safetensors.torch import save_file
    >>> folder = tempfile.TemporaryDirectory()
    >>> save_file({"a": torch.ones(2)}, f"{folder.name}/w.safetensors")
    >>> read_weights(f"{folder.name}/w.safetensors")
    {'a': tensor([1., 1.])}
    """
    path = Path(path)
    notes: tuple[str, ...] = ()
    metadata: dict[str, str] = {}
    try:
        _refuse_no_file(path)
        kind, what = _sniffed(path)
        if kind == "safetensors":
            tensors, metadata = _read_safetensors(path)
        elif kind == "state_dict":
            tensors, notes = _read_in_process(path)
        else:
            msg = f"weights must be a safetensors file or a state_dict (.pt, .pth). Got {what} at {str(path)!r}."
            raise RejectedError(msg)
    except OSError as error:
        msg = f"weights must be a readable file. Got {error.strerror or error} at {str(path)!r}."
        raise RejectedError(msg) from error
    counts = Counter(_dtype_name(t) for t in tensors.values())
    if set(counts) != {"float32"}:
        notes = (*notes, "dtypes kept: " + ", ".join(f"{n} × {d}" for d, n in sorted(counts.items())))
    return Weights(tensors, path=path, kind=kind, notes=notes, metadata=metadata)


def load_into(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    strict: bool = True,
    strip_prefix: bool | str = False,
) -> LoadReport:
    """Copy weights into a model's parameters and buffers by name; on any error the model is as it was.

    `strip_prefix` takes a prefix such as "module." off the names: True finds it, a string names it ("+backbone."
    is put before every name instead), False only says what would fit. Values take the model's dtypes where none changes
    by it (float16 into float32), or only digits of a float64 are lost; `casts` says so, and anything else is an error.
    With strict=False missing and unexpected names are reported; sizes must fit still. Of weights that the model ties, one
    name is enough.

    Raises RejectedError with a table of what does not fit, for NaN or infinite weights, and for tied ones that differ.

    >>> report = load_into(nn.Linear(2, 1), {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    >>> report.num_tensors
    2
    """
    # keep_vars: tied names are then one object
    places = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    path = getattr(weights, "path", None)
    source = repr(str(path)) if path is not None else "the given weights"
    prefix = _prefix(weights, places, strip_prefix, source)
    given, left_out = _stripped(weights, places, prefix)
    # older checkpoints lack the counter that batch norm keeps since PyTorch 0.4.1; the model's own is as good
    reached = {id(places[n]) for n in given if n in places}
    missing = [n for n, p in places.items() if id(p) not in reached and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in given if n not in places]
    sizes = [n for n in places if n in given and places[n].shape != given[n].shape]
    if sizes or (strict and (missing or unexpected)) or (places and not set(places) & set(given)):
        table = _table(type(model).__name__, source, places, given, (sizes, missing, unexpected))
        raise RejectedError(table + _fix(path, weights, places, given, sizes))
    _refuse_values(places, given, source)
    _refuse_untied(places, given, source)
    casts = Counter(
        (_dtype_name(given[n]), _dtype_name(p)) for n, p in places.items() if n in given and given[n].dtype != p.dtype
    )
    _put(model, {n: given[n] for n in places if n in given}, source)
    notes = tuple(getattr(weights, "notes", ()))
    return LoadReport(
        num_tensors=sum(n in given for n in places),
        prefix=prefix,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        casts=tuple(f"{a} → {b}: {n} tensors" for (a, b), n in sorted(casts.items())),
        notes=(*notes, f"without the prefix {prefix!r}, left out: {_some(left_out)}") if left_out else notes,
    )


# ------------------------------------------------------------------------------------------------------------- the path


def _refuse_no_file(path: Path) -> None:
    if path.is_dir():
        if _is_run(path):
            msg = f"weights must be a file. Got the paredown run {str(path)!r}. Use pare.load({str(path)!r}, model())."
            raise RejectedError(msg)
        found = sorted(p.name for p in path.iterdir() if p.suffix in _SUFFIXES)
        some = f"In it: {', '.join(found[:10])}" if found else f"No {', '.join(_SUFFIXES)} file is in it"
        msg = f"weights must be a file. Got the folder {str(path)!r}. {some}."
        raise RejectedError(msg)
    if not path.exists():
        names = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, 5, 0.5) or [n for n in names if n.endswith(_SUFFIXES)][:5]
        some = f"Nearest there: {', '.join(near)}" if near else "Nothing like it is there"
        msg = f"weights must be a file that exists. Got {str(path)!r}. {some}."
        raise RejectedError(msg)
    if not path.is_file():
        msg = f"weights must be a regular file. Got {str(path)!r}, which is a device, pipe or socket."
        raise RejectedError(msg)


def _is_run(folder: Path) -> bool:
    return (folder / "plan.json").is_file() and (folder / "form.json").is_file()


def _sniffed(path: Path) -> tuple[str, str]:
    """("safetensors" | "state_dict" | "", what it is) by content."""
    with path.open("rb") as stream:
        head = stream.read(512)
        size = os.fstat(stream.fileno()).st_size
    if size == 0:
        msg = f"weights must hold tensors. Got 0 bytes at {str(path)!r}."
        raise RejectedError(msg)
    if head.startswith(b"PK\x03\x04"):
        return "state_dict", "a zip archive"
    if head[8:9] == b"{" and not _is_text(head[:8]):  # a header length in letters would be exabytes
        return "safetensors", "a safetensors file"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "state_dict", "a pickle"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return "", what
    if head[257:262] == b"ustar":
        return "", "a tar archive"
    if head.lstrip()[:1] in (b"{", b"[") and _is_text(head):
        return "", "JSON text (an index of several files? Give one of them, or merge them)"
    if _is_text(head):
        return "", f"text that begins {head[:40]!r}"
    if path.suffix == ".safetensors":
        return "safetensors", "a damaged safetensors file"
    return "", f"{size:,} bytes of no known format that begin {head[:8].hex(' ')}"


def _is_text(head: bytes) -> bool:
    return all(9 <= b <= 126 for b in head)


# ---------------------------------------------------------------------------------------------------------- safetensors


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file, copied out of it, and its metadata; every declaration is checked before anything is allocated."""
    with path.open("rb") as stream:
        before = os.fstat(stream.fileno())
        header, start = _header(stream, before.st_size, path)
        metadata = header.pop("__metadata__", None)
        if not header:
            msg = f"weights must hold tensors. Got a safetensors file without any at {str(path)!r}."
            raise RejectedError(msg)
        places = _places(header, before.st_size - start, start, path)
        tensors = {}
        for name, dtype, shape, offset in places:
            stream.seek(start + offset)
            tensors[name] = _tensor(stream, dtype, shape, name, path)
        _refuse_changed(before, os.fstat(stream.fileno()), path)
    texts = metadata if isinstance(metadata, dict) else {}
    return tensors, {k: v for k, v in texts.items() if isinstance(v, str)}


def _header(stream: IO[bytes], size: int, path: Path) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8 or length > HEADER_LIMIT_BYTES:
        end = "holds too much" if length <= size - 8 else "is truncated or no safetensors file"
        msg = (
            f"a safetensors header must fit into its file and into {HEADER_LIMIT_BYTES:,} bytes. Got a length of "
            f"{length:,} at offset 0 in a file of {size:,} bytes, {str(path)!r}, which {end}."
        )
        raise RejectedError(msg)
    text = stream.read(length)
    # a parsed JSON takes many times its text: count before parsing
    counts = text.count(b"{"), text.count(b"["), text.count(b",")
    if counts[0] > MOST_TENSORS * 2 or counts[1] > MOST_TENSORS * 3 or counts[2] > MOST_TENSORS * 12:
        msg = f"a safetensors file must have at most {MOST_TENSORS:,} tensors. Got a header of {length:,} bytes with {counts[0]:,} objects at {str(path)!r}."
        raise RejectedError(msg)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        msg = f"a safetensors header must be JSON. Got {type(error).__name__}: {str(error)[:200]} at {str(path)!r}."
        raise RejectedError(msg) from error
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        msg = f"a safetensors header must be an object of at most {MOST_TENSORS:,} tensors. Got {type(header).__name__} at {str(path)!r}."
        raise RejectedError(msg)
    return header, 8 + length


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        repeated = next(n for n, count in Counter(k for k, _ in pairs).items() if count > 1)
        msg = f"the name {repeated[:100]!r} appears twice"
        raise ValueError(msg)
    return made


def _places(
    header: Mapping[str, Any], data_bytes: int, start: int, path: Path
) -> list[tuple[str, torch.dtype, tuple[int, ...], int]]:
    """(name, dtype, shape, offset) in file order; raises unless they tile the data exactly."""
    found = sorted((_place(name, entry, path) for name, entry in header.items()), key=lambda p: (p[3], p[4]))
    end = 0
    for name, _, _, first, last in found:
        if first != end:
            rule = "overlap" if first < end else "leave holes"
            msg = f"tensors of a safetensors file must not {rule}. Got {name!r} at bytes {first:,}–{last:,} after byte {end:,} at {str(path)!r}."
            raise RejectedError(msg)
        if last > data_bytes:
            msg = (
                f"a safetensors file must hold all its tensors. Got a file that ends at offset {start + data_bytes:,}, and {name!r} needs "
                f"offsets {start + first:,}–{start + last:,} at {str(path)!r}. It is truncated: copy it again."
            )
            raise RejectedError(msg)
        end = last
    if end != data_bytes:
        msg = f"a safetensors file must end with its last tensor. Got {data_bytes - end:,} bytes after offset {start + end:,} at {str(path)!r}."
        raise RejectedError(msg)
    return [(name, dtype, shape, first) for name, dtype, shape, first, _ in found]


def _place(name: str, entry: Any, path: Path) -> tuple[str, torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        msg = f"an entry of a safetensors header must have dtype, shape and data_offsets. Got {str(entry)[:100]} for {name[:100]!r} at {str(path)!r}."
        raise RejectedError(msg)
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = _DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        complexity = " Complex weights are refused." if str(entry["dtype"]).startswith("C") else ""
        msg = f"a dtype must be one of {', '.join(_DTYPES)}. Got {str(entry['dtype'])[:20]!r} for {name[:100]!r} at {str(path)!r}.{complexity}"
        raise RejectedError(msg)
    if not _counts(shape) or not _counts(offsets) or len(shape) > MOST_AXES or len(offsets) != 2:
        msg = f"shape and data_offsets must be lists of counts. Got {str(shape)[:80]} and {str(offsets)[:80]} for {name[:100]!r} at {str(path)!r}."
        raise RejectedError(msg)
    need = prod(shape) * dtype.itemsize
    if need != offsets[1] - offsets[0]:
        msg = (
            f"data_offsets must span shape × dtype. Got {offsets[1] - offsets[0]:,} bytes for {name[:100]!r} of shape {shape} and "
            f"{entry['dtype']}, which is {need:,} bytes, at {str(path)!r}."
        )
        raise RejectedError(msg)
    return name, dtype, tuple(shape), offsets[0], offsets[1]


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def _tensor(stream: IO[bytes], dtype: torch.dtype, shape: tuple[int, ...], name: str, path: Path) -> Tensor:
    try:
        raw = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        msg = f"weights must fit into memory. Got {name!r} of {prod(shape) * dtype.itemsize:,} bytes at {str(path)!r}."
        raise ResourceError(msg) from error
    if raw.numel() and stream.readinto(raw.numpy()) != raw.numel():  # type: ignore[attr-defined]
        msg = f"weights must not change while they are read. Got a file that became shorter at {str(path)!r}."
        raise RejectedError(msg)
    return raw.ne(0).reshape(shape) if dtype == torch.bool else raw.view(dtype).reshape(shape)


def _refuse_changed(before: os.stat_result, after: os.stat_result, path: Path) -> None:
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
        msg = f"weights must not change while they are read. Got a file that was written to meanwhile at {str(path)!r}."
        raise RejectedError(msg)


# ---------------------------------------------------------------------------------------------------------- the process


def _read_in_process(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors and notes of a .pt file, read by a process with limits that hands over a safetensors file."""
    before = path.stat()
    if not sys.executable:
        msg = "a .pt file must be read in a Python process of its own. Got no sys.executable here. Convert the file to safetensors."
        raise MissingError(msg)
    with tempfile.TemporaryDirectory(prefix="paredown-weights-") as folder:
        report = _run_process(path, Path(folder), before.st_size)
        if "refused" in report:
            msg = f"{str(report['refused']).rstrip('.')}. At {str(path)!r}."
            raise RejectedError(msg)
        tensors, _ = _read_safetensors(Path(folder) / "weights.safetensors")
    _refuse_changed(before, path.stat(), path)
    tensors.update({name: tensors[first] for name, first in report["aliases"].items()})
    return {name: tensors[name] for name in report["order"]}, tuple(report["notes"])


def _run_process(path: Path, folder: Path, file_bytes: int) -> dict[str, Any]:
    seconds = 120 + file_bytes // 10**7
    script = Path(__file__).with_name("weights_process.py")
    command = [sys.executable, "-P", str(script), str(path.resolve()), str(folder), str(seconds)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_FORCE")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        msg = f"weights must be readable in {seconds} s. Got no answer by then for {str(path)!r}. Convert the file to safetensors."
        raise ResourceError(msg) from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        msg = f"weights must be readable within limits of memory and time. Got {name} in the process that read {str(path)!r}."
        raise RejectedError(msg)
    if done.returncode:
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"])[-1]
        if "No space left" in last:
            msg = f"a temporary folder must have room for {file_bytes:,} bytes. Got: {last} at {str(folder.parent)!r}. Set TMPDIR."
            raise ResourceError(msg)
        msg = f"weights must be readable. Got {last[:300]!r} from the process that read {str(path)!r}."
        raise RejectedError(msg)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report


# ------------------------------------------------------------------------------------------------------------- load_into


def _prefix(weights: Mapping[str, Tensor], places: Mapping[str, Tensor], asked: bool | str, source: str) -> str:
    """The prefix to take off, "" for none."""
    if asked is False:
        return ""
    if isinstance(asked, str):
        if not asked.startswith("+") and not any(n.startswith(asked) for n in weights):
            msg = f"strip_prefix must begin a name of the weights. Got {asked!r}; they are {_some(list(weights))} in {source}."
            raise RejectedError(msg)
        return asked
    found = _fitting(weights, places)
    if len(found) > 1:
        msg = f"strip_prefix must name one of several prefixes that fit. Got True, and {_flags(found)} in {source}."
        raise RejectedError(msg)
    return found[0] if found else ""


def _stripped(
    weights: Mapping[str, Tensor], places: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights without the prefix; names that neither have it nor a place are left out (an EMA copy beside it)."""
    if not prefix:
        return dict(weights), []
    if prefix.startswith("+"):
        return {prefix[1:] + n: t for n, t in weights.items()}, []
    given = {n: t for n, t in weights.items() if n in places}
    given |= {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    return given, [n for n in weights if not n.startswith(prefix) and n not in places]


def _fitting(weights: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> list[str]:
    """The prefixes after which most names fit, and more than fit now; "+x." is put before the weights' names."""
    first = list(islice(places, 3))
    strips = {n[: -len(p)] for p in first for n in weights if n.endswith(f".{p}")}
    adds = {p[: -len(n)] for p in first for n in weights if p.endswith(f".{n}")}
    fits = {c: sum(n.removeprefix(c) in places for n in weights if n.startswith(c)) for c in sorted(strips)}
    fits |= {f"+{c}": sum(c + n in places for n in weights) for c in sorted(adds)}
    most, now = max(fits.values(), default=0), sum(n in places for n in weights)
    return [c for c, fit in fits.items() if fit == most > now]


def _flags(prefixes: list[str]) -> str:
    return " or ".join(f"--strip-prefix {p} (strip_prefix={p!r})" for p in prefixes)


def _table(
    model: str,
    source: str,
    places: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    misfits: tuple[list[str], list[str], list[str]],
) -> str:
    """What does not fit, ten rows at most."""
    sizes, missing, unexpected = misfits
    rows = [("size", n, f"model {list(places[n].shape)}, weights {list(given[n].shape)}") for n in sizes]
    rows += [("missing", n, f"model {list(places[n].shape)}") for n in missing]
    rows += [("unexpected", n, f"weights {list(given[n].shape)}") for n in unexpected]
    width = min(60, max((len(n) for _, n, _ in rows[:10]), default=0))
    table = "\n".join(f"  {kind:<10}  {name:<{width}}  {shapes}" for kind, name, shapes in rows[:10])
    more = f"\n  … and {len(rows) - 10} more" if len(rows) > 10 else ""
    head = f"the weights must fit {model}. Got {len(sizes)} of another size, {len(missing)} missing, {len(unexpected)} unexpected in {source}:"
    return f"{head}\n{table}{more}\n"


def _fix(
    path: Path | None,
    weights: Mapping[str, Tensor],
    places: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    sizes: list[str],
) -> str:
    if path is not None and _is_run(path.parent):
        folder = str(path.parent)
        return f"This is a paredown run: use pare.load({folder!r}, model()), which cuts the model by its plan first."
    prefixes = _fitting(weights, places)
    if prefixes:
        first = prefixes[0]
        if first.startswith("+"):
            name, there = next((n, first[1:] + n) for n in weights if first[1:] + n in places)
        else:
            name, there = next((n, n.removeprefix(first)) for n in weights if n.startswith(first))
        return f"Names fit with another prefix: {name} → {there}, and so on. To apply it: {_flags(prefixes)}."
    if sizes:
        layers = _some(sorted({n.rpartition(".")[0] or n for n in sizes}), 10)
        smaller = all(given[n].numel() < places[n].numel() and given[n].dim() == places[n].dim() for n in sizes)
        why = "Every one is smaller than the model's: the weights are of a pruned model. Use its own class"
        return f"Layers that differ: {layers}. {why if smaller else 'Build the model with the options of the weights'}."
    return "Build the model with the options of the weights, or pass strict=False to load what fits."


def _refuse_values(places: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """NaN and infinity; casts that change values by more than digits of a double."""
    both = [(n, given[n], p) for n, p in places.items() if n in given]
    bad = [n for n, t, _ in both if t.is_floating_point() and not bool(torch.isfinite(t.float()).all())]
    # a buffer may be infinite on purpose (an attention mask), then it is so in the fresh model as well
    bad = [n for n in bad if bool(torch.isfinite(places[n].float()).all())]
    if bad:
        msg = f"weights must be finite. Got NaN or infinity in {_some(bad)} of {source}. Load a checkpoint from before the training diverged."
        raise RejectedError(msg)
    bad = [f"{n} ({_dtype_name(t)} into {_dtype_name(p)})" for n, t, p in both if not _castable(t, p.dtype)]
    if bad:
        msg = f"dtypes must fit the model's. Got {_some(bad)} in {source}. Convert the model (model.half()) or the weights first."
        raise RejectedError(msg)


def _refuse_untied(places: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Several values for one tensor of the model: the last would win."""
    first: dict[int, str] = {}
    for name, place in places.items():
        if name not in given:
            continue
        other = first.setdefault(id(place), name)
        a, b = given[other], given[name]
        if a is not b and not torch.equal(a.to(place.dtype), b.to(place.dtype)):
            msg = f"weights that the model ties must be equal. Got different {other} and {name} in {source}, which were trained untied. Build the model without the tie, or leave one of them out."
            raise RejectedError(msg)


def _castable(given: Tensor, place: torch.dtype) -> bool:
    """Whether a cast keeps every value, or only drops digits of a float64; integer codes never become float weights."""
    if given.is_complex() or place.is_complex:
        return False
    if given.dtype == place or (given.dtype, place) == (torch.float64, torch.float32):
        return True
    if place.is_floating_point and not given.is_floating_point():
        return False
    return torch.equal(given.to(place).to(given.dtype), given)


def _put(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Through load_state_dict, so that a model's own hooks run; put back where a hook or a copy fails."""
    before = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    try:
        model.load_state_dict(state, strict=False)
    except Exception as error:
        with torch.no_grad():  # not through load_state_dict again: the hook that failed would fail again
            for tensor, kept in before:
                tensor.copy_(kept)
        what = f"{type(error).__name__}: {str(error)[:500]}"
        msg = f"the weights must fit {type(model).__name__}. Got {what} from {source}."
        raise RejectedError(msg) from error


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
