"""Rules for recurrent layers and cells: LSTM, GRU, RNN. Hidden unit j is row j of every gate and column j of what reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from paredown.couple.ids import FIXED, laid
from paredown.couple.operand import Rule, args_of, result, schema, unknown
from paredown.couple.trace import Trace

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def layers(node: fx.Node, trace: Trace) -> Any:
    """nn.LSTM, nn.GRU, nn.RNN: all layers and directions have one hidden size, so unit j leaves all of them.

    Gate g of unit j is row g·H + j of weight_ih, weight_hh and both biases; weight_hh reads it in column j, the next
    layer in column j (and H + j from the other direction), what comes after in the channels of the output. With
    projections weight_hr reads it and its own rows are the units that the rest reads.
    """
    source = node.args[0]
    hidden, params, biased, count, both = args_of(node, "hx", "params", "has_biases", "num_layers", "bidirectional")
    directions = 2 if both else 1
    per = len(params) // (int(count) * directions)
    if any(p not in trace.parameters for p in params):
        return unknown(node, trace)
    gates = _GATES[_kind(node)]
    ids = trace.of(source)
    read = trace.vector(ids, ids.dim() - 1, "features of a recurrent layer")
    units = _units(trace, params[0], gates)
    outs = trace.weight(params[per - 1], 0, "write") if per % 2 else units
    for layer in range(int(count)):
        for direction in range(directions):
            start = (layer * directions + direction) * per
            mine = params[start : start + per]
            projection = mine.pop() if per % 2 else None
            _weights(trace, mine if biased else mine[:2], gates, read, units, outs)
            if projection is not None:
                trace.tie(trace.weight(projection, 0, "write"), outs, "layers of one recurrent module")
                trace.read(projection, 1, units, "read by a projection")
        read = outs.repeat(directions)
    states = list(hidden) if isinstance(hidden, list | tuple) else [hidden]
    for state, of in zip(states, (outs, units), strict=False):
        _initial(trace, state, of)
    shapes = [r.shape for r in result(node)]
    vectors = (read, outs, units)
    return tuple(laid(v, len(shape) - 1, shape) for v, shape in zip(vectors, shapes, strict=False))


def cell(node: fx.Node, trace: Trace) -> Any:
    """nn.LSTMCell, nn.GRUCell, nn.RNNCell: one step, the state from outside or from the step before."""
    source, hidden, *rest = args_of(node, "input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    weights = [p for p in rest if p is not None]
    if any(p not in trace.parameters for p in weights):
        return unknown(node, trace)
    gates = _GATES[_kind(node)]
    ids = trace.of(source)
    units = _units(trace, weights[0], gates)
    read = trace.vector(ids, ids.dim() - 1, "features of a recurrent layer")
    _weights(trace, weights, gates, read, units, units)
    for state in list(hidden) if isinstance(hidden, list | tuple) else [hidden]:
        _initial(trace, state, units)
    out = result(node)
    if isinstance(out, Tensor):
        return laid(units, out.dim() - 1, out.shape)
    return tuple(laid(units, o.dim() - 1, o.shape) for o in out)


def _kind(node: fx.Node) -> str:
    return str(schema(node).name).removeprefix("aten::").removesuffix("_cell")


def _units(trace: Trace, weight: fx.Node, gates: int) -> Tensor:
    """The hidden units, as the rows of the first gate. Shape [hidden size]."""
    return trace.weight(weight, 0, "write").reshape(gates, -1)[0]


def _weights(trace: Trace, weights: list[fx.Node], gates: int, read: Tensor, units: Tensor, outs: Tensor) -> None:
    """weight_ih [gates · H, inputs], weight_hh [gates · H, outputs] and the biases of one layer and direction."""
    inputs, recurrent, *biases = weights
    for weight in (inputs, recurrent):
        trace.tie(trace.weight(weight, 0, "write").reshape(gates, -1), units, "gates of a recurrent layer")
    for bias in biases:
        trace.tie(trace.of(bias).reshape(gates, -1), units, "gates of a recurrent layer")
    trace.read(inputs, 1, read, "read by a recurrent layer")
    trace.read(recurrent, 1, outs, "read by a recurrent layer")


def _initial(trace: Trace, state: Any, units: Tensor) -> None:
    """The state that a layer starts from: its channels are the units; a constant that is one number fits any size."""
    value = trace.values.get(state)
    if isinstance(value, torch.Tensor) and bool((value == value[..., :1]).all()):
        return
    ids = trace.of(state)
    if bool((ids != FIXED).any()):
        ids = trace.vector(ids, ids.dim() - 1, "initial state of a recurrent layer")
        trace.tie(ids, units, "initial state of a recurrent layer")
    else:
        trace.pin(units, "initial state from outside")


RULES: dict[str, Rule] = dict.fromkeys(_GATES, layers) | {f"{name}_cell": cell for name in _GATES}
