"""Zeros in ResNet-20 on CIFAR-10: blocks at 80 %, single weights at 95 %, by the schedules of `paredown.prune.sparsify`.

    python benchmarks/sparse_resnet20.py --data DIR --stage choose    # rates and allocations, on held-out images
    python benchmarks/sparse_resnet20.py --data DIR                   # the cells of the tables, on the test images
    python benchmarks/sparse_resnet20.py --data DIR --stage scratch   # one mask on random, rewound and pretrained weights
    python benchmarks/sparse_resnet20.py --data DIR --stage show      # the tables, from the journal

All: SGD, momentum 0.9, weight decay 1e-4, cosine to 0, batch 128, crop and flip, 11,000 training images, last epoch, batch
norm re-estimated at the end. Distillation is from the dense network itself, T 4, 0.9 KL + 0.1 cross entropy. The density
is the share of the weights of all convolutions and the linear layer that is not zero. Every finished cell is a line of the
journal; an interrupted one continues at its last epoch. Test images choose nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import paredown as pare
from paredown.plan import Plan
from paredown.prune.schedule import Gradual, Iterative, OneShot
from paredown.prune.scratch import fresh
from paredown.prune.sparsify import sparsify
from paredown.recipes import cifar10
from paredown.train import predictor, recover, task_from_module

SCHEDULES = {"one-shot": OneShot(), "iterative": Iterative(rounds=5), "gradual": Gradual()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One training."""

    table: str
    granularity: str
    density: float
    schedule: str
    criterion: str = "l2"
    allocation: str = "global"
    floor: float | None = None
    distil: str = "kl"
    lr: float
    epochs: int = 3
    seed: int = 0
    weights: str = "pretrained"
    """Of table "imposed": what the mask is put on."""

    def key(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# Chosen with --stage choose, on held-out training images (see README.md).
BLOCKS: dict[str, Any] = {"density": 0.2, "schedule": "gradual", "allocation": "erk", "lr": 0.05}
ELEMENTS: dict[str, Any] = {"granularity": "element", "density": 0.05, "lr": 0.05}


def cells(stage: str, seeds: list[int]) -> Iterator[Cell]:
    if stage != "tables":
        yield from {"choose": choices, "choose-elements": element_choices, "scratch": imposed_cells}[stage]()
        return
    for seed in seeds:
        for granularity in ("4x1", "4x4"):
            yield Cell(table="blocks", granularity=granularity, epochs=6, seed=seed, **BLOCKS)
    for seed in seeds:
        for schedule in SCHEDULES:
            yield Cell(table="elements", schedule=schedule, seed=seed, **ELEMENTS)
    for seed in seeds:
        yield Cell(table="elements", schedule="gradual", criterion="movement", seed=seed, **ELEMENTS)
    yield Cell(
        table="elements", schedule="gradual", criterion="random", **ELEMENTS
    )  # what a mask without a reason gives
    # Shares that are given to layers beforehand: scores of two layers are never compared. ERK's, the best held out, with every seed.
    for allocation, at in (("uniform", seeds[:1]), ("erk", seeds)):
        for seed in at:
            for criterion in ("movement", "l2"):
                yield Cell(
                    table="shares", schedule="gradual", criterion=criterion, seed=seed,
                    **{**ELEMENTS, "allocation": allocation},
                )  # fmt: skip
    one_shot = {"density": 0.2, "schedule": "one-shot", "lr": 0.01}
    for change in (
        {"distil": "none"}, {}, {"lr": 0.05}, {"lr": 0.05, "schedule": "gradual"},
        {"lr": 0.05, "schedule": "gradual", "allocation": "erk"},
    ):  # fmt: skip
        yield Cell(table="steps", granularity="4x4", **{**one_shot, **change})


def choices() -> Iterator[Cell]:
    for lr in (0.05, 0.1, 0.02):
        yield Cell(table="choose", granularity="4x4", **{**BLOCKS, "lr": lr})
    yield Cell(table="choose", granularity="4x4", **{**BLOCKS, "allocation": "global", "floor": 0.05})


def element_choices() -> Iterator[Cell]:
    for lr in (0.05, 0.1):
        for schedule in ("one-shot", "gradual"):
            yield Cell(table="choose elements", schedule=schedule, epochs=1, **{**ELEMENTS, "lr": lr})


def imposed_cells() -> Iterator[Cell]:
    one: dict[str, Any] = {"granularity": "element", "density": 0.2, "schedule": "one-shot", "distil": "none"}
    for weights in ("random", "rewound", "pretrained"):
        for lr in (0.01, 0.1):
            yield Cell(table="imposed", lr=lr, weights=weights, **one)


# ------------------------------------------------------------------------------------------------------------------ runs


def run(cell: Cell, data: Path, out: Path) -> dict[str, Any]:
    task = task_from_module(cifar10, data=data)
    dense = task.model()
    checkpoint = out / f"sparse-{digest(cell)}.safetensors"
    began, cpu = time.time(), time.process_time()
    options: dict[str, Any] = {
        "step": task.step, "epochs": cell.epochs, "lr": cell.lr, "seed": cell.seed, "checkpoint": checkpoint,
        "teacher": None if cell.distil == "none" else dense, "progress": told(cell, began),
    }  # fmt: skip
    if cell.table == "imposed":
        small = imposed(cell, dense, task, options)
    else:
        small = sparsify(
            pare.capture(dense, task.inputs()), task.train_batches, density=cell.density, granularity=cell.granularity,
            criterion=cell.criterion, allocation=cell.allocation, floor=cell.floor, schedule=SCHEDULES[cell.schedule],
            **options,
        )  # fmt: skip
    batches = task.choose_batches() if cell.table in ("choose", "choose elements") else cifar10.test_batches(data)
    hits = cifar10.evaluate(predictor(small.module), batches)["accuracy"] > 50
    for path in out.glob(f"{checkpoint.stem}*.safetensors"):
        path.unlink()
    parameters = dict(small.module.named_parameters())
    masked = [n for n, p in parameters.items() if p.dim() >= 2]
    return {
        **cell.key(),
        "images": "held out" if cell.table.startswith("choose") else "test",
        "accuracy": 100 * float(hits.mean()),
        "num_images": len(hits),
        "hits": np.packbits(hits).tobytes().hex(),
        "density_reached": sum(int((parameters[n] != 0).sum()) for n in masked)
        / sum(parameters[n].numel() for n in masked),
        "kept": {n: round(small.plan.masks[n].density, 4) if n in small.plan.masks else 1.0 for n in masked},
        "plan": small.plan.digest,
        "cpu_seconds": round(time.process_time() - cpu),
    }


def imposed(cell: Cell, dense: torch.nn.Module, task: Any, options: dict[str, Any]) -> pare.Pruned:
    """The mask of the pretrained network's largest weights, per layer, on three sets of weights.

    "rewound" are the weights of the random network after one epoch of dense training, as a lottery ticket rewinds.
    """
    program = pare.capture(dense, task.inputs())
    coupling = pare.couple(program)
    scores = pare.score(program, coupling, "l1", granularity="element")
    plan = pare.allocate(coupling, scores, pare.examine(program), pare.Budget(density=cell.density), allocation="erk")
    start = dense
    if cell.weights != "pretrained":
        start = fresh(dense, seed=cell.seed)
    if cell.weights == "rewound":
        whole = recover(
            _Dense(module=start, program=program), task.train_batches, step=task.step, epochs=1, lr=0.1, seed=cell.seed
        )
        start = whole.module
    small = pare.prune(
        pare.capture(start, task.inputs()), Plan(keep={}, masks=plan.masks, made_by={"imposed": "l1, erk"})
    )
    return recover(small, task.train_batches, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Dense:
    module: torch.nn.Module
    program: pare.Program


def told(cell: Cell, began: float) -> Any:
    def tell(state: Any) -> None:
        if state.step == state.steps and state.loss is not None:
            epoch, name = len(state.history), f"{cell.table} {cell.granularity} {cell.schedule} {cell.criterion}"
            print(
                f"{name} seed {cell.seed}: epoch {epoch}, loss {state.loss:.3f}, {time.time() - began:.0f} s",
                flush=True,
            )

    return tell


def digest(cell: Cell) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(cell.key(), sort_keys=True).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------- tables


def show(rows: list[dict[str, Any]]) -> None:
    for table in dict.fromkeys(r["table"] for r in rows):
        print(f"\n{table}")
        for r in (r for r in rows if r["table"] == table):
            parts = [
                r["granularity"],
                f"density {r['density_reached']:.4f}",
                r["schedule"],
                r["criterion"],
                r["allocation"],
            ]
            print(
                "  ", *parts, r["distil"], r["weights"], f"lr {r['lr']:g}", f"{r['epochs']} epochs", f"seed {r['seed']}",
                f"{r['accuracy']:.2f} ({r['images']})",
            )  # fmt: skip
    paired(rows, "gradual", "l2")
    paired(rows, "iterative", "l2")
    paired(rows, "gradual", "movement")


def paired(rows: list[dict[str, Any]], schedule: str, criterion: str) -> None:
    """Against one-shot (movement: against gradual magnitude), mean difference over seeds with its 95 % interval."""
    against = ("one-shot", "l2") if criterion == "l2" else ("gradual", "l2")
    found: dict[tuple[str, str], dict[int, float]] = {}
    for r in rows:
        if r["table"] == "elements":
            found.setdefault((r["schedule"], r["criterion"]), {})[r["seed"]] = r["accuracy"]
    a, b = found.get((schedule, criterion), {}), found.get(against, {})
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < 2:
        return
    d = np.array([a[s] - b[s] for s in seeds])
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    print(f"{schedule} {criterion} - {' '.join(against)}: {d.mean():+.2f} ± {half:.2f} over {len(d)} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--stage", choices=("choose", "choose-elements", "tables", "scratch", "show"), default="tables")
    parser.add_argument("--table", default="", help="only this table")
    parser.add_argument("--criterion", default="", help="only this criterion")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    journal = given.out / "sparse_resnet20.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    if given.stage != "show":
        done = {json.dumps({k: r[k] for k in Cell.__dataclass_fields__}, sort_keys=True) for r in rows}
        for cell in cells(given.stage, given.seeds):
            if json.dumps(cell.key(), sort_keys=True) in done or given.table not in ("", cell.table):
                continue
            if given.criterion not in ("", cell.criterion):
                continue
            row = run(cell, given.data, given.out)
            with journal.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(f"{cell.table}: {row['accuracy']:.2f}", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
