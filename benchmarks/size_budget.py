"""Bytes: a searched size budget beside uniform pruning with uniform INT8, at no more bytes. ResNet-20 on CIFAR-10, ONNX Runtime.

    python benchmarks/size_budget.py --data DIR [--channels 0.42] [--seeds 0 1 2]
    python benchmarks/size_budget.py --show

Both are `paredown compress cifar10` with one criterion (refit), one fit (`reconstruct`), counts in multiples of 4 and one training (3 epochs, distilled,
lr 0.01). The uniform one keeps one share of the inner channels of every block and quantizes all layers to INT8; what its file weighs is the limit
(`budget.size_bytes`) of the searched one of the same seed. Accuracy is of the exported file, on the 10,000 test images, which choose nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

WAYS = ("uniform", "searched")
SHARED = ["threads=1", "prune.align=4", "recover.epochs=3", "dense_twin.enabled=false"]


def ran(way: str, out: Path, data: Path, seed: int, change: list[str]) -> dict[str, Any]:
    """What a run says of its file in codes; a run that is there is continued."""
    changes = [f"data={data}", f"seed={seed}", f"name={way}", *SHARED, *change]
    command = [sys.executable, "-m", "paredown", "compress", "cifar10", "--quiet", "--out", str(out)]
    subprocess.run([*command, *(part for each in changes for part in ("--set", each))], check=True)
    records = [json.loads(line) for line in (out / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    file = next(r for r in records if r["cell"]["stage"] == "int8")
    found = {name: file["measured"][name]["value"] for name in ("bytes", "metric")}
    return {"seed": seed, "way": way, **found, "environment": file["environment"]}


def show(rows: list[dict[str, Any]]) -> None:
    for share in dict.fromkeys(r["channels"] for r in rows):
        of = {w: {r["seed"]: r for r in rows if r["way"] == w and r["channels"] == share} for w in WAYS}
        for way, found in of.items():
            each = ", ".join(f"{r['metric']:.2f} at {r['bytes']:,} B" for _, r in sorted(found.items()))
            print(f"{share} {way:8s} {np.mean([r['metric'] for r in found.values()]):.2f} ({each})")
        seeds = sorted(of["uniform"].keys() & of["searched"].keys())
        ahead = np.array([of["searched"][s]["metric"] - of["uniform"][s]["metric"] for s in seeds])
        if len(seeds) > 1:
            half = stats.t.ppf(0.975, len(ahead) - 1) * ahead.std(ddof=1) / np.sqrt(len(ahead))
            print(f"{share} searched ahead by {ahead.mean():+.2f} ± {half:.2f} points, {len(seeds)} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--channels", type=float, default=0.42)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/size-budget"))
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    journal = Path(__file__).parent / "results/size_budget.jsonl"

    def rows() -> list[dict[str, Any]]:  # anew: other seeds may run beside this one
        return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []

    for seed in [] if given.show else given.seeds:
        limit = 0
        for way in WAYS:
            there = [r for r in rows() if (r["way"], r["seed"], r["channels"]) == (way, seed, given.channels)]
            if not there:
                share = f"prune.levels=[{{channels: {given.channels}}}]"
                change = {
                    "uniform": ["prune.allocation=uniform", share],
                    "searched": ["prune.levels=[]", f"budget.size_bytes={limit}"],
                }[way]
                there = [ran(way, given.runs / f"{given.channels}-{way}-{seed}", given.data, seed, change)]
                with journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"channels": given.channels, **there[0]}) + "\n")
                print(json.dumps({k: v for k, v in there[0].items() if k != "environment"}), flush=True)
            limit = there[0]["bytes"]
    show(rows())


if __name__ == "__main__":
    main()
