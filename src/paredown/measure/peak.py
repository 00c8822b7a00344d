"""Peak: how fast this machine multiplies and copies, measured in a second: the two lines of a roofline."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from paredown.measure.machine import machine_text
from paredown.records import Measured

SIDE = 768
"""Of the square matrices that are multiplied: they fit a cache, and are large enough that calling costs nothing."""
COPIED = 64 * 2**20
"""Bytes of the tensor that is copied: more than most last-level caches."""
READINGS = 7


def machine_peaks(threads: int = 1) -> dict[str, Measured]:
    """{"peak_flops", "peak_int8", "bandwidth"}: the best of seven readings of matrix products, 2 · n³ operations, and of a copy, read and write.

    float32 and the copy are what PyTorch reaches with that many threads, uint8 × int8 what ONNX Runtime does (left out where it
    is missing), which is near what the processor can: other processes only make it less. All are timings.

    >>> peaks = machine_peaks()
    >>> peaks["peak_flops"].value > 1e8, peaks["bandwidth"].value > 1e7, peaks["bandwidth"].unit
    (True, True, 'B/s')
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
        source = torch.zeros(COPIED // 4)
        target = torch.empty_like(source)
        flops = 2 * SIDE**3 / _least_seconds(lambda: torch.mm(a, b))
        bytes_per_second = 2 * COPIED / _least_seconds(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(before)
    shared = {"n": READINGS, "machine": machine_text(), "timing": True}
    how = f"best of {READINGS}, PyTorch, float32, {threads} thread{'s' if threads > 1 else ''}"
    fast = _int8_speed(threads)
    int8 = Measured(
        value=fast, unit="OP/s", protocol=f"uint8 × int8 of {SIDE}×{SIDE}; {how.replace('PyTorch, float32', 'ONNX Runtime')}", **shared,  # type: ignore[arg-type]
    )  # fmt: skip
    return {
        **({} if fast is None else {"peak_int8": int8}),
        "peak_flops": Measured(value=flops, unit="FLOP/s", protocol=f"matrix product of {SIDE}×{SIDE}; {how}", **shared),  # type: ignore[arg-type]
        "bandwidth": Measured(
            value=bytes_per_second, unit="B/s", protocol=f"copy of {COPIED >> 20} MiB, read and write; {how}", **shared,  # type: ignore[arg-type]
        ),
    }  # fmt: skip


def _int8_speed(threads: int) -> float | None:
    """Operations per second of one product of integers, its right side packed once as weights are; None without the runtime."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    rng = np.random.default_rng(0)
    weights = numpy_helper.from_array(rng.integers(-64, 64, (SIDE, SIDE), dtype=np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, (SIDE, SIDE))],
        [helper.make_tensor_value_info("y", TensorProto.INT32, (SIDE, SIDE))],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": rng.integers(0, 255, (SIDE, SIDE), dtype=np.uint8)}
    return float(2 * SIDE**3 / _least_seconds(lambda: session.run(None, feed)))


def _least_seconds(work: Callable[[], object]) -> float:
    work()
    found = []
    for _ in range(READINGS):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9)
