"""File size against state_dict size, with an alarm where a file holds more than its tensors need.

Nothing is unpickled: a safetensors header is JSON, and the pickle inside a .pt is only read opcode by opcode for the
names, sizes and storages it mentions; no name in it is ever looked up, imported or called.
"""

from __future__ import annotations

import json
import pickletools
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from paredown.errors import RejectedError

_HEADER_LIMIT_BYTES = 100 * 10**6
_PICKLE_LIMIT_BYTES = 64 * 10**6
_MOST_TENSORS = 200_000
_SAFE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_SAFE_BYTES |= {"F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8}
_STORAGE_BYTES = {
    "DoubleStorage": 8,
    "LongStorage": 8,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
    "IntStorage": 4,
}
_STORAGE_BYTES |= {"FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2}
_STORAGE_BYTES |= {"CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "UntypedStorage": 1}
_SAFE_NAMES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
_SAFE_NAMES |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
_OPTIMIZER = ("optimizer", "exp_avg", "momentum_buffer", "param_groups", "optimizer_state_dict", "opt_state")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSize:
    """Bytes of a state_dict."""

    unique_bytes: int
    """Σ numel × itemsize, tied tensors once."""
    naive_bytes: int
    """Σ numel × itemsize, tied tensors as often as they are named."""
    storage_bytes: int
    """Σ bytes of the distinct storages behind them: what torch.save writes."""
    safetensors_bytes: int
    """Size of the safetensors file that holds each distinct tensor once; computed, not written."""
    alarms: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSize:
    """A checkpoint file by stat, and what its tensors need."""

    path: str
    file_bytes: int
    """By stat: measured."""
    tensor_bytes: int | None
    """Σ numel × itemsize of the distinct tensors in it; None where the format does not tell without unpickling."""
    stored_bytes: int | None
    """Bytes of tensor data that the file holds."""
    alarms: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One tensor of a file: where its data lies and how much of it is the tensor's own."""

    name: str
    storage: str
    offset: int
    bytes: int


def state_size(state: Mapping[str, Tensor]) -> StateSize:
    """Bytes of a state_dict, tied tensors once and as named, with alarms for views of big storages, masks and ties.

    >>> import torch
    >>> size = state_size({"a": torch.zeros(1000)[:10]})
    >>> size.unique_bytes, size.storage_bytes, len(size.alarms)
    (40, 4000, 1)
    """
    entries, storages = [], {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout.__str__() != "torch.strided":
            continue
        storage = tensor.untyped_storage()
        key = f"{storage.data_ptr()}" if storage.nbytes() else f"empty {name}"
        storages[key] = storage.nbytes()
        entries.append(
            _Entry(
                name=name,
                storage=key,
                offset=int(tensor.storage_offset()),
                bytes=tensor.numel() * tensor.element_size(),
            )
        )
    first = {(e.storage, e.offset, e.bytes): e.name for e in reversed(entries)}
    distinct = {n: state[n] for n in first.values()}
    return StateSize(
        unique_bytes=sum(size for _, _, size in first),
        naive_bytes=sum(e.bytes for e in entries),
        storage_bytes=sum(storages.values()),
        safetensors_bytes=_safetensors_bytes(distinct),
        alarms=_alarms(entries, storages, tuple(state)),
    )


def file_size(path: Path | str) -> FileSize:
    """Size of a checkpoint against its tensors; alarms say what the rest is. Nothing is unpickled.

    Raises RejectedError for a missing, empty or damaged file. A format that is not known has its bytes measured only.
    """
    path = Path(path)
    if not path.is_file():
        near = (
            sorted(p.name for p in path.parent.glob("*") if p.suffix in (".pt", ".pth", ".safetensors"))[:5]
            if path.parent.is_dir()
            else []
        )
        msg = (
            f"a checkpoint must be a file. Got {str(path)!r}. "
            f"{'Near it: ' + ', '.join(near) if near else 'Nothing like it is there'}."
        )
        raise RejectedError(msg)
    size = path.stat().st_size
    if size == 0:
        msg = f"a checkpoint must hold tensors. Got {str(path)!r} with 0 bytes."
        raise RejectedError(msg)
    if path.suffix == ".safetensors":
        entries, names, overhead = _safetensors_entries(path, size)
        stored: int | None = size - overhead
        storages = {e.storage: e.bytes for e in entries}
        alarms = _alarms(entries, storages, names)
    elif zipfile.is_zipfile(path):
        entries, storages, names = _zip_entries(path)
        stored = sum(storages.values())
        alarms = _alarms(entries, storages, names)
    else:
        return FileSize(
            path=str(path),
            file_bytes=size,
            tensor_bytes=None,
            stored_bytes=None,
            alarms=("the format does not tell its tensors without unpickling: not tested",),
        )
    needed = sum(b for _, _, b in {(e.storage, e.offset, e.bytes) for e in entries})
    if needed and size > 1.1 * needed + 2**16 and not alarms:
        alarms = (f"the file holds {size:,} bytes, its tensors need {needed:,}",)
    return FileSize(path=str(path), file_bytes=size, tensor_bytes=needed, stored_bytes=stored, alarms=alarms)


def _alarms(entries: Sequence[_Entry], storages: Mapping[str, int], names: Iterable[str]) -> tuple[str, ...]:
    """What makes a file larger than its tensors."""
    names = list(names)
    alarms = []
    used: dict[str, dict[tuple[int, int], str]] = {}
    copies = 0
    for entry in entries:
        spans = used.setdefault(entry.storage, {})
        copies += (entry.offset, entry.bytes) in spans
        spans.setdefault((entry.offset, entry.bytes), entry.name)
    for storage, spans in used.items():
        need = sum(b for _, b in spans)
        if storages[storage] > need:
            first = next(iter(spans.values()))
            alarms.append(
                f"{first} is a view: {storages[storage]:,} bytes of storage are saved for {need:,}. Save tensor.clone()"
            )
    masks = [n for n in names if n.endswith("_mask") and n.removesuffix("_mask") + "_orig" in set(names)]
    if masks:
        alarms.append(
            f"{len(masks)} pruning masks double their weights ({masks[0]} beside "
            f"{masks[0].removesuffix('_mask')}_orig). Make them permanent with prune.remove"
        )
    if copies:
        alarms.append(
            f"{copies} tied tensors are named more than once: a format without ties stores each name as a copy"
        )
    optimizer = [n for n in names if any(part in _OPTIMIZER for part in n.split("."))]
    if optimizer:
        alarms.append(
            f"training state is inside ({optimizer[0]}): the model does not need it. Save model.state_dict() alone"
        )
    return tuple(alarms)


def _safetensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """8 bytes of length, the JSON header padded to 8, and the data."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        header[name] = {
            "dtype": _SAFE_NAMES.get(dtype, dtype),
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + at


# -------------------------------------------------------------------------------------------------------- safetensors


def _safetensors_entries(path: Path, size: int) -> tuple[list[_Entry], tuple[str, ...], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT_BYTES):
            msg = (
                f"a safetensors header must fit its file. Got {length:,} bytes declared in {path.name} of {size:,}. "
                "The file is damaged or not safetensors."
            )
            raise RejectedError(msg)
        text = file.read(length)
    try:
        header = json.loads(text)
        rows = [(n, t["dtype"], t["shape"], t["data_offsets"]) for n, t in header.items() if n != "__metadata__"]
        entries = [_Entry(name=n, storage=f"{a}", offset=0, bytes=b - a) for n, _, _, (a, b) in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        msg = (
            f"a safetensors header must be a JSON object of tensors. Got {type(error).__name__} in {path.name}. "
            "The file is damaged."
        )
        raise RejectedError(msg) from error
    end = 0
    for (name, dtype, shape, (start, stop)), _ in zip(sorted(rows, key=lambda r: r[3][0]), entries, strict=True):
        need = _SAFE_BYTES.get(dtype, 0)
        for length_of_axis in shape:
            need *= length_of_axis
        if start != end or (dtype in _SAFE_BYTES and stop - start != need) or stop > size - 8 - length:
            msg = (
                "tensors of a safetensors file must fill their bytes without gap or overlap. "
                f"Got {name} at {start}–{stop} in {path.name}. The file is damaged."
            )
            raise RejectedError(msg)
        end = stop
    return entries, tuple(n for n, *_ in rows), 8 + length


# ----------------------------------------------------------------------------------------------------------- .pt, .pth


def _zip_entries(path: Path) -> tuple[list[_Entry], dict[str, int], tuple[str, ...]]:
    """Tensors, storages (bytes by key) and names that a .pt mentions."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = {i.filename: i for i in archive.infolist()[: _MOST_TENSORS + 10]}
            storages = {n.rpartition("/data/")[2]: i.file_size for n, i in files.items() if "/data/" in n}
            pickles = [i for n, i in files.items() if n.endswith("/data.pkl") or n == "data.pkl"]
            if not pickles:
                return [], storages, ()
            if pickles[0].file_size > _PICKLE_LIMIT_BYTES:
                msg = (
                    f"the index of a checkpoint must be below {_PICKLE_LIMIT_BYTES:,} bytes. "
                    f"Got {pickles[0].file_size:,} in {path.name}."
                )
                raise RejectedError(msg)
            content = archive.read(pickles[0])
        root = _symbolic(content)
    except (
        zipfile.BadZipFile,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        EOFError,
        OSError,
        NotImplementedError,
    ) as error:
        msg = (
            f"a .pt file must be a readable archive. Got {type(error).__name__}: {error} in {path.name}. "
            "The file is damaged."
        )
        raise RejectedError(msg) from error
    entries: list[_Entry] = []
    names: list[str] = []
    _collect(root, "", entries, names, 0)
    known = {e.storage for e in entries}
    return (
        [e for e in entries if e.storage in storages],
        {k: v for k, v in storages.items() if k in known or not known},
        tuple(names),
    )


@dataclass(frozen=True, slots=True)
class _Named:
    """A global that the pickle mentions; never looked up."""

    name: str


@dataclass(frozen=True, slots=True)
class _Stored:
    """A persistent id: ("storage", type, key, device, numel)."""

    value: Any


@dataclass(slots=True)
class _Made:
    """The result of a call that was not made."""

    what: Any
    arguments: Any
    content: Any = None


_MARK = object()
_NOTHING = {"PROTO", "FRAME", "STOP"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_FRESH = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
_FILLS = {"SETITEM": 2, "SETITEMS": 0, "APPEND": 1, "APPENDS": 0, "ADDITEMS": 0, "BUILD": 1}
_VALUES = {
    "BININT",
    "BININT1",
    "BININT2",
    "INT",
    "LONG",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "FLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
}
_VALUES |= {
    "BINUNICODE8",
    "UNICODE",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
}


def _symbolic(content: bytes) -> Any:
    """What a pickle would build, every global and call left as a name. ValueError for an opcode not known."""
    stack: list[Any] = []
    memo: dict[str, Any] = {}

    def to_mark() -> list[Any]:
        at = len(stack) - 1 - next(i for i, v in enumerate(reversed(stack)) if v is _MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in _NOTHING:
            continue
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _FRESH:
            stack.append(_FRESH[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[str(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[str(len(memo))] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[str(argument)])
        elif name == "GLOBAL":
            stack.append(_Named(str(argument).replace(" ", ".")))
        else:
            _step(name, stack, to_mark)
    return stack[-1] if stack else None


def _step(name: str, stack: list[Any], to_mark: Callable[[], list[Any]]) -> None:
    """Opcodes that take from the stack."""
    if name.startswith("TUPLE"):
        count = int(name[5:] or 0)
        items = stack[len(stack) - count :] if count else to_mark()
        del stack[len(stack) - count :]
        stack.append(tuple(items))
    elif name in ("REDUCE", "NEWOBJ", "STACK_GLOBAL"):
        arguments, what = stack.pop(), stack.pop()
        stack.append(_Named(f"{what}.{arguments}") if name == "STACK_GLOBAL" else _Made(what, arguments))
    elif name == "BINPERSID":
        stack.append(_Stored(stack.pop()))
    elif name in ("POP", "POP_MARK"):
        _ = stack.pop() if name == "POP" else to_mark()
    elif name in _FILLS:
        content = to_mark() if name.endswith("S") else [stack.pop() for _ in range(_FILLS[name])][::-1]
        _fill(name, stack[-1], content)
    else:
        msg = f"opcode {name} is not one that a checkpoint needs"
        raise ValueError(msg)


def _fill(name: str, owner: Any, content: list[Any]) -> None:
    """Put items into what lies on the stack: a dict, a list, or an object that was never made."""
    if name == "BUILD":
        if isinstance(owner, _Made) and owner.content is None:
            owner.content = content[0]
    elif name.startswith("SETITEM"):
        pairs = {k: v for k, v in zip(content[::2], content[1::2], strict=True) if isinstance(k, str | int)}
        if isinstance(owner, _Made):
            owner.content = {**(owner.content or {}), **pairs}
        elif isinstance(owner, dict):
            owner.update(pairs)
    elif isinstance(owner, list):
        owner.extend(content)


def _collect(value: Any, name: str, entries: list[_Entry], names: list[str], depth: int) -> None:
    """Tensors by dotted name, out of dicts, lists, ordered dicts and modules."""
    if depth > 64 or len(names) > _MOST_TENSORS:
        return
    if isinstance(value, _Made):
        what = value.what.name if isinstance(value.what, _Named) else ""
        if what.endswith(("_rebuild_tensor_v2", "_rebuild_tensor_v3")):
            _tensor(value.arguments, name, entries)
            return
        if what.endswith(("_rebuild_parameter", "_rebuild_parameter_with_state")):
            value = value.arguments[0]
        elif value.content is not None:
            value = value.content
    if isinstance(value, _Made):
        _collect(value, name, entries, names, depth + 1)
        return
    items: Iterable[tuple[Any, Any]] = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    for key, inner in items:
        full = f"{name}.{key}" if name else str(key)
        if isinstance(inner, _Made | dict | list | tuple):
            names.append(full)
            _collect(inner, full, entries, names, depth + 1)


def _tensor(arguments: Any, name: str, entries: list[_Entry]) -> None:
    stored, offset, shape = arguments[0], arguments[1], arguments[2]
    if not isinstance(stored, _Stored):
        return
    kind, key = stored.value[1], str(stored.value[2])
    item = _STORAGE_BYTES.get(kind.name.rpartition(".")[2] if isinstance(kind, _Named) else "", 4)
    numel = 1
    for length in shape:
        numel *= int(length)
    entries.append(_Entry(name=name, storage=key, offset=int(offset), bytes=numel * item))
