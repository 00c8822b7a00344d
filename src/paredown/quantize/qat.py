"""Quantization-aware training: the calibrated network trained on with its rounding in place, steps learned along."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e import ObserverBase

from paredown.errors import RejectedError
from paredown.placed import place
from paredown.plan import Mask
from paredown.program import Program, quiet
from paredown.prune.nouns import Pruned
from paredown.quantize.batches import Batches, tensors_of
from paredown.quantize.decompose import fetch
from paredown.quantize.fixed import FixedRange
from paredown.quantize.nouns import Quantized
from paredown.quantize.observe import PerChannel
from paredown.quantize.pairs import within
from paredown.quantize.ranges import apart, range_of
from paredown.quantize.rehearse import Rounding
from paredown.quantize.schemes import Levels
from paredown.quantize.static import Calibrated, Owner, calibrated, converted
from paredown.quantize.zeros import refuse_zeros, usable_steps
from paredown.train import fit
from paredown.train.distil import Distil
from paredown.train.loop import Hook, Progress, Training, usable_device
from paredown.train.task import Step

LEARN_STEPS = 0.75
"""Share of the training after which steps stay as they are."""
_WATCHED = 16
"""Calls of the model whose inputs are looked at."""
MOST = 0.02
"""Of itself that a step may move at one update: with few weights to a channel its gradient is noise, and it would reach 0."""


class LearnedStep(ObserverBase):  # type: ignore[misc]
    """Rounds what passes, on a grid whose step is trained (LSQ).

        x̂ = s · (round(clip(x / s + z, qmin, qmax)) - z),   gradient of s scaled by g = 1 / √(N · qmax)

    The gradient passes through round as through the identity; outside the range x gets none and s gets ±qmax (Esser et al.
    2020, arXiv 1902.08153, equations 1 to 5). N is how many values share the step: of a channel for weights, of one
    sample for activations. z stays as calibrated. Balanced, ternary and binary levels pass the gradient on as far as the outermost
    level's own cell reaches, ±4 s, ±1.5 s and ±2 s (ParetoQ, see schemes.weight_range). We differ in where s starts, at the calibrated step, and in how far
    one update may take it (`MOST`). Where a weight has one scale for all channels, one step is trained, and written for each of them.
    """

    def __init__(self, observer: Any, keep: Tensor | None = None) -> None:
        super().__init__(dtype=observer.dtype)
        self.quant_min, self.quant_max, self.qscheme = observer.quant_min, observer.quant_max, observer.qscheme
        scale, zero_point = observer.calculate_qparams()
        self.one_scale = bool(getattr(observer, "one_scale", False))
        self.channels = len(scale) if self.one_scale else 0
        if self.one_scale:  # a step per channel would be free to leave the others
            scale, zero_point = scale.max(), zero_point[0]
        self.levels: Levels = getattr(observer, "levels", "integer")
        self.scale = nn.Parameter(scale.detach().clone().float())
        self.register_buffer("zero_point", zero_point.detach().clone())
        self.register_buffer("keep", keep)
        if hasattr(observer, "ch_axis"):
            self.ch_axis = observer.ch_axis
        self.limit: int | None = getattr(observer, "limit", None)
        self.is_fixed = isinstance(observer, FixedRange)
        """Whether the kernel takes one scale and no other."""

    def hold_pairs(self, weight: Tensor) -> None:
        """Move weights whose codes break the rule of pairs (see pairs.py) to the nearest codes that keep it, in place."""
        if self.limit is None:
            return
        kept = weight.detach() if self.keep is None else weight.detach() * self.keep
        rows = kept.movedim(self.ch_axis, 0)
        scale = self.scale.detach().clamp_min(1e-12).reshape(-1, *[1] * (rows.dim() - 1))
        codes = (rows / scale).round().clamp(self.quant_min, self.quant_max).flatten(1)
        held = within(codes, rows.shape[1:], self.limit)
        moved = held != codes
        if bool(moved.any()):
            there = torch.where(moved.reshape(rows.shape), held.reshape(rows.shape) * scale, rows)
            weight.data.copy_(there.movedim(0, self.ch_axis))

    def forward(self, x: Tensor) -> Tensor:
        """x rounded."""
        x = x if self.keep is None else x * self.keep
        samples = 1 if self.scale.dim() or self.one_scale or not x.dim() else max(x.shape[0], 1)
        share = x.numel() / max(self.scale.numel(), 1) / samples
        gain = (max(share, 1.0) * max(self.quant_max, 1)) ** -0.5
        scale, zero_point = self.scale.clamp_min(1e-12), self.zero_point
        if scale.dim():
            shape = [1] * x.dim()
            shape[self.ch_axis] = -1
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        ends = self.quant_min, self.quant_max
        return Rounding.apply(x, scale, zero_point, *ends, self.levels, gain)  # type: ignore[no-any-return, no-untyped-call]

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int64); of a weight [channels], whether they are equal or not."""
        scale, zero_point = self.scale.detach().clamp_min(1e-12), self.zero_point
        if self.one_scale:
            scale, zero_point = scale.expand(self.channels), zero_point.expand(self.channels)
        return scale.clone(), zero_point.clone()


class Rehearsal(nn.Module):
    """The prepared graph as a module that can be trained: `train()` and `eval()` do nothing to an exported graph."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph
        self.input_range, self._left = range_of(()), _WATCHED

    def train(self, mode: bool = True) -> Rehearsal:
        """Only the flag: batch norm is folded, dropout is not in the graph."""
        self.training = mode
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model is called."""
        if self._left:
            self._left -= 1
            self.input_range = range_of(tensors_of((args, kwargs)), self.input_range)
        return self.graph(*args, **kwargs)


def train_quantized(
    tuned: Pruned | Program,
    train_batches: Callable[[], Any],
    *,
    step: Step,
    calibrate: Batches | None = None,
    target: str = "onnxruntime-x86",
    scheme: str = "int8",
    observer: Literal["minmax", "mse"] = "mse",
    num_samples: int | None = None,
    repair: Sequence[str] = (),
    weights: Literal["channel", "tensor"] = "channel",
    float_layers: Sequence[str] = (),
    bits: Mapping[str, int] | None = None,
    idle_repairs: bool = False,
    epochs: int = 3,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    clip_norm: float | None = 2.0,
    teacher: nn.Module | None = None,
    distil: Distil | None = None,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    max_steps: int | None = None,
) -> Quantized:
    """Quantization-aware training: `quantize`, then epochs of training with every rounding in the forward pass.

    Starts from the calibrated (and, with `repair`, rounded) network; batch norm is folded and frozen, dropout is left
    out. Weights, biases and steps (see LearnedStep) are trained by the one training loop (`fit`: SGD, cosine); after three quarters
    of the steps the grids stay as they are. A weight that the model computes from parameters (standardised, normalised) is trained as
    the tensor that it comes to, no longer by its parameters. Steps and biases have no weight decay. Gradients longer
    than `clip_norm` are shortened to it: without batch norm nothing else holds a step back. Zeros of a mask stay zeros.
    `step(model, batch) -> loss` and `teacher`, `distil`, `checkpoint`, `progress` as for `fit`; with a teacher `distil` is
    "kl" unless said otherwise. The codes of the result are those that the last forward pass used. Where products of neighbours could
    overflow (pairs.py), weights that break the rule move back to codes that keep it after every step. A channel of zeros starts
    with the median step of its layer, since its own says nothing of the weights that it will have. `notes` say where training inputs have another range than those of the calibration.

    Raises what `quantize` and `fit` raise, and RejectedError for a layer that has no weight but 0: nothing in it can be learnt.

    >>> from paredown.program import capture
    >>> net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 8)
    >>> batches = [(x, (x[:, 0] > 0).long())]
    >>> step = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> small = train_quantized(capture(net, x[:2]), lambda: batches, step=step, calibrate=[x], scheme="w4a8", epochs=1)
    >>> {name: packed.bits for name, packed in small.weights.items()}
    {'0.weight': 4, '2.weight': 4}
    """
    base = calibrated(
        tuned, target=target, calibrate=calibrate, scheme=scheme, observer=observer, num_samples=num_samples,
        repair=repair, weights=weights, float_layers=float_layers, bits=bits, idle_repairs=idle_repairs,
    )  # fmt: skip
    refuse_zeros(base)
    rehearsal = Rehearsal(learnable(base, masks_of(tuned)))
    place(rehearsal.graph, usable_device(device))
    fitted = fit(
        rehearsal,
        train_batches,
        step,
        epochs=epochs,
        optimizer=_optimizer(lr, momentum, weight_decay),
        clip_norm=clip_norm,
        seed=seed,
        device=device,
        teacher=teacher,
        distil="none" if teacher is None else distil or "kl",
        hooks=[_steady_steps(epochs), _pairs_kept(), _others_masked(rehearsal.graph, masks_of(tuned))],
        checkpoint=checkpoint,
        progress=progress,
        max_steps=max_steps,
    )
    assert isinstance(fitted.module, Rehearsal)
    place(fitted.module.graph, torch.device("cpu"))
    made = finished(base, fitted.module.graph)
    odd = (
        "" if base.input_range is None else apart(base.input_range, fitted.module.input_range, "those of the training")
    )
    return replace(made, notes=(*made.notes, odd)) if odd else made


def masks_of(tuned: Pruned | Program) -> Mapping[str, Mask]:
    """The masks of a plan, by parameter."""
    return tuned.plan.masks if isinstance(tuned, Pruned) else {}


def learnable(base: Calibrated, masks: Mapping[str, Mask]) -> fx.GraphModule:
    """A copy of the prepared graph whose observers are learned steps and whose weights can be trained."""
    with quiet("torchao"):
        graph = copy.deepcopy(base.prepared)
    made: dict[int, LearnedStep] = {}
    for node in graph.graph.nodes:
        if node.op != "call_module":
            continue
        observer: Any = fetch(graph, str(node.target))
        if isinstance(observer, LearnedStep) or not hasattr(observer, "calculate_qparams"):
            continue
        keep = None
        if isinstance(observer, PerChannel):
            owner, weight = base.owner_of(node), fetch(graph, str(node.args[0].target))
            keep = _kept(masks[owner.parameter], weight, owner) if owner.parameter in masks else None
        if id(observer) not in made:
            made[id(observer)] = LearnedStep(observer, keep)
            if isinstance(observer, PerChannel):
                step = made[id(observer)]
                step.scale.data = usable_steps(step.scale.data, weight, observer.ch_axis)
        graph.add_submodule(str(node.target), made[id(observer)])
    for parameter in graph.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for step in made.values():
        step.scale.requires_grad_(not step.is_fixed)
    graph.recompile()
    return graph


def _kept(mask: Mask, weight: Tensor, owner: Owner) -> Tensor | None:
    kept = torch.from_numpy((mask.kept.T if owner.transposed else mask.kept).copy())
    if owner.computed and (kept.shape != weight.shape or bool((weight[~kept.bool()] != 0).any())):
        return None  # what is computed from a pruned weight, as a standardised one, has no zeros to keep
    if kept.shape != weight.shape:
        msg = f"a mask must have the shape of its weight. Got {tuple(kept.shape)} for {tuple(weight.shape)}."
        raise RejectedError(msg)
    return kept.to(weight.dtype)


def finished(base: Calibrated, graph: fx.GraphModule) -> Quantized:
    """The trained graph with its codes fixed."""
    with torch.no_grad():
        for node in graph.graph.nodes:
            held: Any = fetch(graph, str(node.target)) if node.op == "call_module" else None
            if isinstance(held, LearnedStep) and held.keep is not None:
                weight = fetch(graph, str(node.args[0].target))
                weight.data = weight.detach() * held.keep
        for parameter in graph.parameters():
            parameter.requires_grad_(False)
    return converted(base, copy.deepcopy(graph))  # the trained module stays what it is


def _optimizer(lr: float, momentum: float, weight_decay: float) -> Callable[[Any], torch.optim.Optimizer]:
    def make(parameters: Any) -> torch.optim.Optimizer:
        held = list(parameters)
        groups = [
            {"params": [p for p in held if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in held if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=momentum)

    return make


def _pairs_kept() -> Hook:
    """After every step no two neighbouring codes of 8 bits overflow (after _steady_steps, which moves the grid)."""

    def after_step(training: Training) -> None:
        assert isinstance(training.module, Rehearsal)
        graph = training.module.graph
        for node in graph.graph.nodes:
            held: Any = fetch(graph, str(node.target)) if node.op == "call_module" else None
            if isinstance(held, LearnedStep) and held.limit is not None:
                held.hold_pairs(fetch(graph, str(node.args[0].target)))

    return Hook(name="pairs kept", after_step=after_step)


def _others_masked(graph: fx.GraphModule, masks: Mapping[str, Mask]) -> Hook:
    """After every step biases and layers in float are zero where a mask says so.

    Not where they are something else to begin with: a bias into which a batch norm was folded, or that a repair changed.
    """
    gone = {}
    for name, parameter in graph.named_parameters():
        pruned = ~torch.from_numpy(masks[name].kept) if name in masks else torch.zeros(0)
        if pruned.shape == parameter.shape and not bool(parameter.detach()[pruned.to(parameter.device)].any()):
            gone[name] = pruned.to(parameter.device)

    def after_step(training: Training) -> None:
        assert isinstance(training.module, Rehearsal)
        with torch.no_grad():
            for name, pruned in gone.items():
                training.module.graph.get_parameter(name).masked_fill_(pruned, 0.0)

    return Hook(name="other masks", after_step=after_step)


def _steady_steps(epochs: int) -> Hook:
    """Steps move by two hundredths at most, and not at all in the last quarter: weights settle on a grid that stands still."""
    before: dict[LearnedStep, Tensor] = {}

    def after_backward(training: Training) -> None:
        rest = training.step >= LEARN_STEPS * training.steps * epochs
        for module in training.module.modules():
            if isinstance(module, LearnedStep):
                before[module] = module.scale.detach().clone()
                if rest:
                    module.scale.grad = None

    def after_step(training: Training) -> None:
        del training
        with torch.no_grad():
            for module, scale in before.items():
                module.scale.clamp_(scale * (1 - MOST), scale * (1 + MOST))

    return Hook(name="steady steps", after_backward=after_backward, after_step=after_step)
