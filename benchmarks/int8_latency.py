"""INT8 files of paredown beside those of ONNX Runtime's quantize_static and of NNCF: latency in turns, one thread.

    python benchmarks/int8_latency.py [--models resnet50 …] [--halves] [--out runs/int8_latency.jsonl]

Each model has random weights (batch norm statistics from random images), 224 × 224, batch 1; all tools calibrate on the same 8
random images, since only speed is measured here. In ONNX Runtime: FP32, ours, and quantize_static after quant_pre_process with
QDQ, uint8 activations and int8 weights per channel; in OpenVINO: FP32, ours, NNCF's performance preset. All files of one runtime take
turns in one process; the ratios are theirs over ours, above 1 where ours is faster, of medians of processor time (which other
programs stretch less than the clock on the wall) with a 95 % bootstrap interval over rounds: once with one picture per turn, once with ten,
since a turn of one finds the caches full of the other networks' weights. `--halves` takes half of the channels
away before (l1, uniform shares, to multiples of 8) and compares with the dense FP32 file. NNCF must be installed; it is left out where not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import paredown as pare
from paredown.models import load_model

MODELS = ("resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "vit_b_16")
IMAGES, FRAMES = 8, 10
SHAPE = (1, 3, 224, 224)


def settled(name: str) -> nn.Module:
    """A model whose activations have a healthy size: batch norm statistics from random images."""
    torch.manual_seed(0)
    model = load_model(f"torchvision:{name}")[0]
    if hasattr(model, "heads"):
        nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # torchvision starts it at zero
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 224, 224))
    return model.eval()


def theirs_in_onnxruntime(
    float_file: Path, images: Iterable[torch.Tensor], out: Path, activations: str = "uint8"
) -> Path:
    """quantize_static as its documentation recommends it for processors of this kind; "int8" activations are its default."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnxruntime.InferenceSession(str(float_file), providers=["CPUExecutionProvider"]).get_inputs()[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = ({name: x.numpy()} for x in images)

        def get_next(self) -> Any:
            return next(self.left, None)

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(float_file), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8 if activations == "uint8" else QuantType.QInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return out


def theirs_in_openvino(float_file: Path, images: list[torch.Tensor], out: Path, *, transformer: bool) -> Path | None:
    try:
        import nncf
    except ImportError:
        return None
    import openvino

    model = openvino.Core().read_model(str(float_file))
    kind = {"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}
    done = nncf.quantize(model, nncf.Dataset([x.numpy() for x in images]), subset_size=len(images), **kind)
    openvino.save_model(done, str(out), compress_to_fp16=False)
    return out


def in_onnxruntime(path: Path, *, exact: bool) -> Callable[[np.ndarray], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def in_openvino(path: Path, shape: tuple[int, ...] = SHAPE) -> Callable[[np.ndarray], Any]:
    import openvino

    model = openvino.Core().read_model(str(path))
    model.reshape(list(shape))
    compiled = openvino.Core().compile_model(
        model, "CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    request = compiled.create_infer_request()
    return lambda x: request.infer([x], share_inputs=True, share_outputs=True)


def in_turns(
    runs: dict[str, Callable[[np.ndarray], Any]], seconds: float, shape: tuple[int, ...] = SHAPE, frames: int = 1
) -> dict[str, np.ndarray]:
    """Milliseconds of processor time of every round, by name.

    `frames`: with 1 each run finds in the caches what the other files left there; of more, one after the other, a first is not
    counted and the round is their median, as of a camera whose pictures all go through one network.
    """
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for run in runs.values():
        for _ in range(5):
            run(x)
    times: dict[str, list[float]] = {name: [] for name in runs}
    start, turn = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or turn < 15:
        for name in list(runs) if turn % 2 else reversed(list(runs)):
            if frames > 1:
                runs[name](x)
            each = []
            for _ in range(frames):
                began = time.process_time_ns()
                runs[name](x)
                each.append((time.process_time_ns() - began) / 1e6)
            times[name].append(float(np.median(each)))
        turn += 1
    return {name: np.array(t) for name, t in times.items()}


def ratio(theirs: np.ndarray, ours: np.ndarray) -> list[float]:
    """Median over median, with the 95 % bootstrap interval over rounds."""
    picks = np.random.default_rng(0).integers(0, len(ours), (2000, len(ours)))
    spread = np.median(theirs[picks], axis=1) / np.median(ours[picks], axis=1)
    return [round(float(v), 3) for v in (np.median(theirs) / np.median(ours), *np.percentile(spread, (2.5, 97.5)))]


def floats_in_onnxruntime(path: Path) -> dict[str, int]:
    """Operators of the runtime's own optimised graph."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "o.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return dict(Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node))


def one(name: str, folder: Path, *, halves: bool, seconds: float, runtimes: list[str]) -> dict[str, Any]:
    model = settled(name)
    images = [torch.randn(1, 3, 224, 224) for _ in range(IMAGES)]
    program = pare.capture(model, torch.randn(2, 3, 224, 224))
    dense = Path(pare.export(program, folder / "fp32.onnx", target="onnxruntime-x86").path)
    smaller: Any = program
    row: dict[str, Any] = {"model": name, "halves": halves}
    small_file = dense
    if halves:
        coupling, cost = pare.couple(program), pare.examine(program)
        plan = pare.allocate(
            coupling, pare.score(program, coupling, "l1"), cost, pare.Budget(channels=0.5), target="onnxruntime-x86"
        )
        smaller = pare.prune(program, plan)
        row["macs"] = [
            cost.macs,
            pare.examine(pare.capture(smaller.module, torch.randn(2, 3, 224, 224), train=False)).macs,
        ]
        small_file = Path(pare.export(smaller, folder / "small.onnx", target="onnxruntime-x86").path)
    if "onnxruntime" in runtimes:
        began = time.process_time()
        quantized = pare.quantize(smaller, target="onnxruntime-x86", calibrate=images)
        ours = Path(pare.export(quantized, folder / "ours.onnx").path)
        row["ours s"] = round(time.process_time() - began, 1)
        began = time.process_time()
        theirs = theirs_in_onnxruntime(small_file, images, folder / "theirs.onnx")
        row["theirs s"] = round(time.process_time() - began, 1)
        row["ours ops"], row["theirs ops"] = floats_in_onnxruntime(ours), floats_in_onnxruntime(theirs)
        files = {"dense fp32": dense, "small fp32": small_file, "ours": ours, "theirs": theirs}
        for exact in (False, True):
            runs, refused = {}, {}
            for n, f in files.items():
                if halves or n != "small fp32":
                    try:
                        runs[n] = in_onnxruntime(f, exact=exact)
                    except Exception as error:  # 1.32 refuses quantize_static's ViT with exact products
                        refused[f"{n} refused"] = str(error)[-80:].strip()
            row["onnxruntime" + (", exact products" if exact else "")] = (
                told(in_turns(runs, seconds)) if "ours" in runs else {}
            ) | refused
            if not exact:
                row[f"onnxruntime, {FRAMES} frames"] = told(in_turns(runs, seconds, frames=FRAMES))
    if "openvino" in runtimes:
        quantized = pare.quantize(smaller, target="openvino-x86", calibrate=images)
        ours = Path(pare.export(quantized, folder / "ours.xml").path)
        other = theirs_in_openvino(small_file, images, folder / "theirs.xml", transformer="vit" in name)
        found = {"dense fp32": dense, "small fp32": small_file, "ours": ours, "theirs": other}
        runs = {n: in_openvino(f) for n, f in found.items() if f is not None and (halves or n != "small fp32")}
        row["openvino"] = told(in_turns(runs, seconds))
        row[f"openvino, {FRAMES} frames"] = told(in_turns(runs, seconds, frames=FRAMES))
    return row


def told(times: dict[str, np.ndarray]) -> dict[str, Any]:
    row: dict[str, Any] = {f"{name} ms": round(float(np.median(t)), 3) for name, t in times.items()}
    row |= {f"{name} / ours": ratio(t, times["ours"]) for name, t in times.items() if name != "ours"}
    return row | {"rounds": len(times["ours"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--runtimes", nargs="*", default=["onnxruntime", "openvino"])
    parser.add_argument("--halves", action="store_true")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path("runs/int8_latency.jsonl"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name in given.models:
        with tempfile.TemporaryDirectory() as folder:
            row = one(name, Path(folder), halves=given.halves, seconds=given.seconds, runtimes=given.runtimes)
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    main()
