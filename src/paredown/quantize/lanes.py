"""Two lanes: the prepared graph in float and as it will be quantized, node by node with all samples in step.

What a repair changes at one layer is what the layers behind it see. Activations that are still needed, of all calls and
of both lanes, are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.couple.operand import args_of
from paredown.program import Inputs
from paredown.quantize.decompose import fetch, op_name
from paredown.quantize.numerics import fake_quantize, observes_weight
from paredown.quantize.rehearse import Rounding
from paredown.statistics.sequential import Run
from paredown.statistics.uses import CONVOLUTIONS, Use, window_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """A weighted op of the prepared graph: what it reads, and how its weight is laid out."""

    use: Use
    weight: str
    """Attribute of the prepared graph that holds the weight."""
    observer: str
    """Module of the prepared graph that gives the weight its scales."""
    bias: str | None
    """Attribute that holds the bias, where it is this layer's alone and can be changed."""

    @property
    def bias_is_given(self) -> bool:
        """Whether there is a bias that cannot be changed: it is computed, or another layer's too."""
        return self.bias is None and len(self.node.args) > 2 and self.node.args[2] is not None

    @property
    def groups(self) -> int:
        """Of a convolution; 1 for a linear layer."""
        return self.use.groups

    @property
    def node(self) -> fx.Node:
        """The op."""
        return self.use.node

    @property
    def source(self) -> fx.Node:
        """What the weight is multiplied with, as quantized."""
        return self.use.source


@dataclass(slots=True, kw_only=True)
class Changes:
    """What the quantized lane has instead of the graph's own tensors; written back when the walk is done."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    """By attribute: weights that lie on their grid."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """By observer: scales of those grids."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Scale and zero point by observer: found once, because a search over ranges is slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """One call of the network in float and quantized."""

    whole: Run
    coded: Run


Visit = Callable[[Layer, Sequence[Lanes]], None]


def layers_of(prepared: fx.GraphModule) -> Iterator[Layer]:
    """The weighted ops whose weight has an observer, in graph order. A weight that several ops read is left out."""
    for node in prepared.graph.nodes:
        name = op_name(node)
        if name != "linear" and name not in CONVOLUTIONS:
            continue
        source, weight = node.args[:2]
        if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node) or weight.op != "call_module":
            continue
        holder = weight.args[0]
        if not observes_weight(fetch(prepared, str(weight.target))) or getattr(holder, "op", "") != "get_attr":
            continue
        if len(weight.users) > 1 or len(holder.users) > 1:  # type: ignore[union-attr]
            continue
        yield _layer(prepared, node, source, weight, holder)  # type: ignore[arg-type]


def _layer(prepared: fx.GraphModule, node: fx.Node, source: fx.Node, weight: fx.Node, holder: fx.Node) -> Layer:
    name, bias = op_name(node), node.args[2] if len(node.args) > 2 else None
    shape = tuple(fetch(prepared, str(holder.target)).shape)
    spatial = CONVOLUTIONS.get(name, 0)
    groups: Any = args_of(node, "groups")[0] if spatial else 1
    use = Use(
        parameter=str(holder.target),
        node=node,
        source=source,
        weight=weight,
        rows=(0, shape[0]),
        shape=shape,
        flipped=False,
        groups=int(groups),
        spatial=spatial,
        window=window_of(node, shape[2:]) if spatial else (),
        axis=1 if spatial else -1,
    )
    held = isinstance(bias, fx.Node) and bias.op == "get_attr" and len(bias.users) == 1
    return Layer(
        use=use,
        weight=str(holder.target),
        observer=str(weight.target),
        bias=str(bias.target) if held else None,  # type: ignore[union-attr]
    )


class Lane(Run):
    """The prepared graph on one call. Without changes observers hand on what they get; with them they round it."""

    def __init__(
        self,
        prepared: fx.GraphModule,
        flat: list[Any],
        changes: Changes | None,
        skipped: frozenset[str] = frozenset(),
        *,
        smooth: bool = False,
        floats: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """`skipped` are observers that hand on what they get in the quantized lane, too; `smooth`: gradients pass activations.

        `floats` are tensors of the float network, by attribute, where the graph holds what rounding made of them already.
        """
        super().__init__(prepared, flat)
        self._changes, self._skipped, self._smooth, self._floats = changes, skipped, smooth, floats

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An observer, or a module of the user's."""
        observer: Any = fetch(self.module, str(target))  # type: ignore[arg-type]
        if not hasattr(observer, "calculate_qparams"):
            return super().call_module(target, args, kwargs)
        if (
            self._changes is None
            or str(target) in self._skipped
            or (observes_weight(observer) and str(target) in self._changes.scales)
        ):
            return args[0]
        if str(target) not in self._changes.parameters:
            self._changes.parameters[str(target)] = observer.calculate_qparams()
        found = self._changes.parameters[str(target)]
        if self._smooth and not observes_weight(observer):
            ends = observer.quant_min, observer.quant_max
            return Rounding.apply(args[0], *found, *ends, "integer", 1.0)  # type: ignore[no-untyped-call]
        return fake_quantize(args[0], observer, found)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor of the graph, or what it was changed to."""
        if str(target) in self._floats:
            return self._floats[str(target)]
        if self._changes is not None:
            for held in (self._changes.weights, self._changes.biases):
                if str(target) in held:
                    return held[str(target)]
        return super().get_attr(target, args, kwargs)


def walk(
    prepared: fx.GraphModule,
    calls: Sequence[Inputs],
    changes: Changes,
    visit: Visit,
    *,
    after: Callable[[fx.Node, Sequence[Lanes]], None] | None = None,
    floats: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Both lanes from their inputs to their outputs; at each layer `visit` may change its tensors before it is run.

    When `visit` is called, `lanes.whole.env[layer.node]` is what the layer gives in float, `lanes.coded.env[layer.source]`
    what it will read, and `lanes.whole.env[layer.source]` what it reads in float. `after` is called when both
    lanes have run a node, and may change what the quantized one gives. `floats` are the float lane's own tensors, where an
    earlier repair has rounded those of the graph. Afterwards the graph has what `changes` holds.
    """
    lanes = []
    for call in calls:
        flats = [pytree.tree_leaves(pytree.tree_map(cloned, call)) for _ in range(2)]
        lanes.append(
            Lanes(whole=Lane(prepared, flats[0], None, floats=floats), coded=Lane(prepared, flats[1], changes)),
        )
    layers = {layer.node: layer for layer in layers_of(prepared)}
    with torch.no_grad():
        for node in prepared.graph.nodes:
            if node.op == "output":
                break
            for lane in lanes:
                lane.whole.env[node] = lane.whole.run_node(node)
            if node in layers:
                visit(layers[node], lanes)
                for lane in lanes:  # the weight was read before it was changed
                    _reread(lane.coded, layers[node])
            for lane in lanes:
                lane.whole.drop_after(node)
                lane.coded.next(node)
            if after is not None:
                after(node, lanes)
    apply(prepared, changes)


def plain_lanes(
    prepared: fx.GraphModule, calls: Sequence[Inputs], wanted: set[fx.Node], look: Callable[[fx.Node, Tensor], None]
) -> None:
    """The float lane alone, call after call; `look` sees what each wanted node gives."""
    if not wanted:
        return
    for call in calls:
        run = Lane(prepared, pytree.tree_leaves(pytree.tree_map(cloned, call)), None)
        with torch.no_grad():
            for node in prepared.graph.nodes:
                if node.op == "output":
                    break
                run.env[node] = run.run_node(node)
                if node in wanted:
                    look(node, run.env[node])
                run.drop_after(node)


def _reread(run: Run, layer: Layer) -> None:
    """The weight and the bias that the layer holds; of a bias that is computed the inputs are dropped by now."""
    weight: list[fx.Node] = [*layer.use.weight.all_input_nodes, layer.use.weight]
    for node in weight if layer.bias is None else [*weight, layer.node.args[2]]:
        run.env[node] = run.run_node(node)  # type: ignore[index, arg-type]


def apply(prepared: fx.GraphModule, changes: Changes) -> None:
    """Write weights, biases and scales into the graph, so that convert finds exactly the codes that were chosen."""
    for name, tensor in {**changes.weights, **changes.biases}.items():
        fetch(prepared, name).data = tensor
    for name, scales in changes.scales.items():
        observer: Any = fetch(prepared, name)
        observer.fixed = scales


def cloned(value: Any) -> Any:
    """A tensor of its own: graphs may write into their inputs."""
    return value.detach().clone() if isinstance(value, Tensor) else value
