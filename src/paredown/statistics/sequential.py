"""Layer after layer: the eval graph walked node by node with all batches in step, so that what is changed is seen behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError
from paredown.program import GraphModel, Program, placeholder_names
from paredown.statistics.batches import as_call, taken
from paredown.statistics.inputs import InputStatistics, Sums, input_statistics
from paredown.statistics.observe import Step
from paredown.statistics.uses import Use

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Run(fx.Interpreter):
    """The graph on one batch, one node at a time; values are dropped after their last use."""

    def __init__(self, body: fx.GraphModule, flat: list[Any]) -> None:
        super().__init__(body)
        self.args_iter = iter(flat)

    def next(self, node: fx.Node, *, keep: bool = False) -> None:
        """Run one node; `keep` drops nothing after it."""
        self.env[node] = self.run_node(node)
        if not keep:
            self.drop_after(node)

    def drop_after(self, node: fx.Node) -> None:
        """Drop the values that no node behind this one uses."""
        for used in self.user_to_last_uses.get(node, ()):
            del self.env[used]


def layer_by_layer(
    program: Program,
    state: Mapping[str, Tensor],
    calls: Sequence[Call],
    visit: Mapping[fx.Node, Callable[[Sequence[Run]], None]],
) -> None:
    """Walk the eval graph over `state`; before a node of `visit` runs, its function may change tensors of the state.

    It is given one Run per call, whose `env` holds the inputs of the node as the layers before it give them *now*.
    Nodes that come later see what was changed: there is no second pass to forget. Activations that are still needed of
    all calls are in memory.
    """
    names = placeholder_names(program.eval_graph)
    body = program.eval_graph.graph_module
    holders = [n.name for n in body.graph.nodes if n.op == "placeholder"]
    runs = []
    for call in calls:
        given = iter(pytree.tree_leaves(pytree.tree_map(_cloned, call)))
        runs.append(Run(body, [state[names[n]] if n in names else next(given) for n in holders]))
    last = max((i for i, n in enumerate(body.graph.nodes) if n in visit), default=-1)
    with torch.no_grad():
        for number, node in enumerate(body.graph.nodes):
            if node in visit:
                visit[node](runs)
            if number >= last:
                return
            for run in runs:
                run.next(node)


def inputs_now(
    program: Program,
    state: Mapping[str, Tensor],
    calls: Sequence[Call],
    runs: Sequence[Run],
    name: str,
    uses: Sequence[Use],
    *,
    gram: bool,
) -> InputStatistics:
    """The inputs of a weight in the midst of `layer_by_layer`, as the layers before it give them by then.

    A weight that is used again is looked at in all its uses, by a pass of its own.
    """
    if len(uses) > 1:
        now = dataclasses.replace(program, state=dict(state))
        batches = [{"args": args, "kwargs": kwargs} for args, kwargs in calls]
        return input_statistics(now, [name], batches, gram=gram, num_batches=len(calls))[name]
    sums = Sums(name, uses, gram=gram)
    for run in runs:
        sums.add(uses[0], run.env[uses[0].source])
    return sums.result(name)


def own_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clones of all tensors, to be changed in place; tied names share one."""
    copies: dict[int, Tensor] = {}
    for tensor in state.values():
        copies.setdefault(id(tensor), tensor.detach().clone())
    return {name: copies[id(tensor)] for name, tensor in state.items()}


def recorded_calls(program: Program, batches: Iterable[Any], loss: Step | None, num_batches: int) -> list[Call]:
    """The inputs of every call that the first batches make of the model, keywords in the captured order.

    Raises RejectedError where there is none, UsageError where inputs without a loss are others than were captured.
    """
    order = program.eval_graph.call_spec.in_spec.child(1).context or []
    seen: list[Call] = []
    if loss is None:
        seen = [as_call(program, batch, n) for n, batch in enumerate(taken(batches, num_batches))]
    else:
        model = GraphModel(program.eval_graph, None, program.state).eval()
        model.register_forward_pre_hook(lambda _m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for batch in taken(batches, num_batches):
                loss(model, batch)
    if not seen:
        msg = "batches must hold at least one batch, and a step must call its model. Got no call of the model."
        raise RejectedError(msg)
    return [(args, {n: kwargs[n] for n in order} if set(order) == set(kwargs) else kwargs) for args, kwargs in seen]


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
