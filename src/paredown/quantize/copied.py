"""Copied: a program to quantize, without the capture that would give the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from paredown.program import Program


def eval_copy(program: Program) -> Program:
    """The program without its train graph and with tensors of its own; its module is the same one, which verbs copy before use."""
    graph, memo = copy.copy(program.eval_graph), dict[int, Any]()

    def own(values: Mapping[str, Any]) -> dict[str, Any]:
        held = {name: program.state.get(name, value) for name, value in values.items()}
        return {n: copy.deepcopy(v, memo) if isinstance(v, Tensor) else v for n, v in held.items()}

    graph._state_dict, graph._constants = own(graph.state_dict), own(graph.constants)
    every = {**graph.state_dict, **graph.constants}
    return replace(
        program,
        eval_graph=graph,
        train_graph=None,
        state={name: tensor for name, tensor in every.items() if isinstance(tensor, Tensor)},
        notes=tuple(note for note in program.notes if "train graph" not in note),
    )


def is_current(program: Program) -> bool:
    """Whether the module still holds the tensors of its capture: what is put in their place, as by load_state_dict(assign=True), is not in the graph."""
    module = program.module
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return all(
        name in held and _place(held[name]) == _place(program.state[name]) for name in program.eval_graph.state_dict
    )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()
