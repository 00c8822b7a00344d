"""What every criterion costs on ResNet-50 beyond its passes through the model: seconds and peak memory.

    python benchmarks/criteria_resnet50.py [--granularity channel] [--criteria l1 taylor …] [--batch 2]

Each criterion runs in a process of its own on one thread; seconds are of the processor, which other programs do not stretch
by much. "passes" is the same number of forward or backward passes
without any criterion; "beyond" is the rest. Memory is the rise of the resident set's high-water mark during the call,
as a multiple of the model's parameters plus the batch. Random weights: only cost is measured here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

GRADIENTS = {"taylor": 1, "taylor2": 0, "fisher": 0, "snip": 1}
"""Backward passes per batch; 0: one per sample."""
FORWARD = ("apoz", "mean_activation", "wanda", "obs")


def main() -> None:
    """One line per criterion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--criteria", nargs="*")
    parser.add_argument("--granularity", default="channel")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.criteria[0], options.granularity, options.batch)))
        return
    from paredown.score import TABLE

    print(
        f"{'criterion':<18}{'total s':>9}{'passes s':>9}{'beyond s':>9}{'allocate s':>11}{'peak MB':>9}{'x model':>9}"
    )
    for criterion in options.criteria or TABLE:
        command = [sys.executable, __file__, "--one", "--criteria", criterion, "--granularity", options.granularity]
        done = subprocess.run([*command, "--batch", str(options.batch)], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{criterion:<18}{done.stderr.strip().splitlines()[-1][:120]}")
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        print(
            f"{criterion:<18}{row['total']:>9.2f}{row['passes']:>9.2f}{row['total'] - row['passes']:>9.2f}"
            f"{row['allocate']:>11.2f}{row['peak_mb']:>9.0f}{row['times']:>9.2f}",
            flush=True,
        )


def measured(criterion: str, granularity: str, size: int) -> dict[str, float]:
    """Seconds and memory of one criterion in this process."""
    import torch

    import paredown as pare
    from paredown.models import load_model

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load_model("torchvision:resnet50")[0].eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    batch = (torch.randn(size, 3, 224, 224), torch.arange(size))
    program = pare.capture(model, batch[0], train=False)
    coupling, cost = pare.couple(program), pare.examine(program)

    def loss(net: Any, given: Any) -> Any:
        return torch.nn.functional.cross_entropy(net(given[0]), given[1])

    plain_s, plain_mb = plain(criterion, program.module, batch, loss)
    given = {"batches": [batch], "loss": loss} if criterion in (*GRADIENTS, *FORWARD, "grasp", "hessian_trace") else {}
    before = resident("VmRSS")
    reset_peak()
    began = time.process_time()
    scores = pare.score(program, coupling, criterion, granularity=granularity, **given)
    total = time.process_time() - began
    peak = resident("VmHWM") - before - plain_mb
    began = time.process_time()
    budget = pare.Budget(density=0.2) if scores.by_cell else pare.Budget(macs=0.5)
    if ":" in granularity:
        pare.allocate(coupling, scores, cost)
    else:
        pare.allocate(coupling, scores, cost, budget, allocation="global")
    allocated = time.process_time() - began
    weights_mb = (sum(p.numel() * 4 for p in model.parameters()) + batch[0].numel() * 4) / 2**20
    return {"total": total, "passes": plain_s, "allocate": allocated, "peak_mb": peak, "times": peak / weights_mb}


def plain(criterion: str, model: Any, batch: Any, loss: Any) -> tuple[float, float]:
    """Seconds and memory of the passes alone, the second time (the first warms up)."""
    import torch

    took, rise = 0.0, 0.0
    backward = GRADIENTS.get(criterion)
    if backward is None and criterion not in FORWARD:
        return took, rise
    one_by_one = [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(len(batch[0]))]
    for _ in range(2):
        before = resident("VmRSS")
        reset_peak()
        began = time.process_time()
        for part in one_by_one if backward == 0 else [batch]:
            if backward is None:
                with torch.no_grad():
                    loss(model, part)
            else:
                loss(model, part).backward()
        took = time.process_time() - began
        grads = sum(p.numel() * 4 for p in model.parameters() if p.grad is not None) / 2**20
        for parameter in model.parameters():
            parameter.grad = None
        rise = max(resident("VmHWM") - before - grads, 0.0)
    return took, rise


def reset_peak() -> None:
    """Start the high-water mark anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(which: str) -> float:
    """VmRSS or VmHWM in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    raise LookupError(which)


if __name__ == "__main__":
    main()
