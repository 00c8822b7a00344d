"""Peak: how fast this machine multiplies and copies, measured in a second: the two lines of a roofline."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from paredown.measure.machine import machine_text
from paredown.records import Measured

SIDE = 768
"""Of the square matrices that are multiplied: they fit a cache, and are large enough that calling costs nothing."""
COPIED = 64 * 2**20
"""Bytes of the tensor that is copied: more than most last-level caches."""
READINGS = 7


def machine_peaks(threads: int = 1) -> dict[str, Measured]:
    """{"peak_flops", "bandwidth"}: the best of seven readings of a float32 matrix product, 2 · n³ FLOP, and of a copy, read and write.

    What PyTorch reaches with that many threads, which is near what the processor can: other processes only make it less. Both
    are timings.

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
    return {
        "peak_flops": Measured(value=flops, unit="FLOP/s", protocol=f"matrix product of {SIDE}×{SIDE}; {how}", **shared),  # type: ignore[arg-type]
        "bandwidth": Measured(
            value=bytes_per_second, unit="B/s", protocol=f"copy of {COPIED >> 20} MiB, read and write; {how}", **shared,  # type: ignore[arg-type]
        ),
    }  # fmt: skip


def _least_seconds(work: Callable[[], object]) -> float:
    work()
    found = []
    for _ in range(READINGS):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9)
