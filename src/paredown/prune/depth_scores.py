"""Which modules may be left out, what each costs, and how much each matters: Block Influence, or measured loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from paredown.couple.ids import compact
from paredown.couple.trace import op_name, trace
from paredown.errors import RejectedError, UsageError, must_be
from paredown.examine import examine
from paredown.plan import Plan
from paredown.program import GraphModel, Program
from paredown.prune.depth import calls_of, grouped
from paredown.statistics.batches import Given, as_call, as_number, check_whole, once, taken
from paredown.train.loop import private_copy
from paredown.train.task import call_inputs

By = Literal["block_influence", "loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthCandidate:
    """A module that may be left out: its output has the shape and dtype of its input."""

    path: str
    kind: str
    """Class name."""
    parameters: int
    """Elements that leave with it; what is shared with other modules stays."""
    macs: int
    """MACs of one sample that leave with it."""
    residual: bool
    """Whether its input reaches its output through additions, past the weights: leaving it out keeps the rest's scale."""


def depth_candidates(program: Program, *, every: bool = False) -> tuple[DepthCandidate, ...]:
    """Modules that may be left out, in the order of the model: the innermost residual blocks.

    With `every` all modules with MACs whose output has their input's shape, nested ones too: stages, single layers of
    equal width. Empty where the model was rebuilt from graphs, which know no modules.

    >>> class Block(nn.Module):
    ...     def __init__(self): super().__init__(); self.conv = nn.Conv2d(4, 4, 3, padding=1)
    ...     def forward(self, x): return x + self.conv(x).relu()
    >>> from paredown.program import capture
    >>> program = capture(nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block()), torch.zeros(2, 3, 8, 8))
    >>> [(c.path, c.parameters, c.macs) for c in depth_candidates(program)]
    [('1', 148, 5184), ('2', 148, 5184)]
    """
    if isinstance(program.module, GraphModel):
        return ()
    macs: dict[str, int] = {}
    for cost in examine(program).by_node:
        node = cost.node.split(":")[0]
        macs[node] = macs.get(node, 0) + cost.macs
    called = grouped(program.eval_graph)
    found = []
    for path, module in program.module.named_modules():
        if not path or not any(macs.get(n.name, 0) for nodes in called.get(path, ()) for n in nodes):
            continue
        try:
            spans = calls_of(program, path)
        except UsageError:  # another shape, several results, or inputs that cannot be told apart
            continue
        found.append(
            DepthCandidate(
                path=path,
                kind=type(module).__name__,
                parameters=_leaving(program, path),
                macs=sum(macs.get(n.name, 0) for c in spans for n in c.inside),
                residual=all(_passes(c.source, c.result, set(c.inside), macs) for c in spans),
            )
        )
    if every:
        return tuple(found)
    blocks = [c for c in found if c.residual]
    return tuple(c for c in blocks if not any(b.path.startswith(f"{c.path}.") for b in blocks))


def score_depth(
    program: Program,
    batches: Given,
    *,
    by: By = "block_influence",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    modules: Sequence[str] | None = None,
    num_batches: int = 16,
    module: nn.Module | None = None,
) -> dict[str, float]:
    """How much each module matters: the lowest leaves first. In the order of the model.

    "block_influence": 1 − mean over positions of cos(input, output), over the channels (ShortGPT, Men et al. 2024, eq.
    1): 0 where a block only scales what it gets, at most 2; a position that is zero before and after counts 0. "loss": mean loss(model, batch) without the module − mean
    loss with it, measured one by one on the same batches. Batches are what `loss` takes; without a loss they are
    inputs. `modules` are paths (default: depth_candidates); `module` is the model to run where it is not the captured
    one. Where we differ: positions are all places of the feature map, for convolutions too.

    Raises UsageError (unknown module or `by`, no loss where one is needed) and RejectedError (no batch, values that
    are not finite).

    >>> from paredown.program import capture
    >>> class Block(nn.Module):
    ...     def __init__(self, gain): super().__init__(); self.fc = nn.Linear(4, 4); nn.init.constant_(self.fc.weight, gain)
    ...     def forward(self, x): return x + self.fc(x)
    >>> program = capture(nn.Sequential(Block(0.0), Block(1.0)), torch.ones(2, 4))
    >>> found = score_depth(program, [torch.randn(8, 4)])
    >>> found["0"] < found["1"]
    True
    """
    must_be("program", program, Program, fix="Use paredown.capture(model, inputs).")
    if by not in ("block_influence", "loss"):
        msg = f'by must be "block_influence" or "loss". Got {by!r}.'
        raise UsageError(msg)
    if by == "loss" and loss is None:
        msg = 'score_depth by "loss" must be given loss(model, batch) -> scalar. Got None.'
        raise UsageError(msg)
    paths = [c.path for c in depth_candidates(program)] if modules is None else list(modules)
    axes = {path: _channel_axis(program, path) for path in paths}  # also refuses what cannot be left out
    model = private_copy(module if module is not None else program.module).eval()
    check_whole("num_batches", num_batches)
    held = list(taken(once(batches), num_batches))
    if not held:
        msg = "batches must hold at least one batch. Got none."
        raise RejectedError(msg)
    if loss is None:
        for number, batch in enumerate(held):
            as_call(program, batch, number)
    with torch.no_grad():
        scores = _influence(model, axes, held, loss) if by == "block_influence" else _by_loss(model, paths, held, loss)
    bad = [p for p, s in scores.items() if not math.isfinite(s)]
    if bad:
        msg = f"scores must be finite. Got NaN or infinity for {', '.join(bad[:3])}."
        raise RejectedError(msg)
    return scores


def drop_lowest(scores: Mapping[str, float], remain: int) -> Plan:
    """A plan that leaves out the modules with the lowest scores, so that `remain` of them stay; of equal ones the later
    leaves first.

    >>> drop_lowest({"a": 0.3, "b": 0.1, "c": 0.2}, remain=1).drop_modules
    ('b', 'c')
    """
    if not 0 <= remain < len(scores):
        msg = f"modules that remain must be from 0 to {len(scores) - 1}, fewer than there are. Got {remain}."
        raise UsageError(msg)
    place = {path: i for i, path in enumerate(scores)}
    leaving = set(sorted(scores, key=lambda p: (scores[p], -place[p]))[: len(scores) - remain])
    made_by = {"verb": "drop_lowest", "remain": remain, "scores": {p: float(s) for p, s in scores.items()}}
    return Plan(keep={}, drop_modules=tuple(p for p in scores if p in leaving), made_by=made_by)


# --------------------------------------------------------------------------------------------------------------- scores


def _influence(
    model: nn.Module, axes: Mapping[str, int], batches: list[Any], loss: Callable[[nn.Module, Any], Tensor] | None
) -> dict[str, float]:
    total, count = dict.fromkeys(axes, 0.0), dict.fromkeys(axes, 0)
    given: dict[str, list[Tensor]] = {path: [] for path in axes}

    def before(path: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given[path].append(_first(args, kwargs).clone())  # a block may overwrite its input

        return note

    def after(path: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            axis = axes[path]
            one, two = given[path].pop().movedim(axis, -1), output.movedim(axis, -1)
            one, two = one.double(), two.double()
            cosine = nn.functional.cosine_similarity(one, two, dim=-1)
            cosine = torch.where((one == 0).all(-1) & (two == 0).all(-1), 1.0, cosine)  # nothing stays nothing
            total[path] += float((1 - cosine).sum())
            count[path] += cosine.numel()

        return note

    handles = [h for p in axes for h in (
        model.get_submodule(p).register_forward_pre_hook(before(p), with_kwargs=True),
        model.get_submodule(p).register_forward_hook(after(p)),
    )]  # fmt: skip
    try:
        for batch in batches:
            _run(model, batch, loss)
    finally:
        for handle in handles:
            handle.remove()
    silent = [p for p, n in count.items() if not n]
    if silent:
        msg = f"the batches must run every module. Got no call of {', '.join(silent[:3])}."
        raise RejectedError(msg)
    return {path: total[path] / count[path] for path in axes}


def _by_loss(
    model: nn.Module, paths: list[str], batches: list[Any], loss: Callable[[nn.Module, Any], Tensor] | None
) -> dict[str, float]:
    whole = _mean_loss(model, batches, loss)
    out = {}
    for path in paths:
        with _left_out(model.get_submodule(path)):
            out[path] = _mean_loss(model, batches, loss) - whole
    return out


@contextmanager
def _left_out(module: nn.Module) -> Iterator[None]:
    """Inside this block a module gives what it gets; it still runs, and its result is thrown away."""
    given: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(_first(args, kwargs).clone())

    def after(_module: nn.Module, _args: Any, _output: Any) -> Tensor:
        return given.pop()

    handles = (module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean_loss(model: nn.Module, batches: list[Any], loss: Callable[[nn.Module, Any], Tensor] | None) -> float:
    assert loss is not None  # checked by the caller
    return sum(as_number(loss(model, batch), number) for number, batch in enumerate(batches)) / len(batches)


def _run(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor] | None) -> None:
    if loss is not None:
        loss(model, batch)
        return
    args, kwargs = call_inputs(batch)
    model(*args, **kwargs)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    if found is None:
        msg = "a module to score must be given a tensor. Got none."
        raise UsageError(msg)
    return found


# ----------------------------------------------------------------------------------------------------------- candidates


def _passes(source: fx.Node, result: fx.Node, inside: set[fx.Node], macs: Mapping[str, int]) -> bool:
    """Whether a value reaches another through additions without passing a node that multiplies by weights."""
    todo, seen = [(source, False)], set()
    while todo:
        node, added = todo.pop()
        if node is result and added:
            return True
        if (node, added) in seen:
            continue
        seen.add((node, added))
        onward = [u for u in node.users if u in inside and not macs.get(u.name, 0) and u.op == "call_function"]
        todo += [(u, added or op_name(u).startswith("add")) for u in onward]
    return False


def _leaving(program: Program, path: str) -> int:
    inner = {id(p): p for p in program.module.get_submodule(path).parameters()}
    module = program.module.get_submodule(path)
    mine = {id(m) for m in module.modules()}
    outside = {id(p) for m in program.module.modules() if id(m) not in mine for p in m.parameters(recurse=False)}
    return sum(p.numel() for key, p in inner.items() if key not in outside)


def _channel_axis(program: Program, path: str) -> int:
    """The axis of a module's output that carries channels: the one that coupling found, or the usual one."""
    result = calls_of(program, path)[0].result
    dims = result.meta["val"].dim()
    ids = trace(program).ids.get(result)
    if isinstance(ids, Tensor):
        small = compact(ids)
        axes = [a for a in range(dims) if small.shape[a] > 1]
        if len(axes) == 1:
            return axes[0]
    return 1 if dims >= 4 else dims - 1
