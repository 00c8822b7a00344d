"""What compress is given beside the model, as digests: a run is not continued with other functions than it began with.

A task file is compared by its bytes. A notebook's functions have no file of their own, so they are compared by what
they do: their instructions and constants, and the content of everything of the user's that they reach by name (other
functions, classes, modules, numbers, texts, tensors, arrays, objects). Line numbers, file names and memory addresses
do not count, nor what a function itself fills (losses.append) or counts: the same cell run again, in another process too, is the same. What comes from an installed package
counts by its name; the versions stand in the environment.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import secrets
import sys
import sysconfig
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

NOT_COMPARABLE = "not comparable"
_SHOWN = (int, float, bool, type(None))
"""Shown as they are; texts are not, they may be secrets."""
_ATOMS = (*_SHOWN, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_MISSING = "(no value)"
_CLASS_NOISE = ("_abc", "__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__", "__dataclass_", "__firstlineno__", "__static_attributes__")  # fmt: skip
_INSTALLED = tuple(str(Path(sysconfig.get_path(name))) + "/" for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def given_digests(functions: Mapping[str, Any]) -> dict[str, str]:
    """{"train": digest, "train.lr": "0.01", …}: each function, and what it reaches by a name, one line each.

    What cannot be compared (an open file, a lock) never equals itself: its line holds the reason and a fresh number.

    >>> given_digests({"train": len, "step": None}) == given_digests({"train": len})
    True
    """
    digests, found = _Digests(), dict[str, str]()
    for name, value in functions.items():
        if value is None:
            continue
        if isinstance(value, FunctionType) and not _is_installed(value):
            reached = _reached(value)
            packages = {
                n: v for n, v in reached.items() if isinstance(v, ModuleType) and _is_installed_module(v.__name__)
            }
            found[name] = _line(digests, _Own(value, packages))
            found |= {f"{name}.{n}": _line(digests, v) for n, v in sorted(reached.items()) if n not in packages}
        else:
            found[name] = _line(digests, value)
    return found


def code_digest(function: Any) -> str:
    """What a function does, without the values that it reaches: they may change while it is called. By name, where there is no code.

    >>> code_digest(lambda x: x + 1) == code_digest(lambda x: x + 1), code_digest(lambda x: x + 1) == code_digest(lambda x: x + 2)
    (True, False)
    """
    if isinstance(function, FunctionType):
        line = _line(_Digests(), _Own(function, {}))
        if not line.startswith(NOT_COMPARABLE):
            return line
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def given_notes(given: Mapping[str, str]) -> list[str]:
    """What a run says where it cannot tell later whether it was given the same."""
    return [
        f"{name} is {line.rpartition(',')[0]}: this run cannot be continued by another call, which might be given another. Make it inside the function."
        for name, line in given.items()
        if line.startswith(NOT_COMPARABLE)
    ]


class _Own:
    """A function without what it reaches by name, but for packages."""

    def __init__(self, function: FunctionType, packages: Mapping[str, Any]) -> None:
        self.parts = (function.__code__, function.__defaults__, function.__kwdefaults__, dict(sorted(packages.items())))


def _line(digests: _Digests, value: Any) -> str:
    if type(value) in _SHOWN:
        return repr(value)
    try:
        return digests.of(value).hex()[:32]
    except Exception as error:  # whatever the user's objects raise where they are taken apart
        return f"{NOT_COMPARABLE} ({type(value).__name__}: {str(error)[:100]}), {secrets.token_hex(4)}"


class _Digests:
    """Digests of values by their content, each made once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, bytes]] = {}  # with the value, so that its id is not given to another
        self._open: list[int] = []

    def of(self, value: Any) -> bytes:
        """16 bytes. Raises what the value raises where it cannot be taken apart."""
        if type(value) in _ATOMS:
            return _hashed((type(value).__name__.encode(), repr(value).encode()))
        if id(value) in self._known:
            return self._known[id(value)][1]
        if id(value) in self._open:  # a function that calls itself, an object that holds its owner
            return _hashed((b"again", str(self._open.index(id(value))).encode()))
        self._open.append(id(value))
        try:
            found = _hashed(self._parts(value))
        finally:
            self._open.pop()
        self._known[id(value)] = (value, found)
        return found

    def _parts(self, value: Any) -> Iterator[bytes]:
        ways = (
            (Tensor, _tensor), (np.ndarray, self._array), (CodeType, self._code), (_Own, self._own),
            (FunctionType, self._function), (ModuleType, self._module_file), (type, self._class),
            ((dict, MappingProxyType), self._mapping), (property, lambda v: self._all(v.fget, v.fset, v.fdel)),
            ((staticmethod, classmethod), lambda v: self._all(v.__func__)), (nn.Module, self._module), (DataLoader, self._loader),
        )  # fmt: skip
        exact: dict[type, Callable[[Any], Iterator[bytes]]] = {
            list: self._listed,
            tuple: self._listed,
            set: self._set,
            frozenset: self._set,
        }  # others may hold more
        way = exact.get(type(value)) or next((w for kinds, w in ways if isinstance(value, kinds)), self._taken_apart)
        yield type(value).__name__.encode()
        yield from way(value)

    def _all(self, *values: Any) -> Iterator[bytes]:
        return (self.of(v) for v in values)

    def _array(self, array: np.ndarray) -> Iterator[bytes]:
        yield f"{array.dtype.str} {array.shape}".encode()
        yield self.of(array.tolist()) if array.dtype.hasobject else np.ascontiguousarray(array).tobytes()

    def _listed(self, values: Any) -> Iterator[bytes]:
        return self._all(*values)

    def _set(self, values: Any) -> Iterator[bytes]:
        yield from sorted(self._all(*values))  # their own order is that of addresses and salted hashes

    def _mapping(self, values: Mapping[Any, Any]) -> Iterator[bytes]:
        return self._all(type(values), *(part for item in values.items() for part in item))

    def _module(self, module: nn.Module) -> Iterator[bytes]:
        # the mode is left out: who calls a module sets it, and leaves it otherwise than it was
        return self._all(type(module), {k: v for k, v in vars(module).items() if k != "training"})

    def _module_file(self, module: ModuleType) -> Iterator[bytes]:
        yield module.__name__.encode()
        if not _is_installed_module(module.__name__) and module.__file__ is not None:
            yield Path(module.__file__).read_bytes()

    def _own(self, own: _Own) -> Iterator[bytes]:
        return self._all(*own.parts)

    def _loader(self, loader: DataLoader[Any]) -> Iterator[bytes]:
        # workers that wait for the next pass are no part of what is asked for
        return self._all(type(loader), {k: v for k, v in vars(loader).items() if k != "_iterator"})

    def _code(self, code: CodeType) -> Iterator[bytes]:
        consts = code.co_consts
        if "__firstlineno__" in code.co_names:  # the body of a class: Python 3.13 stores the line among the constants
            consts = tuple(c for c in consts if c != code.co_firstlineno)
        yield code.co_code
        yield code.co_exceptiontable
        yield from self._all(
            code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags, code.co_argcount,
            code.co_posonlyargcount, code.co_kwonlyargcount, consts,
        )  # fmt: skip

    def _function(self, function: FunctionType) -> Iterator[bytes]:
        yield from self._all(function.__defaults__, function.__kwdefaults__)
        if not _is_installed(function):
            yield from self._all(function.__code__, _reached(function))
            return
        # a decorator of a package holds the user's function in its closure
        yield f"{function.__globals__.get('__name__')}.{function.__code__.co_qualname}".encode()
        yield from self._all(*(_cell(c) for c in function.__closure__ or ()))

    def _class(self, kind: type) -> Iterator[bytes]:
        yield kind.__qualname__.encode()
        if _is_installed_module(kind.__module__):
            yield kind.__module__.encode()
            return
        yield from self._all(*kind.__bases__)
        for name, value in vars(kind).items():
            if not name.startswith(_CLASS_NOISE) and not isinstance(value, MemberDescriptorType | GetSetDescriptorType):
                yield from self._all(name, value)

    def _taken_apart(self, value: Any) -> Iterator[bytes]:
        """As pickle would: the class, its arguments and its state, whatever they are."""
        known = copyreg.dispatch_table.get(type(value))
        reduced = known(value) if known is not None else value.__reduce_ex__(4)
        if not isinstance(reduced, str):
            make, args, *rest = reduced
            yield from self._all(make, args, *(r if i == 0 or r is None else list(r) for i, r in enumerate(rest[:3])))
            return
        yield f"{getattr(value, '__module__', None)}.{reduced}".encode()  # one of a kind, known by its name
        if not isinstance(value, BuiltinFunctionType):
            yield self.of(getattr(value, "__wrapped__", None))  # functools.cache


def _hashed(parts: Iterator[bytes] | tuple[bytes, ...]) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def _tensor(tensor: Tensor) -> Iterator[bytes]:
    yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    if tensor.numel():
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _reached(function: FunctionType) -> dict[str, Any]:
    """What a function finds by name when it runs: of its closure, and of its module's globals, but for builtins."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    names = [n for n in _global_names(function.__code__) if n in function.__globals__]
    found = {n: function.__globals__[n] for n in names} | {n: _cell(c) for n, c in cells}
    kept = {n for n in _written_names(function.__code__) if type(found.get(n)) in _RECORDS}
    return {n: f"a {type(v).__name__} that it fills itself" if n in kept else v for n, v in found.items()}


_RECORDS = (list, dict, set, deque, defaultdict, Counter, int, float)
"""What a function may keep its losses or its calls in: after every run another, and no other function for that."""
_FILLS = frozenset(("append", "appendleft", "extend", "add", "update", "setdefault", "insert"))


def _written_names(code: CodeType) -> Iterator[str]:
    """Names outside the code that it, or code inside it, changes: set anew, or filled (losses.append, log["loss"].append, seen[k] = v)."""
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PUSH_NULL", "PRECALL", "EXTENDED_ARG")]
    for at, step in enumerate(steps):
        if step.opname in ("STORE_GLOBAL", "STORE_DEREF"):
            yield str(step.argval)
        if step.opname not in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            continue
        rest = steps[at + 1 :]
        while len(rest) > 1 and rest[0].opname.startswith("LOAD_") and rest[1].opname == "BINARY_SUBSCR":
            rest = rest[2:]
        fills = rest and rest[0].opname in ("LOAD_METHOD", "LOAD_ATTR") and rest[0].argval in _FILLS
        if fills or (len(rest) > 1 and rest[0].opname.startswith("LOAD_") and rest[1].opname == "STORE_SUBSCR"):
            yield str(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _written_names(inner)


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the name is bound later
        return _MISSING


def _global_names(code: CodeType) -> Iterator[str]:
    """Names that the code, and the code inside it, reads as globals."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and not str(instruction.argval).startswith("__"):
            yield str(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _global_names(inner)


def _is_installed(function: FunctionType) -> bool:
    """Whether a function stands in an installed package, where its decorators may stand as well."""
    file, module = function.__code__.co_filename, str(function.__globals__.get("__name__"))
    return file.startswith("<frozen") or _is_package_file(file) or module.partition(".")[0] == "paredown"


def _is_installed_module(name: str) -> bool:
    if name == "__main__":  # its file may be that of the notebook's kernel, which is a package
        return False
    top, file = name.partition(".")[0], getattr(sys.modules.get(name), "__file__", None)
    return top == "paredown" or (top in sys.stdlib_module_names if file is None else _is_package_file(file))


@functools.cache
def _is_package_file(file: str) -> bool:
    path = Path(file)
    return any(path.is_relative_to(p) for p in _INSTALLED) or bool({"site-packages", "dist-packages"} & {*path.parts})
