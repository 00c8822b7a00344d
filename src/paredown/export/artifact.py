"""Artifact and Check: exported files, and what the runtime makes of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

SCHEME = "paredown_scheme"
"""Where a file of codes says which scheme they are of, in ONNX's metadata and OpenVINO's rt_info: its ops and types alone do not
tell w2, ternary or w4a8 from int8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """The files of one export: the first is the model, others are side files (external data)."""

    files: tuple[Path, ...]
    target: str
    scheme: str
    """ "fp32", "fp16", or that of the codes, as "int8"."""

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
    num_layers: int | None = None
    """Convolutions and products with a constant matrix in the runtime's own graph."""
    num_layers_on_codes: int | None = None
    """Those of them that run in int8."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Kind of node in `float_nodes` → why it computes in float; empty for a file without codes, where all do."""

    @property
    def layer_share(self) -> float | None:
        """Convolutions and linear layers on codes, from 0 to 1; None where there are none, or nothing is known."""
        if not self.num_layers or self.num_layers_on_codes is None:
            return None
        return self.num_layers_on_codes / self.num_layers


class LayerCounts(TypedDict):
    """Two fields of a Check."""

    num_layers: int
    num_layers_on_codes: int


_LAYERS = frozenset(
    "Conv FusedConv NhwcFusedConv QLinearConv ConvInteger ConvTranspose Gemm FusedGemm QGemm "
    "DynamicQuantizeMatMul MatMulNBits Convolution GroupConvolution Deconvolution FullyConnected Conv2d DepthwiseConv2d "
    "CONV_2D DEPTHWISE_CONV_2D FULLY_CONNECTED".split()
)
"""What runtimes call convolutions and products with a constant matrix."""


def layer_counts(int8_nodes: Iterable[str], float_nodes: Iterable[str], others: Collection[str] = ()) -> LayerCounts:
    """The two counts of a Check, from its nodes. `others` are nodes that are layers too, though their kind does not say so.

    >>> layer_counts(["QLinearConv: 0", "QLinearAdd: 1"], ["Gemm: head", "MatMul: scores"])
    {'num_layers': 2, 'num_layers_on_codes': 1}
    """
    on_codes, in_float = (
        sum(node.partition(":")[0] in _LAYERS or node in others for node in nodes)
        for nodes in (int8_nodes, float_nodes)
    )
    return {"num_layers": on_codes + in_float, "num_layers_on_codes": on_codes}
