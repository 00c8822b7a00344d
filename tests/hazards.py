"""Tiny nets, one per structural hazard of channel pruning: convolutions, shapes, element-wise ops, ops without a rule.

Each is fast (≤ 5,000 parameters) and has seeded random weights of healthy scale, so that a wrong cut shows in the
output. `free` and `spaces` say what coupling must find, counted by hand, where there is one right answer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hazard:
    """One net and what is known about it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    """Batch size → (args, kwargs)."""
    free: int | None = None
    """Units that may leave."""
    spaces: int | None = None
    because: tuple[str, ...] = ()
    """Each of these texts is in the reason or place of some pin."""
    unknown: str = ""
    """An op that has no rule."""
    norms: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Norm module without weights → parameter axis whose kept indices it follows."""
    stochastic: bool = False
    """Whether train mode differs from run to run."""
    zero_writes: bool = False
    """Channels are consumed by a product of activations: what writes them is zeroed as well as what reads them."""
    double: bool = True
    """Whether the net can run in float64."""
    unused: tuple[str, ...] = ()
    """Parameters that get no gradient."""
    permutable: bool = True
    """Whether the units of a space can trade places without changing the function."""


HAZARDS: dict[str, Hazard] = {}


class Net(nn.Module):
    """Modules by name, and a function that runs them."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def image(batch: int) -> Inputs:
    return (random(batch, 3, 8, 8),), {}


def tokens(batch: int) -> Inputs:
    return (random(batch, 6, 5),), {}


def words(batch: int) -> Inputs:
    return (torch.randint(0, 11, (batch, 6), generator=torch.Generator().manual_seed(batch)),), {}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=options.pop("padding", k // 2), **options)


def hazard(
    inputs: Callable[[int], Inputs] = image, **known: Any
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        HAZARDS[build.__name__] = Hazard(build=build, inputs=inputs, **known)
        return build

    return add


@functools.cache
def built(name: str) -> nn.Module:
    """The net with its healthy weights, in eval mode; tests must not change it."""
    return fresh(name)


def fresh(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return healthy(HAZARDS[name].build()).eval()


def healthy(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights at which every channel matters: no zeros, no 1e-6 scales, statistics away from 0 and 1."""
    make = torch.Generator().manual_seed(seed)
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)
    scales = {id(m.weight) for m in model.modules() if isinstance(m, norms) and m.weight is not None}
    with torch.no_grad():
        for p in model.parameters():
            if id(p) in scales or p.numel() == 1:
                p.copy_(torch.rand(p.shape, generator=make) + 0.5)
            elif p.dim() >= 2:
                p.copy_(torch.randn(p.shape, generator=make) * 1.2 / math.sqrt(max(p[0].numel(), 2)))
            else:
                p.copy_(torch.randn(p.shape, generator=make) * 0.4)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=make) * 0.3)
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=make) + 0.5)
    for module in model.modules():  # pruning masks keep a product that is not a parameter
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                hook(module, None)
    return model


# -------------------------------------------------------------------------------------------------------- convolutions


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


# ------------------------------------------------------------------------------------------------ shapes, pads, slices


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


# ------------------------------------------------------------------------------------------- element-wise and in place


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


@hazard()
def patches_unfolded() -> nn.Module:
    """im2col and col2im around a linear layer; channels as rows of a linear over positions."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        y = m.b(F.unfold(x, 2, stride=2).transpose(1, 2)).transpose(1, 2)
        y = F.fold(y, (8, 8), 2, stride=2)
        return m.head(F.relu(y)) + m.rows(m.c(x).flatten(2)).mean((1, 2))[:, None, None, None]

    return Net(run, a=conv(3, 4), b=nn.Linear(16, 20), head=conv(5, 3), c=conv(4, 5), rows=nn.Linear(64, 3))


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


# ---------------------------------------------------------------------------------------------- the weight is computed


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


@hazard()
def standardised_weight() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        w = m.a.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return m.head(F.relu(F.conv2d(m.stem(x), w, m.a.bias, padding=1)))

    return Net(run, stem=conv(3, 5), a=conv(5, 6), head=conv(6, 3))


# ---------------------------------------------------------------------------------------------------------- no rule


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
def cbam() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return m.head(x * torch.sigmoid(m.gate(gate)))

    return Net(run, stem=conv(3, 6), gate=conv(2, 1), head=conv(6, 3))


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


@hazard()
def normalised_channels() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y = (y - y.mean(1, keepdim=True)) / torch.sqrt(y.var(1, keepdim=True) + 1e-5)
        return m.head(F.normalize(m.b(y), dim=1))

    return Net(run, a=conv(3, 6), b=conv(6, 5), head=conv(5, 3))


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


import hazards_tokens  # noqa: E402, F401  (the second half of the table)
