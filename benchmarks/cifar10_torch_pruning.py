"""ResNet-20 on CIFAR-10 at half the MACs: paredown beside Torch-Pruning, same data, steps, loop and seeds, last epoch.

    python benchmarks/cifar10_torch_pruning.py --data DIR [--epochs 3] [--seeds 0 1 2] [--out results.jsonl]

Torch-Pruning 1.6.1 treats the zero padding of option-A shortcuts as element-wise and would tie the wrong channels, so
it gets its best corrected use: the residual stream is left alone ("inner"), group magnitude (L2) ranked globally, in
many small steps until the MACs are reached, as its README does. Both tools are then trained by one loop on
the same batches: SGD, momentum 0.9, cosine to 0, crop and flip, with and without distillation from the dense network.
MACs are those of convolutions and linear layers. Every finished cell is a line of the journal; a second call continues.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import paredown as pare
from paredown.recipe import load_recipe
from paredown.recipes import cifar10
from paredown.train import fit, predictor, reestimate_batch_norm, task_from_module
from paredown.train.task import seed_all


def macs_of(module: nn.Module, inputs: torch.Tensor) -> int:
    return pare.examine(pare.capture(module, inputs, train=False)).macs


def ours(dense: nn.Module, task: Any, recipe: Any, seed: int) -> nn.Module:
    """The shipped recipe's level: score, allocate, prune, proof."""
    program = pare.capture(dense, task.inputs())
    coupling, cost = pare.couple(program), pare.examine(program)
    options = recipe.prune
    seed_all(seed)
    scores = pare.score(
        program,
        coupling,
        options.criterion,
        batches=task.train_batches() if options.criterion == "taylor" else None,
        loss=task.step,
        num_batches=options.score_batches,
        seed=seed,
    )
    budget = pare.Budget(**recipe.prune.levels[0].model_dump(exclude_none=True))
    plan = pare.allocate(
        coupling,
        scores,
        cost,
        budget,
        allocation=options.allocation,
        include=options.include,
        exclude=options.exclude,
        align=options.align,
        floor=options.floor,
    )
    return pare.prune(program, plan).module


def torch_pruning(dense: nn.Module, task: Any, target_macs: int) -> nn.Module:
    """BasePruner with group magnitude on the inner channels, ranked globally, in small steps until the MACs are reached."""
    import torch_pruning as tp

    model, inputs = copy.deepcopy(dense).eval(), task.inputs()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    pixels: dict[str, int] = {}
    hooks = [
        m.register_forward_hook(
            lambda _m, _i, out, n=n: pixels.__setitem__(n, out[0, 0].numel() if out.dim() == 4 else 1)
        )
        for n, m in layers.items()
    ]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.95,
        max_pruning_ratio=0.95,
        iterative_steps=400,
        ignored_layers=[m for n, m in layers.items() if not (n.startswith("layer") and n.endswith(".conv1"))],
    )
    for _ in range(400):
        if sum(m.weight.numel() * pixels[n] for n, m in layers.items()) <= target_macs:
            return model
        pruner.step()
    msg = "Torch-Pruning did not reach the MACs"
    raise RuntimeError(msg)


def trained(
    module: nn.Module, dense: nn.Module, task: Any, recipe: Any, seed: int, epochs: int, distil: str
) -> nn.Module:
    r = recipe.recover
    module = fit(
        module,
        task.train_batches,
        task.step,
        epochs=epochs,
        lr=r.lr,
        momentum=r.momentum,
        weight_decay=r.weight_decay,
        seed=seed,
        teacher=dense if distil == "kl" else None,
        distil=distil,
        temperature=r.temperature,
        distil_weight=r.distil_weight,
    ).module
    return reestimate_batch_norm(
        module, task.train_batches, task.inputs(), step=task.step, num_batches=r.batch_norm_batches, seed=seed
    )


def cell(task: Any, recipe: Any, tool: str, distil: str, seed: int, epochs: int) -> dict[str, Any]:
    start = time.perf_counter()
    dense = task.model()
    small = ours(dense, task, recipe, seed)
    target = macs_of(small, task.inputs())
    if tool == "torch-pruning":
        small = torch_pruning(dense, task, target)
    module = trained(small, dense, task, recipe, seed, epochs, distil)
    accuracy = float(np.mean(task.evaluate(predictor(module))["accuracy"]))
    return {
        "tool": tool,
        "distil": distil,
        "seed": seed,
        "epochs": epochs,
        "macs": macs_of(module, task.inputs()),
        "parameters": sum(p.numel() for p in module.parameters()),
        "accuracy": accuracy,
        "held_out": float(np.mean(task.choose(predictor(module))["accuracy"])),
        "seconds": time.perf_counter() - start,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| tool | distillation | MACs | accuracy, mean | each seed |", "|---|---|---|---|---|"]
    for distil in ("none", "kl"):
        for tool in ("paredown", "torch-pruning"):
            found = sorted((r for r in rows if r["tool"] == tool and r["distil"] == distil), key=lambda r: r["seed"])
            if found:
                values = [r["accuracy"] for r in found]
                each = ", ".join(f"{v:.2f}" for v in values)
                lines.append(f"| {tool} | {distil} | {found[0]['macs'] / 1e6:.2f} M | {np.mean(values):.2f} | {each} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tools", nargs="+", default=["paredown", "torch-pruning"])
    parser.add_argument("--distil", nargs="+", default=["none", "kl"])
    parser.add_argument("--set", nargs="*", default=[], help="recipe overrides")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_torch_pruning.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe, task = load_recipe("cifar10", args.set), task_from_module(cifar10, data=args.data)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for seed in args.seeds:
        for distil in args.distil:
            for tool in args.tools:
                key = {"tool": tool, "distil": distil, "seed": seed, "epochs": args.epochs}
                if any(key.items() <= r.items() for r in rows):
                    continue
                rows.append(cell(task, recipe, tool, distil, seed, args.epochs))
                with args.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
