"""Masks that the user brings: tensors, a function, a file, or those of torch.nn.utils.prune."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paredown.errors import NothingToDo, RejectedError, UsageError, must_be
from paredown.granularity import Granularity
from paredown.plain import plain_copy
from paredown.plan import Mask, Plan
from paredown.program import Program
from paredown.prune.mask import Bools, fitting, only_parameters, refuse_empty

Given = Mapping[str, Any] | Callable[[str, Tensor], Any] | str | Path


def masks_of(program: Program, given: Given, *, granularity: str = "element") -> Plan:
    """A plan from one's own masks: {parameter: 0/1 or bool array or tensor}, `f(name, tensor)` → mask or None, or a file.

    A file is .safetensors or .npz (read without pickle) with one array per parameter. True and 1 mean kept. A mask of
    another shape that broadcasts to the parameter's is spread ([out, 1, 1, 1]: one per filter). Masks that keep
    everything are left out. `granularity` says what the cells are, and is checked: every cell all kept or all pruned;
    for N:M no group of M inputs holds more than N.

    Raises UsageError (unknown parameter, wrong shape, other values than 0 and 1, cells torn), NothingToDo (nothing is
    pruned) and RejectedError (unreadable file).

    >>> from paredown.program import capture
    >>> program = capture(nn.Linear(4, 4), torch.zeros(2, 4))
    >>> masks_of(program, lambda name, tensor: tensor > tensor.median() if tensor.dim() == 2 else None).masks["weight"].shape
    (4, 4)
    """
    must_be("program", program, Program, fix="Use paredown.capture(model, inputs).")
    if not callable(given):
        must_be(
            "given", given, Mapping, str, Path, fix="Give {parameter: mask}, a function of (name, tensor), or a file."
        )
    cells = Granularity.parse(granularity)
    parameters = only_parameters(program)
    if isinstance(given, str | Path):
        found = _read(Path(given))
    elif isinstance(given, Mapping):
        found = dict(given)
    else:
        made = {n: _asked(given, n, t.detach().clone()) for n, t in parameters.items()}
        found = {n: m for n, m in made.items() if m is not None}
    masks = _that_fit(parameters, found, cells)
    return Plan(keep={}, masks=masks, made_by={"verb": "masks_of", "granularity": str(cells)})


def _asked(given: Callable[[str, Tensor], Any], name: str, tensor: Tensor) -> Any:
    try:
        return given(name, tensor)
    except Exception as error:
        msg = f"a function of masks must return a mask or None. Got {type(error).__name__}: {error} for {name}."
        raise UsageError(msg) from error


def check_masks(model: nn.Module, path: Path, *, granularity: str) -> None:
    """Whether a file of masks fits the parameters of a model that nothing has captured yet; raises as `masks_of` does."""
    _that_fit(dict(model.named_parameters(remove_duplicate=False)), _read(path), Granularity.parse(granularity))


def _that_fit(parameters: Mapping[str, Tensor], found: Mapping[str, Any], cells: Granularity) -> dict[str, Mask]:
    """The masks that prune something; raises UsageError for those that do not fit, NothingToDo where none does."""
    masks = {}
    for name, value in found.items():
        kept = _spread(name, _booleans(name, value), parameters)
        if not cells.holds(kept):
            msg = f"a mask of granularity {cells} must keep or prune whole cells. Got torn ones in {name}."
            raise UsageError(msg)
        masks[name] = Mask.of(kept, str(cells))
    fitting(parameters, masks)
    refuse_empty(masks)
    partial = {n: m for n, m in masks.items() if not m.kept.all()}
    if not partial:
        msg = "masks must prune something. Got none, or masks that keep every element."
        raise NothingToDo(msg)
    return partial


def take_over(model: nn.Module) -> tuple[nn.Module, Plan]:
    """A plain copy of a model that torch.nn.utils.prune reparametrized, and its masks as a plan; the model is not changed.

    The copy has `weight` where the model has `weight_orig` and `weight_mask`: half as many tensors, zeros included.
    Its optimizer must be made anew, over the copy's parameters. Other reparametrizations (weight norm) are folded, too.
    Masks in parametrizations (a buffer of 0 and 1 as large as the weight, as torch.ao.pruning has it) are taken over alike.
    Masks of whole rows or columns (ln_structured) are called so: prune then removes their units where it can.

    Raises UsageError where the model holds no such mask.

    >>> from torch.nn.utils import prune as torch_prune
    >>> net, plan = take_over(torch_prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))
    >>> plan.masks["weight"].density, [n for n, _ in net.named_buffers()]
    (0.5, [])
    """
    must_be("model", model, nn.Module)
    masks = {n: Mask.of(kept, _coarsest(kept)) for n, kept in torch_masks(model).items() if not kept.all()}
    if not masks:
        msg = "take_over must be given a model with masks of torch.nn.utils.prune, or in parametrizations. Got one without, or masks that keep all."
        raise UsageError(msg)
    copied, _ = plain_copy(model)
    fitting(dict(copied.named_parameters(remove_duplicate=False)), masks)
    refuse_empty(masks)
    modes = {n: m.training for n, m in model.named_modules()}
    for name, module in copied.named_modules():
        module.training = modes.get(name, module.training)
    return copied, Plan(keep={}, masks=masks, made_by={"verb": "take_over"})


def torch_masks(model: nn.Module) -> dict[str, Bools]:
    """Masks of torch.nn.utils.prune and those in parametrizations, by the name that the parameter has without them."""
    from torch.nn.utils import prune as torch_prune

    out = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, torch_prune.BasePruningMethod):
                leaf = hook._tensor_name
                kept = getattr(module, f"{leaf}_mask").detach().cpu().numpy() != 0
                out[f"{path}.{leaf}" if path else leaf] = kept
        for leaf, parts in getattr(module, "parametrizations", {}).items():
            held = _held_by(parts, getattr(module, leaf).detach())
            if held is not None:
                out[f"{path}.{leaf}" if path else leaf] = held
    return out


def _held_by(parametrizations: nn.Module, weight: Tensor) -> Bools | None:
    """What all masks among a weight's parametrizations keep: buffers of its shape that hold 0 and 1, where it is zero for 0."""
    kept = torch.ones_like(weight, dtype=torch.bool)
    for part in parametrizations.modules():
        for buffer in part.buffers(recurse=False):
            if buffer.shape == weight.shape and bool(((buffer == 0) | (buffer == 1)).all()):
                kept &= buffer != 0
    return None if bool(kept.all()) or bool((weight[~kept] != 0).any()) else kept.cpu().numpy()


def _coarsest(kept: Bools) -> str:
    """row or column where the mask is made of them, else element."""
    return next((text for text in ("row", "column") if Granularity.parse(text).holds(kept)), "element")


def _spread(name: str, kept: Bools, parameters: Mapping[str, Tensor]) -> Bools:
    tensor = parameters.get(name)
    if tensor is None:
        near = difflib.get_close_matches(str(name), list(parameters), n=3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        msg = f"a mask must name a parameter of the model. Got {name!r}.{hint}"
        raise UsageError(msg)
    shape = tuple(tensor.shape)
    if kept.shape == shape:
        return kept
    try:
        if kept.ndim != len(shape):
            raise ValueError
        return np.ascontiguousarray(np.broadcast_to(kept, shape))
    except ValueError as error:
        msg = f"a mask must have its parameter's shape {shape}, or 1 along some axes. Got {kept.shape} for {name}."
        raise UsageError(msg) from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        msg = f"a file of masks must be there. Got {str(path)!r}."
        raise RejectedError(msg)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {n: arrays[n] for n in arrays.files}
        from safetensors.torch import load_file

        return dict(load_file(path))
    except Exception as error:
        msg = f"a file of masks must be .safetensors or .npz, one array per parameter. Got {type(error).__name__} from {str(path)!r}."
        raise RejectedError(msg) from error


def _booleans(name: str, value: Any) -> Bools:
    if isinstance(value, Tensor):
        value = value.detach().cpu().to_dense()
        value = value.float() if value.dtype == torch.bfloat16 else value  # numpy has no bfloat16
    array = np.asarray(value)
    if array.dtype != np.bool_ and (array.dtype == object or not np.isin(array, (0, 1)).all()):
        msg = f"a mask must hold 0 and 1, or booleans; 1 is kept. Got other values for {name}."
        raise UsageError(msg)
    return np.asarray(array, dtype=np.bool_)
