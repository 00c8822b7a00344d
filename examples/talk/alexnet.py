"""The layer table of AlexNet: the original of 2012 and torchvision's, which the talk mixes up."""

from __future__ import annotations

import torch
from torch import nn

import paredown as pare
from paredown.models import load_model
from talk.page import Column, Page, Setting, Table

TOLD = (34_944, 614_656, 885_120, 1_327_488, 884_992, 37_752_832, 16_781_312, 4_097_000)
TOLD_TOTAL = 61_100_840


def original() -> nn.Sequential:
    """AlexNet with the widths of the paper, 96-256-384-384-256, on one device: no groups. Input 3×227×227."""
    return nn.Sequential(
        nn.Conv2d(3, 96, 11, stride=4), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
        nn.Linear(9216, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000),
    )  # fmt: skip


def build(setting: Setting) -> Page:
    """Both networks through examine, layer by layer."""
    theirs, _ = load_model("torchvision:alexnet")
    first, second = examined(original(), 227), examined(theirs, 224)
    equal = sum(row[4] == told for row, told in zip(first, TOLD, strict=True))
    return Page(
        title="AlexNet, layer by layer",
        told=(
            "Parameters per layer, for convolutions of 96, 256, 384, 384 and 256 filters and layers of 4096, 4096 and 1000: "
            + " · ".join(f"{n:,}" for n in TOLD) + f". Total {TOLD_TOTAL:,}.",
        ),
        parts=(
            _table("The original widths (Krizhevsky et al. 2012), without groups, input 3×227×227", first, TOLD),
            _table("torchvision’s AlexNet (after “One weird trick”, 2014), input 3×224×224", second, None),
            Table(
                caption="The totals. The talk prints the second one under the first one’s rows; the first is their sum",
                columns=(Column(title="Of"), Column(title="Parameters", mark="talk"), Column(title="Parameters", mark="counted"), Column(title="MACs", mark="counted")),
                rows=[("original", sum(TOLD), *_sums(first)), ("torchvision", TOLD_TOTAL, *_sums(second))],
            ),
        ),
        differ=(
            f"{equal} of the talk’s {len(TOLD)} rows are equal to what we count of the original. They add up to {sum(TOLD):,}.",
            f"The total that is printed, {TOLD_TOTAL:,}, is that of torchvision’s AlexNet, whose convolutions have other widths: a table of one network with the total of another.",
            "The paper’s own network has two groups in convolutions 2, 4 and 5, because it ran on two GPUs; without groups, as in the talk’s rows, these layers have twice the weights.",
        ),
    )  # fmt: skip


def examined(net: nn.Module, size: int) -> list[tuple[str, str, str, str, int, int]]:
    """(layer, kind, kernel, output, parameters, MACs) of every layer with parameters."""
    cost = pare.examine(pare.capture(net, torch.zeros(1, 3, size, size), train=False))
    modules = dict(net.named_modules())
    rows = []
    for layer in cost.layers:
        if layer.parameters:
            kernel = getattr(modules[layer.name], "kernel_size", ())
            output = "×".join(map(str, layer.output_shape[1:]))
            rows.append(
                (layer.name, layer.kind, "×".join(map(str, kernel)) or "–", output, layer.parameters, layer.macs)
            )
    return rows


def _sums(rows: list[tuple[str, str, str, str, int, int]]) -> tuple[int, int]:
    """Parameters and MACs of all layers."""
    return sum(r[4] for r in rows), sum(r[5] for r in rows)


def _table(caption: str, rows: list[tuple[str, str, str, str, int, int]], told: tuple[int, ...] | None) -> Table:
    heads = (
        Column(title="Layer"), Column(title="Kind"), Column(title="Kernel"), Column(title="Output"),
        *((Column(title="Parameters", mark="talk"),) if told else ()),
        Column(title="Parameters", mark="counted", bar=True), Column(title="MACs", mark="counted", bar=True),
    )  # fmt: skip
    cells = [(*r[:4], *((told[i],) if told else ()), *r[4:]) for i, r in enumerate(rows)]
    return Table(caption=caption, columns=heads, rows=cells)
