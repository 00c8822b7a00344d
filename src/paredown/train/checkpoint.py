"""Checkpoints of a training: one safetensors file, tensors and JSON only, replaced whole after every epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from paredown.errors import RejectedError, ResourceError, UsageError
from paredown.records import whole_file

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything a training needs to go on from the end of an epoch; `facts` is JSON, the rest tensors on the CPU."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    """As torch's Optimizer.state_dict()."""
    hooks: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, Any]
    """Epoch, learning-rate scale, history."""


def model_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also non-persistent ones, each tied tensor once; not copied."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def state_digest(module: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model_tensors(module).items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b"")
    return digest.hexdigest()


def save(path: Path, snapshot: Snapshot, config: Mapping[str, Any]) -> None:
    """Write a snapshot and the configuration it belongs to, whole or not at all.

    Raises ResourceError (disk full, not writable; the old checkpoint stays) and UsageError (an optimizer keeps
    something that is neither tensor nor JSON).
    """
    tensors = {f"model/{n}": t for n, t in snapshot.model.items()}
    for hook, state in snapshot.hooks.items():
        tensors |= {f"hook/{hook}/{n}": t for n, t in state.items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in snapshot.optimizer["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    document = {
        "schema": SCHEMA,
        "config": config,
        "facts": snapshot.facts,
        "plain": plain,
        "groups": snapshot.optimizer["param_groups"],
    }
    try:
        text = json.dumps(document, sort_keys=True)
    except TypeError as error:
        msg = (
            f"an optimizer's state must be tensors and plain values to be checkpointed. Got: {error}. Use another "
            "optimizer, or no checkpoint."
        )
        raise UsageError(msg) from error
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    num_bytes = sum(t.numel() * t.element_size() for t in data.values()) + len(text)
    with whole_file(path) as temporary:
        try:
            save_file(_unshared(data), temporary, metadata={"paredown": text})
        except (SafetensorError, OSError) as error:  # safetensors wraps what the disk said
            msg = (
                f"{path} must be writable: {num_bytes:,} bytes are needed. Got {error}. The last checkpoint is intact; "
                "free space and run again."
            )
            raise ResourceError(msg) from error


def load(path: Path, config: Mapping[str, Any]) -> Snapshot | None:
    """The snapshot at `path`, None where there is none yet.

    Raises UsageError (it belongs to another configuration; the differences are named) and RejectedError (damaged).
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads(file.metadata()["paredown"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
        schema, found = document["schema"], document["config"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        msg = (
            f"a checkpoint must be a whole file written by paredown. Got {type(error).__name__}: {error} at {path}. "
            "Delete it to start again."
        )
        raise RejectedError(msg) from error
    wanted = json.loads(json.dumps(config))
    different = (
        [k for k in sorted({*wanted, *found}) if wanted.get(k) != found.get(k)] if schema == SCHEMA else ["schema"]
    )
    if different:
        shown = "; ".join(f"{k}: {_short(found.get(k))} then, {_short(wanted.get(k))} now" for k in different)
        msg = (
            f"a training must be continued as it was begun. Got {shown} at {path}. Delete the checkpoint to start "
            "again."
        )
        raise UsageError(msg)
    return _snapshot(document, tensors)


def _snapshot(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Snapshot:
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in document["plain"].items()}
    hooks: dict[str, dict[str, Tensor]] = {}
    model: dict[str, Tensor] = {}
    for full, tensor in tensors.items():
        kind, _, name = full.partition("/")
        if kind == "model":
            model[name] = tensor
        elif kind == "hook":
            hook, _, leaf = name.partition("/")
            hooks.setdefault(hook, {})[leaf] = tensor
        else:
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = tensor
    return Snapshot(
        model=model,
        hooks=hooks,
        optimizer={"state": state, "param_groups": document["groups"]},
        facts=document["facts"],
    )


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share storage (views of one buffer): each gets its own."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        where = tensor.untyped_storage().data_ptr()
        result[name] = (
            tensor.clone()
            if where in seen or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
            else tensor
        )
        seen.add(where)
    return result


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:20]}…{text[-1]}"
