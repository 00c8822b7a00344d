"""paredown: from a trained PyTorch model to a small, proven, measured file on an edge runtime.

A few verbs over a few immutable nouns: capture, examine, couple, score, allocate, prune, recover, quantize, export, check,
measure; compress is all of them, with a report. `import paredown` loads no torch; a name is loaded when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paredown.allocate import Foreseen as Foreseen
    from paredown.allocate import Latency as Latency
    from paredown.allocate import Sensitivity as Sensitivity
    from paredown.allocate import allocate as allocate
    from paredown.allocate import foresee as foresee
    from paredown.budget import Budget as Budget
    from paredown.compare import Comparison as Comparison
    from paredown.compare import compare as compare
    from paredown.couple import Coupling as Coupling
    from paredown.couple import Pinned as Pinned
    from paredown.couple import Space as Space
    from paredown.couple import Unit as Unit
    from paredown.couple import couple as couple
    from paredown.errors import CaptureError as CaptureError
    from paredown.errors import GateError as GateError
    from paredown.errors import InfeasibleError as InfeasibleError
    from paredown.errors import Interrupted as Interrupted
    from paredown.errors import MissingError as MissingError
    from paredown.errors import NothingToDo as NothingToDo
    from paredown.errors import ParedownError as ParedownError
    from paredown.errors import RejectedError as RejectedError
    from paredown.errors import ResourceError as ResourceError
    from paredown.errors import UsageError as UsageError
    from paredown.errors import VerificationError as VerificationError
    from paredown.examine import Cost as Cost
    from paredown.examine import examine as examine
    from paredown.export import Artifact as Artifact
    from paredown.export import Check as Check
    from paredown.export import check as check
    from paredown.export import export as export
    from paredown.factorize import choose_ranks as choose_ranks
    from paredown.factorize import factorize as factorize
    from paredown.measure import Bundle as Bundle
    from paredown.measure import Tolerance as Tolerance
    from paredown.measure import import_results as import_results
    from paredown.measure import measure as measure
    from paredown.measure.bundle import bundle as bundle
    from paredown.pipeline import Compressed as Compressed
    from paredown.pipeline.compress import compress as compress
    from paredown.plan import Mask as Mask
    from paredown.plan import Plan as Plan
    from paredown.plan import Rank as Rank
    from paredown.program import Program as Program
    from paredown.program import capture as capture
    from paredown.prune import Proof as Proof
    from paredown.prune import Pruned as Pruned
    from paredown.prune import compose as compose
    from paredown.prune import condense as condense
    from paredown.prune import depth_candidates as depth_candidates
    from paredown.prune import fresh as fresh
    from paredown.prune import load as load
    from paredown.prune import load_pruned as load_pruned
    from paredown.prune import mask_sizes as mask_sizes
    from paredown.prune import masks_of as masks_of
    from paredown.prune import prune as prune
    from paredown.prune import reconstruct as reconstruct
    from paredown.prune import save as save
    from paredown.prune import score_depth as score_depth
    from paredown.prune import sparsify as sparsify
    from paredown.prune import take_over as take_over
    from paredown.quantize import Packed as Packed
    from paredown.quantize import Quantized as Quantized
    from paredown.quantize import quantize as quantize
    from paredown.quantize import spare as spare
    from paredown.quantize import train_quantized as train_quantized
    from paredown.records import Measured as Measured
    from paredown.records import Record as Record
    from paredown.report import mask_picture as mask_picture
    from paredown.score import Scores as Scores
    from paredown.score import score as score
    from paredown.search import sensitivity as sensitivity
    from paredown.target import Target as Target
    from paredown.train import keep_masks as keep_masks
    from paredown.train import recover as recover

    __version__: str

_ERRORS = (
    *("CaptureError", "GateError", "InfeasibleError", "Interrupted", "MissingError", "NothingToDo", "ParedownError"),
    *("RejectedError", "ResourceError", "UsageError", "VerificationError"),
)
_ROOMS = {
    "allocate": ("Foreseen", "Latency", "Sensitivity", "allocate", "foresee"),
    "budget": ("Budget",),
    "compare": ("Comparison", "compare"),
    "couple": ("Coupling", "Pinned", "Space", "Unit", "couple"),
    "errors": _ERRORS,
    "examine": ("Cost", "examine"),
    "export": ("Artifact", "Check", "check", "export"),
    "factorize": ("choose_ranks", "factorize"),
    "measure": ("Bundle", "Tolerance", "bundle", "import_results", "measure"),
    "pipeline": ("Compressed", "compress"),
    "plan": ("Mask", "Plan", "Rank"),
    "program": ("Program", "capture"),
    "prune": (
        "Proof",
        "Pruned",
        "compose",
        "condense",
        "depth_candidates",
        "fresh",
        "load",
        "load_pruned",
        "mask_sizes",
        "masks_of",
        "prune",
        "reconstruct",
        "save",
        "score_depth",
        "sparsify",
        "take_over",
    ),
    "quantize": ("Packed", "Quantized", "quantize", "spare", "train_quantized"),
    "records": ("Measured", "Record"),
    "report": ("mask_picture",),
    "score": ("Scores", "score"),
    "search": ("sensitivity",),
    "target": ("Target",),
    "train": ("keep_masks", "recover"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Artifact",
    "Budget",
    "Bundle",
    "CaptureError",
    "Check",
    "Comparison",
    "Compressed",
    "Cost",
    "Coupling",
    "Foreseen",
    "GateError",
    "InfeasibleError",
    "Interrupted",
    "Latency",
    "Mask",
    "Measured",
    "MissingError",
    "NothingToDo",
    "Packed",
    "ParedownError",
    "Pinned",
    "Plan",
    "Program",
    "Proof",
    "Pruned",
    "Quantized",
    "Rank",
    "Record",
    "RejectedError",
    "ResourceError",
    "Scores",
    "Sensitivity",
    "Space",
    "Target",
    "Tolerance",
    "Unit",
    "UsageError",
    "VerificationError",
    "__version__",
    "allocate",
    "bundle",
    "capture",
    "check",
    "choose_ranks",
    "compare",
    "compose",
    "compress",
    "condense",
    "couple",
    "depth_candidates",
    "examine",
    "export",
    "factorize",
    "foresee",
    "fresh",
    "import_results",
    "keep_masks",
    "load",
    "load_pruned",
    "mask_picture",
    "mask_sizes",
    "masks_of",
    "measure",
    "prune",
    "quantize",
    "reconstruct",
    "recover",
    "save",
    "score",
    "score_depth",
    "sensitivity",
    "spare",
    "sparsify",
    "take_over",
    "train_quantized",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version  # this one is slow to import

        value: Any = version("paredown")
    elif name in _ROOM_OF:
        value = getattr(import_module(f"paredown.{_ROOM_OF[name]}"), name)
    else:
        msg = f"module 'paredown' has no attribute {name!r}"
        raise AttributeError(msg)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Front(ModuleType):
    """The package itself. A room may be called as its verb (`paredown.couple`): the name stays the verb's.

    The import system would bind the room to the name as soon as any part of it is imported.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _ROOM_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front
