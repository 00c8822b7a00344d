"""Distillation: a teacher runs on the very inputs that a forward hook saw on the student.

kl:  T² × mean over positions of Σ_c p_t log(p_t / p_s), p = softmax(z / T), on the first floating output tensor
     (Hinton, Vinyals & Dean 2015, section 2; T² keeps the gradient's size). Classes lie on the last axis of an output
     with up to three axes ([N, C], [N, T, C]) and on axis 1 of a larger one ([N, C, H, W]).
mse: mean squared difference, averaged over all floating output tensors.

Where a step calls the model several times (two views, a pair), the loss is the mean over the calls.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError, UsageError

Distil = Literal["none", "kl", "mse"]


def distil_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² × KL(teacher ‖ student) at temperature T, mean over all positions but the class axis.

    >>> float(distil_kl(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), 4.0))
    0.0
    """
    axis = 1 if student.dim() > 3 else -1
    log_s = F.log_softmax(student / temperature, dim=axis)
    log_t = F.log_softmax(teacher / temperature, dim=axis)
    return (log_t.exp() * (log_t - log_s)).sum(dim=axis).mean() * temperature**2


class Teacher:
    """Listens to the student's calls; `loss()` is the distillation loss of the calls since it was last asked."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, device: torch.device, *, kind: Distil, temperature: float
    ) -> None:
        self._model = copy.deepcopy(teacher).to(device).eval().requires_grad_(False)
        self._kind = kind
        self._temperature = temperature
        self._pending: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._calls: list[tuple[tuple[tuple[Any, ...], dict[str, Any]], Any]] = []
        self._handles = [
            student.register_forward_pre_hook(self._note_inputs, with_kwargs=True),
            student.register_forward_hook(self._note_output, with_kwargs=True),
        ]

    def loss(self) -> Tensor:
        """Mean over the student's calls; raises UsageError where step did not call the model."""
        calls, self._calls, self._pending = self._calls, [], []
        if not calls:
            msg = (
                "step must call model(*inputs) for the teacher to see the inputs. Got no call. Do not call "
                "model.forward or parts of the model."
            )
            raise UsageError(msg)
        losses = []
        for (args, kwargs), output in calls:
            with torch.no_grad():
                target = self._model(*args, **kwargs)
            losses.append(self._one(_tensors(output), _tensors(target)))
        return torch.stack(losses).mean()

    def detach(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def _one(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        if self._kind == "kl":
            student, teacher = student[:1], teacher[:1]
        if not student or [t.shape for t in student] != [t.shape for t in teacher]:
            shapes = [tuple(t.shape) for t in student], [tuple(t.shape) for t in teacher]
            msg = (
                f"teacher and student must have floating outputs of one structure. Got {shapes[1]} and {shapes[0]}. "
                "Use distil: none."
            )
            raise RejectedError(msg)
        if self._kind == "kl":
            if student[0].dim() == 0 or student[0].shape[1 if student[0].dim() > 3 else -1] < 2:
                msg = (
                    "distil: kl must have at least two classes to compare. Got an output of shape "
                    f"{tuple(student[0].shape)}. Use distil: mse."
                )
                raise UsageError(msg)
            return distil_kl(student[0], teacher[0], self._temperature)
        return torch.stack([F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]).mean()

    def _note_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Copied before the forward: an in-place op (ReLU on the input) would show the teacher something else.
        if module.training:
            self._pending.append(
                pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, (args, kwargs))
            )

    def _note_output(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if module.training and self._pending:
            self._calls.append((self._pending.pop(), output))


def _tensors(output: Any) -> list[Tensor]:
    """Floating tensors of an output, in order; dataclasses and mappings that pytree does not know are opened."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, f.name) for f in dataclasses.fields(output)]
    elif isinstance(output, Mapping):
        output = list(output.values())
    found = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            if leaf.is_floating_point():
                found.append(leaf)
        elif (dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)) or isinstance(leaf, Mapping):
            found += _tensors(leaf)
    return found
