"""Which mask to start from: imposed masks, pruning at initialisation and sparse training, on the digits that ship with scikit-learn.

    python benchmarks/sparse_digits.py --stage imposed    # one mask on random, rewound and pretrained weights × learning rates
    python benchmarks/sparse_digits.py --stage scratch    # fixed masks at initialisation, SET and RigL
    python benchmarks/sparse_digits.py --stage show

The source talk says that a mask imposed on a pretrained model does worse than on a fresh one, "because of its minimum and its
optimizer settings". Here the same mask (largest weights of the pretrained network, ERK densities) is put on the random weights
that this network began with, on the same weights after one epoch (rewound), and on the trained ones; each with several learning
rates. SGD, momentum 0.9, weight decay 1e-3, cosine to 0, 540 test images, last epoch, 3 seeds. Every cell is a line of the journal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import paredown as pare
from paredown.prune import OneShot, Regrowth, fresh, sparsify
from paredown.recipes import digits
from paredown.train import fit, predictor, recover
from paredown.train.loop import Hook

WIDTH = 16
WAYS: dict[str, dict[str, Any]] = {
    "random": {"criterion": "random", "schedule": "one-shot"},
    "magnitude": {"criterion": "l1", "schedule": "one-shot"},
    "snip": {"criterion": "snip", "schedule": "one-shot", "allocation": "global"},
    "grasp": {"criterion": "grasp", "schedule": "one-shot", "allocation": "global"},
    "synflow": {"criterion": "synflow", "schedule": OneShot(rounds=100), "allocation": "global"},
    "set": {"criterion": "random", "schedule": Regrowth(by="random", every=20)},
    "rigl": {"criterion": "random", "schedule": Regrowth(every=20)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One training."""

    table: str
    what: str
    """Weights that the mask is put on, or the way to a mask."""
    density: float
    lr: float
    epochs: int
    seed: int


def cells(stage: str) -> Iterator[Cell]:
    for seed in (0, 1, 2):
        if stage == "imposed":
            for lr in (0.01, 0.05, 0.2):
                for what in ("random", "rewound", "pretrained"):
                    yield Cell(table="imposed", what=what, density=0.1, lr=lr, epochs=8, seed=seed)
        else:
            for density in (0.1, 0.02):
                for what in WAYS:
                    yield Cell(table="scratch", what=what, density=density, lr=0.1, epochs=12, seed=seed)


def training(cell: Cell) -> dict[str, Any]:
    return {"step": digits.step, "epochs": cell.epochs, "lr": cell.lr, "weight_decay": 1e-3, "seed": cell.seed}


def run(cell: Cell) -> pare.Pruned:
    start = digits.model(WIDTH, seed=cell.seed)
    if cell.table == "imposed":
        return imposed(cell, start)
    program = pare.capture(fresh(start, seed=cell.seed), digits.inputs())
    return sparsify(
        program, digits.train_batches, density=cell.density, floor=0.0, score_batches=8,
        **{"allocation": "erk", **WAYS[cell.what]}, **training(cell),
    )  # fmt: skip


def imposed(cell: Cell, start: nn.Module) -> pare.Pruned:
    """The mask of the trained network, on what it was, on what it was after an epoch, or on what it became."""
    rewound: list[dict[str, torch.Tensor]] = []

    def remember(state: Any) -> None:
        if state.epoch == 1:
            rewound.append({n: t.detach().clone() for n, t in state.module.state_dict().items()})

    dense = fit(
        start, digits.train_batches, digits.step, epochs=12, lr=0.1, weight_decay=1e-3, seed=cell.seed,
        hooks=[Hook(name="remember", after_epoch=remember)],
    ).module  # fmt: skip
    program = pare.capture(dense, digits.inputs())
    coupling = pare.couple(program)
    scores = pare.score(program, coupling, "l1", granularity="element")
    plan = pare.allocate(coupling, scores, pare.examine(program), pare.Budget(density=cell.density), allocation="erk")
    if cell.what == "rewound":
        start.load_state_dict(rewound[0])
    onto = dense if cell.what == "pretrained" else start
    return recover(pare.prune(pare.capture(onto, digits.inputs()), plan), digits.train_batches, **training(cell))


def show(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple[Any, ...], list[float]] = {}
    for r in rows:
        groups.setdefault((r["table"], r["density"], r["what"], r["lr"]), []).append(r["accuracy"])
    for (table, density, what, lr), found in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1])):
        spread = f" ± {np.std(found, ddof=1):.2f}" if len(found) > 1 else ""
        print(f"{table}  density {density:g}  {what:10}  lr {lr:g}  {np.mean(found):.2f}{spread}  n={len(found)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--stage", choices=("imposed", "scratch", "show"), required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    journal = given.out / "sparse_digits.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    keys = [{k: r[k] for k in Cell.__dataclass_fields__} for r in rows]
    for cell in cells(given.stage) if given.stage != "show" else ():
        if dataclasses.asdict(cell) in keys:
            continue
        small = run(cell)
        hits = digits.evaluate(predictor(small.module), digits.test_batches())["accuracy"] > 50
        masks = {n: m.density for n, m in small.plan.masks.items()}
        row = {**dataclasses.asdict(cell), "accuracy": 100 * float(hits.mean()), "num_images": len(hits), "kept": masks}
        with journal.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(cell.table, cell.what, cell.density, cell.lr, cell.seed, f"{row['accuracy']:.2f}", flush=True)
    show(rows)


if __name__ == "__main__":
    main()
