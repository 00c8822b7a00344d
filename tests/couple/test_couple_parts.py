"""Weights that are cut up or stacked, masks made for all heads, tokens that are learned: what real nets are written with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hazards import Hazard, Inputs, Net, healthy, random
from oracle import distance, plan_of, removed_units, run, scale, zeroed
from paredown.allocate.meter import Meter
from paredown.couple import couple
from paredown.examine import examine
from paredown.program import capture
from paredown.prune import prune


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A net, the units that may leave counted by hand, and how the oracle takes them out."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    free: int
    realiser: str
    zero_writes: bool = False


def _tokens(batch: int) -> Inputs:
    return (random(batch, 4, 5),), {}


def _features(batch: int) -> Inputs:
    return (random(batch, 11),), {}


def _words(batch: int) -> Inputs:
    words = torch.arange(batch * 5).reshape(batch, 5) % 7 + 1
    words[:, 3:] = 0
    return (words,), {}


def _decoder() -> nn.Module:
    """Other keys than queries: torch cuts the packed weight into a third and two thirds. Queries are learned."""

    def forward(m: Any, x: Tensor) -> Tensor:
        memory = m.inner(x)
        return m.head(m.layer(m.queries.unsqueeze(0).repeat(x.shape[0], 1, 1), memory))

    return Net(
        forward,
        inner=nn.Linear(5, 8),
        queries=nn.Parameter(random(3, 8)),
        layer=nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        head=nn.Linear(8, 3),
    )


def _gates() -> nn.Module:
    """A GRU by hand: one matrix for all gates, in rows."""

    def forward(m: Any, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], 4)
        of_x, of_state, bias = m.w.chunk(3, 0), m.u.split(4, 0), m.bias.split(4)
        for t in range(2):
            one = x[:, t]
            keep = torch.sigmoid(one @ of_x[0].t() + state @ of_state[0].t() + bias[0])
            reset = torch.sigmoid(F.linear(one, of_x[1]) + F.linear(state, of_state[1]) + bias[1])
            new = torch.tanh(one @ of_x[2].T + (reset * state) @ of_state[2].T + bias[2])
            state = (1 - keep) * new + keep * state
        return m.head(state)

    w, u, bias = (nn.Parameter(random(*shape)) for shape in ((12, 5), (12, 4), (12,)))
    return Net(forward, w=w, u=u, bias=bias, head=nn.Linear(4, 3))


def _columns() -> nn.Module:
    """Columns of one matrix for two parts of what comes in."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x[:, :5]).relu(), m.b(x[:, 5:]).relu()
        return m.head((F.linear(a, m.w[:, :4]) + F.linear(b, m.w[:, 4:])).relu())

    return Net(forward, a=nn.Linear(5, 4), b=nn.Linear(6, 3), w=nn.Parameter(random(6, 7)), head=nn.Linear(6, 3))


def _mixture(run: Callable[[Any, Tensor, Tensor], Tensor], up: tuple[int, ...], down: tuple[int, ...]) -> nn.Module:
    """Three experts of 5 or 6 hidden units; all of them answer, weighted by a softmax."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.inner(x)
        return m.head(x + run(m, x, m.gate(x).softmax(-1)))

    return Net(
        forward,
        inner=nn.Linear(5, 4),
        gate=nn.Linear(4, 3),
        up=nn.Parameter(random(*up)),
        bias=nn.Parameter(random(3, 6)),
        down=nn.Parameter(random(*down)),
        head=nn.Linear(4, 2),
    )


def _experts_in_letters() -> nn.Module:
    def forward(m: Any, x: Tensor, share: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("btd,edh->bteh", x, m.up) + m.bias)
        return torch.einsum("bted,bte->btd", torch.einsum("bteh,ehd->bted", hidden, m.down), share)

    return _mixture(forward, (3, 4, 6), (3, 6, 4))


def _experts_in_a_batch() -> nn.Module:
    def forward(m: Any, x: Tensor, share: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        gate, value = torch.bmm(rows.repeat(3, 1).view(3, -1, rows.shape[-1]), m.up).chunk(2, -1)
        mixed = torch.bmm(F.silu(gate) * value, m.down) * share.reshape(-1, 3).t()[:, :, None]
        return mixed.sum(0).view(x.shape)

    return _mixture(forward, (3, 4, 10), (3, 5, 4))


def _experts_one_by_one() -> nn.Module:
    def forward(m: Any, x: Tensor, share: Tensor) -> Tensor:
        hidden = [F.gelu(F.linear(x, m.up[e])) for e in range(3)]
        return sum(F.linear(h, m.down[e]) * share[..., e, None] for e, h in enumerate(hidden))  # type: ignore[return-value]

    return _mixture(forward, (3, 5, 4), (3, 4, 5))


def _latents() -> nn.Module:
    """Learned tokens go through a norm before anything else: they are no heads."""

    def forward(m: Any, x: Tensor) -> Tensor:
        kept = m.latents.unsqueeze(0).expand(x.shape[0], -1, -1)
        scores = m.q(m.norm(kept)) @ m.k(x).mT
        return m.head((kept + m.o(scores.softmax(-1) @ m.v(x))).mean(1))

    return Net(
        forward, latents=nn.Parameter(random(3, 6)), norm=nn.LayerNorm(6), q=nn.Linear(6, 4), k=nn.Linear(5, 4),
        v=nn.Linear(5, 4), o=nn.Linear(4, 6), head=nn.Linear(6, 3),
    )  # fmt: skip


def _spatial_gate() -> nn.Module:
    """gMLP: a convolution of width 1 mixes the tokens, every channel by itself."""

    def forward(m: Any, x: Tensor) -> Tensor:
        one, other = F.gelu(m.a(x)).chunk(2, -1)
        return m.head((one * m.mix(m.norm(other))).mean(1))

    return Net(forward, a=nn.Linear(5, 12), norm=nn.LayerNorm(6), mix=nn.Conv1d(4, 4, 1), head=nn.Linear(6, 3))


def _scan() -> nn.Module:
    """A selective scan: every channel meets every state; the states stay."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.inner(x)
        enter, leave = m.states(x).split(3, -1)
        state, out = torch.zeros(x.shape[0], 6, 3), []
        for t in range(3):
            state = torch.exp(-m.decay.exp()) * state + enter[:, t].unsqueeze(1) * x[:, t].unsqueeze(-1)
            out.append((state * leave[:, t].unsqueeze(1)).sum(-1))
        return m.head(torch.stack(out, 1))

    return Net(
        forward, inner=nn.Linear(5, 6), states=nn.Linear(6, 6), decay=nn.Parameter(random(6, 3)), head=nn.Linear(6, 3)
    )


def _padded() -> nn.Module:
    """Padding is masked: torch expands the mask to all heads."""

    def forward(m: Any, words: Tensor) -> Tensor:
        return m.head(m.layer(m.table(words), src_key_padding_mask=words == 0)[:, 0])

    return Net(
        forward,
        table=nn.Embedding(8, 8),
        layer=nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True),
        head=nn.Linear(8, 3),
    )


def _zeros(make: Callable[[int], tuple[Tensor, Tensor]]) -> Callable[[], nn.Module]:
    def forward(m: Any, x: Tensor) -> Tensor:
        state, memory = make(x.shape[0])
        for t in range(2):
            state = torch.tanh(m.a(x[:, t]) + m.b(state))
            memory = memory + state
        return m.head(torch.cat([state, memory], 1))

    return lambda: Net(forward, a=nn.Linear(5, 4), b=nn.Linear(4, 4), head=nn.Linear(8, 3))


def _cut_zeros(batch: int) -> tuple[Tensor, Tensor]:
    state, memory = torch.zeros(batch, 8).chunk(2, 1)
    return state, memory


def _spread_zeros(batch: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 4).expand(batch, -1), torch.zeros(4).view(1, 4)


def _spectrum() -> nn.Module:
    """Tokens mixed by Fourier transforms and a learned filter of complex numbers, kept as pairs."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.inner(x)
        x = x + torch.fft.fft(x, dim=1).real
        return m.head(x + torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(m.filter), n=4, dim=1))

    return Net(forward, inner=nn.Linear(5, 6), filter=nn.Parameter(random(3, 6, 2)), head=nn.Linear(6, 3))


def _complex_rotary() -> nn.Module:
    """Saved angles turn pairs of queries and keys as complex numbers: heads leave whole."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(x.shape[0], 4, 2, 4) for part in (m.q, m.k, m.v))
        turn = torch.view_as_complex(m.turn)[None, :, None]
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (2, 2))) * turn).flatten(3) for t in (q, k))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return m.head(y.transpose(1, 2).flatten(2))

    net = Net(forward, q=nn.Linear(5, 8), k=nn.Linear(5, 8), v=nn.Linear(5, 8), head=nn.Linear(8, 3))
    angles = torch.outer(torch.arange(4.0), torch.tensor([1.0, 0.5]))
    net.register_buffer("turn", torch.stack([angles.cos(), angles.sin()], -1))
    return net


def _windows() -> nn.Module:
    """unfold and fold around a layer over the windows; a channel has as many rows as a window has places."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x[:, None])
        rows = m.b(F.unfold(x, 2, padding=1).transpose(1, 2)).transpose(1, 2)
        return m.head(F.fold(rows, (4, 5), 2, padding=1).relu())

    return Net(forward, a=nn.Conv2d(1, 4, 1), b=nn.Linear(16, 12), head=nn.Conv2d(3, 2, 1))


def _as_many_states() -> nn.Module:
    """As many of these channels as of those, and every one meets every other: one of the two layers stays."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head((m.a(x).unsqueeze(-1) * m.b(x).unsqueeze(-2)).sum(-2))

    return Net(forward, a=nn.Linear(11, 4), b=nn.Linear(11, 4), head=nn.Linear(4, 3))


def _far_ends() -> nn.Module:
    """Cut from further back than the axis is long: Python takes all there is."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.linear(m.a(x).relu(), m.w[-100:, -5:]).relu())

    return Net(forward, a=nn.Linear(11, 5), w=nn.Parameter(random(4, 5)), head=nn.Linear(4, 3))


def _turned_stack() -> nn.Module:
    """Stacked matrices as they are, and others with all three axes turned round."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = (m.a(x) @ m.up).mean(0).relu()
        return m.head((x @ m.down.T).mean(0))

    return Net(
        forward, a=nn.Linear(11, 4), up=nn.Parameter(random(3, 4, 6)), down=nn.Parameter(random(5, 6, 2)), head=nn.Linear(5, 3)
    )  # fmt: skip


def _stack_in_parts() -> nn.Module:
    """Gates and values of all experts lie side by side in one stack, which the forward cuts."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x).relu().unsqueeze(0).expand(3, -1, -1)
        hidden = F.silu(torch.bmm(x, m.up[:, :, :5])) * torch.bmm(x, m.up[:, :, 5:])
        return m.head(torch.bmm(hidden, m.down).sum(0))

    return Net(
        forward, a=nn.Linear(11, 4), up=nn.Parameter(random(3, 4, 10)), down=nn.Parameter(random(3, 5, 6)), head=nn.Linear(6, 3)
    )  # fmt: skip


def _normed_heads() -> nn.Module:
    """Queries and keys go through a norm that all heads share: in the train graph as in the eval graph heads leave whole."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(x.shape[0], 4, 3, 4).transpose(1, 2) for part in (m.q, m.k, m.v))
        return m.head(F.scaled_dot_product_attention(m.norm(q), m.norm(k), v).transpose(1, 2).flatten(2))

    return Net(
        forward, q=nn.Linear(5, 12), k=nn.Linear(5, 12), v=nn.Linear(5, 12), norm=nn.LayerNorm(4), head=nn.Linear(12, 3)
    )


def _equalised() -> nn.Module:
    """Learning rates made equal: weights and biases are scaled at every call."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.leaky_relu(F.linear(x, m.one * 0.4, m.bias * 0.1), 0.2)
        return m.head(F.linear(x, m.two / 2.0).relu())

    one, two, bias = (nn.Parameter(random(*shape)) for shape in ((6, 11), (7, 6), (6,)))
    return Net(forward, one=one, two=two, bias=bias, head=nn.Linear(7, 3))


def _unit_rows() -> nn.Module:
    """Classes as directions: features and rows are divided by their lengths, over the features that are left; and a weight norm
    by hand, whose lengths are one for each row."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.linear(m.inner(x).relu(), m.v * (m.g / m.v.norm(dim=1).clamp_min(0.1))[:, None])
        return F.linear(F.normalize(x), F.normalize(m.classes)) * 8.0

    v, g, classes = (nn.Parameter(random(*shape)) for shape in ((6, 5), (6,), (3, 6)))
    return Net(forward, inner=nn.Linear(11, 5), v=v, g=g, classes=classes)


def _distances() -> nn.Module:
    """Two vectors compared by their angle and their distance; and with learned prototypes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        one, other = m.a(x).relu(), m.b(x).relu()
        angle, gap = F.cosine_similarity(one, other, dim=-1), F.pairwise_distance(one, other)
        return torch.cat([angle[:, None], gap[:, None], torch.cdist(m.c(one), m.prototypes)], 1)

    return Net(
        forward, a=nn.Linear(11, 6), b=nn.Linear(11, 6), c=nn.Linear(6, 5), prototypes=nn.Parameter(random(4, 5))
    )


def _made_matrix() -> nn.Module:
    """A matrix of 6 rows made for every sample, which reads what comes in: rows leave whole."""

    def forward(m: Any, x: Tensor) -> Tensor:
        made = m.rows(m.inner(x[:, 5:]).relu()).view(-1, 6, 5)
        return m.head((torch.bmm(made, x[:, :5].unsqueeze(2)).squeeze(2) + m.shift(x)).relu())

    return Net(forward, inner=nn.Linear(6, 4), rows=nn.Linear(4, 30), shift=nn.Linear(11, 6), head=nn.Linear(6, 3))


def _fields() -> nn.Module:
    """A factorisation machine: fields are summed, then their features; the same ones leave all fields."""

    def forward(m: Any, x: Tensor) -> Tensor:
        fields = torch.stack([m.a(x[:, :4]), m.b(x[:, 4:8]), m.c(x[:, 8:])], 1)
        pairs = 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(1, keepdim=True)
        return pairs + m.head(fields.flatten(1))

    return Net(forward, a=nn.Linear(4, 6), b=nn.Linear(4, 6), c=nn.Linear(3, 6), head=nn.Linear(18, 3))


def _splines() -> nn.Module:
    """A layer of learned curves: each feature as four bumps, and all coefficients of one output in a row of [out, in · 4]."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.inner(x)
        bumps = torch.exp(-(x.unsqueeze(-1) - m.grid).square()).view(x.size(0), -1)
        curves = (m.curves * m.scale.unsqueeze(-1)).view(6, -1)
        return m.head(F.linear(F.silu(x), m.base) + F.linear(bumps, curves))

    curves, scale, base = (nn.Parameter(random(*shape)) for shape in ((6, 5, 4), (6, 5), (6, 5)))
    net = Net(forward, inner=nn.Linear(11, 5), curves=curves, scale=scale, base=base, head=nn.Linear(6, 3))
    net.register_buffer("grid", torch.linspace(-1, 1, 4))
    return net


def _three_operands() -> nn.Module:
    """A form of two layers and a table of three axes, each with channels of its own; then gates beside a vector."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.einsum("bi,bj,ijk->bk", F.relu(m.a(x)), F.relu(m.b(x)), m.table)
        return m.head(torch.einsum("...i, ...i, i->...i", F.relu(y), torch.sigmoid(m.gate(x)), m.scale))

    table, scale = nn.Parameter(random(4, 6, 5)), nn.Parameter(random(5))
    return Net(forward, a=nn.Linear(11, 4), b=nn.Linear(11, 6), gate=nn.Linear(11, 5), table=table, scale=scale, head=nn.Linear(5, 3))  # fmt: skip


def _low_rank() -> nn.Module:
    """Two factors of a matrix in one product: they share a rank, which may shrink."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(torch.einsum("bi,ir,jr->bj", F.relu(m.a(x)), m.first, m.second)))

    first, second = nn.Parameter(random(6, 5)), nn.Parameter(random(7, 5))
    return Net(forward, a=nn.Linear(11, 6), first=first, second=second, head=nn.Linear(7, 3))


def _mixed_experts() -> nn.Module:
    """The shares of the experts in the same product as their second matrices: hidden units leave all of them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = F.relu(torch.einsum("bd,edh->beh", x, m.up))
        return m.head(F.relu(torch.einsum("beh,ehc,be", hidden, m.down, m.route(x).softmax(-1))))

    up, down = nn.Parameter(random(3, 11, 6)), nn.Parameter(random(3, 6, 5))
    return Net(forward, route=nn.Linear(11, 3), up=up, down=down, head=nn.Linear(5, 2))


def _bilinear() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.form(F.relu(m.a(x)), torch.tanh(m.b(x)))))

    return Net(forward, a=nn.Linear(11, 4), b=nn.Linear(11, 6), form=nn.Bilinear(4, 6, 5), head=nn.Linear(5, 3))


def _learned_graph() -> nn.Module:
    """Nodes are mixed by a learned matrix: they stay, and the channels of the nodes leave."""

    def forward(m: Any, x: Tensor) -> Tensor:
        edges = m.edges.softmax(-1)
        x = F.relu(torch.einsum("nm,bmc->bnc", edges, m.a(x)))
        return m.head(F.relu(edges @ m.b(x)))

    return Net(forward, edges=nn.Parameter(random(4, 4)), a=nn.Linear(5, 3), b=nn.Linear(3, 6), head=nn.Linear(6, 2))


def _expanded_mask() -> nn.Module:
    """A saved mask in floats, expanded to all heads: it is made for as many as are left."""

    def forward(m: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = m.qkv(x).view(b, t, 3, 4, 2).permute(2, 0, 3, 1, 4)
        mask = m.mask[:t, :t].expand(4, t, t)
        return m.head((F.scaled_dot_product_attention(q, k, v, attn_mask=mask)).transpose(1, 2).flatten(2))

    net = Net(forward, qkv=nn.Linear(5, 24), head=nn.Linear(8, 3))
    net.register_buffer("mask", torch.full((4, 4), -1e4).triu(1))
    return net


def _second_moments() -> nn.Module:
    """Products of all features of two layers: the ones of the wider layer may leave."""

    def forward(m: Any, x: Tensor) -> Tensor:
        pairs = torch.einsum("bnc,bnd->bcd", F.relu(m.a(x)), F.relu(m.b(x)))
        return m.head(torch.einsum("bcd->bdc", pairs).flatten(1))

    return Net(forward, a=nn.Linear(5, 3), b=nn.Linear(5, 7), head=nn.Linear(21, 2))


CASES = {
    "splines": Case(build=_splines, inputs=_features, free=5 + 6, realiser="graph"),
    "distances": Case(build=_distances, inputs=_features, free=6 + 5, realiser="module", zero_writes=True),
    "made_matrix": Case(build=_made_matrix, inputs=_features, free=4 + 6, realiser="graph"),
    "fields": Case(build=_fields, inputs=_features, free=6, realiser="module", zero_writes=True),
    "equalised": Case(build=_equalised, inputs=_features, free=6 + 7, realiser="module"),
    "unit_rows": Case(build=_unit_rows, inputs=_features, free=5 + 6, realiser="module", zero_writes=True),
    "decoder": Case(build=_decoder, inputs=_tokens, free=8 + 12 + 2 + 2, realiser="graph"),
    "gates": Case(build=_gates, inputs=_tokens, free=4, realiser="graph"),
    "columns": Case(build=_columns, inputs=_features, free=4 + 3 + 6, realiser="graph"),
    "experts_in_letters": Case(build=_experts_in_letters, inputs=_tokens, free=4 + 6, realiser="module"),
    "experts_in_a_batch": Case(build=_experts_in_a_batch, inputs=_tokens, free=4 + 5, realiser="module"),
    "experts_one_by_one": Case(build=_experts_one_by_one, inputs=_tokens, free=4 + 5, realiser="module"),
    "latents": Case(build=_latents, inputs=_tokens, free=6 + 4 + 4, realiser="module", zero_writes=True),
    "spatial_gate": Case(build=_spatial_gate, inputs=_tokens, free=6, realiser="module"),
    "scan": Case(build=_scan, inputs=_tokens, free=6, realiser="graph"),
    "padded": Case(build=_padded, inputs=_words, free=8 + 12 + 2, realiser="graph"),
    "cut_zeros": Case(build=_zeros(_cut_zeros), inputs=_tokens, free=4, realiser="graph"),
    "spectrum": Case(build=_spectrum, inputs=_tokens, free=6, realiser="module"),
    "complex_rotary": Case(build=_complex_rotary, inputs=_tokens, free=2, realiser="graph", zero_writes=True),
    "windows": Case(build=_windows, inputs=_tokens, free=4 + 3, realiser="module"),
    "as_many_states": Case(build=_as_many_states, inputs=_features, free=4, realiser="module"),
    "far_ends": Case(build=_far_ends, inputs=_features, free=5 + 4, realiser="module"),
    "turned_stack": Case(build=_turned_stack, inputs=_features, free=4 + 6 + 5, realiser="module"),
    "stack_in_parts": Case(build=_stack_in_parts, inputs=_features, free=4 + 5 + 6, realiser="graph"),
    "normed_heads": Case(build=_normed_heads, inputs=_tokens, free=3, realiser="graph"),
    "three_operands": Case(build=_three_operands, inputs=_features, free=4 + 6 + 5, realiser="module"),
    "low_rank": Case(build=_low_rank, inputs=_features, free=6 + 5 + 7, realiser="module"),
    "mixed_experts": Case(build=_mixed_experts, inputs=_features, free=6 + 5, realiser="module"),
    "bilinear": Case(build=_bilinear, inputs=_features, free=4 + 6 + 5, realiser="module"),
    "learned_graph": Case(build=_learned_graph, inputs=_tokens, free=3 + 6, realiser="module"),
    "expanded_mask": Case(build=_expanded_mask, inputs=_tokens, free=4, realiser="graph"),
    "second_moments": Case(build=_second_moments, inputs=_tokens, free=7, realiser="module"),
    "spread_zeros": Case(build=_zeros(_spread_zeros), inputs=_tokens, free=4, realiser="graph"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_may_leave_leaves_and_the_rest_computes_as_before(name: str) -> None:
    """Counted by hand; against the user's own class with the reads zeroed; the MACs as the smaller net has them."""
    case = CASES[name]
    model = healthy(case.build()).eval()
    args, kwargs = case.inputs(2)
    program = capture(model, {"args": args, "kwargs": kwargs})
    coupling = couple(program)
    assert coupling.free_units == case.free
    removed = removed_units(coupling, 0)
    plan = plan_of(program, coupling, removed)
    hazard = Hazard(build=case.build, inputs=case.inputs, zero_writes=case.zero_writes)
    oracle = zeroed(model, coupling, removed, hazard)
    pruned = prune(program, plan)
    assert pruned.realiser == case.realiser
    for small in (pruned.module, prune(program, plan, realiser="graph").module):
        for batch in (1, 3):
            inputs = case.inputs(batch)
            dense, expected, got = (run(m, inputs) for m in (model, oracle, small))
            assert distance(got, expected) <= 1e-5 * scale(dense)
            assert distance(dense, expected) > 1e-3 * scale(dense)
    gone = [np.isin(np.arange(len(s)), removed.get(n, [])) for n, s in enumerate(coupling.spaces)]
    after = examine(capture(pruned.module, {"args": args, "kwargs": kwargs}))
    assert Meter(coupling, examine(program)).exact(gone) == (after.parameters, after.macs)


def test_a_kernel_that_is_computed_for_every_sample_stops_nothing() -> None:
    """As many groups as samples: the number is a symbol. What the kernels are mixed of may leave."""

    def forward(m: Any, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        kernel = (m.route(x.mean((2, 3))) @ m.bank.flatten(1)).view(b * 4, c, 3, 3)
        return m.head(F.conv2d(x.reshape(1, -1, h, w), kernel, padding=1, groups=b).view(b, 4, h, w))

    net = Net(forward, route=nn.Linear(3, 5), bank=nn.Parameter(random(5, 4, 3, 3, 3)), head=nn.Conv2d(4, 2, 1))
    model = healthy(net).eval()
    program = capture(model, random(2, 3, 6, 6))
    coupling = couple(program)
    assert coupling.free_units == 5
    pruned = prune(program, plan_of(program, coupling, {0: [1, 3]}))
    assert pruned.proof.max_error <= 1e-5 * pruned.proof.scale


def test_a_saved_filter_bank_in_front_of_a_logarithm_stays_in_the_proof() -> None:
    """An audio front end: with random filters the logarithm would be of negative numbers."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.a(torch.log(x.square() @ m.filters + 1e-5)).relu())

    net = Net(forward, a=nn.Linear(4, 6), head=nn.Linear(6, 2))
    net.register_buffer("filters", random(5, 4).abs())
    program = capture(net, random(2, 5))
    coupling = couple(program)
    pruned = prune(program, plan_of(program, coupling, {0: [0, 1]}))
    assert math.isfinite(pruned.proof.scale)
    assert pruned.module.filters.shape == (5, 2)
    assert pruned.module.a.weight.shape == (6, 2)
