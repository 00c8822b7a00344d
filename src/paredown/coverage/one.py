"""One model: captured, coupled, cut in every space, proven; a row that grows.

A model may crash the interpreter, fill memory or never end: `worker` runs this in a fork of its own.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paredown.allocate import allocate
from paredown.budget import Budget
from paredown.couple import Coupling, couple
from paredown.errors import CaptureError, NothingToDo, ParedownError, RejectedError, VerificationError
from paredown.examine import examine
from paredown.models import load_model
from paredown.program import Program, capture
from paredown.prune import Proof, Pruned, prune
from paredown.score import score

Report = Callable[[dict[str, Any]], None]
_CLIPS = {"mvit_v1_b": 16, "mvit_v2_s": 16, "s3d": 16, "swin3d_t": 8, "swin3d_s": 8, "swin3d_b": 8}
_FLOW = ("raft",)


def main(argument: str, emit: Report) -> None:
    """Fill one row step by step; each step is emitted, so that a killed process leaves what it knew."""
    asked = json.loads(argument)
    torch.set_num_threads(int(asked.get("threads", 1)))
    torch.manual_seed(0)
    start = time.perf_counter()
    row: dict[str, Any] = {"model": asked["model"], "channels": asked["channels"], "status": "error"}
    try:
        _fill(row, asked, emit)
    except NothingToDo as error:
        row |= {"status": "nothing to do", "message": _first(error)}
    except CaptureError as error:
        row |= {"status": "not captured", "message": _first(error)}
    except RejectedError as error:
        row |= {"status": "not captured" if "parameters" not in row else "error", "message": _first(error)}
    except VerificationError as error:
        row |= {"status": "unproven", "message": _first(error)}
        if isinstance(error.evidence, Proof):
            row["proof"] = _of_proof(error.evidence)
    except ParedownError as error:
        row |= {"status": "error", "message": f"{type(error).__name__}: {_first(error)}"}
    except Exception as error:
        row |= {"status": "error", "message": f"{type(error).__name__}: {_first(error)}"}
    row["seconds"] = round(time.perf_counter() - start, 2)
    row["cpu_seconds"] = round(time.process_time(), 2)
    row["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    emit(row | {"done": True})


def _fill(row: dict[str, Any], asked: dict[str, Any], emit: Report) -> None:
    model, _ = load_model(asked["model"])
    row["total_parameters"] = sum(p.numel() for p in model.parameters())
    program, row["input"] = _captured(model, asked["model"])
    row["parameters"] = sum(p.numel() for p in program.module.parameters())
    row["batch"] = program.batch
    emit(row)
    coupling = couple(program)
    row |= _of_coupling(coupling)
    emit(row)
    cost = examine(program)
    plan = allocate(
        coupling,
        score(program, coupling, "l1"),
        cost,
        Budget(channels=float(asked["channels"])),
        align=1,
        floor=0.0,
    )
    pruned = prune(program, plan)
    after = sum(p.numel() for p in pruned.module.parameters())
    row |= {
        "status": "proven",
        "removed": round(1 - after / max(row["parameters"], 1), 4),
        "realiser": pruned.realiser,
        "proof": _of_proof(pruned.proof),
    }
    if asked.get("export"):
        emit(row)
        start = time.perf_counter()
        try:
            row["parity"] = _parity(pruned)
        except Exception as error:  # the pruned model stands, whatever became of its file
            row["parity"] = {"message": f"{type(error).__name__}: {_first(error)}"}
        row["export_seconds"] = round(time.perf_counter() - start, 2)


def _captured(model: nn.Module, name: str) -> tuple[Program, list[list[int]]]:
    """The program, at the smallest of a few inputs that the model takes; recorded with the row."""
    refused: Exception | None = None
    for inputs in _inputs(model, name):
        try:
            return capture(model, inputs, train=True), [list(t.shape) for t in inputs]
        except RejectedError as error:  # its own forward refuses this size
            refused = error
    assert refused is not None
    raise refused


def _inputs(model: nn.Module, name: str) -> list[tuple[torch.Tensor, ...]]:
    family, _, plain = name.partition(":")
    if family == "torchvision":
        return _torchvision_inputs(plain)
    cfg = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
    get = cfg.get if hasattr(cfg, "get") else lambda key, default=None: getattr(cfg, key, default)
    channels, height, width = get("input_size") or (3, 224, 224)
    sizes = [(height, width)]
    if not get("fixed_input_size"):
        small = [(max(h, 32), max(w, 32)) for h, w in ((64, 64), (height // 2, width // 2))]
        sizes = [*small, *sizes]
    return [(torch.randn(2, channels, h, w),) for h, w in dict.fromkeys(sizes)]


def _torchvision_inputs(plain: str) -> list[tuple[torch.Tensor, ...]]:
    if plain.startswith(_FLOW):
        return [(torch.rand(2, 3, 128, 128) * 2 - 1, torch.rand(2, 3, 128, 128) * 2 - 1)]
    if plain in _CLIPS or plain.startswith(("r3d", "mc3", "r2plus1d")):
        side = 224 if plain.startswith(("mvit", "s3d")) else 64
        return [(torch.randn(2, 3, _CLIPS.get(plain, 8), side, side),)]
    sides = (
        (224, 299) if plain.startswith(("vit", "maxvit")) else (75, 299) if plain.startswith("inception") else (64, 224)
    )
    if plain.startswith("ssd300"):
        sides = (300, 300)
    return [(torch.randn(2, 3, s, s),) for s in dict.fromkeys(sides)]


def _of_coupling(coupling: Coupling) -> dict[str, Any]:
    every = coupling.free_units + coupling.pinned_units
    return {
        "spaces": len(coupling.spaces),
        "free_units": coupling.free_units,
        "pinned_units": coupling.pinned_units,
        "free_share": round(coupling.free_units / max(every, 1), 4),
        "pinned_share": round(coupling.pinned_units / max(every, 1), 4),
        "reasons": dict(_by_reason(coupling).most_common(20)),
        "pinned": [{"reason": p.reason, "units": p.units, "where": p.where} for p in coupling.pinned][:20],
        "unknown_ops": dict(coupling.unknown_ops),
        "couple_seconds": round(coupling.seconds, 3),
    }


def _by_reason(coupling: Coupling) -> Counter[str]:
    """Pinned units by reason, wherever they are."""
    units: Counter[str] = Counter()
    for pinned in coupling.pinned:
        units[pinned.reason] += pinned.units
    return units


def _of_proof(proof: Proof) -> dict[str, Any]:
    return {"max_error": proof.max_error, "scale": proof.scale, "moved": proof.moved, "mode": proof.mode}


def _parity(pruned: Pruned) -> dict[str, Any]:
    """The pruned model as an ONNX file against PyTorch, in ONNX Runtime."""
    from paredown.export import check, export

    args, kwargs = pruned.program.inputs
    for parameter in pruned.module.parameters():
        if parameter.dim() > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)  # a head that starts at zero: equality would prove nothing
    with tempfile.TemporaryDirectory() as folder:
        artifact = export(pruned, Path(folder) / "model.onnx")
        program = capture(pruned.module, {"args": args, "kwargs": kwargs}, train=False)
        checked = check(artifact, program, lambda: [{"args": args, "kwargs": kwargs}])
    return {"max_error": checked.max_error, "scale": checked.scale}


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:400] if lines else type(error).__name__
