"""Training with rounding: ResNet-20 on CIFAR-10 with 4-bit weights and activations, first and last layer at 8 bit.

    python benchmarks/qat_resnet20.py --data DIR --stage choose    # learning rates, on held-out images
    python benchmarks/qat_resnet20.py --data DIR                   # three seeds, on the test images
    python benchmarks/qat_resnet20.py --data DIR --stage show      # the table, from the journal

All: `train_quantized`, SGD, momentum 0.9, weight decay 1e-4, gradients clipped to 2, cosine to 0, batch 128, crop and flip,
11,000 training images, calibrated with 256 held-out ones, last epoch. Distillation is from the float network itself, T 4, 0.9 KL + 0.1 cross entropy.
What is measured is the simulation in PyTorch: no runtime here executes 4-bit activations. Every finished cell is a line of
the journal; an interrupted one continues at its last epoch. Test images choose nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import paredown as pare
from paredown.export import predictor
from paredown.quantize.qat import train_quantized
from paredown.recipes import cifar10
from paredown.train import task_from_module

FLOAT = 91.73
"""% of the test images that the network in float32 gets right."""
LR = 0.01
"""Chosen on held-out training images and the training loss, see docs/decisions/quantize-repairs.md."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One training."""

    table: str
    scheme: str = "w4a4"
    distil: str = "kl"
    lr: float
    epochs: int
    seed: int = 0
    most_steps: int | None = None
    """Of an epoch; None: all of it."""

    def key(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.key(), sort_keys=True).encode()).hexdigest()[:12]


def cells(stage: str, seeds: list[int]) -> Iterator[Cell]:
    if stage == "choose":
        yield Cell(table="choose", lr=LR, epochs=0)
        for lr in (0.004, 0.01, 0.03):
            yield Cell(table="choose", lr=lr, epochs=1, most_steps=24)
        return
    yield Cell(table="test", lr=LR, epochs=0)
    for seed in seeds:
        yield Cell(table="test", lr=LR, epochs=10, seed=seed)


def run(cell: Cell, data: Path, out: Path) -> dict[str, Any]:
    task = task_from_module(cifar10, data=data)
    dense = task.model()
    checkpoint = out / f"qat-{cell.digest()}.safetensors"
    began, cpu = time.time(), time.process_time()
    quantized = train_quantized(
        pare.capture(dense, task.inputs()), task.train_batches, step=task.step, calibrate=task.calibration_batches(),
        scheme=cell.scheme, epochs=cell.epochs, lr=cell.lr, seed=cell.seed, checkpoint=checkpoint,
        teacher=None if cell.distil == "none" else dense, max_steps=cell.most_steps,
        progress=told(cell, began),
    )  # fmt: skip
    batches = task.choose_batches() if cell.table == "choose" else cifar10.test_batches(data)
    hits = cifar10.evaluate(predictor(quantized), batches)["accuracy"] > 50
    for path in out.glob(f"{checkpoint.stem}*.safetensors"):
        path.unlink()
    return {
        **cell.key(),
        "images": "held out" if cell.table == "choose" else "test",
        "accuracy": 100 * float(hits.mean()),
        "num_images": len(hits),
        "hits": np.packbits(hits).tobytes().hex(),
        "bits": {name: packed.bits for name, packed in quantized.weights.items()},
        "cpu_seconds": round(time.process_time() - cpu),
    }


def told(cell: Cell, began: float) -> Any:
    def tell(state: Any) -> None:
        if state.step == state.steps and len(state.history) == state.epoch > 0:
            print(
                f"{cell.table} {cell.scheme} lr {cell.lr:g} seed {cell.seed}: epoch {len(state.history)}, "
                f"loss {state.history[-1].loss:.3f}, {time.time() - began:.0f} s",
                flush=True,
            )

    return tell


def show(rows: list[dict[str, Any]]) -> None:
    for r in rows:
        print(
            f"{r['table']} {r['scheme']} {r['distil']} lr {r['lr']:g} {r['epochs']} epochs seed {r['seed']}: "
            f"{r['accuracy']:.2f} % ({r['images']}), {r['cpu_seconds']} processor seconds"
        )
    reached = [r["accuracy"] for r in rows if r["table"] == "test" and r["epochs"]]
    if reached:
        spread = f"{min(reached):.2f} to {max(reached):.2f}"
        print(
            f"mean of {len(reached)} seeds {np.mean(reached):.2f} ({spread}), {np.mean(reached) - FLOAT:+.2f} to float"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--stage", choices=("choose", "test", "show"), default="test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    journal = given.out / "qat_resnet20.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    if given.stage != "show":
        done = {json.dumps({k: r[k] for k in Cell.__dataclass_fields__}, sort_keys=True) for r in rows}
        for cell in cells(given.stage, given.seeds):
            if json.dumps(cell.key(), sort_keys=True) in done:
                continue
            row = run(cell, given.data, given.out)
            with journal.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(f"{cell.table}: {row['accuracy']:.2f}", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
