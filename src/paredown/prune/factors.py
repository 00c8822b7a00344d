"""What a rank means for a weight: the chain of smaller layers that takes its place, and the weights that can have one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from paredown.couple.operand import args_of
from paredown.couple.trace import op_name
from paredown.errors import UsageError
from paredown.plan import Rank
from paredown.program import Program, placeholder_names, source_line

MATRIX = ("svd", "asvd", "svd_llm")
"""Methods that split the matrix view [out, in · taps] in two: out = A · (B · x)."""
METHODS = (*MATRIX, "spatial_svd", "tucker2")

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv:
    """How a convolution walks; padding may be torch's text "same" or "valid"."""

    stride: Sizes
    padding: Sizes | str
    dilation: Sizes
    groups: int

    def on(self, axes: Sequence[int]) -> Conv:
        """The same walk along some axes, standing still along the others."""
        keep = set(axes)
        return Conv(
            stride=tuple(s if i in keep else 1 for i, s in enumerate(self.stride)),
            padding=self.padding
            if isinstance(self.padding, str)
            else tuple(p if i in keep else 0 for i, p in enumerate(self.padding)),
            dilation=tuple(d if i in keep else 1 for i, d in enumerate(self.dilation)),
            groups=self.groups,
        )

    def at_rest(self) -> Conv:
        """A walk over every position: stride 1, no padding."""
        ones = (1,) * len(self.stride)
        return Conv(stride=ones, padding=(0,) * len(ones), dilation=ones, groups=self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One layer of a chain: the shape of its weight, [out, in] or [out, in / groups, *kernel], and how it walks."""

    shape: Sizes
    conv: Conv | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """A weight that a chain of factors can replace, everywhere it is used."""

    parameter: str
    names: tuple[str, ...]
    """Every name of the same storage, the parameter's own first."""
    shape: Sizes
    """Of its matrix view: [out, in], or [out, in / groups, *kernel]."""
    conv: Conv | None
    flipped: bool
    """Whether it is stored as [in, out]."""
    nodes: tuple[fx.Node, ...]
    """Nodes of the eval graph that use it."""

    @property
    def groups(self) -> int:
        """Groups of the convolution, 1 for a linear layer."""
        return self.conv.groups if self.conv is not None else 1

    @property
    def taps(self) -> int:
        """Kernel positions, 1 for a linear layer."""
        return math.prod(self.shape[2:])

    def matrices(self, stored: Tensor) -> Tensor:
        """The weight by group as matrices, float64. Shape [groups, out / groups, in / groups · taps]."""
        weight = (stored.T if self.flipped else stored).detach().double()
        return weight.reshape(self.groups, self.shape[0] // self.groups, -1)

    def stored(self, weight: Tensor, like: Tensor) -> Tensor:
        """A weight of this layer's shape as it is stored, in the dtype of `like`."""
        return (weight.T if self.flipped else weight).contiguous().to(like.dtype)


def links(shape: Sizes, conv: Conv | None, rank: Rank) -> tuple[Link, ...]:
    """The chain for one use of a weight, in order of execution.

    Matrix methods: taps → r per group, then 1×1 to out. spatial_svd: k×1 → r, then 1×k. tucker2: 1×1 → r₁, the core
    k×k → r₂ with the stride and padding, 1×1 to out. Raises UsageError where the method or its ranks do not fit.
    """
    most = most_ranks(shape, conv, rank.method)
    if len(rank.ranks) != len(most) or any(r > m for r, m in zip(rank.ranks, most, strict=True)):
        msg = f"ranks of {rank.method} must be {len(most)}, at most {most} for a weight of shape {shape}. Got {rank.ranks}."
        raise UsageError(msg)
    out, depth = shape[:2]
    if conv is None:
        (r,) = rank.ranks
        return Link(shape=(r, depth), conv=None), Link(shape=(out, r), conv=None)
    groups, kernel, point = conv.groups, shape[2:], (1,) * len(shape[2:])
    if rank.method == "tucker2":
        a, b = rank.ranks
        return (
            Link(shape=(groups * a, depth, *point), conv=conv.at_rest()),
            Link(shape=(groups * b, a, *kernel), conv=conv),
            Link(shape=(out, b, *point), conv=conv.at_rest()),
        )
    (r,) = rank.ranks
    if rank.method == "spatial_svd":
        return (
            Link(shape=(groups * r, depth, kernel[0], 1), conv=conv.on((0,))),
            Link(shape=(out, r, 1, kernel[1]), conv=conv.on((1,))),
        )
    return (
        Link(shape=(groups * r, depth, *kernel), conv=conv),
        Link(shape=(out, r, *point), conv=conv.at_rest()),
    )


def walked(sizes: Sequence[Any], link: Link) -> list[Any]:
    """Lengths of the axes that a convolution walks over, after it: ⌊(n + 2p − d (k − 1) − 1) / s⌋ + 1."""
    conv = link.conv
    if conv is None or conv.padding == "same":
        return list(sizes)
    padding = (0,) * len(sizes) if isinstance(conv.padding, str) else conv.padding
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(sizes, padding, conv.dilation, link.shape[2:], conv.stride, strict=True)
    ]


def most_ranks(shape: Sizes, conv: Conv | None, method: str) -> Sizes:
    """The ranks at which a method reproduces any weight of this shape. Raises UsageError where it does not apply."""
    if method not in METHODS:
        msg = f"a rank's method must be one of {', '.join(METHODS)}. Got {method!r}."
        raise UsageError(msg)
    groups = conv.groups if conv is not None else 1
    out, depth, kernel = shape[0] // groups, shape[1], shape[2:]
    taps = math.prod(kernel)
    if method in MATRIX:
        return (min(out, depth * taps),)
    if method == "tucker2" and conv is not None:
        return min(depth, out * taps), min(out, depth * taps)
    if method == "spatial_svd" and len(kernel) == 2:
        return (min(depth * kernel[0], out * kernel[1]),)
    wants = "a 2-D convolution" if method == "spatial_svd" else "a convolution"
    msg = f"{method} must be given {wants}. Got a weight of shape {shape}. Use svd, asvd or svd_llm for it."
    raise UsageError(msg)


def product(factors: Sequence[Tensor], method: str, groups: int) -> Tensor:
    """The weight that a chain of factors amounts to, float64. Shape [out, in / groups, *kernel]."""
    parts = [f.detach().double().unflatten(0, (groups, -1)) for f in factors]
    if method == "tucker2":
        first, core, last = parts[0].flatten(2), parts[1], parts[2].flatten(2)
        whole = torch.einsum("gob,gba...,gai->goi...", last, core, first)
    elif method == "spatial_svd":
        whole = torch.einsum("gorw,grih->goihw", parts[1][..., 0, :], parts[0][..., 0])
    else:
        whole = torch.einsum("gor,gr...->go...", parts[1].flatten(2), parts[0])
    return whole.flatten(0, 1)


# -------------------------------------------------------------------------------------------------- weights of a graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One node that multiplies by a weight."""

    node: fx.Node
    flipped: bool
    conv: Conv | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Weights by parameter name, and why the others of two or more axes stay as they are."""

    layers: Mapping[str, Layer]
    refused: Mapping[str, str]

    def layer(self, name: str) -> Layer:
        """The layer of a weight by any of its names. Raises UsageError with the reason where there is none."""
        for layer in self.layers.values():
            if name in layer.names:
                return layer
        reason = self.refused.get(name, "the captured model has no such weight")
        msg = f"ranks must be given for weights of linear or convolution layers. Got {name!r}: {reason}."
        raise UsageError(msg)


def found(program: Program) -> Found:
    """Every weight of a linear layer or a convolution, tied names together; all uses in both graphs must be such."""
    aliases: dict[int, list[str]] = {}
    for name, tensor in program.state.items():
        aliases.setdefault(id(tensor), []).append(name)
    parameters = set(program.eval_graph.graph_signature.parameters)
    layers: dict[str, Layer] = {}
    refused: dict[str, str] = {}
    for names in aliases.values():
        tensor = program.state[names[0]]
        if tensor.dim() < 2 or names[0] not in parameters:
            continue
        made = _layer(program, names, tensor)
        if isinstance(made, Layer):
            layers[names[0]] = made
        else:
            refused.update(dict.fromkeys(names, made))
    return Found(layers=layers, refused=refused)


def _layer(program: Program, names: list[str], tensor: Tensor) -> Layer | str:
    if not tensor.is_floating_point():
        return f"its dtype is {tensor.dtype}"
    by_graph: list[list[Use]] = []
    for graph in filter(None, (program.eval_graph, program.train_graph)):
        seen: list[Use] = []
        for placeholder in placeholders(graph, names):
            for use in uses(placeholder):
                if isinstance(use, str):
                    return use
                seen.append(use)
        by_graph.append(seen)
    if not by_graph[0]:
        return "the eval graph does not use it"
    every = [use for seen in by_graph for use in seen]
    first = every[0]
    if any(use.flipped != first.flipped for use in every):
        return "it is read in both orientations"
    if any((use.conv is None) != (first.conv is None) for use in every) or any(
        use.conv is not None and first.conv is not None and use.conv.groups != first.conv.groups for use in every
    ):
        return "its uses differ in kind or groups"
    shape = tuple(tensor.shape)
    return Layer(
        parameter=names[0],
        names=tuple(names),
        shape=shape[::-1] if first.flipped else shape,
        conv=first.conv,
        flipped=first.flipped,
        nodes=tuple(use.node for use in by_graph[0]),
    )


def placeholders(graph: ExportedProgram, names: Sequence[str]) -> list[fx.Node]:
    """The placeholders of a tensor, under any of its names."""
    by_node = placeholder_names(graph)
    return [n for n in graph.graph.nodes if n.op == "placeholder" and by_node.get(n.name) in names]


def uses(node: fx.Node, flipped: bool = False) -> Iterator[Use | str]:
    """Every node that multiplies by a weight, seen through transposes; a text says what else reads it."""
    for user in node.users:
        name = op_name(user) if user.op == "call_function" else user.op
        if is_transpose(user):
            yield from uses(user, not flipped)
        elif name == "linear" and _only_at(user, node, 1):
            yield Use(node=user, flipped=flipped, conv=None)
        elif (name in ("matmul", "mm") and _only_at(user, node, 1) and len(node.meta["val"].shape) == 2) or (
            name == "addmm" and _only_at(user, node, 2) and not user.kwargs
        ):
            yield Use(node=user, flipped=not flipped, conv=None)
        elif name in ("conv1d", "conv2d", "conv3d") and _only_at(user, node, 1) and not flipped:
            yield Use(node=user, flipped=False, conv=conv_of(user))
        else:
            yield f"{name} reads it at {source_line(user) or user.name}"


def is_transpose(node: fx.Node) -> bool:
    """Whether a node does nothing but swap the two axes of a matrix."""
    name = op_name(node) if node.op == "call_function" else ""
    if name not in ("t", "transpose", "permute", "numpy_T"):
        return False
    source, *axes = node.args
    value: Any = source.meta["val"] if isinstance(source, fx.Node) else None
    if value is None or value.dim() != 2:
        return False
    named: Any = axes[0] if name == "permute" else axes or (0, 1)
    return sorted(int(a) % 2 for a in named) == [0, 1] and (name != "permute" or int(named[0]) % 2 == 1)


def conv_of(node: fx.Node) -> Conv:
    """How a convolution node walks."""
    weight: Any = args_of(node, "weight")[0]
    stride, padding, dilation, groups = args_of(node, "stride", "padding", "dilation", "groups")
    axes = weight.meta["val"].dim() - 2

    def whole(value: Any) -> Sizes:
        sizes = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
        return tuple(sizes * axes if len(sizes) == 1 else sizes)

    return Conv(
        stride=whole(stride),
        padding=padding if isinstance(padding, str) else whole(padding),
        dilation=whole(dilation),
        groups=int(groups),
    )


def _only_at(user: fx.Node, node: fx.Node, position: int) -> bool:
    return len(user.args) > position and [i for i, a in enumerate(user.args) if a is node] == [position]


# --------------------------------------------------------------------------------------------------------------- names


def factor_names(parameter: str, count: int, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the factors: those of nn.Sequential in the layer's place ("fc.weight" → "fc.0.weight", "fc.1.weight").

    A weight that shares its module with more than a bias keeps its own name in front ("in_proj_weight.0.weight").

    >>> factor_names("fc.weight", 2, {"fc.weight": 0, "fc.bias": 0})
    ('fc.0.weight', 'fc.1.weight')
    """
    owner, _, leaf = parameter.rpartition(".")
    others = {n for n in state if n.startswith(f"{owner}.")} - {f"{owner}.weight", f"{owner}.bias"}
    prefix = owner if owner and leaf == "weight" and not others else parameter
    return tuple(f"{prefix}.{i}.weight" for i in range(count))
