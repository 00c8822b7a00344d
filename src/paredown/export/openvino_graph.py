"""The graph that OpenVINO's CPU plugin runs: what of it computes in int8 and what in float."""

from __future__ import annotations

import re
from typing import Any

from paredown.export.openvino_session import Session
from paredown.export.session import as_feed
from paredown.program import Inputs

_EDGES = ("Input", "Output", "Parameter", "Result", "Const", "Constant", "Reorder", "Convert", "ShapeOf", "MemoryInput")
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
_NUMBERED = re.compile(r"[a-z]+\d*_\d+")
"""Names that `tidy` gives."""
_INVENTED = re.compile(r"[A-Za-z]+\d*_\d+.*|Constant\w*")
"""Those, and names that OpenVINO counts up over a whole process: they would differ from run to run."""
_CODES, _FLOATS = ("u8", "i8"), ("f32", "bf16", "f16")


def executed(session: Session, sample: Inputs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """("type: name" in int8, "type: name" in float) of the graph that the CPU plugin runs, in its order.

    Not listed: constants and what is computed of nothing but them, changes of layout or type, views, arithmetic on shapes,
    and a FakeQuantize that turns floats into codes. One whose result is float again is listed: it costs and gains nothing.
    """
    compiled = session.request(as_feed(session.get_inputs(), *sample)).get_compiled_model()
    int8_nodes, float_nodes, constants = [], [], set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind, precision, result = (_text(info, k) for k in ("layerType", "runtimePrecision", "outputPrecisions"))
        result = result.split(",")[0]
        sources = [v.get_node().get_friendly_name() for v in node.input_values()]
        if kind in ("Const", "Constant") or (sources and all(s in constants for s in sources)):
            constants.add(node.get_friendly_name())
            continue
        if kind in (*_EDGES, *_VIEWS) or result not in (*_CODES, *_FLOATS):
            continue
        label = f"{kind}: {_name(node, info)}"
        if kind == "FakeQuantize" or _only_quantizes(info):
            float_nodes += [label] if result in _FLOATS else []
        elif precision in _CODES:
            int8_nodes.append(label)
        else:
            float_nodes.append(label)
    return tuple(int8_nodes), tuple(float_nodes)


def _only_quantizes(info: Any) -> bool:
    """Whether a node is made of nothing but FakeQuantize, under whatever name the plugin runs it."""
    parts = [n for n in _text(info, "originalLayersNames").split(",") if n]
    return bool(parts) and all(n.startswith("fakequantize_") for n in parts)


def _name(node: Any, info: Any) -> str:
    """The layer's name without what the plugin added; of a fused node the first that is a layer's, of its own inventions none."""
    parts = dict.fromkeys(n.split("/")[0] for n in _text(info, "originalLayersNames").split(",") if n)
    named = [n for n in parts if not _INVENTED.fullmatch(n)]
    numbered = [n for n in parts if _NUMBERED.fullmatch(n)]
    return next(iter((*named, *numbered)), "of the plugin")


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


__all__ = ["executed"]
