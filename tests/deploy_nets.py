"""Small networks for the tests of quantize, export and measure, one per structure that runtimes treat differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = dict[str, Any]


class Block(nn.Module):
    """A residual block with an option-A shortcut: every second pixel, zeros for the new channels."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.c, self.d = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.more, self.stride = outer - inner, stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.d(self.c(F.relu(self.b(self.a(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(x + y)


class Residual(nn.Module):
    """The shape of the digits network: convolution, residual blocks, pool, linear."""

    def __init__(self, widths: tuple[int, ...] = (8, 16)) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nn.Sequential(*(Block(i, o, 1 if i == o else 2) for i, o in pairs))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Mobile(nn.Module):
    """Depthwise convolution, squeeze and excite, hard-swish, SiLU, a mean instead of a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.depthwise, self.norm = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.squeeze, self.excite, self.point = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.silu(self.norm(self.depthwise(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head((self.point(y * gate) + x).mean((2, 3)))


class Concat(nn.Module):
    """Concatenation of an activation that cannot be negative with one that can, relu6, max pool, flatten, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.a(x))
        x = F.max_pool2d(self.c(torch.cat([x, self.b(x)], 1)), 2)
        return self.head(F.dropout(x.flatten(1), 0.5, self.training))


class Pair(nn.Module):
    """One backbone called twice (siamese): what it ends in has another scale for either call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one, two = (self.b(torch.relu(self.a(v))) for v in (x, y))
        return self.head((one - two).abs())


class Vision(nn.Module):
    """A small vision transformer: patches, class token, attention, layer norm, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.one, self.two = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out, self.up, self.down = (
            nn.Linear(16, 48),
            nn.Linear(16, 16),
            nn.Linear(16, 32),
            nn.Linear(32, 16),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.one(x)).reshape(batch, tokens, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        return self.head((x + self.down(F.gelu(self.up(self.two(x)))))[:, 0])


class Named(nn.Module):
    """Two inputs, one by keyword; a dict with a tuple inside comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(6, 8)
        self.kind, self.size = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, image: Tensor, *, table: Tensor) -> dict[str, Any]:
        y = F.relu(self.a(image)).mean((2, 3)) + F.relu(self.b(table))
        return {"kind": self.kind(y), "rest": (self.size(y), y)}


def _images(channels: int, size: int) -> Callable[[int], Inputs]:
    return lambda batch: {"args": (torch.randn(batch, channels, size, size),), "kwargs": {}}


def _named(batch: int) -> Inputs:
    return {"args": (torch.randn(batch, 3, 8, 8),), "kwargs": {"table": torch.randn(batch, 6)}}


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "residual": (Residual, _images(1, 8)),
    "mobile": (Mobile, _images(3, 16)),
    "concat": (Concat, _images(3, 8)),
    "vision": (Vision, _images(3, 16)),
    "named": (Named, _named),
}


def made(name: str) -> tuple[nn.Module, Callable[[int], Inputs]]:
    """The network in eval mode with seeded weights and batch-norm statistics that are not trivial, and its inputs."""
    build, inputs = NETS[name]
    torch.manual_seed(7)
    net = build()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval(), inputs
