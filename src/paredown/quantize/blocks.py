"""Block reconstruction: the roundings of all layers of a block chosen together, by what they do to the block's output."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.program import Inputs
from paredown.quantize.decompose import fetch
from paredown.quantize.lanes import Changes, Lane, Lanes, Layer, layers_of, walk
from paredown.quantize.numerics import ODD
from paredown.quantize.pairs import within
from paredown.quantize.rounding import Rounded, round_layer

ITERATIONS = 500
"""Of each block."""
BATCH = 32
"""Samples of an iteration."""
PART = 64
"""Samples that a block is run on at a time where no gradient is wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What lies between two values that alone carry on all that is known: a residual block, or one layer."""

    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    """All but `start`, `end` included, in graph order."""
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """One block: mean squared error of its output on all samples, over the output's mean square."""

    layers: tuple[str, ...]
    error_before: float
    """With the codes that each layer chose by itself."""
    error: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Choice:
    """A weight whose codes each are one of two neighbours: w = steps · (low + h) + offset."""

    layer: Layer
    low: Tensor
    """float32 [out, K]: the lower of the two, in numbers of steps."""
    raw: nn.Parameter
    """V: h = clip(1.2 sigmoid(V) - 0.1, 0, 1)."""
    steps: Tensor
    offset: Tensor
    """float32 [out, 1] both."""
    pair_sum: int | None
    bias: nn.Parameter | None
    kept: Tensor | None
    """float32 [out, K], 0 where a weight was pruned."""

    def up(self) -> Tensor:
        """h, from 0 to 1."""
        return (1.2 * torch.sigmoid(self.raw) - 0.1).clamp(0.0, 1.0)

    def weight(self, up: Tensor, *, final: bool = False) -> Tensor:
        """In the layer's own shape. `final` codes are whole, and keep to the pair rule."""
        codes = self.low + up if self.kept is None else (self.low + up) * self.kept
        if final and self.pair_sum is not None:
            codes = within(codes, self.layer.use.shape[1:], self.pair_sum)
        return (self.steps * codes + self.offset).reshape(self.layer.use.shape)


def blocks_of(prepared: fx.GraphModule) -> tuple[Block, ...]:
    """The blocks that have weights, in graph order: cuts are nodes behind which one value alone is alive.

    Of cuts with no layer between them the last counts: activation function and rounding belong to the block before. Values
    computed from parameters alone do not count. A cut has the samples along its first axis, since blocks are run on some of them.
    """
    nodes = [n for n in prepared.graph.nodes if n.op != "output"]
    place = {n: i for i, n in enumerate(nodes)}
    active: set[fx.Node] = set()
    for n in nodes:
        if isinstance(n.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            continue  # a length is no value that a block hands on
        if n.op == "placeholder" or any(a in active for a in n.all_input_nodes):
            active.add(n)
    ends = {n: max((place.get(u, len(nodes)) for u in n.users), default=-1) for n in active}
    layers = {x.node: x for x in layers_of(prepared)}
    batch = _batch(nodes)
    last = max((i for i, n in enumerate(nodes) if n.op == "placeholder"), default=-1)
    cuts = [
        n
        for i, n in enumerate(nodes)
        if n in active
        and i >= last
        and _first_length(n) in (None, batch)
        and isinstance(n.meta.get("val", torch.empty(0)), Tensor)  # pieces of a split are several
        and not any(m is not n and place[m] <= i < ends[m] for m in active)
    ]
    held_by = {n: any(m in layers for m in nodes[place[a] + 1 : place[n] + 1]) for a, n in itertools.pairwise(cuts)}
    cuts = [n for i, n in enumerate(cuts) if i == len(cuts) - 1 or held_by[cuts[i + 1]]]
    found = []
    for start, end in itertools.pairwise(cuts):
        inside = tuple(nodes[place[start] + 1 : place[end] + 1])
        held = tuple(layers[n] for n in inside if n in layers)
        if held:
            found.append(Block(start=start, end=end, nodes=inside, layers=held))
    return tuple(found)


def _length(size: Any) -> Any:
    """A size of a traced shape: an integer or the expression of one."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _first_length(node: fx.Node) -> Any:
    """Along the first axis of a value; None where nothing is known. An observer has that of what it looks at."""
    while node.op == "call_module" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    value = node.meta.get("val")
    return _length(value.shape[0]) if isinstance(value, Tensor) and value.dim() else None


def _batch(nodes: Sequence[fx.Node]) -> Any:
    """How many samples there are, as the inputs of the network say it."""
    return next((n for m in nodes if m.op == "placeholder" and (n := _first_length(m)) is not None), None)


def reconstruct(
    prepared: fx.GraphModule, calls: Sequence[Inputs], *, iterations: int | None = None, lr: float = 0.02, seed: int = 0
) -> list[Rebuilt]:
    """Round block after block: each layer by GPTQ first, then all codes and biases of a block together.

        min over V, b of ‖y - ŷ(V, b)‖² / ‖y - ŷ₀‖² + λ mean(1 - |2 h(V) - 1|^β)

    y is the block's output in float, ŷ that of the quantized block on the inputs that the blocks before it give by then, its
    activations rounded; ŷ₀ that with GPTQ's codes. Every code may stay or go to its neighbour on the side of the weight
    before rounding; h starts at 0.1 or 0.9, where GPTQ is. Adam on 32 samples an iteration, β from 20 to 2 after a fifth of
    them, before which λ is 0; in the end h ≥ ½ decides. A block whose error on all samples did not fall keeps GPTQ's codes, and so
    does one of a single layer. Cost: about `iterations` (`ITERATIONS`) × 32 / N epochs of training of the network, N samples.

    BRECQ (Li et al. 2021, arXiv 2102.05426), with the squared error in place of its Fisher-weighted one. Changes the
    prepared graph; returns what was found, block by block.
    """
    iterations = ITERATIONS if iterations is None else iterations
    changes, found, seen = Changes(), list[Rebuilt](), dict[str, Rounded]()
    blocks = blocks_of(prepared)
    starts, ends = {b.start: b for b in blocks}, {b.end: b for b in blocks}
    inputs: dict[Block, list[Tensor]] = {}

    def visit(layer: Layer, lanes: Sequence[Lanes]) -> None:
        seen[layer.weight] = round_layer(prepared, layer, lanes, changes)

    def after(node: fx.Node, lanes: Sequence[Lanes]) -> None:
        if node in ends and len(ends[node].layers) > 1:
            block = ends[node]
            wanted = torch.cat([lane.whole.env[node] for lane in lanes])
            work = _Work(prepared=prepared, block=block, x=torch.cat(inputs.pop(block)), wanted=wanted, changes=changes)
            found.append(_rebuilt(work, [seen[x.weight] for x in block.layers], iterations, lr, seed))
            for lane, part in zip(
                lanes, torch.split(work.outputs({}), [len(x.whole.env[node]) for x in lanes]), strict=True
            ):
                lane.coded.env[node] = work.rounded_end(part)
        if node in starts:
            inputs[starts[node]] = [lane.coded.env[node] for lane in lanes]

    walk(prepared, calls, changes, visit, after=after)
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Work:
    """One block and the samples that it is rebuilt on."""

    prepared: fx.GraphModule
    block: Block
    x: Tensor
    """What the block reads, as quantized; samples along the first axis."""
    wanted: Tensor
    """What it gives in float."""
    changes: Changes

    @property
    def last(self) -> fx.Node:
        """What the error is taken at: the end, before it is rounded."""
        end = self.block.end
        return end.all_input_nodes[0] if hasattr(_held_at(self.prepared, end), "calculate_qparams") else end

    def run(self, x: Tensor, held: Mapping[fx.Node, Tensor]) -> Tensor:
        """The block on some samples; `held` are weights and biases in place of the graph's."""
        lane = Lane(self.prepared, [], self.changes, smooth=True)
        lane.env = {self.block.start: x, **self.lengths(len(x)), **held}
        for node in self.block.nodes:
            _run(lane, node)
            if node is self.last:
                break
        found: Tensor = lane.env[self.last]
        return found

    def lengths(self, samples: int) -> dict[fx.Node, Any]:
        """What the graph asks of the network's inputs, for so many samples: the block runs without these."""
        batch = _batch(list(self.prepared.graph.nodes))
        asked = [n for n in self.prepared.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)]
        return {n: int(_length(n.meta["val"]).subs(batch, samples)) for n in asked}

    def outputs(self, held: Mapping[fx.Node, Tensor]) -> Tensor:
        """On all samples, without gradients."""
        with torch.no_grad():
            return torch.cat([self.run(x, held) for x in torch.split(self.x, PART)])

    def error(self, held: Mapping[fx.Node, Tensor]) -> float:
        """Sum of squares, float64."""
        return float((self.outputs(held).double() - self.wanted.double()).square().sum())

    def rounded_end(self, values: Tensor) -> Tensor:
        """The end's codes, where it has any."""
        if self.last is self.block.end:
            return values
        lane = Lane(self.prepared, [], self.changes, smooth=True)
        lane.env = {self.last: values}
        result: Tensor = lane.run_node(self.block.end)
        return result


def _held_at(prepared: fx.GraphModule, node: fx.Node) -> Any:
    return fetch(prepared, str(node.target)) if node.op == "call_module" else None


def _run(lane: Lane, node: fx.Node) -> None:
    """A node, and before it the parameters that it needs, which may stand in front of the block."""
    if node in lane.env:
        return
    for arg in node.all_input_nodes:
        _run(lane, arg)
    lane.env[node] = lane.run_node(node)


def _rebuilt(work: _Work, rounded: Sequence[Rounded], iterations: int, lr: float, seed: int) -> Rebuilt:
    choices = [_choice(work, x, r) for x, r in zip(work.block.layers, rounded, strict=True)]
    before, scale = work.error({}), max(float(work.wanted.double().square().sum()), 1e-30)
    _learn(work, choices, before / max(len(work.x), 1), iterations, lr, seed)
    final = _held(work, choices, [(c.raw.detach() >= 0).float() for c in choices], final=True)
    error = work.error(final)
    if error < before:
        for c in choices:
            work.changes.weights[c.layer.weight] = c.weight((c.raw.detach() >= 0).float(), final=True).detach()
            if c.bias is not None and c.layer.bias is not None:
                work.changes.biases[c.layer.bias] = c.bias.detach().clone()
    names = tuple(x.weight for x in work.block.layers)
    return Rebuilt(layers=names, error_before=before / scale, error=min(error, before) / scale)


def _choice(work: _Work, layer: Layer, rounded: Rounded) -> _Choice:
    observer: Any = fetch(work.prepared, layer.observer)
    weight = fetch(work.prepared, layer.weight).detach().flatten(1)
    odd = observer.levels in ODD
    low, high = observer.quant_min, observer.quant_max
    scales = rounded.scales.float()[:, None]
    codes, wanted = rounded.codes.float(), (rounded.wanted / rounded.scales[:, None]).float()
    if odd:  # odd codes 2u + 1
        codes, wanted, low, high = (codes - 1) / 2, (wanted - 1) / 2, (low - 1) // 2, (high - 1) // 2
    base = torch.where(wanted < codes, codes - 1, codes).clamp(low, max(low, high - 1))
    start = 0.1 + 0.8 * (codes - base)
    bias = work.changes.biases.get(layer.bias or "")
    return _Choice(
        layer=layer,
        low=base,
        raw=nn.Parameter(-torch.log(1.2 / (start + 0.1) - 1)),
        steps=2 * scales if odd else scales,
        offset=scales if odd else torch.zeros_like(scales),
        pair_sum=None if odd else observer.limit,
        bias=None if bias is None else nn.Parameter(bias.clone()),
        kept=None if odd or bool(weight.all()) else (weight != 0).float(),
    )


def _held(
    work: _Work, choices: Sequence[_Choice], ups: Sequence[Tensor], *, final: bool = False
) -> dict[fx.Node, Tensor]:
    """What `run` takes in place of the graph's weights and biases."""
    held: dict[fx.Node, Tensor] = {}
    for c, up in zip(choices, ups, strict=True):
        held[c.layer.use.weight] = c.weight(up, final=final)
        if c.bias is not None:
            held[c.layer.node.args[2]] = c.bias  # type: ignore[index]
    return held


def _learn(work: _Work, choices: Sequence[_Choice], unit: float, iterations: int, lr: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    biases = [c.bias for c in choices if c.bias is not None]
    groups: list[dict[str, Any]] = [{"params": [c.raw for c in choices]}, {"params": biases, "lr": lr / 100}]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=lr)
    with torch.enable_grad():
        for number in range(iterations):
            drawn = torch.randint(len(work.x), (min(BATCH, len(work.x)),), generator=generator)
            ups = [c.up() for c in choices]
            out = work.run(work.x[drawn], _held(work, choices, ups))
            loss = (out - work.wanted[drawn]).square().sum() / len(drawn) / max(unit, 1e-30)
            share = (number / iterations - 0.2) / 0.8
            if share > 0:
                beta = 2 + 18 * 0.5 * (1 + math.cos(math.pi * share))
                open_still = [(1 - (2 * up - 1).abs() ** beta).sum() for up in ups]
                loss = loss + torch.stack(open_still).sum() / sum(up.numel() for up in ups)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
