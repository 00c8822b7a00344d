"""Tiny nets, one per structural hazard: norms and attention. See hazards.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hazards import Net, conv, hazard, random, tokens

# ---------------------------------------------------------------------------------------------------------------- norms


@hazard(free=8)
def group_norm() -> nn.Module:
    """Two groups of 4: a position leaves both. Four groups of 2: likewise."""
    return nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU(), conv(8, 16, 1), nn.GroupNorm(4, 16), conv(16, 3))


@hazard(free=14)
def group_norm_extremes() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.GroupNorm(1, 8), nn.ReLU(), conv(8, 6, 1), nn.GroupNorm(6, 6), conv(6, 3))


@hazard(free=14)
def instance_norm() -> nn.Module:
    return nn.Sequential(
        conv(3, 8),
        nn.InstanceNorm2d(8, affine=True),
        nn.ReLU(),
        conv(8, 6),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        conv(6, 3),
    )


@hazard(tokens, free=13, norms={"plain": ("a.weight", 0)})
def norm_without_weights() -> nn.Module:
    return Net(
        lambda m, x: m.head(F.gelu(m.b(m.plain(m.a(x))))),
        a=nn.Linear(5, 7),
        plain=nn.LayerNorm(7, elementwise_affine=False),
        b=nn.Linear(7, 6),
        head=nn.Linear(6, 3),
    )


@hazard(tokens, free=7)
def rms_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.RMSNorm(7), nn.Linear(7, 3))


@hazard(free=24, spaces=2)
def convnext_block() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.norm(m.dw(x).permute(0, 2, 3, 1))
        y = m.gamma * m.down(F.gelu(m.up(y)))
        x = x + y.permute(0, 3, 1, 2)
        return m.head(m.last(x.mean((2, 3))))

    return Net(
        run,
        stem=conv(3, 8, 2, stride=2, padding=0),
        dw=conv(8, 8, 3, groups=8),
        norm=nn.LayerNorm(8),
        up=nn.Linear(8, 16),
        down=nn.Linear(16, 8),
        gamma=nn.Parameter(torch.ones(8)),
        last=nn.LayerNorm(8),
        head=nn.Linear(8, 3),
    )


@hazard()
def norm_over_an_image() -> nn.Module:
    """Layer norm over rows and columns of each channel, and over all of (C, H, W) with fixed channels."""
    return nn.Sequential(nn.LayerNorm([3, 8, 8]), conv(3, 6), nn.LayerNorm([8, 8]), nn.ReLU(), conv(6, 3))


# ------------------------------------------------------------------------------------------------------------ attention


@hazard(tokens, free=10)
def mha() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.inner(x)
        return m.head(x + m.attn(x, x, x, need_weights=False)[0])

    return Net(run, inner=nn.Linear(5, 8), attn=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(8, 3))


@hazard(tokens)
def mha_cross() -> nn.Module:
    """Sequence first, weights returned, key and value of other widths."""

    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = m.q(x).transpose(0, 1), m.k(x).transpose(0, 1)
        y, w = m.attn(q, k, k)
        return m.head(y.transpose(0, 1)), w

    return Net(
        run,
        q=nn.Linear(5, 8),
        k=nn.Linear(5, 6),
        attn=nn.MultiheadAttention(8, 2, kdim=6, vdim=6),
        head=nn.Linear(8, 3),
    )


@hazard(tokens, stochastic=True)
def encoder_layer() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.layer(m.inner(x)).mean(1))

    return Net(
        run,
        inner=nn.Linear(5, 8),
        layer=nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True, norm_first=True),
        head=nn.Linear(8, 3),
    )


@hazard(tokens, free=10)
def fused_qkv() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.inner(x)
        b, n, c = x.shape
        q, k, v = m.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.head(x + m.proj(y.transpose(1, 2).reshape(b, n, c)))

    return Net(run, inner=nn.Linear(5, 8), qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8), head=nn.Linear(8, 3))


@hazard(tokens, free=12)
def separate_qkv() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.inner(x)
        q, k, v = (p(x).view(x.shape[0], -1, 4, 2).transpose(1, 2) for p in (m.q, m.k, m.v))
        w = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(2), dim=-1)
        return m.head(x + m.proj((w @ v).transpose(1, 2).contiguous().flatten(2)))

    return Net(
        run,
        inner=nn.Linear(5, 8),
        q=nn.Linear(8, 8),
        k=nn.Linear(8, 8, bias=False),
        v=nn.Linear(8, 8),
        proj=nn.Linear(8, 8),
        head=nn.Linear(8, 3),
    )


@hazard(tokens, free=14, zero_writes=True)
def single_head() -> nn.Module:
    """One head: the default scale follows the pruned width of q and k, if it is not written down."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.q(x)[:, None], m.k(x)[:, None], m.v(x)[:, None]
        return m.head(F.scaled_dot_product_attention(q, k, v)[:, 0])

    return Net(run, q=nn.Linear(5, 8), k=nn.Linear(5, 8), v=nn.Linear(5, 6), head=nn.Linear(6, 3))


def _grouped_heads(expand: bool) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = m.q(x).view(b, n, 6, 2).transpose(1, 2)
        k, v = (p(x).view(b, n, 3, 2).transpose(1, 2) for p in (m.k, m.v))
        if expand:
            k, v = (t[:, :, None].expand(b, 3, 2, n, 2).reshape(b, 6, n, 2) for t in (k, v))
        else:
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        return m.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, -1))

    return Net(run, q=nn.Linear(5, 12), k=nn.Linear(5, 6), v=nn.Linear(5, 6), proj=nn.Linear(12, 3))


@hazard(tokens, free=3)
def grouped_query() -> nn.Module:
    return _grouped_heads(expand=False)


@hazard(tokens, free=3)
def grouped_query_expanded() -> nn.Module:
    return _grouped_heads(expand=True)


@hazard(tokens, free=3)
def grouped_query_flag() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = m.q(x).view(b, n, 6, 2).transpose(1, 2)
        k, v = (p(x).view(b, n, 3, 2).transpose(1, 2) for p in (m.k, m.v))
        return m.proj(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    return Net(run, q=nn.Linear(5, 12), k=nn.Linear(5, 6), v=nn.Linear(5, 6), proj=nn.Linear(12, 3))


@hazard(tokens)
def head_norms() -> nn.Module:
    """One norm over the width of a head, shared by all heads; rotary positions."""

    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, 3, 4).transpose(1, 2) for p in (m.q, m.k, m.v))
        angle = torch.arange(n, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.125], dtype=x.dtype)
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        q, k = (t * cos + torch.cat([-t[..., 2:], t[..., :2]], -1) * sin for t in (m.nq(q), m.nk(k)))
        return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))

    return Net(
        run,
        q=nn.Linear(5, 12),
        k=nn.Linear(5, 12),
        v=nn.Linear(5, 12),
        nq=nn.LayerNorm(4),
        nk=nn.RMSNorm(4),
        proj=nn.Linear(12, 3),
    )


@hazard()
def window_attention() -> nn.Module:
    """Swin: cyclic shift, window views, relative-position table by an index buffer, a constant mask."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x).permute(0, 2, 3, 1)
        b, c = x.shape[0], x.shape[-1]
        w = (
            torch.roll(m.norm(x), (-1, -1), dims=(1, 2))
            .view(b, 2, 2, 2, 2, c)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(-1, 4, c)
        )
        q, k, v = m.qkv(w).reshape(-1, 4, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        bias = m.table[m.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        scores = (q * (c // 2) ** -0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        scores = scores.view(b, 4, 2, 4, 4) + m.mask[None, :, None]
        y = scores.view(-1, 2, 4, 4).softmax(-1) @ v
        y = (
            m.proj(y.transpose(1, 2).reshape(-1, 4, c))
            .view(b, 2, 2, 2, 2, c)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(b, 4, 4, c)
        )
        x = x + torch.roll(y, (1, 1), dims=(1, 2))
        return m.head(x.mean((1, 2)))

    net = Net(
        run,
        stem=conv(3, 8, 2, stride=2, padding=0),
        norm=nn.LayerNorm(8),
        qkv=nn.Linear(8, 24),
        proj=nn.Linear(8, 8),
        table=nn.Parameter(torch.zeros(9, 2)),
        head=nn.Linear(8, 3),
    )
    yx = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
    gap = yx[:, :, None] - yx[:, None] + 1
    net.register_buffer("index", gap[0] * 3 + gap[1])
    net.register_buffer("mask", (torch.arange(64).view(4, 4, 4) % 3 == 1) * -4.0)
    return net


@hazard()
def class_token() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], dim=1) + m.position
        x = x + m.b(F.gelu(m.a(m.norm(x))))
        return m.head(m.last(x)[:, 0])

    return Net(
        run,
        patch=conv(3, 8, 4, stride=4, padding=0),
        token=nn.Parameter(torch.zeros(1, 1, 8)),
        position=nn.Parameter(torch.zeros(1, 5, 8)),
        norm=nn.LayerNorm(8),
        a=nn.Linear(8, 6),
        b=nn.Linear(6, 8),
        last=nn.LayerNorm(8),
        head=nn.Linear(8, 3),
    )


@hazard(tokens)
def computed_bias() -> nn.Module:
    """BEiT: the bias of a linear is put together from two parameters and zeros."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.inner(x)
        b, n, _ = x.shape
        bias = torch.cat([m.q_bias, torch.zeros_like(m.v_bias, requires_grad=False), m.v_bias])
        q, k, v = F.linear(x, m.qkv.weight, bias).reshape(b, n, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return m.head(m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)))

    return Net(
        run,
        inner=nn.Linear(5, 8),
        qkv=nn.Linear(8, 24, bias=False),
        q_bias=nn.Parameter(torch.zeros(8)),
        v_bias=nn.Parameter(torch.zeros(8)),
        proj=nn.Linear(8, 7),
        head=nn.Linear(7, 3),
    )


@hazard(tokens, free=27)
def mixer() -> nn.Module:
    """Linear layers over the token axis as well as over channels. The stream is 8, the hidden layers 7 and 12."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.inner(x)
        x = x + m.b(F.gelu(m.a(m.one(x).transpose(1, 2)))).transpose(1, 2)
        x = x + m.d(F.gelu(m.c(m.two(x))))
        return m.head(x.mean(1))

    return Net(
        run,
        inner=nn.Linear(5, 8),
        one=nn.LayerNorm(8),
        a=nn.Linear(6, 7),
        b=nn.Linear(7, 6),
        two=nn.LayerNorm(8),
        c=nn.Linear(8, 12),
        d=nn.Linear(12, 8),
        head=nn.Linear(8, 3),
    )


@hazard(tokens, free=13)
def raw_matrix() -> nn.Module:
    return Net(
        lambda m, x: F.relu(x @ m.w + m.b).matmul(m.v) @ m.u.t(),
        w=nn.Parameter(torch.zeros(5, 7)),
        b=nn.Parameter(torch.zeros(7)),
        v=nn.Parameter(torch.zeros(7, 6)),
        u=nn.Parameter(torch.zeros(3, 6)),
    )


@hazard(tokens, zero_writes=True)
def einsum() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(torch.einsum("bnc,co->bno", x, m.w))
        scores = torch.einsum("bic,bjc->bij", m.q(x), m.k(x))
        return m.head(torch.einsum("bij,bjc->bic", scores.softmax(-1), x))

    return Net(run, w=nn.Parameter(torch.zeros(5, 7)), q=nn.Linear(7, 4), k=nn.Linear(7, 4), head=nn.Linear(7, 3))


def _positions(first: bool) -> nn.Module:
    """Positions along rows and columns of a map of 2 × 3 tokens, each read from a table that all heads share."""

    def run(m: Any, x: Tensor) -> Tensor:
        b = x.shape[0]
        q, k, v = (p(x).view(b, 6, 3, 4).transpose(1, 2) for p in (m.q, m.k, m.v))
        rows = m.rows[torch.arange(2)[:, None] - torch.arange(2) + 1]
        columns = m.columns[torch.arange(3)[:, None] - torch.arange(3) + 2]
        if first:
            p = q.reshape(b * 3, 2, 3, 4)
            up = torch.einsum("bhwc,hkc->bhwk", p, rows)[..., None]
            bias = (up + torch.einsum("bhwc,wkc->bhwk", p, columns)[..., None, :]).reshape(b, 3, 6, 6)
            return m.head(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(b, 6, -1))
        w = (q @ k.transpose(-2, -1) * 0.5).view(b, -1, 2, 3, 2, 3)
        p = q.reshape(b, -1, 2, 3, 4)
        w = w + torch.einsum("byhwc,hkc->byhwk", p, rows)[..., None]
        w = w + torch.einsum("byhwc,wkc->byhwk", p, columns)[..., None, :]
        return m.head((w.view(b, -1, 6, 6).softmax(-1) @ v).transpose(1, 2).reshape(b, 6, -1))

    return Net(
        run,
        q=nn.Linear(5, 12),
        k=nn.Linear(5, 12),
        v=nn.Linear(5, 12),
        head=nn.Linear(12, 3),
        rows=nn.Parameter(torch.zeros(3, 4)),
        columns=nn.Parameter(torch.zeros(5, 4)),
    )


@hazard(tokens, free=3, because=("contracted with a constant",))
def positions_after_the_scores() -> nn.Module:
    """MViT: heads are whole before they meet the tables, which stay."""
    return _positions(first=False)


@hazard(tokens, free=4 + 4, zero_writes=True)
def positions_before_the_scores() -> nn.Module:
    """SAM: heads meet the tables first, hidden in the batch axis, and lose the same channels as they."""
    return _positions(first=True)


@hazard(tokens, free=3)
def rotary_constant() -> nn.Module:
    """Rotary positions from numbers: each pair of channels has its own angle, so that only whole heads leave."""

    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, 3, 4).transpose(1, 2) for p in (m.q, m.k, m.v))
        cosine = (torch.arange(12).reshape(6, 2) / 16).repeat(1, 2).to(x.dtype)

        def turned(t: Tensor) -> Tensor:
            return t * cosine + torch.cat([-t[..., 2:], t[..., :2]], -1) * (1 - cosine)

        return m.head(F.scaled_dot_product_attention(turned(q), turned(k), v).transpose(1, 2).reshape(b, n, -1))

    return Net(run, q=nn.Linear(5, 12), k=nn.Linear(5, 12), v=nn.Linear(5, 12), head=nn.Linear(12, 3))


def _saved_rotary(heads_of_keys: int) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, -1, 4).transpose(1, 2) for p in (m.q, m.k, m.v))

        def turned(t: Tensor) -> Tensor:
            beside = torch.stack([-t[..., 1::2], t[..., ::2]], -1).reshape(t.shape)
            return t * m.table + beside * (1 - m.table)

        w = (turned(q) @ turned(k).transpose(-2, -1) * 0.5).softmax(-1)
        return m.head((w @ v).transpose(1, 2).reshape(b, n, -1))

    kv = 4 * heads_of_keys
    net = Net(run, q=nn.Linear(5, 12), k=nn.Linear(5, kv), v=nn.Linear(5, kv), head=nn.Linear(12, 3))
    net.register_buffer("table", random(6, 4))
    return net


@hazard(tokens, free=2 + 4, zero_writes=True)
def rotary_pairs() -> nn.Module:
    """Rotary positions of neighbours from a saved table, keys of one head: a pair leaves every head, the keys and the table."""
    return _saved_rotary(1)


@hazard(tokens, free=3, because=("a table that all heads share",), zero_writes=True)
def rotary_heads() -> nn.Module:
    """The same with keys for every head: the table stays, so that heads leave."""
    return _saved_rotary(3)


@hazard(tokens, free=8)
def saved_positions_of_streams() -> nn.Module:
    """Two streams stacked and a saved table of positions: what looks like heads is none, and the channels leave with the table's."""

    def run(m: Any, x: Tensor) -> Tensor:
        both = torch.stack([m.a(x), m.b(x)], 1) + m.table
        return m.head(both.mean(1))

    net = Net(run, a=nn.Linear(5, 8), b=nn.Linear(5, 8), head=nn.Linear(8, 3))
    net.register_buffer("table", random(6, 8))
    return net


@hazard(tokens, free=3, zero_writes=True)
def saved_masks_of_scores() -> nn.Module:
    """Saved masks that all heads share, added and compared: they stay, and heads leave as they would without them."""

    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, -1, 4).transpose(1, 2) for p in (m.q, m.k, m.v))
        scores = (q @ k.transpose(-2, -1) * 0.5 + m.shift).masked_fill(m.tril == 0, -1e4)
        return m.head((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))

    net = Net(run, q=nn.Linear(5, 12), k=nn.Linear(5, 12), v=nn.Linear(5, 12), head=nn.Linear(12, 3))
    net.register_buffer("shift", random(1, 1, 6, 6))
    net.register_buffer("tril", torch.ones(6, 6).tril())
    return net


@hazard(free=4 + 6)
def channel_shuffle_op() -> nn.Module:
    """torch's own shuffle: of every group the same positions leave."""
    return nn.Sequential(conv(3, 8), nn.ReLU(), nn.ChannelShuffle(2), conv(8, 6), conv(6, 3))


@hazard(free=3 + 5, because=("every n-th channel",))
def every_second_channel() -> nn.Module:
    """Every second channel is taken, of six and of five: pairs leave whole; five have no pairs."""

    def run(m: Any, x: Tensor) -> Tensor:
        y, z = m.a(x), m.b(x)
        return m.even(y[:, ::2]) * m.odd(y[:, 1::2]) + m.third(z[:, ::2]) + m.last(F.relu(m.c(x)))

    return Net(
        run,
        a=conv(3, 6),
        b=conv(3, 5),
        c=conv(3, 5),
        even=conv(3, 3),
        odd=conv(3, 3),
        third=conv(3, 3),
        last=conv(5, 3),
    )


@hazard(tokens, free=7)
def no_prefix_tokens() -> nn.Module:
    """Tokens that get no position are put in front of the others; there are none."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(torch.cat([x[:, :0], F.gelu(x[:, 0:])], 1))

    return Net(run, a=nn.Linear(5, 7), head=nn.Linear(7, 3))


@hazard(tokens, free=7 + 4 + 5 + 8, because=("rows and columns of a product",), zero_writes=True)
def einsum_forms() -> nn.Module:
    """A weight for each channel, an outer product (the wider layer goes through), a product with a stack of matrices over tokens and channels."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.einsum("bnc,c->bnc", m.a(x), m.scale)
        pairs = torch.einsum("bi,bj->bij", m.b(x).sum(1), m.c(x).sum(1))
        sums = torch.einsum("bnc,mnc->bm", m.d(x), m.table)
        hidden = torch.einsum("nbc,c->bn", m.e(x).transpose(0, 1), m.vector)
        return m.head(y).sum(1) + m.other(pairs.flatten(1)) + sums + hidden.sum(1, keepdim=True)

    return Net(
        run,
        a=nn.Linear(5, 7),
        b=nn.Linear(5, 2),
        c=nn.Linear(5, 8),
        d=nn.Linear(5, 5),
        e=nn.Linear(5, 4),
        scale=nn.Parameter(torch.zeros(7)),
        vector=nn.Parameter(torch.zeros(4)),
        table=nn.Parameter(torch.zeros(3, 6, 5)),
        head=nn.Linear(7, 3),
        other=nn.Linear(16, 3),
    )


@hazard(tokens, free=8, zero_writes=True)
def bilinear_product() -> nn.Module:
    """Two towers compared by a dot product: a channel leaves both."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.q(x) @ m.k(x.flip(1)).transpose(1, 2)

    return Net(run, q=nn.Linear(5, 8), k=nn.Linear(5, 8))


@hazard(tokens, zero_writes=True)
def attention_pooling() -> nn.Module:
    """Tokens weighted by their product with a learned vector."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        w = torch.softmax(x @ m.v, dim=1)
        return m.head((w.unsqueeze(1) @ x).squeeze(1))

    return Net(run, a=nn.Linear(5, 7), v=nn.Parameter(torch.zeros(7)), head=nn.Linear(7, 3))


@hazard(tokens, unused=("score.weight", "score.bias"))
def top_tokens() -> nn.Module:
    """Three tokens are chosen by a score, and the highest of each channel is taken."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        best = m.score(x).squeeze(-1).topk(3, dim=1).indices
        y = torch.gather(x, 1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return m.head(y) + m.other(m.b(x).topk(3, dim=1).values)

    return Net(
        run, a=nn.Linear(5, 7), score=nn.Linear(7, 1), b=nn.Linear(7, 6), head=nn.Linear(7, 3), other=nn.Linear(6, 3)
    )


@hazard(tokens)
def position_mlp() -> nn.Module:
    """Swin-v2: a small network runs on a constant table and gives one bias per head."""

    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = m.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = 16 * torch.sigmoid(m.c(F.relu(m.b(m.table)))).permute(2, 0, 1)
        w = (
            F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.scale.clamp(max=4.0).exp() + bias
        ).softmax(-1)
        return m.head((w @ v).transpose(1, 2).reshape(b, n, -1))

    net = Net(
        run,
        qkv=nn.Linear(5, 24),
        b=nn.Linear(2, 7),
        c=nn.Linear(7, 2, bias=False),
        scale=nn.Parameter(torch.ones(2, 1, 1)),
        head=nn.Linear(8, 3),
    )
    net.register_buffer("table", random(6, 6, 2))
    return net


@hazard(tokens, zero_writes=True)
def sliced_positions() -> nn.Module:
    """Rows of one position table go to the class token and to the others, and to learned queries."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x) + m.position[:, 1:]
        first = (m.token + m.position[:, :1]).expand(x.shape[0], -1, -1)
        x = torch.cat((first, x), dim=1)
        q = m.queries.unsqueeze(0).repeat(x.shape[0], 1, 1)
        return m.head(
            F.scaled_dot_product_attention(m.q(q)[:, None], m.k(x)[:, None], m.v(x)[:, None], scale=0.3)[:, 0]
        )

    return Net(
        run,
        a=nn.Linear(5, 7),
        position=nn.Parameter(torch.zeros(1, 7, 7)),
        token=nn.Parameter(torch.zeros(1, 1, 7)),
        queries=nn.Parameter(torch.zeros(4, 6)),
        q=nn.Linear(6, 5),
        k=nn.Linear(7, 5),
        v=nn.Linear(7, 6),
        head=nn.Linear(6, 3),
    )


@hazard(tokens, free=13)
def rows_merged() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = m.b(F.relu(m.a(x)).reshape(-1, 7))
        return m.c(torch.addmm(m.bias, y, m.w)).view(b, n, 3)

    return Net(
        run,
        a=nn.Linear(5, 7),
        b=nn.Linear(7, 4),
        bias=nn.Parameter(torch.zeros(2)),
        w=nn.Parameter(torch.zeros(4, 2)),
        c=nn.Linear(2, 3),
    )


@hazard(tokens)
def pooled_features() -> nn.Module:
    """Pooling and padding of a tensor whose last axis is channels."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.b(F.max_pool1d(m.a(x), 2)) + m.d(F.pad(m.c(x), (1, 2), mode="reflect"))

    return Net(run, a=nn.Linear(5, 8), b=nn.Linear(4, 3), c=nn.Linear(5, 6), d=nn.Linear(9, 3))


@hazard(tokens)
def talking_heads() -> nn.Module:
    """CaiT: linear layers over the heads, before and after the softmax."""

    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = m.qkv(x).reshape(b, n, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        w = m.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        w = m.after(w.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return m.head((w @ v).transpose(1, 2).reshape(b, n, -1))

    return Net(run, qkv=nn.Linear(5, 24), before=nn.Linear(4, 4), after=nn.Linear(4, 4), head=nn.Linear(8, 3))


@hazard(tokens, free=3)
def einsum_heads() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, 3, 2) for p in (m.q, m.k, m.v))
        w = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
        return m.head(torch.einsum("bhnm,bmhd->bnhd", w, v).reshape(b, n, -1))

    return Net(run, q=nn.Linear(5, 6), k=nn.Linear(5, 6), v=nn.Linear(5, 6), head=nn.Linear(6, 3))


@hazard(tokens, free=4 + 4 + 6, zero_writes=True)
def multi_query() -> nn.Module:
    """One key and value head for all queries, so that a channel of them leaves every head."""

    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = m.q(x).view(b, n, 3, 4).transpose(1, 2), m.k(x)[:, None], m.v(x)[:, None]
        return m.head(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1)) + m.other(m.a(x))

    return Net(
        run,
        q=nn.Linear(5, 12),
        k=nn.Linear(5, 4),
        v=nn.Linear(5, 4),
        head=nn.Linear(12, 3),
        a=nn.Linear(5, 6),
        other=nn.Linear(6, 3),
    )


@hazard(tokens)
def linear_attention() -> nn.Module:
    """Keys times values first: a matrix of channels by channels in each head."""

    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, 3, 2).transpose(1, 2) for p in (m.q, m.k, m.v))
        y = F.elu(q) @ (k.softmax(-2).transpose(-2, -1) @ v)
        return m.head(y.transpose(1, 2).reshape(b, n, -1))

    return Net(run, q=nn.Linear(5, 6), k=nn.Linear(5, 6), v=nn.Linear(5, 6), head=nn.Linear(6, 3))


@hazard(tokens, free=4)
def bucketed_bias() -> nn.Module:
    """T5: a table of buckets by heads, looked up by a constant."""

    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, 4, 2).transpose(1, 2) for p in (m.q, m.k, m.v))
        near = (torch.arange(n)[:, None] - torch.arange(n)[None]).abs().clamp(max=4)
        w = (q @ k.transpose(-2, -1) + m.table(near).permute(2, 0, 1)[None]).softmax(-1)
        return m.head((w @ v).transpose(1, 2).reshape(b, n, -1))

    return Net(
        run, q=nn.Linear(5, 8), k=nn.Linear(5, 8), v=nn.Linear(5, 8), table=nn.Embedding(5, 4), head=nn.Linear(8, 3)
    )


@hazard(tokens, double=False)
def complex_rotary() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).view(b, n, 2, 4).transpose(1, 2) for p in (m.q, m.k, m.v))
        turn = torch.polar(
            torch.ones(n, 2, dtype=x.dtype),
            torch.arange(n, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype),
        )
        q, k = (torch.view_as_real(torch.view_as_complex(t.reshape(b, 2, n, 2, 2)) * turn).flatten(-2) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return m.head(y) + m.other(m.a(x))

    return Net(
        run,
        q=nn.Linear(5, 8),
        k=nn.Linear(5, 8),
        v=nn.Linear(5, 8),
        head=nn.Linear(8, 3),
        a=nn.Linear(5, 6),
        other=nn.Linear(6, 3),
    )
