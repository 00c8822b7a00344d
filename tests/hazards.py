"""Tiny nets, one per structural hazard of channel pruning: the table. The nets are in the files beside this one.

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
from torch.nn.utils import prune

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
    """Norm or Statistic without weights → parameter axis whose kept indices it follows."""
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


class Statistic(nn.Module):
    """A statistic over the channels, as code of one's own takes it. `leaving`: those that an oracle does not take."""

    def __init__(self, take: Callable[[Tensor], Any], *, axis: int = 1, first: int = 0) -> None:
        """`first` is the position of the writer's first channel along the axis."""
        super().__init__()
        self.take, self.axis, self.first = take, axis, first
        self.leaving: frozenset[int] = frozenset()

    def forward(self, x: Tensor) -> Any:
        if self.leaving:
            kept = [i for i in range(x.shape[self.axis]) if i - self.first not in self.leaving]
            x = x.index_select(self.axis, torch.tensor(kept))
        return self.take(x)


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


# The nets enter themselves.
import hazards_attention  # noqa: E402, F401
import hazards_elements  # noqa: E402, F401
import hazards_images  # noqa: E402, F401
import hazards_statistics  # noqa: E402, F401
import hazards_tokens  # noqa: E402, F401
