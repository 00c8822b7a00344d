"""A file in its runtime, and `predict`: the same call for a file and for a PyTorch module."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.errors import MissingError, RejectedError
from paredown.export.artifact import Artifact
from paredown.export.child import RUNTIMES as CHILDREN
from paredown.export.child import Session as ChildSession
from paredown.export.openvino_session import STRUCTURE
from paredown.export.openvino_session import Session as OpenVINOSession
from paredown.program import Program
from paredown.prune.nouns import Pruned
from paredown.quantize.batches import tensors_of
from paredown.quantize.nouns import Quantized
from paredown.quantize.schemes import SCHEMES

Predict = Callable[..., Any]
PRECISE = ("session.x64quantprecision", "1")
"""Session option of ONNX Runtime. On x86 without VNNI its uint8 × int8 products may saturate at 16 bit unless it is set (a cosine
of 0.96 to 0.99 instead of 1 was measured), and are up to twice as slow where it is; with VNNI, and elsewhere, it changes nothing."""
EXACT = "exact_products"
"""Metadata of a file whose products are exact without it (see export.onnx_products)."""
_TAIL = 65_536
"""Bytes at the end of a file in which its metadata is looked for: it is written last."""


_TWICE = re.compile(r"replace the existing tensor")
_TOO_NEW = re.compile(r"unsupported model IR version|till opset|opset \d+ is under development", re.IGNORECASE)
"""How ONNX Runtime says that it is older than a file."""


class Fields(dict[str, Any]):
    """A dict output whose entries are attributes too, as models from Hugging Face return them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


pytree.register_pytree_node(
    Fields, lambda d: (list(d.values()), list(d)), lambda values, keys: Fields(zip(keys, values, strict=True))
)


def open_session(path: Path, *, threads: int = 1, optimized: Path | None = None) -> Any:
    """A session on the CPU with that many threads: OpenVINO's for an .xml file, one of another process for .pte and .tflite.

    ONNX Runtime's for any other.

    `optimized` is where ONNX Runtime's own graph is written. Raises MissingError where the runtime is missing or older
    than the file, RejectedError where it refuses the file.
    """
    if path.suffix.lower() == ".xml":
        return OpenVINOSession(path, threads=threads)
    if path.suffix.lower() in CHILDREN:
        return ChildSession(path, threads=threads)
    try:
        import onnxruntime
    except ImportError as error:
        msg = "running an ONNX file must have ONNX Runtime. It is not installed. Run: pip install 'paredown[onnx]'."
        raise MissingError(msg) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if not has_exact_products(path):
        options.add_session_config_entry(*PRECISE)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        return _created(onnxruntime, path, options)
    except Exception as error:
        said = str(error).strip().splitlines()[0].replace(str(path), path.name)
        reason = said if len(said) < 400 else f"{said[:100]} … {said[-280:]}"
        if _TOO_NEW.search(said):
            msg = f"ONNX Runtime must be new enough for the file. Got version {onnxruntime.__version__} for {path.name}: {reason}. "
            raise MissingError(
                msg + "Export with a lower opset=… (--opset), or install a newer onnxruntime."
            ) from error
        msg = f"an ONNX file must load in ONNX Runtime {onnxruntime.__version__}. Got {path.name}: {reason}."
        raise RejectedError(msg) from error


def _created(onnxruntime: Any, path: Path, options: Any) -> Any:
    """A session; without PRECISE where the runtime cannot give it: of two layers that share a weight it writes the exact form twice."""
    shown, options.log_severity_level = options.log_severity_level, 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if not _TWICE.search(str(error)):
            raise
        options.log_severity_level = shown
        options.add_session_config_entry(PRECISE[0], "0")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        if not has_int8_sums():
            warnings.warn(
                f"{path.name} runs without exact 8-bit products, which ONNX Runtime refuses where layers share a weight: its sums may saturate here.",
                UserWarning,
                stacklevel=3,
            )
        return session


def has_int8_sums() -> bool:
    """Whether the processor sums products of 8 bits in 32 (VNNI, AMX). Without, sums of two may saturate at 16 bit."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return True  # not Linux: nothing is known, nothing is excused
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & words)


def has_exact_products(path: Path) -> bool:
    """Whether the file says that its 8-bit products are exact in every session. Another tool's file says nothing."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return EXACT.encode() in file.read()
    except OSError:
        return False


def products_of(artifact: Artifact) -> str:
    """How its codes are multiplied here, where that is not how every session of ONNX Runtime does it; "" for all other files.

    A file for ARM, or of another tool, may hold neighbouring weights whose products 16 bits do not hold; one that does not say is taken for such.
    """
    scheme = SCHEMES.get(artifact.scheme)
    in_codes = scheme is not None and scheme.activations == "static"
    if not in_codes or artifact.path.suffix.lower() != ".onnx" or has_exact_products(artifact.path):
        return ""
    elsewhere = (
        "; made for ARM, whose kernels add in 32 bits: nothing ran there" if artifact.target.endswith("-arm") else ""
    )
    return (
        f"run here with exact 8-bit products ({PRECISE[0]}={PRECISE[1]}), which this file needs on x86 without VNNI, where they are slower: "
        f"neighbouring weights may add up to more than 16 bits hold{elsewhere}"
    )


def predictor(thing: Artifact | Program | Pruned | Quantized | nn.Module, *, threads: int = 1) -> Predict:
    """`predict(*inputs, **named)` of a file or a module: CPU float32 tensors in, the model's own structure out.

    The same function of the same inputs, whichever it is: a dict stays a dict, a tuple a tuple. Any batch size; a file with
    a fixed batch is run in pieces, the last one filled up. No gradients, eval mode; the module's own mode is restored.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> predictor(net)(torch.zeros(3, 2, 2)).shape
    torch.Size([3, 2])
    """
    if isinstance(thing, Artifact):
        return answering(open_session(thing.path, threads=threads))
    module = thing if isinstance(thing, nn.Module) else thing.module
    frozen = isinstance(thing, Quantized)

    def predict(*args: Any, **kwargs: Any) -> Any:
        mode = module.training
        if mode and not frozen:
            module.eval()
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        args, kwargs = pytree.tree_map(lambda v: v.detach().to(device) if isinstance(v, Tensor) else v, (args, kwargs))
        try:
            with torch.no_grad():
                return pytree.tree_map(_plain, module(*args, **kwargs))
        finally:
            if mode and not frozen:
                module.train(mode)

    return predict


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()


def answering(session: Any) -> Predict:
    """`predict` of an open session."""
    wanted = session.get_inputs()
    meta = session.metadata if hasattr(session, "metadata") else session.get_modelmeta().custom_metadata_map
    structure = json.loads(meta[STRUCTURE]) if STRUCTURE in meta else 0
    fixed = next((i.shape[0] for i in wanted if i.shape and isinstance(i.shape[0], int)), None)
    if any(i.shape and isinstance(i.shape[0], str) for i in wanted):
        fixed = None

    def predict(*args: Any, **kwargs: Any) -> Any:
        feed = as_feed(wanted, args, kwargs)
        arrays = session.run(None, feed) if fixed is None else _in_pieces(session, feed, fixed)
        return _built(structure, [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays])

    return predict


def as_feed(wanted: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by input name: named tensors by their name, the others in order. Raises RejectedError where they do not fit."""
    names = [i.name for i in wanted]
    feed = {name: value for name, value in kwargs.items() if name in names and isinstance(value, Tensor)}
    rest = tensors_of((args, {k: v for k, v in kwargs.items() if k not in feed}))
    free = [n for n in names if n not in feed]
    if len(rest) != len(free):
        msg = f"inputs must fit the file: {', '.join(names)}. Got {len(rest)} tensors by position and {', '.join(feed) or 'none'} by name."
        raise RejectedError(msg)
    feed.update(zip(free, rest, strict=True))
    for one in wanted:
        _refuse_shape(one, feed[one.name])
    kinds = {i.name: i.type for i in wanted}
    return {n: _array(feed[n], kinds[n]) for n in names}


def _refuse_shape(wanted: Any, tensor: Tensor) -> None:
    """Axes that the file fixes, but for the batch, which is run in pieces."""
    sizes, got = list(wanted.shape or ()), tuple(tensor.shape)
    fits = len(sizes) == len(got) and all(
        not isinstance(w, int) or at == 0 or w == g for at, (w, g) in enumerate(zip(sizes, got, strict=False))
    )
    if not fits:
        shape = ", ".join(str(w) if isinstance(w, int) else "any" for w in sizes)
        msg = f"samples must be what the file takes: {wanted.name} of shape ({shape}). Got {got}."
        raise RejectedError(msg)


def _array(tensor: Tensor, kind: str) -> Any:
    tensor = tensor.detach().cpu()
    array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    return array.astype(np.float32) if kind == "tensor(float)" and array.dtype != np.float32 else array


def _in_pieces(session: Any, feed: dict[str, Any], fixed: int) -> list[Any]:
    """Run a file whose batch is fixed: pieces of that length, the last filled with its own last sample, and cut again.

    Raises RejectedError where an output has another first axis and differs from piece to piece.
    """
    total = next(a.shape[0] for a in feed.values() if a.ndim)
    parts = []
    for start in range(0, total, fixed):
        index = np.minimum(np.arange(start, start + fixed), total - 1)
        parts.append(session.run(None, {n: a[index] if a.ndim and a.shape[0] == total else a for n, a in feed.items()}))
    outs = []
    for number, pieces in enumerate(zip(*parts, strict=True)):
        first = pieces[0]
        if first.ndim and first.shape[0] == fixed:
            outs.append(np.concatenate(pieces)[:total])
        elif all(np.array_equal(first, other) for other in pieces[1:]):
            outs.append(first)
        else:
            msg = f"samples must be given {fixed} at a time, since output {number} of this file has another first axis than the samples. Got {total}."
            raise RejectedError(msg)
    return outs


def skeleton(out_spec: Any, tensors: list[bool]) -> Any:
    """The structure of an output as JSON: a number for a tensor, a list, an object with names, null for anything else.

    Objects with one odd name: {"()": names} is a named tuple, {"[]": pairs} a dict whose keys are not all text.
    `tensors` says of every leaf whether it is one.
    """
    leaves = iter(tensors)
    numbers = itertools.count()

    def walk(spec: Any) -> Any:
        if spec.is_leaf():
            return next(numbers) if next(leaves) else None
        children = [walk(c) for c in spec.children()]
        keys = spec.context
        if isinstance(keys, list | tuple) and len(keys) == 2 and isinstance(keys[0], list | tuple):
            keys = (
                keys[0] if len(keys[0]) == len(children) else keys[1]
            )  # OrderedDict-like outputs carry (names, types)
        names = getattr(spec.context, "_fields", None)
        if names is not None and len(names) == len(children):
            return {"()": dict(zip(names, children, strict=True))}
        named = isinstance(spec.type, type) and (issubclass(spec.type, dict) or dataclasses.is_dataclass(spec.type))
        if named and isinstance(keys, list | tuple) and len(keys) == len(children):
            if all(isinstance(k, str) for k in keys):
                return dict(zip(keys, children, strict=True))
            if all(isinstance(k, str | int | float | bool) for k in keys):
                return {"[]": [[k, c] for k, c in zip(keys, children, strict=True)]}
            return {str(k): c for k, c in zip(keys, children, strict=True)}
        return children

    return walk(out_spec)


def leaf_names(structure: Any, prefix: str = "") -> dict[int, str]:
    """Name of every output: "logits", "boxes.0", "output" where the structure has no names."""
    if isinstance(structure, int):
        return {structure: prefix or "output"}
    if structure is None:
        return {}
    if isinstance(structure, dict):
        structure = structure.get("()", structure)
        parts = [*structure["[]"]] if [*structure] == ["[]"] else [*structure.items()]
    else:
        parts = [*enumerate(structure)]
    found: dict[int, str] = {}
    for key, part in parts:
        found |= leaf_names(
            part, f"{prefix}.{key}" if prefix else str(key) if isinstance(key, str) else f"output_{key}"
        )
    return found


def _built(structure: Any, leaves: list[Tensor]) -> Any:
    if isinstance(structure, int):
        return leaves[structure]
    if isinstance(structure, dict) and [*structure] == ["()"]:
        fields = structure["()"]
        return collections.namedtuple("Outputs", fields)(*(_built(v, leaves) for v in fields.values()))
    if isinstance(structure, dict) and [*structure] == ["[]"]:
        return {k: _built(v, leaves) for k, v in structure["[]"]}
    if isinstance(structure, dict):
        return Fields({k: _built(v, leaves) for k, v in structure.items()})
    return None if structure is None else tuple(_built(v, leaves) for v in structure)


__all__ = [
    "STRUCTURE",
    "Fields",
    "Predict",
    "answering",
    "as_feed",
    "leaf_names",
    "open_session",
    "predictor",
    "skeleton",
]
