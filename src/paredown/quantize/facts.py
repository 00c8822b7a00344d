"""The numbers of the page about numerics as plain data: report/ draws them, and --json prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paredown.program import Program
from paredown.quantize.batches import Batches
from paredown.quantize.cast import casts, zero_points
from paredown.quantize.noise import BITS, LayerNoise, activation_noise, sqnr, weight_noise
from paredown.quantize.numerics import Granularity, grid_of, levels_of, on_grid

RANGE, DRAWN_BITS = (-1.0, 3.0), 4
"""Of the mapping that is drawn."""
GROUP = 32
TOLD = {"float64": (math.pi, 0.0), "float32": (3.141592653, 5.97e-9), "float16": (3.1415, 9.39e-4), "int8": (3.0, 4.5)}
"""π as the talk that this page follows prints it, and "% deviation" there."""


def numerics_facts(
    program: Program | None = None,
    batches: Batches | None = None,
    *,
    name: str = "",
    observer: str = "mse",
    worst: int = 3,
) -> dict[str, Any]:
    """What quantization costs, in numbers: schema 1, JSON-ready, SQNR in dB (null: no signal, or nothing lost).

    {"schema", "casts", "mapping", "granularity", "model"}. Without a program "model" is null. With one it holds, per layer,
    SQNR of the weight by granularity and bits and, where `batches` are given, of what enters the layer; and histograms
    with a 4-bit grid of the `worst` weights and activations (lowest SQNR at 8 bits). Seeded: the same call gives the same.

    Raises what `weight_noise` and `activation_noise` raise.

    >>> facts = numerics_facts()
    >>> facts["casts"]["rows"][2]["kept"], facts["mapping"]["affine"]["zero_point"], facts["model"]
    (3.140625, 4, None)
    """
    return {
        "schema": 1,
        "casts": _casts(math.pi),
        "mapping": _mapping(),
        "granularity": {"weights": _weights_demo(), "activations": _tokens_demo(), "group": GROUP},
        "model": None if program is None else _model(program, batches, name, observer, worst),
    }


def _casts(value: float) -> dict[str, Any]:
    rows = []
    for one in casts(value):
        told = TOLD.get(one.kind)
        rows.append(
            {
                "kind": one.kind,
                "bits": one.bits,
                "kept": one.kept,
                "absolute_error": one.absolute_error,
                "relative_error": one.relative_error,
                "told": None if told is None else {"kept": told[0], "percent": told[1]},
            }
        )
    return {"value": value, "rows": rows}


def _mapping() -> dict[str, Any]:
    low, high = RANGE
    ends = torch.tensor([low, high])
    affine = grid_of(ends, bits=DRAWN_BITS, mapping="affine")
    even = grid_of(ends, bits=DRAWN_BITS)
    return {
        "range": [low, high],
        "bits": DRAWN_BITS,
        **{
            kind: {
                "scale": float(grid.scales),
                "zero_point": int(grid.zero_points),
                "quant_min": grid.quant_min,
                "quant_max": grid.quant_max,
                "levels": list(levels_of(grid)),
            }
            for kind, grid in (("affine", affine), ("symmetric", even))
        },
        "zero_points": [
            {
                "codes": [quant_min, quant_max],
                "rows": [
                    {
                        "rule": one.rule,
                        "scale": one.scale,
                        "zero_point": one.zero_point,
                        "largest_error": one.largest_error,
                        "root_mean_square_error": one.root_mean_square_error,
                        "clipped_share": one.clipped_share,
                    }
                    for one in zero_points(low, high, quant_min, quant_max)
                ],
            }
            for quant_min, quant_max in ((0, 255), (-128, 127))
        ],
    }


def _weights_demo() -> dict[str, Any]:
    """Channels of uneven size, as depthwise and folded layers have them."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(torch.randn(64, 1, generator=generator))
    weight = torch.randn(64, 256, generator=generator) * spread
    return {
        "what": "64 channels of 256 normal numbers, the channels' sizes log-normal (σ = 1), seeded",
        "sqnr_db": _by_bits(weight, ("tensor", "channel", "group")),
    }


def _tokens_demo() -> dict[str, Any]:
    """Tokens of uneven size, one of them far out."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(128, 256, generator=generator) * torch.exp(torch.randn(128, 1, generator=generator) / 2)
    tokens[0] *= 20
    return {
        "what": "128 tokens of 256 normal numbers, the tokens' sizes log-normal (σ = ½), one 20 times as large, seeded",
        "sqnr_db": _by_bits(tokens, ("tensor", "token")),
    }


def _by_bits(values: Tensor, granularities: Sequence[Granularity]) -> dict[str, dict[str, float | None]]:
    """The median over rows: one row far out must not hide what the others lose."""
    found: dict[str, dict[str, float | None]] = {g: {} for g in granularities}
    for granularity in granularities:
        for bits in BITS:
            grid = grid_of(values, bits=bits, granularity=granularity, group=GROUP)
            rounded = on_grid(values, grid)
            each = [sqnr(a, b) for a, b in zip(values, rounded, strict=True)]
            found[granularity][str(bits)] = _plain(float(torch.tensor([d for d in each if d is not None]).median()))
    return found


def _model(program: Program, batches: Batches | None, name: str, observer: str, worst: int) -> dict[str, Any]:
    weights = weight_noise(program, group=GROUP)
    inputs = () if batches is None else activation_noise(program, batches, observer=observer)
    entering = {one.name: one for one in inputs}
    return {
        "name": name,
        "observer": None if batches is None else observer,
        "group": GROUP,
        "layers": [
            {
                "name": one.name,
                "kind": one.kind,
                "shape": list(one.shape),
                "weight": _decibels(one),
                "activation": _decibels(entering[one.name]) if one.name in entering else None,
            }
            for one in weights
        ],
        "worst": [
            *(_picture(one, "weight") for one in _lowest(weights, "channel", worst)),
            *(_picture(one, "activation") for one in _lowest(inputs, "tensor", worst)),
        ],
    }


def _lowest(layers: Sequence[LayerNoise], granularity: str, number: int) -> list[LayerNoise]:
    def at_8_bits(one: LayerNoise) -> float:
        found = one.sqnr_db[granularity][8]
        return math.inf if found is None else found

    return sorted((one for one in layers if at_8_bits(one) < math.inf), key=at_8_bits)[:number]


def _picture(one: LayerNoise, of: str) -> dict[str, Any]:
    seen = one.histogram
    return {
        "name": one.name,
        "of": of,
        "bits": DRAWN_BITS,
        "levels": list(levels_of(one.grids[DRAWN_BITS])),
        "histogram": {"low": seen.low, "high": seen.high, "counts": list(seen.counts), "zeros": seen.zeros},
        "sqnr_db": _decibels(one),
    }


def _decibels(one: LayerNoise) -> dict[str, dict[str, float | None]]:
    return {g: {str(b): _plain(db) for b, db in by_bits.items()} for g, by_bits in one.sqnr_db.items()}


def _plain(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
