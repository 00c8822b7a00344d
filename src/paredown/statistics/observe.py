"""Observe: the eval graph with onlookers beside chosen nodes, run on a user's batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError
from paredown.program import GraphModel, Program
from paredown.statistics.batches import as_call, taken

Look = Callable[[Any], None]
Step = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sight:
    """A look at the value of one node, at the moment when it is ready or when another node reads it."""

    node: fx.Node
    look: Look
    reader: fx.Node | None = None
    """What is in a tensor may change in place between the two."""


def observed(
    program: Program,
    sights: Sequence[Sight],
    batches: Iterable[Any],
    *,
    loss: Step | None = None,
    num_batches: int = 16,
    module: nn.Module | None = None,
) -> int:
    """Run the eval graph on the first `num_batches` batches; every look sees the value of its node.

    A batch is inputs (a tensor, a tuple, {"args": …, "kwargs": …}), or with `loss` whatever `loss(model, batch)`
    understands. `module` gives the weights where they are not the program's. Randomness of the caller is left alone.
    Returns the number of batches. Raises RejectedError (none, one without a sample, or a loss that never calls its model) and
    UsageError (without a loss: other inputs than were captured).
    """
    model = _model(program, sights, module)
    calls = [0]
    model.register_forward_pre_hook(lambda _m, _inputs: calls.__setitem__(0, calls[0] + 1))
    seen = 0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for batch in taken(batches, num_batches):
            if loss is None:
                args, kwargs = pytree.tree_map(_cloned, as_call(program, batch, seen))
                model(*args, **kwargs)
            else:
                loss(model, batch)
            seen += 1
    if seen == 0:
        msg = "batches must hold at least one batch. Got none. A generator must be made anew at each call."
        raise RejectedError(msg)
    if not calls[0]:
        msg = "a loss must call the model that it is given. Got one that called it on no batch."
        raise RejectedError(msg)
    return seen


def _model(program: Program, sights: Sequence[Sight], module: nn.Module | None) -> GraphModel:
    """The graph over the program's own tensors (none is copied, none is written to), in eval mode in both modes."""
    body = copy.deepcopy(program.eval_graph.graph_module)
    own = list(program.eval_graph.graph_module.graph.nodes)
    of = dict(zip(own, list(body.graph.nodes), strict=True))
    for sight in sights:
        with body.graph.inserting_before(_moment(sight, of)):
            body.graph.call_function(_named(sight.look), (of[sight.node],))
    body.recompile()
    return GraphModel(program.eval_graph, None, state_of(program, module), bodies=(body, body)).eval()


def state_of(program: Program, module: nn.Module | None) -> dict[str, Tensor]:
    """The tensors that the graph runs on: the module's own where it has them, else the program's."""
    state = dict(program.state)
    if module is None:
        return state
    given = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return state | {n: given[n] for n, tensor in state.items() if n in given and given[n].shape == tensor.shape}


def _named(look: Look) -> Look:
    """fx writes functions into its code by name."""

    def look_at(value: Any) -> None:
        look(value)

    return look_at


def _moment(sight: Sight, of: dict[fx.Node, fx.Node]) -> fx.Node:
    return of[sight.reader] if sight.reader is not None else of[sight.node].next


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
