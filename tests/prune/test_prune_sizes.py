"""Sizes of masked weights: the formulas against bytes that were really written, scipy's own formats, and METHODS 2.4."""

from __future__ import annotations

import gzip
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from paredown.granularity import Granularity
from paredown.plan import Mask, Plan
from paredown.program import capture
from paredown.prune import mask_sizes, prune
from paredown.prune.sizes import bitmask_bytes, bsr_bytes, csr_bytes, n_m_bytes

MATRICES = arrays.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 40)))


def encode_bitmask(weights: NDArray[Any], kept: NDArray[np.bool_]) -> bytes:
    return np.packbits(kept).tobytes() + weights[kept].tobytes()


def decode_bitmask(data: bytes, shape: tuple[int, int], dtype: Any) -> NDArray[Any]:
    count = shape[0] * shape[1]
    bits = np.unpackbits(np.frombuffer(data[: -(-count // 8)], np.uint8), count=count).astype(bool).reshape(shape)
    out = np.zeros(shape, dtype)
    out[bits] = np.frombuffer(data[-(-count // 8) :], dtype)
    return out


@given(MATRICES, st.sampled_from([np.float32, np.float16]))
def test_bitmask_and_csr_are_what_encoding_takes(kept: NDArray[np.bool_], dtype: Any) -> None:
    weights = np.where(kept, np.arange(1, kept.size + 1).reshape(kept.shape), 0).astype(dtype)
    bits = 8 * weights.itemsize
    data = encode_bitmask(weights, kept)
    assert len(data) == bitmask_bytes(kept, bits)
    assert np.array_equal(decode_bitmask(data, kept.shape, dtype), weights)
    rows = [struct.pack("<I", 0)]
    values, columns, count = b"", b"", 0
    for row, mask in zip(weights, kept, strict=True):
        values += row[mask].tobytes()
        columns += np.flatnonzero(mask).astype(np.uint16).tobytes()
        count += int(mask.sum())
        rows.append(struct.pack("<I", count))
    assert len(values) + len(columns) + len(b"".join(rows)) == csr_bytes(kept, bits)


@given(MATRICES, st.integers(1, 5), st.integers(1, 5))
def test_bsr_is_what_scipy_holds(kept: NDArray[np.bool_], rows: int, columns: int) -> None:
    sparse = pytest.importorskip("scipy.sparse")
    padded = np.zeros((-(-kept.shape[0] // rows) * rows, -(-kept.shape[1] // columns) * columns), np.float32)
    padded[: kept.shape[0], : kept.shape[1]] = kept
    held = sparse.bsr_matrix(padded, blocksize=(rows, columns))
    assert held.data.nbytes + held.indices.nbytes + held.indptr.nbytes == bsr_bytes(kept, rows, columns, 32)


@pytest.mark.parametrize("ratio", ["2:4", "4:8", "1:4", "1:2", "3:5"])
@pytest.mark.parametrize("shape", [(8, 40), (6, 40, 3, 3), (4, 10)])
def test_n_of_m_is_what_encoding_takes(ratio: str, shape: tuple[int, ...]) -> None:
    """Values and positions of every group, written one after the other and read back."""
    cut = Granularity.parse(ratio)
    weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    kept = cut.keep_n_of_m(np.abs(weights))
    last, mask = np.moveaxis(weights, 1, -1), np.moveaxis(kept, 1, -1)
    width = next(b for b in range(1, 9) if 2**b >= cut.b)
    values, positions = [], []
    for row, which in zip(last.reshape(-1, shape[1]), mask.reshape(-1, shape[1]), strict=True):
        for start in range(0, shape[1], cut.b):
            at = [i for i in range(start, min(start + cut.b, shape[1])) if which[i]]
            at += [start] * (cut.a - len(at))  # a short last group is filled up
            values += [row[i] if which[i] else 0.0 for i in at]
            positions += [format(i - start, f"0{width}b") for i in at]
    bits = "".join(positions)
    data = np.asarray(values, np.float32).tobytes() + np.packbits([int(b) for b in bits]).tobytes()
    assert len(data) == n_m_bytes(shape, cut.a, cut.b, 32)


@pytest.mark.parametrize("bits", [32, 16])
def test_bits_per_weight_are_those_of_the_table(bits: int) -> None:
    """METHODS 2.4: bitmask 1 + (1-s)b, CSR (1-s)(b+16) + pointers, 2:4 0.5b + 1, BSR (1-s)(b + 32/(rc)) + pointers."""
    blocks = np.random.default_rng(1).random((256, 256)) < 0.2
    kept = np.repeat(np.repeat(blocks, 4, 0), 4, 1)
    left, numel = kept.mean(), kept.size
    assert 8 * bitmask_bytes(kept, bits) / numel == pytest.approx(1 + left * bits)
    assert 8 * csr_bytes(kept, bits) / numel == pytest.approx(left * (bits + 16) + 32 * 1025 / numel)
    assert 8 * bsr_bytes(kept, 4, 4, bits) / numel == pytest.approx(left * (bits + 32 / 16) + 32 * 257 / numel)
    assert 8 * n_m_bytes((1024, 1024), 2, 4, bits) / numel == 0.5 * bits + 1
    wide = np.ones((1, 2**16 + 1), dtype=bool)
    assert csr_bytes(wide, bits) == wide.size * (bits + 32) // 8 + 8  # 16 bits cannot index them


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.mix(self.norm(self.conv(x)).relu()).mean((2, 3))))


def masked(names: dict[str, str]) -> Any:
    torch.manual_seed(0)
    net = Net().eval()
    masks = {}
    for name, text in names.items():
        values, cut = net.get_parameter(name).detach().abs().numpy(), Granularity.parse(text)
        if cut.kind == "n:m":
            kept = cut.keep_n_of_m(values)
        else:
            cells = cut.reduce(values)
            kept = cut.expand(cells >= np.quantile(cells, 0.75), values.shape)
        masks[name] = Mask.of(kept, text)
    return prune(capture(net, torch.randn(2, 4, 6, 6)), Plan(keep={}, masks=masks), condense=False)


def test_a_whole_model_adds_up_and_macs_are_told_apart() -> None:
    small = masked({"conv.weight": "2:4", "mix.weight": "4x3", "one.weight": "element"})
    sizes = mask_sizes(small)
    state = {n: t for n, t in small.module.state_dict().items() if n != "two.weight"}
    assert sizes.dense_bytes == sum(t.numel() * t.element_size() for t in state.values())
    by_name = {layer.name: layer for layer in sizes.layers}
    assert by_name["conv.weight"].macs == 8 * 4 * 9 * 36 and by_name["mix.weight"].macs == 8 * 4 * 9 * 36
    assert by_name["one.weight"].macs == 2 * 64  # one tensor, two layers
    for name, layer in by_name.items():
        left = small.plan.masks[name].num_kept
        numel = small.module.get_parameter(name).numel()
        assert layer.effective_macs == layer.macs * left // numel < layer.macs
        assert layer.num_zeros == numel - left and layer.dense_bytes == 4 * numel
        assert layer.bitmask_bytes == -(-numel // 8) + 4 * left
        assert 0 < layer.gzip_bytes < layer.dense_bytes
        assert layer.best_bytes == min(b for b in (
            layer.dense_bytes, layer.bitmask_bytes, layer.csr_bytes, layer.n_m_bytes, layer.bsr_bytes) if b is not None)  # fmt: skip
    assert by_name["conv.weight"].n_m_bytes == 72 * 2 * 4 + 72 * 2 * 2 // 8 and by_name["conv.weight"].bsr_bytes is None
    assert by_name["mix.weight"].block == (4, 3) and by_name["mix.weight"].n_m_bytes is None
    assert sizes.effective_macs < sizes.macs and sizes.best_bytes < sizes.dense_bytes
    text = str(sizes)
    assert "Masks only: the file stays" in text and "(estimated)" in text and "(measured)" in text


def test_gzip_is_that_of_the_real_file() -> None:
    small = masked({"conv.weight": "element", "one.weight": "element"})
    state = {n: t.contiguous() for n, t in small.module.state_dict().items() if n != "two.weight"}
    real = len(gzip.compress(safetensors_bytes(state), compresslevel=6))
    assert mask_sizes(small).file_gzip_bytes == pytest.approx(real, rel=0.1)  # a flush after each tensor costs 5 bytes
    quick = mask_sizes(small, measure_gzip=False)
    assert quick.file_gzip_bytes is None and quick.layers[0].gzip_bytes is None and "not tested" in str(quick)


def test_half_precision_counts_half() -> None:
    net = nn.Linear(64, 64, bias=False).half()
    kept = np.random.default_rng(0).random((64, 64)) < 0.25
    small = prune(capture(net, torch.zeros(2, 64).half()), Plan(keep={}, masks={"weight": Mask.of(kept, "element")}))
    assert mask_sizes(small).layers[0].bitmask_bytes == 512 + 2 * int(kept.sum())
