"""Tiny nets, one per structural hazard: convolutions, shapes, pads and slices. See hazards.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hazards import Net, conv, hazard, random

# --------------------------------------------------------------------------------------------------------- convolutions


@hazard(free=14, spaces=2, because=("model output",))
def conv_chain() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6, bias=False), nn.SiLU(), conv(6, 4))


@hazard(free=14, spaces=2, because=("model output",))
def residual() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(F.relu(x + m.b(F.relu(m.norm(m.a(x))))))

    return Net(run, stem=conv(3, 8), a=conv(8, 6), norm=nn.BatchNorm2d(6), b=conv(6, 8), head=conv(8, 4))


@hazard(free=19, spaces=3)
def double_residual() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.b(F.relu(m.a(x)))
        y = m.d(torch.tanh(m.c(x)))
        y += x
        return m.head(y)

    return Net(
        run, stem=conv(3, 8, 1), a=conv(8, 5, 1), b=conv(5, 8, 1), c=conv(8, 6, 1), d=conv(6, 8, 1), head=conv(8, 4)
    )


@hazard(free=14, spaces=2)
def preactivation() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(m.zero(x))
        return m.head(x + m.b(F.relu(m.two(m.a(F.relu(m.one(x)))))))

    return Net(
        run,
        zero=nn.BatchNorm2d(3),
        stem=conv(3, 8, 1),
        one=nn.BatchNorm2d(8),
        a=conv(8, 6),
        two=nn.BatchNorm2d(6),
        b=conv(6, 8, 1),
        head=conv(8, 4, 1),
    )


@hazard(free=10, spaces=2)
def concat() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.norm(torch.cat([m.a(x), m.b(x)], 1))))

    return Net(run, a=conv(3, 4), b=conv(3, 6), norm=nn.BatchNorm2d(10), head=conv(10, 5))


@hazard(free=10)
def concat_split() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        one, two = torch.split(torch.cat([m.a(x), m.b(x)], 1), [3, 7], dim=1)
        return torch.cat([m.c(F.relu(one)), m.d(two)], 1)

    return Net(run, a=conv(3, 4), b=conv(3, 6), c=conv(3, 2), d=conv(7, 3))


@hazard(free=14, spaces=3)
def dense_block() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        seen = [m.stem(x)]
        seen.append(m.a(F.relu(m.one(torch.cat(seen, 1)))))
        seen.append(m.b(F.relu(m.two(torch.cat(seen, 1)))))
        return m.head(torch.cat(seen, 1))

    return Net(
        run,
        stem=conv(3, 6),
        one=nn.BatchNorm2d(6),
        a=conv(6, 4),
        two=nn.BatchNorm2d(10),
        b=conv(10, 4),
        head=conv(14, 3, 1),
    )


@hazard(free=14, spaces=2)
def depthwise() -> nn.Module:
    return nn.Sequential(
        conv(3, 8),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        conv(8, 8, groups=8),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        conv(8, 6, 1),
        conv(6, 6, groups=6),
        conv(6, 4, 1),
    )


@hazard(free=4, spaces=1)
def depthwise_multiplier() -> nn.Module:
    return nn.Sequential(conv(3, 4), conv(4, 12, groups=4), nn.ReLU(), conv(12, 3, 1))


@hazard(free=6, spaces=2)
def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 12, groups=3), nn.BatchNorm2d(12), conv(12, 4, 1))


@hazard(free=12, spaces=2, because=("last channel",))
def one_channel() -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 1), nn.Sigmoid(), conv(1, 6), nn.ReLU(), conv(6, 3))


@hazard(free=6, spaces=1, because=("broadcast",))
def spatial_gate() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x * torch.sigmoid(m.gate(x)))

    return Net(run, stem=conv(3, 6), gate=conv(6, 1), head=conv(6, 3))


@hazard(free=12, spaces=2)
def squeeze_excite() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1).flatten(1))))
        return m.head(x * F.hardsigmoid(gate)[:, :, None, None])

    return Net(run, stem=conv(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), head=conv(8, 3))


@hazard(free=14, spaces=2)
def selective_kernel() -> nn.Module:
    """Two branches weighted by a softmax over branches: logits of both leave with the channel."""

    def run(m: Any, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        s = m.up(F.relu(m.down((a + b).mean((2, 3)))))
        w = s.view(s.shape[0], 2, 8, 1, 1).softmax(1)
        return m.head(w[:, 0] * a + w[:, 1] * b)

    return Net(run, a=conv(3, 8), b=conv(3, 8, 1), down=nn.Linear(8, 6), up=nn.Linear(6, 16), head=conv(8, 3))


def shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@hazard(free=10, spaces=2)
def channel_shuffle() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.b(shuffled(F.relu(m.a(x)), 2))))

    return Net(run, a=conv(3, 8), b=conv(8, 6), head=conv(6, 3))


@hazard()
def shuffle_unit() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        one, two = m.stem(x).chunk(2, dim=1)
        x = shuffled(torch.cat([one, m.c(m.b(F.relu(m.a(two))))], 1), 2)
        one, two = x.chunk(2, dim=1)
        return m.head(shuffled(torch.cat([one, m.d(two)], 1), 2))

    return Net(
        run,
        stem=conv(3, 12),
        a=conv(6, 6, 1),
        b=conv(6, 6, groups=6),
        c=conv(6, 6, 1),
        d=conv(6, 6),
        head=conv(12, 3, 1),
    )


@hazard(free=3)
def pixel_shuffle() -> nn.Module:
    return nn.Sequential(conv(3, 12), nn.PixelShuffle(2), nn.ReLU(), conv(3, 2))


@hazard(free=4)
def pixel_unshuffle() -> nn.Module:
    return nn.Sequential(conv(3, 4), nn.PixelUnshuffle(2), nn.ReLU(), conv(16, 3))


@hazard(free=14, spaces=2)
def transposed() -> nn.Module:
    return nn.Sequential(
        conv(3, 6),
        nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        conv(8, 3),
    )


@hazard(free=7, spaces=2)
def transposed_grouped() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2, bias=False), nn.ReLU(), conv(8, 3, 1)
    )


@hazard()
def transposed_depthwise() -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6), nn.ReLU(), conv(6, 3, 1))


@hazard(lambda b: ((random(b, 3, 12),), {}), free=14, spaces=2)
def conv_1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 8, 3),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 6, 3, padding="same"),
        nn.Conv1d(6, 2, 1),
    )


@hazard(lambda b: ((random(b, 2, 4, 6, 6),), {}), free=7, spaces=2)
def conv_3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.Conv3d(4, 3, 3),
        nn.AvgPool3d(2),
        nn.Flatten(),
        nn.Linear(12, 2),
    )


@hazard(free=8, spaces=1)
def module_twice() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.c(F.relu(m.c(m.stem(x))))))

    return Net(run, stem=conv(3, 8), c=conv(8, 8), head=conv(8, 3))


@hazard(free=8, spaces=1)
def tied_convolutions() -> nn.Module:
    """Two convolutions share one weight by assignment: one decision, and the tie is kept."""
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8, bias=False), conv(8, 3))
    model[4].weight = model[2].weight
    return model


@hazard(free=11)
def wired_twice() -> nn.Module:
    """One input convolution used on two inputs' halves; the copies meet in an addition."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.b(m.a(x)) + m.b(m.a(x.flip(-1))))

    return Net(run, a=conv(3, 6), b=conv(6, 5), head=conv(5, 3))


@hazard(free=16, spaces=2)
def same_size_uncoupled() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(F.relu(m.a(x))) + m.d(F.relu(m.b(x)))

    return Net(run, a=conv(3, 8), b=conv(3, 8), c=conv(8, 4), d=conv(8, 4))


@hazard(free=8, permutable=False)
def equal_footprints() -> nn.Module:
    """Two halves of one convolution go different ways to the same reader: alike in what they touch, not coupled."""

    def run(m: Any, x: Tensor) -> Tensor:
        one, two = m.a(x).split(4, dim=1)
        return m.head(torch.cat([F.relu(one), torch.tanh(two)], 1))

    return Net(run, a=conv(3, 8), head=conv(8, 3))


@hazard(free=6)
def dead_channels() -> nn.Module:
    """The last four channels are read by nothing."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.a(x)[:, :6])

    return Net(run, a=conv(3, 6), head=conv(6, 3))


# ------------------------------------------------------------------------------------------------- shapes, pads, slices


@hazard(free=11, spaces=2)
def flatten_linear() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.ReLU(), nn.AdaptiveMaxPool2d(7), nn.Flatten(), nn.Linear(6 * 49, 5), nn.ReLU(), nn.Linear(5, 3)
    )


@hazard(free=6, spaces=1)
def flatten_norm() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)
    )


@hazard(free=8)
def concat_pool() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.stem(x))
        return m.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))

    return Net(run, stem=conv(3, 8), head=nn.Linear(16, 3))


@hazard(free=8, spaces=2)
def option_a() -> nn.Module:
    """ResNet's parameter-free shortcut: channel i of the stem meets channel i + 2 of the block."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return m.head(F.relu(short + m.norm(m.a(x))))

    return Net(run, stem=conv(3, 4), a=conv(4, 8, stride=2), norm=nn.BatchNorm2d(8), head=conv(8, 3))


@hazard()
def pad_with_ones() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(F.pad(m.stem(x), (0, 0, 0, 0, 1, 2), value=1.0)))

    return Net(run, stem=conv(3, 4), head=conv(7, 3))


@hazard()
def pad_negative() -> nn.Module:
    """A negative pad crops channels."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.pad(m.stem(x), (0, 0, 0, 0, -2, 1)))

    return Net(run, stem=conv(3, 7), head=conv(6, 3))


@hazard(free=8)
def slices() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.a(F.relu(x[:, :3])) + m.b(x[:, 3:])

    return Net(run, stem=conv(3, 8), a=conv(3, 4), b=conv(5, 4))


@hazard()
def slices_from_the_end() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.a(F.relu(x[:, -3:])) + m.b(x[:, 1:-2]) + m.c(x)

    return Net(run, stem=conv(3, 8), a=conv(3, 4), b=conv(5, 4), c=conv(8, 4))


@hazard()
def slices_with_step() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.a(x[:, ::2]) + m.b(F.relu(x[:, 1::2]))

    return Net(run, stem=conv(3, 8), a=conv(4, 3), b=conv(4, 3))


@hazard()
def one_picked() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x) + x[:, 2:3] * m.other(x)[:, 1, None]

    return Net(run, stem=conv(3, 6), head=conv(6, 3), other=conv(6, 4))


@hazard()
def channel_flip() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.a(x)).flip(1)) + m.other(m.b(x).flip(1) + m.c(x))

    return Net(run, a=conv(3, 6), b=conv(3, 5), c=conv(3, 5), head=conv(6, 3), other=conv(5, 3))


@hazard()
def channel_roll() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.a(x).roll(2, 1))

    return Net(run, a=conv(3, 6), head=conv(6, 3))


@hazard()
def channel_index() -> nn.Module:
    """Channels put in another order by an index buffer."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(x[:, m.order] + m.b(x))

    net = Net(run, a=conv(3, 6), b=conv(6, 6), head=conv(6, 3))
    net.register_buffer("order", torch.tensor([3, 1, 0, 5, 4, 2]))
    return net


@hazard()
def channel_repeat() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.a(x))
        return m.b(x.repeat(1, 2, 1, 1)) + m.c(x.repeat_interleave(2, dim=1))

    return Net(run, a=conv(3, 5), b=conv(10, 3), c=conv(10, 3))


@hazard()
def literal_view() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        y = y.view(y.shape[0], 8, 64)
        return m.c(m.b(y).mean(-1))

    return Net(run, a=conv(3, 8), b=nn.Conv1d(8, 5, 1), c=nn.Linear(5, 3))


@hazard(free=4)
def channels_into_rows() -> nn.Module:
    """Channels and rows merge into one axis that a 1-D convolution reads."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.b(x.reshape(x.shape[0], -1, x.shape[-1]))

    return Net(run, a=conv(3, 4), b=nn.Conv1d(32, 3, 3))


@hazard()
def space_to_depth() -> nn.Module:
    """Focus layer: strided slices side by side."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.b(torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1))

    return Net(run, a=conv(3, 4), b=conv(16, 3))


@hazard(free=6)
def reflect_pad() -> nn.Module:
    return nn.Sequential(
        conv(3, 6, padding_mode="reflect"),
        nn.ReflectionPad2d(1),
        nn.Conv2d(6, 3, 3, padding=1, padding_mode="circular"),
    )


@hazard(free=14)
def u_net() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        a = F.relu(m.a(x))
        b = F.relu(m.b(F.max_pool2d(a, 2)))
        return m.c(torch.cat([a, F.interpolate(b, scale_factor=2.0, mode="bilinear", align_corners=False)], 1))

    return Net(run, a=conv(3, 6), b=conv(6, 8), c=conv(14, 3))


class _Flow(nn.Module):
    """RAFT in small: features of two images, all their products, looked up where the flow points, a gated update."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 6, stride=2), nn.ReLU(), conv(6, 5))
        self.context = conv(3, 7, stride=2)
        self.looked = conv(9, 4, 1)
        self.z, self.r, self.q = (conv(4 + 3 + 4 + 2, 4) for _ in range(3))
        self.flow = conv(4, 2)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        one, two = torch.chunk(self.features(torch.cat([first, second])), 2, dim=0)
        b, _, h, w = one.shape
        products = (one.flatten(2).transpose(1, 2) @ two.flatten(2) / math.sqrt(5)).view(b * h * w, 1, h, w)
        hidden, given = torch.split(self.context(first), [4, 3], dim=1)
        hidden, given = torch.tanh(hidden), F.relu(given)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        start = torch.stack([columns, rows]).to(first.dtype)[None].expand(b, 2, h, w)
        near = torch.stack(torch.meshgrid(torch.arange(-1, 2), torch.arange(-1, 2), indexing="ij")[::-1], -1)
        flow = torch.zeros_like(start)
        for _ in range(2):
            centre = (start + flow).permute(0, 2, 3, 1).reshape(b * h * w, 1, 1, 2)
            grid = 2 * (centre + near.to(first.dtype)[None]) / (w - 1) - 1
            seen = F.grid_sample(products, grid, align_corners=True).view(b, h, w, 9).permute(0, 3, 1, 2)
            x = torch.cat([given, F.relu(self.looked(seen)), flow], dim=1)
            both = torch.cat([hidden, x], dim=1)
            z, r = torch.sigmoid(self.z(both)), torch.sigmoid(self.r(both))
            hidden = (1 - z) * hidden + z * torch.tanh(self.q(torch.cat([r * hidden, x], dim=1)))
            flow = flow + 0.3 * self.flow(hidden)
        return flow


@hazard(
    lambda b: ((random(b, 3, 8, 8), random(b, 3, 8, 8).flip(0, 3)), {}),
    free=6 + 5 + 4 + 3 + 4,
    zero_writes=True,
    double=False,
)
def optical_flow() -> nn.Module:
    return _Flow()
