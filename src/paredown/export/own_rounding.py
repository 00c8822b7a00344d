"""How far an ONNX file in codes is from itself when its float sums round otherwise: what conditioning.py asks of a simulation, of a file alone.

A file that came without its simulation (a lone file to compare or to bundle) is run with ONNX Runtime's optimizer off, as it is and with
noise on its float results. Two runtimes that execute it rightly may differ by as much, each in a direction of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from paredown.export.conditioning import DRAWS, NOISE, cosine_between_runtimes, cosine_of
from paredown.export.distance import COSINE

_PASS_ON = frozenset(
    "QuantizeLinear DequantizeLinear DynamicQuantizeLinear Identity Constant ConstantOfShape Cast CastLike Reshape Flatten Transpose "
    "Squeeze Unsqueeze Slice Split Expand".split()
)
"""Views, constants, and what turns codes into numbers: no sum in them."""
_WHOLE_BYTES = 1 << 30
"""A larger copy gets its weights in a file of their own: protobuf ends at 2 GiB."""


def own_cosine_of_file(
    path: Path, feeds: Sequence[Mapping[str, Any]], *, draws: int = DRAWS, noise: float = NOISE
) -> float:
    """Smallest cosine, over feeds, outputs and `draws`, between a file's answers and those with its float results times 1 + noise · N(0, 1).

    `feeds` are arrays by the names of the file's inputs; `noise` is above 0. Results of operators that ONNX does not define stay as they are.

    >>> import tempfile, torch
    >>> from torch import nn
    >>> from paredown.export import export
    >>> from paredown.program import capture
    >>> from paredown.quantize import quantize
    >>> x = torch.randn(8, 4)
    >>> path = Path(tempfile.mkdtemp()) / "net.onnx"
    >>> _ = export(quantize(capture(nn.Linear(4, 3), x), calibrate=[x]), path)
    >>> own_cosine_of_file(path, [{"input": x.numpy()}]) > 0.999
    True
    """
    model, smallest = onnx.load(path), 1.0
    expected = [_run(session, feed) for session in [_session(model)] for feed in feeds]
    _disturb(model, noise)
    session = _session(model)
    for feed, right in zip(feeds, expected, strict=True):
        for _ in range(draws):
            got = _run(session, feed)
            smallest = min(smallest, *(cosine_of(a, b) for a, b in zip(got, right, strict=True)))
    return smallest


def excused_between_runtimes(path: Path, feeds: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """(cosine that a file's answers in two runtimes are held to, why it is less than 0.999; "" where it is not)."""
    if path.suffix.lower() != ".onnx":
        return COSINE, ""
    own = own_cosine_of_file(path, feeds)
    asked = min(COSINE, cosine_between_runtimes(own))
    if asked >= COSINE:
        return COSINE, ""
    return asked, (
        f"this network amplifies rounding: with its float results disturbed by {NOISE:g} the file differs from itself by a cosine of {own:.6f}, so "
        f"two runtimes are held to {asked:.6f} and not to {COSINE:g}"
    )


def _disturb(model: onnx.ModelProto, noise: float) -> None:
    """Multiply every float32 result that is computed, where it arises; names of results stay."""
    kinds = _float_results(model)
    nodes = [*model.graph.node]
    del model.graph.node[:]
    for number, node in enumerate(nodes):
        shaken = list(_noise(node, kinds, number, noise)) if node.op_type not in _PASS_ON else []
        model.graph.node.extend([node, *shaken])


def _noise(node: onnx.NodeProto, floats: frozenset[str], number: int, noise: float) -> Iterator[onnx.NodeProto]:
    """The nodes behind one, which make its results anew under their own names."""
    for at, name in enumerate(node.output):
        if name not in floats:
            continue
        node.output[at], factor = f"{name}/as_computed", f"{name}/noise"
        seed = float(8 * number + at + 1)
        yield helper.make_node("RandomNormalLike", [node.output[at]], [factor], mean=1.0, scale=noise, seed=seed)
        yield helper.make_node("Mul", [node.output[at], factor], [name])


def _float_results(model: onnx.ModelProto) -> frozenset[str]:
    """Names of the float32 results, as far as ONNX can tell."""
    known = onnx.shape_inference.infer_shapes(_without_weights(model)).graph
    values = (*known.value_info, *known.output)
    return frozenset(v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with large weights as mere declarations: types are known without their bytes, and a message ends at 2 GiB."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    large = [i for i in bare.graph.initializer if i.ByteSize() > 4096]
    declared = {v.name for v in bare.graph.input}
    for tensor in large:
        if tensor.name not in declared:
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        bare.graph.initializer.remove(tensor)
    return bare


def _session(model: onnx.ModelProto) -> Any:
    """A session that executes the graph as it is written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        apart = model.ByteSize() > _WHOLE_BYTES
        copy = model if not apart else onnx.ModelProto.FromString(model.SerializeToString())
        onnx.save_model(copy, path, save_as_external_data=apart, location="weights" if apart else None)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: Any, feed: Mapping[str, Any]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(a)) for a in session.run(None, dict(feed))]


__all__ = ["excused_between_runtimes", "own_cosine_of_file"]
