"""Tiny nets, one per structural hazard: element-wise ops, computed weights, ops without a rule. See hazards.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from hazards import Net, Statistic, conv, hazard, random

# -------------------------------------------------------------------------------------------- element-wise and in place


@hazard(free=6)
def layer_scale() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.a(x) * m.gamma + m.beta[:, None, None])

    return Net(
        run,
        a=conv(3, 6),
        gamma=nn.Parameter(torch.ones(1, 6, 1, 1)),
        beta=nn.Parameter(torch.zeros(6)),
        head=conv(6, 3),
    )


@hazard(free=6)
def prelu() -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.PReLU(6), conv(6, 3))


@hazard(free=4)
def shared_prelu() -> nn.Module:
    return nn.Sequential(conv(3, 4), nn.PReLU(), conv(4, 3))


@hazard()
def buffers_added() -> nn.Module:
    """Constants along the channels: a saved buffer, an unsaved one and a tensor that is neither."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.a(x) + m.kept) * m.unsaved) + m.other(
            m.b(x) - torch.linspace(0.5, 1.0, 5)[:, None, None]
        )

    net = Net(run, a=conv(3, 6), b=conv(3, 5), head=conv(6, 3), other=conv(5, 3))
    net.register_buffer("kept", random(6, 1, 1))
    net.register_buffer("unsaved", random(1, 6, 1, 1).abs() + 0.5, persistent=False)
    return net


@hazard(double=False)
def coordinates() -> nn.Module:
    """CoordConv: constant channels beside learned ones."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        grid = torch.linspace(-1, 1, 8).expand(x.shape[0], 1, 8, 8)
        return m.b(torch.cat([x, grid.to(x.dtype), grid.transpose(2, 3).to(x.dtype)], 1))

    return Net(run, a=conv(3, 6), b=conv(8, 3))


@hazard(free=7, permutable=False)
def in_place_slice() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, :4] += m.b(x)
        y[:, 2:].mul_(1.5)
        return m.head(y)

    return Net(run, a=conv(3, 7), b=conv(3, 4), head=conv(7, 3))


@hazard(double=False)
def zeros_filled() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 9, 8, 8, dtype=x.dtype)
        out[:, :4] = m.a(x)
        out[:, 4:].add_(m.b(x))
        return m.head(F.relu(out))

    return Net(run, a=conv(3, 4), b=conv(3, 5), head=conv(9, 3))


@hazard(free=6)
def outer_product() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.a(x) * torch.outer(m.u, torch.arange(1.0, 9.0))[:, :, None])

    return Net(run, a=conv(3, 6), u=nn.Parameter(torch.ones(6)), head=conv(6, 3))


@hazard(free=10)
def state_by_hand() -> nn.Module:
    """A convolutional GRU written out, whose state begins as zeros: they are as long as the channels that are left."""

    def run(m: Any, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], 6, *x.shape[2:])
        for _ in range(2):
            seen = F.relu(m.a(x))
            update, reset = torch.sigmoid(m.gates(torch.cat([seen, state], 1))).split(state.shape[1], 1)
            new = torch.tanh(m.new(torch.cat([seen, reset * state], 1)))
            state = (1 - update) * state + update * new
        return m.head(state)

    return Net(run, a=conv(3, 4, padding=1), gates=conv(10, 12, padding=1), new=conv(10, 6, padding=1), head=conv(6, 3))


@hazard(free=5)
def state_of_features() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 5)
        for row in x.mean(1).unbind(1)[:3]:
            state = torch.tanh(m.a(row) + m.b(state))
        return m.head(state)

    return Net(run, a=nn.Linear(8, 5), b=nn.Linear(5, 5), head=nn.Linear(5, 3))


@hazard(free=4)
def padded_by_zeros() -> nn.Module:
    """A shortcut with more channels than its source: the zeros beside it leave with what is added to them."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        zeros = torch.zeros(y.shape[0], 2, *y.shape[2:])
        return m.head(torch.cat([y, zeros], 1) + m.b(y))

    return Net(run, a=conv(3, 2, padding=1), b=conv(2, 4, padding=1), head=conv(4, 3))


@hazard()
def masked() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        gate = (x.mean(1, keepdim=True) > 0).detach()
        a, b = m.a(x), m.b(x)
        y = torch.where(gate, a, b)
        y = y.masked_fill(~gate, 0.25) + m.c(x).mean((2, 3), keepdim=True).expand_as(y)
        return m.head(y)

    return Net(run, a=conv(3, 6), b=conv(3, 6), c=conv(3, 6), head=conv(6, 3))


@hazard(free=10)
def gated() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x).chunk(2, dim=1)
        return m.head(F.glu(m.b(a * torch.sigmoid(b)), dim=1))

    return Net(run, a=conv(3, 12), b=conv(6, 8), head=conv(4, 3))


@hazard(free=5)
def maxout() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(x.view(x.shape[0], 5, 2, *x.shape[2:]).max(2).values)

    return Net(run, a=conv(3, 10), head=conv(5, 3))


@hazard(free=12)
def stacked() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.stack([m.a(x), F.relu(m.b(x))], dim=0).sum(0) * 0.5
        return m.head(torch.stack([m.c(x), m.d(x)], dim=-1).amax(-1))

    return Net(run, a=conv(3, 7), b=conv(3, 7), c=conv(7, 5), d=conv(7, 5), head=conv(5, 3))


@hazard()
def stacked_with_input() -> nn.Module:
    """Fixed channels (the image) and learned ones side by side in one tensor."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.stack([x, m.a(x)], 1).amax(1)) + m.other(m.b(x))

    return Net(run, a=conv(3, 3), b=conv(3, 5), head=conv(3, 4), other=conv(5, 4))


@hazard(free=6)
def size_as_number() -> nn.Module:
    """A factor that Python computed from the number of channels must not follow the pruned number."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(x * x.shape[1] ** -0.5)

    return Net(run, a=conv(3, 6), head=conv(6, 3))


@hazard()
def extremes() -> nn.Module:
    """torch.max of two tensors, maximum, lerp, clamp by tensors."""

    def run(m: Any, x: Tensor) -> Tensor:
        a, b, c = m.a(x), m.b(x), m.c(x)
        y = torch.max(a, b) + torch.lerp(m.d(x), c, 0.3)
        return m.head(torch.clamp(y, min=a - 1, max=c + 1))

    return Net(run, a=conv(3, 6, 1), b=conv(3, 6, 1), c=conv(3, 6, 1), d=conv(3, 6, 1), head=conv(6, 3))


@hazard()
def weighted_fusion() -> nn.Module:
    """BiFPN: feature maps weighed by entries of one small parameter; a learned temperature."""

    def run(m: Any, x: Tensor) -> Tensor:
        w = F.relu(m.w)
        w = w / (w.sum() + 1e-4)
        y = w[0] * m.a(x) + w[1] * m.b(x)
        return m.head(F.relu(m.c(y))) * m.temperature

    return Net(
        run,
        a=conv(3, 6),
        b=conv(3, 6),
        c=conv(6, 5),
        head=conv(5, 3),
        w=nn.Parameter(torch.ones(2)),
        temperature=nn.Parameter(torch.ones(1)),
    )


@hazard()
def expanded_gate() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        gate = m.gate(x).sigmoid().expand(-1, 6, -1, -1)
        return m.head(m.a(x) * gate) + m.other(m.b(x) + x[:, :1].expand(-1, 5, 8, 8))

    return Net(run, gate=conv(3, 1), a=conv(3, 6), b=conv(3, 5), head=conv(6, 3), other=conv(5, 3))


@hazard(norms={"mean": ("c.weight", 0)})
def patches_unfolded() -> nn.Module:
    """im2col and col2im around a linear layer; channels as rows of a linear over positions."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        y = m.b(F.unfold(x, 2, stride=2).transpose(1, 2)).transpose(1, 2)
        y = F.fold(y, (8, 8), 2, stride=2)
        return m.head(F.relu(y)) + m.mean(m.rows(m.c(x).flatten(2)))[:, None, None, None]

    return Net(
        run,
        a=conv(3, 4),
        b=nn.Linear(16, 20),
        head=conv(5, 3),
        c=conv(4, 5),
        rows=nn.Linear(64, 3),
        mean=Statistic(lambda x: x.mean((1, 2))),
    )


@hazard(stochastic=True, free=11)
def dropouts() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.dropout2d(m.stem(x), 0.2, m.training)
        y = m.drop(F.relu(m.norm(m.a(x))))
        return m.head(x + m.path(m.b(y)))

    return Net(
        run,
        stem=conv(3, 6),
        a=conv(6, 5),
        norm=nn.BatchNorm2d(5),
        b=conv(5, 6),
        head=conv(6, 3),
        drop=nn.Dropout(0.5),
        path=DropPath(),
    )


class DropPath(nn.Module):
    """Skip a residual branch at random, sample by sample."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(0.6)
        return x * keep / 0.6


# ----------------------------------------------------------------------------------------------- the weight is computed


@hazard(free=14)
def weight_norms() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(conv(3, 8)), nn.ReLU(), torch.nn.utils.weight_norm(conv(8, 6)), conv(6, 3)
    )


@hazard(free=14)
def spectral_norms() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(conv(3, 8)), nn.ReLU(), conv(8, 6), conv(6, 3))


@hazard(free=14)
def pruning_mask() -> nn.Module:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), conv(6, 3))
    prune.random_unstructured(model[2], "weight", 0.4)
    prune.random_unstructured(model[2], "bias", 2)
    return model


class _Rows(Statistic):
    """The rows of a weight standardised by a batch norm, as scaled weight standardisation does."""

    def __init__(self, rows: int) -> None:
        super().__init__(torch.relu)
        self.gain = nn.Parameter(torch.ones(rows, 1, 1, 1))

    def forward(self, w: Tensor) -> Tensor:
        gain = (self.gain * 0.7).view(-1)
        if not self.leaving:
            rows = w.reshape(1, w.shape[0], -1)
            return F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6).reshape_as(w)
        kept = w[:, [i for i in range(w.shape[1]) if i not in self.leaving]].flatten(1)
        var, mean = torch.var_mean(kept, 1, correction=0)
        return (w - mean[:, None, None, None]) * (gain / torch.sqrt(var + 1e-6))[:, None, None, None]


@hazard(
    free=5 + 6 + 7,
    norms={"mean": ("a.weight", 1), "spread": ("a.weight", 1), "rows": ("b.weight", 1)},
    zero_writes=True,
)
def standardised_weight() -> nn.Module:
    """Weights are standardised at every call, by hand (for two convolutions) and by a batch norm: over the inputs that are left."""

    def run(m: Any, x: Tensor) -> Tensor:
        w = m.a.weight
        w = (w - m.mean(w)) / (m.spread(w) + 1e-5)
        x = F.relu(F.conv2d(m.stem(x), w, m.a.bias, padding=1) + F.conv2d(m.other(x), w, padding=1))
        return m.head(F.relu(F.conv2d(x, m.rows(m.b.weight), m.b.bias, padding=1)))

    return Net(
        run,
        stem=conv(3, 5),
        other=conv(3, 5),
        a=conv(5, 6),
        b=conv(6, 7),
        head=conv(7, 3),
        mean=Statistic(lambda w: w.mean((1, 2, 3), keepdim=True)),
        spread=Statistic(lambda w: w.std((1, 2, 3), keepdim=True)),
        rows=_Rows(7),
    )


@hazard(free=4 + 4, norms={"rows": ("a.weight", 1), "again": ("b.weight", 1)}, zero_writes=True)
def standardised_groups() -> nn.Module:
    """The same of a grouped and of a depthwise convolution."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(m.stem(x), m.rows(m.a.weight), padding=1, groups=2))
        return m.head(F.relu(F.conv2d(x, m.again(m.b.weight), padding=1, groups=8)))

    return Net(
        run, stem=conv(3, 8), a=conv(8, 8, groups=2, bias=False), b=conv(8, 8, groups=8, bias=False), head=conv(8, 3),
        rows=_Rows(8), again=_Rows(8),
    )  # fmt: skip


@hazard(free=4, because=("a weight that is computed from all of its parameter", "conv2d"))
def weights_that_stay() -> nn.Module:
    """Divided by the largest of the whole weight; and a weight that also goes somewhere else."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = F.conv2d(m.a(x), m.b.weight / m.b.weight.square().sum().sqrt(), padding=1)
        w = m.d.weight * 2.0
        z = F.conv2d(m.c(x), w, padding=1) + w.square().mean()
        return m.head(F.relu(y)) + m.other(F.relu(z)) + m.last(F.relu(m.e(x)))

    return Net(
        run, a=conv(3, 5), b=conv(5, 6, bias=False), c=conv(3, 5), d=conv(5, 6, bias=False), e=conv(3, 4),
        head=conv(6, 3), other=conv(6, 3), last=conv(4, 3),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- no rule


@hazard(because=("cumsum", "hazards.py:"))
def cumulative() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.cumsum(m.a(x), 1)) + m.other(F.relu(m.b(x)))

    return Net(run, a=conv(3, 6), b=conv(3, 6), head=conv(6, 3), other=conv(6, 3))


@hazard(because=("sort", "softmax"))
def sorted_channels() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.sort(m.a(x), 1).values) + m.other(torch.softmax(m.b(x), 1))

    return Net(run, a=conv(3, 6), b=conv(3, 6), head=conv(6, 3), other=conv(6, 3))


@hazard()
def local_channel_attention() -> nn.Module:
    """ECA: a 1-D convolution along the channel axis."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = m.gate(x.mean((2, 3))[:, None])
        return m.head(x * torch.sigmoid(gate).transpose(1, 2)[..., None])

    return Net(run, stem=conv(3, 6), gate=nn.Conv1d(1, 1, 3, padding=1), head=conv(6, 3))


@hazard()
def gram_matrix() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).flatten(2)
        return m.head((y @ y.transpose(1, 2) / 64).flatten(1)) + m.other(m.b(x)).mean((2, 3))

    return Net(run, a=conv(3, 6), b=conv(3, 6), head=nn.Linear(36, 3), other=conv(6, 3))


@torch.library.custom_op("paredown_tests::swap_pairs", mutates_args=())
def swap_pairs(x: Tensor) -> Tensor:
    """An op that nobody knows: neighbours along the channels trade places."""
    return x.unflatten(1, (-1, 2)).flip(2).flatten(1, 2).contiguous()


@swap_pairs.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


swap_pairs.register_autograd(lambda _, grad: swap_pairs(grad))


@hazard(free=7, unknown="swap_pairs", because=("swap_pairs", "hazards.py:"))
def custom_op() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.b(F.relu(swap_pairs(m.a(x)))))

    return Net(run, a=conv(3, 6), b=conv(6, 7), head=conv(7, 3))


@hazard(because=("fft",))
def fourier() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.fft.rfft(m.a(x), dim=1).real) + m.other(m.b(x))

    return Net(run, a=conv(3, 6), b=conv(3, 6), head=conv(4, 3), other=conv(6, 3))


# ---------------------------------------------------------------------------------- easily taken for something else


@hazard()
def picked_and_broadcast() -> nn.Module:
    """One channel of many is added to all of the image's."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(torch.cat([x + y[:, 2:3], m.b(x)], 1)) + m.other(y)

    return Net(run, a=conv(3, 6), b=conv(3, 5), head=conv(8, 3), other=conv(6, 3))


@hazard()
def shared_on_fixed() -> nn.Module:
    """A layer reads the image and, later, channels that could leave."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.b(F.relu(m.a(x)))) + m.b(x))

    return Net(run, a=conv(3, 3), b=conv(3, 6), head=conv(6, 3))


@hazard()
def squeezed() -> nn.Module:
    """squeeze(1) does nothing to two channels, but would to one."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.a(x).squeeze(1))

    return Net(run, a=conv(3, 2), head=conv(2, 3))


class _Statistics(nn.Module):
    """A normalisation of one's own, with buffers that train mode updates in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", random(channels, 1, 1) * 0.3)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3))[:, None, None])
            self.count += 1
        return (x - self.mean) * self.gain


@hazard(free=6)
def own_statistics() -> nn.Module:
    return nn.Sequential(conv(3, 6), _Statistics(6), nn.ReLU(), conv(6, 3))


class _Period(nn.Module):
    """An attribute that happens to equal a number of channels, used in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 6), conv(6, 3)
        self.period = 6

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.head(y * (self.period / 2) if self.training else y)


@hazard(free=6)
def attribute_like_a_size() -> nn.Module:
    return _Period()


@hazard()
def norm_over_feature_map() -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.LayerNorm([6, 8, 8]), nn.ReLU(), conv(6, 3))


@hazard(free=6 + 5 + 3, norms={"mean": ("head.weight", 0)}, zero_writes=True)
def cosine_similarity() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.cosine_similarity(m.a(x), m.b(x), dim=1) + m.mean(m.head(m.c(x)))

    mean = Statistic(lambda x: x.mean(1))
    return Net(run, a=conv(3, 6), b=conv(3, 6), c=conv(3, 5), head=conv(5, 3), mean=mean)
