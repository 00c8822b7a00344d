"""Graphs on another device: torch.export builds the device that it ran on into `arange`, `zeros`, `to` and their like."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree


def place(body: fx.GraphModule, device: torch.device) -> None:
    """Put every device that is built into a graph, in place.

    >>> net = fx.symbolic_trace(lambda x: x.to(torch.device("meta")))
    >>> place(net, torch.device("cpu")); net(torch.ones(1))
    tensor([1.])
    """
    for module in body.modules():
        if isinstance(module, fx.GraphModule) and _others(module, device):
            for node in module.graph.nodes:
                node.args, node.kwargs = (_with(device, given) for given in (node.args, node.kwargs))
            module.recompile()


def placed(body: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The graph itself where nothing in it says another device, else a copy that says this one."""
    graphs = [module for module in body.modules() if isinstance(module, fx.GraphModule)]
    if not any(_others(graph, device) for graph in graphs):
        return body
    copied = copy.deepcopy(body).to(device)
    place(copied, device)
    return copied


def where(tensors: list[Any]) -> torch.device:
    """The device that a graph is called on: of the first tensor that is on none but the CPU's, else the CPU."""
    found = (value.device for value in tensors if isinstance(value, Tensor) and value.device.type != "cpu")
    return next(found, torch.device("cpu"))


def _others(graph: fx.GraphModule, device: torch.device) -> bool:
    leaves = (leaf for node in graph.graph.nodes for leaf in pytree.tree_leaves((node.args, node.kwargs)))
    return any(isinstance(leaf, torch.device) and leaf != device for leaf in leaves)


def _with(device: torch.device, given: Any) -> Any:
    return pytree.tree_map(lambda leaf: device if isinstance(leaf, torch.device) else leaf, given)
