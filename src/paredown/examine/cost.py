"""Cost: what a model costs, per node and in total. Exact integers; layers sum to totals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.records import Badge

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCost:
    """Cost of one node of the graph, or of one layer (all nodes of one name). Figures are for one sample."""

    name: str
    """Layer as the user knows it: the owner of its parameters, else the module that made it, else the node."""
    node: str
    """Node of the exported graph; attention has two, "name:scores" and "name:values"; "" where no node reads it."""
    kind: str
    """Op such as "conv2d"; for a layer those of its ops that count, as "linear+scaled_dot_product_attention"."""
    output_shape: tuple[int, ...] = ()
    """Batch first, at the smallest batch."""
    parameters: int = 0
    """Parameters that this node is the first to use; shared ones count once in the whole model."""
    macs: int = 0
    """Multiply-accumulates (FLOPs = 2 × MACs)."""
    parameter_bytes: int = 0
    activation_bytes: int = 0
    """Bytes of the tensors this node allocates; views and in-place results are 0."""
    weights: tuple[str, ...] = ()
    """Parameters that the MACs are proportional to, by their first name where tied: MACs = rows × Σ numel.
    Empty for products of activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncounted:
    """An op whose MACs are not known: it counts 0, and this says so."""

    op: str
    count: int
    where: tuple[str, ...]
    """Nodes and source lines, as "fft_rfft (model.py:12)"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrink:
    """How much one layer has to shrink for a target size."""

    name: str
    parameter_bytes: int
    to_bytes: int

    @property
    def remains(self) -> float:
        """Fraction of the layer's bytes that remains."""
        return self.to_bytes / self.parameter_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ShrinkPlan:
    """Which layers must shrink, and by how much, to reach a size. Estimated: removing channels shrinks neighbours together."""

    target_bytes: int
    cap_bytes: int
    """Every listed layer is cut down to this many bytes (the last ones by rounding to whole parameters)."""
    layers: tuple[Shrink, ...]
    reachable: bool = True
    badge: Badge = "estimated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """MACs, parameters, bytes and activation memory of a program. Prints as a table; in a notebook with bars.

    All figures are for `samples` of them: one where the batch is free, the fewest where a network folds samples into groups, else
    the captured example.
    `activation_bytes` is what all nodes allocate together; `peak_activation_bytes` is the largest sum alive at once:
    a tensor lives from the node that makes it to its last reader, inputs from the start, outputs to the end; views and
    in-place results share the storage of their source. Parameters and workspaces of kernels are not in it.
    """

    macs: int
    parameters: int
    parameter_bytes: int
    activation_bytes: int
    peak_activation_bytes: int
    by_node: tuple[NodeCost, ...]
    uncounted: tuple[Uncounted, ...] = ()
    model: str = ""
    samples: int = 1
    state_dict_bytes: int = 0
    """Σ numel × itemsize of the state_dict's distinct tensors (parameters and persistent buffers)."""
    file_bytes: int | None = None
    file_badge: Badge = "not tested"
    """ "measured": stat of the given file; "estimated": the state_dict as safetensors, computed and not written."""
    alarms: tuple[str, ...] = ()
    shrink: ShrinkPlan | None = None
    dtypes: Mapping[str, int] = field(default_factory=dict)
    """Parameters by dtype."""
    parameter_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Distinct parameters; tied ones under their first name."""
    buffer_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Buffers and lifted constants."""

    @property
    def flops(self) -> int:
        """2 × MACs."""
        return 2 * self.macs

    @property
    def flops_per_parameter(self) -> float:
        """FLOPs per parameter; 0 without parameters."""
        return self.flops / self.parameters if self.parameters else 0.0

    @property
    def layers(self) -> tuple[NodeCost, ...]:
        """Nodes grouped by name, in graph order; names are unique and every figure sums to the total."""
        grouped: dict[str, NodeCost] = {}
        for node in self.by_node:
            seen = grouped.get(node.name)
            grouped[node.name] = node if seen is None else _joined(seen, node)
        return tuple(grouped.values())

    def to_json(self) -> str:
        """One JSON document, as `paredown examine --json` prints it; `file_bytes` is null where it was not measured."""
        layers = [
            {
                "name": c.name,
                "kind": c.kind,
                "output_shape": list(c.output_shape),
                "parameters": c.parameters,
                "macs": c.macs,
                "parameter_bytes": c.parameter_bytes,
                "activation_bytes": c.activation_bytes,
            }
            for c in self.layers
        ]
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "model": self.model,
            "parameters": self.parameters,
            "macs": self.macs,
            "flops": self.flops,
            "parameter_bytes": self.parameter_bytes,
            "file_bytes": self.file_bytes if self.file_badge == "measured" else None,
            "file_bytes_estimated": self.file_bytes if self.file_badge == "estimated" else None,
            "file_badge": self.file_badge if self.file_badge == "measured" else "not tested",
            "state_dict_bytes": self.state_dict_bytes,
            "activation_bytes": self.activation_bytes,
            "peak_activation_bytes": self.peak_activation_bytes,
            "samples": self.samples,
            "alarms": list(self.alarms),
            "uncounted": [{"op": u.op, "count": u.count, "where": list(u.where)} for u in self.uncounted],
            "layers": layers,
        }
        if self.shrink is not None:
            document["shrink"] = {
                "target_bytes": self.shrink.target_bytes,
                "reachable": self.shrink.reachable,
                "badge": self.shrink.badge,
                "layers": [
                    {"name": s.name, "parameter_bytes": s.parameter_bytes, "to_bytes": s.to_bytes}
                    for s in self.shrink.layers
                ],
            }
        return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def bars(self, *, value: str = "macs", top: int = 20, width: int = 80) -> str:
        """A bar chart as text of `top` layers by "macs", "parameters", "parameter_bytes" or "activation_bytes"."""
        from paredown.examine.show import bars

        return bars(self, value=value, top=top, width=width)

    def plot(self, path: Path | str, *, value: str = "macs", top: int = 30) -> Path:
        """The same bar chart as a PNG or SVG file. Raises MissingError without matplotlib."""
        from paredown.examine.show import plot

        return plot(self, Path(path), value=value, top=top)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from paredown.examine.show import as_rich

        yield as_rich(self, width=options.max_width)

    def __str__(self) -> str:
        from paredown.examine.show import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from paredown.examine.show import as_html

        return as_html(self)


def _joined(a: NodeCost, b: NodeCost) -> NodeCost:
    """Two nodes of one layer: figures add up, the shape is the last one that does work."""
    kinds = dict.fromkeys(k for c in (a, b) if c.macs or c.parameters for k in c.kind.split("+"))
    return replace(
        a,
        kind="+".join(kinds) or a.kind,
        output_shape=b.output_shape or a.output_shape,
        parameters=a.parameters + b.parameters,
        macs=a.macs + b.macs,
        parameter_bytes=a.parameter_bytes + b.parameter_bytes,
        activation_bytes=a.activation_bytes + b.activation_bytes,
        weights=a.weights + tuple(w for w in b.weights if w not in a.weights),
    )
