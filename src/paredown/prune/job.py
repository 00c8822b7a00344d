"""What one training under a schedule is given, and the steps that all schedules share: score, choose, train, prove."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paredown.allocate import allocate
from paredown.budget import Budget
from paredown.couple import Coupling
from paredown.errors import NothingToDo
from paredown.examine import Cost
from paredown.granularity import Granularity
from paredown.plan import Mask, Plan
from paredown.program import Program
from paredown.prune.accumulate import READINGS, Accumulated
from paredown.prune.changing import Kept
from paredown.prune.mask import apply_masks
from paredown.prune.nouns import Pruned
from paredown.prune.remove import prune
from paredown.prune.schedule import Schedule
from paredown.score import TABLE, Scores, score
from paredown.statistics.batches import apart
from paredown.train import checkpoint as checkpoints
from paredown.train.batch_norm import reestimate_batch_norm
from paredown.train.loop import Fitted, Hook, fit, private_copy
from paredown.train.masks import check_zeros
from paredown.train.task import Batches, Step, kept_randomness, seed_all

Cells = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One model, what leaves by which rule, and how it is trained."""

    program: Program
    coupling: Coupling
    cost: Cost
    batches: Batches
    step: Step
    granularity: Granularity
    criterion: str
    options: Mapping[str, Any]
    """Of the criterion."""
    allocation: Mapping[str, Any]
    """Options of allocate."""
    score_batches: int
    seed: int
    epochs: int
    training: Mapping[str, Any]
    """Further options of fit."""
    batch_norm_batches: int
    hooks: tuple[Hook, ...]
    """The caller's own, after those of the schedule."""
    checkpoint: Path | None
    first: Mapping[str, NDArray[np.bool_]]
    """What of every masked parameter is there at the beginning; empty where units leave."""
    flipped: Mapping[str, int] = field(default_factory=dict)
    """Masked parameters that are stored [in, out], with their groups (see Scores)."""

    @property
    def start_density(self) -> float:
        """Share of the masked parameters' weights that is there at the beginning."""
        return sum(int(k.sum()) for k in self.first.values()) / sum(k.size for k in self.first.values())


def scores_of(job: Job, module: nn.Module, share: float | None = None) -> Scores:
    """Scores of the table for `module` as it is now, `share` of which will stay. Randomness of the caller is left alone."""
    criterion, own = job.criterion, dict(job.options)
    if own.get("sequential") and job.granularity.kind != "n:m":  # wanda masks the layers before as they will be
        own |= {"sequential": False} if share is None or share >= 1 else {"density": float(share)}
    data = TABLE[criterion].needs_data if criterion in TABLE else False
    with kept_randomness():
        seed_all(job.seed)
        return score(
            as_program(job.program, module), job.coupling, criterion, granularity=str(job.granularity),
            batches=apart(job.batches()) if data else None, loss=job.step if data else None, num_batches=job.score_batches,
            seed=job.seed, **own,
        )  # fmt: skip


@torch.no_grad()
def as_program(program: Program, module: nn.Module) -> Program:
    """The program with the tensors of a module that was trained since; on the CPU, in eval mode.

    The module's own forward hooks (a teacher listens to a student) are not taken over.
    """
    now = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    copied = private_copy(program.module).eval()
    for name, tensor in checkpoints.model_tensors(copied).items():
        tensor.copy_(now[name])
    of = {id(tensor): name for name, tensor in program.state.items()}  # tied names share one tensor
    tensors = {of[id(old)]: _like(old, now[n]) for n, old in program.state.items() if n in now}
    state = {n: tensors.get(of[id(old)], old) for n, old in program.state.items()}
    return dataclasses.replace(program, state=state, module=copied)


def _like(old: Tensor, now: Tensor) -> Tensor:
    """The numbers of `now`, a parameter where `old` is one, frozen where it is frozen."""
    own = now.detach().cpu().clone()
    return nn.Parameter(own, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else own


def accumulation(job: Job) -> Accumulated | None:
    """What adds gradients up, where the criterion asks for it."""
    return Accumulated(job.criterion, tuple(job.first), job.granularity) if job.criterion in READINGS else None


def cells_of(job: Job, accumulated: Accumulated | None, module: nn.Module, share: float) -> Cells:
    """Scores of all cells of the masked parameters, of which a share will stay; higher stays."""
    if accumulated is not None:
        return accumulated.cells(module)
    found = scores_of(job, module, share).by_cell
    return {n: found[n] for n in job.first}


def chosen(job: Job, cells: Cells, kept: Kept, density: float) -> Kept:
    """What stays at a density by the scores of all cells, as allocate decides; what is gone stays gone."""
    if density >= 1:
        return kept
    scores = Scores(
        criterion=job.criterion, by_space={}, granularity=str(job.granularity), seed=job.seed,
        by_cell=below_the_living({n: cells[n] for n in job.first}, kept, job.granularity),
        scope=TABLE[job.criterion].scope if job.criterion in TABLE else "layer",
        flipped=job.flipped,
    )  # fmt: skip
    budget = None if job.granularity.kind == "n:m" else Budget(density=density)
    options = {**job.allocation, "leave_out": ()}  # the first and last of those that take part are others
    try:
        masks = allocate(job.coupling, scores, job.cost, budget, **options).masks
    except NothingToDo:  # a step too small to remove one more cell
        return kept
    return {n: kept[n] & masks[n].kept if n in masks else kept[n] for n in job.first}


def below_the_living(cells: Cells, kept: Kept, granularity: Granularity) -> dict[str, NDArray[Any]]:
    """The scores with cells of which nothing is kept below all others: what is gone leaves first, whatever the criterion.

    >>> gone, stays = np.array([[3.0, 0.5]]), np.array([[False, True]])
    >>> below_the_living({"w": gone}, {"w": stays}, Granularity.parse("element"))["w"].argmin()
    np.int64(0)
    """
    alive = {n: granularity.reduce(kept[n], "max") > 0 for n in cells}
    gone = _below({n: np.asarray(c)[alive[n]] for n, c in cells.items()})
    return {n: np.where(alive[n], c, gone) for n, c in cells.items()}


def _below(alive: Cells) -> float:
    """A score below that of every living cell; as near to 0 as it can, so that means of a layer are those of the living."""
    low = min((float(c.min()) for c in alive.values() if c.size), default=0.0)
    high = max((float(c.max()) for c in alive.values() if c.size), default=0.0)
    return -1e-9 * (high or 1.0) if low >= 0 else low - max(high - low, abs(low))


def trained(job: Job, module: nn.Module, hooks: Sequence[Hook], number: int = 0, epochs: int | None = None) -> Fitted:
    """One `fit`; the checkpoint of training `number` has that number in its name where there are several."""
    return fit(
        module, job.batches, job.step, epochs=job.epochs if epochs is None else epochs, seed=job.seed, hooks=(*hooks, *job.hooks),
        checkpoint=numbered(job.checkpoint, number), **job.training,
    )  # fmt: skip


def numbered(path: Path | None, number: int) -> Path | None:
    """The checkpoint of the training of that number.

    >>> numbered(Path("a/train.safetensors"), 2).name, numbered(Path("train"), 0).name
    ('train-2.safetensors', 'train')
    """
    return path if path is None or number == 0 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def with_masks(job: Job, kept: Kept) -> nn.Module:
    """A copy of the program's module with these elements left."""
    module = private_copy(job.program.module)
    apply_masks(module, as_masks(job, kept))
    return module


def as_masks(job: Job, kept: Kept) -> dict[str, Mask]:
    """Booleans as masks, without those that keep everything."""
    return {n: Mask.of(np.asarray(k), str(job.granularity)) for n, k in kept.items() if not k.all()}


def finished(job: Job, module: nn.Module, kept: Kept, density: float | None, how: Schedule) -> Pruned:
    """The trained module with its masks as a proven result, batch norm re-estimated.

    Rows and columns that are gone altogether leave physically, as in prune. Raises NothingToDo where nothing is masked.
    """
    masks = as_masks(job, kept)
    args, kwargs = job.program.inputs
    if job.batch_norm_batches:
        module = reestimate_batch_norm(
            module, job.batches, {"args": args, "kwargs": kwargs}, step=job.step, num_batches=job.batch_norm_batches,
            seed=job.seed + job.epochs, device=str(job.training["device"]),
        )  # fmt: skip
    check_zeros(module, masks)
    made_by = {
        "verb": "sparsify", "criterion": job.criterion, "criterion_options": dict(job.options), "seed": job.seed,
        "granularity": str(job.granularity), "density": density, "schedule": repr(how), "epochs": job.epochs,
        **{k: v for k, v in job.allocation.items() if v not in (None, (), [])},
    }  # fmt: skip
    if not masks:
        # soft movement takes no amount: its options decide
        fix = "ask for less" if density is not None else "give SoftMovement a larger penalty, threshold or score_lr"
        msg = f"sparsify must prune something. Got {how} and {job.criterion}, which left every weight. Train longer, or {fix}."
        raise NothingToDo(msg)
    plan = Plan(keep={}, masks=masks, made_by=made_by)
    if job.granularity.kind in ("row", "column"):
        return dataclasses.replace(prune(as_program(job.program, module), plan, seed=job.seed), program=job.program)
    return dataclasses.replace(prune(job.program, plan, seed=job.seed), module=module)
