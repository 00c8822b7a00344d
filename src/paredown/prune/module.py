"""The module realiser: slice the user's own module by parameter name and set the sizes it keeps as attributes."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

from torch import Tensor, nn

from paredown.couple.trace import op_name
from paredown.program import GraphModel, Program, module_path
from paredown.prune.graph import conv_groups, norm_groups
from paredown.prune.removal import Removal, own, slice_state

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


Attributes = dict[str, dict[str, Any]]
"""Module path → {attribute: new value}, where it differs from the dense module's."""


def realise_module(program: Program, removal: Removal, *, by_value: bool) -> tuple[nn.Module, Attributes] | None:
    """A copy of the user's module without what leaves, or None where the module came as graphs.

    Sizes are set by axis role for torch's own layers and, with `by_value`, by value for user classes (an int attribute
    equal to a size that changed). Nothing is promised: prove decides whether the result is right.
    """
    if isinstance(program.module, GraphModel):
        return None
    source = tensors(program.module)
    state = slice_state(source, removal.trace.storage, removal.keep)
    groups = _groups(program, removal)
    changes = _changes(program, removal, {n: tuple(t.shape) for n, t in source.items()}, state)
    # Copy the module around its tensors, then put the cut ones in: no second copy of what leaves.
    module = copy.deepcopy(program.module, {id(t): t for t in source.values()})
    put_state(module, own(state, source))
    attributes: Attributes = {}
    for name, child in module.named_modules():
        wanted = _sizes(name, child, groups)
        if by_value and not type(child).__module__.startswith("torch.nn.modules"):
            wanted |= _by_value(child, changes.get(name, {}))
        wanted |= _sizes_without_weights(child, changes.get(name, {}))
        changed = {k: v for k, v in wanted.items() if getattr(child, k) != v}
        if changed:
            attributes[name] = changed
    set_attributes(module, attributes)
    return module.eval(), attributes


def set_attributes(module: nn.Module, attributes: Attributes) -> None:
    """Set the sizes that modules keep as attributes."""
    for path, values in attributes.items():
        for name, value in values.items():
            setattr(module.get_submodule(path), name, value)


def put_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Replace parameters and buffers by name; tied names keep sharing one Parameter."""
    made: dict[int, nn.Parameter] = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        old = owner._parameters.get(leaf)
        if old is not None:
            if id(tensor) not in made:
                made[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
            owner._parameters[leaf] = made[id(tensor)]
        elif leaf in owner._buffers:
            owner._buffers[leaf] = tensor.detach()


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name they have."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _groups(program: Program, removal: Removal) -> dict[str, int]:
    """Module path → new number of groups of its convolution or group norm."""
    out = {}
    for node in program.eval_graph.graph.nodes:
        if node.op != "call_function":
            continue
        name = op_name(node)
        groups = (
            conv_groups(node, removal)
            if name.startswith("conv")
            else norm_groups(node, removal)
            if name == "group_norm"
            else None
        )
        if groups is not None:
            out[module_path(node)] = groups
    return out


def _sizes(name: str, module: nn.Module, groups: dict[str, int]) -> dict[str, Any]:
    """Sizes of torch's own layers, by the role of each weight axis."""
    kind: Any = module
    if isinstance(module, _CONVS + _TRANSPOSED):
        num = groups.get(name, module.groups)
        first, second = module.weight.shape[:2]
        outs, ins = (first, second * num) if isinstance(module, _CONVS) else (second * num, first)
        return {"groups": num, "in_channels": ins, "out_channels": outs}
    if isinstance(module, nn.Linear):
        return {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
    if isinstance(module, nn.RNNBase):
        outs = kind.weight_hr_l0.shape[0] if module.proj_size else 0
        hidden = kind.weight_hr_l0.shape[1] if outs else kind.weight_hh_l0.shape[1]
        return {"input_size": kind.weight_ih_l0.shape[1], "hidden_size": hidden, "proj_size": outs}
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": module.weight.shape[1]}
    if isinstance(module, nn.GroupNorm):
        channels = module.weight.shape[0] if module.weight is not None else module.num_channels
        return {"num_groups": groups.get(name, module.num_groups), "num_channels": channels}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = module.weight if module.weight is not None else module.running_mean
        return {"num_features": tensor.shape[0] if tensor is not None else module.num_features}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
        return {"normalized_shape": tuple(module.weight.shape)}
    return {"groups": groups[name]} if name in groups and hasattr(kind, "groups") else {}


def _sizes_without_weights(module: Any, changes: dict[int, int]) -> dict[str, Any]:
    """Sizes of norms that have no weights to tell them, by value."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and not module.elementwise_affine:
        return {"normalized_shape": tuple(changes.get(size, size) for size in module.normalized_shape)}
    if isinstance(module, nn.modules.batchnorm._NormBase) and not module.affine and not module.track_running_stats:
        return {"num_features": changes.get(module.num_features, module.num_features)}
    return {}


def _changes(
    program: Program, removal: Removal, before: dict[str, tuple[int, ...]], state: dict[str, Tensor]
) -> dict[str, dict[int, int]]:
    """Module path → {old size: new size}, where one old size has one new one."""
    seen: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name, old in before.items():
        for a, b in zip(old, state[name].shape, strict=True):
            owner = name.rpartition(".")[0]
            seen[owner][a].add(b)
            seen[owner.rpartition(".")[0]][a].add(b)
    for node in program.eval_graph.graph.nodes:
        ids = removal.trace.ids.get(node)
        if node.op == "call_function" and isinstance(ids, Tensor):
            for a, b in zip(ids.shape, removal.shape(ids), strict=True):
                seen[module_path(node)][a].add(b)
    return {
        path: {a: next(iter(b - {a})) for a, b in sizes.items() if len(b - {a}) == 1} for path, sizes in seen.items()
    }


def _by_value(module: nn.Module, sizes: dict[int, int]) -> dict[str, Any]:
    return {
        name: sizes[value]
        for name, value in vars(module).items()
        if isinstance(value, int)
        and not isinstance(value, bool)
        and value in sizes
        and not name.startswith("_")
        and name != "training"
    }
