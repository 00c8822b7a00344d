"""Distillation: a teacher runs on the very inputs that a forward hook saw on the student.

kl:  T² × mean over positions of Σ_c p_t log(p_t / p_s), p = softmax(z / T), on the first floating output tensor
     (Hinton, Vinyals & Dean 2015, section 2; T² keeps the gradient's size). Classes lie on the last axis of an output
     with up to three axes ([N, C], [N, T, C]) and on axis 1 of a larger one ([N, C, H, W]).
mse: mean squared difference, averaged over all floating output tensors.

Where a step calls the model several times (two views, a pair), the loss is the mean over the calls.

Layers, by patterns of module names, add `layers_weight` × mean over their floating outputs of Σ (s - t)² / Σ t² (a share
of what the teacher computes there, so that wide and narrow layers count alike). Their shapes must be the teacher's: blocks
whose inner channels left, masked layers. FitNets (Romero et al. 2015) compare squared errors behind a learnt projection;
here there is none to learn, and nothing is left behind in the student.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from paredown.errors import RejectedError, UsageError
from paredown.plain import deep_copy
from paredown.score.patterns import as_patterns

Distil = Literal["none", "kl", "mse"]


def distil_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² × KL(teacher ‖ student) at temperature T, mean over all positions but the class axis.

    >>> float(distil_kl(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), 4.0))
    0.0
    """
    axis = class_axis(student)
    log_s = F.log_softmax(student / temperature, dim=axis)
    log_t = F.log_softmax(teacher / temperature, dim=axis)
    return (log_t.exp() * (log_t - log_s)).sum(dim=axis).mean() * temperature**2


def class_axis(output: Tensor) -> int:
    """Where the classes of scores lie: on the last axis of up to three ([N, C], [N, T, C]), on axis 1 of a map ([N, C, H, W]).

    >>> class_axis(torch.zeros(4, 10)), class_axis(torch.zeros(4, 10, 8, 8))
    (-1, 1)
    """
    return 1 if output.dim() > 3 else -1


def check_classes(output: Tensor) -> None:
    """That kl has classes to compare; raises UsageError where the output has fewer than two.

    >>> check_classes(torch.zeros(4, 10))
    """
    if output.dim() == 0 or output.shape[class_axis(output)] < 2:
        msg = f"distil: kl must have at least two classes to compare. Got an output of shape {tuple(output.shape)}. Use distil: mse, or none."
        raise UsageError(msg)


Layers = dict[str, list[Tensor]]
"""Floating outputs of the layers of one call, by name."""


def distil_layers(student: Layers, teacher: Layers) -> Tensor:
    """Mean over all outputs of all layers of Σ (s - t)² / Σ t².

    >>> float(distil_layers({"a": [torch.tensor([1.0, 2.0])]}, {"a": [torch.tensor([1.0, 1.0])]}))
    0.5

    Raises RejectedError where an output has another shape than the teacher's.
    """
    shares = []
    for name, outputs in student.items():
        targets = teacher.get(name, [])
        if not outputs or [o.shape for o in outputs] != [t.shape for t in targets]:
            shapes = [tuple(t.shape) for t in targets], [tuple(o.shape) for o in outputs]
            msg = (
                f"a layer of distil_layers must have the teacher's outputs. Got {shapes[1]} where the teacher has {shapes[0]}, "
                f"at {name}. Name layers whose channels stay, as the outputs of blocks."
            )
            raise RejectedError(msg)
        shares += [
            (o - t).square().sum() / t.square().sum().clamp(min=1e-12) for o, t in zip(outputs, targets, strict=True)
        ]
    return torch.stack(shares).mean()


def matching_layers(student: nn.Module, teacher: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that match and that both have; raises UsageError for a pattern that matches none.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> matching_layers(net, net, ["[01]"])
    ['0', '1']
    """
    patterns = as_patterns(patterns)
    of_teacher = {n for n, _ in teacher.named_modules()}
    both = [n for n, _ in student.named_modules() if n and n in of_teacher]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(n, pattern) for n in both):
            hint = ", ".join(both[:8]) or "none: a pruned model that is a graph has no modules of its own"
            msg = f"distil_layers must be patterns of modules that student and teacher both have. Got {pattern!r}, which matches none. They have: {hint}."
            raise UsageError(msg)
    return [n for n in both if any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def taught_by(
    teacher: nn.Module | None, student: nn.Module, device: torch.device, kind: Distil, temperature: float,
    layers: Sequence[str], weight: float,
) -> Teacher | None:  # fmt: skip
    """A Teacher that listens to the student; None where nobody distils. Raises UsageError where only one half was given."""
    if teacher is None and kind != "none":
        msg = f'distil must be "none" where there is no teacher. Got {kind!r}.'
        raise UsageError(msg)
    if layers and kind == "none":
        msg = f"distil_layers must come with a teacher, and distil kl or mse. Got {list(as_patterns(layers))} with distil {kind!r}."
        raise UsageError(msg)
    if teacher is None or kind == "none":
        return None
    return Teacher(teacher, student, device, kind=kind, temperature=temperature, layers=layers, layers_weight=weight)


class _Outputs:
    """Notes what the watched modules of a model give in a call, a student's only in train mode."""

    def __init__(self, model: nn.Module, *, in_training: bool) -> None:
        self._model, self._in_training = model, in_training
        self._noted: Layers = {}
        self.handles: list[Any] = []

    def watch(self, name: str) -> None:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._model.training == self._in_training:
                # A copy: an in-place op behind the layer would change what it gave.
                self._noted.setdefault(name, []).extend(t.clone() for t in _tensors(output))

        self.handles.append(self._model.get_submodule(name).register_forward_hook(note))

    def taken(self) -> Layers:
        """What was noted since the last time."""
        noted, self._noted = self._noted, {}
        return noted


class Teacher:
    """Listens to the student's calls; `loss()` is the distillation loss of the calls since it was last asked."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        device: torch.device,
        *,
        kind: Distil,
        temperature: float,
        layers: Sequence[str] = (),
        layers_weight: float = 1.0,
    ) -> None:
        self._model = deep_copy(teacher).to(device).eval().requires_grad_(False)
        self._kind = kind
        self._temperature = temperature
        self._layers, self._layers_weight = tuple(layers), layers_weight
        self._taught, self._seen = _Outputs(self._model, in_training=False), _Outputs(student, in_training=True)
        for name in matching_layers(student, teacher, layers):
            self._taught.watch(name)
            self._seen.watch(name)
        self._pending: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._calls: list[tuple[tuple[tuple[Any, ...], dict[str, Any]], Any, Layers]] = []
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
        for (args, kwargs), output, layers in calls:
            with torch.no_grad():
                target = self._model(*args, **kwargs)
            loss = self._one(_tensors(output), _tensors(target))
            if self._layers and not layers:  # as a ModuleList, whose parts are called and not itself
                msg = f"distil_layers must name modules that a call of the model calls, with floating outputs. Got {list(self._layers)}, of which none gave any."
                raise UsageError(msg)
            if layers:
                loss = loss + self._layers_weight * distil_layers(layers, self._taught.taken())
            losses.append(loss)
        return torch.stack(losses).mean()

    def detach(self) -> None:
        """Stop listening."""
        for handle in (*self._handles, *self._seen.handles):
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
            check_classes(student[0])
            return distil_kl(student[0], teacher[0], self._temperature)
        return torch.stack([F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)]).mean()

    def _note_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Copied before the forward: an in-place op (ReLU on the input) would show the teacher something else.
        if module.training:
            self._seen.taken()  # of a call that did not end
            self._pending.append(
                pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, (args, kwargs))
            )

    def _note_output(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if module.training and self._pending:
            self._calls.append((self._pending.pop(), output, self._seen.taken()))


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
