"""Accuracy at equal measured latency: a latency budget beside a budget of MACs and uniform pruning. ResNet-20 on CIFAR-10, float32, ONNX Runtime.

    python benchmarks/equal_latency.py --data DIR [--fraction 0.6] [--seeds 0 1 2]    # plans, files, training, test images
    python benchmarks/equal_latency.py --data DIR --clock                             # the files of the plans again, in five schedules
    python benchmarks/equal_latency.py --data DIR --show

One order of channels (refit), one set of measured sensitivities, one fit (`reconstruct`) and one training (3 epochs of 11,000 images, distilled, lr 0.01
cosine) for all. They differ in what decides how many channels stay:

    latency    the knapsack weighs milliseconds of the layers' tables, and so does one share everywhere; each search stops at a measured file within the
               fraction of the dense file's time; of the two plans the one whose fitted network is nearer to the dense one (KL on held-out images) is taken
    MACs       the knapsack weighs MACs; of budgets from 95 to 20 % the largest whose file is no slower than the one above (by 1 % at most)
    uniform    one share everywhere; found in the same way

The last two may use counts in multiples of 8 or any (`align`), whichever allows more MACs within that time, which favours them. Test images choose nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10_torch_pruning import INNER
from scipy import stats

import paredown as pare
from paredown.allocate import predict
from paredown.measure.layer_tables import Setting
from paredown.measure.turns import timed_in_turns
from paredown.recipes import cifar10
from paredown.search.budgets import Search, meet
from paredown.search.candidates import maker
from paredown.search.layers import latency_table
from paredown.train import predictor, recover, task_from_module

WAYS = ("latency", "MACs", "uniform")
TARGET = "onnxruntime-x86"
AMOUNTS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
SHARES = [*(round(0.9 - 0.05 * i, 2) for i in range(9)), *(round(0.49 - 0.01 * i, 2) for i in range(35))]
SCHEDULES = 5


class Case:
    """The dense network and what all ways share."""

    def __init__(self, data: Path, out: Path) -> None:
        self.task = task_from_module(cifar10, data=data)
        self.out, self.data = out, data
        self.dense = self.task.model()
        self.program = pare.capture(self.dense, self.task.inputs())
        self.coupling, self.cost = pare.couple(self.program), pare.examine(self.program)
        self.make = maker(self.program, target=TARGET, scheme="fp32", calibrate=None)
        self.sample = self.task.inputs()

    def fitted(self, plan: pare.Plan, seed: int) -> pare.Pruned:
        """Pruned, and fitted by least squares."""
        small = pare.prune(self.program, plan)
        return pare.reconstruct(small, self.task.train_batches, step=self.task.step, num_batches=8, seed=seed)

    def moved(self, plan: pare.Plan) -> float:
        """Mean KL from the dense network's answers, nats, on held-out training images, before any training."""
        small, found = self.fitted(plan, 0).module.eval(), []
        with torch.no_grad():
            for batch in self.task.calibration_batches():
                wanted, got = (net(batch).log_softmax(1) for net in (self.dense.eval(), small))
                found.append((wanted.exp() * (wanted - got)).sum(1))
        return float(torch.cat(found).mean())

    def judged(self) -> dict[str, Any]:
        """Scores and sensitivities, of training images alone."""
        torch.manual_seed(0)
        scores = pare.score(
            self.program, self.coupling, "refit", batches=self.task.train_batches(), loss=self.task.step, num_batches=8
        )
        seen = pare.sensitivity(
            self.program, self.coupling, scores, distance="kl", batches=self.task.calibration_batches(), num_batches=6,
            include=INNER, amounts=list(AMOUNTS), repair=True, journal=self.out / "equal-latency-sensitivity.jsonl",
        )  # fmt: skip
        return {"scores": scores, "seen": seen}


def plans(case: Case, fraction: float) -> dict[str, pare.Plan]:
    """One plan of each way, all files as fast as the first."""
    judged = case.judged()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = pare.export(case.program, folder / "dense.onnx", target=TARGET)
        table = latency_table(case.program, case.coupling, case.cost, Setting(target=TARGET, scheme="fp32"))
        search = Search(
            coupling=case.coupling, cost=case.cost, scores=judged["scores"], asked={"latency": fraction}, make=case.make, dense=dense,
            samples=[case.sample], folder=folder, table=table, seconds=6.0, runs=1000, say=print, also=["uniform"], joint=case.moved,
            options={"allocation": "knapsack", "sensitivity": judged["seen"], "include": INNER, "target": TARGET},
        )  # fmt: skip
        first = meet(search).plan
        assert first is not None, "the fraction must ask for something"
        files = {"dense": dense, "latency": case.make(first, folder / "latency.onnx")}
        found = {"latency": first}
        for way in ("MACs", "uniform"):
            found[way] = _as_fast(case, judged, way, files, folder)
    return found


def _as_fast(case: Case, judged: dict[str, Any], way: str, files: dict[str, Any], folder: Path) -> pare.Plan:
    best: tuple[int, pare.Plan] | None = None
    for align in (1, 8):
        tried = set()
        for share in SHARES:
            options = {"allocation": "knapsack", "sensitivity": judged["seen"]} if way == "MACs" else {}
            try:
                plan = pare.allocate(
                    case.coupling, judged["scores"], case.cost, pare.Budget(macs=share), include=INNER, align=align, **options
                )  # fmt: skip
            except pare.ParedownError:
                break
            macs = predict(case.coupling, case.cost, plan)[1]
            if plan.digest in tried or (best is not None and macs <= best[0]):
                continue
            tried.add(plan.digest)
            times = timed_in_turns(
                {"this": case.make(plan, folder / "this.onnx"), **files}, [case.sample], runs=1000, seconds=3.0
            )
            print(
                f"{way} align {align} {share}: {macs:,} MACs, {times['this'] / times['latency']:.3f} of the first way's time",
                flush=True,
            )
            if times["this"] <= 1.01 * times["latency"]:
                best = (macs, plan)
                break
    assert best is not None
    return best[1]


def clock(case: Case, found: dict[str, pare.Plan]) -> dict[str, Any]:
    """Processor time of every file over the dense one's, in each schedule."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"dense": pare.export(case.program, folder / "dense.onnx", target=TARGET)}
        files |= {way: case.make(plan, folder / f"{way}.onnx") for way, plan in found.items()}
        times = [timed_in_turns(files, [case.sample], runs=2000, seconds=12.0) for _ in range(SCHEDULES)]
    return {way: [round(t[way] / t["dense"], 4) for t in times] for way in found} | {
        "dense_ms": float(np.median([t["dense"] for t in times]))
    }


def trained(case: Case, plan: pare.Plan, seed: int) -> np.ndarray:
    task = case.task
    small = case.fitted(plan, seed)
    done = recover(small, task.train_batches, step=task.step, epochs=3, lr=0.01, seed=seed, teacher=case.dense)
    return np.asarray(cifar10.evaluate(predictor(done.module), cifar10.test_batches(case.data))["accuracy"] > 50)


def show(rows: list[dict[str, Any]]) -> None:
    for fraction in dict.fromkeys(r["fraction"] for r in rows if "seed" in r):
        by_way = {
            way: {r["seed"]: r["accuracy"] for r in rows if r.get("way") == way and r["fraction"] == fraction and "seed" in r}
            for way in WAYS
        }  # fmt: skip
        for way, found in by_way.items():
            if not found:
                continue
            macs = next(r["macs"] for r in rows if r.get("way") == way and r["fraction"] == fraction)
            each = ", ".join(f"{v:.2f}" for v in found.values())
            text = f"{fraction} {way:8s} {macs:,} MACs  {np.mean(list(found.values())):.2f} ({each})"
            seeds = sorted(found.keys() & by_way["latency"].keys())
            if way != "latency" and len(seeds) > 1:
                d = np.array([by_way["latency"][s] - found[s] for s in seeds])
                half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
                text += f"  latency ahead by {d.mean():+.2f} ± {half:.2f}"
            print(text)
        for r in rows:
            if r["fraction"] == fraction and "clock" in r:
                print(
                    fraction,
                    {w: (float(np.median(v)) if isinstance(v, list) else v) for w, v in r["clock"].items()},
                    r["clock"],
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--fraction", type=float, default=0.6)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--clock", action="store_true")
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    journal = given.out / "equal_latency.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []

    def keep(row: dict[str, Any]) -> None:
        rows.append({"fraction": given.fraction, **row})
        with journal.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")

    if not given.show:
        case = Case(given.data, given.out)
        of_this = [r for r in rows if r["fraction"] == given.fraction]
        found = {r["way"]: pare.Plan.from_json(json.dumps(r["plan"])) for r in of_this if "plan" in r}
        if not found:
            found = plans(case, given.fraction)
            for way, plan in found.items():
                macs = predict(case.coupling, case.cost, plan)[1]
                keep({"way": way, "plan": json.loads(plan.to_json()), "macs": macs, "dense_macs": case.cost.macs})
        if given.clock:
            keep({"clock": clock(case, found)})
        else:
            for seed in given.seeds:
                for way, plan in found.items():
                    if not any(r.get("way") == way and r.get("seed") == seed for r in of_this):
                        began = time.process_time()
                        hits = trained(case, plan, seed)
                        macs = predict(case.coupling, case.cost, plan)[1]
                        keep({
                            "way": way, "seed": seed, "accuracy": 100 * float(hits.mean()), "macs": macs, "num_images": len(hits),
                            "hits": np.packbits(hits).tobytes().hex(), "cpu_seconds": round(time.process_time() - began),
                        })  # fmt: skip
                        print(given.fraction, way, seed, f"{100 * float(hits.mean()):.2f}", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
