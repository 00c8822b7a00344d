"""Reading weights from files of strangers, and putting them into a model. Nothing is ever unpickled in this process.

safetensors is checked by hand before a byte is allocated. A .pt or .pth state_dict is read with weights_only=True in a
child process with limits on memory, time and file size (`weights_child.py`), which writes safetensors for this one.
"""

from __future__ import annotations

import difflib
import json
import math
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.errors import RejectedError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor, nn

MOST_HEADER_BYTES = 16 * 2**20
MOST_TENSORS = 50_000
MOST_SECONDS = 600
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_HOW = "Save it as torch.save(model.state_dict(), 'weights.pt') or as safetensors, and pass the class as MODEL package.module:callable with --weights."
_KNOWN = (
    (b"\x89HDF", "HDF5 (Keras)"),
    (b"GGUF", "GGUF"),
    (b"\x93NUMPY", "NumPy"),
    (b"\x1f\x8b", "gzip"),
    (b"\x08", "protobuf, perhaps ONNX"),
    (b"<", "HTML or XML, perhaps an error page that was downloaded"),
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Names to tensors from a safetensors file or a .pt/.pth state_dict; the format is told by the content.

    Tensors are on the CPU and keep their dtype. Warns where entries are left out. Raises RejectedError (missing, empty,
    truncated or damaged file, unknown format, whole-module pickle, quantized or sparse tensors) and ResourceError.
    """
    path = _existing(Path(path))
    with _opened(path) as file:
        head = file.read(64)
    if head[:4] == b"PK\x03\x04":
        return _from_zip(path)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _from_child(path)
    if len(head) >= 9 and head[8:9] == b"{":
        return _from_safetensors(path)
    kind = next((name for magic, name in _KNOWN if head.startswith(magic)), "an unknown format")
    msg = f"weights must be a safetensors file or a .pt/.pth state_dict. Got {kind} at {path} ({path.stat().st_size:,} bytes)."
    raise RejectedError(msg)


def load_into(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    strict: bool = True,
    prefix: str | None = None,
    source: Path | None = None,
) -> tuple[str, ...]:
    """Copy weights into the model, by name and shape; returns notes on what was converted or left out.

    `prefix` "module." reads only the names that begin so, without it; "+backbone." puts it before every name. Values
    take the dtype of the model's own tensors. strict=False leaves missing and unexpected names be; shapes must always
    fit. `source` is the file, to recognise a model that paredown pruned.

    Raises RejectedError with tables of what is missing, unexpected or of another shape, and the prefix that would fit.

    >>> from torch import nn
    >>> load_into(nn.Linear(2, 1), nn.Linear(2, 1).double().state_dict())
    ('converted 2 tensors from float64 to float32',)
    """
    own = {n: t for n, t in model.state_dict().items() if hasattr(t, "shape")}
    given = dict(weights) if prefix is None else _mapped(weights, prefix)
    counters = [n for n in own if n.endswith("num_batches_tracked") and n not in given]
    missing = [n for n in own if n not in given and n not in counters]
    unexpected = [n for n in given if n not in own]
    misfits = [n for n in own if n in given and own[n].shape != given[n].shape]
    if misfits or (strict and (missing or unexpected)):
        raise RejectedError(_unfit(model, own, given, missing, unexpected, misfits, source))
    notes = _conversions(own, given)
    state = {n: given[n] for n in own if n in given}
    model.load_state_dict({**{n: own[n] for n in own if n not in state}, **state}, strict=False)
    for what, names in (("kept as it was, not in the weights", missing), ("not used, not in the model", unexpected)):
        if names:
            notes.append(f"{what}: {_some(names)}")
    return tuple(notes)


# ---------------------------------------------------------------------------------------------------------- the file


def _existing(path: Path) -> Path:
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:
        msg = f"weights must be a path. Got {str(path)[:80]!r}…: {error}."
        raise RejectedError(msg) from error
    if is_folder:
        near = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth", ".bin"))
        hint = f"It holds {', '.join(near[:8])}." if near else "It holds no .safetensors, .pt or .pth file."
        msg = f"weights must be a file. Got the folder {path}. {hint}"
        raise RejectedError(msg)
    if not is_file:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
        hint = (
            f"Near it: {', '.join(near)}."
            if near
            else f"The folder {path.parent} {'holds nothing like it' if names else 'does not exist'}."
        )
        msg = f"weights must exist. Got {str(path)!r}. {hint}"
        raise RejectedError(msg)
    if path.stat().st_size == 0:
        msg = f"weights must hold data. Got 0 bytes at {path}."
        raise RejectedError(msg)
    return path


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        msg = f"weights must be readable. Got {error.strerror} at {path}."
        raise RejectedError(msg) from error


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    """Checked and read from the same bytes: the file may change under our hands."""
    size = path.stat().st_size
    with _opened(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST_HEADER_BYTES, size - 8):
            cap = (
                f"at most {MOST_HEADER_BYTES:,} bytes"
                if length > MOST_HEADER_BYTES
                else f"inside the file of {size:,} bytes"
            )
            msg = f"the header of a safetensors file must be {cap}. Got {length:,} bytes declared at offset 0 of {path}: damaged or truncated."
            raise RejectedError(msg)
        header = file.read(length)
        check_header(header, size - 8 - length, path)
        rest = file.read()
    import safetensors.torch

    try:
        return safetensors.torch.load(length.to_bytes(8, "little") + header + rest)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        msg = f"a safetensors file must be well formed. Got {error} at {path}."
        raise RejectedError(msg) from error


def check_header(header: bytes, data_bytes: int, path: Path) -> None:
    """The JSON of a safetensors file: every tensor inside the data, of the size its shape says, no overlap, no hole."""
    where = f"at {path}"
    try:
        entries = json.loads(header, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        msg = f"the header of a safetensors file must be JSON. Got {error} {where}."
        raise RejectedError(msg) from error
    if not isinstance(entries, dict) or len(entries) > MOST_TENSORS + 1:
        msg = f"a safetensors file must hold at most {MOST_TENSORS:,} tensors. Got {len(entries):,} {where}."
        raise RejectedError(msg)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        msg = f"the metadata of a safetensors file must be texts. Got something else {where}."
        raise RejectedError(msg)
    spans = sorted((*_span(name, entry, where), name) for name, entry in entries.items())
    end = 0
    for first, last, name in spans:
        if first != end:
            what = "overlaps the tensor before it" if first < end else "leaves a hole before it"
            msg = f"tensors must lie one after the other. Got {name!r} at {first}–{last}, which {what} (it ends at {end}), {where}."
            raise RejectedError(msg)
        end = last
    if end != data_bytes:
        what = "truncated" if end > data_bytes else "longer than its header says"
        msg = f"the data of a safetensors file must be {end:,} bytes, as its header says. Got {data_bytes:,} {where}: the file is {what}."
        raise RejectedError(msg)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        name = next(n for n, count in Counter(k for k, _ in pairs).items() if count > 1)
        msg = f"the name {name!r} twice"
        raise ValueError(msg)
    return made


def _span(name: str, entry: Any, where: str) -> tuple[int, int]:
    """First and last byte of a tensor, which must be as many as dtype and shape say."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        msg = f"a tensor must be described by dtype, shape and data_offsets. Got something else for {name[:80]!r} {where}."
        raise RejectedError(msg)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        msg = f"the dtype of {name[:80]!r} must be one of {', '.join(_ITEM_BYTES)}. Got {str(dtype)[:20]!r} {where}."
        raise RejectedError(msg)
    whole = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 and len(shape) <= 32
    if not whole or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets)):
        msg = f"shape and data_offsets of {name[:80]!r} must be whole numbers ≥ 0. Got {str(shape)[:60]} and {str(offsets)[:60]} {where}."
        raise RejectedError(msg)
    first, last = offsets
    wanted = math.prod(shape) * _ITEM_BYTES[dtype]
    if last - first != wanted:
        msg = f"the bytes of {name[:80]!r} must be shape × dtype = {wanted:,}. Got {last - first:,} (offsets {first}–{last}) {where}."
        raise RejectedError(msg)
    return first, last


# ------------------------------------------------------------------------------------------------------------- pickles


def _from_zip(path: Path) -> dict[str, Tensor]:
    """A ZIP of torch.save; everything else that is a ZIP is named and refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        msg = f"a ZIP of weights must be whole. Got {error} at {path} ({path.stat().st_size:,} bytes): truncated or damaged."
        raise RejectedError(msg) from error
    _check_entries(entries, path)
    leaves = {e.filename.rpartition("/")[2] for e in entries}
    names = [e.filename for e in entries]
    if any(n.endswith(".pt2") or "serialized_exported_program" in n or "archive_format" in n for n in names):
        msg = f"weights must be a state_dict. Got a torch.export archive (.pt2) at {path}: reading it would unpickle. {_HOW}"
        raise RejectedError(msg)
    if "constants.pkl" in leaves or any("/code/" in n for n in names):
        msg = f"weights must be a state_dict. Got a TorchScript archive at {path}. {_HOW}"
        raise RejectedError(msg)
    if "data.pkl" not in leaves:
        what = (
            "NumPy arrays (.npz)"
            if any(n.endswith(".npy") for n in names)
            else f"a ZIP of {', '.join(names[:4]) or 'nothing'}"
        )
        msg = f"weights must be a safetensors file or a .pt/.pth state_dict. Got {what} at {path}."
        raise RejectedError(msg)
    return _from_child(path)


def _check_entries(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """No bomb: torch stores without compression, so that the entries are together no larger than the file."""
    size = path.stat().st_size
    total = sum(e.file_size for e in entries)
    if len(entries) > 2 * MOST_TENSORS or total > 4 * size + 2**20:
        msg = f"a ZIP of weights must be what it says. Got {len(entries):,} entries of {total:,} bytes in a file of {size:,} bytes at {path}: refused as a bomb."
        raise RejectedError(msg)
    odd = [
        e.filename
        for e in entries
        if e.filename.startswith(("/", "\\")) or ".." in e.filename.replace("\\", "/").split("/")
    ]
    if odd:
        msg = f"names in a ZIP must stay inside it. Got {odd[0][:80]!r} at {path}."
        raise RejectedError(msg)


def _from_child(path: Path) -> dict[str, Tensor]:
    """A pickle, read by a limited child process; this process only ever reads the safetensors that it writes."""
    script = Path(__file__).with_name("weights_child.py")
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        out = Path(folder) / "weights.safetensors"
        command = [sys.executable, "-P", str(script), str(path.resolve()), str(out)]
        try:
            done = subprocess.run(
                command, capture_output=True, stdin=subprocess.DEVNULL, timeout=MOST_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            msg = f"weights must be read within {MOST_SECONDS} s. They were not, at {path}."
            raise ResourceError(msg) from error
        answer = _answer(done.stdout)
        if not answer.get("ok"):
            raise _refusal(answer, done.returncode, path)
        for note in answer.get("notes", ()):
            warnings.warn(f"{path.name}: {note}", stacklevel=4)
        return _from_safetensors(out)


def _answer(stdout: bytes) -> dict[str, Any]:
    try:
        found = json.loads(stdout.decode().splitlines()[-1])
    except (ValueError, IndexError):
        return {}  # the child died before it could answer: its exit code is reported
    return found if isinstance(found, dict) else {}


def _refusal(answer: Mapping[str, Any], code: int, path: Path) -> RejectedError | ResourceError:
    kind, detail = answer.get("error"), str(answer.get("detail", ""))[:300]
    if kind == "global":
        return RejectedError(
            f"weights must be a state_dict, names to tensors. Got a pickle that asks for {detail!r} at {path}: a whole "
            f"module, or code. Nothing of it was executed; paredown never unpickles. {_HOW}"
        )
    if kind == "content":
        return RejectedError(f"weights must be a state_dict of plain tensors. Got {detail} at {path}. {_HOW}")
    if kind == "memory" or (kind is None and code < 0):
        how = detail or f"signal {-code}"
        return ResourceError(f"weights must fit the limits of the process that reads them. Got {how} at {path}.")
    return RejectedError(
        f"weights must be a whole file of torch.save. Got {detail or f'exit code {code}'} at {path}: truncated or damaged."
    )


# ------------------------------------------------------------------------------------------------------ into the model


def _mapped(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if prefix.startswith("+"):
        return {prefix[1:] + n: t for n, t in weights.items()}
    found = {n[len(prefix) :]: t for n, t in weights.items() if n.startswith(prefix)}
    if not found:
        msg = f"the prefix must begin a name in the weights. Got {prefix!r}; names are {_some(list(weights))}."
        raise RejectedError(msg)
    return found


def fitting_prefixes(own: Iterable[str], given: Iterable[str]) -> list[str]:
    """Prefixes after which all of the model's names are in the weights; "+x." is put before the weights' names.

    >>> fitting_prefixes(["a.weight"], ["module.a.weight", "ema.a.weight"])
    ['module.', 'ema.']
    """
    wanted = [n for n in own if not n.endswith("num_batches_tracked")]
    there = dict.fromkeys(given)
    if not wanted:
        return []
    first = wanted[0]
    strips = [n[: -len(first)] for n in there if n.endswith(first) and n != first]
    fitting = [p for p in dict.fromkeys(strips) if all(p + n in there for n in wanted)]
    adds = dict.fromkeys(first[: -len(n)] for n in there if first.endswith(n) and n != first)
    return fitting + [f"+{p}" for p in adds if all(n.startswith(p) and n[len(p) :] in there for n in wanted)]


def _unfit(
    model: nn.Module,
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    misfits: list[str],
    source: Path | None,
) -> str:
    where = f" of {source}" if source is not None else ""
    lines = [f"the weights{where} must fit {type(model).__name__} by name and shape. Got:"]
    lines += _table("missing from the weights", [f"{n} {tuple(own[n].shape)}" for n in missing])
    lines += _table("not in the model", [f"{n} {tuple(given[n].shape)}" for n in unexpected])
    lines += _table(
        "of another shape", [f"{n}: model {tuple(own[n].shape)}, weights {tuple(given[n].shape)}" for n in misfits]
    )
    prefixes = fitting_prefixes(own, given) if missing else []
    for prefix in prefixes:
        example = next(iter(own))
        how = (
            f"{prefix[1:]} before every name" if prefix.startswith("+") else f"{prefix}{example} → {example}, and so on"
        )
        lines.append(f"All names fit with this mapping: {how}. To apply it: --prefix {prefix}  (prefix={prefix!r})")
    if misfits:
        lines.append(_pruned_hint(own, given, misfits, source))
    elif not prefixes:
        lines.append("Pass the weights of this very class, or strict=False to load what fits.")
    return "\n".join(lines)


def _pruned_hint(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], misfits: list[str], source: Path | None
) -> str:
    """Whether the shapes differ because the weights are of a pruned model."""
    if source is not None and (source.parent / "plan.json").is_file():
        folder = source.parent
        return f"There is a plan.json beside the file: paredown pruned this model. Load it with paredown.load({str(folder)!r}, model)."
    smaller = all(
        len(own[n].shape) == len(given[n].shape)
        and all(a <= b for a, b in zip(given[n].shape, own[n].shape, strict=True))
        for n in misfits
    )
    if smaller:
        return "Every differing tensor is smaller than the model's: the weights look pruned already. Pass the pruned model's own class."
    return "Pass the weights of a model of the same sizes."


def _conversions(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Notes on dtypes that change; refuses what has no meaning as the model's dtype."""
    changed: Counter[tuple[str, str]] = Counter()
    for name, tensor in own.items():
        if name not in given or given[name].dtype == tensor.dtype:
            continue
        came = given[name]
        if came.is_complex() != tensor.is_complex() or (tensor.is_floating_point() and not came.is_floating_point()):
            msg = f"weights must be of the model's kind. Got {_dtype(came)} for {name}, which is {_dtype(tensor)}: complex, or quantized already."
            raise RejectedError(msg)
        changed[_dtype(came), _dtype(tensor)] += 1
    return [f"converted {count} tensors from {a} to {b}" for (a, b), count in sorted(changed.items())]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _table(title: str, rows: list[str], most: int = 10) -> list[str]:
    if not rows:
        return []
    more = [f"    … and {len(rows) - most} more"] if len(rows) > most else []
    return [f"  {len(rows)} {title}:", *(f"    {row}" for row in rows[:most]), *more]


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
