"""obs: weights leave one column after the other and the rest of their row answers, layer after layer (SparseGPT)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.couple.space import Coupling
from paredown.errors import NothingToDo, RejectedError, UsageError
from paredown.granularity import Granularity
from paredown.plan import Mask, Plan
from paredown.program import Program, capture
from paredown.prune.nouns import Fit, Pruned
from paredown.prune.prove import own_move
from paredown.prune.remove import compose, prune
from paredown.prune.sweep import Swept, swept
from paredown.score.patterns import maskable
from paredown.statistics.batches import Given, once
from paredown.statistics.inputs import InputStatistics
from paredown.statistics.sequential import Call, Run, inputs_now, layer_by_layer, own_state, recorded_calls
from paredown.statistics.uses import Use, find_uses, read_as_it_is
from paredown.train.loop import private_copy
from paredown.train.task import Step


def obs(
    program: Program,
    batches: Given,
    *,
    density: float | Mapping[str, float] = 0.5,
    granularity: str | Granularity = "element",
    masks: Mapping[str, Mask] | None = None,
    step: Step | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    block: int = 128,
    damping: float = 0.01,
    num_batches: int = 16,
) -> Pruned:
    """Prune single weights and answer for them, without training (Frantar & Alistarh 2023, "SparseGPT", algorithm 1).

    In graph order, each layer on the layers before it as they are by then: with H = mean x xᵀ of its inputs, damped by
    `damping` × its mean diagonal, and U the upper Cholesky factor of H⁻¹, columns are settled from left to right,

        err = (w_j - ŵ_j) / U_jj,   W[:, j:] -= err · U[j, j:],

    ŵ_j = 0 for what leaves: of every `block` columns the smallest w² / U_jj² over all rows, exactly (1 - density) of each
    layer; with granularity "2:4" (any N:M, along input channels) as the updated weights say; or what `masks` say, which
    also serves masks of blocks, rows or any other rule. `density` is what stays, of every layer or by its name (layers
    that a mapping lacks stay dense). Linear layers, products with a parameter and convolutions take part, grouped ones
    with one H per group, whose weights have at least two axes and carry MACs and which `include` and `exclude` leave.

    `batches()` yields inputs, or with `step(model, batch)` whole batches; activations that are still needed of all
    `num_batches` are in memory, and one K × K matrix of float64. Returns what prune does for the masks, with the new
    weights; `fits` tells each layer's error with the mask alone and with the update. `program` is not changed.

    Raises UsageError (options, patterns, masks that do not fit), RejectedError (no batches, inputs that are not
    finite), ResourceError (a layer with too many inputs for its H) and NothingToDo.

    >>> from paredown.program import capture
    >>> net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> x = torch.randn(64, 16) @ torch.randn(16, 16)
    >>> pruned = obs(capture(net, x), lambda: [x], density=0.5)
    >>> int((pruned.module[0].weight == 0).sum()), pruned.fits["0.weight"].after < pruned.fits["0.weight"].before
    (64, True)
    """
    cut = Granularity.parse(granularity)
    check_obs(cut, masks, block, damping, num_batches)
    nothing = Coupling(spaces=(), pinned=(), unknown_ops={})
    names = [n for n in maskable(program, nothing, include, exclude) if masks is None or n in masks]
    uses = find_uses(program, names)
    sites, notes = _sites(program, names, uses, cut if masks is None else None)
    amounts = _amounts(program, sites, density, cut, masks)
    state = own_state(program.state)
    calls = recorded_calls(program, once(batches), step, num_batches)
    walk = _Walk(
        program=program, state=state, calls=calls, cut=cut, masks=masks, amounts=amounts, block=block, damping=damping
    )
    visit: dict[fx.Node, Callable[[Sequence[Run]], None]] = {}
    for name in amounts:
        visit[uses[name][0].node] = partial(walk.settle, name, uses[name])
    layer_by_layer(program, state, calls, visit)
    made_by = {
        "verb": "obs", "granularity": str(cut), "damping": damping, "block": block, "num_batches": num_batches,
        "density": dict(density) if isinstance(density, Mapping) else density, "masks_given": masks is not None,
    }  # fmt: skip
    return _finished(program, state, Plan(keep={}, masks=walk.found, made_by=made_by), walk.fits, notes)


def obs_on_plan(
    program: Program,
    plan: Plan,
    batches: Given,
    *,
    choose: bool = False,
    step: Step | None = None,
    block: int = 128,
    damping: float = 0.01,
    num_batches: int = 16,
) -> Pruned:
    """Carry out a plan of masks with the update of `obs`: what stays answers for what leaves.

    With `choose` (element, N:M) the plan says only how many weights of each layer leave, and the sweep which. Masks of
    weights that no sweep can update are carried out as they are, and `notes` name them. The result's plan has the masks
    that were carried out and the `made_by` of the plan given. Options, errors and source as in `obs`.

    >>> from paredown.program import capture
    >>> net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> x = torch.randn(64, 16) @ torch.randn(16, 16)
    >>> kept = net[0].weight.abs() > 0.1
    >>> plan = Plan(keep={}, masks={"0.weight": Mask.of(kept.numpy(), "element")})
    >>> done = obs_on_plan(capture(net, x), plan, lambda: [x])
    >>> bool(((done.module[0].weight != 0) == kept).all()), done.plan == plan
    (True, True)
    """
    if not plan.masks or plan.keep or plan.drop_modules or plan.ranks:
        msg = "obs_on_plan must be given a plan of masks alone. Got one that removes, leaves out or factorizes, or without masks."
        raise UsageError(msg)
    cut = Granularity.parse(next(iter(plan.masks.values())).granularity) if choose else None
    swept_names, notes = _sites(program, list(plan.masks), find_uses(program, list(plan.masks)), cut)
    amounts: dict[str, Any] = {"masks": {n: plan.masks[n] for n in swept_names}}
    if cut is not None:
        amounts = {"density": {n: plan.masks[n].density for n in swept_names}, "granularity": cut}
    done = obs(program, batches, step=step, block=block, damping=damping, num_batches=num_batches, **amounts)
    rest = {n: m for n, m in plan.masks.items() if n not in done.plan.masks}
    fits, notes = done.fits, tuple(n.replace("stays dense", "is masked without an update") for n in notes)
    if rest:
        second = prune(capture(done.module, program.inputs), Plan(keep={}, masks=rest), condense=False)
        done = compose(done, second)
    masks = {n: done.plan.masks[n] for n in plan.masks}
    made = Plan(keep={}, masks=masks, made_by=plan.made_by)
    return dataclasses.replace(done, plan=made, fits=fits, notes=notes)


def check_obs(cut: Granularity, masks: object, block: int, damping: float, num_batches: int) -> None:
    """Raises UsageError for options of `obs` that cannot be, before any work."""
    if masks is None and cut.kind not in ("element", "n:m"):
        msg = f"granularity must be element or N:M for obs. Got {cut}. Choose blocks with score and allocate, and pass their masks=…."
        raise UsageError(msg)
    rules = [
        ("block", isinstance(block, int) and not isinstance(block, bool) and block >= 1, "an integer ≥ 1", block),
        ("num_batches", isinstance(num_batches, int) and num_batches >= 1, "an integer ≥ 1", num_batches),
        (
            "damping",
            isinstance(damping, int | float) and math.isfinite(damping) and damping >= 0,
            "a finite number ≥ 0",
            damping,
        ),
    ]
    for name, holds, rule, value in rules:
        if not holds:
            msg = f"{name} must be {rule}. Got {value!r}."
            raise UsageError(msg)


def _sites(
    program: Program, names: Sequence[str], uses: Mapping[str, list[Use]], cut: Granularity | None
) -> tuple[list[str], tuple[str, ...]]:
    """The weights that can be swept, and why others cannot."""
    found, notes = [], []
    for name in names:
        reason = ""
        if not uses[name]:
            reason = "no linear layer or convolution reads it"
        elif len({u.flipped for u in uses[name]}) > 1:
            reason = "it is also used transposed"
        elif not all(read_as_it_is(u) for u in uses[name]):
            reason = "its values are computed before they are used"
        elif cut is not None and cut.kind == "n:m" and uses[name][0].flipped:
            reason = "it is stored [in, out], along which N:M has no meaning"
        if reason:
            notes.append(f"{name} stays dense: {reason}")
        else:
            found.append(name)
    if not found:
        msg = f"obs must find a weight to prune. Got none. {'; '.join(notes[:5]) or 'Patterns or masks leave none.'}"
        raise NothingToDo(msg)
    return found, tuple(notes)


def _amounts(
    program: Program, sites: Sequence[str], density: Any, cut: Granularity, masks: Mapping[str, Mask] | None
) -> dict[str, int | None]:
    """How many weights leave each layer; None where a pattern or a mask says it."""
    for name in masks or {}:
        if name not in program.state or tuple(program.state[name].shape) != (masks or {})[name].shape:
            got = tuple(program.state[name].shape) if name in program.state else "no such parameter"
            msg = f"a mask must fit its parameter. Got shape {(masks or {})[name].shape} for {name}: {got}."
            raise UsageError(msg)
    if masks is not None:
        return dict.fromkeys(sites)
    given = density if isinstance(density, Mapping) else dict.fromkeys(sites, density)
    unknown = [n for n in given if n not in sites]
    if unknown:
        msg = f"density must name weights that can be pruned. Got {unknown[0]!r}, which is not among {', '.join(sites[:5])}…."
        raise UsageError(msg)
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            msg = f"density must be a number in (0, 1]: the share that stays. Got {value!r} for {name}."
            raise UsageError(msg)
    if cut.kind == "n:m":
        ratio = cut.a / cut.b
        if not isinstance(density, Mapping) and density not in (0.5, ratio):
            msg = f"density must be left out with {cut}, which is {ratio:g}. Got {density}."
            raise UsageError(msg)
        return dict.fromkeys(given)
    whole = {n: program.state[n].numel() for n in given}
    return {n: min(round((1.0 - d) * whole[n]), whole[n] - 1) for n, d in given.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Walk:
    """What every layer needs, and what the layers leave behind."""

    program: Program
    state: dict[str, Tensor]
    calls: Sequence[Call]
    cut: Granularity
    masks: Mapping[str, Mask] | None
    amounts: Mapping[str, int | None]
    block: int
    damping: float
    found: dict[str, Mask] = dataclasses.field(default_factory=dict)
    fits: dict[str, Fit] = dataclasses.field(default_factory=dict)

    def settle(self, name: str, uses: list[Use], runs: Sequence[Run]) -> None:
        """Sweep one weight in place."""
        seen = inputs_now(self.program, self.state, self.calls, runs, name, uses, gram=True)
        assert seen.gram is not None
        weight, use = self.state[name], uses[0]
        matrix = _as_matrix(weight, seen)
        inputs = weight.shape[1]
        kept = None
        if self.masks is not None:
            kept = _as_matrix(torch.from_numpy(self.masks[name].kept), seen)
        pattern = (self.cut.a, self.cut.b) if self.cut.kind == "n:m" and self.masks is None else None
        removed = self.amounts[name]
        result = swept(
            matrix, seen.gram, removed=removed, pattern=pattern, inputs=inputs if not use.flipped else 0, kept=kept,
            block=self.block, damping=self.damping,
        )  # fmt: skip
        stays = _as_stored(result.kept, weight, seen)
        weight.copy_(_as_stored(result.weight, weight, seen)).masked_fill_(~stays, 0.0)
        if not bool(torch.isfinite(weight).all()):
            msg = f"weights must stay finite. Got NaN or infinity in {name}. Raise the damping."
            raise RejectedError(msg)
        if not bool(stays.all()):
            kind = self.masks[name].granularity if self.masks is not None else str(self.cut)
            self.found[name] = Mask.of(stays.numpy(), kind)
            self.fits[name] = _fit(result, matrix, seen)


def _as_matrix(stored: Tensor, seen: InputStatistics) -> Tensor:
    """A stored tensor by group with its inputs last. Shape [groups, rows, K]."""
    groups, length = seen.means.shape
    if not seen.flipped:
        return stored.reshape(groups, -1, length)
    if len(stored) == length:  # [K, out], whose outputs may come in parts
        return stored.reshape(length, groups, -1).permute(1, 2, 0)
    return stored.reshape(groups, length, -1).transpose(1, 2)


def _as_stored(matrix: Tensor, like: Tensor, seen: InputStatistics) -> Tensor:
    length = seen.means.shape[1]
    if not seen.flipped:
        return matrix.reshape(like.shape)
    if len(like) == length:
        return matrix.permute(2, 0, 1).reshape(like.shape)
    return matrix.transpose(1, 2).reshape(like.shape)


def _fit(result: Swept, matrix: Tensor, seen: InputStatistics) -> Fit:
    """Errors as a share of how far the layer's outputs spread around their means."""
    assert seen.gram is not None
    dense = matrix.double()
    energy = ((dense @ seen.gram) * dense).sum() - (dense @ seen.means[..., None]).square().sum()
    scale = float(energy) if float(energy) > 0 else 1.0
    return Fit(before=result.before / scale, after=result.after / scale)


def _finished(
    program: Program, state: Mapping[str, Tensor], plan: Plan, fits: Mapping[str, Fit], notes: tuple[str, ...]
) -> Pruned:
    """The new weights in the user's class, carried out and proven as any masks are; compared with the dense model."""
    if not plan.masks:
        msg = "obs must prune at least one weight. Got densities or masks that keep all."
        raise NothingToDo(msg)
    module = private_copy(program.module)
    _put(module, program, state, plan.masks)
    swept_program = dataclasses.replace(program, state=dict(state), module=module)
    pruned = prune(swept_program, plan, condense=False)
    move = own_move(program, pruned.module)
    proof = dataclasses.replace(pruned.proof, own_move=move, moved=move)
    return dataclasses.replace(pruned, program=program, proof=proof, fits=dict(fits), notes=notes)


@torch.no_grad()
def _put(module: nn.Module, program: Program, state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """New values in the module's own parameters; tied ones are one tensor."""
    known = dict(module.named_parameters(remove_duplicate=False))
    for name in names:
        same = [n for n, t in program.state.items() if t is program.state[name] and n in known]
        known[same[0]].copy_(state[name])
