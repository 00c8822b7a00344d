"""Our annotation for PT2E: reads the target's table, writes on every node how its inputs and output are quantized."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from paredown.quantize.decompose import op_name, pad_value
from paredown.quantize.fixed import fix_results, widen_gates
from paredown.quantize.observe import WEIGHT_OBSERVERS, observer_named
from paredown.quantize.products import FROM, OF
from paredown.quantize.schemes import Levels, Scheme, levels_at, weight_range
from paredown.score.patterns import as_patterns, matches
from paredown.target import Target

KEY = "quantization_annotation"


class TableQuantizer(Quantizer):  # type: ignore[misc]
    """A PT2E Quantizer that knows nothing but a table.

    Three passes over the graph: ops that compute (weighted, binary, lookup, matmul, fused activations); then, forward and
    backward, ops that only move values, where their neighbour is quantized already: a view between two float
    ops stays float. All activations of one value share one observer, so both inputs of an addition are quantized
    and pool, flatten, pad and concatenation keep the scale of their inputs.
    """

    def __init__(
        self,
        target: Target,
        observer: str,
        scheme: Scheme,
        weights: str = "channel",
        float_layers: Sequence[str] = (),
        bits: Mapping[str, int] | None = None,
    ) -> None:
        self.target, self.observer, self.weights = target, observer, weights
        self.only_weights = scheme.activations == "float"
        self.activation = self._activation(8 if self.only_weights else scheme.activation_bits)
        self.scheme_bits, self.levels = scheme.weight_bits, scheme.levels
        self.end_bits = scheme.end_bits
        self.bits = dict(bits or {})
        self.coarse = scheme.activation_bits < 8
        self.ends: frozenset[fx.Node] = frozenset()
        self.wanted: dict[fx.Node, QuantizationSpec] = {}
        """What an op that only moves values was given: an end may want more bits than the rest."""
        self.float_layers = as_patterns(float_layers)

    def _activation(self, bits: int) -> QuantizationSpec:
        unsigned, levels = self.target.activation_dtype == "uint8", 2**bits
        return QuantizationSpec(
            dtype=torch.uint8 if unsigned else torch.int8,
            quant_min=0 if unsigned else -levels // 2,
            quant_max=levels - 1 if unsigned else levels // 2 - 1,
            qscheme=torch.per_tensor_affine,
            observer_or_fake_quant_ctr=observer_named(self.observer),
        )

    def _weight(self, bits: int, levels: Levels, pair_sum: int | None = None) -> QuantizationSpec:
        low, high = weight_range(bits, levels)
        return QuantizationSpec(
            dtype=torch.int8,
            quant_min=low,
            quant_max=high,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            observer_or_fake_quant_ctr=WEIGHT_OBSERVERS[self.weights].with_args(levels=levels, pair_sum=pair_sum),
        )

    def _weight_of(self, node: fx.Node) -> QuantizationSpec:
        """Of a layer: the bits that it was given by name, those of an end, those of the scheme."""
        own = next((b for pattern, b in self.bits.items() if matches(layer_names(node), [pattern])), None)
        bits, levels = self.scheme_bits, self.levels
        if own is not None:
            bits, levels = own, levels_at(own)
        elif node in self.ends and self.end_bits:
            bits, levels = self.end_bits, "integer"
        return self._weight(bits, levels, None if self.only_weights or is_depthwise(node) else self.target.pair_sum)

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Write the annotations."""
        nodes = [n for n in model.graph.nodes if n.op == "call_function"]
        weighted = [n for n in nodes if self.target.ops.get(op_name(n)) == "weighted" and is_constant(n.args[1])]
        first, last = ends_of(weighted)
        self.ends = first | last
        if self.only_weights:
            for node in nodes:
                self._code_weight(node)
            return model
        for node in nodes:
            self._compute(node)
        self._drop_islands(nodes)
        for node in reversed(nodes):
            if self._idle_fusion(node):
                del node.meta[KEY]
        for node in nodes:
            if self._moves(node) and any(_is_quantized(x) for x in _inputs(node)):
                self._share(node)
        for node in reversed(nodes):
            if self._moves(node) and any(_wants(user, node) for user in _readers(node)):
                self._share(node, self._wish(node))
        for node in reversed(nodes):
            if self._can_return_float(node):
                _drop_unread(node, keeps_inputs=self.target.ops.get(op_name(node)) in ("weighted", "matmul"))
        if self.observer == "entropy":
            widen_gates(nodes)
        fix_results(nodes, self.target.fixed, self.activation)
        return model

    def _code_weight(self, node: fx.Node) -> None:
        """Codes for a weight alone: what multiplies with it stays as it is."""
        weighted = self.target.ops.get(op_name(node)) == "weighted" and is_constant(node.args[1])
        if weighted and is_float(node.args[0]) and not self._stays_float(node):
            _put(node, {node.args[1]: self._weight_of(node)}, None)

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to check: `quantize` proves the prepared graph by running it."""

    def _compute(self, node: fx.Node) -> None:
        name = op_name(node)
        kind = self.target.ops.get(name, "")
        args = list(node.args[:2])
        if name in self.target.fusions and isinstance(args[0], fx.Node) and is_float(args[0]):
            _put(node, {}, self.activation)
        elif any(isinstance(v, fx.Node) for v in node.kwargs.values()) or "alpha" in node.kwargs:
            return  # PT2E cannot annotate tensors that are passed by keyword; x + 2·y is two ops in the runtime
        elif self._stays_float(node) or (kind == "binary" and _leads_to_softmax(node)):
            return
        elif kind == "weighted" and is_float(args[0]) and is_constant(args[1]):
            at_end = node in self.ends and self.end_bits is not None
            activation = self._activation(self.end_bits) if at_end and self.end_bits else self.activation
            _put(node, {args[0]: activation, args[1]: self._weight_of(node)}, self._output(node))
        elif (
            kind in ("binary", "matmul")
            and len(args) == 2
            and all(is_float(a) for a in args)
            and not _scales_by_weight(name, args)
        ):
            _put(node, dict.fromkeys(args, self.activation), self._output(node))
        elif kind == "lookup" and is_float(args[0]):
            _put(node, {args[0]: self.activation}, self._output(node))

    def _drop_islands(self, nodes: Sequence[fx.Node]) -> None:
        """Sums, products and curves that no layer on codes is joined with, through moves and through what they read: codes there would cost and gain nothing."""
        above: dict[fx.Node, fx.Node] = {}

        def top(node: fx.Node) -> fx.Node:
            while node in above:
                node = above[node]
            return node

        for node in nodes:
            if KEY in node.meta or node.target is operator.getitem or self.target.ops.get(op_name(node)) == "shared":
                for x in node.all_input_nodes:
                    if x.op != "get_attr" and top(x) is not top(node):
                        above[top(x)] = top(node)
        layers = {top(n) for n in nodes if KEY in n.meta and self.target.ops.get(op_name(n)) in ("weighted", "matmul")}
        for node in nodes:
            if KEY in node.meta and top(node) not in layers:
                del node.meta[KEY]

    def _idle_fusion(self, node: fx.Node) -> bool:
        """An activation function between two ops in float: codes there would cost and gain nothing."""
        if KEY not in node.meta or op_name(node) not in self.target.fusions:
            return False
        before = node.args[0]
        if isinstance(before, fx.Node) and KEY in before.meta:
            return False
        waiting, seen = list(node.users), set()
        while waiting:
            user = waiting.pop()
            if KEY in user.meta:
                return False
            if user not in seen and (self._moves(user) or user.target is operator.getitem):
                seen.add(user)
                waiting += list(user.users)
        return True

    def _stays_float(self, node: fx.Node) -> bool:
        return bool(self.float_layers) and matches(layer_names(node), self.float_layers)

    def _output(self, node: fx.Node) -> Any:
        """None where the next op is fused."""
        users = list(node.users)
        if len(users) == 1 and op_name(users[0]) in self.target.fusions:
            return None
        return self.activation

    def _wish(self, node: fx.Node) -> QuantizationSpec:
        """The finest spec that a reader of a moving op asks for."""
        asked = [s for user in _readers(node) if (s := self.wanted.get(user, _spec(user, node))) is not None]
        return max(asked, key=lambda s: s.quant_max - s.quant_min, default=self.activation)

    def _can_return_float(self, node: fx.Node) -> bool:
        able = self.target.float_results
        while op_name(node) in _VIEWS and _inputs(node):  # what moves memory moves a quarter of it as codes
            node = _inputs(node)[0]
        return "*" in able or op_name(node) in able

    def _moves(self, node: fx.Node) -> bool:
        if KEY in node.meta or self.target.ops.get(op_name(node)) != "shared":
            return False
        if self.coarse and op_name(node) in _AVERAGES:
            return False  # a mean of coarse codes is finer than they are
        if op_name(node) in ("pad", "constant_pad_nd") and pad_value(node) != 0:
            return False
        inputs = _inputs(node)
        return bool(inputs) and all(is_float(x) for x in inputs)

    def _share(self, node: fx.Node, spec: QuantizationSpec | None = None) -> None:
        inputs, spec = _inputs(node), spec or self.activation
        self.wanted[node] = spec
        first = SharedQuantizationSpec((inputs[0], node))
        parts = (
            [u for u in node.users if u.target is operator.getitem]
            if not isinstance(node.meta.get("val"), Tensor)
            else []
        )
        specs: dict[Any, Any] = {x: first for x in inputs if x is not inputs[0]}  # a concatenation has one scale
        _put(node, {inputs[0]: spec, **specs}, None if parts else first)
        for part in parts:
            _put(part, {}, first)


_SCORES = (
    "add add_ sub sub_ mul mul_ div div_ masked_fill masked_fill_ where clamp maximum dropout to _to_copy type_as alias detach getitem "
    "view reshape _unsafe_view expand unsqueeze squeeze transpose permute contiguous clone"
).split()
"""What may lie between a sum of scores and its softmax."""


def _leads_to_softmax(node: fx.Node) -> bool:
    """Whether all that comes of a sum is a softmax: scores of attention with a mask or a table of positions on them.

    Minus infinity has no code, and beside -1e9 all other scores share one.
    """
    waiting, seen, found = list(node.users), set[fx.Node](), False
    while waiting:
        user = waiting.pop()
        if user in seen:
            continue
        seen.add(user)
        name = op_name(user)
        if name in ("softmax", "_softmax"):
            found = True
        elif name.rpartition(".")[2] in _SCORES:
            waiting += list(user.users)
        else:
            return False
    return found


_VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
_AVERAGES = ("avg_pool2d", "adaptive_avg_pool2d")


def ends_of(weighted: Sequence[fx.Node]) -> tuple[frozenset[fx.Node], frozenset[fx.Node]]:
    """(layers that no other layer comes before, layers that none comes behind)."""
    layers = set(weighted)

    def reaches(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
        seen, waiting = {start}, list(step(start))
        while waiting:
            node = waiting.pop()
            if node in layers:
                return True
            if node not in seen:
                seen.add(node)
                waiting += step(node)
        return False

    first = frozenset(n for n in weighted if not reaches(n, lambda m: m.all_input_nodes))
    return first, frozenset(n for n in weighted if not reaches(n, lambda m: list(m.users)))


def _spec(user: fx.Node, node: fx.Node) -> QuantizationSpec | None:
    """What an annotated op asks of one input, where it is a spec of its own."""
    asked = user.meta[KEY].input_qspec_map.get(node) if KEY in user.meta else None
    return asked if isinstance(asked, QuantizationSpec) else None


def layer_names(node: fx.Node) -> list[str]:
    """What a pattern may call an op: the parameters that it reads, and its module."""
    names = [str(a.meta.get(OF, a.meta.get(FROM, a.target))) for a in node.all_input_nodes if a.op == "get_attr"]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]).removeprefix("L['self'].").removeprefix("L['self']") if stack else ""
    return [*names, *((path,) if path else ())]


def is_float(value: Any) -> bool:
    """Whether a node's value is a float32 tensor."""
    fake = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(fake, Tensor) and fake.dtype == torch.float32


def is_depthwise(node: fx.Node) -> bool:
    """Whether every channel is filtered alone: kernels for that have no neighbours to sum with."""
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    weight: Any = node.args[1]
    return "conv" in op_name(node) and bool(groups != 1) and int(weight.meta["val"].shape[1]) == 1


def is_constant(value: Any) -> bool:
    """Whether a node is a parameter or buffer."""
    return isinstance(value, fx.Node) and value.op == "get_attr" and is_float(value)


def _put(node: fx.Node, inputs: dict[Any, Any], output: Any) -> None:
    node.meta[KEY] = QuantizationAnnotation(input_qspec_map=inputs, output_qspec=output, _annotated=True)


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The values that an op moves: a list of tensors, or its first argument. Sizes and indices are not among them."""
    first = node.args[0] if node.args else None
    return (
        [x for x in first if isinstance(x, fx.Node)]
        if isinstance(first, list | tuple)
        else [first]
        if isinstance(first, fx.Node)
        else []
    )


def _readers(node: fx.Node) -> list[fx.Node]:
    return [reader for user in node.users for reader in (user.users if user.target is operator.getitem else [user])]


def _is_quantized(node: fx.Node) -> bool:
    return KEY in node.meta and node.meta[KEY].output_qspec is not None


def _drop_unread(node: fx.Node, *, keeps_inputs: bool) -> None:
    """Leave a result in float that nothing reads as codes; an op that only joins or moves floats has no codes at all then."""
    if KEY not in node.meta or any(_wants(user, node) for user in _readers(node)):
        return
    node.meta[KEY].output_qspec = None
    fused = any(KEY in user.meta and user.target is not operator.getitem for user in node.users)
    if not keeps_inputs and not fused:
        del node.meta[KEY]


def _wants(user: fx.Node, node: fx.Node) -> bool:
    if KEY not in user.meta:
        return False
    wanted = user.meta[KEY].input_qspec_map
    return node in wanted or any(part in wanted for part in node.users if part.target is operator.getitem)


def _scales_by_weight(name: str, args: list[Any]) -> bool:
    """Layer scale: one weight per channel over orders of magnitude does not survive one scale for all."""
    return name.startswith("mul") and any(is_constant(a) for a in args)
