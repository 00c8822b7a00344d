"""A latency budget as a fraction of the dense file, searched for and then timed anew in five schedules of turns.

    python benchmarks/latency_budget.py resnet18 0.5 --scheme int8 --out benchmarks/results/latency_budget.jsonl

Weights are random: latency depends on shapes and types. Every schedule opens both files anew, so that what they share is the
machine alone. One line of JSON per run: what was asked, foreseen, and measured in each schedule.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import paredown
from paredown.measure import measure
from paredown.measure.layer_tables import Setting
from paredown.measure.turns import timed_in_turns
from paredown.models import load_model
from paredown.search.budgets import Search, meet
from paredown.search.candidates import maker
from paredown.search.layers import latency_table

SCHEDULES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="torchvision:NAME or timm:NAME; a bare name is torchvision's")
    parser.add_argument("fraction", type=float)
    parser.add_argument("--scheme", default="int8", choices=["fp32", "int8"])
    parser.add_argument("--target", default="onnxruntime-x86")
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    start = time.monotonic()
    name = asked.model if ":" in asked.model else f"torchvision:{asked.model}"
    sample = torch.randn(2, 3, asked.side, asked.side)
    program = paredown.capture(load_model(name)[0].eval(), sample)
    coupling, cost = paredown.couple(program), paredown.examine(program)
    setting = Setting(target=asked.target, scheme=asked.scheme)
    table = latency_table(program, coupling, cost, setting)
    with tempfile.TemporaryDirectory() as folder:
        suffix = ".xml" if asked.target.startswith("openvino") else ".onnx"
        dense = paredown.export(program, Path(folder) / f"dense{suffix}", target=asked.target)
        make = maker(program, target=asked.target, scheme=asked.scheme, calibrate=[sample])
        search = Search(
            coupling=coupling, cost=cost, scores=paredown.score(program, coupling, "l1"), asked={"latency": asked.fraction},
            make=make, dense=dense, samples=[sample], folder=Path(folder), table=table, seconds=asked.seconds,
            say=lambda line: print(f"{time.monotonic() - start:7.1f} s  {line}", flush=True),
            options={"allocation": asked.allocation, "target": asked.target},
        )  # fmt: skip
        met = meet(search)
        searched_s = time.monotonic() - start
        chosen = make(met.plan, Path(folder) / f"chosen{suffix}")
        ratios, processor = [], []
        files = {"this": chosen, "dense": dense}
        for _ in range(SCHEDULES):
            times = timed_in_turns(files, [sample], seconds=asked.seconds, runs=1000)
            processor.append(times["this"] / times["dense"])
            found = measure(chosen, [sample], baseline=dense, seconds=asked.seconds, runs=1000, memory=False)
            ratios.append(1 / float(found["speedup"].value or 1))
            print(
                f"schedule: {ratios[-1]:.4f} of dense on the wall, {processor[-1]:.4f} of its processor time, {found['latency_ms'].value:.3f} ms",
                flush=True,
            )
    result = {
        "model": name, "weights": "random", "scheme": asked.scheme, "target": asked.target, "asked": asked.fraction,
        "allocation": asked.allocation, "rounds": [dict(r.measured) | {"foreseen": r.foreseen.get("latency")} for r in met.rounds],
        "chosen": met.chosen.number, "ratios": ratios, "median": float(np.median(ratios)), "processor": processor, "processor_median": float(np.median(processor)), "dense_ms": found["baseline_latency_ms"].value,
        "over_asked": float(np.median(ratios)) / asked.fraction - 1, "seconds": searched_s, "machine": found["latency_ms"].machine,
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "onnxruntime", "openvino")},
    }  # fmt: skip
    print(json.dumps(result))
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        with asked.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
