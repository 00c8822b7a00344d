"""Masks that are learnt: movement and soft movement pruning, and SR-STE. Dense weights live on behind the masked ones.

The forward runs on W ⊙ M, the optimizer steps on W. Gradients go straight through the mask's choice (STE):

- movement (Sanh et al. 2020, "Movement pruning", section 4): one score per cell, dL/dS = Σ_cell dL/dW' ⊙ W, so that
  S grows where |w| moves away from zero; M keeps the highest S. W gets dL/dW' ⊙ M. Blocks, rows and columns: Lagunas et
  al. 2021, "Block pruning for faster transformers".
- soft movement: M = 1[sigmoid(S) > τ] with the penalty λ mean sigmoid(S); τ and λ grow cubically from 0. Density is what comes out.
- sr_ste (Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks", eq. 9): M keeps the largest
  |W|, chosen anew at each step; W gets dL/dW' + λ (1 - M) ⊙ W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paredown.errors import UsageError
from paredown.granularity import Granularity
from paredown.plan import Mask
from paredown.prune.schedule import cubic
from paredown.train.loop import Hook, Training
from paredown.train.masks import Held

Cells = Mapping[str, NDArray[np.float64]]
Kept = Mapping[str, NDArray[np.bool_]]
Pick = Callable[[Cells, float], Kept]
"""(score of every cell, density) → elements that stay."""


def _check_scores(lr: float, optimizer: str, refresh: int) -> None:
    if not (lr > 0 and refresh >= 1 and optimizer in ("adam", "sgd")):
        msg = (
            "movement must be given score_lr > 0, refresh ≥ 1 and score_optimizer adam or sgd. "
            f"Got {lr!r}, {refresh!r} and {optimizer!r}."
        )
        raise UsageError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """Options of criterion "movement". Source: the authors' code, huggingface/nn_pruning."""

    score_lr: float = 1e-2
    """Learning rate of the scores; without effect on the order of hard scores where the optimizer is "sgd"."""
    score_optimizer: Literal["adam", "sgd"] = "sgd"
    """sgd is the paper's equation, S = -lr Σ g·w; adam is what the authors' code uses."""
    refresh: int = 1
    """Optimizer steps between two choices of the mask."""

    def __post_init__(self) -> None:
        _check_scores(self.score_lr, self.score_optimizer, self.refresh)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftMovement:
    """Options of criterion "soft_movement": the density follows from threshold and penalty."""

    threshold: float = 0.1
    """τ at the end of the ramp; scores begin at 0, where sigmoid is 0.5."""
    penalty: float = 400.0
    """λ at the end of the ramp, on the mean of sigmoid(S) over all cells."""
    score_lr: float = 1e-2
    score_optimizer: Literal["adam", "sgd"] = "adam"
    refresh: int = 1
    least: float = 0.005
    """Share of the cells of each weight that always stays."""

    def __post_init__(self) -> None:
        _check_scores(self.score_lr, self.score_optimizer, self.refresh)
        rules = [
            ("threshold", 0 < self.threshold < 1, "in (0, 1)"),
            ("penalty", self.penalty >= 0, "≥ 0"),
            ("least", 0 <= self.least < 1, "a share in [0, 1)"),
        ]
        for name, holds, rule in rules:
            if not holds:
                msg = f"{name} of soft movement must be {rule}. Got {getattr(self, name)!r}."
                raise UsageError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class SrSte:
    """Options of criterion "sr_ste"."""

    penalty: float = 2e-4
    """λ on the weights that are masked now."""
    refresh: int = 1

    def __post_init__(self) -> None:
        if self.penalty < 0 or self.refresh < 1:
            msg = f"penalty must be ≥ 0 and refresh ≥ 1. Got {self.penalty!r} and {self.refresh!r}."
            raise UsageError(msg)


Learnt = Movement | SoftMovement | SrSte


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """How the masks of one training are learnt."""

    how: Learnt
    pick: Pick
    density: Callable[[int, int], float]
    """(steps done, steps in all) → share that stays; not asked by soft movement."""
    ramp: Callable[[int, int], float]
    """(steps done, steps in all) → progress in [0, 1] of threshold and penalty."""
    epochs: int
    granularity: Granularity


class LearntMasks:
    """Dense weights, scores and masks of one training; `hook` hangs them on `fit`."""

    def __init__(self, learning: Learning, weights: Mapping[str, Tensor], alive: Kept, kept: Kept) -> None:
        """`weights` are dense, `alive` what of them may ever stay, `kept` what the module given to `fit` has left."""
        self._learning, self._how, self._cut = learning, learning.how, learning.granularity
        self._alive = {n: torch.from_numpy(np.array(k)) for n, k in alive.items()}
        self._kept = {n: torch.from_numpy(np.array(k)) for n, k in kept.items()}
        self._latent = {n: weights[n].detach().clone() for n in alive}
        self._ids = {n: _cell_ids(self._cut, tuple(weights[n].shape)) for n in alive}
        scored = () if isinstance(self._how, SrSte) else alive
        self._score = {n: torch.zeros(int(np.prod(self._cut.grid(tuple(weights[n].shape))))) for n in scored}
        self._moments: dict[str, Tensor] = {}
        self._number = 0
        self._held: tuple[int, Held] | None = None
        self._first = self._state()

    @property
    def kept(self) -> dict[str, NDArray[np.bool_]]:
        """What stays as of now."""
        return {n: k.cpu().numpy() for n, k in self._kept.items()}

    @property
    def scores(self) -> dict[str, Tensor]:
        """One score per cell, flat in the order of the grid; empty for sr_ste."""
        return {n: s.clone() for n, s in self._score.items()}

    def hook(self, name: str) -> Hook:
        """For `fit`; the name says all options, since a checkpoint is only continued under the same name."""
        return Hook(
            name=name, after_backward=self._after_backward, after_step=self._after_step,
            after_epoch=lambda training: self._bound(training).check(), state=self._state, restore=self._restore,
        )  # fmt: skip

    def _bound(self, training: Training) -> Held:
        if self._held is None or self._held[0] != id(training.module):
            held = Held(training.module, {n: Mask.of(k.cpu().numpy(), str(self._cut)) for n, k in self._kept.items()})
            for kind in (self._alive, self._kept, self._latent, self._ids, self._score):
                for name, tensor in kind.items():
                    kind[name] = tensor.to(held.parameter(name).device)
            for name, tensor in self._moments.items():
                self._moments[name] = tensor.to(held.parameter(name.partition("/")[2]).device)
            self._held = (id(training.module), held)
        return self._held[1]

    @torch.no_grad()
    def _after_backward(self, training: Training) -> None:
        """Scores learn from dL/dW'; then the dense weights take the place of the masked ones, for the optimizer."""
        held = self._bound(training)
        self._number += 1
        progress = self._learning.ramp(training.step, training.steps * self._learning.epochs)
        num_cells = sum(s.numel() for s in self._score.values())
        for name in held.names():
            parameter, latent = held.parameter(name), self._latent[name]
            if parameter.grad is not None:
                if name in self._score:
                    self._learn(
                        name, _summed(parameter.grad * latent, self._ids[name], self._score[name]), progress, num_cells
                    )
                    parameter.grad.mul_(self._kept[name])
                elif isinstance(self._how, SrSte):
                    parameter.grad.add_(latent * ~self._kept[name], alpha=self._how.penalty).mul_(self._alive[name])
            parameter.copy_(latent)

    @torch.no_grad()
    def _after_step(self, training: Training) -> None:
        held, steps = self._bound(training), training.steps * self._learning.epochs
        for name in held.names():
            self._latent[name].copy_(held.parameter(name)).masked_fill_(~self._alive[name], 0.0)
        training.start_loss = math.inf  # a loss that grows with the zeros is no divergence; NaN still is
        done = training.step + 1
        if done % self._how.refresh == 0 or done >= steps:
            for name, kept in self._chosen(done, steps).items():
                self._kept[name] = (torch.from_numpy(kept).to(self._alive[name].device)) & self._alive[name]
                held.set(name, self._kept[name])
        for name in held.names():  # a product: what is not finite shows, and the loop rolls back
            held.parameter(name).copy_(self._latent[name] * self._kept[name])

    def _chosen(self, step: int, steps: int) -> Kept:
        if isinstance(self._how, SoftMovement):
            tau = cubic(0.0, self._how.threshold, self._learning.ramp(step, steps))
            return {n: self._above(n, s, tau) for n, s in self._score.items()}
        if isinstance(self._how, SrSte):
            values = {n: magnitude(w, self._cut) for n, w in self._latent.items()}
        else:
            values = {n: _numpy(s).reshape(self._cut.grid(tuple(self._alive[n].shape))) for n, s in self._score.items()}
        return self._learning.pick(values, self._learning.density(step, steps))

    def _above(self, name: str, score: Tensor, tau: float) -> NDArray[np.bool_]:
        assert isinstance(self._how, SoftMovement)
        kept = torch.sigmoid(score) > tau
        least = max(1, round(self._how.least * score.numel()))
        if int(kept.sum()) < least:
            kept = torch.zeros_like(kept)
            kept[torch.argsort(score, descending=True, stable=True)[:least]] = True
        shape = tuple(self._alive[name].shape)
        return self._cut.expand(kept.cpu().numpy().reshape(self._cut.grid(shape)), shape)

    def _learn(self, name: str, gradient: Tensor, progress: float, num_cells: int) -> None:
        """One step of the scores' own optimizer."""
        how, score = self._how, self._score[name]
        assert not isinstance(how, SrSte)
        if isinstance(how, SoftMovement):
            sigmoid = torch.sigmoid(score)
            weight = cubic(0.0, how.penalty, progress) / num_cells
            gradient = gradient + weight * sigmoid * (1 - sigmoid)
        if how.score_optimizer == "sgd":
            score.add_(gradient, alpha=-how.score_lr)
            return
        first, second = (self._moments.setdefault(f"{k}/{name}", torch.zeros_like(score)) for k in ("first", "second"))
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        size = how.score_lr / (1 - 0.9**self._number)
        score.addcdiv_(first, (second / (1 - 0.999**self._number)).sqrt().add_(1e-8), value=-size)

    def _state(self) -> dict[str, Tensor]:
        parts = {"kept": self._kept, "latent": self._latent, "score": self._score}
        flat = {f"{kind}/{n}": t.detach().cpu().clone() for kind, part in parts.items() for n, t in part.items()}
        moments = {f"moment/{n}": t.detach().cpu().clone() for n, t in self._moments.items()}
        return {**flat, **moments, "number": torch.tensor(self._number)}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        state = state or self._first
        parts: dict[str, dict[str, Tensor]] = {"kept": {}, "latent": {}, "score": {}, "moment": {}}
        for full, tensor in state.items():
            kind, _, name = full.partition("/")
            if name:
                parts[kind][name] = tensor.clone()
        self._kept = {n: t.bool() for n, t in parts["kept"].items()}
        self._latent, self._score, self._moments = parts["latent"], parts["score"], parts["moment"]
        self._number, self._held = int(state["number"]), None


def magnitude(weight: Tensor, granularity: Granularity) -> NDArray[np.float64]:
    """Mean square of every cell: comparable between cells of different sizes. Shape: the grid's."""
    return granularity.reduce(_numpy(weight) ** 2, "mean")


def _cell_ids(cut: Granularity, shape: tuple[int, ...]) -> Tensor:
    """The number of its cell for every element, flat."""
    grid = cut.grid(shape)
    numbers = np.arange(int(np.prod(grid))).reshape(grid)
    return torch.from_numpy(np.ascontiguousarray(cut.expand(numbers, shape)).reshape(-1))  # type: ignore[arg-type]


def _summed(values: Tensor, ids: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_add_(0, ids, values.reshape(-1).to(like.dtype))


def _numpy(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().double().numpy()


LEARNT: dict[str, Learnt] = {"movement": Movement(), "soft_movement": SoftMovement(), "sr_ste": SrSte()}
