"""What ONNX has an operator for, but not in every form that torch has: refused before the exporter writes nonsense or gives up."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram

from paredown.errors import RejectedError
from paredown.program import source_line

_CONVOLUTIONS = frozenset(f"aten::conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))


def refuse_forms(program: ExportedProgram) -> None:
    """Raises RejectedError for a kernel per sample under a free batch, and for an LSTM with a projection."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        if schema.name in _CONVOLUTIONS and isinstance(_argument(node, schema, "groups"), fx.Node):
            msg = (
                f"groups of a convolution must be a number in ONNX. Got one for each sample at {_where(node)}. Capture the model with "
                "dynamic_batch=False and the batch that the device will see: the file then takes that batch alone."
            )
            raise RejectedError(msg)
        states = _argument(node, schema, "hx") if schema.name == "aten::lstm" else None
        sizes = {int(s.meta["val"].shape[-1]) for s in states or () if isinstance(s.meta.get("val"), Tensor)}
        if len(sizes) > 1:
            msg = (
                f"an LSTM must have no projection in ONNX. Got proj_size={min(sizes)} at {_where(node)}. Build it without proj_size (a linear "
                "layer behind it projects its output alone), or write its steps out with nn.LSTMCell and nn.Linear."
            )
            raise RejectedError(msg)


def _argument(node: fx.Node, schema: Any, name: str) -> Any:
    names = [a.name for a in schema.arguments]
    place = names.index(name) if name in names else len(node.args)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name)


def _where(node: fx.Node) -> str:
    line = source_line(node)
    return f"{node.name} ({line})" if line else node.name
