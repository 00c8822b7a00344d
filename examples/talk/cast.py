"""What a plain cast costs: π in five types, and the weights of a network without a scale."""

from __future__ import annotations

import copy
import math

import torch

from paredown.quantize.cast import casts
from paredown.quantize.numerics import grid_of, on_grid
from talk import nets
from talk.page import Column, Page, Setting, Table, Text

TOLD = {
    "float64": ("3.141592653589793", "exact"),
    "float32": ("3.141592653", "5.97e-9"),
    "float16": ("3.1415", "9.39e-4"),
    "int8": ("3", "4.5"),
}


def build(setting: Setting) -> Page:
    """The talk's table beside what the types really hold."""
    rows = [
        (c.kind, c.bits, *TOLD.get(c.kind, ("", "")), f"{c.kept:.17g}", c.absolute_error, 100 * c.relative_error)
        for c in casts(math.pi)
    ]
    pi = Table(
        caption="π in five types, rounded to the nearest. “Off by” is |kept − π|, in % of π; float64 is what the others are compared with",
        columns=(
            Column(title="Type"), Column(title="Bits"), Column(title="Keeps", mark="talk"), Column(title="Off by, %", mark="talk"),
            Column(title="Keeps", mark="counted"), Column(title="Off by", mark="counted"), Column(title="Off by, %", mark="counted"),
        ),
        rows=rows,
    )  # fmt: skip
    return Page(
        title="What a cast costs",
        told=(
            "Store and compute in lower precision: INT8 is four times smaller than FP32. A plain cast of π: FP64 exact; FP32 3.141592653, "
            "off by 5.97e-9; FP16 3.1415, off by 9.39e-4; INT8 3, off by 4.5 (“% deviation”).",
        ),
        parts=(pi, Text(text="The same cast on a network: without a scale almost every weight becomes 0, because weights lie between −1 and 1."), _weights(setting)),
        differ=(
            "The talk cuts decimals off; a cast rounds bits. The nearest number in FP16 is 3.140625, not 3.1415, and in FP32 3.1415927410125732.",
            "Its column is called “% deviation”, but only the INT8 entry fits that; 5.97e-9 and 9.39e-4 are neither the errors in % nor the absolute ones of these types.",
            "bfloat16 is not in the talk. It has the range of FP32 and the fewest digits of all float types here.",
        ),
        shortened=f"the network was trained for {nets.base_epochs(setting)} epochs." if setting.quick else "",
    )  # fmt: skip


def _weights(setting: Setting) -> Table:
    """Accuracy of the digits network with its weights cast to whole numbers, and on 8-bit grids."""
    net = nets.dense(setting)
    ways = {
        "float32": lambda w: w,
        "float16": lambda w: w.half().float(),
        "int8, plain cast": lambda w: w.round().clamp(-128, 127),
        "int8, one scale per tensor": lambda w: on_grid(w, grid_of(w)),
        "int8, one scale per channel": lambda w: on_grid(w, grid_of(w, granularity="channel")),
    }
    rows = []
    for name, change in ways.items():
        changed = copy.deepcopy(net)
        with torch.no_grad():
            weights = [p for p in changed.parameters() if p.dim() > 1]
            zeros = 0
            for weight in weights:
                weight.copy_(change(weight))
                zeros += int((weight == 0).sum())
        rows.append((name, 100 * zeros / sum(w.numel() for w in weights), nets.accuracy(changed)))
    return Table(
        caption="Weights of the convolutions and the linear layer cast, everything else in float32; 540 test images, one seed, simulated in PyTorch",
        columns=(
            Column(title="Weights as"), Column(title="Become 0, %", mark="measured", form=".1f"),
            Column(title="Accuracy, %", mark="measured", form=".2f"),
        ),
        rows=rows,
    )  # fmt: skip
