"""Tiles and alignment: the latency of a layer against its number of channels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from paredown.measure.layer_files import LayerShape, feed_for, write_layer
from paredown.target import TARGETS
from talk import draw
from talk.page import Column, Page, Setting, Spread, Table
from talk.timing import PROTOCOL, in_turns, middle, opened

RUNTIMES = ("ONNX Runtime", "OpenVINO")
WIDTHS = (4, 8, 16, 32)


def layer(channels: int) -> LayerShape:
    """A 3×3 convolution from 64 channels on a map of 14×14."""
    return LayerShape(
        kind="conv", out_channels=channels, in_channels=64, positions=(14, 14), kernel=(3, 3), stride=(1, 1),
        padding=(1, 1), dilation=(1, 1),
    )  # fmt: skip


def build(setting: Setting) -> Page:
    """Every number of output channels up to 64 (96), in two runtimes."""
    channels = range(1, setting.pick(64, 96) + 1)
    times = {runtime: timed(runtime, channels, setting) for runtime in RUNTIMES}
    curves = {runtime: [(c, t) for c, t in found.items()] for runtime, found in times.items()}
    per_channel = {
        runtime: [(c, 1000 * t.value / c) for c, t in found.items() if c >= 16] for runtime, found in times.items()
    }
    steps = [(runtime, *(step_at(found, w) for w in WIDTHS)) for runtime, found in times.items()]
    return Page(
        title="Tiles and alignment",
        told=(
            "Blocks suit matrix units that work in tiles: a matrix product is cut into tiles of fixed size, and a tile that is half empty costs as much as "
            "a full one (tile and wave quantization, alignment; after NVIDIA’s guide on matrix multiplication).",
        ),
        parts=(
            draw.lines(curves, x="output channels", y="milliseconds", caption=f"A 3×3 convolution, 64 channels in, 14×14, float32. Bars: quartiles; {PROTOCOL}"),
            draw.lines(per_channel, x="output channels", y="microseconds per channel", caption="The same, for one channel: teeth are tiles that are not full"),
            Table(
                caption="What the first channel beyond a multiple of the width costs, against an average channel: 1 would be a smooth line. Of lower quartiles, median over all multiples",
                columns=(Column(title="Runtime"), *(Column(title=f"Width {w}", mark="measured", form=".1f") for w in WIDTHS)),
                rows=steps,
            ),
            Table(
                caption="The multiple that paredown keeps channels to, unless `align` says otherwise",
                columns=(Column(title="Target"), Column(title="Channels are a multiple of")),
                rows=[(name, target.alignment) for name, target in TARGETS.items()],
            ),
        ),
        differ=(*[_told(runtime, steps) for runtime in times], "The talk speaks of GPUs. Processors have tiles too: vector registers of 8 floats (AVX2) and blocked layouts of 8 or 16 channels."),
        not_tested=("Tiles and waves of a GPU.", "INT8 layers, whose tiles are wider; processors of phones."),
        shortened="up to 64 channels; the full book goes to 96." if setting.quick else "",
    )  # fmt: skip


def timed(runtime: str, channels: range, setting: Setting) -> dict[int, Spread]:
    """Milliseconds by number of channels; neighbours take turns."""
    found = {}
    for start in range(0, len(channels), 32):
        some = channels[start : start + 32]
        files = {str(c): write_layer(layer(c), setting.folder / f"layer-{c}.onnx") for c in some}
        sessions = {name: opened(file, runtime) for name, file in files.items()}
        feeds = {str(c): feed_for(layer(c), "fp32") for c in some}
        times = in_turns(sessions, feeds, runs=setting.pick(40, 100))
        found |= {c: middle(times[str(c)]) for c in some}
    return found


def step_at(times: dict[int, Spread], width: int) -> float | None:
    """Median cost of channel k·width + 1 over the mean cost of a channel; None with fewer than two multiples.

    Of lower quartiles: other work on the machine makes a reading longer, never shorter.
    """
    counts, least = sorted(times), {c: t.value if t.low is None else t.low for c, t in times.items()}
    mean = (least[counts[-1]] - least[counts[0]]) / (len(counts) - 1)
    rises = [least[b] - least[a] for a, b in pairwise(counts) if a % width == 0]
    return float(np.median(rises)) / mean if len(rises) > 1 else None


def _told(runtime: str, steps: list[tuple]) -> str:
    """The width that stands out, from the numbers."""
    rises = dict(zip(WIDTHS, next(row[1:] for row in steps if row[0] == runtime), strict=True))
    most = max(r for r in rises.values() if r is not None)
    width = next(w for w in WIDTHS if rises[w] is not None and rises[w] > 0.7 * most)
    if most < 2:
        return f"{runtime}: no width stands out here; the line is nearly smooth."
    return (
        f"{runtime}: the tile is {width} channels wide. The first channel of a new tile costs as much as {rises[width]:.0f} average ones, "
        "so pruning to a multiple gains what the channels are worth, and pruning to one more than that gains next to nothing."
    )
