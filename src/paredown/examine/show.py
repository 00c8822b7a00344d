"""Tables and bars of a Cost: terminal, notebook, PNG and SVG. Every name is escaped."""

from __future__ import annotations

import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from paredown.errors import MissingError, UsageError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from paredown.examine.cost import Cost, NodeCost

Column = Literal["macs", "parameters", "parameter_bytes", "activation_bytes"]
_COLUMNS = ("macs", "parameters", "parameter_bytes", "activation_bytes")
_TITLES = {
    "macs": "MACs",
    "parameters": "parameters",
    "parameter_bytes": "parameter bytes",
    "activation_bytes": "activation bytes",
}


def si(value: float) -> str:
    """A number with a decimal prefix: 4.09 G, 25.6 M, 128.

    >>> si(25_557_032)
    '25.6 M'
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g}"


def summary(cost: Cost) -> list[tuple[str, str]]:
    """The totals as (label, text); every figure says its unit, and whether it was measured."""
    per = "per sample" if cost.samples == 1 else f"for {cost.samples} samples, the fewest that the network takes"
    rows = [
        ("parameters", f"{cost.parameters:,}"),
        ("MACs", f"{cost.macs:,} {per}"),
        ("FLOPs", f"{cost.flops:,} (2 × MACs), {cost.flops_per_parameter:.3g} per parameter"),
        ("parameter bytes", f"{cost.parameter_bytes:,} ({cost.parameter_bytes / 1e6:.2f} MB)"),
        ("state_dict bytes", f"{cost.state_dict_bytes:,} ({cost.state_dict_bytes / 1e6:.2f} MB)"),
        ("file bytes", "not tested" if cost.file_bytes is None else f"{cost.file_bytes:,} ({cost.file_badge})"),
        ("activation bytes", f"{cost.activation_bytes:,}, at most {cost.peak_activation_bytes:,} at once"),
    ]
    rows += [(f"not counted: {u.op}", f"{u.count} × at {', '.join(u.where[:3])}") for u in cost.uncounted]
    rows += [("alarm", text) for text in cost.alarms]
    if cost.shrink is not None:
        rows.append(("target", _shrink_line(cost)))
    return rows


def _shrink_line(cost: Cost) -> str:
    plan = cost.shrink
    assert plan is not None  # only called where there is one
    if not plan.reachable:
        return f"{plan.target_bytes:,} bytes cannot be reached by shrinking layers"
    if not plan.layers:
        return f"{plan.target_bytes:,} bytes: already met"
    return (
        f"{plan.target_bytes:,} bytes: shrink {len(plan.layers)} layers to ≤ {plan.cap_bytes:,} bytes each (estimated)"
    )


def as_rich(cost: Cost, *, width: int = 100) -> Group:
    """Totals and a table of layers that fits the terminal; a narrow one leaves out kind, shape and activations."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Table(show_header=False, box=None, pad_edge=False, title=Text(_plain(cost.model)), title_justify="left")
    head.add_column(overflow="fold")
    head.add_column(overflow="fold")
    for label, text in summary(cost):
        head.add_row(Text(_plain(label)), Text(_plain(text)))
    parts: list[Table] = [head, _layer_table(cost, wide=width >= 70)]
    if cost.shrink is not None and cost.shrink.layers:
        parts.append(_shrink_table(cost))
    return Group(*parts)


def _layer_table(cost: Cost, *, wide: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold", min_width=8)
    if wide:
        table.add_column("kind", overflow="fold", max_width=22)
        table.add_column("output", overflow="fold")
    for title in ("params", "MACs", *(("act B",) if wide else ())):
        table.add_column(title, justify="right", no_wrap=True, min_width=6)
    working = _working(cost)
    for layer in working:
        shape = "×".join(str(n) for n in layer.output_shape)
        figures: list[str | Text] = [
            si(v) if v else "·" for v in (layer.parameters, layer.macs, layer.activation_bytes)
        ]
        cells: list[str | Text] = [Text(_plain(layer.name)), Text(layer.kind), Text(shape), *figures]
        table.add_row(*(cells if wide else [cells[0], *figures[:2]]))
    others = len(cost.layers) - len(working)
    if others:
        rest = cost.activation_bytes - sum(c.activation_bytes for c in working)
        cells = [Text(f"{others} others"), "", "", "·", "·", si(rest)]
        table.add_row(*(cells if wide else [cells[0], "·", "·"]))
    return table


def _shrink_table(cost: Cost) -> Table:
    from rich.table import Table
    from rich.text import Text

    assert cost.shrink is not None  # checked by the caller
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer to shrink", overflow="fold")
    for title in ("bytes", "to", "remains"):
        table.add_column(title, justify="right", no_wrap=True)
    for s in cost.shrink.layers:
        table.add_row(Text(_plain(s.name)), si(s.parameter_bytes), si(s.to_bytes), f"{100 * s.remains:.0f} %")
    return table


def _working(cost: Cost) -> list[NodeCost]:
    return [c for c in cost.layers if c.macs or c.parameters]


def as_text(cost: Cost, *, width: int = 100) -> str:
    """The table without colour."""
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=width, no_color=True, force_terminal=False).print(as_rich(cost, width=width))
    return file.getvalue()


def bars(cost: Cost, *, value: str = "macs", top: int = 20, width: int = 80) -> str:
    """A bar chart as text: the `top` largest layers, in graph order, scaled to the largest. Raises UsageError."""
    rows = _top(cost, value, top)
    most = max((getattr(c, value) for c in rows), default=1)
    label = min(max((len(c.name) for c in rows), default=0), max(width // 3, 8))
    room = max(width - label - 10, 4)
    lines = [f"{_TITLES[value]} per layer, {len(rows)} of {len(cost.layers)}"]
    for c in rows:
        amount = getattr(c, value)
        name = c.name if len(c.name) <= label else "…" + c.name[1 - label :]
        lines.append(f"{_plain(name):<{label}} {'█' * round(room * amount / most):<{room}} {si(amount):>7}")
    return "\n".join(lines)


def _plain(name: str) -> str:
    """Control characters of a name made visible, so that it cannot drive the terminal."""
    return "".join(ch if ch.isprintable() else "\N{REPLACEMENT CHARACTER}" for ch in name)


def _top(cost: Cost, value: str, top: int) -> list[NodeCost]:
    if value not in _COLUMNS:
        msg = f"value must be one of {', '.join(_COLUMNS)}. Got {value!r}."
        raise UsageError(msg)
    largest = {c.name for c in sorted(cost.layers, key=lambda c: -int(getattr(c, value)))[:top] if getattr(c, value)}
    return [c for c in cost.layers if c.name in largest]


def plot(cost: Cost, path: Path, *, value: str = "macs", top: int = 30) -> Path:
    """Write the bar chart as PNG or SVG, by the path's suffix. Raises UsageError and MissingError."""
    if path.suffix.lower() not in (".png", ".svg"):
        msg = f"a plot must be a .png or .svg file. Got {path.name!r}."
        raise UsageError(msg)
    rows = _top(cost, value, top)[::-1]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "a plot needs matplotlib: pip install 'paredown[report]'."
        raise MissingError(msg) from error
    from paredown.records import whole_file

    figure = Figure(figsize=(8, 1 + 0.25 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh(range(len(rows)), [getattr(c, value) for c in rows], color="#3b6ea5")
    axes.set_yticks(range(len(rows)), [_plain(c.name).replace("$", r"\$") for c in rows], fontsize=7)
    axes.set_xlabel(f"{_TITLES[value]} (total {si(getattr(cost, value))})")
    axes.set_title(_plain(cost.model).replace("$", r"\$"))
    kind = path.suffix.lower().removeprefix(".")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return path


def as_html(cost: Cost) -> str:
    """Totals and layers as one HTML fragment with inline SVG bars of the MACs; nothing is loaded from elsewhere."""
    most = max((c.macs for c in cost.layers), default=0)
    head = "".join(
        f"<tr><th style='text-align:left'>{html.escape(a)}</th><td style='text-align:left'>{html.escape(b)}</td></tr>"
        for a, b in summary(cost)
    )
    rows = []
    for c in _working(cost):
        length = 200 * c.macs / most if most else 0
        rect = f"<rect width='{length:.1f}' height='10' fill='#3b6ea5'/>"
        bar = f"<svg width='200' height='10' role='img' aria-label='{c.macs} MACs'>{rect}</svg>"
        shape = "×".join(str(n) for n in c.output_shape)
        cells = (
            html.escape(c.name),
            html.escape(c.kind),
            shape,
            f"{c.parameters:,}",
            f"{c.macs:,}",
            f"{c.activation_bytes:,}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"<td>{bar}</td></tr>")
    titles = "".join(f"<th>{t}</th>" for t in ("layer", "kind", "output", "parameters", "MACs", "activation bytes", ""))
    body = f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<div><b>{html.escape(cost.model)}</b><table>{head}</table>{body}</div>"
