"""Masks that survive training: zeros stay zero through momentum, weight decay and any optimizer.

Gradients of masked elements are zeroed before the step, so that no momentum gathers; after the step the elements are
set to zero again, whatever the optimizer did. At the end of every epoch the zeros are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from paredown.errors import UsageError, VerificationError, must_be
from paredown.plan import Mask, Plan
from paredown.train.loop import Hook, Training

Masks = Mapping[str, Mask]


class Held:
    """Masks as tensors beside the parameters of one module, on their device; tied names are one."""

    def __init__(self, module: nn.Module, masks: Masks) -> None:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        self._pairs: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for name, mask in masks.items():
            parameter = parameters.get(name)
            if parameter is None or tuple(parameter.shape) != mask.shape:
                got = "none of that name" if parameter is None else f"shape {tuple(parameter.shape)}"
                msg = f"a mask must fit its parameter. Got {got} for {name}, whose mask has shape {mask.shape}."
                raise UsageError(msg)
            self._pairs[name] = (parameter, torch.from_numpy(mask.kept))

    def set(self, name: str, kept: Tensor) -> None:
        """Another mask for a parameter (growth); shape and meaning as before."""
        self._pairs[name] = (self._pairs[name][0], kept)

    def kept(self, name: str) -> Tensor:
        """The mask of a parameter, bool, on its device."""
        parameter, kept = self._pairs[name]
        if kept.device != parameter.device:
            kept = kept.to(parameter.device)
            self._pairs[name] = (parameter, kept)
        return kept

    def names(self) -> tuple[str, ...]:
        """The masked parameters."""
        return tuple(self._pairs)

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter itself."""
        return self._pairs[name][0]

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Gradients of what is pruned become zero."""
        for name, (parameter, _) in self._pairs.items():
            if parameter.grad is not None and not parameter.grad.is_sparse:  # a sparse one: zero_weights does it
                parameter.grad.masked_fill_(~self.kept(name), 0.0)

    @torch.no_grad()
    def zero_weights(self) -> None:
        """What is pruned becomes zero; masked_fill, because infinity × 0 is not zero."""
        for name, (parameter, _) in self._pairs.items():
            parameter.masked_fill_(~self.kept(name), 0.0)

    def check(self) -> None:
        """Raises VerificationError where a pruned element is not zero."""
        for name, (parameter, _) in self._pairs.items():
            _refuse_alive(name, parameter, self.kept(name))


def check_zeros(module: nn.Module, masks: Masks) -> None:
    """The masked elements of a module must be zero, whatever trained it or wherever it was read from.

    Raises VerificationError with the layer and the count, and where a masked parameter is not there any more.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None or tuple(parameter.shape) != mask.shape:
            got = "none of that name" if parameter is None else f"shape {tuple(parameter.shape)}"
            msg = f"a masked parameter must be in the model with shape {mask.shape}. Got {got} for {name}."
            raise VerificationError(msg)
        _refuse_alive(name, parameter, torch.from_numpy(mask.kept).to(parameter.device))


def _refuse_alive(name: str, parameter: Tensor, kept: Tensor) -> None:
    alive = int(((parameter.detach() != 0) & ~kept).sum())  # NaN is not zero either
    if alive:
        msg = f"masked weights must stay zero. Got {alive:,} of {int((~kept).sum()):,} in {name} alive. Train with recover, or inside keep_masks(module, plan)."
        raise VerificationError(msg)


def mask_hook(module_masks: Masks) -> Hook:
    """A hook of the one training loop that keeps masks; it needs no state of its own in checkpoints."""
    held: dict[int, Held] = {}

    def of(training: Training) -> Held:
        key = id(training.module)
        if key not in held:
            held.clear()
            held[key] = Held(training.module, module_masks)
        return held[key]

    return Hook(
        name="masks",
        after_backward=lambda training: of(training).zero_gradients(),
        after_step=lambda training: of(training).zero_weights(),
        after_epoch=lambda training: of(training).check(),
    )


@contextmanager
def keep_masks(module: nn.Module, plan: Plan | Masks) -> Iterator[None]:
    """Inside this block every optimizer step of any training loop leaves the plan's zeros zero in `module`.

    For loops of one's own: no line of them changes. Gradients are masked before, weights after each step of any
    torch.optim optimizer that holds one of the masked parameters; at the end the zeros are checked. `module` may be
    wrapped by torch.compile, DataParallel or DistributedDataParallel, whose parameters are the module's own.

    Raises UsageError (the plan does not fit the module) and VerificationError (something else revived a weight).

    >>> import numpy as np
    >>> net = nn.Linear(2, 1, bias=False)
    >>> plan = Plan(keep={}, masks={"weight": Mask.of(np.array([[True, False]]), "element")})
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> with keep_masks(net, plan):
    ...     net(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> float(net.weight[0, 1].detach())
    0.0
    """
    must_be("plan", plan, Plan, Mapping, fix="A Pruned has one, small.plan.")
    masks = plan.masks if isinstance(plan, Plan) else plan
    module = _unwrapped(module)
    held = Held(module, masks)
    mine = {id(held.parameter(n)) for n in held.names()}

    def concerned(optimizer: torch.optim.Optimizer) -> bool:
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if concerned(optimizer):
            held.zero_gradients()

    def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if concerned(optimizer):
            held.zero_weights()

    held.zero_weights()
    # Hooks of all optimizers, because a loop of one's own makes its optimizer inside the block.
    handles = (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    check_zeros(module, masks)  # by name: a loop may have put other parameters in


def _unwrapped(module: nn.Module) -> nn.Module:
    """The user's own module inside of wrappers that put a prefix before its names."""
    while True:
        wrapped = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
        inner = module.module if wrapped else getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner
