"""What every criterion costs on ResNet-50 beyond its passes through the model: seconds and peak memory.

    python benchmarks/criteria_resnet50.py [--granularity channel element] [--criteria l1 taylor …] [--batch 2]

The model is captured once; each criterion then runs in a forked process of its own on one thread. Seconds are of the
processor, which other programs do not stretch by much. "passes" is the time of as many forward or backward passes
without any criterion; "score" is the rest of the scoring, "allocate" a global ranking of the scores. Memory is the rise of
the resident set's high-water mark beyond that of the passes, as a multiple of the model's parameters plus the batch.
Random weights: only cost is measured here. Linux.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORWARD = ("apoz", "mean_activation", "wanda", "obs", "refit")
BACKWARD = ("taylor", "snip")
PER_SAMPLE = ("taylor2", "fisher")
DOUBLE = {"grasp": 1, "hessian_trace": 4}
"""Products with a Hessian per batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """The captured model and one batch."""

    model: Any
    program: Any
    coupling: Any
    cost: Any
    batch: Any

    @property
    def megabytes(self) -> float:
        """Of parameters and batch."""
        return (sum(p.numel() * 4 for p in self.model.parameters()) + self.batch[0].numel() * 4) / 2**20


def main() -> None:
    """One line per criterion and granularity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criteria", nargs="*")
    parser.add_argument("--granularity", nargs="+", default=["channel"])
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    here = captured(options.batch)
    from paredown.score import TABLE

    heads = ("passes s", "score s", "allocate s", "beyond s", "peak MB", "x model")
    print(f"{'criterion':<18}{'cells':<10}" + "".join(f"{h:>12}" for h in heads), flush=True)
    for granularity in options.granularity:
        for criterion in options.criteria or TABLE:
            row = apart(lambda c=criterion, g=granularity: measured(here, c, g))
            text = row.get("error") or "".join(f"{row[h]:>12.2f}" for h in heads)
            print(f"{criterion:<18}{granularity:<10}{text}", flush=True)


def captured(size: int) -> Here:
    """ResNet-50 with random weights and scales that differ."""
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
    return Here(model=model, program=program, coupling=pare.couple(program), cost=pare.examine(program), batch=batch)


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns in a forked process: its memory is its own, and its peak starts low."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            found = work()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:140]}
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process was killed"}


def measured(here: Here, criterion: str, granularity: str) -> dict[str, float]:
    """Seconds and memory of one criterion in this process."""
    import torch

    import paredown as pare

    calls = [0]

    def loss(net: Any, given: Any) -> Any:
        calls[0] += 1
        return torch.nn.functional.cross_entropy(net(given[0]), given[1])

    once, plain_mb = passes(here, criterion, loss)
    reads = criterion in (*FORWARD, *BACKWARD, *PER_SAMPLE, *DOUBLE)
    given = {"batches": [here.batch], "loss": loss} if reads else {}
    calls[0], before = 0, settled()
    began = time.process_time()
    scores = pare.score(here.program, here.coupling, criterion, granularity=granularity, **given)
    took = time.process_time() - began
    spent = once * calls[0] if criterion in FORWARD else once  # refit goes over the batches several times
    began = time.process_time()
    if ":" in granularity:
        pare.allocate(here.coupling, scores, here.cost)
    else:
        budget = pare.Budget(density=0.2) if scores.by_cell else pare.Budget(macs=0.5)
        pare.allocate(here.coupling, scores, here.cost, budget, allocation="global")
    allocated = time.process_time() - began
    peak = resident("VmHWM") - before - plain_mb
    return {
        "passes s": spent, "score s": took - spent, "allocate s": allocated, "beyond s": took - spent + allocated,
        "peak MB": peak, "x model": peak / here.megabytes,
    }  # fmt: skip


def passes(here: Here, criterion: str, loss: Any) -> tuple[float, float]:
    """Seconds and memory of the passes alone, the second time (the first warms up)."""
    model = copy.deepcopy(here.model) if criterion in ("grasp", "synflow") else here.program.module
    if criterion == "grasp":
        model.train()
    if criterion == "synflow":
        model.double()
    took, rise = 0.0, 0.0
    for _ in range(2):
        before = settled()
        began = time.process_time()
        through(here, criterion, model, loss)
        took = time.process_time() - began
        grads = sum(p.numel() * p.element_size() for p in model.parameters() if p.grad is not None) / 2**20
        for parameter in model.parameters():
            parameter.grad = None
        rise = max(resident("VmHWM") - before - grads, 0.0)
    return took, rise


def through(here: Here, criterion: str, model: Any, loss: Any) -> None:
    """The passes of one criterion over one batch, one forward pass where it makes several."""
    import torch

    images, labels = here.batch
    if criterion in FORWARD:
        with torch.no_grad():
            loss(model, here.batch)
    if criterion in (*BACKWARD, "grasp"):
        loss(model, here.batch).backward()
    if criterion in PER_SAMPLE:
        for i in range(len(images)):
            loss(model, (images[i : i + 1], labels[i : i + 1])).backward()
    if criterion == "synflow":
        model(torch.ones_like(images, dtype=torch.float64)).sum().backward()
    if criterion in DOUBLE:
        parameters = list(model.parameters())
        slopes = torch.autograd.grad(loss(model, here.batch), parameters, create_graph=True)
        for left in reversed(range(DOUBLE[criterion])):
            torch.autograd.grad(sum(g.sum() for g in slopes), parameters, retain_graph=left > 0)


def settled() -> float:
    """The resident set in MiB once what was freed went back to the system; the high-water mark starts anew (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(which: str) -> float:
    """VmRSS or VmHWM in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    raise LookupError(which)


if __name__ == "__main__":
    sys.exit(main())
