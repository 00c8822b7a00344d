"""Honest sizes of masked weights: what each sparse format would take, what gzip takes, and which MACs are only on paper."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from paredown.errors import must_be
from paredown.examine import Cost, examine
from paredown.granularity import Granularity
from paredown.plan import Mask
from paredown.program import capture
from paredown.prune.mask import Bools, fitting
from paredown.prune.nouns import Pruned
from paredown.records import Badge

INDEX_BITS, POINTER_BITS = 32, 32
FORMULAS = {
    "dense_bytes": "numel × b / 8",
    "bitmask_bytes": "⌈numel / 8⌉ + non-zeros × b / 8, that is 1 + (1 − s) b bits per weight",
    "csr_bytes": "non-zeros × (b + i) / 8 + (rows + 1) × 4; i = 16 bits where there are ≤ 65,536 columns, else 32",
    "n_m_bytes": "groups × N × (b + ⌈log2 M⌉) / 8; for 2:4 that is 0.5 b + 1 bits per weight",
    "bsr_bytes": "blocks left × (r c b + 32) / 8 + (block rows + 1) × 4, that is (1 − s)(b + 32 / (r c)) bits per weight and row pointers",
    "gzip_bytes": "gzip, level 6, of the real bytes of the dense tensor with its zeros, as a part of the file's stream",
    "effective_macs": "MACs × non-zero weights / weights",
}
"""What each figure is; s = share of zeros, b = bits per value."""
BADGES: dict[str, Badge] = {
    **dict.fromkeys(FORMULAS, "estimated"),
    **dict.fromkeys(("dense_bytes", "gzip_bytes"), "measured"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSizes:
    """One masked weight. Bytes of formats are *estimated* by FORMULAS; `gzip_bytes` is *measured*."""

    name: str
    shape: tuple[int, ...]
    granularity: str
    num_zeros: int
    """By the mask."""
    dense_bytes: int
    """What the file holds: a mask alone makes nothing smaller."""
    bitmask_bytes: int
    csr_bytes: int
    n_m_bytes: int | None
    """None where the mask is not N:M."""
    bsr_bytes: int | None
    """None where the mask is not of blocks, rows, columns or kernels."""
    block: tuple[int, int] | None
    """Rows and columns of a block of BSR, of the matrix [out, in × kernel]."""
    gzip_bytes: int | None
    """None where it was not measured."""
    macs: int
    """What a dense runtime executes for one sample."""
    effective_macs: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.num_zeros / max(math.prod(self.shape), 1)

    @property
    def best_bytes(self) -> int:
        """The smallest of the estimated formats, the dense one among them."""
        formats = (self.dense_bytes, self.bitmask_bytes, self.csr_bytes, self.n_m_bytes, self.bsr_bytes)
        return min(b for b in formats if b is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the masks of a model are worth, by layer and in all. Layers sum to the totals."""

    layers: tuple[LayerSizes, ...]
    other_bytes: int
    """Parameters and buffers without a mask, dense; tied ones once."""
    other_macs: int
    """MACs of layers without a mask."""
    file_gzip_bytes: int | None
    """gzip, level 6, of the whole model.safetensors, measured."""

    @property
    def dense_bytes(self) -> int:
        """All tensors as they lie in the file, without its header."""
        return self.other_bytes + sum(layer.dense_bytes for layer in self.layers)

    @property
    def best_bytes(self) -> int:
        """Estimated: each masked weight in its smallest format, the rest dense."""
        return self.other_bytes + sum(layer.best_bytes for layer in self.layers)

    @property
    def bitmask_bytes(self) -> int:
        """Estimated: each masked weight as bitmask and values, the rest dense."""
        return self.other_bytes + sum(layer.bitmask_bytes for layer in self.layers)

    @property
    def macs(self) -> int:
        """What a dense runtime executes for one sample."""
        return self.other_macs + sum(layer.macs for layer in self.layers)

    @property
    def effective_macs(self) -> int:
        """Estimated: multiplications by weights that are not masked."""
        return self.other_macs + sum(layer.effective_macs for layer in self.layers)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        gz = "not tested" if self.file_gzip_bytes is None else f"{self.file_gzip_bytes:,} bytes (measured)"
        yield f"Masks only: the file stays {self.dense_bytes:,} bytes; gzip of it {gz}."
        yield f"Best sparse format of each weight {self.best_bytes:,} bytes (estimated); as bitmasks {self.bitmask_bytes:,} (estimated)."
        yield f"A dense runtime executes {self.macs:,} MACs; {self.effective_macs:,} of them with weights that are not masked (estimated)."
        yield f"{'weight':32} {'zeros':>6} {'dense':>11} {'bitmask':>11} {'CSR':>11} {'N:M':>11} {'BSR':>11} {'gzip':>11}"
        for layer in self.layers:
            figures = (layer.dense_bytes, layer.bitmask_bytes, layer.csr_bytes, layer.n_m_bytes, layer.bsr_bytes)
            cells = " ".join(f"{'' if f is None else format(f, ','):>11}" for f in (*figures, layer.gzip_bytes))
            yield f"{layer.name:32} {100 * layer.sparsity:5.1f}% {cells}"


def mask_sizes(pruned: Pruned, *, measure_gzip: bool = True) -> Sizes:
    """Bytes and MACs of a masked model, per weight and in all, by what each format takes (see FORMULAS).

    A mask removes nothing: the file holds dense zeros and a dense runtime multiplies by them. Everything else here is
    what it *could* be, badge "estimated", except gzip of the real bytes, which is measured. Values count in the dtype
    that the weight has; zeros that no mask holds count as values.

    >>> import torch; from torch import nn; from paredown.program import capture
    >>> from paredown.plan import Plan; from paredown.prune import prune
    >>> net = nn.Linear(64, 64, bias=False)
    >>> kept = np.zeros((64, 64), dtype=bool); kept[:, ::4] = True
    >>> small = prune(capture(net, torch.zeros(2, 64)), Plan(keep={}, masks={"weight": Mask.of(kept, "element")}))
    >>> sizes = mask_sizes(small)
    >>> sizes.dense_bytes, sizes.bitmask_bytes, sizes.macs, sizes.effective_macs
    (16384, 4608, 4096, 1024)
    """
    must_be("pruned", pruned, Pruned, fix="Use paredown.prune(program, plan).")
    cost = examine(capture(pruned.module, pruned.program.inputs, train=False))
    return sizes_at(pruned, cost, measure_gzip=measure_gzip)


def sizes_at(pruned: Pruned, cost: Cost, *, measure_gzip: bool = True) -> Sizes:
    """`mask_sizes` of a module whose cost is counted already."""
    parameters = dict(pruned.module.named_parameters(remove_duplicate=False))
    kept = fitting(parameters, pruned.plan.masks)
    first = {id(parameters[name]): name for name in kept}
    macs: dict[str, int] = dict.fromkeys(kept, 0)
    other_macs = 0
    for node in cost.by_node:
        names = {n for n in (first.get(id(parameters[w])) for w in node.weights if w in parameters) if n is not None}
        if names and len(node.weights) == 1:
            macs[names.pop()] += node.macs
        else:  # several weights in one node (recurrent cells): by their share
            other_macs += _shared(node.macs, node.weights, parameters, first, macs)
    state = {n: t.detach().cpu().contiguous() for n, t in pruned.module.state_dict().items()}
    # Tied names are one tensor here, under the name of the mask where there is one.
    one_name = {_storage(t): n for n, t in reversed(state.items())} | {_storage(state[n]): n for n in kept}
    distinct = {n: state[n] for n in one_name.values()}
    zipped, file_bytes = _zipped(distinct) if measure_gzip else ({}, None)
    layers = tuple(
        _layer(name, parameters[name].detach(), k, pruned.plan.masks[name], macs[name], zipped.get(name))
        for name, k in kept.items()
    )
    return Sizes(
        layers=layers,
        other_bytes=sum(t.numel() * t.element_size() for n, t in distinct.items() if n not in kept),
        other_macs=other_macs,
        file_gzip_bytes=file_bytes,
    )


def _shared(
    total: int, weights: tuple[str, ...], parameters: Mapping[str, Tensor], first: dict[int, str], macs: dict[str, int]
) -> int:
    """Spread the MACs of a node over its masked weights by their size; what is left belongs to others."""
    sizes = {w: parameters[w].numel() for w in weights if w in parameters}
    rest = total
    for weight, size in sizes.items():
        name = first.get(id(parameters[weight]))
        if name is not None:
            part = total * size // max(sum(sizes.values()), 1)
            macs[name] += part
            rest -= part
    return rest


def _layer(name: str, weight: Tensor, kept: Bools, mask: Mask, macs: int, zipped: int | None) -> LayerSizes:
    bits = 8 * weight.element_size()
    matrix = kept.reshape(kept.shape[0], -1) if kept.ndim > 1 else kept.reshape(1, -1)
    num_kept = int(matrix.sum())
    cut = Granularity.parse(mask.granularity)
    block = _block(cut, kept.shape)
    return LayerSizes(
        name=name,
        shape=kept.shape,
        granularity=mask.granularity,
        num_zeros=kept.size - num_kept,
        dense_bytes=kept.size * bits // 8,
        bitmask_bytes=bitmask_bytes(matrix, bits),
        csr_bytes=csr_bytes(matrix, bits),
        n_m_bytes=n_m_bytes(kept.shape, cut.a, cut.b, bits) if cut.kind == "n:m" and cut.holds(kept) else None,
        bsr_bytes=bsr_bytes(matrix, *block, bits) if block else None,
        block=block,
        gzip_bytes=zipped,
        macs=macs,
        effective_macs=macs * num_kept // max(kept.size, 1),
    )


def bitmask_bytes(kept: Bools, bits: int) -> int:
    """One bit per weight, and the values that are kept.

    >>> bitmask_bytes(np.array([[True, False, False, True]]), bits=32)
    9
    """
    return -(-kept.size // 8) + int(kept.sum()) * bits // 8


def csr_bytes(kept: Bools, bits: int) -> int:
    """Compressed sparse rows: values, column indices of 16 bits (32 above 65,536 columns), row pointers of 32 bits."""
    index = 16 if kept.shape[1] <= 2**16 else INDEX_BITS
    return -(-int(kept.sum()) * (bits + index) // 8) + (len(kept) + 1) * POINTER_BITS // 8


def n_m_bytes(shape: tuple[int, ...], n: int, m: int, bits: int) -> int:
    """N values and N positions of ⌈log2 M⌉ bits per group of M input channels; a short last group takes a whole one."""
    groups = shape[0] * -(-shape[1] // m) * math.prod(shape[2:])
    return groups * n * bits // 8 + -(-groups * n * (m - 1).bit_length() // 8)


def bsr_bytes(kept: Bools, rows: int, columns: int, bits: int) -> int:
    """Block compressed sparse rows: blocks with any weight left, one index of 32 bits each, row pointers of 32 bits.

    Border blocks are stored whole, as runtimes do.
    """
    height, width = -(-len(kept) // rows), -(-int(kept.shape[1]) // columns)
    padded: NDArray[np.bool_] = np.zeros((height * rows, width * columns), dtype=np.bool_)
    padded[: kept.shape[0], : kept.shape[1]] = kept
    left = int(padded.reshape(height, rows, width, columns).any(axis=(1, 3)).sum())
    return left * (rows * columns * bits + INDEX_BITS) // 8 + (height + 1) * POINTER_BITS // 8


def _block(cut: Granularity, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The block that BSR would use for a granularity, None where cells are single weights."""
    if len(shape) < 2:
        return None
    return {
        "block": (cut.a, cut.b),
        "row": (1, max(math.prod(shape[1:]), 1)),
        "column": (max(shape[0], 1), 1),
        "kernel": (1, max(math.prod(shape[2:]), 1)),
    }.get(cut.kind)


def _zipped(state: dict[str, Tensor]) -> tuple[dict[str, int], int]:
    """gzip of the whole safetensors file, in one pass: bytes by tensor and in all. Flushed after each tensor."""
    data = safetensors_bytes(state)
    start = 8 + int.from_bytes(data[:8], "little")
    places = {n: e["data_offsets"] for n, e in json.loads(data[8:start]).items() if n != "__metadata__"}
    stream = zlib.compressobj(level=6, wbits=31)  # 31: with the header and checksum of gzip
    total = len(stream.compress(data[:start])) + len(stream.flush(zlib.Z_SYNC_FLUSH))
    out = {}
    for name, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
        part = stream.compress(data[start + begin : start + end])
        out[name] = len(part) + len(stream.flush(zlib.Z_SYNC_FLUSH))
        total += out[name]
    return out, total + len(stream.flush())


def _storage(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else id(tensor)
