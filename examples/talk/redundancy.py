"""Redundancy: how similar the filters of a layer are, before and after pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

import paredown as pare
from paredown.models import load_task_module
from paredown.recipes import digits
from talk import draw, nets
from talk.page import Column, Page, Setting, Spread, Table, over_seeds


def similarity(weight: torch.Tensor) -> tuple[float, float]:
    """Mean over filters of the largest |cosine| to another filter, and the share of directions that are used.

    The share is (Σλ)² / Σλ² / n of the eigenvalues λ of the filters' Gram matrix, n = min(filters, weights of one): 1 where all
    directions are used alike, 1/n where all filters are one.
    """
    rows = weight.detach().double().flatten(1)
    rows = rows[rows.norm(dim=1) > 0]
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).abs()
    used = float(cosine.trace() ** 2 / cosine.square().sum()) / min(rows.shape)
    return float(cosine.fill_diagonal_(0).amax(dim=1).mean()), used


def build(setting: Setting) -> Page:
    """The digits network: dense, half of its channels, and fresh random weights of both shapes."""
    named = {"dense, trained": nets.dense, "half of the channels, trained": lambda s, seed: nets.halved(s, seed).module}
    trained = {name: by_layer(setting, make) for name, make in named.items()}
    chance = {
        "dense, random weights": by_layer(setting, lambda s, seed: pare.fresh(digits.model(), seed=100 + seed)),
        "half, random weights": by_layer(
            setting, lambda s, seed: pare.fresh(nets.halved(s, seed).module, seed=100 + seed)
        ),
    }
    layers = list(trained["dense, trained"])
    everything = {
        name: {layer: tuple(over_seeds([v[k] for v in values]) for k in (0, 1)) for layer, values in found.items()}
        for name, found in (trained | chance).items()
    }
    parts = [
        _table(
            0, "The largest |cosine| of a filter to another one of its layer, mean over filters", everything, layers
        ),
        _chart(everything, layers),
        _table(
            1, "Share of the directions that the filters use, of those that they could: (Σλ)²/Σλ²/n", everything, layers
        ),
    ]
    if setting.data is not None:
        parts.append(_resnet20(setting))
    excess = [
        [
            float(np.mean([trained[now][n][seed][0] - chance[then][n][seed][0] for n in layers]))
            for seed in setting.seeds
        ]
        for now, then in zip(trained, chance, strict=True)
    ]
    return Page(
        title="Redundancy of filters",
        told=("Networks are over-parameterised: many parameters encode the same or similar information (the talk cites Blier & Ollivier 2018 on description length). So some can leave.",),
        parts=tuple(parts),
        differ=(
            *told_of(*excess),
            "The comparison with random filters is needed: in few dimensions even they have a near neighbour. In the share of directions the layers can be compared one by one.",
            "Parameters that could be left out without loss need not look alike: similarity is one sign of redundancy, the curve of the pruning recipe is another.",
        ),
        not_tested=("Description length as in Blier & Ollivier.",),
        shortened=f"{len(setting.seeds)} seeds, {nets.base_epochs(setting)} epochs; no ResNet-20." if setting.quick else "",
    )  # fmt: skip


def told_of(before: Sequence[float], after: Sequence[float]) -> tuple[str, str]:
    """What the excess over random filters says, dense and pruned, seed by seed; an interval that leaves out 0 counts."""
    dense, less = over_seeds(before), over_seeds([a - b for a, b in zip(after, before, strict=True)])
    alike = "holds here" if dense.low is not None and dense.low > 0 else "is not shown here"
    word = "is not shown beyond the interval"
    if less.high is not None and less.high < 0:
        word = "holds here: what is left is less redundant"
    elif less.low is not None and less.low > 0:
        word = "does not hold here: what is left is more alike"
    return (
        f"That trained filters are more alike than random ones of the same shape {alike}: {_interval(dense)} in the largest |cosine|, mean over layers.",
        f"Pruning by L1 norm and training again moves that excess by {_interval(less)}: that redundant filters leave {word}.",
    )


def _interval(some: Spread) -> str:
    return f"{some.value:+.3f}" + ("" if some.low is None else f" ({some.low:+.3f} to {some.high:+.3f})")


def by_layer(setting: Setting, make: object) -> dict[str, list[tuple[float, float]]]:
    """Similarity and use of every convolution with more than one weight per filter, one pair for each seed."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in setting.seeds:
        for name, part in make(setting, seed).named_modules():
            if isinstance(part, nn.Conv2d):
                found.setdefault(name, []).append(similarity(part.weight))
    return found


def _table(
    which: int, caption: str, by_net: Mapping[str, Mapping[str, tuple[Spread, Spread]]], layers: list[str]
) -> Table:
    return Table(
        caption=caption,
        columns=(Column(title="Layer"), *(Column(title=name, mark="measured", form=".2f") for name in by_net)),
        rows=[(layer, *(found[layer][which] for found in by_net.values())) for layer in layers],
    )


def _chart(by_net: Mapping[str, Mapping[str, tuple[Spread, Spread]]], layers: list[str]) -> draw.Figure:
    points = {name: [(i, found[layer][0]) for i, layer in enumerate(layers, 1)] for name, found in by_net.items()}
    controls = [name for name in by_net if "random" in name]
    return draw.lines(
        points,
        x="layer, from the input",
        y="largest |cosine|, mean",
        caption="The same as lines; dashed: random weights of the same shape",
        controls=controls,
    )


def _resnet20(setting: Setting) -> Table:
    """A network that was trained elsewhere: ResNet-20 on CIFAR-10."""
    task = load_task_module("cifar10")
    net = task.model(data=setting.data)
    rows = []
    for name, part in net.named_modules():
        if isinstance(part, nn.Conv2d):
            size = math.prod(part.weight.shape[1:])
            rows.append(
                (
                    name,
                    f"{part.out_channels} of {size}",
                    *similarity(part.weight),
                    *similarity(torch.randn(part.weight.shape, generator=torch.Generator().manual_seed(0))),
                )
            )
    return Table(
        caption="ResNet-20 as it was trained on CIFAR-10, against random filters of the same shape",
        columns=(
            Column(title="Layer"), Column(title="Filters"), Column(title="Largest |cosine|", mark="measured", form=".2f"), Column(title="Directions used", mark="measured", form=".2f"),
            Column(title="|cosine|, random", mark="measured", form=".2f"), Column(title="Directions, random", mark="measured", form=".2f"),
        ),
        rows=rows,
    )  # fmt: skip
