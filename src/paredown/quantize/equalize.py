"""Function-preserving scales between layers, so that one range per tensor fits all its channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from paredown.program import Inputs
from paredown.quantize.decompose import fetch, op_name, pad_value
from paredown.quantize.lanes import Layer, layers_of, plain_lanes

ROUNDS = 20
"""Of equalization at most; it stops when no scale moves by more than a thousandth."""
SMOOTHING = 0.5
"""α of SmoothQuant: 0 leaves the weights as they are, 1 the activations."""
_HOMOGENEOUS = frozenset(
    "relu relu_ leaky_relu leaky_relu_ max_pool1d max_pool2d max_pool3d avg_pool2d adaptive_avg_pool2d".split()
)
"""f(s·x) = s·f(x) for s > 0, channel by channel."""
_CLAMPED = frozenset("relu6 relu6_ hardtanh hardtanh_".split())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """Two layers, of which the second alone reads the first, through nothing but positively homogeneous ops."""

    first: Layer
    second: Layer
    clamps: tuple[fx.Node, ...]
    """ReLU6 between them: homogeneous only where it does not cut."""


def pairs_of(prepared: fx.GraphModule) -> Iterator[Pair]:
    """All pairs of the prepared graph, in graph order."""
    layers = {layer.node: layer for layer in layers_of(prepared)}
    for layer in layers.values():
        if layer.bias_is_given:
            continue  # its output would not scale with its weight
        node = layer.node
        clamps: list[fx.Node] = []
        while len(node.users) == 1:
            node = next(iter(node.users))
            second = layers.get(node)
            if second is not None:
                if _channels(second) == layer.use.shape[0] and second.use.spatial == layer.use.spatial:
                    yield Pair(first=layer, second=second, clamps=tuple(clamps))
                break
            if node.op == "call_function" and op_name(node) in _CLAMPED:
                clamps.append(node)
            elif (node.op == "call_function" and op_name(node) not in _HOMOGENEOUS) or node.op not in (
                "call_function",
                "call_module",
            ):
                break


def _channels(layer: Layer) -> int:
    return layer.use.shape[1] * layer.groups


def equalize(prepared: fx.GraphModule, calls: Sequence[Inputs], *, clamped: bool = True) -> dict[str, float]:
    """Give every channel between two layers the same weight range on both sides; returns the largest scale, by weight.

        W₁ ← W₁ / s,   b₁ ← b₁ / s,   W₂ ← W₂ · s,   s_i = √(r₁ᵢ / r₂ᵢ)

    r₁ᵢ is the largest |weight| of output channel i of the first layer, r₂ᵢ that of input channel i of the second. The
    network computes the same (Nagel et al. 2019, arXiv 1906.04721, equation 11); chains of pointwise and depthwise
    layers are pairs of neighbours, gone through until nothing moves. Before the pairs with a ReLU6 between them are taken,
    every such ReLU6 must not cut anything on `calls`, or it stays and so does the pair: we differ there from the paper,
    which replaces it always. Changes the prepared graph. Nothing is done to a layer without a positive range.
    """
    pairs = list(pairs_of(prepared))
    idle = _idle(prepared, [c for p in pairs for c in p.clamps], calls) if clamped else set()
    pairs = [p for p in pairs if all(c in idle for c in p.clamps)]
    for node in {c for p in pairs for c in p.clamps}:
        _open(prepared, node)
    found: dict[str, float] = {}
    with torch.no_grad():
        for _ in range(ROUNDS):
            moved = 0.0
            for pair in pairs:
                scales = _balance(prepared, pair)
                moved = max(moved, float(scales.log().abs().max()))
                found[pair.first.weight] = max(found.get(pair.first.weight, 1.0), float(scales.max()))
            if moved < 1e-3:
                break
    return found


def _balance(prepared: fx.GraphModule, pair: Pair) -> Tensor:
    """One pair equalized in place; the scales. Shape [channels]."""
    w1, w2 = fetch(prepared, pair.first.weight), fetch(prepared, pair.second.weight)
    into = w2.detach().reshape(pair.second.groups, -1, *w2.shape[1:])  # [groups, out / groups, in / groups, …]
    r1 = w1.detach().abs().reshape(w1.shape[0], -1).amax(1)
    r2 = into.abs().transpose(1, 2).flatten(2).amax(2).reshape(-1)
    usable = (r1 > 0) & (r2 > 0)
    scales = torch.where(usable, (r1 / r2.clamp_min(1e-30)).sqrt(), torch.ones_like(r1)).clamp(1e-4, 1e4)
    w1.data = w1.detach() / scales.reshape(-1, *[1] * (w1.dim() - 1))
    if pair.first.bias is not None:
        bias = fetch(prepared, pair.first.bias)
        bias.data = bias.detach() / scales
    wide = scales.reshape(pair.second.groups, 1, -1, *[1] * (w2.dim() - 2))
    w2.data = (into * wide).reshape(w2.shape)
    return scales


def _idle(prepared: fx.GraphModule, clamps: Sequence[fx.Node], calls: Sequence[Inputs]) -> set[fx.Node]:
    """The clamps that cut nothing off above on these samples."""
    idle, wanted = set(clamps), set(clamps)

    def look(node: fx.Node, value: Tensor) -> None:
        high = 6.0 if "relu6" in op_name(node) else float(node.args[2]) if len(node.args) > 2 else 1.0  # type: ignore[arg-type]
        low = 0.0 if "relu6" in op_name(node) else float(node.args[1]) if len(node.args) > 1 else -1.0  # type: ignore[arg-type]
        if low != 0.0 or float(value.max()) >= high:
            idle.discard(node)

    plain_lanes(prepared, calls, wanted, look)
    return idle


def _open(prepared: fx.GraphModule, node: fx.Node) -> None:
    """relu6 → relu."""
    with prepared.graph.inserting_before(node):
        new = prepared.graph.call_function(torch.ops.aten.relu.default, (node.args[0],))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    prepared.graph.erase_node(node)
    prepared.recompile()


# ------------------------------------------------------------------------------------------------------ SmoothQuant


def smooth(prepared: fx.GraphModule, calls: Sequence[Inputs], *, alpha: float = SMOOTHING) -> dict[str, float]:
    """Move the outliers of activations behind a layer norm into the weights that read them; returns the largest scale, by norm.

        γ ← γ / s,   β ← β / s,   W ← W · s,   s_j = max|x_j|^α / max|w_j|^(1 - α)

    x_j is channel j of the norm's output on `calls`, w_j column j of all linear layers that read it together. The network
    computes the same (Xiao et al. 2022, arXiv 2211.10438, equation 4). Only a norm all of whose readers are linear layers,
    through ops that leave the last axis alone. Changes the prepared graph.
    """
    layers = {layer.node: layer for layer in layers_of(prepared) if not layer.use.spatial}
    norms = {n: r for n in prepared.graph.nodes if op_name(n) == "layer_norm" and (r := _linear_readers(n, layers))}
    largest: dict[fx.Node, Tensor] = {}

    def look(node: fx.Node, value: Tensor) -> None:
        seen = value.abs().flatten(0, -2).amax(0)
        largest[node] = torch.maximum(largest[node], seen) if node in largest else seen

    plain_lanes(prepared, calls, set(norms), look)
    found = {}
    for node, readers in norms.items():
        weights = [fetch(prepared, layer.weight) for layer in readers]
        columns = torch.stack([w.detach().abs().amax(0) for w in weights]).amax(0).clamp_min(1e-5)
        scales = (largest[node].clamp_min(1e-5) ** alpha / columns ** (1 - alpha)).clamp(1e-4, 1e4)
        for arg in node.args[2:4]:
            held = fetch(prepared, str(arg.target))
            held.data = held.detach() / scales
        for w in weights:
            w.data = w.detach() * scales
        found[str(node.args[2].target)] = float(scales.max())
    return found


_LEAVE_LAST = frozenset(
    "reshape view _unsafe_view flatten unflatten squeeze expand repeat dropout clone contiguous alias detach".split()
)
"""What leaves the last axis alone where its length stays."""
_ALONG = frozenset("slice narrow select index_select roll flip transpose swapaxes unsqueeze".split())
"""What leaves all axes alone but those that it names: in its first argument behind the tensor, of a roll in the second."""
_NO_READERS = ("sym_size", "_assert_tensor_metadata")
"""What asks for a shape and reads no value."""


def _leaves_last(node: fx.Node) -> bool:
    """Whether entry j along the last axis of what an op gives is entry j of what it reads, or 0."""
    first: Any = node.args[0] if node.args else None
    while isinstance(first, fx.Node) and first.op == "call_module":  # an observer has no value of its own
        first = first.args[0]
    value, before = node.meta.get("val"), first.meta.get("val") if isinstance(first, fx.Node) else None
    if not isinstance(value, Tensor) or not isinstance(before, Tensor) or not value.dim():
        return False
    name, args, rank = op_name(node), [*node.args[1:]], before.dim()
    if value.shape[-1] != before.shape[-1] or node.kwargs.keys() - {"memory_format", "implicit", "value", "mode"}:
        return False
    if name in _LEAVE_LAST:
        return True
    if name == "permute":
        return bool(args[0][-1] % rank == rank - 1)  # type: ignore[index,operator]
    if name in ("pad", "constant_pad_nd"):
        return [*args[0]][:2] == [0, 0] and pad_value(node) == 0  # type: ignore[misc]
    if name not in _ALONG:
        return False
    axes: Any = args[:2] if name in ("transpose", "swapaxes") else args[1:2] if name == "roll" else args[:1] or [0]
    axes = axes[0] if axes and isinstance(axes[0], list | tuple) else axes
    rank += name == "unsqueeze"
    return bool(axes) and all(a % rank != rank - 1 for a in axes)


def _linear_readers(node: fx.Node, layers: dict[fx.Node, Layer]) -> list[Layer]:
    """The linear layers that read a norm; none where something else does, too, or the norm has no weight and bias of its own."""
    if len(node.args) < 4 or any(getattr(a, "op", "") != "get_attr" or len(a.users) > 1 for a in node.args[2:4]):  # type: ignore[union-attr]
        return []
    readers, waiting = [], list(node.users)
    while waiting:
        user = waiting.pop()
        if user in layers:
            readers.append(layers[user])
        elif user.op == "call_module" or _leaves_last(user):
            waiting += list(user.users)
        elif op_name(user) not in _NO_READERS:
            return []
    return list({id(r): r for r in readers}.values())
