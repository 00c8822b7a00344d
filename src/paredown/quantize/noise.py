"""What rounding to few bits does to weights and activations, layer by layer, as signal-to-quantization-noise in dB."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.errors import MissingError, NothingToDo, RejectedError, UsageError
from paredown.program import Program, quiet
from paredown.quantize.batches import Batches, each, finite_rows, length, rows
from paredown.quantize.computed import hold_computed
from paredown.quantize.decompose import fetch, op_name
from paredown.quantize.histogram import StreamingHistogram, finite
from paredown.quantize.nouns import Histogram
from paredown.quantize.numerics import GRANULARITIES, Granularity, Grid, grid_of, on_grid
from paredown.quantize.products import FROM

BITS = (8, 7, 6, 5, 4, 3, 2, 1)
WEIGHTED = "conv1d conv2d conv3d linear conv_transpose1d conv_transpose2d conv_transpose3d".split()
Decibels = Mapping[str, Mapping[int, float | None]]
"""By granularity and bits; None where there is no signal (all 0), infinite where nothing was lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNoise:
    """The weight of one layer, or what enters it, and what is left of it at each number of bits."""

    name: str
    """Of the weight, as in the model's state."""
    kind: str
    """Op that reads it, as conv2d; "parameter" where none of the ops known here does."""
    shape: tuple[int, ...]
    """Of the weight; of an activation that of one sample."""
    sqnr_db: Decibels
    histogram: Histogram
    grids: Mapping[int, Grid]
    """One grid for the whole tensor, by bits: what a picture draws over the histogram."""


def decibels(signal: float, noise: float) -> float | None:
    """10 · log10(signal / noise) of two mean (or summed) squares; None where there is no signal, inf where no noise.

    >>> decibels(100.0, 1.0), decibels(0.0, 0.0), decibels(1.0, 0.0)
    (20.0, None, inf)
    """
    if signal <= 0:
        return None
    return math.inf if noise <= 0 else 10 * math.log10(signal / noise)


def sqnr(values: Tensor, rounded: Tensor) -> float | None:
    """SQNR = 10 · log10(E[x²] / E[(x - x̂)²]) in dB of `values` and what became of them, any equal shapes.

    Each bit less costs 20 · log10(2) = 6.02 dB where the range stays (Bennett 1948). See `decibels` for the ends.

    >>> sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    20.0
    """
    return decibels(*_powers(values, rounded))


def _powers(values: Tensor, rounded: Tensor) -> tuple[float, float]:
    x = values.detach().double()
    return float(x.square().sum()), float((x - rounded.double()).square().sum())


def weight_noise(
    program: Program,
    *,
    bits: Sequence[int] = BITS,
    granularities: Sequence[Granularity] = ("tensor", "channel", "group"),
    group: int = 128,
) -> tuple[LayerNoise, ...]:
    """SQNR of every weight of two or more axes on a symmetric grid that holds all of it (see `grid_of`), at each of `bits`.

    Batch norm is folded into the convolution or linear layer before it, as it will be when the network is quantized. In
    graph order; parameters that no known op reads (embeddings, recurrent layers) come after. Below 8 bits
    `quantize` takes scales of least squared error, which lose less than this.

    Raises UsageError (bits, granularity, group), NothingToDo (no such weight).

    >>> from paredown.program import capture
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> found = weight_noise(capture(net, torch.zeros(2, 3, 8, 8)), bits=(8, 4))
    >>> [f.name for f in found], found[0].sqnr_db["channel"][8] > found[0].sqnr_db["channel"][4] + 20
    (['0.weight', '2.weight'], True)
    """
    _refuse(bits, granularities)
    found = []
    for name, kind, weight, axis in folded_weights(program):
        if not weight.numel():
            continue
        noise: dict[str, dict[int, float | None]] = {g: {} for g in granularities}
        for granularity in granularities:
            for b in bits:
                grid = grid_of(weight, bits=b, granularity=granularity, axis=_axis(granularity, axis), group=group)
                noise[granularity][b] = sqnr(weight, on_grid(weight, grid))
        counted = StreamingHistogram()
        counted.add(*finite(weight))
        grids = {b: grid_of(weight, bits=b) for b in bits}
        shape = tuple(weight.shape)
        one = LayerNoise(name=name, kind=kind, shape=shape, sqnr_db=noise, histogram=counted.frozen(), grids=grids)
        found.append(one)
    if not found:
        msg = "the model must have a weight of at least two axes. Got none."
        raise NothingToDo(msg)
    return tuple(found)


def _axis(granularity: str, axis: int) -> int:
    return -1 if granularity == "token" else axis


def _refuse(bits: Sequence[int], granularities: Sequence[str]) -> None:
    wrong = [b for b in bits if b not in range(1, 9)] + [g for g in granularities if g not in GRANULARITIES]
    if wrong or not bits or not granularities:
        msg = f"noise must be asked for at 1 to 8 bits and granularities of {', '.join(GRANULARITIES)}. Got {wrong or 'none'}."
        raise UsageError(msg)


def _layers(program: Program, graph: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """(node, name of its weight) of every op that multiplies by a parameter; a tied weight has the name that comes first."""
    first: dict[int, str] = {}
    for name, tensor in program.state.items():
        first.setdefault(id(tensor), name)
    for node in graph.graph.nodes:
        weight = node.args[1] if op_name(node) in WEIGHTED and len(node.args) > 1 else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            name = str(weight.meta.get(FROM, weight.target))
            yield node, first.get(id(program.state.get(name)), name)


def folded_weights(program: Program) -> Iterator[tuple[str, str, Tensor, int]]:
    """(name, op, weight with batch norm folded, axis of its channels), each parameter once."""
    graph = program.eval_graph.module(check_guards=False)
    hold_computed(graph)
    done: set[str] = set()
    for node, name in _layers(program, graph):
        if name not in done:
            done.add(name)
            kind, weight = op_name(node), fetch(graph, str(node.args[1].target))  # type: ignore[union-attr]
            yield name, kind, _folded(graph, node, weight), int("transpose" in kind)
    known = {id(program.state[name]) for name in done if name in program.state}
    for name, tensor in program.state.items():
        if id(tensor) not in known and isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
            known.add(id(tensor))
            yield name, "parameter", tensor.detach(), 0


def _folded(graph: fx.GraphModule, node: fx.Node, weight: Tensor) -> Tensor:
    """W · γ / √(σ² + ε) per output channel, where a batch norm is all that reads the layer."""
    weight = weight.detach().float()
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or op_name(reader) != "batch_norm" or "transpose" in op_name(node):
        return weight
    gamma, variance = (reader.args[i] for i in (1, 4))
    if not isinstance(variance, fx.Node) or reader.args[0] is not node:
        return weight
    scale = torch.rsqrt(fetch(graph, str(variance.target)).detach().float() + float(reader.args[7]))  # type: ignore[arg-type]
    if isinstance(gamma, fx.Node):
        scale = scale * fetch(graph, str(gamma.target)).detach().float()
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


class Listener(nn.Module):
    """Hands values on; first it observes them, then, with grids, it sums the squares of what they lose."""

    def __init__(self, observer: Any, *, tokens: bool) -> None:
        super().__init__()
        self.observer = observer
        self.tokens = tokens
        self.seen = StreamingHistogram()
        self.shape: tuple[int, ...] = ()
        self.grids: dict[int, Grid] = {}
        self.powers: dict[tuple[str, int], tuple[float, float]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Look at `x` and hand it on."""
        self.shape = tuple(x.shape[1:])
        if not self.grids:
            self.observer(x)
            self.seen.add(*finite(x))
        for bits, grid in self.grids.items():
            self._add("tensor", bits, x, grid)
            if self.tokens and x.numel():
                self._add("token", bits, x, grid_of(x, bits=bits, mapping="affine", granularity="token"))
        return x

    def _add(self, granularity: str, bits: int, x: Tensor, grid: Grid) -> None:
        before = self.powers.get((granularity, bits), (0.0, 0.0))
        signal, noise = _powers(x, on_grid(x, grid))
        self.powers[granularity, bits] = before[0] + signal, before[1] + noise

    def freeze(self, bits: Iterable[int]) -> None:
        """From now on measure with the range that was observed, at each of `bits`."""
        for b in bits:
            self.observer.quant_min, self.observer.quant_max = 0, 2**b - 1
            scale, zero = self.observer.calculate_qparams()
            self.grids[b] = Grid(
                scales=scale.reshape(1, 1),
                zero_points=zero.reshape(1, 1),
                quant_min=0,
                quant_max=2**b - 1,
                bits=b,
                mapping="affine",
                granularity="tensor",
                axis=0,
                group=1,
            )


def activation_noise(
    program: Program, batches: Batches, *, bits: Sequence[int] = BITS, observer: str = "mse"
) -> tuple[LayerNoise, ...]:
    """SQNR of what enters every convolution and linear layer, on the range that the observer finds, at each of `bits`.

    Two passes over the batches (kept in memory), in float: the first observes, the second rounds every value and sums
    squares. "tensor": one affine grid per tensor from the observer, as `quantize` has it. "token" (linear layers): a grid
    per row of features from that row's own range, as dynamic quantization has it. Samples with NaN or infinity are
    left out. A layer's name is that of its weight.

    Raises UsageError (bits, observer), RejectedError (no samples, or such that do not fit), NothingToDo (no such layer),
    MissingError (torchao).

    >>> from paredown.program import capture
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> found = activation_noise(capture(net, torch.zeros(2, 3, 8, 8)), [torch.rand(16, 3, 8, 8)], bits=(8, 4))
    >>> [f.name for f in found], found[1].histogram.low >= 0, found[1].sqnr_db["tensor"][8] > 40
    (['0.weight', '2.weight'], True, True)
    """
    _refuse(bits, ("tensor",))
    try:
        with quiet("torchao"):
            from paredown.quantize.observe import observer_named
    except ImportError as error:
        msg = "observers must have torchao. It is not installed. Run: pip install 'paredown[quant]'."
        raise MissingError(msg) from error
    make = observer_named(observer)
    graph = program.eval_graph.module(check_guards=False)
    hold_computed(graph)
    listeners: dict[fx.Node, Listener] = {}
    layers = []
    for node, name in list(_layers(program, graph)):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source not in listeners:
            spec = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "qscheme": torch.per_tensor_affine}
            listeners[source] = Listener(make(**spec), tokens=False)
        listeners[source].tokens |= op_name(node) == "linear"
        layers.append((name, op_name(node), listeners[source]))
    if not layers:
        msg = "the model must have a convolution or a linear layer. Got none."
        raise NothingToDo(msg)
    for number, (source, listener) in enumerate(listeners.items()):
        _insert(graph, source, f"paredown_listener_{number}", listener)
    calls = [call for call in map(_finite_only, each(batches)) if length(call)]
    _run(graph, calls)
    for listener in listeners.values():
        listener.freeze(bits)
    _run(graph, calls)
    return tuple(_heard(name, kind, listener) for name, kind, listener in layers)


def _heard(name: str, kind: str, listener: Listener) -> LayerNoise:
    noise: dict[str, dict[int, float | None]] = {}
    for (granularity, bits), (signal, lost) in listener.powers.items():
        noise.setdefault(granularity, {})[bits] = decibels(signal, lost)
    return LayerNoise(
        name=name,
        kind=kind,
        shape=listener.shape,
        sqnr_db=noise,
        histogram=listener.seen.frozen(),
        grids=dict(listener.grids),
    )


def _insert(graph: fx.GraphModule, source: fx.Node, name: str, listener: Listener) -> None:
    """Every reader of `source` reads the listener instead."""
    graph.add_submodule(name, listener)
    with graph.graph.inserting_after(source):
        heard = graph.graph.call_module(name, (source,))
    source.replace_all_uses_with(heard, delete_user_cb=lambda user: user is not heard)
    graph.recompile()


def _finite_only(call: Any) -> Any:
    good = finite_rows(call)
    return call if bool(good.all()) else rows(call, good)


def _run(graph: fx.GraphModule, calls: Sequence[Any]) -> None:
    if not calls:
        msg = "there must be at least one sample. Got none that is finite. Pass inputs like those the network will see."
        raise RejectedError(msg)
    for args, kwargs in calls:
        try:
            with torch.no_grad():
                graph(*args, **kwargs)
        except Exception as error:
            msg = f"samples must fit the network's inputs. Got {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}."
            raise RejectedError(msg) from error
