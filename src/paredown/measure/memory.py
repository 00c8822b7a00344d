"""Peak memory of a process that does nothing but run one file, .onnx, .xml, .pte or .tflite: python -m paredown.measure.memory FILE [SHAPES].

SHAPES is JSON, {"input": [[1, 3, 8, 8], "float32"]}; without it every free axis is 1. Prints one JSON object. Nothing of
paredown or torch is imported here, so that the reading is of the runtime alone.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


def peak_bytes() -> int:
    """Largest resident size of this process so far, bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(largest if sys.platform == "darwin" else largest * 1024)


def run(path: str, shapes: dict[str, Any], threads: int = 1) -> dict[str, int]:
    """Load the file, run it five times on zeros; {"after_import_bytes", "peak_bytes"}."""
    others = {".xml": _openvino, ".pte": _executorch, ".tflite": _litert}
    infer, before = others.get(Path(path).suffix.lower(), _onnxruntime)(path, shapes, threads)
    for _ in range(5):
        infer()
    return {"after_import_bytes": before, "peak_bytes": peak_bytes()}


def _onnxruntime(path: str, shapes: dict[str, Any], threads: int) -> tuple[Callable[[], Any], int]:
    """(one run, peak bytes after the import)."""
    import numpy as np
    import onnxruntime

    before = peak_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    with Path(path).open("rb") as file:
        file.seek(max(0, Path(path).stat().st_size - 65_536))
        exact = b"exact_products" in file.read()
    if not exact:  # as in the sessions that measure
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {}
    for value in session.get_inputs():
        free = [d if isinstance(d, int) else 1 for d in value.shape], _TYPES.get(value.type, "float32")
        shape, kind = shapes.get(value.name, free)
        feed[value.name] = np.zeros(shape, kind)
    return lambda: session.run(None, feed), before


def _openvino(path: str, shapes: dict[str, Any], threads: int) -> tuple[Callable[[], Any], int]:
    """(one run, peak bytes after the import)."""
    import numpy as np
    import openvino

    before = peak_bytes()
    core = openvino.Core()
    model = core.read_model(path)
    feed = {}
    for value in model.inputs:
        free = [d.get_length() if d.is_static else 1 for d in value.get_partial_shape()]
        shape, kind = shapes.get(value.any_name, (free, value.get_element_type().to_dtype()))
        feed[value.any_name] = np.zeros(shape, kind)
    model.reshape({name: list(array.shape) for name, array in feed.items()})
    pinned = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
    # As in the sessions that measure.
    compiled = core.compile_model(model, "CPU", {**pinned, "INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    return lambda: request.infer(feed), before


def _executorch(path: str, shapes: dict[str, Any], threads: int) -> tuple[Callable[[], Any], int]:
    """(one run, peak bytes after the import)."""
    import torch
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    before = peak_bytes()
    _unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    feed = [torch.zeros(shape, dtype=getattr(torch, kind)) for shape, kind in shapes.values()]
    return lambda: (method.execute(feed), program), before


def _litert(path: str, shapes: dict[str, Any], threads: int) -> tuple[Callable[[], Any], int]:
    """(one run, peak bytes after the import). Inputs are zeros already."""
    from ai_edge_litert.interpreter import Interpreter

    before = peak_bytes()
    interpreter = Interpreter(model_path=path, num_threads=threads)
    interpreter.allocate_tensors()
    return interpreter.invoke, before


def main(arguments: list[str]) -> int:
    """FILE [SHAPES [THREADS]]; the measuring process is a grandchild.

    A new process starts with the peak of the process it was forked from. One small process in between keeps the size of
    the caller (torch, data) out of the reading.
    """
    if arguments[:1] != ["--measure"]:
        command = [sys.executable, "-P", __file__, "--measure", *arguments]
        return subprocess.run(command, check=False).returncode
    path, *rest = arguments[1:]
    shapes = json.loads(rest[0]) if rest else {}
    sys.stdout.write(json.dumps(run(path, shapes, int(rest[1]) if len(rest) > 1 else 1)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
