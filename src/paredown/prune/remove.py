"""prune: take units out of a model and prove it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import nn

from paredown.couple.trace import trace
from paredown.errors import NothingToDo, UsageError, VerificationError, must_be
from paredown.plan import Plan
from paredown.program import Program, capture
from paredown.prune.dead_units import by_first_name, condensed
from paredown.prune.depth import drop, left_out
from paredown.prune.graph import realise_graph
from paredown.prune.mask import carry_out, fitting, masked, only_parameters, refuse_empty
from paredown.prune.modes import trains_as_it_runs
from paredown.prune.module import Attributes, realise_module
from paredown.prune.nouns import Proof, Pruned
from paredown.prune.prove import Reference, own_move, prove, reference, same_in_train
from paredown.prune.removal import Removal, removal
from paredown.train.masks import check_zeros

Realiser = Literal["auto", "module", "graph"]


def prune(
    program: Program, plan: Plan, *, realiser: Realiser = "auto", condense: bool | None = None, seed: int = 0
) -> Pruned:
    """Remove what the plan does not keep, physically, set what it masks to zero, and prove the result.

    realiser "module" slices the user's own class, "graph" rebuilds the model from the exported graph (it fits every
    model); "auto" takes the module wherever its proof holds. Batch stays dynamic; the result can be trained.
    Modules to drop go first, then units, then masked weights.

    Units that masks leave without any weight leave physically with `condense` (see condense), by default where the
    masks are of rows or columns; `Pruned.notes` says what left and what is *simulated*: a dense runtime multiplies by
    the zeros. Masks alone are proven on the user's weights: the zeros are there and no other bit changed.

    Raises UsageError (the plan does not fit the model), NothingToDo (it changes nothing) and VerificationError (no
    realiser gives a proven result; exit code 6).

    >>> import torch; from torch import nn; from paredown.program import capture
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> plan = Plan(keep={"0.weight": {0: (0, 2)}, "0.bias": {0: (0, 2)}, "2.weight": {1: (0, 2)}})
    >>> small = prune(capture(net, torch.zeros(2, 3, 8, 8)), plan)
    >>> small.module[0].weight.shape, small.realiser
    (torch.Size([2, 3, 3, 3]), 'module')
    """
    must_be("program", program, Program, fix="Use paredown.capture(model, inputs).")
    must_be("plan", plan, Plan, fix="Use paredown.allocate, or Plan(keep=…).")
    if realiser not in ("auto", "module", "graph"):
        msg = f"realiser must be auto, module or graph. Got {realiser!r}."
        raise UsageError(msg)
    if plan.ranks:
        msg = f"a plan for prune must have no ranks. Got ranks of {', '.join(list(plan.ranks)[:3])}. Use factorize(program, plan) for them."
        raise UsageError(msg)
    if plan.drop_modules:
        return _without_modules(program, plan, realiser, condense, seed)
    notes: tuple[str, ...] = ()
    if plan.masks:
        refuse_empty(plan.masks)
        plan = by_first_name(program, plan)
        structured = any(m.granularity in ("row", "column") for m in plan.masks.values())
        if structured if condense is None else condense:
            if not plan.keep:
                fitting(only_parameters(program), plan.masks)
            plan, notes = condensed(program, plan)
        if not plan.keep:
            alone = masked(program, plan, realiser=realiser)
            return dataclasses.replace(alone, notes=notes + alone.notes)
    gone = removal(trace(program), plan)
    if not gone.gone.any():
        if plan.masks:
            return masked(program, dataclasses.replace(plan, keep={}), realiser=realiser)
        msg = "a plan must remove something. Got one that keeps every index."
        raise NothingToDo(msg)
    plan = dataclasses.replace(plan, keep=gone.keep)
    pruned = dataclasses.replace(_realised(program, plan, gone, realiser, seed), notes=notes)
    return carry_out(pruned, plan.masks) if plan.masks else pruned


def condense(pruned: Pruned, *, seed: int = 0) -> Pruned:
    """A masked (and trained) model without the units that its masks leave no weight of; proven, composed with what was.

    What is removed and what stays *simulated* is in `Pruned.notes`. See prune.dead_units for when a unit is dead.
    Raises UsageError (no masks) and NothingToDo (no unit is dead; with what stays and why).

    >>> import numpy as np, torch; from torch import nn; from paredown.program import capture; from paredown.plan import Mask
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> kept = np.ones((6, 4), bool); kept[[1, 4]] = False
    >>> program = capture(net, torch.zeros(2, 4))
    >>> held = prune(program, Plan(keep={}, masks={"0.weight": Mask.of(kept, "row")}), condense=False)
    >>> held.module[0].weight.shape, condense(held).module[0].weight.shape
    (torch.Size([6, 4]), torch.Size([4, 4]))
    """
    must_be("pruned", pruned, Pruned, fix="Use paredown.prune(program, plan).")
    if not pruned.plan.masks:
        msg = "condense must be given a model with masks. Got a plan without."
        raise UsageError(msg)
    check_zeros(pruned.module, pruned.plan.masks)
    program = capture(pruned.module, pruned.program.inputs)
    plan = Plan(keep={}, masks=pruned.plan.masks, made_by={"verb": "condense"})
    smaller, notes = condensed(program, plan)
    if not smaller.keep:
        msg = f"condense must find units without weights. Got none: {'; '.join(notes[:5])}."
        raise NothingToDo(msg)
    second = prune(program, smaller, condense=False, seed=seed)
    return dataclasses.replace(compose(pruned, second, seed=seed), notes=pruned.notes + notes)


def _without_modules(program: Program, plan: Plan, realiser: Realiser, condense: bool | None, seed: int) -> Pruned:
    """Modules first, then what the plan says of the rest; names and axes are those of the dense model."""
    shallow = drop(program, plan.drop_modules, realiser=realiser, seed=seed)
    gone = left_out(program, plan.drop_modules)
    rest = dataclasses.replace(
        plan,
        drop_modules=(),
        keep={n: a for n, a in plan.keep.items() if n not in gone},
        masks={n: m for n, m in plan.masks.items() if n not in gone},
    )
    first = dataclasses.replace(shallow, plan=dataclasses.replace(plan, keep={}, masks={}))
    if not rest.keep and not rest.masks:
        return dataclasses.replace(first, plan=dataclasses.replace(plan, keep={}, masks={}))
    second = prune(capture(shallow.module, program.inputs), rest, realiser=realiser, condense=condense, seed=seed)
    both = compose(first, second, seed=seed)
    return dataclasses.replace(both, plan=dataclasses.replace(plan, keep=second.plan.keep, masks=second.plan.masks))


def _realised(program: Program, plan: Plan, gone: Removal, realiser: Realiser, seed: int) -> Pruned:
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
    apart = not trains_as_it_runs(attempt.program)
    for by_value in (False, True):
        realised = realise_module(attempt.program, attempt.gone, by_value=by_value)
        if realised is None:
            return refused
        module, attributes = realised
        try:
            pruned = _proven(attempt, module, "module", attributes)
            graph = realise_graph(attempt.program, attempt.gone) if by_value or apart else None
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

    The composed plan is proven again, on the first program. Where a unit of the second level is finer than one of the
    first (channels inside the one head that was left) the first program cannot say it: the result keeps its `stages`,
    which `load` replays one by one; each has its own proof and the second one is reported. So it is with ranks, because
    later plans name factors.
    """
    for name, level in (("first", first), ("second", second)):
        must_be(name, level, Pruned, fix="Use paredown.prune(program, plan).")
    if any(p.ranks or p.drop_modules for p in (first.plan, second.plan)):
        return _in_stages(first, second)
    plan = first.plan.then(second.plan)
    check_zeros(second.module, plan.masks)
    proof = second.proof
    if plan.keep:
        try:
            gone = removal(trace(first.program), plan)
        except UsageError:  # torn in the first program, though whole in the second
            return _in_stages(first, second)
        proof = prove(first.program, second.module, gone, reference(first.program, gone, seed=seed), seed=seed)
    attributes = {
        p: {**first.attributes.get(p, {}), **second.attributes.get(p, {})}
        for p in {*first.attributes, *second.attributes}
    }
    return Pruned(
        module=second.module,
        program=first.program,
        plan=plan,
        realiser=second.realiser,
        proof=_together(first, second, proof, plan),
        attributes=attributes,
        notes=first.notes + second.notes,
    )


def _together(first: Pruned, second: Pruned, proof: Proof, plan: Plan) -> Proof:
    """A proof of both levels: all that was shown, and how far the user's outputs moved from the dense ones."""
    shown = tuple(dict.fromkeys((*first.proof.shown, *second.proof.shown)))
    parameters = dict(second.module.named_parameters(remove_duplicate=False))
    num_zeros = sum(int((~kept).sum()) for kept in fitting(parameters, plan.masks).values())
    move = own_move(first.program, second.module)
    return dataclasses.replace(proof, own_move=move, shown=shown, num_zeros=num_zeros)


def _in_stages(first: Pruned, second: Pruned) -> Pruned:
    plan = first.plan.then(second.plan)
    check_zeros(second.module, plan.masks)
    return Pruned(
        module=second.module,
        program=first.program,
        plan=plan,
        realiser=second.realiser,
        proof=_together(first, second, second.proof, plan),
        attributes=second.attributes,
        stages=first.every_stage() + second.every_stage(),
        notes=first.notes + second.notes,
    )
