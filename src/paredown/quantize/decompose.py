"""Rewrites before annotation: identities out, compound activations into ops that the runtime has in int8.

One function per aten op name; a target's `decompositions` says which of them apply. Every rewrite computes the same
function; `quantize` proves it on the example before it goes on.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten
Rewrite = Callable[[fx.Node], "fx.Node | None"]
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
CONVS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    *_TRANSPOSED,
)


def op_name(node: fx.Node) -> str:
    """Name of the aten op without its overload, "" for anything else."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return str(target.overloadpacket.__name__)


def pad_value(node: fx.Node) -> Any:
    """The constant of a padding; 0 where the mode repeats values that exist."""
    if op_name(node) == "constant_pad_nd":
        return node.args[2] if len(node.args) > 2 else 0
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return (value or 0) if mode == "constant" else 0


def decompose(graph: fx.GraphModule, names: tuple[str, ...]) -> None:
    """Apply the rewrites of those names, in place."""
    for node in list(graph.graph.nodes):
        rewrite = REWRITES.get(op_name(node)) if op_name(node) in names else None
        new = rewrite(node) if rewrite else None
        if new is not None:
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def call(before: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new call in front of a node, with the fake value that later passes read shapes from."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    fakes = fx.node.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*fakes)
    node.meta["stack_trace"] = before.meta.get("stack_trace")
    node.meta["nn_module_stack"] = before.meta.get("nn_module_stack")
    return node


def _identity(node: fx.Node) -> fx.Node | None:
    training = op_name(node).rstrip("_").endswith("dropout") and bool(node.args[2])
    first = node.args[0]
    return None if training or not isinstance(first, fx.Node) else first


def _gated(gate: Any) -> Rewrite:
    """x → x · gate(x)."""

    def rewrite(node: fx.Node) -> fx.Node:
        x = node.args[0]
        return call(node, aten.mul.Tensor, x, call(node, gate, x))

    return rewrite


def _reshape(node: fx.Node) -> fx.Node | None:
    """A view needs the strides of its input; what passes through quantize and dequantize has others."""
    x = node.args[0]
    sizes = node.args[1] if len(node.args) > 1 else None
    return call(node, aten.reshape.default, x, sizes) if isinstance(sizes, list | tuple) else None


def _mean(node: fx.Node) -> fx.Node | None:
    """The mean over height and width as a pool: runtimes have int8 pools, but no int8 mean."""
    x, axes = node.args[0], node.args[1] if len(node.args) > 1 else None
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if (
        not isinstance(value, Tensor)
        or value.dim() != 4
        or not isinstance(axes, list | tuple)
        or node.kwargs.get("dtype") is not None
    ):
        return None
    if sorted(int(a) % 4 for a in axes) != [2, 3] or not value.is_floating_point():
        return None
    pooled = call(node, aten.adaptive_avg_pool2d.default, x, [1, 1])
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return pooled if keep else call(node, aten.flatten.using_ints, pooled, 1)


def largest(node: fx.Node) -> fx.Node | None:
    """An adaptive maximum of equal parts is one over windows, which is on codes where its input is; with places asked for too it stays."""
    x, sizes = node.args[0], node.args[1]
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    parts = [p for p in node.users if p.users]
    places = any(p.target is not operator.getitem or p.args[1] != 0 for p in parts)
    if not isinstance(value, Tensor) or not isinstance(sizes, list | tuple) or len(sizes) != 2 or places:
        return None
    held, wanted = list(value.shape[-2:]), list(sizes)
    if not all(isinstance(n, int) for n in (*held, *wanted)) or any(n % w for n, w in zip(held, wanted, strict=True)):
        return None
    windows = [n // w for n, w in zip(held, wanted, strict=True)]
    pooled = call(node, aten.max_pool2d.default, x, windows, windows)
    for part in parts:
        part.replace_all_uses_with(pooled)
    return None  # without readers it goes by itself


def _linear(node: fx.Node) -> fx.Node | None:
    """A linear layer on [batch, tokens, channels] as one on [batch · tokens, channels]: a matrix product with bias is one int8 kernel."""
    x = node.args[0]
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() < 3:
        return None
    free = [d for d in value.shape[:-1] if not isinstance(d, int)]
    if len(free) > 1:
        return None
    width = node.meta["val"].shape[-1]
    sizes = [d if isinstance(d, int) else -1 for d in value.shape[:-1]]
    flat = call(node, aten.reshape.default, x, [-1, value.shape[-1]])
    return call(node, aten.reshape.default, call(node, aten.linear.default, flat, *node.args[1:]), [*sizes, width])


REWRITES: dict[str, Rewrite] = {
    **dict.fromkeys(
        ("dropout", "dropout_", "feature_dropout", "alias", "detach", "contiguous", "clone", "lift_fresh_copy"),
        _identity,
    ),
    **dict.fromkeys(("hardswish", "hardswish_"), _gated(aten.hardsigmoid.default)),
    **dict.fromkeys(("silu", "silu_"), _gated(aten.sigmoid.default)),
    **dict.fromkeys(("view", "_unsafe_view"), _reshape),
    "mean": _mean,
    "adaptive_max_pool2d": largest,
    "linear": _linear,
}


# ------------------------------------------------------------------------------------------------------- batch norm


def free_batch_norms(graph: fx.GraphModule) -> None:
    """Leave no batch norm but those that prepare_pt2e folds into the layer before them, and make that safe.

    It folds without looking whether the weight or the output of that layer is used elsewhere. So a shared weight
    gets a copy of its own, and a batch norm that cannot be folded becomes a depthwise 1×1 convolution, which has an int8
    kernel and loses nothing: with one weight per channel, every weight is 127 times its scale. One of an input
    without height and width becomes a multiplication and an addition.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten.batch_norm.default or not isinstance(node.args[0], fx.Node):
            continue
        layer = node.args[0]
        flat = layer.target is aten.linear.default and layer.meta["val"].dim() == 2
        if (flat or folds(layer)) and len(layer.users) == 1:
            own_weights(graph, layer)
        else:
            _as_affine(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def folds(layer: fx.Node) -> bool:
    """A convolution that prepare_pt2e folds rightly: of transposed ones it mistakes the channels where there are groups."""
    transposed = layer.target in _TRANSPOSED
    return layer.target in CONVS and not (transposed and len(layer.args) > 6 and layer.args[6] != 1)


def own_weights(graph: fx.GraphModule, layer: fx.Node) -> None:
    """Weight and bias of a layer as parameters that nothing else reads, by copies where they are shared."""
    holders = [n for n in graph.graph.nodes if n.op == "get_attr"]
    for position in (1, 2):
        arg = layer.args[position] if len(layer.args) > position else None
        if not isinstance(arg, fx.Node) or arg.op != "get_attr":
            continue
        tensor = fetch(graph, str(arg.target))
        aliases = [n for n in holders if fetch(graph, str(n.target)) is tensor]
        if len(arg.users) == 1 and len(aliases) == 1 and isinstance(tensor, nn.Parameter):
            continue
        path, _, leaf = str(arg.target).rpartition(".")
        with graph.graph.inserting_before(layer):
            own = graph.graph.get_attr(attach(graph, f"{path}_{layer.name}.{leaf}", tensor.detach().clone()))
        own.meta.update(arg.meta)
        layer.update_arg(position, own)


def _as_affine(graph: fx.GraphModule, node: fx.Node) -> None:
    names = [str(a.target) if isinstance(a, fx.Node) else None for a in node.args[1:5]]
    weight, bias, mean, var = (fetch(graph, n) if n else None for n in names)
    if mean is None or var is None or bool(node.args[5]):
        return
    scale = torch.rsqrt(var.double() + float(node.args[7])) * (1.0 if weight is None else weight.detach().double())  # type: ignore[arg-type]
    shift = (0.0 if bias is None else bias.detach().double()) - mean.double() * scale
    value, x = node.meta["val"], node.args[0]
    path = (names[0] or f"{node.name}.weight").rpartition(".")[0]

    def holder(leaf: str, tensor: Tensor) -> fx.Node:
        tensor = tensor.to(value.dtype)
        with graph.graph.inserting_before(node):
            made = graph.graph.get_attr(attach(graph, f"{path}_affine.{leaf}", tensor))
        made.meta["val"] = value.fake_mode.from_tensor(tensor, static_shapes=True)
        return made

    if value.dim() == 4:
        channels = int(scale.numel())
        parts = (holder("weight", scale.reshape(-1, 1, 1, 1)), holder("bias", shift))
        new = call(node, aten.conv2d.default, x, *parts, [1, 1], [0, 0], [1, 1], channels)
    else:
        shape = [1, -1] + [1] * (value.dim() - 2)
        scaled = call(node, aten.mul.Tensor, x, holder("weight", scale.reshape(shape)))
        new = call(node, aten.add.Tensor, scaled, holder("bias", shift.reshape(shape)))
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def fetch(graph: fx.GraphModule, name: str) -> Tensor:
    """The tensor that a get_attr node of that target reads."""
    owner: Any = graph
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner  # type: ignore[no-any-return]


def attach(graph: fx.GraphModule, name: str, tensor: Tensor) -> str:
    """Register a new parameter (folding wants one) under a dotted name that is free; returns the name."""
    *path, leaf = name.split(".")
    owner: nn.Module = graph
    for part in path:
        if not isinstance(getattr(owner, part, None), nn.Module):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    while hasattr(owner, leaf):
        leaf += "_"
    owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return ".".join((*path, leaf))
