"""Static INT8 of ResNet-50, calibration to file: processor seconds and peak memory, paredown beside ONNX Runtime's own quantizer.

    python benchmarks/static_int8.py [--images 100 300 1000] [--tools paredown quantize_static] [--out runs/static_int8.jsonl]

Each cell runs in a process of its own, on one thread, with random weights and random images of 224 × 224 that are made one
by one as they are read (a reader of a user's files would hold no more). paredown: capture, quantize, export.
quantize_static: export of the float file by paredown, quant_pre_process, QDQ, per channel, uint8 activations. Loading of the
libraries and the model is outside the seconds; memory is the process's high-water mark, libraries included. Linux.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOOLS = ("paredown", "quantize_static")


def images(count: int) -> Iterator[Any]:
    """So many random images; the i-th is the same in every tool."""
    import torch

    for number in range(count):
        yield torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(number))


def measured(tool: str, count: int) -> dict[str, Any]:
    """One cell, in this process."""
    import onnxruntime.quantization  # noqa: F401
    import torch
    import torchao.quantization  # noqa: F401
    from int8_latency import settled, theirs_in_onnxruntime

    import paredown as pare

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = settled("resnet50")
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        program = pare.capture(model, torch.randn(2, 3, 224, 224))
        if tool == "paredown":
            quantized = pare.quantize(program, target="onnxruntime-x86", calibrate=lambda: images(count))
            file = Path(pare.export(quantized, Path(folder) / "ours.onnx").path)
        else:
            dense = Path(pare.export(program, Path(folder) / "fp32.onnx", target="onnxruntime-x86").path)
            file = theirs_in_onnxruntime(dense, images(count), Path(folder) / "theirs.onnx")
        seconds, size = time.process_time() - began, file.stat().st_size
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    return {"tool": tool, "images": count, "seconds": round(seconds, 1), "peak MiB": round(peak), "file bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--out", type=Path, default=Path("runs/static_int8.jsonl"))
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for count in given.images:
        for tool in given.tools:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measured, (tool, count))
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
