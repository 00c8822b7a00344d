"""The process that reads a .pt or .pth file: started by `weights`, never imported by it.

It looks first (zip directory, pickle opcodes; nothing is looked up or called) and refuses with a reason; only then
torch.load(weights_only=True) runs, under limits of memory, processor time and file size. What comes out is a
safetensors file, which the parent validates like any other, and a report in JSON. Nothing falls back to a full unpickle.

usage: python -P weights_process.py FILE OUT_FOLDER CPU_SECONDS
"""

from __future__ import annotations

import json
import pickletools
import re
import signal
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

PICKLE_LIMIT_BYTES = 64 * 10**6
MOST_ENTRIES = 200_000
MOST_OPCODES = 20_000_000
UNPACK_RATIO = 4
SLACK_BYTES = 1 << 20
_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "params",
    "weights",
    "state_dict_ema",
    "model_ema",
    "ema",
)
_FIX = (
    "In the program that made it: torch.save(model.state_dict(), 'weights.pt'), or safetensors; then give the class "
    "as MODEL (package.module:callable) and that file as weights"
)
_TENSOR_NAMES = re.compile(
    r"torch (\w+Storage|Size|Tensor|device|bool|b?float\w*|half|double|u?int\d+|long|short|complex\w*|qu?int\w+|per_\w+)"
    r"|torch\._utils _rebuild_\w+|torch\._tensor _rebuild_from_type_v2|torch\.storage \w+Storage"
    r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout|collections (OrderedDict|Counter)"
    r"|_codecs encode|(builtins|__builtin__) (bytearray|set|complex)"
)


class Refused(Exception):
    """The file cannot be accepted; the message is a sentence for the user."""


def main(file: Path, out: Path, cpu_seconds: int) -> None:
    """Write OUT/weights.safetensors and OUT/report.json: {"notes", "aliases", "order"} or {"refused"}."""
    file_bytes = file.stat().st_size
    _limit(file_bytes, cpu_seconds)
    try:
        report = _convert(file, file_bytes, out)
    except Refused as refusal:
        report = {"refused": str(refusal)}
    except (MemoryError, RecursionError) as error:
        report = {
            "refused": f"a file of {file_bytes:,} bytes must be readable in {UNPACK_RATIO} times its size. Got {type(error).__name__}"
        }
    (out / "report.json").write_text(json.dumps(report), encoding="utf-8")


def _convert(file: Path, file_bytes: int, out: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        zipped = stream.read(4) == b"PK\x03\x04"
    names = _names_in_zip(file, file_bytes) if zipped else _names_in_legacy(file)
    _refuse_names(names)
    state, notes = _load(file)
    return _write(state, notes, file_bytes, out)


# ------------------------------------------------------------------------------------------------------ looking, stdlib


def _names_in_zip(file: Path, file_bytes: int) -> set[str]:
    """Every global that the pickle of a zipped checkpoint names."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _refuse_archive(entries, file_bytes)
            pickles = [e for e in entries if e.filename.rsplit("/", 1)[-1] == "data.pkl"]
            if len(pickles) != 1 or pickles[0].file_size > PICKLE_LIMIT_BYTES:
                msg = f"a checkpoint must hold one data.pkl of at most {PICKLE_LIMIT_BYTES:,} bytes. Got {[e.file_size for e in pickles]} bytes"
                raise Refused(msg)
            with archive.open(pickles[0]) as stream:
                return _globals(stream)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, OSError) as error:
        msg = f"a zipped checkpoint must be whole. Got {file_bytes:,} bytes that end before the archive does, or are damaged ({error})"
        raise Refused(msg) from error


def _refuse_archive(entries: list[zipfile.ZipInfo], file_bytes: int) -> None:
    names = [e.filename for e in entries]
    tails = {n.rsplit("/", 1)[-1] for n in names}
    if len(names) > MOST_ENTRIES or len(set(names)) != len(names):
        msg = f"an archive must hold at most {MOST_ENTRIES:,} entries of different names. Got {len(names):,}, {len(set(names)):,} different"
        raise Refused(msg)
    declared, packed = sum(e.file_size for e in entries), sum(e.compress_size for e in entries)
    if declared > UNPACK_RATIO * file_bytes + SLACK_BYTES or packed > file_bytes:
        msg = (
            f"an archive must not unpack to more than {UNPACK_RATIO} times its size, nor its entries overlap. Got {declared:,} bytes "
            f"declared in a file of {file_bytes:,} (a zip bomb?)"
        )
        raise Refused(msg)
    if {"archive_format", "serialized_exported_program.json"} & tails or any(
        "/models/" in f"/{n}" and n.endswith(".json") for n in names
    ):
        msg = (
            "weights must be a safetensors file or a state_dict. Got a .pt2 archive of torch.export, whose reader unpickles. "
            "Save exported.state_dict with safetensors, or capture the model from its class"
        )
        raise Refused(msg)
    odd = [n for n in names if n.startswith(("/", "\\")) or ".." in n.replace("\\", "/").split("/")]
    if odd:
        msg = f"names in an archive must stay inside it. Got {odd[0][:80]!r}"
        raise Refused(msg)
    if "constants.pkl" in tails or any("/code/" in f"/{n}" for n in names):
        msg = f"weights must be a state_dict. Got a TorchScript archive, which holds code. {_FIX}"
        raise Refused(msg)
    if "data.pkl" not in tails:
        kind = (
            "a NumPy .npz archive"
            if any(n.endswith(".npy") for n in names)
            else f"a zip archive with {sorted(names)[:3]}"
        )
        msg = f"weights must be a safetensors file or a state_dict. Got {kind}. {_FIX}"
        raise Refused(msg)


def _names_in_legacy(file: Path) -> set[str]:
    """Every global in the five pickles at the head of a checkpoint written before PyTorch 1.6."""
    found: set[str] = set()
    with file.open("rb") as stream:
        for _ in range(5):
            found |= _globals(stream)
            if any(not _TENSOR_NAMES.fullmatch(n) for n in found):
                break
    return found


def _globals(stream: IO[bytes]) -> set[str]:
    """The globals of one pickle as "module name", read opcode by opcode: no name is looked up."""
    found: set[str] = set()
    strings: list[str] = []
    count = 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            count += 1
            if count > MOST_OPCODES:
                msg = f"a checkpoint's pickle must have at most {MOST_OPCODES:,} opcodes. Got more"
                raise Refused(msg)
            if opcode.name in ("GLOBAL", "INST"):
                found.add(str(argument))
            elif opcode.name == "STACK_GLOBAL":  # protocol 4; what lies on the stack is only guessed, for the message
                found.add(" ".join(strings[-2:]) or "a computed name")
            elif isinstance(argument, str):
                strings = [*strings[-1:], argument]
    except (ValueError, UnicodeDecodeError, IndexError) as error:
        msg = f"a checkpoint's pickle must be whole. Got one that breaks after {count:,} opcodes ({error}): the file is truncated, damaged or not written by torch.save"
        raise Refused(msg) from error
    return found


def _refuse_names(names: set[str]) -> None:
    foreign = sorted(n.replace(" ", ".") for n in names if not _TENSOR_NAMES.fullmatch(n))
    if not foreign:
        return
    some = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
    if any(n.startswith(("torch.nn.", "torchvision.", "timm.")) for n in foreign):
        msg = f"weights must be a state_dict. Got a whole pickled module, which runs code when it is read (it names {some}). {_FIX}"
    else:
        msg = f"a checkpoint must name tensors only. Got a pickle that asks to import {some}; nothing of it was run. {_FIX}"
    raise Refused(msg)


# ------------------------------------------------------------------------------------------------------- reading, torch


def _load(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The state_dict in a checkpoint, and what was unwrapped or left out."""
    _limit_memory(None)  # the libraries of torch map several GB, which depends on the build
    import torch

    _limit_memory(UNPACK_RATIO * file.stat().st_size + (1 << 30))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError … for damaged files
        first = str(error).strip().splitlines() or [""]
        msg = f"a checkpoint must be readable with weights_only. Got {type(error).__name__}: {first[0][:300]}"
        raise Refused(msg) from error
    return _unwrapped(loaded)


def _unwrapped(loaded: Any) -> tuple[dict[str, Any], list[str]]:
    from torch import Tensor

    notes: list[str] = []
    for _ in range(4):
        if not isinstance(loaded, Mapping):
            msg = f"a checkpoint must hold a state_dict, names to tensors. Got {type(loaded).__name__}. {_FIX}"
            raise Refused(msg)
        tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
        inner = [k for k in _WRAPPERS if isinstance(loaded.get(k), Mapping) and loaded[k]]
        if not inner:
            inner = [k for k, v in loaded.items() if _holds_tensors(v)]
            if len(inner) > 1:
                msg = f"a checkpoint must hold one state_dict. Got {inner[:8]}: which of them is not clear. Save that one alone"
                raise Refused(msg)
        # a score beside the state_dict may be a tensor as well
        scores = sorted(k for k, v in tensors.items() if v.numel() == 1)
        if not inner or len(scores) < len(tensors) or (scores and not _holds_tensors(loaded[inner[0]])):
            break
        rest = scores + sorted(str(k) for k in loaded if k != inner[0] and str(k) not in tensors)
        notes.append(
            f"unwrapped {inner[0]!r} of the checkpoint"
            + (f"; beside it, not read: {', '.join(rest[:8])}" if rest else "")
        )
        loaded, tensors = loaded[inner[0]], {}
    if not tensors:
        msg = f"a checkpoint must hold a state_dict, names to tensors. Got a dict of {sorted(map(str, loaded))[:8]} without tensors"
        raise Refused(msg)
    skipped = sorted(str(k) for k in loaded if str(k) not in tensors)
    if skipped:
        notes.append(f"not tensors, left out: {', '.join(skipped[:8])}")
    return tensors, notes


def _holds_tensors(value: Any) -> bool:
    from torch import Tensor

    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _write(state: Mapping[str, Any], notes: list[str], file_bytes: int, out: Path) -> dict[str, Any]:
    """One safetensors entry for each distinct tensor; further names of it are aliases, so that ties are kept."""
    import torch
    from safetensors.torch import save_file

    total = sum(t.numel() * t.element_size() for t in state.values() if t.layout == torch.strided)
    kept: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    own = {}
    for name, tensor in state.items():
        _refuse_tensor(name, tensor)
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        if key in kept:
            aliases[name] = kept[key]
            total -= tensor.numel() * tensor.element_size()
        else:
            kept[key] = name
            own[name] = tensor.detach()
    if total > UNPACK_RATIO * file_bytes + SLACK_BYTES:
        msg = f"tensors must be stored in full. Got {total:,} bytes of tensors in a file of {file_bytes:,}"
        raise Refused(msg)
    made = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t) for name, t in own.items()}
    save_file(made, out / "weights.safetensors")
    return {"notes": notes, "aliases": aliases, "order": list(state)}


def _refuse_tensor(name: str, tensor: Any) -> None:
    import torch

    if tensor.is_quantized:
        kind = "quantized"
    elif tensor.layout != torch.strided:
        kind = "sparse"
    elif tensor.is_meta:
        kind = "meta (no data)"
    elif tensor.is_complex():
        kind = "complex"
    else:
        return
    msg = f"weights must be dense real numbers. Got a {kind} tensor {name!r}. " + (
        "The checkpoint is already quantized: start from the float one"
        if kind == "quantized"
        else "Convert it before saving"
    )
    raise Refused(msg)


# --------------------------------------------------------------------------------------------------------------- limits


def _limit(file_bytes: int, cpu_seconds: int) -> None:
    try:
        import resource
    except ImportError:  # not a Unix: the parent's timeout is the limit
        return
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for what, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, (UNPACK_RATIO + 1) * file_bytes + 64 * SLACK_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (limit, limit))
    _limit_memory(2 * file_bytes + (1 << 29))


def _limit_memory(more_bytes: int | None) -> None:
    """At most `more_bytes` of address space beyond what is mapped now (None: no limit); the soft limit, which can be lifted."""
    try:
        import resource

        mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # no Linux: the parent's timeout and the file-size limit hold alone
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = hard if more_bytes is None else mapped + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _arguments(words: Iterable[str]) -> tuple[Path, Path, int]:
    file, out, seconds = words
    return Path(file), Path(out), int(seconds)


if __name__ == "__main__":
    main(*_arguments(sys.argv[1:]))
