"""The module realiser of ranks: nn.Sequential of factors in the place of a linear layer or a convolution."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paredown.plan import Rank
from paredown.program import GraphModel
from paredown.prune.factors import Conv, Link, links
from paredown.prune.module import tensors

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def realise_factor_module(model: nn.Module, ranks: Mapping[str, Rank]) -> nn.Module | None:
    """A copy of the user's module with chains (weights not yet set) in the place of layers, or None where it cannot be.

    It cannot where a weight does not belong to torch's own nn.Linear or nn.Conv (a class with a forward of its own, a
    weight without a module, hooks on the layer), or where the model itself is the layer. Whether the parents call the
    layer as a module, and read nothing else of it, only a proof can tell.
    """
    if isinstance(model, GraphModel):
        return None
    every = tensors(model)
    owners = {name: _owners(model, every[name]) for name in ranks if name in every}
    if len(owners) < len(ranks) or any(o is None for o in owners.values()):
        return None
    leaving = {id(every[name]): every[name] for name in ranks}
    out = copy.deepcopy(model, dict(leaving))  # no second copy of what leaves
    for name, rank in ranks.items():
        _replace(out, owners[name] or {}, rank)
    return out.eval()


def _owners(model: nn.Module, weight: Tensor) -> dict[int, list[str]] | None:
    """Modules whose weight this is, each by all its paths; None where one of its owners cannot be replaced."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in module._parameters.items():
            if tensor is not weight:
                continue
            if leaf != "weight" or not path or not _is_plain(module):
                return None
            found.setdefault(id(module), []).append(path)
    return found or None


def _is_plain(module: nn.Module) -> bool:
    kind: Any = type(module)
    base: Any = next((b for b in _PLAIN if isinstance(module, b)), None)
    if base is None or kind.forward is not base.forward:
        return False
    if base is not nn.Linear and kind._conv_forward is not base._conv_forward:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    inside = (*module._modules, *module._buffers, *(set(module._parameters) - {"weight", "bias"}))
    return not any(hooks) and not inside


def _replace(model: nn.Module, owners: Mapping[int, list[str]], rank: Rank) -> None:
    """Put one chain at every path of a module; modules that share a weight share its factors."""
    shared: list[nn.Parameter] | None = None
    for paths in owners.values():
        made = chain_of(model.get_submodule(paths[0]), rank)
        if shared is None:
            shared = [link.weight for link in made]  # type: ignore[misc]
        for link, weight in zip(made, shared, strict=True):
            link.weight = weight
        for path in paths:
            parent, _, leaf = path.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = made


def chain_of(module: nn.Module, rank: Rank) -> nn.Sequential:
    """The chain that takes a layer's place, with uninitialised weights and the layer's own bias on the last link."""
    layer: Any = module
    shape = tuple(layer.weight.shape)
    conv = None
    if not isinstance(module, nn.Linear):
        padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
        conv = Conv(stride=tuple(layer.stride), padding=padding, dilation=tuple(layer.dilation), groups=layer.groups)
    made = [_module(link, layer) for link in links(shape, conv, rank)]
    made[-1].bias = layer.bias
    return nn.Sequential(*made).train(module.training)


def _module(link: Link, layer: Any) -> nn.Module:
    out, depth = link.shape[:2]
    like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    made: nn.Module
    if link.conv is None:
        made = nn.utils.skip_init(nn.Linear, depth, out, bias=False, **like)
    else:
        conv, axes = link.conv, len(link.shape) - 2
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        still = not isinstance(conv.padding, str) and not any(conv.padding)
        made = nn.utils.skip_init(
            kind, depth * conv.groups, out, link.shape[2:], stride=conv.stride, padding=conv.padding,
            dilation=conv.dilation, groups=conv.groups, bias=False,
            padding_mode="zeros" if still else layer.padding_mode, **like,
        )  # fmt: skip
    with torch.no_grad():
        made.get_parameter("weight").zero_()
    made.requires_grad_(layer.weight.requires_grad)
    return made
