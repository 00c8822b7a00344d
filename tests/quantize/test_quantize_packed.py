"""Packed codes: bit-exact both ways for every width and size, small on disk, readable without paredown."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from paredown.errors import RejectedError, UsageError
from paredown.program import capture
from paredown.quantize import quantize
from paredown.quantize.nouns import Packed
from paredown.quantize.packed import load_packed, pack_codes, packed_length, packed_size, save_packed, unpack_codes

DOCS = Path(__file__).parents[2] / "docs" / "packed.md"
KINDS = [
    *((bits, "integer") for bits in range(1, 9)),
    *((bits, "balanced") for bits in range(1, 8)),
    *((2, "ternary"), (1, "binary")),
]
SIZES = st.lists(st.integers(0, 7), min_size=0, max_size=4).map(tuple)


def random_codes(shape: tuple[int, ...], bits: int, levels: str, seed: int, dtype: torch.dtype = torch.int8) -> Any:
    rng = np.random.default_rng(seed)
    if levels == "ternary":
        codes = rng.integers(-1, 2, shape)
    elif levels in ("binary", "balanced"):
        codes = rng.integers(0, 2**bits, shape) * 2 - (2**bits - 1)
    else:
        codes = rng.integers(0, 2**bits, shape) - (2 ** (bits - 1) if dtype == torch.int8 else 0)
    return torch.from_numpy(np.asarray(codes)).to(dtype)


@pytest.mark.parametrize(("bits", "levels"), KINDS)
@given(shape=SIZES, seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_codes_come_back_bit_for_bit(bits: int, levels: Any, shape: tuple[int, ...], seed: int) -> None:
    for dtype in (torch.int8, torch.uint8) if levels == "integer" else (torch.int8,):
        codes = random_codes(shape, bits, levels, seed, dtype)
        data = pack_codes(codes, bits=bits, levels=levels)
        assert data.dtype == torch.uint8
        per_code = {"ternary": 1.6, "binary": 1.0}.get(levels, float(bits))
        count = math.prod(shape)
        assert data.numel() == packed_length(count, bits, levels) == math.ceil(round(count * per_code / 8, 9))
        back = unpack_codes(data, shape, bits=bits, levels=levels, dtype=dtype)
        assert back.dtype == dtype
        assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7])
def test_the_layout_is_a_stream_of_bits_lowest_first(bits: int) -> None:
    codes = random_codes((37,), bits, "integer", 1)
    number = sum((int(q) + 2 ** (bits - 1)) << (bits * i) for i, q in enumerate(codes))  # one long integer, no numpy
    assert bytes(pack_codes(codes, bits=bits).tolist()) == number.to_bytes(packed_length(37, bits), "little")


def test_the_layout_of_trits_is_base_three() -> None:
    codes = random_codes((13,), 2, "ternary", 2)
    padded = [int(q) + 1 for q in codes] + [0, 0]
    want = [int("".join(str(t) for t in reversed(padded[i : i + 5])), 3) for i in range(0, 15, 5)]
    assert pack_codes(codes, bits=2, levels="ternary").tolist() == want


@pytest.mark.parametrize(
    ("codes", "bits", "levels"),
    [([8], 4, "integer"), ([-9], 4, "integer"), ([2], 2, "ternary"), ([0], 1, "binary"), ([1], 0, "integer")],
)
def test_codes_that_do_not_fit_are_refused(codes: list[int], bits: int, levels: Any) -> None:
    with pytest.raises(UsageError, match="must"):
        pack_codes(torch.tensor(codes, dtype=torch.int8), bits=bits, levels=levels)


def test_bytes_that_hold_no_codes_are_refused() -> None:
    with pytest.raises(UsageError, match="2 bytes"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), (4,), bits=4)
    with pytest.raises(UsageError, match="below 243"):
        unpack_codes(torch.tensor([243], dtype=torch.uint8), (5,), bits=2, levels="ternary")


# ----------------------------------------------------------------------------------------------------------- the weight


def packed(shape: tuple[int, ...], bits: int, levels: Any, *, group: int | None = None, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    inner = math.prod(shape[1:])
    size = (shape[0],) if group is None else (shape[0], -(-inner // group))
    return Packed(
        codes=random_codes(shape, bits, levels, seed),
        scales=torch.rand(size, generator=generator) + 0.01,
        zero_points=torch.zeros(size, dtype=torch.int64),
        bits=bits,
        group=group,
        levels=levels,
    )


def test_groups_are_a_loop_over_channels_and_neighbours() -> None:
    one = packed((3, 5, 2, 2), 4, "integer", group=8)
    want = np.zeros((3, 20), dtype=np.float32)
    for c in range(3):
        for k in range(20):
            want[c, k] = one.codes.reshape(3, 20)[c, k].item() * one.scales[c, k // 8].item()
    assert np.array_equal(one.unpack().numpy(), want.reshape(3, 5, 2, 2))


def test_groups_along_another_axis() -> None:
    one = packed((3, 6), 4, "integer", group=4)
    turned = Packed(
        codes=one.codes.T, scales=one.scales, zero_points=one.zero_points, bits=4, group=4, axis=1, levels="integer"
    )
    assert torch.equal(turned.unpack(), one.unpack().T)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    group=st.one_of(st.none(), st.integers(1, 9)),
    zero=st.booleans(),
    scales=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 1000),
)
def test_files_come_back(
    tmp_path_factory: Any, kind: Any, shape: Any, group: int | None, zero: bool, scales: Any, seed: int
) -> None:
    bits, levels = kind
    one = packed(shape, bits, levels, group=group, seed=seed)
    if zero:
        one = Packed(**{**fields(one), "zero_points": torch.full(one.scales.shape, seed - 500)})
    path = tmp_path_factory.mktemp("packed") / "w.safetensors"
    save_packed({"a.weight": one, "b": packed((2, 3), 4, "integer")}, path, scales=scales)
    back = load_packed(path)
    assert list(back) == ["a.weight", "b"]
    for name, value in fields(back["a.weight"]).items():
        want = getattr(one, name)
        if name == "scales":
            want = want.to(getattr(torch, scales)).float()
        assert torch.equal(value, want) if isinstance(want, torch.Tensor) else value == want, name


def fields(one: Packed) -> dict[str, Any]:
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


@pytest.mark.parametrize(("bits", "levels"), KINDS)
@pytest.mark.parametrize("scales", ["float16", "float32"])
@pytest.mark.parametrize("group", [None, 32])
def test_a_file_is_as_small_as_it_says(tmp_path: Path, bits: int, levels: Any, scales: Any, group: int | None) -> None:
    one = packed((96, 251), bits, levels, group=group)
    path = tmp_path / "w.safetensors"
    said = save_packed({"fc.weight": one}, path, scales=scales)
    assert said == packed_size(path)
    assert said.total_bytes == path.stat().st_size
    per_code = {"ternary": 1.6, "binary": 1.0}.get(levels, float(bits))
    scale_bytes = one.scales.numel() * (2 if scales == "float16" else 4)
    assert said.codes_bytes == math.ceil(96 * 251 * per_code / 8)
    assert (said.scales_bytes, said.zero_points_bytes) == (scale_bytes, 0)
    assert said.header_bytes < 500
    assert said.bits_per_weight == pytest.approx(per_code + 8 * scale_bytes / (96 * 251), abs=1e-3)


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    weights = {"b": packed((5, 7), 3, "integer"), "a": packed((4, 4), 2, "ternary")}
    save_packed(weights, tmp_path / "1")
    save_packed(dict(reversed(weights.items())), tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_quantized_uint8_constants_pack_too(tmp_path: Path) -> None:
    one = Packed(
        codes=torch.tensor([0, 3, 255], dtype=torch.uint8),
        scales=torch.tensor(0.5),
        zero_points=torch.tensor(128),
        axis=None,
    )
    save_packed({"table": one}, tmp_path / "t")
    assert load_packed(tmp_path / "t")["table"].unpack().tolist() == [-64.0, -62.5, 63.5]


def test_scales_that_half_precision_loses_are_refused(tmp_path: Path) -> None:
    for scale in (1e-9, 1e6):
        one = Packed(**{**fields(packed((2, 2), 4, "integer")), "scales": torch.full((2,), scale)})
        with pytest.raises(RejectedError, match=r"float16.*at w"):
            save_packed({"w": one}, tmp_path / "w", scales="float16")
        assert not (tmp_path / "w").exists()
        save_packed({"w": one}, tmp_path / "w")
        (tmp_path / "w").unlink()


def _wrong(change: dict[str, Any]) -> dict[str, Any]:
    about = {"shape": [2, 2], "dtype": "int8", "bits": 4, "levels": "integer", "axis": 0, "group": None}
    return {"version": 1, "weights": {"w": {**about, "blocks": None, "scales": "float32", **change}}}


@pytest.mark.parametrize(
    "header",
    [
        None,
        [],
        {"version": 2, "weights": {}},
        {"version": 1, "weights": {"w": 3}},
        _wrong({"shape": [2, 3_000_000_000]}),
        _wrong({"shape": [-2, -2]}),
        _wrong({"shape": "22"}),
        _wrong({"bits": 99}),
        _wrong({"bits": "4"}),
        _wrong({"levels": "quaternary"}),
        _wrong({"dtype": "float32"}),
        _wrong({"axis": 7}),
        _wrong({"axis": "x"}),
        _wrong({"group": 0}),
        _wrong({"group": 1}),
    ],
)
def test_a_file_that_lies_is_refused(tmp_path: Path, header: Any) -> None:
    tensors = {"w.codes": torch.zeros(2, dtype=torch.uint8), "w.scales": torch.ones(2)}
    path = tmp_path / "w.safetensors"
    save_file(tensors, path, metadata={"paredown_packed": json.dumps(_wrong({}))})
    assert load_packed(path)["w"].codes.shape == (2, 2)  # what is wrong below is wrong because of the change
    save_file(tensors, path, metadata=None if header is None else {"paredown_packed": json.dumps(header)})
    with pytest.raises(RejectedError):
        load_packed(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(RejectedError, match="save_packed"):
        load_packed(path)


def _read_as_documented(path: Path, weights: dict[str, Packed]) -> None:
    """Run the reader that docs/packed.md prints and compare."""
    reader = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert reader is not None
    code = reader[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    assert "torch" not in code and "paredown.quantize" not in code
    space: dict[str, Any] = {}
    exec(code.replace('"model.packed.safetensors"', repr(str(path))), space)
    assert set(space["weights"]) == set(weights)
    for name, one in weights.items():
        assert np.allclose(space["weights"][name], one.unpack().numpy(), rtol=1e-6), name


def test_the_documented_reader_reads_without_paredown(tmp_path: Path) -> None:
    weights = {
        "a": packed((6, 11), 3, "integer", group=4),
        "b": packed((5, 3, 3, 3), 4, "integer"),
        "c": packed((7, 9), 2, "ternary"),
        "d": packed((4, 10), 1, "binary"),
    }
    path = tmp_path / "model.packed.safetensors"
    save_packed(weights, path)
    _read_as_documented(path, weights)
    with safe_open(path, framework="np") as file:
        assert all(file.get_tensor(f"{n}.codes").dtype == np.uint8 for n in weights)


class Product(nn.Module):
    """A product with a matrix [inputs, outputs], a table, and a constant that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(40, 12)), nn.Parameter(torch.randn(1, 6, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.matrix + self.shift)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "w4", "w4a8", "w2", "ternary", "binary"])
def test_the_documented_reader_reads_what_every_scheme_writes(tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    x = torch.randn(16, 6, 40)
    weights = dict(quantize(capture(Product(), x[:2]), calibrate=[x], scheme=scheme).weights)
    axes = {name: one.axis for name, one in weights.items()}
    assert axes["head.weight"] == 0
    assert axes["matrix"] == 1
    assert ("shift" in axes) == (scheme in ("int8", "w4a8")) and axes.get("shift") is None
    save_packed(weights, tmp_path / "model.packed.safetensors")
    _read_as_documented(tmp_path / "model.packed.safetensors", weights)
    held = load_packed(tmp_path / "model.packed.safetensors")
    assert all(torch.equal(held[n].unpack(), one.unpack()) for n, one in weights.items())


def test_the_documented_reader_takes_any_axis(tmp_path: Path) -> None:
    weights = {}
    for axis, group in ((0, None), (1, None), (2, None), (1, 4), (2, 5), (None, None)):
        codes = torch.randint(0, 16, (3, 4, 7), dtype=torch.uint8)
        shape: tuple[int, ...] = () if axis is None else (codes.shape[axis],)
        if group is not None and axis is not None:
            shape = (*shape, -(-codes.numel() // codes.shape[axis] // group))
        weights[f"{axis}.{group}"] = Packed(
            codes=codes, scales=torch.rand(shape) + 0.1, zero_points=torch.randint(0, 9, shape), bits=4, axis=axis, group=group,
        )  # fmt: skip
    save_packed(weights, tmp_path / "model.packed.safetensors")
    _read_as_documented(tmp_path / "model.packed.safetensors", weights)
