"""prune: take units out of a model and prove it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import nn

from paredown.couple.trace import trace
from paredown.errors import NothingToDo, UsageError, VerificationError
from paredown.plan import Plan
from paredown.program import Program
from paredown.prune.graph import realise_graph
from paredown.prune.module import realise_module
from paredown.prune.nouns import Proof, Pruned
from paredown.prune.prove import own_move, prove
from paredown.prune.removal import Removal, removal

Realiser = Literal["auto", "module", "graph"]


def prune(program: Program, plan: Plan, *, realiser: Realiser = "auto", seed: int = 0) -> Pruned:
    """Remove what the plan does not keep, physically, and prove the result.

    realiser "module" slices the user's own class, "graph" rebuilds the model from the exported graph (it fits every
    model); "auto" takes the module wherever its proof holds. Batch stays dynamic; the result can be trained.

    Raises UsageError (the plan does not fit the model), NothingToDo (it changes nothing) and VerificationError (no
    realiser gives a proven result; exit code 6).

    >>> from paredown.program import capture
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> plan = Plan(keep={"0.weight": {0: (0, 2)}, "0.bias": {0: (0, 2)}, "2.weight": {1: (0, 2)}})
    >>> small = prune(capture(net, torch.zeros(2, 3, 8, 8)), plan)
    >>> small.module[0].weight.shape, small.realiser
    (torch.Size([2, 3, 3, 3]), 'module')
    """
    if realiser not in ("auto", "module", "graph"):
        msg = f"realiser must be auto, module or graph. Got {realiser!r}."
        raise UsageError(msg)
    gone = removal(trace(program), plan)
    if not gone.gone.any():
        msg = "a plan must remove something. Got one that keeps every index."
        raise NothingToDo(msg)
    plan = dataclasses.replace(plan, keep=gone.keep)
    if realiser != "graph":
        done = _by_module(program, plan, gone, seed)
        if isinstance(done, Pruned):
            return done
        if realiser == "module":
            raise done
    module = realise_graph(program, gone)
    return _pruned(program, plan, module, "graph", prove(program, module, gone, seed=seed))


def _by_module(program: Program, plan: Plan, gone: Removal, seed: int) -> Pruned | VerificationError:
    module = realise_module(program, gone)
    if module is None:
        return VerificationError("the module realiser needs the user's own class. Got a model that was rebuilt from graphs.")
    try:
        proof = prove(program, module, gone, seed=seed)
    except VerificationError as error:
        return error
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        # The class fixes a size in its code (C // num_heads, nn.MultiheadAttention): its own forward refuses.
        refused = VerificationError(f"the class must follow its new sizes. Got {type(error).__name__}: {error}. Use the graph realiser.")
        refused.__cause__ = error
        return refused
    return _pruned(program, plan, module, "module", proof)


def _pruned(program: Program, plan: Plan, module: nn.Module, realiser: Literal["module", "graph"], proof: Proof) -> Pruned:
    proof = dataclasses.replace(proof, own_move=own_move(program, module))
    return Pruned(module=module, program=program, plan=plan, realiser=realiser, proof=proof)
