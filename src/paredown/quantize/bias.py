"""Bias correction: what rounding takes from the mean of a layer's output goes into its bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, fx

from paredown.program import Inputs
from paredown.quantize.decompose import fetch
from paredown.quantize.lanes import Changes, Lanes, Layer, walk


def correct_biases(
    prepared: fx.GraphModule,
    calls: Sequence[Inputs],
    *,
    full: bool = True,
    floats: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, float]:
    """Give every layer with a bias the mean output that it has in float; returns the largest change, by weight.

        b' = b + E[y] - E[ŷ],   E over samples and positions

    y is the layer in float. With `full`, ŷ is the quantized layer on the inputs that the layers before it, corrected
    already, give in codes (Nagel et al. 2019, arXiv 1906.04721, section 4.2, empirical form); without, on the float inputs:
    E[(W - Ŵ) x], which corrects the weights' rounding only and sees no other layer. `floats` are the weights and biases before
    a repair that chose codes, by attribute (`Calibrated.floats`): y is theirs. Changes the prepared graph, and nothing but biases.
    """
    changes, found = Changes(), {}

    def visit(layer: Layer, lanes: Sequence[Lanes]) -> None:
        if layer.bias is None:
            return
        moved = _mean(layer, lanes, full)
        bias = fetch(prepared, layer.bias).detach()
        changes.biases[layer.bias] = (bias.double() + moved).to(bias.dtype)
        found[layer.weight] = float(moved.abs().max())

    walk(prepared, calls, changes, visit, floats=floats)
    return found


def _mean(layer: Layer, lanes: Sequence[Lanes], full: bool) -> Tensor:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for lane in lanes:
        wanted = lane.whole.env[layer.node]
        if full:
            got = lane.coded.run_node(layer.node)
        else:
            weight = lane.coded.env[layer.use.weight]
            args = (lane.whole.env[layer.source], weight, *(_held(lane, a) for a in layer.node.args[2:]))
            got = layer.node.target(*args, **layer.node.kwargs)  # type: ignore[operator]
        away = (wanted - got).movedim(layer.use.axis, -1).reshape(-1, wanted.shape[layer.use.axis])
        total, count = total + away.double().sum(0), count + len(away)
    return total / max(count, 1)


def _held(lane: Lanes, value: object) -> object:
    return lane.whole.env[value] if isinstance(value, fx.Node) else value
