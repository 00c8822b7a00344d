"""Tiny nets, one per structural hazard: statistics over the channels, as norms and gates written by hand take them. See hazards.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hazards import Net, Statistic, conv, hazard, tokens

# ---------------------------------------------------------------------------------------------------------- norms by hand


def mean(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


@hazard(free=11, norms={"mean": ("a.weight", 0), "var": ("a.weight", 0), "length": ("b.weight", 0)})
def normalised_channels() -> nn.Module:
    """A layer norm over the channels of a map, then unit length."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y = (y - m.mean(y)) / torch.sqrt(m.var(y) + 1e-5)
        y = m.b(y)
        return m.head(y / m.length(y).clamp_min(1e-12))

    return Net(
        run,
        a=conv(3, 6),
        b=conv(6, 5),
        head=conv(5, 3),
        mean=Statistic(mean),
        var=Statistic(lambda x: x.var(1, keepdim=True, correction=0)),
        length=Statistic(lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True)),
    )


@hazard(free=13, norms={"both": ("a.weight", 0), "square": ("b.weight", 0)})
def norms_with_weights_by_hand() -> nn.Module:
    """LayerNorm2d by var_mean, RmsNorm2d by the mean of squares, each with a weight for each channel."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        var, centre = m.both(y)
        y = (y - centre) * torch.rsqrt(var + 1e-6) * m.scale[:, None, None] + m.shift[:, None, None]
        y = F.relu(m.b(y))
        y = y * torch.rsqrt(m.square(y.pow(2)) + 1e-6)
        return m.head(y * m.gain.reshape(1, -1, 1, 1))

    return Net(
        run,
        a=conv(3, 6),
        b=conv(6, 7),
        head=conv(7, 3),
        scale=nn.Parameter(torch.ones(6)),
        shift=nn.Parameter(torch.zeros(6)),
        gain=nn.Parameter(torch.ones(7)),
        both=Statistic(lambda x: torch.var_mean(x, dim=1, correction=0, keepdim=True)),
        square=Statistic(mean),
    )


@hazard(tokens, free=13, norms={"mean": ("a.weight", 0)})
def tokens_centred_by_hand() -> nn.Module:
    """A class token stands before the others: they differ along the tokens, too, and are centred one by one."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), m.a(x)], 1) + m.place
        x = x - m.mean(x)
        return m.head(F.gelu(m.b(x)))[:, 0]

    return Net(
        run,
        a=nn.Linear(5, 7),
        token=nn.Parameter(torch.zeros(1, 1, 7)),
        place=nn.Parameter(torch.zeros(1, 7, 7)),
        b=nn.Linear(7, 6),
        head=nn.Linear(6, 3),
        mean=Statistic(lambda x: x.mean(-1, keepdim=True), axis=2),
    )


@hazard(free=14, norms={"mean": ("a.weight", 0)})
def global_response() -> nn.Module:
    """ConvNeXt V2: the length of every channel over the map, relative to the mean of all channels."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = F.gelu(m.a(m.stem(x)))
        length = torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True)
        y = y + m.shift + m.scale * y * (length / (m.mean(length) + 1e-6))
        return m.head(y)

    return Net(
        run,
        stem=conv(3, 6),
        a=conv(6, 8),
        head=conv(8, 3),
        scale=nn.Parameter(torch.zeros(1, 8, 1, 1)),
        shift=nn.Parameter(torch.zeros(1, 8, 1, 1)),
        mean=Statistic(mean),
    )


# ------------------------------------------------------------------------------------------------------- gates and scores


@hazard(free=6, norms={"mean": ("stem.weight", 0), "highest": ("stem.weight", 0)})
def cbam() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        gate = torch.cat([m.mean(x), m.highest(x)], 1)
        return m.head(x * torch.sigmoid(m.gate(gate)))

    return Net(
        run,
        stem=conv(3, 6),
        gate=conv(2, 1),
        head=conv(6, 3),
        mean=Statistic(mean),
        highest=Statistic(lambda x: x.amax(1, keepdim=True)),
    )


@hazard(free=5, norms={"mean": ("a.weight", 0)})
def mean_beside_the_image() -> nn.Module:
    """The image's own channels and learned ones have one mean: what leaves stands behind what stays."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([x, m.a(x)], 1)
        return m.head(y - m.mean(y))

    return Net(run, a=conv(3, 5), head=conv(8, 3), mean=Statistic(mean, first=3))


@hazard(free=6, norms={"sum": ("a.weight", 0)})
def sum_over_a_number() -> nn.Module:
    """A mean as a sum over the number of channels, which Python counted: the graph keeps the dense number."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(y - m.sum(y) / y.shape[1])

    return Net(run, a=conv(3, 6), head=conv(6, 3), sum=Statistic(lambda x: x.sum(1, keepdim=True)))


@hazard(free=6, norms={"highest": ("a.weight", 0)})
def highest_value() -> nn.Module:
    """max over the channels, of which the value is taken and not the position."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(F.relu(y - 0.5 * m.highest(y)))

    return Net(run, a=conv(3, 6), head=conv(6, 3), highest=Statistic(lambda x: x.max(1, keepdim=True).values))


# ------------------------------------------------------------------------------------------------------- these must pin


@hazard(free=6, because=("max.dim over the channels", "argmax"), unused=("b.weight", "b.bias"))
def highest_position() -> nn.Module:
    """Which channel is the highest: the number means another channel once one before it has left."""

    def run(m: Any, x: Tensor) -> Tensor:
        value, place = m.a(x).max(1, keepdim=True)
        other = m.b(x).argmax(1, keepdim=True)
        return m.head(m.c(x)) * value + place + other

    return Net(run, a=conv(3, 6), b=conv(3, 5), c=conv(3, 6), head=conv(6, 3))


@hazard(free=6, because=("softmax.int over the channels", "cumsum"))
def order_of_channels() -> nn.Module:
    """What is not a statistic stays whole: probabilities over the channels, running sums."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.softmax(m.a(x), 1) * torch.cumsum(m.b(x), 1)
        return m.head(m.c(x)) + m.other(y)

    return Net(run, a=conv(3, 5), b=conv(3, 5), c=conv(3, 6), head=conv(6, 3), other=conv(5, 3))


# ------------------------------------------------------------------------------------------ shaped like another tensor


@hazard(tokens, free=7)
def norm_over_flat_tokens() -> nn.Module:
    """LeViT: batch and tokens are one axis for a batch norm, then two again."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(F.relu(m.norm(y.flatten(0, 1)).reshape_as(y)))

    return Net(run, a=nn.Linear(5, 7), norm=nn.BatchNorm1d(7), head=nn.Linear(7, 3))


@hazard(free=5, because=("reshaped to the shape of another tensor",))
def shaped_like_the_image() -> nn.Module:
    """Channels become pixels because the image has that many: none may leave."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).reshape_as(x) + m.b(x).view_as(x)
        return m.head(F.relu(m.inner(y)))

    return Net(run, a=conv(3, 12, 2, stride=2, padding=0), b=conv(3, 3), inner=conv(3, 5), head=conv(5, 3))
