"""Run as a script: python weights_child.py IN OUT. Reads a pickled state_dict under limits, writes safetensors.

It imports nothing of paredown. The last line on stdout is JSON: {"ok": true, "notes": […]} or
{"error": "global" | "content" | "damaged" | "memory", "detail": text}.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import sys
from collections.abc import Mapping
from typing import Any

PLAIN = ("state_dict", "model_state_dict", "model", "module", "net", "network")
MOST_TENSORS = 50_000


def limit(file_bytes: int) -> None:
    """Limits on memory beyond what Python and torch have already mapped, on time, files and their size."""
    try:
        import resource
    except ImportError:
        return  # no such limits on this system; weights_only and the process boundary remain
    try:
        with open("/proc/self/statm") as file:  # noqa: PTH123  (pathlib is not needed for this)
            mapped = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        mapped = 16 * 2**30  # no /proc: a limit that holds any import of torch
    seconds = 60 + file_bytes // (20 * 10**6)
    limits = {
        "RLIMIT_AS": mapped + 5 * file_bytes + 2**30,
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": 4 * file_bytes + 2**26,
        "RLIMIT_CORE": 0,
    }
    for name, value in limits.items():
        if hasattr(resource, name):
            with contextlib.suppress(ValueError, OSError):  # a hard limit that is lower already holds
                resource.setrlimit(getattr(resource, name), (value, value))


def main(source: str, destination: str) -> dict[str, Any]:
    """Load, choose the state_dict, write it."""
    import torch
    from safetensors.torch import save_file

    size = os.stat(source).st_size  # noqa: PTH116
    torch.set_num_threads(1)
    limit(size)
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        return _unpickling(str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return {"error": "memory", "detail": str(error) or "out of memory"}
    except Exception as error:  # whatever a damaged file makes of torch's reader
        kind = "memory" if "alloc" in str(error).lower() else "damaged"
        return {"error": kind, "detail": f"{type(error).__name__}: {_first(error)}"}
    state, notes = choose(loaded)
    if isinstance(state, str):
        return {"error": "content", "detail": state}
    total = sum(t.numel() * t.element_size() for t in state.values())
    if total > 4 * size + 2**20:
        return {"error": "content", "detail": f"tensors of {total:,} bytes in a file of {size:,} bytes"}
    save_file({n: t.detach().contiguous().clone() for n, t in state.items()}, destination)
    return {"ok": True, "notes": notes}


def _unpickling(text: str) -> dict[str, Any]:
    match = re.search(r"GLOBAL\s+([\w.]+)", text) or re.search(r"[Uu]nsupported (?:global|class)\W*([\w.]+)", text)
    if match and not match[1].isdigit():
        return {"error": "global", "detail": match[1]}
    if "Unsupported operand" in text:  # pickle protocols that torch.save does not use
        return {"error": "content", "detail": "a pickle that torch.save did not write"}
    if "Unsupported" in text or "not allowed" in text:
        return {"error": "global", "detail": re.sub(r"\s+", " ", text)[-200:]}
    return {"error": "damaged", "detail": f"UnpicklingError: {text.splitlines()[0][:200] if text else ''}"}


def choose(loaded: Any) -> tuple[Any, list[str]]:
    """The state_dict in what was loaded, and notes; a text instead says why there is none."""
    import torch

    if isinstance(loaded, torch.Tensor):
        return "a single tensor", []
    if not isinstance(loaded, Mapping):
        return f"a {type(loaded).__name__}", []
    notes: list[str] = []
    state = loaded
    if not any(isinstance(v, torch.Tensor) for v in loaded.values()):
        inner = [
            k
            for k, v in loaded.items()
            if isinstance(v, Mapping) and any(isinstance(t, torch.Tensor) for t in v.values())
        ]
        chosen = next((k for k in PLAIN if k in inner), inner[0] if len(inner) == 1 else None)
        if chosen is None:
            return f"a mapping with {_keys(inner or loaded)}: which of them holds the weights is not clear", []
        notes.append(f"read the entry {chosen!r}; the file also holds {_keys(k for k in loaded if k != chosen)}")
        state = loaded[chosen]
    others = [str(k) for k, v in state.items() if not isinstance(v, torch.Tensor)]
    if others:
        notes.append(f"left out what is not a tensor: {_keys(others)}")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return _refused(tensors) or tensors, notes


def _refused(tensors: Mapping[str, Any]) -> str:
    import torch

    if len(tensors) > MOST_TENSORS:
        return f"{len(tensors):,} tensors; at most {MOST_TENSORS:,} are read"
    for name, tensor in tensors.items():
        if tensor.is_quantized:
            return f"a quantized tensor, {name!r}: the model is quantized already"
        if tensor.layout is not torch.strided or tensor.is_complex():
            return f"a sparse or complex tensor, {name!r}"
    return ""


def _keys(names: Any) -> str:
    listed = [repr(str(n)) for n in names]
    return (
        ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
        if listed
        else "nothing else"
    )


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


if __name__ == "__main__":
    try:
        answer = main(*sys.argv[1:])
    except MemoryError as error:
        answer = {"error": "memory", "detail": str(error) or "out of memory"}
    except Exception as error:
        answer = {"error": "damaged", "detail": f"{type(error).__name__}: {_first(error)}"}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
