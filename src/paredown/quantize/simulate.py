"""Ops that compute what a runtime's kernels compute on integer codes: torch.ops.paredown.*, opaque to torch.export.

One op per kernel, so that a graph of them is at once the simulation and what an exporter translates. Activations are
quantized at run time as ONNX DynamicQuantizeLinear does it: one range for the whole tensor, batch included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dynamic_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q - z, s) of a tensor by its own range, as float32: x̂ = s · (q - z).

    s = (max(x, 0) - min(x, 0)) / 255, z = clamp(round(-min / s), 0, 255), q = clamp(round(x / s) + z, 0, 255), rounding
    half to even; s = 1 where x is all zeros. Source: ONNX operator DynamicQuantizeLinear, opset 11.

    >>> codes, scale = dynamic_codes(torch.tensor([-1.0, 0.0, 1.55]))
    >>> codes.tolist(), round(float(scale), 4)
    ([-100.0, 0.0, 155.0], 0.01)
    """
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = torch.where(high > low, (high - low) / 255.0, torch.ones_like(high))
    zero = torch.round(-low / scale).clamp(0, 255)
    return (torch.round(x / scale) + zero).clamp(0, 255) - zero, scale


@torch.library.custom_op("paredown::dynamic_linear", mutates_args=())
def dynamic_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x [..., inputs] in uint8 by its own range, times codes [outputs, inputs] int8 with scales [outputs]; no bias.

    Sums are exact in float32 up to 518 inputs, beyond that to 1e-7 of the sum (the runtime sums in int32).
    """
    activations, scale = dynamic_codes(x)
    return (activations @ codes.float().t()) * (scale * scales)


@torch.library.custom_op("paredown::group_linear", mutates_args=())
def group_linear(x: Tensor, codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """x [..., inputs] in float32, times codes [outputs, inputs] with scales [outputs, groups]; no bias."""
    return x @ (codes.float() * scales.repeat_interleave(group, dim=1)[:, : codes.shape[1]]).t()


@torch.library.custom_op("paredown::code_rows", mutates_args=())
def code_rows(codes: Tensor, scales: Tensor, indices: Tensor) -> Tensor:
    """Rows of a table held in codes [rows, width] int8 with scales [rows]: an embedding."""
    return codes[indices].float() * scales[indices].unsqueeze(-1)


@torch.library.custom_op("paredown::dynamic_lstm", mutates_args=())
def dynamic_lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """nn.LSTM on codes: (output, h_n, c_n), with the shapes that nn.LSTM has.

    `codes` and `scales` are [4·hidden, inputs] int8 and [4·hidden] of weight_ih, weight_hh per layer and direction; `biases`
    of bias_ih, bias_hh in the same order, or empty. A layer's whole input sequence has one range, the hidden state one per step.
    Source: ONNX Runtime, contrib operator DynamicQuantizeLSTM.
    """
    directions = 2 if bidirectional else 1
    sequence = x.transpose(0, 1) if batch_first else x
    last_h, last_c = [], []
    for layer in range(num_layers):
        inputs, scale = dynamic_codes(sequence)
        outs = []
        for k in range(layer * directions, (layer + 1) * directions):
            gates = (inputs @ codes[2 * k].float().t()) * (scale * scales[2 * k])
            if biases:
                gates = gates + (biases[2 * k] + biases[2 * k + 1])
            out, *state = _steps(gates, h[k], c[k], codes[2 * k + 1], scales[2 * k + 1], backward=k % directions == 1)
            outs.append(out)
            last_h.append(state[0])
            last_c.append(state[1])
        sequence = torch.cat(outs, -1)
    out = sequence.transpose(0, 1) if batch_first else sequence
    return out.contiguous(), torch.stack(last_h), torch.stack(last_c)


def _steps(
    gates: Tensor, h: Tensor, c: Tensor, codes: Tensor, scales: Tensor, *, backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction; `gates` [steps, batch, 4·hidden] already holds the input's part, in the order i, f, g, o."""
    weight = codes.float().t()
    outs: list[Tensor] = []
    for step in gates.flip(0) if backward else gates:
        hidden, scale = dynamic_codes(h)
        i, f, g, o = (step + (hidden @ weight) * (scale * scales)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outs.append(h)
    return torch.stack(outs[::-1] if backward else outs), h, c


@dynamic_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@group_linear.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, group: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@code_rows.register_fake
def _(codes: Tensor, scales: Tensor, indices: Tensor) -> Tensor:
    return scales.new_empty((*indices.shape, codes.shape[1]))


@dynamic_lstm.register_fake
def _(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = h.shape[2] * (2 if bidirectional else 1)
    return x.new_empty((x.shape[0], x.shape[1], width)), torch.empty_like(h), torch.empty_like(c)
