"""Codes below 8 bits, really small: packed into bytes, and a documented file of them (docs/packed.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paredown.errors import RejectedError, UsageError
from paredown.quantize.nouns import Packed
from paredown.quantize.schemes import LEVELS, Levels, weight_range
from paredown.records import whole_file

KEY, VERSION = "paredown_packed", 1
"""Of the description in the header."""
TRITS = 5
"""Ternary codes in a byte: 3⁵ = 243 ≤ 256, so 1.6 bits each."""
_SCALES = {"float16": torch.float16, "float32": torch.float32}
_CODES = {"int8": torch.int8, "uint8": torch.uint8}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSize:
    """Where the bytes of a packed file are; the four add up to its size."""

    codes_bytes: int
    scales_bytes: int
    zero_points_bytes: int
    header_bytes: int
    """Names, shapes and the description of the format."""
    num_weights: int

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return self.codes_bytes + self.scales_bytes + self.zero_points_bytes + self.header_bytes

    @property
    def bits_per_weight(self) -> float:
        """8 · (codes + scales + zero points) / weights; the header is told apart, because it does not grow with them."""
        body = self.total_bytes - self.header_bytes
        return 8 * body / self.num_weights if self.num_weights else 0.0


def pack_codes(codes: Tensor, *, bits: int, levels: Levels = "integer") -> Tensor:
    """Integer codes as bytes, in the order of the flattened tensor; uint8, shape [⌈n · bits / 8⌉].

    Integer: u = q + 2^(bits-1) for signed codes (torch.int8), u = q for unsigned (torch.uint8); bits 1 to 8. Code i takes
    the bits i·b … i·b + b - 1 of the stream, the lowest bit of a byte first, so 3-bit codes cross bytes. Balanced:
    u = (q + 2^b - 1)/2. Binary: u = (q + 1)/2, one bit. Ternary: t = q + 1, five to a byte, Σ t_j · 3^j, ⌈n / 5⌉ bytes. What fills the last byte is 0 bits (0 trits).

    Raises UsageError: bits that are none, a dtype that holds no codes, codes that do not fit.

    >>> pack_codes(torch.tensor([-8, 7], dtype=torch.int8), bits=4).tolist()
    [240]
    >>> pack_codes(torch.tensor([1, 0, -1, 1, 1], dtype=torch.int8), bits=2, levels="ternary").tolist()
    [221]
    """
    low, high, step = _code_range(bits, levels, codes.dtype)
    flat = codes.detach().cpu().reshape(-1).numpy().astype(np.int16)
    if flat.size and (flat.min() < low or flat.max() > high or ((flat - low) % step).any()):
        wanted = "-1 or 1" if levels == "binary" else f"{'odd, ' if step == 2 else ''}from {low} to {high}"
        msg = f"codes of {levels} levels at {bits} bits must be {wanted}. Got {flat.min()} to {flat.max()}."
        raise UsageError(msg)
    unsigned = ((flat - low) // step).astype(np.uint8)
    if levels == "ternary":
        trits = np.pad(unsigned, (0, -unsigned.size % TRITS)).reshape(-1, TRITS)
        return torch.from_numpy((trits @ (3 ** np.arange(TRITS))).astype(np.uint8))
    width = 1 if levels == "binary" else bits
    stream = (unsigned[:, None] >> np.arange(width, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(stream.reshape(-1), bitorder="little"))


def unpack_codes(
    data: Tensor, shape: tuple[int, ...], *, bits: int, levels: Levels = "integer", dtype: torch.dtype = torch.int8
) -> Tensor:
    """The codes that `pack_codes` made bytes of, in that shape and dtype (torch.int8, or torch.uint8 for unsigned ones).

    Raises UsageError where the bytes are not as many as the shape needs, or a byte of trits is above 242.

    >>> unpack_codes(torch.tensor([240], dtype=torch.uint8), (2,), bits=4).tolist()
    [-8, 7]
    """
    low, _, step = _code_range(bits, levels, dtype)
    count, raw = math.prod(shape), data.detach().cpu().numpy()
    if data.dtype != torch.uint8 or raw.shape != (packed_length(count, bits, levels),):
        want = packed_length(count, bits, levels)
        msg = f"packed codes of the shape {shape} must be {want} bytes (uint8). Got {data.dtype} {tuple(raw.shape)}."
        raise UsageError(msg)
    if levels == "ternary" and raw.size and raw.max() >= 3**TRITS:
        msg = f"a byte of {TRITS} ternary codes must be below {3**TRITS}. Got {raw.max()}."
        raise UsageError(msg)
    unsigned: NDArray[Any]
    if levels == "ternary":
        unsigned = (raw[:, None] // (3 ** np.arange(TRITS)) % 3).reshape(-1)[:count]
    else:
        width = 1 if levels == "binary" else bits
        stream = np.unpackbits(raw, bitorder="little")[: count * width].reshape(count, width)
        unsigned = np.packbits(stream, axis=1, bitorder="little")[:, 0]
    return torch.from_numpy(unsigned.astype(np.int16) * step + low).to(dtype).reshape(shape)


def packed_length(count: int, bits: int, levels: Levels = "integer") -> int:
    """Bytes that so many codes take.

    >>> packed_length(9, 3), packed_length(9, 2, "ternary"), packed_length(9, 1, "binary")
    (4, 2, 2)
    """
    if levels == "ternary":
        return -(-count // TRITS)
    return -(-count * (1 if levels == "binary" else bits) // 8)


def _code_range(bits: int, levels: Levels, dtype: torch.dtype) -> tuple[int, int, int]:
    """Smallest and largest code and the step between codes."""
    if levels not in LEVELS or dtype not in _CODES.values() or not 1 <= bits <= (7 if levels == "balanced" else 8):
        msg = f"packed codes must have 1 to 8 bits (balanced ones 7 at most), levels {', '.join(LEVELS)}, and the dtype int8 or uint8. Got {bits}, {levels!r}, {dtype}."
        raise UsageError(msg)
    if levels != "integer":
        if dtype != torch.int8:
            msg = f"{levels} codes must be int8: they are signed. Got {dtype}."
            raise UsageError(msg)
        return *weight_range(bits, levels), 1 if levels == "ternary" else 2
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 1) if dtype == torch.int8 else (0, 2**bits - 1, 1)


def save_packed(
    weights: Mapping[str, Packed], path: str | Path, *, scales: Literal["float16", "float32"] = "float32"
) -> PackedSize:
    """Write weights as one safetensors file of packed codes (docs/packed.md); the same weights give the same bytes.

    NAME.codes uint8, NAME.scales in the dtype of `scales`, NAME.zero_points int16 unless they are all 0; what they mean
    stands as JSON in the header. float16 halves the scales and rounds each by up to 2⁻¹¹: `load_packed` then returns
    the rounded ones.

    Raises UsageError (no weights, codes that do not fit, zero points outside of int16) and RejectedError (a scale that
    float16 cannot hold).

    >>> import tempfile
    >>> one = Packed(codes=torch.tensor([[-8, 7, 0]], dtype=torch.int8), scales=torch.ones(1), zero_points=torch.zeros(1, dtype=torch.int64), bits=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = save_packed({"w": one}, f"{folder}/w.safetensors")
    ...     read = load_packed(f"{folder}/w.safetensors")
    >>> size.codes_bytes, size.scales_bytes, read["w"].codes.tolist()
    (2, 4, [[-8, 7, 0]])
    """
    from safetensors.torch import save

    if not weights or scales not in _SCALES:
        msg = f"a packed file must have at least one weight, and scales in float16 or float32. Got {len(weights)} and {scales!r}."
        raise UsageError(msg)
    tensors: dict[str, Tensor] = {}
    described = {}
    for name, one in weights.items():
        tensors[f"{name}.codes"] = pack_codes(one.codes, bits=one.bits, levels=one.levels)
        tensors[f"{name}.scales"] = _stored_scales(name, one.scales, scales)
        if bool((one.zero_points != 0).any()):
            tensors[f"{name}.zero_points"] = _stored_zeros(name, one.zero_points)
        described[name] = {
            "shape": list(one.codes.shape),
            "dtype": str(one.codes.dtype).removeprefix("torch."),
            "bits": one.bits,
            "levels": one.levels,
            "axis": one.axis,
            "group": one.group,
            "blocks": None if one.blocks is None else list(one.blocks),
            "scales": scales,
        }
    header = json.dumps({"version": VERSION, "weights": described}, sort_keys=True, separators=(",", ":"))
    with whole_file(Path(path)) as temporary:
        temporary.write_bytes(save(tensors, metadata={KEY: header}))
    return packed_size(path)


def _stored_scales(name: str, scales: Tensor, kind: str) -> Tensor:
    stored = scales.detach().cpu().to(_SCALES[kind]).contiguous()
    if bool(((stored.float() == 0) != (scales == 0)).any()) or not bool(torch.isfinite(stored).all()):
        msg = f"scales must be finite and fit into {kind}. Got {float(scales.abs().min()):.3g} to {float(scales.abs().max()):.3g} at {name}. Take float32."
        raise RejectedError(msg)
    return stored


def _stored_zeros(name: str, zeros: Tensor) -> Tensor:
    if int(zeros.min()) < -(2**15) or int(zeros.max()) >= 2**15:
        msg = f"zero points must fit into 16 bits. Got {int(zeros.min())} to {int(zeros.max())} at {name}."
        raise UsageError(msg)
    return zeros.detach().cpu().to(torch.int16).contiguous()


def load_packed(path: str | Path) -> dict[str, Packed]:
    """The weights of a file that `save_packed` wrote, codes unpacked, scales as float32.

    Raises RejectedError: not such a file, another version, or a header that does not fit its tensors.
    """
    described, tensors = _read(Path(path))
    found = {}
    for name, about in described.items():
        try:
            found[name] = _loaded(name, about, tensors)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            msg = f"the description of a packed weight must fit its tensors. Got {type(error).__name__} ({error}) at {name} in {str(path)!r}."
            raise RejectedError(msg) from error
    return found


def _loaded(name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Packed:
    shape, axis, group = tuple(int(n) for n in about["shape"]), about["axis"], about["group"]
    codes = unpack_codes(
        tensors[f"{name}.codes"], shape, bits=about["bits"], levels=about["levels"], dtype=_CODES[about["dtype"]]
    )
    scales = tensors[f"{name}.scales"].float()
    zeros = tensors.get(f"{name}.zero_points", torch.zeros(scales.shape)).long()
    channels = 1 if axis is None else shape[axis]
    groups = 1 if group is None else -(-math.prod(shape) // max(channels, 1) // group)
    if scales.numel() != channels * groups or zeros.shape != scales.shape:
        msg = f"there must be {channels * groups} scales and as many zero points. Got {tuple(scales.shape)} and {tuple(zeros.shape)}"
        raise ValueError(msg)
    blocks = None if about["blocks"] is None else (int(about["blocks"][0]), int(about["blocks"][1]))
    return Packed(
        codes=codes,
        scales=scales,
        zero_points=zeros,
        bits=about["bits"],
        group=group,
        axis=axis,
        blocks=blocks,
        levels=about["levels"],
    )


def _read(path: Path) -> tuple[Mapping[str, Mapping[str, Any]], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (OSError, ValueError, SafetensorError) as error:
        msg = f"a file of packed weights must be one that save_packed wrote. Got {type(error).__name__}: {error} at {str(path)!r}."
        raise RejectedError(msg) from error
    if not isinstance(header, dict) or header.get("version") != VERSION or not _described(header.get("weights")):
        got = header.get("version") if isinstance(header, dict) else "no description"
        msg = f"a file of packed weights must have the description of version {VERSION}, with a shape for every weight. Got {got!r} at {str(path)!r}."
        raise RejectedError(msg)
    return header["weights"], tensors


def _described(weights: Any) -> bool:
    """Every weight has a description with a shape."""
    return isinstance(weights, dict) and all(
        isinstance(about, dict)
        and isinstance(about.get("shape"), list)
        and all(isinstance(n, int) and n >= 0 for n in about["shape"])
        for about in weights.values()
    )


def packed_size(path: str | Path) -> PackedSize:
    """Where the bytes of a packed file are, from its stat and its header. Raises RejectedError as `load_packed`."""
    described, tensors = _read(Path(path))
    sizes = {
        kind: sum(t.numel() * t.element_size() for key, t in tensors.items() if key.endswith(f".{kind}"))
        for kind in ("codes", "scales", "zero_points")
    }
    return PackedSize(
        codes_bytes=sizes["codes"],
        scales_bytes=sizes["scales"],
        zero_points_bytes=sizes["zero_points"],
        header_bytes=Path(path).stat().st_size - sum(sizes.values()),
        num_weights=sum(math.prod(about["shape"]) for about in described.values()),
    )
