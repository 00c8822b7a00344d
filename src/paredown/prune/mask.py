"""Masks carried out: zeros in a copy of the module, and the evidence that nothing else changed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paredown.errors import NothingToDo, UsageError, VerificationError
from paredown.plan import Mask, Plan
from paredown.program import GraphModel, Program
from paredown.prune.example import own_example
from paredown.prune.module import tensors
from paredown.prune.nouns import Proof, Pruned
from paredown.prune.prove import SINGLE, distance, run_dense, scale_of
from paredown.prune.removal import own
from paredown.train.loop import private_copy
from paredown.train.masks import check_zeros

Bools = NDArray[np.bool_]


def masked(program: Program, plan: Plan, *, realiser: str = "auto") -> Pruned:
    """A plan of masks alone: the user's module with zeros.

    Proven on the user's own weights: the zeros are there, every other bit is as before (all parameters and buffers),
    and the module computes what the captured graph does with the same zeros (≤ 1e-4 × max |dense|).
    With realiser "graph" the module is the one rebuilt from the graphs. Raises UsageError (a mask does not fit),
    NothingToDo (the masks keep all) and VerificationError.
    """
    module = _copy(program, realiser)
    kept = fitting(only_parameters(program), plan.masks)
    fresh = any(bool(((program.state[name] != 0) & ~torch.from_numpy(k)).any()) for name, k in kept.items())
    if not kept or all(k.all() for k in kept.values()):
        msg = "masks must prune at least one element. Got masks that keep all."
        raise NothingToDo(msg)
    apply_masks(module, plan.masks)
    num_zeros = refuse_other_changes({**program.state, **tensors(program.module)}, module, plan.masks)
    state = dict(program.state)
    for name, tensor in program.state.items():
        if name in kept:
            state |= dict.fromkeys(
                [n for n, t in program.state.items() if t is tensor],
                tensor.detach().masked_fill(~torch.from_numpy(kept[name]), 0.0),
            )
    example = own_example(program)
    with torch.no_grad():
        dense = run_dense(program, program.state, example, None)
        expected = run_dense(program, state, example, None)
        got = outputs_of(module, example)
    moved = distance(expected, dense)
    proof = Proof(
        max_error=distance(got, expected),
        scale=scale_of(dense),
        moved=moved,
        mode="float32",
        own_move=distance(got, dense),
        shown=("masks",),
        num_zeros=num_zeros,
    )
    if not proof.max_error <= SINGLE * proof.scale:
        msg = f"the masked module must equal its masked graph. Got a difference of {proof.max_error:.2e} at output scale {proof.scale:.2e}."
        raise VerificationError(msg, proof)
    notes = () if fresh else ("every masked element was zero before: the masks hold what was there",)
    return Pruned(
        module=module,
        program=program,
        plan=plan,
        realiser="graph" if isinstance(module, GraphModel) else "module",
        proof=proof,
        notes=notes,
    )


def _copy(program: Program, realiser: str) -> nn.Module:
    if realiser == "graph" and not isinstance(program.module, GraphModel):
        return GraphModel(program.eval_graph, program.train_graph, own(program.state, program.state)).eval()
    if realiser == "module" and isinstance(program.module, GraphModel):
        msg = "the module realiser needs the user's own class. Got a model that was rebuilt from graphs."
        raise VerificationError(msg)
    return private_copy(program.module)


def carry_out(pruned: Pruned, masks: Mapping[str, Mask]) -> Pruned:
    """`pruned` with the masked elements of a copy of its module set to zero; nothing else changes, bit for bit.

    The proof stays that of the removal, and says the zeros too; `own_move` is measured anew.
    Raises UsageError where a mask does not fit what the removal left, VerificationError where more than zeros changed.
    """
    module = private_copy(pruned.module)
    apply_masks(module, masks)
    num_zeros = refuse_other_changes(tensors(pruned.module), module, masks)
    example = own_example(pruned.program)
    with torch.no_grad():
        dense = run_dense(pruned.program, pruned.program.state, example, None)
        move = distance(outputs_of(module, example), dense)
    proof = dataclasses.replace(
        pruned.proof, own_move=move, shown=(*pruned.proof.shown, "masks"), num_zeros=pruned.proof.num_zeros + num_zeros
    )
    plan = dataclasses.replace(pruned.plan, masks=dict(masks))
    return dataclasses.replace(pruned, module=module, plan=plan, proof=proof)


def outputs_of(module: nn.Module, example: Any) -> list[Any]:
    """Outputs of a module in eval mode, drawn as in `run_dense` where it draws; the example is not touched."""
    args, kwargs = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pytree.tree_leaves(module.eval()(*args, **kwargs))


@torch.no_grad()
def apply_masks(module: nn.Module, masks: Mapping[str, Mask]) -> None:
    """Set the masked elements of a module's parameters to +0, in place; tied names are one tensor."""
    for name, kept in fitting(dict(module.named_parameters(remove_duplicate=False)), masks).items():
        module.get_parameter(name).masked_fill_(~torch.from_numpy(kept), 0.0)


def refuse_other_changes(old: Mapping[str, Tensor], after: nn.Module, masks: Mapping[str, Mask]) -> int:
    """How many elements the masks hold at zero (distinct tensors); every other bit of every tensor must be as before."""
    check_zeros(after, masks)
    new = tensors(after)
    kept = fitting({n: t for n, t in new.items() if isinstance(t, nn.Parameter)}, masks)
    by_tensor = {id(new[name]): torch.from_numpy(k) for name, k in kept.items()}
    for name, tensor in new.items():
        was, now = _bits(old[name]), _bits(tensor)
        if id(tensor) in by_tensor:
            pruned = ~by_tensor[id(tensor)]
            was, now = was.masked_fill(pruned, 0), now.masked_fill(pruned, 0)
        if not torch.equal(was, now):
            msg = f"a mask must change nothing but its zeros. Got other bits in {name}."
            raise VerificationError(msg)
    return sum(int((~k).sum()) for k in kept.values())


def fitting(parameters: Mapping[str, Tensor], masks: Mapping[str, Mask]) -> dict[str, Bools]:
    """Kept elements by parameter, one entry per tensor; raises UsageError where a mask does not fit its parameter.

    Also where a name is unknown (with the nearest ones), the parameter is not of floating point, or two names of one
    tied tensor have different masks.
    """
    seen: dict[Any, str] = {}
    out: dict[str, Bools] = {}
    for name, mask in masks.items():
        tensor = parameters.get(name)
        if tensor is None:
            near = difflib.get_close_matches(name, list(parameters), n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            msg = f"a mask must name a parameter of the model. Got {name!r}.{hint}"
            raise UsageError(msg)
        if tuple(tensor.shape) != mask.shape:
            msg = f"a mask must have its parameter's shape {tuple(tensor.shape)} (after the plan's removals). Got {mask.shape} for {name}."
            raise UsageError(msg)
        if not tensor.is_floating_point():
            msg = f"a mask must be of floating-point weights. Got {name}, which is {tensor.dtype}."
            raise UsageError(msg)
        kept = mask.kept
        first = seen.setdefault(_storage(tensor), name)
        if first == name:
            out[name] = kept
        elif masks[first].shape != mask.shape or masks[first].bits != mask.bits:
            msg = f"tied weights must have one mask. Got different ones for {first} and {name}."
            raise UsageError(msg)
    return out


def refuse_empty(masks: Mapping[str, Mask]) -> None:
    """A mask that keeps nothing is a mistake, or a module to leave out: raises UsageError."""
    for name, mask in masks.items():
        if not mask.num_kept:
            msg = f"a mask must keep at least one element. Got none for {name}. Leave out the module instead: Plan(drop_modules=…)."
            raise UsageError(msg)


def only_parameters(program: Program) -> dict[str, Tensor]:
    """The program's parameters by every name; buffers and constants cannot be masked."""
    names = {n for n, p in program.module.named_parameters(remove_duplicate=False)}
    return {n: t for n, t in program.state.items() if n in names} or dict(program.state)


def _storage(tensor: Tensor) -> Any:
    return (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())) if tensor.numel() else id(tensor)


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes as integers of its element size, so that NaN equals NaN and -0 does not equal 0."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    plain = tensor.detach()
    return plain if kind is None or not plain.is_floating_point() else plain.contiguous().view(kind)
