"""Units that leave in the course of a training: a penalty first, or gates, then score, allocate, prune, recover."""

from __future__ import annotations

import dataclasses

from paredown.allocate import allocate
from paredown.budget import Budget
from paredown.plan import Plan
from paredown.program import Program
from paredown.prune.gates import ChannelGates, Gates
from paredown.prune.job import Job, as_program, scores_of, trained
from paredown.prune.nouns import Pruned
from paredown.prune.regularize import Growing, Regularize, growing, slimming
from paredown.prune.remove import prune
from paredown.score import Scores
from paredown.train.batch_norm import reestimate_batch_norm
from paredown.train.loop import private_copy


def remove_in_training(job: Job, gates: Gates | None, regularize: Regularize | None, budget: Budget) -> Pruned:
    """One level: the penalised or gated training where asked, the removal with its proof, and the recovery."""
    program, plan = job.program, None
    if gates is not None:
        plan = _allocated(job, _gated(job, gates), budget)
    elif isinstance(regularize, Growing):
        plan = _allocated(job, scores_of(job, job.program.module), budget) if regularize.chosen == "first" else None
        program = _penalised(job, regularize, plan)
    elif regularize is not None:
        program = _penalised(job, regularize, None)
    if plan is None:
        plan = _allocated(job, scores_of(job, program.module), budget)
    made_by = {**plan.made_by, "regularize": repr(regularize)} if regularize is not None else plan.made_by
    small = prune(program, dataclasses.replace(plan, made_by=made_by), seed=job.seed)
    module = trained(job, small.module, [], 1 if regularize is not None or gates is not None else 0).module
    if job.batch_norm_batches:
        args, kwargs = job.program.inputs
        module = reestimate_batch_norm(
            module, job.batches, {"args": args, "kwargs": kwargs}, step=job.step, num_batches=job.batch_norm_batches,
            seed=job.seed + job.epochs, device=str(job.training["device"]),
        )  # fmt: skip
    return dataclasses.replace(small, module=module, program=job.program)


def _allocated(job: Job, scores: Scores, budget: Budget) -> Plan:
    options = dict(job.allocation)
    if scores.criterion == "gates":  # one threshold for all gates
        options |= {"allocation": "global", "normalize": "none"}
    return allocate(job.coupling, scores, job.cost, budget, **options)


def _penalised(job: Job, how: Regularize, plan: Plan | None) -> Program:
    """The program with the weights that its penalised training leaves."""
    hook = growing(job.coupling, how, plan) if isinstance(how, Growing) else slimming(job.program, job.coupling, how)
    module = trained(job, private_copy(job.program.module), [hook], epochs=how.epochs).module
    return as_program(job.program, module)


def _gated(job: Job, how: Gates) -> Scores:
    gates = ChannelGates(job.program, job.coupling, how)
    module = private_copy(job.program.module)
    gates.set(module)
    trained(job, module, [gates.hook()], epochs=how.epochs)
    return gates.scores()
