"""Layers of a network as a latency table sees them: which shapes a layer can take, and how its axes follow the spaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from paredown.allocate import Latency
from paredown.allocate.latency import Floats, LayerLatency, Length
from paredown.couple import Coupling
from paredown.examine import Cost
from paredown.examine.count import bound
from paredown.measure.layer_files import Kind, LayerShape
from paredown.measure.layer_tables import Setting, layer_times
from paredown.program import Program

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Of an axis, where a layer is timed, if only one of its axes can shrink."""
FEWER = (0.125, 0.25, 0.5, 0.75, 1.0)
"""The same where both can."""
LANES = 8
"""Channels that the kernels of the runtimes take at once: one more than a multiple costs as much as the next multiple."""
STEPS, FEWER_STEPS = (0.25, 0.5, 0.75), (0.5, 0.75)
"""Of the channels written, where one more than a multiple of LANES is timed too: few, so that at the usual alignment all shapes
of a layer are still timed in one go."""
FEW, VERY_FEW = 64, 32
"""Up to so many channels every multiple of LANES is timed: kernels of sixteen lanes take as long for 24 as for 32, which no line
between 16 and 32 shows. Below VERY_FEW the shares are timed as well, since there are hardly any multiples."""
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedLayer:
    """One layer that a table can hold: its shape now, and the lengths of its weight's axes."""

    name: str
    node: str
    dense: LayerShape
    writes: Length
    reads: Length
    """Of the weight's second axis: the channels of one group."""

    def steps(self) -> dict[int, int]:
        """Channels written one above a multiple of LANES, at which the layer is timed → that multiple.

        Empty where these are no lengths of the axis: it cannot shrink, or groups have to divide it.
        """
        d = self.dense
        depthwise = not self.reads.per and d.groups == d.out_channels
        if not self.writes.per or (d.groups > 1 and not depthwise):
            return {}
        near = {
            round(self.writes.dense * share / LANES) * LANES for share in (FEWER_STEPS if self.reads.per else STEPS)
        }
        return {n + 1: n for n in sorted(near) if 0 < n < self.writes.dense - 1}

    def grid(self, align: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Lengths of both axes at which the layer is timed, without `steps`."""
        both = bool(self.writes.per) and bool(self.reads.per)
        shares = FEWER if both else SHARES
        step = math.lcm(align, self.dense.groups if self.reads.per else 1)
        return (
            _points(self.writes, step if self.dense.groups > 1 else align, shares),
            _points(self.reads, align, shares),
        )

    def at(self, out_channels: int, in_channels: int) -> LayerShape:
        """The shape with these lengths of the weight's axes; groups go with the channels where those within them stay."""
        d, groups = self.dense, self.dense.groups
        if groups > 1 and not self.reads.per and out_channels != d.out_channels:
            groups = max(1, groups * out_channels // d.out_channels)
            out_channels = groups * (d.out_channels // d.groups)
        return LayerShape(
            kind=d.kind, out_channels=out_channels, in_channels=in_channels * groups, positions=d.positions,
            kernel=d.kernel, stride=d.stride, padding=d.padding, dilation=d.dilation, groups=groups,
        )  # fmt: skip


def timed_layers(program: Program, coupling: Coupling, cost: Cost) -> tuple[TimedLayer, ...]:
    """The convolutions and linear layers of a network, once for each time that they are run; other ops are left out.

    So are convolutions that run on several images of one sample.

    >>> import torch; from torch import nn; from paredown.couple import couple; from paredown.examine import examine
    >>> from paredown.program import capture
    >>> program = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.zeros(2, 3, 8, 8))
    >>> [(layer.name, layer.dense.macs) for layer in timed_layers(program, couple(program), examine(program))]
    [('0', 7776), ('2', 4608)]
    """
    nodes = {n.name: n for n in program.eval_graph.graph.nodes}
    found = []
    for counted in cost.by_node:
        node = nodes.get(counted.node)
        if node is None or len(counted.weights) != 1:
            continue
        shape = _shape(node, counted.kind, counted.macs // cost.samples)
        if shape is not None:
            weight = counted.weights[0]
            found.append(
                TimedLayer(
                    name=counted.name,
                    node=counted.node,
                    dense=shape,
                    writes=_length(coupling, cost, weight, 0),
                    reads=_length(coupling, cost, weight, 1),
                )
            )
    return tuple(found)


def latency_table(
    program: Program,
    coupling: Coupling,
    cost: Cost,
    setting: Setting,
    *,
    align: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Latency:
    """Every layer's milliseconds by channels written and read, *measured* one by one in the runtime or taken from the cache.

    What no table holds (additions, pools, attention) is left to the correction by whole files (`fitted`).
    Raises what `layer_times` raises.
    """
    layers = timed_layers(program, coupling, cost)
    grids = {layer.node: _with_steps(layer, align) for layer in layers}
    shapes = [[s for row in _shapes(layer, grids[layer.node]) for s in row] for layer in layers]
    times = layer_times(shapes, setting, progress=progress)
    return Latency(layers=tuple(_table(layer, grids[layer.node], times) for layer in layers))


def _table(layer: TimedLayer, grid: tuple[tuple[int, ...], tuple[int, ...]], times: Any) -> LayerLatency:
    ms = np.array([[float(times[s].value) for s in row] for row in _shapes(layer, grid)])
    shared: dict[str, Any] = {
        "name": layer.name, "writes": layer.writes, "reads": layer.reads, "in_channels": grid[1],
    }  # fmt: skip
    steps = layer.steps()
    rows = [i for i, n in enumerate(grid[0]) if n not in steps]
    even = LayerLatency(out_channels=tuple(grid[0][i] for i in rows), ms=ms[rows], **shared)
    return SteppedLatency(out_channels=grid[0], ms=ms, even=even, steps=steps, **shared) if steps else even


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SteppedLatency(LayerLatency):
    """A layer's milliseconds with the steps of its kernels, where these were timed; `even` holds the points without them.

    One channel above a multiple may take a slower kernel, so it speaks for the counts up to the next multiple alone: those that
    an alignment allows lie between points that it allows too.
    """

    even: LayerLatency
    steps: Mapping[int, int]
    """Channels just above a multiple → that multiple."""

    def at(self, out_channels: ArrayLike, in_channels: ArrayLike) -> Floats:
        """Milliseconds at any lengths: bilinear, but what was timed above a multiple from there to the next one, if that is slower."""
        written, read = np.broadcast_arrays(np.asarray(out_channels, dtype=np.float64), np.asarray(in_channels))
        found = self.even.at(written, read)
        for above, multiple in self.steps.items():
            inside = (multiple < written) & (written < min(multiple + LANES, self.writes.dense))
            if inside.any():
                timed = LayerLatency.at(self, float(above), read)
                found = np.where(inside, np.where(written == above, timed, np.maximum(found, timed)), found)
        return found


def _shapes(layer: TimedLayer, grid: tuple[tuple[int, ...], tuple[int, ...]]) -> Iterator[list[LayerShape]]:
    for out_channels in grid[0]:
        yield [layer.at(out_channels, in_channels) for in_channels in grid[1]]


def _with_steps(layer: TimedLayer, align: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The grid with the steps, and the multiples that these rise from."""
    out_channels, in_channels = layer.grid(align)
    steps = layer.steps()
    return tuple(sorted({*out_channels, *steps, *steps.values()})), in_channels


def _points(length: Length, step: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Multiples of the step near these shares of the axis, and all of it; all of it alone where it cannot shrink.

    Of a short axis every multiple of the step and of LANES instead, and the least of the former.

    >>> _points(Length(dense=48, per={"a": 1.0}), 8, FEWER), _points(Length(dense=256, per={"a": 1.0}), 8, FEWER)
    ((8, 16, 24, 32, 40, 48), (32, 64, 128, 192, 256))
    """
    if not length.per:
        return (length.dense,)
    aligned = {min(max(step, round(length.dense * share / step) * step), length.dense) for share in shares}
    every = math.lcm(step, LANES)
    if length.dense <= FEW and every < length.dense:
        aligned = {min(aligned)} if length.dense >= VERY_FEW else aligned
        aligned |= set(range(every, length.dense, every))
    return tuple(sorted(aligned | {length.dense}))


def _length(coupling: Coupling, cost: Cost, weight: str, axis: int) -> Length:
    per: dict[str, float] = {}
    for space in coupling.spaces:
        for f in space.footprints:
            if f.parameter == weight and f.axis == axis:
                per[space.name] = per.get(space.name, 0.0) + f.indices.shape[1]
    return Length(dense=cost.parameter_shapes[weight][axis], per=per)


def _shape(node: Any, kind: str, macs: int) -> LayerShape | None:
    """The shape of a node that is a layer and does so many MACs per sample; None of one that is not."""
    given = bound(node)
    weight = given.get("weight")
    if kind not in (*CONVOLUTIONS, "linear") or weight is None:
        return None
    size = [int(s) for s in weight.meta["val"].shape]
    if kind == "linear":
        what: Kind = "linear"
        rows = max(macs // (size[0] * size[1]), 1)  # as counted: windows and tokens may lie in axis 0, beside the batch
        return LayerShape(kind=what, out_channels=size[0], in_channels=size[1], positions=(rows,))
    source = [int(s) for s in given["input"].meta["val"].shape[2:]]
    dims = len(source)
    dilation = _each(given.get("dilation", 1), dims)
    padding, more = _padding(given.get("padding", 0), size[2:], dilation)
    groups = int(given.get("groups") or 1)
    shape = LayerShape(
        kind="conv",
        out_channels=size[0],
        in_channels=size[1] * groups,
        positions=tuple(n + one for n, one in zip(source, more, strict=True)),
        kernel=tuple(size[2:]),
        stride=_each(given.get("stride", 1), dims),
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    return shape if shape.macs == macs else None  # the frames of a clip in axis 0: a file of one layer has one sample


def _padding(given: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(Padding on either side of every axis, positions more of the input).

    "same" of an even kernel pads one more at the end. A file of one layer pads alike on both sides, so there its input is a
    position longer: as many outputs, each of as many products.

    >>> _padding("same", (3, 5), (1, 2)), _padding("same", (4,), (1,)), _padding("valid", (3,), (1,)), _padding([1], (3, 3), (1, 1))
    (((1, 4), (0, 0)), ((1,), (1,)), ((0,), (0,)), ((1, 1), (0, 0)))
    """
    if not isinstance(given, str):
        return _each(given, len(kernel)), (0,) * len(kernel)
    both = [d * (k - 1) if given == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    return tuple(n // 2 for n in both), tuple(n % 2 for n in both)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * dims if len(values) == 1 else values))
