"""What runs on codes in the runtime's own graph: convolutions and linear layers, products of activations, everything else.

    python benchmarks/int8_coverage.py [--models torchvision:regnet_x_400mf timm:…] [--out runs/int8_coverage.jsonl]

Files of paredown beside those of quantize_static (ONNX Runtime) and NNCF (OpenVINO), made as in int8_latency.py, with random weights and 8 random
images: what runs in INT8 hangs on shapes and patterns. Both are opened by the runtime that executes them, and its optimised graph is read. "Islands"
are kinds of nodes that compute in float more often in our file than in theirs. Every finished model is a line of the journal.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from int8_latency import IMAGES, settled, theirs_in_onnxruntime, theirs_in_openvino

import paredown as pare
from paredown.export.artifact import layer_counts
from paredown.export.onnxruntime import constant_products, inspect_optimized
from paredown.export.openvino_graph import executed
from paredown.export.openvino_session import Session

MODELS = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s"),
    *("regnet_x_400mf", "regnet_y_400mf", "densenet121", "convnext_tiny", "vit_b_16", "swin_t"),
)  # fmt: skip
TRANSFORMERS = ("vit", "swin", "deit")
PRODUCTS = ("MatMul", "FusedMatMul", "QLinearMatMul", "ScaledDotProductAttention")
"""Products of two activations, or of one with a constant; and what OpenVINO fuses of two and a softmax."""
Nodes = tuple[tuple[str, ...], tuple[str, ...], set[str]]


def in_onnxruntime(path: Path) -> Nodes:
    """On codes, in float, and the products that are linear layers."""
    options, optimized = onnxruntime.SessionOptions(), path.with_suffix(".optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(optimized), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(str(optimized))
    return *inspect_optimized(model), constant_products(model)


def in_openvino(path: Path) -> Nodes:
    return *executed(Session(path), ((torch.zeros(1, 3, 224, 224),), {})), set()


def told(nodes: Nodes) -> dict[str, Any]:
    on_codes, in_float, layers = nodes
    counts = layer_counts(on_codes, in_float, others=layers)
    products = [sum(n.partition(":")[0] in PRODUCTS and n not in layers for n in part) for part in (on_codes, in_float)]
    return {
        "layers": counts["num_layers"], "layers_on_codes": counts["num_layers_on_codes"],
        "products": sum(products), "products_on_codes": products[0],
        "float": dict(Counter(n.partition(":")[0] for n in in_float)),
        "layers_in_float": [n for n in in_float if sum(layer_counts((), (n,), others=layers).values())],
    }  # fmt: skip


def one(name: str, folder: Path) -> dict[str, Any]:
    model = settled(name)
    images = [torch.randn(1, 3, 224, 224) for _ in range(IMAGES)]
    program = pare.capture(model, torch.randn(2, 3, 224, 224))
    dense = Path(pare.export(program, folder / "fp32.onnx", target="onnxruntime-x86").path)
    row: dict[str, Any] = {"model": name}
    for target, ending in (("onnxruntime-x86", "onnx"), ("openvino-x86", "xml")):
        artifact = pare.export(pare.quantize(program, target=target, calibrate=images), folder / f"ours.{ending}")
        if ending == "onnx":
            other: Path | None = theirs_in_onnxruntime(dense, images, folder / "theirs.onnx")
        else:
            other = theirs_in_openvino(
                dense, images, folder / "theirs.xml", transformer=any(t in name for t in TRANSFORMERS)
            )
        read = in_onnxruntime if ending == "onnx" else in_openvino
        row[target] = {"ours": told(read(Path(artifact.path)))}
        if other is not None:
            row[target]["theirs"] = told(read(other))
            ours, theirs = row[target]["ours"]["float"], row[target]["theirs"]["float"]
            row[target]["islands"] = {k: [n, theirs.get(k, 0)] for k, n in ours.items() if n > theirs.get(k, 0)}
    return row


def show(rows: list[dict[str, Any]]) -> None:
    print(
        "| model | "
        + " | ".join(
            f"{r}: layers on codes, ours; theirs; products of activations" for r in ("ONNX Runtime", "OpenVINO")
        )
        + " |"
    )
    print("|---|---|---|")
    for row in rows:
        cells = []
        for target in ("onnxruntime-x86", "openvino-x86"):
            ours, theirs = row[target]["ours"], row[target].get("theirs", {})
            text = f"{ours['layers_on_codes']} of {ours['layers']}; {theirs.get('layers_on_codes')} of {theirs.get('layers')}"
            if ours["products"]:
                text += f"; {ours['products_on_codes']} of {ours['products']}; {theirs.get('products_on_codes')} of {theirs.get('products')}"
            cells.append(text)
        print(f"| {row['model']} | {cells[0]} | {cells[1]} |")
    for row in rows:
        print(row["model"], {t: row[t].get("islands") for t in ("onnxruntime-x86", "openvino-x86")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/int8_coverage.jsonl"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    for name in given.models:
        if any(r["model"] == name for r in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = one(name, Path(folder))
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(name, "done", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
