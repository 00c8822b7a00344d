"""Artifact and Check: exported files, and what the runtime makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """The files of one export: the first is the model, others are side files (external data)."""

    files: tuple[Path, ...]
    target: str
    scheme: str
    """ "fp32", "fp16" or "int8"."""

    @property
    def path(self) -> Path:
        """The model file."""
        return self.files[0]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files by stat."""
        return sum(f.stat().st_size for f in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The exported file, executed in its runtime, against the simulation in PyTorch."""

    max_error: float
    """max |runtime - torch| over all outputs and samples."""
    scale: float
    """max |torch output|."""
    cosine: float
    """Smallest cosine similarity of a whole output tensor."""
    int8_nodes: tuple[str, ...]
    """ "op: name" of the nodes that run in int8 in the runtime's own optimised graph."""
    float_nodes: tuple[str, ...]
    """ "op: name" of those that compute in float."""
    holds: bool
    notes: tuple[str, ...] = ()
    """What the runtime does differently on this machine than elsewhere."""
