"""Products with a Hessian at functions whose backward torch cannot differentiate: written out, or refused with their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """relu6(x + 3) / 6, which is what torch computes."""
    out: Tensor = functional.relu6(x + 3) / 6
    return x.copy_(out) if inplace else out


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """‖x1[i] − x2[j]‖ by its definition; of equal points the slope is 0 here as well."""
    del compute_mode
    out: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), ord=p, dim=-1)
    return out


_WRITTEN_OUT: dict[Any, Callable[..., Tensor]] = {
    functional.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid_: lambda x: _hardsigmoid(x, inplace=True),
    torch.ops.aten.hardsigmoid.default: _hardsigmoid,
    torch.ops.aten.hardsigmoid_.default: lambda x: _hardsigmoid(x, inplace=True),
    torch.cdist: _cdist,
    torch.functional.cdist: _cdist,
    torch.ops.aten.cdist.default: _cdist,
}


class TwiceDifferentiable(TorchFunctionMode):
    """While it is active, hardsigmoid and cdist are computed by functions that have a second derivative; the values are the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call what stands for `func`, or `func`."""
        return _WRITTEN_OUT.get(func, func)(*args, **(kwargs or {}))


def is_cut(slopes: Iterable[Tensor | None]) -> bool:
    """Whether a function marked `once_differentiable` made some of these: what lies behind it would be left out without a word."""
    nodes = _ancestors([s.grad_fn for s in slopes if s is not None], set())
    return any(type(node).__name__ == "Error" for node in nodes)


def refuse(criterion: str, said: str, model: nn.Module, loss: Callable[[], Tensor]) -> RejectedError:
    """What to raise for what torch said of a backward pass through a backward pass: which function, where, what to take instead.

    Runs `loss` (on `model`) once more, to see which module made the function.
    """
    found = re.search(r"(?:aten::|')_*(\w+?)_backward|double backwards on (\w+)", said)
    name = next(filter(None, found.groups())) if found else ""
    place = _place(name, model, loss)
    what = name or said.splitlines()[0]
    return RejectedError(
        f"every function must be one that torch can differentiate twice for {criterion}. Got {what} {place}. "
        "Take taylor2 or fisher, which need the gradient alone, or write that function with others."
    )


def _place(name: str, model: nn.Module, loss: Callable[[], Tensor]) -> str:
    """The innermost module in which a node of the backward pass, of that name or without a second derivative, was made."""
    seen: dict[Any, str] = {}
    hooks = []

    # Inner modules end first, so that the first name a node is given is that of the innermost one.
    def watch(label: str, module: nn.Module) -> None:
        def after(_: nn.Module, inputs: Any, output: Any) -> None:
            for node in _between(output, inputs):
                seen.setdefault(node, f"{label} ({type(module).__name__})")

        hooks.append(module.register_forward_hook(after))

    for label, module in model.named_modules():
        if label:
            watch(label, module)
    try:
        last = loss().grad_fn
    finally:
        for hook in hooks:
            hook.remove()
    for node in _ancestors([last], set()):
        if _is_culprit(node, name):
            return f"at {seen[node]}" if node in seen else "in the loss or the model's own forward"
    return "in the loss or the model's own forward"


def _is_culprit(node: Any, name: str) -> bool:
    if name:
        return name.replace("_", "") in node.name().lower()
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _between(output: Any, inputs: Any) -> list[Any]:
    stop = {t.grad_fn for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)}
    return _ancestors([t.grad_fn for t in pytree.tree_leaves(output) if isinstance(t, Tensor)], stop)


def _ancestors(start: list[Any], stop: set[Any]) -> list[Any]:
    ahead, found = list(start), dict[Any, None]()
    while ahead:
        node = ahead.pop()
        if node is None or node in found or node in stop:
            continue
        found[node] = None
        ahead += [n for n, _ in node.next_functions]
    return list(found)
