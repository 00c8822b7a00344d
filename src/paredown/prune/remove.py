"""prune: take units out of a model and prove it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import nn

from paredown.couple.trace import trace
from paredown.errors import NothingToDo, UsageError, VerificationError
from paredown.plan import Plan
from paredown.program import Program
from paredown.prune.graph import realise_graph
from paredown.prune.module import Attributes, realise_module
from paredown.prune.nouns import Pruned
from paredown.prune.prove import Reference, own_move, prove, reference, same_in_train
from paredown.prune.removal import Removal, removal

Realiser = Literal["auto", "module", "graph"]


def prune(program: Program, plan: Plan, *, realiser: Realiser = "auto", seed: int = 0) -> Pruned:
    """Remove what the plan does not keep, physically, and prove the result.

    realiser "module" slices the user's own class, "graph" rebuilds the model from the exported graph (it fits every
    model); "auto" takes the module wherever its proof holds. Batch stays dynamic; the result can be trained.

    Raises UsageError (the plan does not fit the model), NothingToDo (it changes nothing) and VerificationError (no
    realiser gives a proven result; exit code 6).

    >>> import torch; from torch import nn; from paredown.program import capture
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
    attempt = _Attempt(program=program, plan=plan, gone=gone, known=reference(program, gone, seed=seed), seed=seed)
    if realiser == "module" or (realiser == "auto" and _trains_as_seen(program)):
        done = _by_module(attempt)
        if isinstance(done, Pruned):
            return done
        if realiser == "module":
            raise done
    return _proven(attempt, realise_graph(program, gone), "graph")


def _trains_as_seen(program: Program) -> bool:
    """Whether the user's class can be trusted in train mode.

    Without a train capture, parameters that the eval graph does not use (an auxiliary head) may read what leaves.
    """
    if program.train_graph is not None:
        return True
    run = trace(program)
    return all(run.storage[name] in run.eval_names for name in program.eval_graph.graph_signature.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    program: Program
    plan: Plan
    gone: Removal
    known: Reference
    seed: int


def _by_module(attempt: _Attempt) -> Pruned | VerificationError:
    """The user's class as it is, then with sizes set by value: an attribute that equals a size by chance stays alone."""
    refused = VerificationError(
        "the module realiser needs the user's own class. Got a model that was rebuilt from graphs."
    )
    for by_value in (False, True):
        realised = realise_module(attempt.program, attempt.gone, by_value=by_value)
        if realised is None:
            return refused
        module, attributes = realised
        try:
            pruned = _proven(attempt, module, "module", attributes)
            graph = realise_graph(attempt.program, attempt.gone) if by_value else None
            if graph is None or same_in_train(attempt.program, module, graph, attempt.known, seed=attempt.seed):
                return pruned
            refused = VerificationError(
                "the class must train as its graph does. Got other outputs in train mode. Use the graph realiser."
            )
        except VerificationError as error:
            refused = error
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            # The class fixes a size in its code (C // num_heads, nn.MultiheadAttention): its own forward refuses.
            msg = f"the class must follow its new sizes. Got {type(error).__name__}: {error}. Use the graph realiser."
            refused = VerificationError(msg)
            refused.__cause__ = error
    return refused


def _proven(
    attempt: _Attempt, module: nn.Module, realiser: Literal["module", "graph"], attributes: Attributes | None = None
) -> Pruned:
    proof = prove(attempt.program, module, attempt.gone, attempt.known, seed=attempt.seed)
    proof = dataclasses.replace(proof, own_move=own_move(attempt.program, module))
    return Pruned(
        module=module,
        program=attempt.program,
        plan=attempt.plan,
        realiser=realiser,
        proof=proof,
        attributes=attributes or {},
    )


def compose(first: Pruned, second: Pruned, *, seed: int = 0) -> Pruned:
    """Two levels as one result of the first program. `second` was pruned from a capture of `first.module`.

    The composed plan is proven again, on the first program; where a unit of the second level is finer than one of the
    first (channels inside the one head that was left), each level keeps its own proof and the second one is reported.
    So it is with ranks: the result keeps its `stages`, because later plans name factors.
    """
    if first.plan.ranks or second.plan.ranks:
        return _in_stages(first, second)
    plan = first.plan.then(second.plan)
    try:
        gone = removal(trace(first.program), plan)
        proof = prove(first.program, second.module, gone, reference(first.program, gone, seed=seed), seed=seed)
    except UsageError:
        proof = second.proof
    attributes = {
        p: {**first.attributes.get(p, {}), **second.attributes.get(p, {})}
        for p in {*first.attributes, *second.attributes}
    }
    return Pruned(
        module=second.module,
        program=first.program,
        plan=plan,
        realiser=second.realiser,
        proof=dataclasses.replace(proof, own_move=own_move(first.program, second.module)),
        attributes=attributes,
    )


def _in_stages(first: Pruned, second: Pruned) -> Pruned:
    return Pruned(
        module=second.module,
        program=first.program,
        plan=first.plan.then(second.plan),
        realiser=second.realiser,
        proof=dataclasses.replace(second.proof, own_move=own_move(first.program, second.module)),
        attributes=second.attributes,
        stages=first.every_stage() + second.every_stage(),
    )
