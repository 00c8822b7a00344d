"""From scratch: fresh weights, on which any criterion of pruning at initialisation scores and any schedule trains.

`sparsify(capture(fresh(model), inputs), …, criterion="snip", schedule="one-shot")` is SNIP; "grasp" likewise; SynFlow is
criterion "synflow" with OneShot(rounds=100); RigL is criterion "random", allocation "erk", schedule "rigl".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from paredown.errors import RejectedError
from paredown.plan import Plan
from paredown.program import GraphModel, capture
from paredown.prune.nouns import Pruned
from paredown.prune.remove import prune
from paredown.train.loop import private_copy
from paredown.train.task import kept_randomness, seed_all


def fresh_graph(small: Pruned, seed: int) -> GraphModel:
    """A pruned model that only the graph holds, with new random weights: those of the user's class, cut, for the inputs that are left.

    A graph cannot reset itself. Of every weight [out, in, …] the cut of fresh ones is multiplied by √(inputs before / inputs left), which is how
    torch's own initialisations, and He's, depend on them. Raises RejectedError as `fresh` does, and for low rank.
    """
    if small.plan.ranks or small.plan.drop_modules or not isinstance(small.module, GraphModel):
        fresh(small.module, seed=seed)  # says which parts cannot reset themselves
    dense = fresh(small.program.module, seed=seed)
    program = capture(dense, small.program.inputs)
    made = prune(program, Plan(keep=small.plan.keep), realiser="graph", seed=seed).module
    before = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1 and name in before:
                parameter.mul_((before[name][0].numel() / parameter[0].numel()) ** 0.5)
    assert isinstance(made, GraphModel)
    return made


def fresh(model: nn.Module, *, seed: int = 0, init: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """A copy of a model with new random weights: every part's own `reset_parameters()`, after torch is seeded.

    `init(model)` sets them otherwise (in place): what a class does in its constructor is unknown to `reset_parameters`.
    Raises RejectedError where a parameter belongs to a part that cannot reset itself, and there is no `init`.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    >>> bool((fresh(net)[0].weight == fresh(net)[0].weight).all()), bool((fresh(net)[0].weight == net[0].weight).any())
    (True, False)
    """
    copied = private_copy(model)
    with kept_randomness(), torch.no_grad():
        seed_all(seed)
        if init is not None:
            init(copied)
            return copied
        stuck = []
        for path, part in copied.named_modules():
            reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
            if callable(reset):
                reset()
            else:
                stuck += [f"{path}.{n}" if path else n for n, _ in part.named_parameters(recurse=False)]
    if stuck:
        msg = (
            f"every part with parameters must have reset_parameters(). Got none for {', '.join(stuck[:5])}. "
            "Pass init=…, a function that sets the weights in place, or capture a model that was just made."
        )
        raise RejectedError(msg)
    return copied
