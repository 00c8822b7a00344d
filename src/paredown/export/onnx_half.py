"""Weights of an ONNX file as float16 with a Cast to float32 behind each, which a runtime computes once, as it loads the file.

    initializer float16 → Cast to float32 → whatever reads the weight

What is computed, and how fast, is what it is without: ONNX Runtime folds the casts before it looks for anything to fuse, and has no float16
kernels of convolutions or products on x86. A graph that is float16 throughout was as fast there (ResNet-18: 71 and 73 ms, 71 in float32), since
its ops run in float32 between casts, and twice as far from float32, since activations are rounded too.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

WORTH_BYTES, WORTH_BYTES_AS_TEXT = 150, 700
"""What a Cast and its names take in the file; and in one of OpenVINO, whose graph is text."""


def halve(model: ir.Model, worth_bytes: int = WORTH_BYTES) -> int:
    """Replace float32 initializers with two axes or more whose values float16 holds exactly; returns how many. Nothing is rounded here.

    One that is too small for a smaller file stays, and so does what is read by a graph inside a node, as that is no place
    for a Cast, and an output of the network.
    """
    done = 0
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2 or value.is_graph_output():
            continue
        array = tensor.numpy()
        if 2 * array.size <= worth_bytes:
            continue
        with np.errstate(over="ignore"):
            small = array.astype(np.float16)
        readers = {node for node, _ in value.uses()}
        first = next((node for node in model.graph if node in readers), None)
        if first is None or not readers <= set(model.graph) or not np.array_equal(small, array):
            continue
        held = ir.Value(name=f"{name}_half", const_value=ir.tensor(small, name=f"{name}_half"))
        cast = ir.node("Cast", [held], {"to": ir.DataType.FLOAT})
        out = cast.outputs[0]
        out.shape, out.dtype = value.shape, ir.DataType.FLOAT
        model.graph.insert_before(first, [cast])
        value.replace_all_uses_with(out)
        del model.graph.initializers[name]
        out.name, cast.name = name, held.name
        model.graph.register_initializer(held)
        done += 1
    return done
