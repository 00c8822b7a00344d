"""W8A8 and W4A8 of ResNet-20 and ResNet-56 on CIFAR-10, beside ONNX Runtime's quantize_static, NNCF and plain torchao PT2E.

    python benchmarks/int8_accuracy.py --data DIR [--models resnet20 resnet56] [--draws 0 1 2]
    python benchmarks/int8_accuracy.py --data DIR --latency       # of the files of draw 0, in turns, one thread
    python benchmarks/int8_accuracy.py --data DIR --show

Draw d is 256 of the 2,000 held-out training images, by seed d; every tool calibrates on the same ones. The exported file is measured on the 10,000
test images through the runtime that runs it (torchao's result has no file here: its simulation runs in PyTorch). quantize_static after
quant_pre_process, QDQ, int8 weights per channel, with uint8 activations ("theirs") and with int8 ones (its default). Nothing is chosen by test images;
what to compare with is the best of the others by its mean, which favours them. Every finished cell is a line of the journal.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from int8_latency import FRAMES, in_turns, theirs_in_onnxruntime, theirs_in_openvino, told
from torch import nn

import paredown as pare
from paredown.export import predictor
from paredown.recipes import cifar10

NUM_IMAGES, BATCH = 256, 250
TOOLS = (
    "float",
    "paredown, ONNX Runtime",
    "paredown, OpenVINO",
    "paredown, W4A8 by gptq, ONNX Runtime",
    "paredown, W4A8 by gptq, OpenVINO",
    "quantize_static, uint8",
    "quantize_static, int8",
    "NNCF",
    "torchao PT2E",
)
Predict = Callable[[torch.Tensor], torch.Tensor]


def network(name: str, data: Path) -> nn.Module:
    return {"resnet20": cifar10.model, "resnet56": cifar10.resnet56}[name](data)


def drawn(data: Path, draw: int) -> torch.Tensor:
    """256 held-out training images, [256, 3, 32, 32]."""
    images = torch.cat([x for x, _ in cifar10.choose_batches(data)])
    return images[torch.from_numpy(np.random.default_rng(draw).permutation(len(images))[:NUM_IMAGES])]


def plain_torchao(model: nn.Module, images: torch.Tensor) -> Predict:
    """prepare, calibrate, convert with torchao's own quantizer for x86, as its tutorial has it."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},)).module()
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for x in images.split(32):
            prepared(x)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return converted  # type: ignore[no-any-return]


def in_onnxruntime(path: Path) -> Predict:
    """One image at a time where the file's batch is fixed, else as they come."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def in_openvino(path: Path) -> Predict:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().read_model(str(path))
    model.reshape([BATCH, 3, 32, 32])
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0].copy())


def made(tool: str, model: nn.Module, images: torch.Tensor, folder: Path) -> tuple[Path | None, Predict]:
    """The file of a tool, if it writes one, and what runs it."""
    program = pare.capture(model, cifar10.inputs())
    dense = Path(pare.export(program, folder / "fp32.onnx", target="onnxruntime-x86").path)
    if tool == "float":
        return dense, in_onnxruntime(dense)
    if tool.startswith("paredown"):
        target, ending = ("openvino-x86", "xml") if "OpenVINO" in tool else ("onnxruntime-x86", "onnx")
        four: dict[str, Any] = {"scheme": "w4a8", "repair": ["gptq"]} if "W4A8" in tool else {}
        quantized = pare.quantize(program, target=target, calibrate=list(images.split(32)), **four)
        artifact = pare.export(quantized, folder / f"ours.{ending}")
        return Path(artifact.path), predictor(artifact)
    if tool.startswith("quantize_static"):
        kind = tool.rpartition(" ")[2]
        path = theirs_in_onnxruntime(dense, list(images.split(32)), folder / f"static-{kind}.onnx", kind)
        return path, in_onnxruntime(path)
    if tool == "NNCF":
        found = theirs_in_openvino(dense, list(images.split(1)), folder / "nncf.xml", transformer=False)
        assert found is not None, "pip install nncf"
        return found, in_openvino(found)
    return None, plain_torchao(model, images)


def accuracy(predict: Predict, data: Path) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(cifar10.evaluate(predict, cifar10.test_batches(data))["accuracy"] > 50)


def cells(models: list[str], draws: list[int]) -> Iterator[dict[str, Any]]:
    for model in models:
        for draw in draws:
            for tool in TOOLS:
                if tool != "float" or draw == draws[0]:
                    yield {"model": model, "tool": tool, "draw": draw}


def run(cell: dict[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    began = time.process_time()
    path, predict = made(cell["tool"], network(cell["model"], data), drawn(data, cell["draw"]), folder)
    seconds = time.process_time() - began
    hits = accuracy(predict, data)
    size = (
        None
        if path is None
        else path.stat().st_size + (path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else 0)
    )
    return {
        **cell, "accuracy": 100 * float(hits.mean()), "hits": np.packbits(hits).tobytes().hex(),
        "file_bytes": size, "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def latency(name: str, data: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Files of draw 0, batch 1, in turns."""
    model, images = network(name, data), drawn(data, 0)
    files: dict[str, Path] = {}
    for tool in (t for t in TOOLS[:-1] if "W4A8" not in t):
        path = made(tool, model, images, folder)[0]
        assert path is not None
        files[tool] = path
    row: dict[str, Any] = {"model": name}
    from int8_latency import in_onnxruntime as session

    ours, theirs = files["paredown, ONNX Runtime"], files["quantize_static, uint8"]
    for exact in (False, True):
        runs = {"dense fp32": session(files["float"], exact=exact), "ours": session(ours, exact=exact)}
        runs |= {
            "theirs": session(theirs, exact=exact),
            "theirs, int8": session(files["quantize_static, int8"], exact=exact),
        }
        row["onnxruntime" + (", exact products" if exact else "")] = told(in_turns(runs, seconds, (1, 3, 32, 32)))
        if not exact:
            row[f"onnxruntime, {FRAMES} frames"] = told(in_turns(runs, seconds, (1, 3, 32, 32), FRAMES))
    from int8_latency import in_openvino as compiled

    named = {"dense fp32": files["float"], "ours": files["paredown, OpenVINO"], "theirs": files["NNCF"]}
    runs = {n: compiled(f, (1, 3, 32, 32)) for n, f in named.items()}
    row["openvino"] = told(in_turns(runs, seconds, (1, 3, 32, 32)))
    row[f"openvino, {FRAMES} frames"] = told(in_turns(runs, seconds, (1, 3, 32, 32), FRAMES))
    return row


def show(rows: list[dict[str, Any]]) -> None:
    for model in dict.fromkeys(r["model"] for r in rows):
        for tool in TOOLS:
            found = [r["accuracy"] for r in rows if r["model"] == model and r["tool"] == tool]
            if found:
                each = ", ".join(f"{a:.2f}" for a in found)
                print(f"{model}  {tool:36s} mean {np.mean(found):.3f}  ({each})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=["resnet20", "resnet56"])
    parser.add_argument("--draws", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--tools", nargs="*", help="tools whose names begin like this; default: all")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=Path("runs/int8_accuracy.jsonl"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.latency:
        for name in given.models:
            with tempfile.TemporaryDirectory() as folder:
                print(json.dumps(latency(name, given.data, Path(folder), given.seconds), indent=1), flush=True)
        return
    rows = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    done = [{k: r[k] for k in ("model", "tool", "draw")} for r in rows]
    for cell in cells(given.models, given.draws):
        if cell in done or given.show or (given.tools and not any(cell["tool"].startswith(t) for t in given.tools)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = run(cell, given.data, Path(folder))
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(
            f"{row['model']} {row['tool']} draw {row['draw']}: {row['accuracy']:.2f} %, {row['cpu_seconds']} s",
            flush=True,
        )
    show(rows)


if __name__ == "__main__":
    main()
