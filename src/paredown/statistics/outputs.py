"""Output statistics: what leaves the channels of a weight, after the activation that follows, streamed in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.couple.trace import op_name, sizes
from paredown.errors import RejectedError
from paredown.program import Program
from paredown.statistics.inputs import readable_uses
from paredown.statistics.observe import Sight, Step, observed
from paredown.statistics.uses import Use

_ACTIVATIONS = frozenset(
    """relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish hardtanh clamp clamp_min hardswish hardsigmoid
    sigmoid tanh softplus softsign logsigmoid log_sigmoid softshrink hardshrink threshold glu softmax""".split()
)
_BETWEEN = frozenset(
    "batch_norm layer_norm group_norm instance_norm rms_norm add sub mul div dropout feature_dropout to clone contiguous".split()
)
"""Ops between a layer and its activation that leave every channel where it is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutputStatistics:
    """What leaves each output of a weight, behind its activation where one follows. Shapes [out], float64."""

    absolute_means: Tensor
    """Mean of |y|."""
    zero_shares: Tensor
    """Share of y that is exactly 0: APoZ behind a ReLU."""
    squared_norms: Tensor
    """Mean of y²."""
    num_positions: int
    """Outputs y seen: samples × positions, of the channel that gave most."""
    activation: str
    """Op that was looked at, as "relu"; the layer's own where no activation follows."""


def output_statistics(
    program: Program,
    parameters: Iterable[str],
    batches: Iterable[Any],
    *,
    loss: Step | None = None,
    num_batches: int = 16,
    module: nn.Module | None = None,
) -> dict[str, OutputStatistics]:
    """Statistics of the outputs of linear layers and convolutions, by parameter; one pass, nothing is kept.

    Looked at is the first activation (relu, gelu, …) behind the layer, through norms, additions and dropout; the layer
    itself where none follows. Batches, `loss` and `module` are those of input_statistics, and so are the errors.

    >>> from paredown.program import capture
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> x = torch.randn(8, 4)
    >>> seen = output_statistics(capture(net, x), ["0.weight"], [x])["0.weight"]
    >>> seen.activation, bool(torch.allclose(seen.absolute_means, net[:2](x).mean(0).double(), atol=1e-6))
    ('relu', True)
    """
    names = list(dict.fromkeys(parameters))
    uses = readable_uses(program, names)
    sums = {name: _Sums(uses[name][0].width) for name in names}
    sights, seen_at = [], {}
    for name in names:
        for use in uses[name]:
            node = _activation(use.node)
            seen_at[name] = op_name(node).rstrip("_")
            sights.append(Sight(node=node, look=partial(sums[name].add, use)))
    observed(program, sights, batches, loss=loss, num_batches=num_batches, module=module)
    return {name: sums[name].result(name, seen_at[name]) for name in names}


def _activation(node: fx.Node) -> fx.Node:
    """The first activation behind a layer, through ops that leave channels in place; else the last of norm or layer."""
    last = node
    here: fx.Node | None = node
    size = sizes(node.meta["val"])
    while here is not None:
        followers = [u for u in here.users if u.op == "call_function" and _like(u, size)]
        found = [u for u in followers if op_name(u).rstrip("_") in _ACTIVATIONS]
        if found:
            return found[0]
        here = next((u for u in followers if op_name(u).rstrip("_") in _BETWEEN), None)
        if here is not None and op_name(here).endswith("norm"):
            last = here
    return last


def _like(node: fx.Node, size: tuple[Any, ...]) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and sizes(value) == size


class _Sums:
    def __init__(self, width: int) -> None:
        self._sums = torch.zeros(3, width, dtype=torch.float64)
        self._count = torch.zeros(width, dtype=torch.float64)

    def add(self, use: Use, value: Tensor) -> None:
        axis = value.dim() - use.spatial - 1 if use.spatial else use.axis
        flat = value.detach().movedim(axis, 0).reshape(value.shape[axis], -1)
        parts = [flat.abs().sum(1, dtype=torch.float64), (flat == 0).sum(1).double(), flat.double().square().sum(1)]
        rows = slice(*use.rows)
        self._sums[:, rows] += torch.stack(parts)
        self._count[rows] += flat.shape[1]

    def result(self, name: str, activation: str) -> OutputStatistics:
        if not bool(torch.isfinite(self._sums).all()):
            msg = f"activations must be finite. Got NaN or infinity behind {name}. Look for NaN in the batches."
            raise RejectedError(msg)
        means = self._sums / self._count.clamp(min=1.0)
        return OutputStatistics(
            absolute_means=means[0],
            zero_shares=means[1],
            squared_norms=means[2],
            num_positions=int(self._count.max()),
            activation=activation,
        )
